"""The frame of a page: one HTML file that needs no network, no other file and, to be read, no script."""

from __future__ import annotations

import base64
import hashlib

from flatwise.report.figure import asset
from flatwise.report.markup import Markup, tag


def document(title: str, *body: Markup) -> str:
    """Write a page.

    Args:
        title: of the window.
        *body: what is on it.

    Returns:
        The page.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy()),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(asset("chart.css") + asset("style.css"))),
    )
    said = tag("div", id="said", class_="away", role="status", aria_live="polite")
    whole = tag("body", *body, said, tag("script", Markup(asset("script.js"))))
    return f"<!doctype html>\n{tag('html', head, whole, lang='en')}\n"


def _policy() -> str:
    # Nothing is loaded from anywhere, and no script runs but this one, whatever a name may hold.
    digest = base64.b64encode(hashlib.sha256(asset("script.js").encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"

"""The page as text: whole, hardened, accessible, and deaf to what names may hold."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from rich.console import Console
from tests.report.pages import entry, page, results

from flatwise.lab.table import print_table
from flatwise.report.content import Missing
from flatwise.report.markup import VOID
from flatwise.report.sections import results_table

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'--><b>&amp;</title></style><script>alert(1)</script>",
    "javascript:alert(1)//<!--",
]


class Tree(HTMLParser):
    """Reads a page as a browser does where it matters: every element closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree(page().html)


def test_every_element_is_closed_and_every_id_is_one(tree: Tree) -> None:
    ids = [attributes["id"] for _, attributes in tree.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in tree.all("a") if (a.get("href") or "").startswith("#")]
    assert {str(link)[1:] for link in links} <= set(ids)


def test_nothing_is_fetched(tree: Tree) -> None:
    for name, attributes in tree.elements:
        for key in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:")), (name, key, value)
    assert "url(" not in page().html
    assert "@import" not in page().html


def test_the_policy_lets_one_script_run_and_nothing_be_fetched(tree: Tree) -> None:
    (policy,) = [m["content"] for m in tree.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    script = page().html.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_landmarks_headings_and_text_alternatives(tree: Tree) -> None:
    for landmark in ("header", "nav", "main", "footer"):
        assert len(tree.all(landmark)) == 1
    assert len(tree.all("h1")) == 1
    levels = [int(name[1]) for name, _ in tree.elements if re.fullmatch(r"h\d", name)]
    assert all(b - a <= 1 for a, b in pairwise(levels)), levels
    for drawing in tree.all("svg"):
        assert drawing.get("aria-hidden") == "true" or drawing.get("aria-label"), drawing
    for drawing in tree.all("canvas"):
        assert drawing["aria-label"]
        assert drawing["tabindex"] == "0"
    assert len(tree.all("figcaption")) == len(tree.all("figure")) == 5
    assert all(th.get("scope") in ("col", "row") for th in tree.all("th"))
    assert len(tree.all("caption")) == len(tree.all("table"))


def test_sortable_columns_say_so(tree: Tree) -> None:
    assert [th["aria-sort"] for th in tree.all("th") if "aria-sort" in th]
    assert len([b for b in tree.all("button") if b.get("class") == "sort"]) == len(
        [th for th in tree.all("th") if "aria-sort" in th]
    )


def test_what_is_on_the_page(tree: Tree) -> None:
    text = " ".join(tree.texts)
    for words in (
        "Did sam, asam or msam help, against sgd?",
        "In part: sam did better; asam did worse; msam is not decided.",
        "70.0 ± 1.0", "+25.0 ± 2.0", "sam is flatter than sgd by all 3 measures.",
        "The measures disagree about something.",
        "How much the loss rises by SAM's own step.", "rho = 0.05, p = 2, steps = 1",
        "1,024 samples, 19,914 weights, evaluation mode", "a note on the samples.",
        "Spectrum of the Hessian", "flatwise compare --dataset digits", "Made by hand.",
    ):  # fmt: skip
        assert words in text, words


def test_what_the_run_found_out_is_not_called_a_setting(tree: Tree) -> None:
    assert "sigma" not in " ".join(tree.texts)


def test_what_is_missing_is_named_with_its_command() -> None:
    text = page(entry(["sgd", "sam"], measured=False)).html
    assert "Not on this page yet" in text
    assert "<code>flatwise landscape run</code>" in text
    assert "has not been measured yet" in text
    assert "Not on this page yet" not in page().html


def test_every_figure_is_a_file_that_stands_alone() -> None:
    made = page()
    assert set(made.figures) == {
        "difference.svg", "curves-training-loss.svg", "curves-validation-accuracy.svg", "landscape.svg",
        "spectrum.svg",
    }  # fmt: skip
    for name, text in made.figures.items():
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert {"width", "height", "viewBox"} <= set(root.attrib), name
        assert "var(" not in text
        embedded = base64.b64encode(text.encode()).decode()
        assert f"data:image/svg+xml;base64,{embedded}" in made.html


def test_several_runs_are_one_page_each_figure_its_own() -> None:
    made = page(entry(["sgd", "sam"], name="first"), entry(["sgd", "asam"], name="second", measured=False))
    tree = Tree(made.html)
    ids = [attributes["id"] for _, attributes in tree.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "run1-landscape.svg" in made.figures
    assert len(tree.all("article")) == 2
    assert "Did sam or asam help, against sgd?" in " ".join(tree.texts)
    assert "All comparisons" in " ".join(tree.texts)
    assert "first:  Yes: sam did better." in " ".join(tree.texts)


def test_numbers_that_are_none_are_a_dash() -> None:
    one = entry(["sgd", "sam"])
    one.comparison.measures["sam"]["sharpness"]["rows"][2]["value"] = None
    for method in one.comparison.results["methods"].values():
        method["wrong_labels_fitted"] = None
    text = page(one).html
    assert "None" not in text
    assert "wrong labels learned" not in text


def test_a_page_is_small() -> None:
    size = len(page().html.encode())
    print(f"{size / 1e6:.2f} MB")
    assert size < 6e6


@pytest.mark.parametrize("text", HOSTILE)
def test_names_inject_nothing(text: str) -> None:
    names = ["sgd" + text, "sam" + text, "asam" + text]
    one = entry(names, name=text, data_set=text)
    sharp = one.comparison.measures[names[0]]["sharpness"]
    sharp["cautions"] = [text]
    sharp["rows"][2]["meaning"] = text
    sharp["rows"][2]["settings"] = {text: text}
    one.comparison.results["verdict"].append(text)
    one.comparison.results["environment"]["packages"][text] = text
    object.__setattr__(one.comparison, "missing", [Missing(text, text)])
    harmless = Tree(page(entry(["a", "b", "c"]), entry(["a", "b", "c"])).html)
    made = page(one, one)
    tree = Tree(made.html)
    assert len(tree.all("script")) == len(harmless.all("script"))
    assert not tree.all("img")
    assert not [attributes for _, attributes in tree.elements if any(key.startswith("on") for key in attributes)]
    assert {name for name, _ in tree.elements} <= {name for name, _ in harmless.elements}
    assert text in " ".join(tree.texts)
    for block in re.findall(r'<script type="application/json">(.*?)</script>', made.html, flags=re.DOTALL):
        assert [surface["name"] for surface in json.loads(block)["surfaces"]] == names
    for drawing in made.figures.values():
        ElementTree.fromstring(drawing)


def test_a_radius_that_sets_itself_has_no_number() -> None:
    found = results(["base", "frugal"])
    found["methods"]["frugal"]["options"]["rho"] = "auto"
    assert ">auto<" in str(results_table(found))
    printed = io.StringIO()
    print_table(found, Console(file=printed, width=120))
    assert "| frugal " in printed.getvalue()

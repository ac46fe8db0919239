"""What a page is made from: one comparison, with what was measured about it, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Data = Mapping[str, Any]


@dataclass(frozen=True)
class Missing:
    """What a page could show and does not.

    Attributes:
        what: in words.
        command: what makes it.
    """

    what: str
    command: str


@dataclass(frozen=True)
class Comparison:
    """One run folder.

    Attributes:
        name: of the folder.
        results: ``results.json``; docs/compare.md describes it.
        trained: names of all that was trained, in the order of their colours.
        protocol: one sentence: what was trained on what.
        command: what repeats it.
        measures: ``methods`` of measures.json, by the method; empty where nothing was measured.
        cautions: about the measures of all methods together.
        missing: what is not there, and how to make it.
    """

    name: str
    results: Data
    trained: Sequence[str]
    protocol: str
    command: str
    measures: Mapping[str, Data] = field(default_factory=dict)
    cautions: Sequence[str] = ()
    missing: Sequence[Missing] = ()

"""The question and its answer in words: did it help, and is it flatter? Never more than the numbers say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flatwise.measure.ranking import NO_VERDICT
from flatwise.report.content import Comparison, Data

NAMED = 4
"""More measures than these are counted, not named."""
BETTER, WORSE, OPEN, EQUAL = "better", "worse", "undecided", "the same"


@dataclass(frozen=True)
class Answer:
    """How one method did against the reference.

    Attributes:
        name: the method.
        reference: what it is compared with.
        verdict: ``"better"``, ``"worse"``, ``"undecided"`` or ``"the same"``.
        points: difference of the test accuracies, in percentage points.
        half: half the width of its 95 % interval; None with one seed.
        seeds: how many pairs there are.
    """

    name: str
    reference: str
    verdict: str
    points: float
    half: float | None
    seeds: int


def answers(comparison: Comparison) -> list[Answer]:
    """Judge every method against the reference.

    Args:
        comparison: the run.

    Returns:
        One for each method but the reference.
    """
    return [_answer(name, pair) for name, pair in comparison.results["paired"].items()]


def _answer(name: str, pair: Data) -> Answer:
    difference = pair["difference"]
    mean, half = difference["mean"], difference["ci95"]
    if half is None:
        verdict = OPEN
    elif not any(difference["per_seed"]):
        verdict = EQUAL
    else:
        verdict = BETTER if mean - half > 0 else WORSE if mean + half < 0 else OPEN
    points = 100 * mean
    return Answer(name, pair["reference"], verdict, points, None if half is None else 100 * half,
                  len(difference["per_seed"]))  # fmt: skip


def question(comparisons: Sequence[Comparison]) -> str:
    """Ask what the page answers.

    Args:
        comparisons: the runs.

    Returns:
        A question.
    """
    names = list(dict.fromkeys(name for c in comparisons for name in c.results["paired"]))
    references = list(dict.fromkeys(c.results["reference"] for c in comparisons))
    if not names:
        return f"How did {listed(references)} do?"
    if len(names) > 3:
        return f"Which of {len(names)} methods helped, against {listed(references)}?"
    return f"Did {listed(names, 'or')} help, against {listed(references)}?"


def headline(found: Sequence[Answer]) -> str:
    """Answer in one line.

    Args:
        found: the answers of one run.

    Returns:
        Such as ``"Yes: sam is better, by 25.3 points of test accuracy."``
    """
    if not found:
        return "There is one method here, and nothing to compare it with."
    kinds = {answer.verdict for answer in found}
    groups = [
        f"{listed([a.name for a in found if a.verdict == kind])} {phrase}"
        for kind, phrase in (
            (BETTER, "did better"),
            (WORSE, "did worse"),
            (EQUAL, "did the same"),
            (OPEN, "is not decided" if sum(a.verdict == OPEN for a in found) == 1 else "are not decided"),
        )
        if kind in kinds
    ]
    if found[0].half is None:
        return "Not decided: one seed says nothing about chance."
    if kinds == {OPEN}:
        return f"Not decided: chance alone may have made the difference{'s' * (len(found) > 1)}."
    one = {BETTER: "Yes", WORSE: "No", EQUAL: "No"}
    mixed = "In part" if BETTER in kinds else "No" if OPEN not in kinds else "Not shown to"
    return f"{one[kinds.pop()] if len(kinds) == 1 else mixed}: {'; '.join(groups)}."


def difference(answer: Answer) -> str:
    """Write a difference with its interval.

    Args:
        answer: of one method.

    Returns:
        Such as ``"+25.3 points (95 % interval +23.9 to +26.8, 5 paired seeds)"``.
    """
    points = signed(answer.points)
    if answer.half is None:
        return f"{points} points (one seed)"
    low, high = signed(answer.points - answer.half), signed(answer.points + answer.half)
    return f"{points} points (95 % interval {low} to {high}, {answer.seeds} paired seeds)"


def signed(value: float) -> str:
    """Write a number with its sign and one decimal.

    Args:
        value: the number.

    Returns:
        Such as ``"+1.5"``, with a true minus sign.
    """
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def listed(names: Sequence[str], word: str = "and") -> str:
    """Write a list.

    Args:
        names: at least one.
        word: before the last.

    Returns:
        Such as ``"a, b and c"``.
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


def is_flatter(comparison: Comparison) -> list[str]:
    """Compare the sharpness of each method with that of the reference, measure by measure.

    A measure counts where the difference is more than twice its standard error; one without a standard error does not
    vary by what it drew, and any difference counts.

    Args:
        comparison: the run.

    Returns:
        One sentence for each method that was measured beside the reference.
    """
    reference = comparison.results["reference"]
    base = _rows(comparison, reference)
    sentences = []
    for name in comparison.measures:
        if name == reference or not base:
            continue
        other = _rows(comparison, name)
        lower: list[str] = []
        higher: list[str] = []
        open_: list[str] = []
        for key in base:
            if key not in other:
                continue
            gap, noise = _gap(other[key], base[key])
            (open_ if abs(gap) <= 2 * noise else lower if gap < 0 else higher).append(key.replace("_", " "))
        total = len(lower) + len(higher) + len(open_)
        if total:
            sentences.append(_sentence(name, reference, lower, higher, open_, total))
    return sentences


def _rows(comparison: Comparison, name: str) -> dict[str, Data]:
    rows = comparison.measures.get(name, {}).get("sharpness", {}).get("rows", [])
    return {row["name"]: row for row in rows if row["name"] not in NO_VERDICT and _known(row["value"])}


def _known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _gap(row: Data, base: Data) -> tuple[float, float]:
    errors = [entry["standard_error"] or 0.0 for entry in (row, base)]
    return row["value"] - base["value"], math.hypot(*errors)


def _sentence(name: str, reference: str, lower: list[str], higher: list[str], open_: list[str], total: int) -> str:
    if len(lower) == total:
        return f"{name} is flatter than {reference} by all {total} measures."
    if len(higher) == total:
        return f"{name} is sharper than {reference} by all {total} measures."
    parts = [f"{name} is flatter than {reference} by {len(lower)} of {total} measures"]
    if higher:
        parts.append(f"sharper by {len(higher)} ({listed(higher)})")
    if open_:
        named = f" ({listed(open_)})" if len(open_) <= NAMED else ""
        parts.append(f"within the noise by {len(open_)}{named}")
    return f"{'; '.join(parts)}. Where measures disagree, none of them alone says what is flat."

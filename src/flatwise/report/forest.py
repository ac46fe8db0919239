"""Differences with their intervals, one row a method, beside a line at zero."""

from __future__ import annotations

from collections.abc import Sequence

from flatwise.report.charts import cut, px, svg
from flatwise.report.markup import Markup, tag
from flatwise.report.scales import Scale, short
from flatwise.report.words import Answer, difference

WIDTH, ROW, TOP, LEFT, RIGHT = 440, 30, 14, 150, 18
LABEL = 20


def forest(answers: Sequence[Answer]) -> Markup:
    """Draw the differences.

    Args:
        answers: at least one.

    Returns:
        An ``svg`` element.
    """
    ends = [0.0] + [a.points + sign * (a.half or 0.0) for a in answers for sign in (-1, 1)]
    room = 0.06 * ((max(ends) - min(ends)) or 1.0)
    x = Scale(min(ends) - room, max(ends) + room, LEFT, WIDTH - RIGHT)
    bottom = TOP + ROW * len(answers)
    parts = []
    for value in x.ticks(5):
        place = px(x(value))
        parts.append(tag("line", x1=place, y1=TOP, x2=place, y2=bottom, class_="zero" if value == 0 else "grid"))
        parts.append(tag("text", short(value), x=place, y=bottom + 18, class_="tick middle"))
    for number, answer in enumerate(answers):
        # The number of the method's curve: the reference has the first.
        kind, y = f"s{(number + 1) % 6}", TOP + ROW * (number + 0.5)
        half = answer.half or 0.0
        low, high = px(x(answer.points - half)), px(x(answer.points + half))
        parts.append(tag("text", cut(answer.name, LABEL), tag("title", answer.name), x=LEFT - 12, y=px(y), dy="0.33em",
                         class_="name end"))  # fmt: skip
        parts.append(tag("line", x1=low, y1=px(y), x2=high, y2=px(y), class_=f"line {kind}"))
        parts += [tag("line", x1=e, y1=px(y - 6), x2=e, y2=px(y + 6), class_=f"line {kind}") for e in (low, high)]
        parts.append(tag("circle", cx=px(x(answer.points)), cy=px(y), r=5, class_=f"dot {kind}"))
    parts.append(
        tag("text", f"points of test accuracy against {cut(answers[0].reference)}", x=(LEFT + WIDTH - RIGHT) / 2,
            y=bottom + 38, class_="label middle")
    )  # fmt: skip
    return svg(
        *parts,
        title="Difference in test accuracy",
        description="; ".join(f"{answer.name}: {difference(answer)}" for answer in answers),
        width=WIDTH,
        height=bottom + 46,
    )

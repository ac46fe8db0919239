"""From numbers to places on an axis: straight or logarithmic, with round ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDE = 100.0
"""The factor between the largest and the smallest loss from which heights are logarithmic, on paper and on the page."""
SUPERSCRIPTS = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        low: the value at its start.
        high: the value at its end.
        start: the place of ``low``, in pixels.
        end: the place of ``high``.
        log: whether equal ratios, not equal differences, have equal length.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Place a value; what is outside the axis is placed at its nearer end.

        Args:
            value: the number.

        Returns:
            Pixels.
        """
        value = min(max(value, self.low), self.high)
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        share = ((math.log10(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Choose round values on the axis.

        Args:
            wanted: about how many.

        Returns:
            In rising order.
        """
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            every = max(1, math.ceil(len(powers) / wanted))
            found = [10.0**power for power in powers if power % every == 0]
            if len(found) >= 2:
                return found
            return [self.low, self.high]
        step = _round_step((self.high - self.low) / wanted)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        # Rounding may set the outermost a little outside.
        return [min(max(round(number * step, 12), self.low), self.high) for number in range(first, last + 1)]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return min((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * 0.999), default=10 * power)


def needs_log(low: float, high: float) -> bool:
    """Tell whether losses differ so much that only their logarithms can be told apart.

    Args:
        low: the smallest.
        high: the largest.

    Returns:
        Whether they do; never where there is no logarithm.
    """
    return low > 0 and high > WIDE * low


def spread(values: Sequence[float], *, log: bool = False, from_zero: bool = False) -> tuple[float, float]:
    """Find the ends of an axis that shows values.

    Args:
        values: finite numbers, at least one; above 0 where the axis is logarithmic.
        log: whether it is.
        from_zero: begin at 0.

    Returns:
        Two different ends.
    """
    low, high = min(values), max(values)
    if log:
        return (low / 1.2, high * 1.2) if high / low < 1.5 else (low, high)
    if from_zero:
        low = min(0.0, low)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        room = abs(high) * 0.1 or 1.0
        return (low, high + room) if from_zero and low == 0 else (low - room, high + room)
    room = 0.05 * (high - low)
    return (low if from_zero and low == 0 else low - room), high + room


def short(value: float) -> str:
    """Write a number on an axis or in a sentence.

    Args:
        value: the number.

    Returns:
        Such as ``"0.05"`` or ``"2.5 \u00b7 10\u207b\u2076"``, with a true minus sign.
    """
    text = f"{value:.4g}"
    if "e" in text:
        factor, _, power = text.partition("e")
        power = str(int(power)).translate(SUPERSCRIPTS)
        text = f"10{power}" if factor == "1" else f"{factor} \u00b7 10{power}"
    elif value in (1e-3, 1e-4):  # with their neighbours on an axis
        text = f"10{str(round(math.log10(value))).translate(SUPERSCRIPTS)}"
    return text.replace("-", "\N{MINUS SIGN}")

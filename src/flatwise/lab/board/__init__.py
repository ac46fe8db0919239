"""The board: every method on three tasks, each at three radii. ``python -m flatwise.lab.board``, or ``make board``."""

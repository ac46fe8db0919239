"""The lab: experiments on real data, run from one command (``flatwise compare``) or from Python."""

from flatwise.lab.compare import compare
from flatwise.lab.config import CompareConfig
from flatwise.lab.errors import LabError

__all__ = ["CompareConfig", "LabError", "compare"]

"""The lab: experiments on real data, from one command (``flatwise compare``) or from Python.

>>> from flatwise.lab.compare import compare
>>> from flatwise.lab.config import CompareConfig
>>> results, folder, was_there = compare(CompareConfig(seeds=3))  # doctest: +SKIP
"""

"""What every test shares: one thread, a known random state, and the settings of hypothesis."""

import os
import random

import hypothesis
import pytest
import torch

# Two test processes share two cores, and sums have one order: the numbers are those of any other run.
torch.set_num_threads(1)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tell the maker of the table of support (tools/support.py) what a test shows; other processes run tests too."""
    claims = [list(mark.args) for mark in item.iter_markers("supports")]
    if claims:
        item.user_properties.append(("supports", claims))

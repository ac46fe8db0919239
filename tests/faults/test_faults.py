"""Random faults: a sample of seeds at once, all of them slow."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.faults.kinds import IN_PROCESS, carry_out, kind_of

SEEDS = range(200)
QUICK = [seed for seed in SEEDS if kind_of(seed) in IN_PROCESS][:40]

pytestmark = pytest.mark.filterwarnings("ignore:only .* of the perturbation arrives")


def name(seed: int) -> str:
    return f"{seed}, {kind_of(seed)}"


@pytest.mark.parametrize("seed", QUICK, ids=name)
def test_nothing_is_lost(seed: int, tmp_path: Path) -> None:
    carry_out(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [seed for seed in SEEDS if seed not in QUICK], ids=name)
def test_nothing_is_lost_with_any_seed(seed: int, tmp_path: Path) -> None:
    carry_out(seed, tmp_path)

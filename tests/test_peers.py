"""What is said of other libraries in benchmarks/peers is what they do: each script is run, and its README read."""

import importlib
import math
import re
from pathlib import Path

import pytest

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"

# By script: for each line, whether the peer must agree with the equations.
AGREES = {
    "agree": [True, True, True],
    "looksam": [False, True, False, False],
    "bsam": [False, False, False, False, False, False],
    "restore": [False, False, True],
    "asam": [False, False, False, True],
    "wsam": [True, False],
}


def printed(script: str) -> list[tuple[str, float, float]]:
    """The lines that the README shows for a script: what, the paper's number, the peer's."""
    section = re.search(rf"^## {script}\.py\n+```text\n(.*?)^```", (PEERS / "README.md").read_text(), re.M | re.S)
    assert section, f"the README does not show {script}.py"
    rows = [re.fullmatch(r"  (\S.*?)\s{2,}(\S+)\s+(\S+)", line) for line in section[1].splitlines()[2:]]
    assert all(rows), section[1]
    return [(row[1], float(row[2]), float(row[3])) for row in rows if row]


def check(lines, agrees, shown) -> None:
    """The library deviates where that is said, and the README shows these numbers."""
    assert len(lines) == len(agrees) == len(shown)
    for (what, paper, peer), same, (label, shown_paper, shown_peer) in zip(lines, agrees, shown, strict=True):
        assert what == label
        assert (abs(peer - paper) <= 1e-6) == same, what
        for number, text in ((paper, shown_paper), (peer, shown_peer)):
            # Another processor rounds in another order, so how many weights changed may differ a little.
            assert math.isclose(number, text, rel_tol=1.0 if "changed by" in what or "the same: " in what else 0.06)


def test_every_script_is_checked():
    assert {path.stem for path in PEERS.glob("*.py")} - {"small"} == set(AGREES)


@pytest.mark.parametrize("script", AGREES)
def test_the_readme_shows_every_script(script):
    shown = printed(script)
    assert len(shown) == len(AGREES[script])
    for (what, paper, peer), same in zip(shown, AGREES[script], strict=True):
        assert (paper == peer) == same, what


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries that are looked at
@pytest.mark.parametrize("script", AGREES)
def test_the_peer_does_what_is_said(script, monkeypatch):
    pytest.importorskip("pytorch_optimizer", reason="needs flatwise[bench]")
    pytest.importorskip("temperon", reason="needs flatwise[bench]")
    monkeypatch.syspath_prepend(str(PEERS))
    check(importlib.import_module(script).measure(), AGREES[script], printed(script))


@pytest.mark.parametrize(
    ("lines", "agrees"),
    [
        ([("a", 0, 1.0)], [True]),
        ([("a", 0, 0.0)], [False]),
        ([("b", 0, 1.0)], [False]),
        ([("a", 0, 2.0)], [False]),
        ([], [False]),
    ],
)
def test_a_wrong_claim_is_noticed(lines, agrees):
    with pytest.raises(AssertionError):
        check(lines, agrees, [("a", 0.0, 1.0)])

"""A worker that is killed in a second pass: torchrun starts again, and nothing of the result differs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks import deadly

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
    pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL"),
]


def result(script: str | Path, folder: Path, restarts: int = 3) -> tuple[str, list[Any]]:
    folder.mkdir()
    done = deadly.example().start(script, folder, restarts)
    final = torch.load(folder / "final.pt")
    moments = [entry["momentum_buffer"] for entry in final["optimizer"]["state"].values()]
    return done.stdout, [*final["model"].values(), *moments]


@pytest.mark.supports("DDP", "killed workers are restarted")
def test_workers_that_are_killed_in_a_second_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    printed, whole = result(deadly.example().__file__, tmp_path / "whole")
    assert "0 restarts" in printed
    printed, mended = result(deadly.__file__, tmp_path / "mended")
    assert "2 restarts" in printed
    deaths = [(tmp_path / "mended" / f"death {life}").read_text() for life in range(2)]
    assert deaths == ["at w + eps"] * 2
    assert len(whole) == len(mended)
    assert all(map(torch.equal, whole, mended))

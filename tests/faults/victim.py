"""A training in a process of its own, which is killed: ``python -m tests.faults.victim train|rank|lab SEED FOLDER``."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tests.faults.kinds import Inject, Lines
from tests.faults.world import STEPS, Trip, World
from torch.nn.parallel import DistributedDataParallel

import flatwise
from flatwise.files import write_atomically
from flatwise.lab import checkpoint as lab_checkpoint
from flatwise.lab.config import CompareConfig
from flatwise.lab.folder import RunFolder
from flatwise.lab.job import Job, run_job
from flatwise.lab.methods import parse_methods

PATIENCE = 20.0
"""Seconds after which a rank gives up on another."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(Lines):
    """Kills at a line of flatwise."""

    def interrupt(self) -> None:
        die()


class Fatal:
    """A file that kills its writer after some bytes."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self.file, self.left = file, left

    def write(self, data: Any) -> int:
        part = bytes(data)
        self.file.write(part[: self.left])
        self.file.flush()
        self.left -= len(part)
        if self.left <= 0:
            die()
        return len(part)

    def flush(self) -> None:
        self.file.flush()


def save(world: World, done: int, path: Path, left: int | None) -> None:
    content = {**world.checkpoint(), "done": done}
    write_atomically(path, lambda file: torch.save(content, file if left is None else Fatal(file, left)))


def train(seed: int, folder: Path) -> None:
    """Train, with a checkpoint after every step, until the end comes."""
    draws = random.Random(f"death {seed}")
    last, way = draws.randrange(STEPS), draws.choice(("pass", "line", "saving"))
    inject = Inject(seed, folder)
    count, lines = inject.start(last), Lines()
    count.around = lines.traced
    count.step(last)
    where = draws.choice(("forward", "backward"))
    trip = inject.trip(count, where, die, grad=where == "backward")
    world = World(inject.plan)
    for step in range(last + 1):
        dying = step == last
        if dying and way == "line":
            world.around = Deadly(draws.randint(1, lines.count)).traced
        world.step(step, trip if dying and way == "pass" else None)
        save(world, step + 1, folder / "checkpoint", draws.randint(1, 8000) if dying else None)


def rank(seed: int, folder: Path, number: int) -> None:
    """Train with another rank; the second dies in a pass, the first says how it took it."""
    draws = random.Random(f"death {seed}")
    step, call = draws.randrange(1, 3), draws.randint(1, 2)
    where, layer = draws.choice(("forward", "backward")), draws.choice(("first", "middle", "last"))
    sync = draws.choice((True, False))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = timedelta(seconds=PATIENCE)
    meeting = (folder / "meeting").absolute().as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=number, world_size=2, timeout=limit)
    world = World(Inject(seed, folder).plan)
    net = world.net
    ddp = DistributedDataParallel(net)
    base = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    opt = flatwise.SAM(base, 0.1, model=ddp, sync_ascent=sync)
    trip, calls = Trip(call, where, layer, die), 0
    error, exact = "", False
    for now in range(STEPS):
        before = [p.detach().clone() for p in net.parameters()]
        calls = 0

        def loss_fn(batch: Any, now: int = now) -> torch.Tensor:
            nonlocal calls
            calls += 1
            net.trip = trip if (number, now, calls) == (1, step, call) else None
            return torch.nn.functional.cross_entropy(ddp(batch[0]).float(), batch[1])

        x, y, _ = world.batch(now)
        half = slice(8 * number, 8 * number + 8)
        try:
            opt.step(loss_fn, (x[half], y[half]))
        except RuntimeError as raised:
            error = str(raised)
            exact = all(map(torch.equal, before, [p.detach() for p in net.parameters()]))
            break
    (folder / "survivor.json").write_text(json.dumps({"error": error, "exact": exact}))
    os._exit(0)  # nothing to tidy up with a rank that is gone


def lab_config(method: str, folder: Path) -> CompareConfig:
    small = {"model": "cnn-small", "train_size": 200, "epochs": 3, "seeds": 1, "workers": 1, "batch_size": 32}
    return CompareConfig(methods=method, out=str(folder / "runs"), **small)  # type: ignore[arg-type]


def lab_job(config: CompareConfig) -> Job:
    return Job(parse_methods(config)[0], 0)


def lab(seed: int, folder: Path) -> None:
    """Run a job of the lab until the end of an epoch, or until amid the writing of its checkpoint."""
    draws = random.Random(f"death {seed}")
    epoch, saving = draws.randint(1, 2), draws.random() < 0.5
    config = lab_config(Inject(seed, folder).plan.method, folder)
    runs = RunFolder(folder / "runs")
    runs.create()
    written = 0

    def write(path: Path, content: Any, **options: Any) -> None:
        nonlocal written
        written += 1
        left = draws.randint(1, 20000) if written == epoch + 1 and saving else None
        write_atomically(path, content if left is None else lambda file: content(Fatal(file, left)), **options)

    lab_checkpoint.write_atomically = write  # type: ignore[assignment]
    run_job(config, lab_job(config), runs, on_epoch=lambda done: die() if done == epoch and not saving else None)
    time.sleep(0.1)
    die()  # the checkpoint was smaller than what was to be written before the end


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, seed, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    if kind == "rank":
        rank(seed, folder, int(sys.argv[4]))
    else:
        {"train": train, "lab": lab}[kind](seed, folder)

"""The faults, and what must hold after each.

Every check compares with a second training of the same seed, to which nothing happens. What must hold:

- *A step that raised* was not taken. Weights, the base optimizer's state, what the method remembers, radii, masks'
  and other random state, buffers, frozen flags and hooks are those of a training in which the step was not begun, but
  for what plain torch itself leaves behind: the forward passes that count (the first to see their samples) have
  updated batch statistics and drawn masks, up to the layer at which they stopped. ``World.plain`` does just these,
  with the module alone. Where the caller runs the passes (``first_step`` and its like) the step also counts: there
  it was begun and left out. The training then takes the same step again and goes on like the undisturbed one.
- *A step with infinity or NaN* counts and changes nothing else: no weights, no state, nothing learned. With a
  ``GradScaler``, where flatwise runs the passes, buffers too are as before. A bad gradient in the first pass alone is
  no obstacle where a second pass is made anyway: the step is then a plain one of the base optimizer at w.
- *An interrupt* is a step that raised, at any line of flatwise, up to the update itself. During the update it is as in
  torch's own optimizers, which are not atomic: each of the weights and the base's state is that of before or of
  after; what is between (a part that a method adds after the base's step, bSAM's tensors one after the other) is at
  least finite, and a checkpoint of it, loaded into a new training, goes on alike. Python may also lose the end of a
  ``with`` block (grad mode, function modes): the harness sets these back, as after plain torch.
- *A layer frozen, a gradient lost*: what has no gradient in the last pass does not move, nor does its state.
- *Killed*: a new process goes on from the last checkpoint to the same end, bit for bit. *Cut off*: a checkpoint that
  cannot be read raises, and leaves everything as it was. *A rank that dies*: the other raises within LIMIT seconds, its
  weights exactly at w.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.world import LAYERS, STEPS, Injected, Plan, Trip, World, assert_finite, assert_same

import flatwise

ROOT = Path(__file__).parents[2]
CORE = str(Path(flatwise.__file__).parent)
LIMIT = 60.0
"""Seconds after which a process that has not ended counts as hanging."""


class Inject:
    """Draws a fault for a seed, and carries it out."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.plan, self.folder = Plan.draw(seed), folder
        self.draws = random.Random(f"fault {seed}")

    def start(self, steps: int) -> World:
        world = World(self.plan)
        for step in range(steps):
            world.step(step)
        return world

    def watched(self, first: int = 0) -> tuple[int, World]:
        """Draw a step, and return the training after it, with the log of its calls."""
        step = self.draws.randrange(first, STEPS - 1)
        return step, self.start(step + 1)

    def trip(self, world: World, where: str, act: Callable[[], Any], *, grad: bool = False) -> Trip:
        """Draw one of the calls of the step that was taken last."""
        calls = [number for number, call in enumerate(world.log, 1) if call.grad or not grad]
        return Trip(self.draws.choice(calls), where, self.draws.choice(LAYERS), act)


def goes_on(world: World, quiet: World, step: int) -> None:
    """The training and the one without a fault take the rest of the steps alike."""
    for later in range(step, STEPS):
        world.step(later)
        quiet.step(later)
        assert_finite(world)
        assert_same(world.state(), quiet.state(), f"after step {later}")


def settle_count(world: World, quiet: World) -> None:
    """Where the caller runs the passes, the step may have been counted when it was begun."""
    for mine, theirs in zip(world.opt.param_groups, quiet.opt.param_groups, strict=True):
        assert mine["sam_step"] - theirs["sam_step"] in ((0, 1) if world.plan.outside else (0,)), "the count of steps"
        theirs["sam_step"] = mine["sam_step"]


def not_taken(world: World, quiet: World, step: int, trip: Trip | None) -> None:
    """The step that raised has left nothing behind, and the training goes on."""
    world.recover()
    world.begin(step) if not world.log else None
    quiet.begin(step)
    quiet.plain(world.log, trip)
    settle_count(world, quiet)
    forget_initial_state(world, quiet)
    assert_same(world.state(), quiet.state(), f"step {step} raised")
    assert_finite(world)
    goes_on(world, quiet, step)


def forget_initial_state(world: World, quiet: World) -> None:
    """bSAM makes its state, at its initial value, before its first pass."""
    if isinstance(world.opt, flatwise.BSAM):
        for opt in (world.opt, quiet.opt):
            for group in opt.param_groups:
                for param in group["params"]:
                    opt._state(param, group)


# In a pass


def raises(inject: Inject, error: type[BaseException]) -> None:
    def act() -> None:
        raise error("injected")

    step, seen = inject.watched()
    trip = inject.trip(seen, inject.draws.choice(("forward", "backward", "after")), act)
    if not seen.log[trip.call - 1].grad:
        trip = Trip(trip.call, "forward", trip.layer, act)
    world = inject.start(step)
    with pytest.raises(error, match="injected"):
        world.step(step, trip)
    not_taken(world, inject.start(step), step, trip)


def exception(inject: Inject) -> None:
    raises(inject, Injected)


def keyboard_interrupt(inject: Inject) -> None:
    raises(inject, KeyboardInterrupt)


def out_of_memory(inject: Inject) -> None:
    """In a pass, or where the copies of weights or buffers are allocated."""
    place = inject.draws.choice(("pass", "_foreach_clone", "clone"))
    if place == "pass":
        raises(inject, torch.OutOfMemoryError)
        return
    owner = torch if place == "_foreach_clone" else torch.Tensor
    step = inject.draws.randrange(STEPS - 1)
    world, quiet = inject.start(step), inject.start(step)
    made = Allocations(owner, place)
    count = inject.start(step)
    count.around = made.patched
    count.step(step)
    if not made.count:
        raises(inject, torch.OutOfMemoryError)
        return
    world.around = Allocations(owner, place, fail_at=inject.draws.randint(1, made.count)).patched
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        world.step(step)
    world.around = contextlib.nullcontext
    if world.updating:  # of the base's own state, or of what is learned with the update
        half_made(world, quiet, step)
    else:
        not_taken(world, quiet, step, None)


class Allocations:
    """Counts the allocations that flatwise asks for by a function, and fails in one."""

    def __init__(self, owner: Any, name: str, fail_at: int = 0) -> None:
        self.owner, self.name, self.fail_at, self.count = owner, name, fail_at, 0

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        real = getattr(self.owner, self.name)

        def allocate(*args: Any, **options: Any) -> Any:
            if sys._getframe(1).f_code.co_filename.startswith(CORE):
                self.count += 1
                if self.count == self.fail_at:
                    raise torch.OutOfMemoryError("injected")
            return real(*args, **options)

        setattr(self.owner, self.name, allocate)
        try:
            yield
        finally:
            setattr(self.owner, self.name, real)


def not_finite(inject: Inject) -> None:
    step, seen = inject.watched()
    factor = inject.draws.choice((math.inf, -math.inf, math.nan))
    struck: list[float] = []

    def spoil() -> float:
        struck.append(factor)
        return factor

    trip = inject.trip(seen, inject.draws.choice(("loss", "gradient")), spoil, grad=True)
    world, quiet = inject.start(step), inject.start(step)
    before = quiet.state()
    world.step(step, trip)
    assert_finite(world)
    quiet.begin(step)
    bad, later = world.log[trip.call - 1], world.log[trip.call :]
    scaled = world.scaler.is_enabled()
    backed_off = scaled and world.scaler.get_scale() < float(before["scaler scale"])
    # A step that the schedule leaves out is a plain one: with a scaler too.
    active = isinstance(world.opt, flatwise.BSAM) or world.opt._schedule.active(world.opt.last.step)
    again = [call for call in later if call.grad and call.ids & bad.ids]
    if not struck:  # a first pass for normalisation layers alone does not come to the layers before them
        assert world.plan.method == "sam-on"
        quiet.step(step)
    elif backed_off or not world.opt.last.updated:
        assert backed_off or not scaled
        quiet.plain(world.log, None)
        quiet.count()
        if scaled:
            quiet.scaler.load_state_dict({**before_scaler(before), "scale": before["scaler scale"] / 2})
            if not world.plan.outside and active:
                quiet.net.load_state_dict({k[6:]: v for k, v in before.items() if k.startswith("model ")})
    elif not active and world.plan.outside:  # its first gradient is not looked at
        quiet.step(step)
    elif again and not scaled:
        plain_step(quiet, world, again[-1])
    else:  # a functional gradient takes the output's gradient from the first pass: the second loss is not in it
        assert world.opt._descent.needs_output
        assert trip.where == "loss"
        quiet.step(step)
    forget_initial_state(world, quiet)
    assert_same(world.state(), quiet.state(), f"step {step} was not finite")
    goes_on(world, quiet, step + 1)


def before_scaler(state: dict[str, Any]) -> dict[str, Any]:
    return {**{k[7:]: v for k, v in state.items() if k.startswith("scaler ")}, "_growth_tracker": 0}


def plain_step(quiet: World, world: World, last: Any) -> None:
    """The base optimizer's step at w, with the gradient of the samples of the last pass."""
    start = quiet.random
    quiet.plain(world.log, None)
    after, kept = quiet.random, [b.clone() for b in quiet.net.buffers()]
    quiet.opt.zero_grad()
    quiet.random = start
    with quiet.turn():
        loss = quiet.forward(last.batch[0], last.batch[1], None)
        loss.mean().backward()
    quiet.random = after
    with torch.no_grad():
        for buffer, value in zip(quiet.net.buffers(), kept, strict=True):
            buffer.copy_(value)
    quiet.opt.base_optimizer.step()
    quiet.count()


# Interrupts of flatwise itself


Place = tuple[str, str, int]


def stack_of(frame: Any) -> list[Place]:
    """Where an interrupt struck, the innermost first."""
    stack = []
    while frame is not None:
        stack.append((frame.f_code.co_name, frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return stack


def interrupted(world: World, step: int, quiet: World, stack: list[Place]) -> None:
    """Check what must hold after an interrupt."""
    world.around = contextlib.nullcontext
    torch.set_grad_enabled(True)  # a `with` of torch can itself be interrupted before it leaves
    torch.set_autocast_enabled("cpu", False)
    torch.autocast_increment_nesting()
    while torch.autocast_decrement_nesting():
        pass
    torch.clear_autocast_cache()
    while torch._C._len_torch_function_stack():
        torch.overrides._pop_mode()
    mine = [name for name, file, _ in stack if file.endswith("world.py")]
    try:
        if world.updating:
            half_made(world, quiet, step, whole="torch/optim" not in stack[0][1] + stack[1][1])
        elif world.split or ("loss" in mine and (not world.log or world.log[-1].counts)):
            # In a pass that counts: how far batch statistics and random state came, only torch knows.
            world.recover()
            quiet.begin(step)
            quiet.random = world.random
            quiet.net.load_state_dict({**quiet.net.state_dict(), **dict(world.net.named_buffers())})
            settle_count(world, quiet)
            assert_same(world.state(), quiet.state(), f"step {step} was interrupted in a pass")
            goes_on(world, quiet, step)
        else:
            not_taken(world, quiet, step, None)
    except AssertionError as error:
        where = " < ".join(f"{name} ({Path(file).name}:{line})" for name, file, line in stack[:5])
        raise AssertionError(f"interrupted in {where}: {error}") from error


class Lines:
    """Counts the lines of flatwise that run, and sends SIGINT at one of them."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.count = at, 0
        self.stack: list[Place] = []

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(CORE) else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.stack = stack_of(frame)
                self.interrupt()
        return self._line

    def interrupt(self) -> None:
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def handling(number: int, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def interrupt_at_a_line(inject: Inject) -> None:
    step = inject.draws.randrange(1, STEPS - 1)
    for _ in range(2):  # what is done once in a process is not counted: the step below does not do it
        lines, count = Lines(), inject.start(step)
        count.around = lines.traced
        count.step(step)
    world = inject.start(step)
    trap = Lines(inject.draws.randint(1, lines.count))
    world.around = trap.traced
    with handling(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        world.step(step)
    interrupted(world, step, inject.start(step), trap.stack)


def interrupt_at_a_time(inject: Inject) -> None:
    """A timer of the system, wherever it strikes."""
    step = inject.draws.randrange(1, STEPS - 1)
    timed = inject.start(step)
    start = time.perf_counter()
    timed.step(step)
    delay = max(1e-5, inject.draws.random() * (time.perf_counter() - start))
    world, quiet, struck = inject.start(step), inject.start(step), []

    def strike(number: int, frame: Any) -> None:
        if armed:
            armed.clear()
            struck.append(stack_of(frame))
            raise KeyboardInterrupt

    armed = [True]

    @contextlib.contextmanager
    def timer() -> Iterator[None]:
        signal.setitimer(signal.ITIMER_REAL, delay)
        try:
            yield
        finally:
            armed.clear()
            signal.setitimer(signal.ITIMER_REAL, 0)

    world.around = timer
    with handling(signal.SIGALRM, strike), contextlib.suppress(KeyboardInterrupt):
        world.step(step)
    if struck:
        interrupted(world, step, quiet, struck[0])
        return
    world.around = contextlib.nullcontext
    quiet.step(step)
    assert_same(world.state(), quiet.state(), "the timer came too late")
    goes_on(world, quiet, step + 1)


def half_made(world: World, quiet: World, step: int, *, whole: bool = True) -> None:
    """Interrupted during the update: weights and the base's state are old or new, and a checkpoint is whole."""
    world.recover()
    assert_finite(world)
    before = quiet.state()
    quiet.step(step)
    after, now = quiet.state(), world.state()
    own = isinstance(world.opt, flatwise.BSAM)
    if whole and not own and not world.opt._descent.adds_late:
        names = [k for k in now if k.startswith(("model ", "state ")) and " sam_" not in k and "running" not in k]
        wrong = [k for k in names if not (_same(now, before, k) or _same(now, after, k))]
        assert not wrong, f"neither old nor new are {', '.join(wrong)}"
    loaded = World(world.plan)
    loaded.load(world.checkpoint())
    goes_on(world, loaded, step + 1)


def _same(now: dict[str, Any], then: dict[str, Any], key: str) -> bool:
    try:
        assert_same({key: now.get(key)}, {key: then.get(key)}, key)
    except AssertionError:
        return False
    return True


# Layers without gradients


def gradient_lost(inject: Inject) -> None:
    """From one pass to the other a layer is no longer in the graph."""
    step, seen = inject.watched()
    trip = inject.trip(seen, "detach", lambda: None, grad=True)
    world, twin = inject.start(step), inject.start(step)
    before = world.state()
    world.step(step, trip)
    twin.step(step, trip)
    after = world.state()
    assert_finite(world)
    method, alone = flatwise.variant_info(world.plan.method), world.plan.form not in ("closures", "each")
    whole = "micro_batch_size" not in method.needs and not method.options.get("second_order")
    if alone and whole and trip.call == len(world.log) and not method.descent.needs_clean:
        assert not_moved(world, before, after, trip.layer), "without a gradient in the last pass nothing moves"
    assert_same(after, twin.state(), "a second time")
    loaded = World(world.plan)
    loaded.load(world.checkpoint())
    goes_on(world, loaded, step + 1)


def not_moved(world: World, before: dict[str, Any], after: dict[str, Any], layer: str) -> bool:
    names = [f"model {name}" for name, _ in world.net.named_parameters() if name.startswith(f"{layer}.")]
    order = [p for group in world.opt.param_groups for p in group["params"]]
    mine = {id(p) for p in getattr(world.net, layer).parameters()}
    keys = [f"state {index} " for index, p in enumerate(order) if id(p) in mine]
    names += [k for k in after if k.startswith(tuple(keys)) and not (world.plan.method == "bsam" and k not in before)]
    names = [k for k in names if " sam_" not in k]  # what a method learns, it may learn from the first pass
    return all(_same(before, after, name) for name in names)


def layer_frozen(inject: Inject) -> None:
    """For two steps; meanwhile the layer's weights and all of its state stay, and others are as if it were detached."""
    step, layer = inject.draws.randrange(STEPS - 3), inject.draws.choice(LAYERS)
    world = inject.start(step)
    before = world.state()
    getattr(world.net, layer).requires_grad_(False)
    world.step(step)
    world.step(step + 1)
    after = world.state()
    getattr(world.net, layer).requires_grad_(True)
    assert_finite(world)
    assert not_moved(world, before, after, layer), "a frozen layer has moved"
    loaded = World(world.plan)
    loaded.load(world.checkpoint())
    goes_on(world, loaded, step + 2)


# Files and processes


def damaged(whole: bytes, draws: random.Random) -> bytes:
    """Cut off, or ending in zeros as after a loss of power."""
    cut = draws.randrange(len(whole))
    return whole[:cut] + (b"\0" * (len(whole) - cut) if draws.random() < 0.3 else b"")


def cut_checkpoint(inject: Inject) -> None:
    step = inject.draws.randrange(1, STEPS)
    source, file = inject.start(step), io.BytesIO()
    torch.save(source.checkpoint(), file)
    path = inject.folder / "checkpoint"
    world, quiet = inject.start(step - 1), inject.start(step - 1)
    path.write_bytes(damaged(file.getvalue(), inject.draws))
    with pytest.raises(Exception) as raised:  # which one depends on where the damage is
        world.load_file(path)
    assert str(raised.value)
    other = torch.nn.Linear(2, 2)  # a whole one, of something else
    with pytest.raises(ValueError, match="parameter group"):
        world.opt.load_state_dict(torch.optim.SGD(other.parameters(), lr=0.1).state_dict())
    assert_same(world.state(), quiet.state(), "after the damaged file")
    path.write_bytes(file.getvalue())
    world.load_file(path)
    assert_same(world.state(), source.state(), "after the whole file")
    goes_on(world, source, step)


def environment() -> dict[str, str]:
    paths = (str(Path(CORE).parent), str(ROOT), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def start_process(*arguments: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.victim", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process to end; one that hangs is a failure."""
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AssertionError(f"a process did not end within {LIMIT:g} s") from None
    assert process.returncode in (0, -signal.SIGKILL), output.decode()[-2000:]
    return process.returncode


def killed(inject: Inject) -> None:
    """SIGKILL in a pass, at a line of flatwise, or while the checkpoint is written; then resume."""
    assert ended(start_process("train", inject.plan.seed, inject.folder)) == -signal.SIGKILL
    whole, world = inject.start(STEPS), World(inject.plan)
    path = inject.folder / "checkpoint"
    done = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        done = saved.pop("done")
        world.load(saved)
    for step in range(done, STEPS):
        world.step(step)
    assert_same(world.state(), whole.state(), f"resumed after {done} steps")


def rank_dies(inject: Inject) -> None:
    """One of two ranks is killed in a pass: the other raises, with its weights at w."""
    folder, seed = inject.folder, inject.plan.seed
    survivor, dying = (start_process("rank", seed, folder, rank) for rank in (0, 1))
    start = time.monotonic()
    try:
        assert ended(dying) == -signal.SIGKILL
        assert ended(survivor) == 0
    finally:
        for process in (survivor, dying):
            process.kill()
            process.communicate()
    assert time.monotonic() - start < LIMIT
    result = json.loads((folder / "survivor.json").read_text())
    assert result["error"], "the rank that is left must say something"
    assert result["exact"], "its weights are those before the step"


def lab_killed(inject: Inject) -> None:
    """A run of the lab is killed, and its checkpoint perhaps damaged afterwards; the next run has the same numbers."""
    pytest.importorskip("sklearn")
    from tests.faults.victim import lab_config, lab_job
    from tests.lab.test_job import folder_at, numbers

    from flatwise.lab.job import run_job

    seed, folder = inject.plan.seed, inject.folder
    config = lab_config(inject.plan.method, folder)
    whole = run_job(config, lab_job(config), folder_at(folder / "whole"))
    assert ended(start_process("lab", seed, folder)) == -signal.SIGKILL
    runs, notices = folder_at(folder / "runs"), list[str]()
    path = runs.checkpoint(lab_job(config).method.name, lab_job(config).seed)
    spoil = path.exists() and inject.draws.random() < 0.5
    if spoil:
        path.write_bytes(damaged(path.read_bytes(), inject.draws))
    again = run_job(config, lab_job(config), runs, on_notice=notices.append)
    assert numbers(again) == numbers(whole)
    assert bool(notices) == spoil, "a damaged checkpoint is named, a whole one is not"


IN_PROCESS: dict[str, tuple[int, Callable[[Inject], None]]] = {
    "exception in a pass": (20, exception),
    "KeyboardInterrupt in a pass": (10, keyboard_interrupt),
    "SIGINT at a line of flatwise": (24, interrupt_at_a_line),
    "interrupt by a timer": (8, interrupt_at_a_time),
    "infinity or NaN": (20, not_finite),
    "a gradient lost between passes": (6, gradient_lost),
    "a layer frozen between steps": (6, layer_frozen),
    "out of memory": (12, out_of_memory),
    "a checkpoint cut off": (6, cut_checkpoint),
}
PROCESSES: dict[str, tuple[int, Callable[[Inject], None]]] = {
    "killed, and resumed": (7, killed),
    "a rank that dies": (3, rank_dies),
    "a run of the lab killed": (4, lab_killed),
}
KINDS = {**IN_PROCESS, **PROCESSES}


def kind_of(seed: int) -> str:
    """The kind of fault of a seed."""
    weights = [weight for weight, _ in KINDS.values()]
    return random.Random(f"kind {seed}").choices(list(KINDS), weights)[0]


def carry_out(seed: int, folder: Path) -> None:
    """Inject the fault of a seed, and check what must hold."""
    KINDS[kind_of(seed)][1](Inject(seed, folder))

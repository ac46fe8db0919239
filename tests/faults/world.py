"""A small training made from a seed: method, base, precision and form of call are drawn from it."""

from __future__ import annotations

import contextlib
import copy
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise import weights
from flatwise.memory import STEP

STEPS, SAMPLES, CLASSES = 6, 16, 3
LAYERS = ("first", "norm", "middle", "layer_norm", "last")
Params = list[dict[str, Any]]

BASES: dict[str, Callable[[Params], torch.optim.Optimizer]] = {
    "SGD, momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "SGD, Nesterov": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "Adam, AMSGrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=0.01),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
}
WITHOUT_MOMENTUM = ("SGD", "RMSprop", "Adagrad")
PRECISIONS = ("float64", "float32", "bfloat16", "autocast", "scaler")
OUTSIDE = ("two calls", "block", "framework")
"""Forms in which the passes are run by the caller."""

OPTIONS: dict[str, dict[str, Any]] = {  # what a method does seldom, it does here within six steps
    "looksam": {"every": 2},
    "every-k": {"every": 2},
    "late": {"window": (0.3, 1.0)},
    "ae-sam": {"delta": 0.5},
    "bsam": {"lr": 0.1},
}


def options_of(method: str, model: nn.Module | None) -> dict[str, Any]:
    known = {"p": 1.5, "model": model, "total_steps": STEPS, "warmup_steps": 1, "micro_batch_size": 6, "train_size": 64}
    return {**{name: known[name] for name in flatwise.variant_info(method).needs}, **OPTIONS.get(method, {})}


def forms_of(method: str) -> list[str]:
    """The forms of call that a method can be stepped with."""
    row, model = flatwise.variant_info(method), Net()
    if row.own is not None:
        return ["closure", "batch"]
    opt = flatwise.create(
        method, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **options_of(method, model)
    )
    if opt._batching.splits:
        return ["batch"]
    forms = ["closure", "batch", "closures"]
    with contextlib.suppress(ValueError, TypeError):
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        flatwise.create(method, base, **{**options_of(method, model), "micro_batch_size": 8})
        forms.append("each")
    alone = opt._ascent.steps == 1 and not opt._descent.adds_term and not opt._descent.needs_output
    alone = alone and not (opt._auto and opt._method.one_pass)  # some of its steps make two passes
    return forms + list(OUTSIDE) if alone else forms


class Injected(Exception):
    """The error that a fault raises."""


@dataclass(frozen=True)
class Plan:
    """What is trained.

    ``large`` stands for large tensors, whose copies go into the buffers of their gradients.
    """

    seed: int
    method: str
    base: str
    precision: str
    form: str
    large: bool

    @classmethod
    def draw(cls, seed: int) -> Plan:
        draws, names = random.Random(seed), flatwise.list_variants()
        method = names[seed % len(names)]
        row = flatwise.variant_info(method)
        bases = [name for name in BASES if row.direction.uses_gradient or name not in WITHOUT_MOMENTUM]
        base, precision, form = draws.choice(bases), draws.choice(PRECISIONS), draws.choice(forms_of(method))
        return cls(seed, method, base, precision, form, draws.random() < 0.3)

    @property
    def outside(self) -> bool:
        return self.form in OUTSIDE


@dataclass(frozen=True)
class Trip:
    """What happens in one call of the loss function.

    Attributes:
        call: which call of the step, from 1.
        where: "forward" or "backward" at a layer, "after" the backward pass; "loss" or "gradient" spoil a number;
            "detach" takes the layer out of the graph.
        layer: one of LAYERS.
        act: raises, kills, or returns what a number is multiplied by.
    """

    call: int
    where: str
    layer: str = "middle"
    act: Callable[[], Any] = lambda: None


class Net(nn.Module):
    """Batch statistics, masks, and layers at which something can happen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.middle, self.layer_norm = nn.Dropout(0.3), nn.Linear(8, 8), nn.LayerNorm(8)
        self.last = nn.Linear(8, CLASSES)
        self.trip: Trip | None = None

    def _at(self, name: str, x: Tensor) -> Tensor:
        trip, layer = self.trip, getattr(self, name)
        if trip is None or trip.layer != name:
            out: Tensor = layer(x)
            return out
        if trip.where == "forward":
            trip.act()
        if trip.where == "detach":
            still = {key: value.detach() for key, value in layer.named_parameters()}
            return cast(Tensor, torch.func.functional_call(layer, still, (x,)))
        out = layer(x)
        if trip.where in ("backward", "gradient") and out.requires_grad:
            factor = trip.act if trip.where == "gradient" else None
            out.register_hook((lambda grad: grad * factor()) if factor else lambda grad: trip.act())
        return out

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(torch.relu(self._at("norm", self._at("first", x))))
        return self._at("last", torch.tanh(self._at("layer_norm", self._at("middle", hidden))))


@dataclass
class Call:
    """One call of the loss function."""

    ids: frozenset[int]
    batch: Any
    grad: bool
    weights: list[Tensor]
    counts: bool
    """Whether it is the first that saw its samples: the one that counts for buffers and random state."""
    done: bool = False


class World:
    """A training."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        torch.manual_seed(plan.seed)
        dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(plan.precision, torch.float32)
        self.net = Net().to(dtype)
        scaled = plan.precision == "scaler"
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3, enabled=scaled)
        matrices = [p for p in self.net.parameters() if p.dim() > 1]
        others = [p for p in self.net.parameters() if p.dim() <= 1]
        base = BASES[plan.base]([{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}])
        self.updating = False
        me = weakref.ref(self)  # no cycle: a training that is over is gone at once, with its hooks
        base.register_step_pre_hook(lambda *_: cast(World, me())._note_update())  # before flatwise's own
        self.opt: Any = flatwise.create(plan.method, base, **options_of(plan.method, self.net))
        if scaled:
            self.opt.attach_scaler(self.scaler)
        if isinstance(self.opt, flatwise.BSAM):
            optimizer, update = weakref.ref(self.opt), type(self.opt)._update
            self.opt._update = lambda *args: [cast(World, me())._note_update(), update(optimizer(), *args)][1]
        self.rates = [group["lr"] for group in self.opt.param_groups]
        self.log: list[Call] = []
        self.trip: Trip | None = None
        self._handles: list[Any] = []
        self.around: Callable[[], Any] = nullcontext
        self.random = torch.get_rng_state()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Each training has a random state of its own, which goes on where its last turn ended."""
        torch.set_rng_state(self.random)
        try:
            yield
        finally:
            self.random = torch.get_rng_state()

    def _note_update(self) -> None:
        self.updating = True

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        draws = torch.Generator().manual_seed(1000 * self.plan.seed + step)
        x = torch.randn(SAMPLES, 6, generator=draws, dtype=torch.float64).to(self.net.first.weight.dtype)
        return x, torch.randint(CLASSES, (SAMPLES,), generator=draws), torch.arange(SAMPLES)

    def loss(self, batch: Any) -> Tensor:
        """The loss function: logs its calls, and trips in the one that is meant."""
        x, y, index = batch
        ids = frozenset(index.tolist())
        seen = frozenset[int]().union(*(call.ids for call in self.log))
        counts = not ids & seen
        at = [p.detach().clone() for p in self.net.parameters()]
        self.log.append(Call(ids, batch, torch.is_grad_enabled(), at, counts))
        trip = self.trip if self.trip is not None and self.trip.call == len(self.log) else None
        return self.forward(x, y, trip)

    def forward(self, x: Tensor, y: Tensor, trip: Trip | None) -> Tensor:
        self.net.trip = trip
        try:
            amp = torch.autocast("cpu", torch.bfloat16) if self.plan.precision == "autocast" else nullcontext()
            with amp:
                out = self.net(x)
        finally:
            self.net.trip = None
        if self.log:
            self.log[-1].done = True
        out = out if out.dtype == torch.float64 else out.float()
        loss = F.cross_entropy(out, y, reduction="none" if self.opt.wants_sample_losses else "mean")
        if trip is not None and trip.where == "loss":
            loss = loss * trip.act()
        if trip is not None and trip.where == "after" and self.plan.form == "batch" and torch.is_grad_enabled():
            # Here flatwise calls backward() itself: the weight of the first layer is the last to get its gradient.
            self._handles.append(self.net.first.weight.register_post_accumulate_grad_hook(lambda _: trip.act()))
        return loss

    def backward(self, batch: Any, share: float = 1.0) -> Tensor:
        loss = self.loss(batch) * share
        self.scaler.scale(loss).backward()
        if self.trip is not None and self.trip.where == "after" and self.trip.call == len(self.log):
            self.trip.act()
        return loss

    def closure(self, batch: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            self.opt.zero_grad()
            return self.backward(batch)

        return run

    @property
    def one_pass(self) -> bool:
        """Whether the method needs no gradient at w."""
        return not flatwise.variant_info(self.plan.method).direction.uses_gradient

    def first_pass(self, batch: Any) -> None:
        if self.one_pass:
            self.opt.zero_grad()
        else:
            self.closure(batch)()

    def step(self, step: int, trip: Trip | None = None) -> None:
        """Take a step, as users do in the plan's form."""
        self.begin(step, trip)
        opt, form, batch = self.opt, self.plan.form, self.batch(step)
        halves = [tuple(part[half] for part in batch) for half in (slice(0, 8), slice(8, None))]
        try:
            with self.turn(), large_tensors() if self.plan.large else nullcontext(), self.around():
                if form == "closure":
                    opt.step(self.closure(batch))
                elif form == "batch":
                    opt.step(self.loss, batch)
                elif form in ("closures", "each"):
                    parts = [lambda half=half: self.backward(half, 0.5) for half in halves]
                    opt.step(parts, each=True) if form == "each" else opt.step(parts)
                elif form == "two calls":
                    self.first_pass(batch)
                    opt.first_step(zero_grad=True)
                    self.backward(batch)
                    opt.second_step(zero_grad=True)
                elif form == "block":
                    self.first_pass(batch)
                    with opt.perturbed():
                        self.backward(batch)
                    self.scaler.step(opt.base_optimizer)
                else:
                    self.first_pass(batch)
                    moved = opt.perturb()
                    if moved or self.one_pass:
                        self.backward(batch)
                    if moved:
                        opt.restore()
                    self.scaler.step(opt)
                self.scaler.update()
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles, self.trip = [], None

    def begin(self, step: int, trip: Trip | None = None) -> None:
        """What comes before the passes: nothing but the step's learning rate, and an empty log."""
        self.log, self.trip, self.updating = [], trip, False
        for group, rate in zip(self.opt.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - step / (2 * STEPS))

    def recover(self) -> None:
        """What a careful user does after a step that raised, where it was the user who ran the passes."""
        if self.plan.outside:
            with self.turn():
                self.opt.restore()
            self.opt.zero_grad()
            if self.updating and self.scaler.is_enabled() and self.scaler._per_optimizer_states:
                self.scaler.update()  # scaler.step() was interrupted

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for param, value in zip(self.net.parameters(), values, strict=True):
            param.copy_(value)

    def plain(self, calls: list[Call], trip: Trip | None) -> None:
        """Do with the module alone what is left of a step: the forward passes that count, up to the fault."""
        with self.turn():
            self._plain(calls, trip)

    def _plain(self, calls: list[Call], trip: Trip | None) -> None:
        random_state, here = torch.get_rng_state(), [p.detach().clone() for p in self.net.parameters()]
        self.log = []
        for number, call in enumerate(calls, 1):
            mine = trip if trip is not None and trip.call == number and trip.where == "forward" else None
            last = self.split and number == len(calls) > 1  # this method's masks are those of its second pass
            if not (call.counts or last) or not (call.done or mine):
                continue
            kept = [b.clone() for b in self.net.buffers()]
            if last:
                torch.set_rng_state(random_state)
            self._put(call.weights)
            with contextlib.suppress(Injected, KeyboardInterrupt, torch.OutOfMemoryError):
                self.forward(call.batch[0], call.batch[1], mine)
            if last:
                for buffer, value in zip(self.net.buffers(), kept, strict=True):
                    buffer.copy_(value)
        self._put(here)

    @property
    def split(self) -> bool:
        return not isinstance(self.opt, flatwise.BSAM) and bool(self.opt._batching.ascent_fraction < 1)

    def count(self) -> None:
        """Count a step that changes nothing else."""
        for group in self.opt.param_groups:
            group[STEP] += 1

    def state(self) -> dict[str, Any]:
        """All that later steps depend on, as copies.

        The radius of a step is read off the schedule when it begins, so the one in the groups may be that of the
        step that failed. What is said about hooks and modes is that none is left over.
        """
        result: dict[str, Any] = {f"model {k}": v for k, v in self.net.state_dict().items()}
        saved = self.opt.state_dict()
        for index, entries in saved["state"].items():
            result.update({f"state {index} {name}": value for name, value in entries.items()})
        derived = {"params", "rho", "sam_rho_max", "sam_lr_max", "lr"}
        for number, group in enumerate(saved["param_groups"]):
            result.update({f"group {number} {k}": v for k, v in group.items() if k not in derived})
        result.update({f"scaler {k}": v for k, v in self.scaler.state_dict().items()})
        result["random state"] = self.random
        result["frozen"] = [not p.requires_grad for p in self.net.parameters()]
        result["hooks"] = sum(len(p._backward_hooks or ()) for p in self.net.parameters()) + sum(
            len(m._forward_hooks) + len(m._backward_hooks) for m in self.net.modules()
        )
        result["gradients enabled"] = torch.is_grad_enabled()
        return copy.deepcopy(result)

    def checkpoint(self) -> dict[str, Any]:
        return {
            "model": self.net.state_dict(),
            "optimizer": self.opt.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self.random,
        }

    def load(self, saved: dict[str, Any]) -> None:
        saved = copy.deepcopy(saved)
        self.net.load_state_dict(saved["model"])
        self.opt.load_state_dict(saved["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        self.random = saved["random"]

    def load_file(self, path: Path) -> None:
        self.load(torch.load(path, weights_only=True))


@contextlib.contextmanager
def large_tensors() -> Iterator[None]:
    """Let every tensor be a large one: copies go into the buffers of gradients, block by block."""
    kept = weights.SMALL, weights.SWAP_FROM, weights.CHUNK
    weights.SMALL, weights.SWAP_FROM, weights.CHUNK = 1, 4, 16
    try:
        yield
    finally:
        weights.SMALL, weights.SWAP_FROM, weights.CHUNK = kept


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what is not the same, bit for bit."""
    return [key for key in sorted(one.keys() | other.keys()) if not _equal(one.get(key), other.get(key))]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def assert_same(got: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    wrong = differences(got, wanted)
    assert not wrong, f"{what}: not the same are {', '.join(wrong)}"


def assert_finite(world: World) -> None:
    bad = [name for name, value in world.net.state_dict().items() if not bool(torch.isfinite(value).all())]
    assert not bad, f"not finite are {', '.join(bad)}"

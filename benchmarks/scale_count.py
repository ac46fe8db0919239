"""Counts what ``scale_formula.py`` computes: small models in 2 and 4 processes that talk over gloo on this machine.

Every collective passes through torch's dispatcher, where a mode sees its group and its tensors; what a device holds is
read from the tensors that are alive at the start of a pass. Nothing here uses a formula, or flatwise's own state.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import flatwise
from scale_formula import Calls, Layout, Method, Model, Precision, methods

EVERY, SAMPLES, SECONDS = 2, 8, 900
REPEATS, PAUSE = 4, 0.01
"""A thread of gloo may hold a buffer for a moment after its collective: it is given time, and the least is taken."""
INPUTS, WIDTH, HIDDEN, BLOCKS, CLASSES = 6, 10, 20, 3, 3
SMALL = Model(
    "counted",
    before=((WIDTH, INPUTS),),
    block=((HIDDEN, WIDTH), (WIDTH, HIDDEN)),
    blocks=BLOCKS,
    after=((CLASSES, WIDTH),),
    width=WIDTH,
    rows=(1,),
)
"""Rows that do not divide evenly: 10 over 4 devices and 3 over 2 leave padding, which must be counted too."""
CAP = 1000
"""Bytes of a bucket, so that there are several."""
FULL, MIXED = Precision(), Precision(gathered=2)
METHODS = methods(EVERY)


class Net(nn.Module):
    """A model with the sizes of ``SMALL``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        linear = partial(nn.Linear, bias=False)
        self.before = linear(INPUTS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(linear(WIDTH, HIDDEN), nn.Tanh(), linear(HIDDEN, WIDTH)) for _ in range(BLOCKS)
        )
        self.after = linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        x = self.before(x)
        for block in self.blocks:
            x = x + block(x)
        return self.after(x).float()


@dataclass(frozen=True)
class Setting:
    """What is counted once.

    Attributes:
        layout: of the processes.
        method: what is done.
        precision: of the numbers.
        micro_batches: accumulated into one step.
    """

    layout: Layout
    method: Method
    precision: Precision = FULL
    micro_batches: int = 1

    @property
    def name(self) -> str:
        """Return what the page calls it."""
        layout = self.layout
        if layout.kind == "ddp":
            text = f"DDP {layout.replicas}" + ("" if layout.sync is True else f", sync_ascent={layout.sync}")
            text += ", views" if layout.views else ""
        else:
            text = f"FSDP2 {layout.shards}" if layout.replicas == 1 else f"HSDP {layout.replicas} × {layout.shards}"
            text += f" × TP {layout.tensor}" if layout.tensor > 1 else ""
            text += "" if layout.reshard else ", no reshard"
            text += ", root resharded" if layout.root_too else ""
        text += ", bf16" if self.precision.gathered == 2 else ""
        return text + (f", {self.micro_batches} micro-batches" if self.micro_batches > 1 else "")


def settings(world: int) -> list[Setting]:
    """Return what is counted with so many processes."""

    def of(layout: Layout, names: str, **options: Any) -> list[Setting]:
        return [Setting(layout, METHODS[name], **options) for name in names.split()]

    every, ddp = " ".join(METHODS), partial(Layout, "ddp", replicas=world, cap=CAP, first_cap=CAP)
    fsdp = Layout("fsdp", shards=world)
    if world == 2:
        return [
            *of(ddp(), every),
            *of(ddp(sync=False), "sam msam every-k"),
            *of(ddp(views=True), "plain sam"),
            *of(ddp(), "plain sam", micro_batches=2),
            *of(ddp(sync=False), "sam", micro_batches=2),
            *of(fsdp, every),
            *of(fsdp, "plain sam", micro_batches=2),
            *of(fsdp, "plain sam msam", precision=MIXED),
            *of(Layout("fsdp", shards=2, reshard=False), "plain sam"),
            *of(Layout("fsdp", shards=2, root_too=True), "plain sam"),
        ]
    return [
        *of(ddp(), "plain sam"),
        *of(ddp(sync=False), "sam"),
        *of(ddp(sync=2), "sam every-k"),
        *of(fsdp, "plain sam msam"),
        *of(Layout("fsdp", replicas=2, shards=2), every),
        *of(Layout("fsdp", replicas=2, shards=2), "plain sam", micro_batches=2),
        *of(Layout("fsdp", replicas=2, shards=2, reshard=False), "plain sam"),
        *of(Layout("fsdp", shards=2, tensor=2), "plain sam msam gsam looksam"),
    ]


class Watch(TorchDispatchMode):
    """Notes every collective: what it is, over which group, and the bytes of its whole buffer.

    Args:
        groups: names of process groups, and the axis that each of them is.
    """

    KNOWN: tuple[tuple[str, str, int], ...] = (
        ("c10d::allreduce_", "all-reduce", 0),
        ("c10d::_allgather_base_", "all-gather", 0),
        ("c10d::_reduce_scatter_base_", "reduce-scatter", 1),
        ("_c10d_functional::all_reduce", "all-reduce", 0),
        ("_c10d_functional::all_reduce_", "all-reduce", 0),
    )
    """Operators, and which of their arguments is the whole buffer."""
    WAITS = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")

    def __init__(self, groups: dict[str, str]) -> None:
        super().__init__()
        self.calls: Calls = Counter()
        self.order: list[tuple[str, int]] = []
        self.buffers: dict[int, int] = {}
        self._groups = groups
        self._known = {name: (kind, place) for name, kind, place in self.KNOWN}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a collective, and run it."""
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it is made of operations on parts, which come here
        name = func._schema.name
        if func.namespace in ("c10d", "_c10d_functional") and name not in self.WAITS:
            kind, place = self._known.get(name, (name, 0))  # an unknown one is in no formula, and will be missed
            given = args[place]
            for buffer in given if isinstance(given, list) else [given]:
                axis = self._axis(args)
                self.calls[(kind, axis), buffer.nbytes] += 1
                self.order.append((kind, buffer.nbytes))
                if axis == "replica":
                    self.buffers[buffer.untyped_storage().data_ptr()] = buffer.nbytes
        return func(*args, **(kwargs or {}))

    def _axis(self, args: Iterable[Any]) -> str:
        for value in args:
            if isinstance(value, str) and value in self._groups:
                return self._groups[value]
            if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
                return self._groups.get(distributed.ProcessGroup.unbox(value).group_name, "ascent")
        return "ascent"


def live() -> int:
    """Return the bytes of all floating-point tensors that are alive, without single numbers."""
    time.sleep(PAUSE)
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.is_floating_point() and thing.dim():
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def gathered(model: nn.Module) -> int:
    """Return the bytes of the weights that are there as a whole."""
    return sum(p.untyped_storage().nbytes() for p in model.parameters() if type(p) is nn.Parameter)


@cache
def mesh_of(axes: tuple[tuple[str, int], ...]) -> Any:
    """Return one mesh for all settings of a shape: torch keeps the groups of the first of several equal ones."""
    from torch.distributed.device_mesh import init_device_mesh

    names, sizes = zip(*axes, strict=True)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def build(setting: Setting) -> tuple[nn.Module, dict[str, str]]:
    """Return the model, spread as the layout says, and the axes of the process groups."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    layout, model = setting.layout, Net()
    if layout.kind == "ddp":
        assert distributed.group.WORLD is not None
        name = distributed.group.WORLD.group_name
        options: dict[str, Any] = {"bucket_cap_mb": layout.cap / 2**20, "gradient_as_bucket_view": layout.views}
        return nn.parallel.DistributedDataParallel(model, **options), {name: "replica"}
    sizes = {"replica": layout.replicas, "shard": layout.shards, "tensor": layout.tensor}
    used = {axis: size for axis, size in sizes.items() if size > 1}
    mesh = mesh_of(tuple(used.items()))
    for block in model.blocks if layout.tensor > 1 else ():
        parallelize_module(block, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    over: dict[str, Any] = {"mesh": mesh[tuple(axis for axis in used if axis != "tensor")]}
    if setting.precision.gathered == 2:
        over["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=layout.reshard, **over)
    fully_shard(model, **over, **({"reshard_after_forward": True} if layout.root_too else {}))
    return model, {mesh.get_group(axis).group_name: axis for axis in used}


def count(setting: Setting) -> dict[str, Any]:
    """Return what one period of a method does on this device, after some that warm up.

    Args:
        setting: what is counted.

    Returns:
        The collectives, and the bytes held: between steps beside the weights, during the last pass beside that, as
        buckets, and as gathered weights.
    """
    gc.collect()
    gc.freeze()  # what is there already is not counted, and need not be looked through
    model, groups = build(setting)
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    before, starts, whole, left = live(), [], [0], [0]
    batch = (torch.randn(SAMPLES, INPUTS), torch.randint(CLASSES, (SAMPLES,)))
    fsdp = setting.layout.kind == "fsdp" and setting.layout.tensor == 1
    for module in model.modules() if fsdp else ():
        module.register_forward_pre_hook(lambda *_: whole.append(gathered(model)))
    ignored = batch[0].nbytes

    def loss_fn(batch: tuple[Tensor, Tensor], share: float = 1.0) -> Tensor:
        starts.append(live() - ignored)
        scores = model(batch[0])
        left.append(gathered(model) if fsdp else 0)
        return functional.cross_entropy(scores, batch[1]) * share

    step = stepper(setting, model, base, loss_fn, batch)
    for _ in range(2 * EVERY):  # the buckets of DDP are made anew after the first pass
        step()
    peaks, rests = [], []
    for _ in range(REPEATS):
        starts.clear()
        for _ in setting.method.passes:
            step()
        peaks.append(max(starts[:: setting.micro_batches]))
        base.zero_grad()
        rests.append(live() - ignored)
    peak, rest = min(peaks), min(rests)
    watch = Watch(groups)
    with watch:
        for _ in setting.method.passes:
            step()
    found = {
        "calls": sorted([*key, size, times] for (key, size), times in watch.calls.items()),
        "between steps": rest - before,
        "during the last pass": peak - rest,
    }
    if setting.layout.kind == "ddp":
        own = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
        found["buckets"] = sum(size for place, size in watch.buffers.items() if place not in own)
    if fsdp:
        found |= {"gathered": max(whole), "gathered after forward": left[-1], "blocks at once": at_once(watch.order)}
    return found


def stepper(
    setting: Setting, model: nn.Module, base: Any, loss_fn: Callable[..., Tensor], batch: tuple[Tensor, Tensor]
) -> Callable[[], Any]:
    """Return a function that takes one step."""
    many, name = setting.micro_batches, setting.method.name
    if name == "plain":

        def plain() -> None:
            base.zero_grad()
            for number in range(many):
                apart = setting.layout.kind == "ddp" and number < many - 1
                with model.no_sync() if apart else nullcontext():  # type: ignore[operator]
                    loss_fn(batch, 1 / many).backward()
            base.step()

        return plain
    options: dict[str, Any] = {"every": EVERY} if name in ("every-k", "looksam") else {}
    if setting.layout.kind == "ddp":
        options["sync_ascent"] = setting.layout.sync
    opt = flatwise.create(name, base, model=model, **options)  # type: ignore[call-overload]
    if many == 1:
        return lambda: opt.step(loss_fn, batch)

    def closure() -> Tensor:
        loss = loss_fn(batch, 1 / many)
        loss.backward()
        return loss

    return lambda: opt.step([closure] * many)


def at_once(order: list[tuple[str, int]]) -> int:
    """Return how many blocks were gathered at once, at most, in the last backward pass.

    Args:
        order: of all collectives. The last gathers are those of the blocks for that pass.
    """
    first = [index for index, (kind, _) in enumerate(order) if kind == "all-gather"][-BLOCKS]
    most = now = 0
    for kind, _ in order[first:]:
        now += {"all-gather": 1, "reduce-scatter": -1}.get(kind, 0)
        most = max(most, now)
    return most


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # the sum in Net.forward is not in place
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = (Path(folder) / "meeting").as_uri()
    limit = timedelta(seconds=SECONDS)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=limit)
    found = [count(setting) for setting in settings(world)]
    torch.save(found, Path(folder) / str(rank))
    distributed.barrier()  # neither leaves while the other may still talk to it
    distributed.destroy_process_group()


def counted(world: int) -> list[dict[str, Any]]:
    """Start processes, and return what the first of them counted, once all counted the same calls.

    Args:
        world: their number.

    Raises:
        AssertionError: if the processes differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (world, folder), nprocs=world)
        first, *others = [torch.load(Path(folder) / str(rank)) for rank in range(world)]
    for other in others:
        if [found["calls"] for found in other] != [found["calls"] for found in first]:
            raise AssertionError("the processes made different calls")
    return first

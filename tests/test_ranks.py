"""Two processes: who shares a perturbation, how often gradients are summed, and that no rank is left waiting."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.start import Sums, on_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import flatwise

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
]
STEPS, RHO = 50, 0.2


class Net(nn.Module):
    """Dropout and batch statistics, and a layer that no loss sees where ``unused``."""

    def __init__(self, *, norm: bool = True, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()
        self.norm = nn.BatchNorm1d(8).double() if norm else nn.Tanh()
        self.extra = nn.Linear(2, 2).double() if unused else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x)))
        return out


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(12, 6, generator=generator).double(), torch.randint(3, (12,), generator=generator))
        for _ in range(steps)
    ]


def mine(rank: int, batch: tuple[Tensor, Tensor], world: int = 2) -> tuple[Tensor, Tensor]:
    size = 12 // world
    return batch[0][rank * size : (rank + 1) * size], batch[1][rank * size : (rank + 1) * size]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


WRAPPERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
}


def train(rank: int, wrapper: str, sync: Any, form: str) -> dict[str, Any]:
    ddp = DistributedDataParallel(Net(unused=wrapper == "unused"), **WRAPPERS[wrapper])
    sums = Sums(ddp)
    base = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    opt = flatwise.SAM(base, RHO, model=ddp, sync_ascent=sync)
    counts = []
    for batch in batches(STEPS):
        own, before = mine(rank, batch), sums.count

        def closure(own: Any = own) -> Tensor:
            opt.zero_grad()
            loss = loss_of(ddp, own)
            loss.backward()
            return loss

        if form == "closure":
            opt.step(closure)
        elif form == "batch":
            opt.step(lambda b: loss_of(ddp, b), own)
        else:
            with ddp.no_sync() if sync is False else nullcontext():
                closure()
            if opt.perturb():
                closure()
                opt.restore()
            opt.step()
        counts.append(sums.count - before)
    return {"weights": weights(ddp), "counts": counts, "buffers": [b.clone() for b in ddp.buffers()]}


def by_hand(world: int, *, shared: int, normalised: bool = True) -> Tensor:
    """SAM with one perturbation for every ``shared`` ranks, in one process; every rank has its own batch statistics."""
    models = [Net() for _ in range(world)]
    bases = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in models]
    for batch in batches(STEPS):
        firsts = [torch.autograd.grad(loss_of(m, mine(r, batch, world)), list(m.parameters())) for r, m in
                  enumerate(models)]  # fmt: skip
        seconds = []
        for rank, model in enumerate(models):
            begin = rank // shared * shared
            first = [sum(gs) / shared for gs in zip(*firsts[begin : begin + shared], strict=True)]
            norm = torch.cat([g.flatten() for g in first]).norm() if normalised else 1.0
            kept = [p.detach().clone() for p in model.parameters()]
            with torch.no_grad():
                for p, g in zip(model.parameters(), first, strict=True):
                    p.add_(RHO * g / norm)
            seconds.append(torch.autograd.grad(loss_of(model, mine(rank, batch, world)), list(model.parameters())))
            with torch.no_grad():
                for p, w in zip(model.parameters(), kept, strict=True):
                    p.copy_(w)
        for model, base in zip(models, bases, strict=True):
            for p, *gs in zip(model.parameters(), *seconds, strict=True):
                p.grad = sum(gs) / world
            base.step()
    return weights(models[0])


@pytest.mark.supports("DDP", "equal to hand-written SAM")
@pytest.mark.supports("DDP", "collectives counted")
@pytest.mark.parametrize("form", ["closure", "batch", "framework"])
@pytest.mark.parametrize("sync", [None, True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ranks_agree_and_do_what_was_chosen(wrapper: str, sync: Any, form: str, tmp_path: Path) -> None:
    if (wrapper, sync, form) == ("static graph", False, "framework"):
        pytest.skip("torch itself wants a pass with sums before the user enters no_sync()")
    one, two = on_ranks(train, tmp_path, wrapper, sync, form)
    assert torch.equal(one["weights"], two["weights"])
    if wrapper != "unused":
        wanted = by_hand(2, shared=1 if sync is False else 2)
        assert torch.allclose(one["weights"], wanted, rtol=0, atol=1e-9)
    passes = 1 if sync is False else 2
    late = one["counts"][2:]  # buckets are rebuilt after the first pass
    assert set(late) == {passes}, "sums of gradients in a step"


def groups(rank: int, size: int, name: str) -> Tensor:
    ddp = DistributedDataParallel(Net())
    base = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    opt = flatwise.create(name, base, rho=RHO, model=ddp, sync_ascent=size)
    for batch in batches(STEPS):
        opt.step(lambda b: loss_of(ddp, b), mine(rank, batch, 4))
    return weights(ddp)


@pytest.mark.supports("DDP", "groups of ranks")
@pytest.mark.parametrize("name", ["sam", "usam"])  # the second also sees the length of the shared gradient
def test_groups_of_ranks_share_a_perturbation(name: str, tmp_path: Path) -> None:
    results = on_ranks(groups, tmp_path, 2, name, world=4)
    assert all(torch.equal(results[0], other) for other in results)
    assert torch.allclose(results[0], by_hand(4, shared=2, normalised=name == "sam"), rtol=0, atol=1e-9)


def ranked(rank: int, static: bool) -> list[Tensor]:
    ddp = DistributedDataParallel(Net(), static_graph=static)
    base = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    opt = flatwise.create("k-sam", base, rho=RHO, model=ddp, sync_ascent=False)
    for batch in batches(5):
        opt.step(lambda b: F.cross_entropy(ddp(b[0]), b[1], reduction="none"), mine(rank, batch))
    return [weights(ddp), *(b.clone() for b in ddp.buffers())]


def test_the_pass_that_a_static_graph_wants_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    static, plain = on_ranks(ranked, tmp_path / "a", True), on_ranks(ranked, tmp_path / "b", False)
    assert all(torch.equal(a, b) for one, two in zip(static, plain, strict=True) for a, b in zip(one, two, strict=True))


def one_bad_rank(rank: int, sync: Any, scaled: bool, which: int) -> dict[str, Any]:
    """On rank 1 only, the loss of pass ``which`` of the third step is NaN."""
    ddp = DistributedDataParallel(Net(norm=False).float())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
    base = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    opt = flatwise.SAM(base, RHO, model=ddp, sync_ascent=sync, grad_scaler=scaler if scaled else None)
    calls, path, scales = 0, [], []

    def loss_fn(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss = loss_of(ddp, (batch[0].float(), batch[1]))
        return loss * float("nan") if rank == 1 and calls == 4 + which else loss

    for batch in batches(5):
        opt.step(loss_fn, mine(rank, batch))
        scaler.update()
        path.append(weights(ddp))
        scales.append(scaler.get_scale() if scaled else 1.0)
    return {"path": path, "scales": scales, "updated": opt.last.updated}


@pytest.mark.supports("DDP", "a NaN on one process only")
@pytest.mark.supports("DDP", "fp16 overflow in either pass")
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sync", [True, False, 1])
def test_a_nan_on_one_rank_neither_hangs_nor_parts_the_ranks(
    sync: Any, scaled: bool, which: int, tmp_path: Path
) -> None:
    one, two = on_ranks(one_bad_rank, tmp_path, sync, scaled, which)
    assert all(map(torch.equal, one["path"], two["path"]))
    assert all(w.isfinite().all() for w in one["path"])
    # Without a scaler, a rank whose own first gradient is bad looks nowhere, and its second gradient is good.
    kept = scaled or sync is True or which == 2
    assert torch.equal(one["path"][1], one["path"][2]) == kept, "the bad step is no step"
    assert not torch.equal(one["path"][2], one["path"][3])
    if scaled:
        assert one["scales"] == two["scales"] == [64.0, 64.0, 32.0, 32.0, 32.0]


def halves(ddp: nn.Module, x: Tensor, y: Tensor) -> list[Any]:
    """Two closures, one for each half of a rank's six samples."""

    def closure(cut: slice) -> Tensor:
        loss = loss_of(ddp, (x[cut], y[cut])) / 2
        loss.backward()
        return loss

    return [partial(closure, cut) for cut in (slice(0, 3), slice(3, 6))]


def accumulated(rank: int, sync: Any) -> dict[str, Any]:
    ddp = DistributedDataParallel(Net(norm=False))
    sums = Sums(ddp)
    base = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    opt = flatwise.SAM(base, RHO, model=ddp, sync_ascent=sync)
    for batch in batches(4):
        x, y = mine(rank, batch)
        before = sums.count
        opt.step(halves(ddp, x, y))
    return {"weights": weights(ddp), "count": sums.count - before}


def whole(rank: int, sync: Any) -> Tensor:
    ddp = DistributedDataParallel(Net(norm=False))
    base = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    opt = flatwise.SAM(base, RHO, model=ddp, sync_ascent=sync)
    for batch in batches(4):
        opt.step(lambda b: loss_of(ddp, b), mine(rank, batch))
    return weights(ddp)


@pytest.mark.supports("DDP", "gradient accumulation")
@pytest.mark.parametrize("sync", [True, False])
def test_accumulation_sums_once_for_each_pass(sync: bool, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = on_ranks(accumulated, tmp_path / "a", sync)
    assert torch.equal(one["weights"], two["weights"])
    assert one["count"] == (2 if sync else 1)
    assert torch.allclose(one["weights"], on_ranks(whole, tmp_path / "b", sync)[0], rtol=0, atol=1e-12)


def mistakes(rank: int) -> list[str]:
    ddp, texts = DistributedDataParallel(Net()), []
    for options in ({"sync_ascent": False}, {"sync_ascent": 3, "model": ddp}):
        opt = flatwise.SAM(torch.optim.SGD(ddp.parameters(), lr=0.05), RHO, **options)
        try:
            opt.step(lambda b: loss_of(ddp, b), mine(rank, batches(1)[0]))
            texts.append("nothing")
        except (RuntimeError, ValueError) as error:
            texts.append(str(error))
    return texts


def test_mistakes_are_named_on_every_rank(tmp_path: Path) -> None:
    for first, second in on_ranks(mistakes, tmp_path):
        assert "pass model=ddp_model" in first
        assert "sync_ascent=3 must divide the number of ranks, which is 2" in second


def replicas(rank: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from flatwise.parallel import assert_replicas_equal

    plain, cut = Net(), Net()
    fully_shard(cut, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replica", "shard")))
    texts = []
    for model in (plain, cut):
        with torch.no_grad():
            local = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
            local[1][0] = float("nan")  # equal bits on both, though no equal numbers
        for change in (0.0, 1e-14):
            with torch.no_grad():
                local[0][0, 0] += change * rank
            try:
                assert_replicas_equal([*model.parameters(), *model.buffers()])
                texts.append("equal")
            except RuntimeError as error:
                texts.append(str(error))
    return texts


@pytest.mark.supports("DDP", "replicas compared")
def test_replicas_are_compared_bit_for_bit(tmp_path: Path) -> None:
    for texts in on_ranks(replicas, tmp_path):
        assert texts[0] == texts[2] == "equal"
        assert all("differ between ranks, in tensor 0 of" in texts[i] for i in (1, 3))


def without_a_radius(rank: int, sync: Any) -> list[list[Tensor]]:
    results = []
    for wrapped in (True, False):
        ddp = DistributedDataParallel(Net())
        base = torch.optim.AdamW(ddp.parameters(), lr=0.05)
        opt = flatwise.SAM(base, 0.0, model=ddp, sync_ascent=sync) if wrapped else None
        for batch in batches(5):
            if opt is not None:
                opt.step(lambda b, ddp=ddp: loss_of(ddp, b), mine(rank, batch))
                continue
            base.zero_grad()
            loss_of(ddp, mine(rank, batch)).backward()
            base.step()
        results.append([weights(ddp), *(b.clone() for b in ddp.buffers())])
    return results


@pytest.mark.supports("DDP", "rho = 0 is the plain run, bit for bit")
@pytest.mark.parametrize("sync", [True, False])
def test_radius_zero_is_the_plain_run_on_every_rank(sync: bool, tmp_path: Path) -> None:
    for wrapped, plain in on_ranks(without_a_radius, tmp_path, sync):
        assert all(map(torch.equal, wrapped, plain))


def of_my_own(rank: int) -> Tensor:
    ddp = DistributedDataParallel(Net(norm=False))
    base = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    opt = flatwise.SAM(base, RHO, model=ddp, sync_ascent=False)
    for batch in batches(STEPS):
        opt.step(lambda b: loss_of(ddp, b), mine(rank, batch))
    return weights(ddp)


def test_parts_of_a_batch_on_one_device_are_as_many_ranks(tmp_path: Path) -> None:
    model = Net(norm=False)
    opt = flatwise.SAM(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), RHO, micro_batch_size=6)
    for batch in batches(STEPS):
        opt.step(lambda b: loss_of(model, b), batch)
    for result in on_ranks(of_my_own, tmp_path):
        assert torch.allclose(result, weights(model), rtol=0, atol=1e-12)


def quietly(rank: int) -> bool:
    """Whole parameters and one perturbation for all: whatever is summed, the wrapper sums."""
    ddp = DistributedDataParallel(Net())
    opt = flatwise.SAM(torch.optim.SGD(ddp.parameters(), lr=0.05), RHO, model=ddp, max_grad_norm=1.0)
    kept = {name: getattr(torch.distributed, name) for name in ("all_reduce", "all_gather", "broadcast", "reduce")}

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective")

    for name in kept:
        setattr(torch.distributed, name, refuse)
    for batch in batches(2):
        opt.step(lambda b: loss_of(ddp, b), mine(rank, batch))
    for name, function in kept.items():
        setattr(torch.distributed, name, function)
    return opt.last.active


def test_nothing_is_reduced_where_parameters_are_whole(tmp_path: Path) -> None:
    assert on_ranks(quietly, tmp_path) == [True, True]


def joined_gradients(rank: int, name: str, views: bool) -> Tensor:
    ddp = DistributedDataParallel(Net(norm=False), gradient_as_bucket_view=views)
    base = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    opt = flatwise.create(name, base, rho=RHO, model=ddp)
    for batch in batches(6):
        opt.step(lambda b: loss_of(ddp, b), mine(rank, batch))
    return weights(ddp)


@pytest.mark.parametrize("name", ["pgn", "gsam", "wsam", "stable", "looksam"])
def test_bucket_views_do_not_overwrite_the_first_gradient(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    views = on_ranks(joined_gradients, tmp_path / "a", name, True)[0]
    assert torch.equal(views, on_ranks(joined_gradients, tmp_path / "b", name, False)[0])


def inactive(rank: int) -> Tensor:
    ddp = DistributedDataParallel(Net())
    base = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    opt = flatwise.SAM(base, RHO, model=ddp, sync_ascent=False, every=2)
    for batch in batches(5):
        own = mine(rank, batch)
        opt.zero_grad()
        with ddp.no_sync():
            loss_of(ddp, own).backward()
        if opt.perturb():
            loss_of(ddp, own).backward()
            opt.restore()
        opt.step()
    return weights(ddp)


def test_a_step_that_a_schedule_leaves_out_is_summed_all_the_same(tmp_path: Path) -> None:
    one, two = on_ranks(inactive, tmp_path)
    assert torch.equal(one, two)


def overflow(rank: int, form: str, wrapper: str) -> dict[str, Any]:
    """Rank 0 alone has an infinity in a first gradient of the third step."""
    ddp = DistributedDataParallel(Net(norm=False, unused=wrapper == "unused").float(), **WRAPPERS[wrapper])
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    base = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    options = {"micro_batch_size": 3} if form == "micro-batches" else {}
    opt = flatwise.SAM(base, RHO, model=ddp, sync_ascent=False, grad_scaler=scaler, **options)
    path, scales = [], []
    for index, batch in enumerate(batches(5)):
        own, calls = mine(rank, batch), 0

        def loss_fn(b: Any, bad: bool = rank == 0 and index == 2) -> Tensor:
            nonlocal calls
            calls += 1
            # Of micro-batches, the first gradient of the second one.
            at = 3 if form == "micro-batches" else 1
            return loss_of(ddp, (b[0].float(), b[1])) * (float("inf") if bad and calls == at else 1.0)

        if form in ("batch", "micro-batches"):
            opt.step(loss_fn, own)
        else:
            opt.zero_grad()
            with ddp.no_sync():
                scaler.scale(loss_fn(own)).backward()
            if form == "two calls":
                opt.first_step()
                scaler.scale(loss_fn(own)).backward()
                opt.second_step()
            else:
                if opt.perturb():
                    scaler.scale(loss_fn(own)).backward()
                    opt.restore()
                scaler.step(opt)
        scaler.update()
        path.append(weights(ddp))
        scales.append(scaler.get_scale())
    return {"path": path, "scales": scales}


@pytest.mark.parametrize(
    ("form", "wrapper"),
    [("batch", "unused"), ("micro-batches", "plain"), ("two calls", "plain"), ("framework", "plain")],
)
def test_an_infinity_in_one_ranks_first_gradient_is_no_step_on_any(form: str, wrapper: str, tmp_path: Path) -> None:
    one, two = on_ranks(overflow, tmp_path, form, wrapper)
    assert all(map(torch.equal, one["path"], two["path"]))
    assert one["scales"] == two["scales"] == [64.0, 64.0, 32.0, 32.0, 32.0]
    assert torch.equal(one["path"][1], one["path"][2])
    assert not torch.equal(one["path"][2], one["path"][3])


def listed(rank: int, static: bool, sync: Any) -> Tensor:
    ddp = DistributedDataParallel(Net(norm=False), static_graph=static)
    opt = flatwise.SAM(torch.optim.SGD(ddp.parameters(), lr=0.05), RHO, model=ddp, sync_ascent=sync)
    for batch in batches(3):
        x, y = mine(rank, batch)
        opt.step(halves(ddp, x, y))
    return weights(ddp)


@pytest.mark.parametrize("sync", [True, False])
def test_several_closures_under_a_static_graph(sync: bool, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    static = on_ranks(listed, tmp_path / "a", True, sync)
    assert torch.equal(*static)
    assert torch.allclose(static[0], on_ranks(listed, tmp_path / "b", False, sync)[0], rtol=0, atol=1e-12)

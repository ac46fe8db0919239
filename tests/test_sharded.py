"""Parameters cut over processes (FSDP2, HSDP, tensor parallelism): the same steps as where they are whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.start import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
]
STEPS = 6
NEEDS: dict[str, dict[str, Any]] = {
    "lp": {"p": 3.0},
    "late": {"total_steps": STEPS},
    "ae-sam": {"total_steps": STEPS},
    "m-sam": {"micro_batch_size": 3},
    "warmup-off": {"warmup_steps": 2},
}
REFUSED = {"second-order", "bsam"}
OWN_SAMPLES = {"m-sam", "quarter", "k-sam", "esam-sds"}
"""Methods that cut the batch: every process cuts its own, so no training in one process is the same."""
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "sum ball": ("lp", {"p": 1.0}),
    "max ball": ("lp", {"p": float("inf")}),
    "radius that sets itself": ("sam", {"rho": "auto"}),
    "filters of asam": ("asam", {"eta": 0.1}),
}
CASES = {name: (name, NEEDS.get(name, {})) for name in flatwise.list_variants() if name not in REFUSED} | EXTRA


class Net(nn.Module):
    """Rows that two and four processes cannot share evenly, and a bias of which one of four holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.norm(self.first(x))))
        return out.clone()  # not a view: fully_shard warns of them


def batches(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(12, 6, generator=generator).double(), torch.randint(3, (12,), generator=generator))
        for _ in range(steps)
    ]


def mine(batch: tuple[Tensor, Tensor], rank: int, world: int) -> tuple[Tensor, Tensor]:
    size = 12 // world
    return batch[0][rank * size : (rank + 1) * size], batch[1][rank * size : (rank + 1) * size]


def whole(model: nn.Module) -> Tensor:
    parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in parts])


def make(model: nn.Module, case: str, base: str = "sgd", **options: Any) -> Any:
    name, needs = CASES[case]
    params = model.parameters()
    inner = torch.optim.AdamW(params, lr=0.05) if base == "adamw" else torch.optim.SGD(params, lr=0.05, momentum=0.9)
    return flatwise.create(name, inner, model=model, **needs, **options)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor], reduction: str = "mean") -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)


def step(opt: Any, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    opt.step(lambda b: loss_of(model, b, "none" if opt.wants_sample_losses else "mean"), batch)


def cut(mesh: Any, model: nn.Module | None = None, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = Net() if model is None else model
    for part in model.children():
        fully_shard(part, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def mesh_of(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :])


def in_one_process(case: str, base: str) -> tuple[Tensor, list[tuple[float, float]]]:
    model = Net()
    opt, seen = make(model, case, base), []
    for batch in batches():
        step(opt, model, batch)
        seen.append((opt.last.gradient_norm, opt.last.perturbation_norm))
    return whole(model), seen


def every_method(rank: int, shape: tuple[int, ...], bases: tuple[str, ...]) -> dict[tuple[str, str], Any]:
    mesh, result = mesh_of(*shape), {}
    world = torch.distributed.get_world_size()
    for case in CASES:
        for base in bases:
            model = cut(mesh)
            opt, seen = make(model, case, base), []
            for batch in batches():
                step(opt, model, mine(batch, rank, world))
                seen.append((opt.last.gradient_norm, opt.last.perturbation_norm))
            result[case, base] = whole(model), seen
    return result


@pytest.mark.supports("FSDP2", "equal to hand-written SAM")
@pytest.mark.parametrize(
    ("shape", "bases"), [((2,), ("sgd", "adamw")), ((2, 1), ("sgd",)), ((1, 2), ("sgd",)), ((2, 2), ("adamw",))]
)
def test_every_method_steps_as_in_one_process(shape: tuple[int, ...], bases: tuple[str, ...], tmp_path: Path) -> None:
    world = shape[0] * (shape[1] if len(shape) > 1 else 1)
    results = on_ranks(every_method, tmp_path, shape, bases, world=world)
    for (case, base), (weights, seen) in results[0].items():
        assert all(torch.equal(weights, other[case, base][0]) for other in results), (case, "replicas are the same")
        assert weights.isfinite().all()
        if case in OWN_SAMPLES or (case == "random" and shape[-1] > 1):
            continue  # the parts of a tensor have noise of their own
        wanted, norms = in_one_process(case, base)
        assert torch.allclose(weights, wanted, rtol=0, atol=1e-12), (case, base, (weights - wanted).abs().max())
        assert torch.allclose(torch.tensor(seen), torch.tensor(norms), rtol=1e-12, equal_nan=True), (case, base)


def parts_have_their_own_noise(rank: int) -> list[Tensor]:
    model = cut(mesh_of(2, 2))
    opt = make(model, "random", rho=1.0)
    kept = {p: p.to_local().clone() for p in model.parameters()}
    moved: list[Tensor] = []

    def look(b: tuple[Tensor, Tensor]) -> Tensor:
        moved.extend((p.to_local() - kept[p]).div(kept[p].norm(dim=-1, keepdim=True)) for p in opt.param_groups[0]
                     ["params"] if p.dim() == 2)  # fmt: skip
        return loss_of(model, b)

    opt.step(look, mine(batches(1)[0], rank, 4))
    return moved


def test_noise_differs_between_parts_and_agrees_between_replicas(tmp_path: Path) -> None:
    results = on_ranks(parts_have_their_own_noise, tmp_path, world=4)
    for first, second in ((0, 2), (1, 3)):  # the mesh is [[0, 1], [2, 3]], rows are replicas
        assert all(torch.equal(a, b) for a, b in zip(results[first], results[second], strict=True))
    a, b = results[0][0], results[1][0]
    assert not torch.allclose(a[0, :2], b[0, :2])  # as far as draws of another size begin alike


def settings(rank: int) -> dict[str, Any]:
    """SAM under settings that leave gathered weights lying about, and with a policy of mixed precision."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

    mesh, result = mesh_of(2), {}
    for name in ("keep after backward", "keep after forward", "evaluated before", "two calls", "perturb", "closures"):
        model = cut(mesh, reshard_after_forward=name != "keep after forward")
        assert isinstance(model, FSDPModule)
        if name == "keep after backward":
            model.set_reshard_after_backward(False)
        case = "random" if name == "evaluated before" else "sam"
        options = {"noise_seed": 3} if case == "random" else {"max_grad_norm": 0.3}
        opt = make(model, case, **options)
        losses = []
        for batch in batches():
            own = mine(batch, rank, 2)

            def backward(part: Any, share: float = 1.0, model: nn.Module = model, seen: list[float] = losses) -> Tensor:
                loss = loss_of(model, part) * share
                loss.backward()
                seen.append(loss.item())
                return loss

            def closure(own: Any = own, opt: Any = opt, backward: Callable[..., Tensor] = backward) -> Tensor:
                opt.zero_grad()
                return backward(own)

            if name == "evaluated before":
                with torch.no_grad():
                    model(own[0])  # leaves the weights of the root gathered
            if name == "two calls":
                closure()
                opt.first_step()
                backward(own)
                opt.second_step()
            elif name == "perturb":
                closure()
                if opt.perturb():
                    backward(own)
                    opt.restore()
                opt.step()
            elif name == "closures":
                halves = [(own[0][i::2], own[1][i::2]) for i in (0, 1)]
                opt.step([lambda h=h, backward=backward: backward(h, 0.5) for h in halves])
            else:
                opt.step(closure)
        result[name] = whole(model), losses
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, by_hand = (cut(mesh, Net().float(), mp_policy=policy) for _ in range(2))
    opt = make(model, "sam", rho=0.5)
    base = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9)
    for batch in batches():
        own = mine(batch, rank, 2)
        opt.step(lambda b: F.cross_entropy(model(b[0].float()).float(), b[1]), own)
        hand_written(by_hand, base, own)
    result["policy"] = whole(model), whole(by_hand)
    return result


def hand_written(model: nn.Module, base: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], rho: float = 0.5) -> None:
    """One step of SAM on the parts that are here."""
    params = list(model.parameters())

    def backward() -> None:
        base.zero_grad()
        F.cross_entropy(model(batch[0].float()).float(), batch[1]).backward()

    backward()
    local = [p.to_local() for p in params]
    grads = [p.grad.to_local() for p in params]
    squares = sum(g.double().square().sum() for g in grads)
    torch.distributed.all_reduce(squares)
    kept = [w.clone() for w in local]
    norm = squares.sqrt().float()  # as a float32 norm, so that the quotient is the same number
    with torch.no_grad():
        for w, g in zip(local, grads, strict=True):
            w.add_(g, alpha=rho * (1 / float(norm)))
    backward()
    with torch.no_grad():
        for w, k in zip(local, kept, strict=True):
            w.copy_(k)
    base.step()


@pytest.mark.supports("FSDP2", "gradient accumulation")
@pytest.mark.supports("FSDP2", "clipping of the last gradient")
@pytest.mark.supports("FSDP2", "mixed precision policy")
def test_settings_of_fully_shard_and_forms_of_call(tmp_path: Path) -> None:
    one, two = on_ranks(settings, tmp_path)
    model = Net()
    opt = make(model, "sam", max_grad_norm=0.3)
    for batch in batches():
        step(opt, model, batch)
    for name, (weights, losses) in one.items():
        assert torch.equal(weights, two[name][0]), name
        if name == "policy":
            assert torch.allclose(weights, losses, rtol=0, atol=1e-6)
            continue
        if name == "evaluated before":
            continue
        assert torch.allclose(weights, whole(model), rtol=0, atol=1e-12), name
        half = len(losses) // STEPS // 2
        assert losses[:half] != losses[half : 2 * half], "the second pass sees other weights"


def stale_root(rank: int) -> tuple[Tensor, Tensor]:
    """An evaluation before a step of one pass must not hide the perturbation from it."""
    weights = []
    for evaluate in (False, True):
        model = cut(mesh_of(2), reshard_after_forward=False)
        opt = make(model, "random", rho=1.0)
        for batch in batches(3):
            own = mine(batch, rank, 2)
            if evaluate:
                with torch.no_grad():
                    model(own[0])
            step(opt, model, own)
        weights.append(whole(model))
    return weights[0], weights[1]


def test_an_evaluation_before_the_step_changes_nothing(tmp_path: Path) -> None:
    for plain, evaluated in on_ranks(stale_root, tmp_path):
        assert torch.equal(plain, evaluated)


def bad_rank(rank: int, which: int, scaled: bool) -> dict[str, Any]:
    model = cut(mesh_of(2), Net().float())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
    opt = make(model, "sam", grad_scaler=scaler if scaled else None)
    calls, path, scales = 0, [], []

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        loss = loss_of(model, (batch[0].float(), batch[1]))
        return loss * float("nan") if rank == 1 and calls == 4 + which else loss

    for batch in batches(4):
        opt.step(loss_fn, mine(batch, rank, 2))
        scaler.update()
        path.append(whole(model))
        scales.append(scaler.get_scale() if scaled else 1.0)
    return {"path": path, "scales": scales}


@pytest.mark.supports("FSDP2", "a NaN on one process only")
@pytest.mark.supports("FSDP2", "fp16 overflow in either pass")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("which", [1, 2])
def test_a_nan_of_one_process_is_no_step_on_any(which: int, scaled: bool, tmp_path: Path) -> None:
    one, two = on_ranks(bad_rank, tmp_path, which, scaled)
    assert all(map(torch.equal, one["path"], two["path"]))
    assert torch.equal(one["path"][1], one["path"][2])
    assert not torch.equal(one["path"][2], one["path"][3])
    assert one["scales"] == two["scales"] == ([64.0, 64.0, 32.0, 32.0] if scaled else [1.0] * 4)


def infinity_on_one_part(rank: int) -> list[Any]:
    """The gradient of one part is infinite: only the process that holds it can see that."""
    model = cut(mesh_of(2))
    opt = make(model, "sam")
    before, seen = whole(model), []
    for which in (1, 2):
        calls = 0

        def closure(which: int = which) -> Tensor:
            nonlocal calls
            calls += 1
            opt.zero_grad()
            loss = loss_of(model, mine(batches(1)[0], rank, 2))
            loss.backward()
            if calls == which and rank == 1:
                model.first.weight.grad.to_local()[0, 0] = float("inf")
            return loss

        opt.step(closure)
        seen += [torch.equal(whole(model), before), opt.last.reason]
    return seen


def test_an_infinity_in_one_part_is_seen_by_all(tmp_path: Path) -> None:
    for seen in on_ranks(infinity_on_one_part, tmp_path):
        assert seen[2:] == [True, "non-finite update"]
        # The first gradient was bad: nobody looked around, and the gradient was kept from the base.
        assert seen[:2] == [True, "non-finite update"]


OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10)


def counts(rank: int) -> dict[str, dict[str, int]]:
    from torch.distributed.tensor.debug import CommDebugMode

    result = {}
    for name in ("plain", "sam", "clipped", "msam", "gsam", "layerwise"):
        model, own = cut(mesh_of(2)), mine(batches(1)[0], rank, 2)
        if name == "plain":
            base = torch.optim.SGD(model.parameters(), lr=0.05)

            def run(model: nn.Module = model, own: Any = own, base: Any = base) -> None:
                base.zero_grad()
                loss_of(model, own).backward()
                base.step()
        else:
            opt = make(model, "sam", max_grad_norm=1.0) if name == "clipped" else make(model, name)

            def run(model: nn.Module = model, own: Any = own, opt: Any = opt) -> None:
                step(opt, model, own)

        run()
        with CommDebugMode() as mode:
            run()
        result[name] = {str(k).split(".")[1].strip("_"): v for k, v in mode.get_comm_counts().items()}
    return result


@pytest.mark.supports("FSDP2", "collectives counted")
@pytest.mark.skipif(OLD, reason="CommDebugMode of torch 2.9 cannot follow two forward passes")
def test_collectives_of_a_step_are_counted(tmp_path: Path) -> None:
    """A second pass costs what a pass costs; beyond that, single numbers are reduced."""
    found, _ = on_ranks(counts, tmp_path)
    plain = found["plain"]
    gathers, scatters = plain["allgather_base"], plain["reduce_scatter_base"]
    passes = {"sam": 2, "clipped": 2, "gsam": 2, "layerwise": 2, "msam": 1}
    # The norm, and the verdict on the last gradient; the norm to clip by; two inner products; a norm for each tensor.
    numbers = {"sam": 2, "clipped": 3, "msam": 2, "gsam": 4, "layerwise": 2 + 6}
    for name, times in passes.items():
        assert found[name]["allgather_base"] == times * gathers, name
        assert found[name]["reduce_scatter_base"] == times * scatters, name
        assert found[name]["allreduce"] == numbers[name], name


def tensor_parallel(rank: int, shape: tuple[int, ...]) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    names = ("shard", "tensor")[-len(shape) :]
    mesh, result = torch.distributed.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names), {}
    data = mesh["shard"].get_local_rank() if len(shape) > 1 else 0
    for case in ("sam", "asam", "layerwise", "gsam", "vasso", "msam", "sum ball", "max ball", "multi-step", "ae-sam"):
        model = Net8()
        parallelize_module(model, mesh["tensor"], {"first": ColwiseParallel(), "last": RowwiseParallel()})
        if len(shape) > 1:
            cut(mesh["shard"], model)
        opt = make(model, case, "adamw")
        for batch in batches():
            step(opt, model, mine(batch, data, shape[0] if len(shape) > 1 else 1))
        result[case] = whole(model)
    texts = []
    for name in ("filterwise", "random"):
        model = Net8()
        parallelize_module(model, mesh["tensor"], {"first": ColwiseParallel(), "last": RowwiseParallel()})
        try:
            make(model, name)
        except ValueError as error:
            texts.append(str(error))
    result["refused"] = texts
    return result


class Net8(Net):
    """Sizes that a tensor-parallel plan can cut, and a norm that every process holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first, self.last = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(self.norm(x))))
        return out.clone()


@pytest.mark.supports("tensor parallel", "equal to hand-written SAM")
@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_tensor_parallel_steps_as_in_one_process(shape: tuple[int, ...], tmp_path: Path) -> None:
    results = on_ranks(tensor_parallel, tmp_path, shape, world=2 if len(shape) == 1 else 4)
    for case, weights in results[0].items():
        if case == "refused":
            assert len(weights) == 2
            assert all("shard along dimension 0" in text for text in weights)
            continue
        model = Net8()
        opt = make(model, case, "adamw")
        for batch in batches():
            step(opt, model, batch)
        assert all(torch.equal(weights, other[case]) for other in results), case
        assert torch.allclose(weights, whole(model), rtol=0, atol=1e-11), (case, (weights - whole(model)).abs().max())


def checkpoint(rank: int, folder: str) -> dict[str, bool]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    mesh, result = mesh_of(2), {}
    for flat in (False, True):
        for case in ("sam", "vasso", "stale", "looksam", "ae-sam"):
            if flat and case in ("vasso", "stale", "looksam"):
                continue  # a flat one holds only entries that the base has: docs/distributed.md
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            path, data = f"{folder}/{case}-{flat}", [mine(b, rank, 2) for b in batches()]
            model = cut(mesh)
            opt = make(model, case, "adamw", rho=0.3)
            for batch in data[:3]:
                step(opt, model, batch)
            weights, state = get_state_dict(model, opt, options=options)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
            for batch in data[3:]:
                step(opt, model, batch)
            again = cut(mesh)
            resumed = make(again, case, "adamw", rho=0.1)
            with torch.no_grad():
                for p in again.parameters():
                    p.zero_()
            weights, state = get_state_dict(again, resumed, options=options)
            saved = {"model": weights, "optimizer": state}
            dcp.load(saved, checkpoint_id=path)
            set_state_dict(
                again, resumed, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
            )
            for batch in data[3:]:
                step(resumed, again, batch)
            result[f"{case} {'flat' if flat else 'nested'}"] = torch.equal(whole(model), whole(again))
    return result


@pytest.mark.supports("FSDP2", "resume, bit for bit")
@pytest.mark.supports("FSDP2", "distributed checkpoint")
def test_distributed_checkpoints_resume_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    for result in on_ranks(checkpoint, tmp_path / "ranks", str(tmp_path)):
        assert all(result.values()), result


def mistakes(rank: int) -> list[str]:
    from torch.distributed.fsdp import fully_shard

    mesh, texts = mesh_of(2), []

    def note(run: Callable[[], object]) -> None:
        try:
            run()
            texts.append("nothing")
        except (RuntimeError, ValueError) as error:
            texts.append(str(error))

    model = cut(mesh)
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    note(lambda: flatwise.create("second-order", base, model=model))
    note(lambda: flatwise.SAM(base, model=model, sync_ascent=False))
    note(lambda: flatwise.create("sam", base, rounding="stochastic"))
    note(lambda: flatwise.create("bsam", base, train_size=10))
    early = Net()
    opt = make(early, "sam")
    fully_shard(early, mesh=mesh)
    note(lambda: step(opt, early, mine(batches(1)[0], rank, 2)))
    opt = make(model, "sam")

    def stale() -> Tensor:
        loss = loss_of(model, mine(batches(1)[0], rank, 2))
        loss.backward()
        return loss

    opt.step(stale)
    note(lambda: opt.step(stale))
    return texts


def test_mistakes_are_named(tmp_path: Path) -> None:
    wanted = ["second_order=True", "sync_ascent must be True", "rounding='stochastic'", "whole parameters"]
    wanted += ["make the optimizer after it", "did not clear the gradients"]
    for texts in on_ranks(mistakes, tmp_path):
        assert all(part in text for part, text in zip(wanted, texts, strict=True)), texts


def without_a_radius(rank: int) -> list[Tensor]:
    mesh, results = mesh_of(2), []
    for wrapped in (True, False):
        model = cut(mesh)
        base = torch.optim.AdamW(model.parameters(), lr=0.05)
        opt = flatwise.SAM(base, 0.0) if wrapped else None
        for batch in batches():
            own = mine(batch, rank, 2)
            if opt is not None:
                step(opt, model, own)
                continue
            base.zero_grad()
            loss_of(model, own).backward()
            base.step()
        results.append(whole(model))
    return results


@pytest.mark.supports("FSDP2", "rho = 0 is the plain run, bit for bit")
def test_radius_zero_is_the_plain_run(tmp_path: Path) -> None:
    for wrapped, plain in on_ranks(without_a_radius, tmp_path):
        assert torch.equal(wrapped, plain)


def scheduled(rank: int) -> list[Any]:
    model = cut(mesh_of(2))
    base = torch.optim.AdamW(model.parameters(), lr=0.05)
    opt = flatwise.SAM(base, 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    rates = []
    for batch in batches(3):
        step(opt, model, mine(batch, rank, 2))
        schedule.step()
        rates.append(base.param_groups[0]["lr"])
    return [rates, all(a is b for a, b in zip(opt.param_groups, base.param_groups, strict=True))]


def test_a_scheduler_reaches_the_base(tmp_path: Path) -> None:
    for rates, same in on_ranks(scheduled, tmp_path):
        assert rates == [0.025, 0.0125, 0.00625]
        assert same


def replicated_noise(rank: int) -> list[Tensor]:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    parallelize_module(model, mesh_of(2), {"0": ColwiseParallel(output_layouts=None, use_local_output=True)})
    gather = torch.distributed.nn.functional.all_gather

    def forward(x: Tensor) -> Tensor:
        return model[2](torch.tanh(torch.cat(list(gather(model[0](x))), dim=-1)))

    params = list(model.parameters())
    opt = flatwise.create("random", torch.optim.SGD(params, lr=0.05), rho=1.0, filter_scaled=False)
    moved: list[Tensor] = []
    kept = [p.detach().clone() for p in model[2].parameters()]

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        moved.extend(p.detach() - k for p, k in zip(model[2].parameters(), kept, strict=True))
        return F.cross_entropy(forward(batch[0]), batch[1])

    opt.step(loss_fn, batches(1)[0])
    return moved


def test_replicas_beside_parts_have_one_noise(tmp_path: Path) -> None:
    one, two = on_ranks(replicated_noise, tmp_path)
    assert all(map(torch.equal, one, two))
    assert all(noise.any() for noise in one)

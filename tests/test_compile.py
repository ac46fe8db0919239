"""torch.compile: nothing is compiled that plain training would not compile, nothing twice, and addresses stay."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import flatwise
from flatwise.eager import REASON
from flatwise.lab.methods import Method, wrap

# dynamo looks at .grad of what flows between two compiled regions, in plain training too.
# And a guard of an optimizer that another test left behind may still be looking for its modules.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using .torch.compile.module.. when there are global hooks:UserWarning"),
]
STEPS, WARM = 6, 2
X = torch.randn(STEPS, 12, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3

BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")],
    ),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Two blocks with batch statistics, to compile whole or block by block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


Loss = Callable[[Tensor], Tensor]


def whole(model: Net, backend: Any) -> Loss:
    compiled = torch.compile(model, backend=backend)
    return lambda x: F.cross_entropy(compiled(x), Y)


def in_place(model: Net, backend: Any) -> Loss:
    model.compile(backend=backend)
    return lambda x: F.cross_entropy(model(x), Y)


def function(model: Net, backend: Any) -> Loss:
    return torch.compile(lambda x: F.cross_entropy(model(x), Y), backend=backend)


def regional(model: Net, backend: Any) -> Loss:
    for block in model.blocks:
        block.compile(backend=backend)
    return lambda x: F.cross_entropy(model(x), Y)


def eager(model: Net, backend: Any) -> Loss:
    return lambda x: F.cross_entropy(model(x), Y)


COMPILED = {f.__name__: f for f in (whole, in_place, function, regional)}


def by_closure(opt: Any, loss_of: Loss, x: Tensor) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(x)
        loss.backward()
        return loss

    opt.step(closure)


def by_batch(opt: Any, loss_of: Loss, x: Tensor) -> None:
    opt.step(loss_of, x)


def by_two_calls(opt: Any, loss_of: Loss, x: Tensor) -> None:
    opt.zero_grad()
    loss_of(x).backward()
    opt.first_step(zero_grad=True)
    loss_of(x).backward()
    opt.second_step(zero_grad=True)


def by_framework(opt: Any, loss_of: Loss, x: Tensor) -> None:
    opt.zero_grad()
    loss_of(x).backward()
    if opt.perturb():
        loss_of(x).backward()
        opt.restore()
    opt.step()


def plainly(opt: Any, loss_of: Loss, x: Tensor) -> None:
    opt.zero_grad()
    loss_of(x).backward()
    opt.step()


FORMS = {f.__name__: f for f in (by_closure, by_batch, by_two_calls, by_framework)}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def sam(model: nn.Module, given: bool = True) -> flatwise.SAM:
    return flatwise.SAM(sgd(model), rho=lambda step: 0.1 + 0.02 * step, model=model if given else None)


def train(opt: Any, form: Callable[..., None], loss_of: Loss) -> None:
    """Radius and learning rate change in every step; after the first ones nothing may compile again."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    for step in range(STEPS):
        with torch.compiler.set_stance("default" if step < WARM else "fail_on_recompile"):
            form(opt, loss_of, X[step])
        schedule.step()


def state(model: nn.Module, opt: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers(), *(s["momentum_buffer"] for s in opt.state.values())]


@pytest.mark.supports("torch.compile", "no recompiles")
@pytest.mark.supports("torch.compile", "equal to the run without it")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_model_trains_as_it_does_without(form: str, compiled: str, backend: str) -> None:
    model, twin, plain = Net(), Net(), Net()
    counter, fewest = CompileCounterWithBackend(backend), CompileCounterWithBackend(backend)
    opt, other = sam(model), sam(twin)
    loss_of = COMPILED[compiled](model, counter)
    train(opt, FORMS[form], loss_of)
    train(other, FORMS[form], eager(twin, None))
    torch.testing.assert_close(state(model, opt), state(twin, other))
    assert [block[1].num_batches_tracked.item() for block in model.blocks] == [STEPS] * 2
    assert opt.last.active
    torch._dynamo.reset()
    train(sgd(plain), plainly, COMPILED[compiled](plain, fewest))
    if not fewest.frame_count:
        pytest.skip("this torch does not compile a Sequential by itself")
    # Where the first pass is the user's own, a hook notes the random state, which breaks a function in two.
    breaks = compiled == "function" and form in ("by_two_calls", "by_framework")
    assert 0 < counter.frame_count == fewest.frame_count + breaks, "as many graphs as plain training"
    assert counter.op_count == fewest.op_count


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # torch, of the hook that is gone after a step
@pytest.mark.parametrize("compiled", COMPILED)
def test_without_the_model_each_graph_is_compiled_at_most_twice(compiled: str) -> None:
    model, twin, plain = Net(), Net(), Net()
    counter, fewest = CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")
    opt, other = sam(model, given=False), sam(twin)
    train(opt, by_closure, COMPILED[compiled](model, counter))
    train(other, by_closure, eager(twin, None))
    torch.testing.assert_close(state(model, opt), state(twin, other))
    torch._dynamo.reset()
    train(sgd(plain), plainly, COMPILED[compiled](plain, fewest))
    assert counter.frame_count <= 2 * fewest.frame_count


# Around the step


@pytest.mark.parametrize("form", FORMS)
def test_compiling_around_a_step_leaves_the_step_as_it_is(form: str) -> None:
    model, twin = Net(), Net()
    counter = CompileCounterWithBackend("eager")
    opt, other = sam(model), sam(twin)
    loss_of = eager(model, None)

    @torch.compile(backend=counter)  # type: ignore[untyped-decorator]
    def take(x: Tensor) -> None:
        FORMS[form](opt, loss_of, x)

    for step in range(STEPS):
        with torch.compiler.set_stance("default" if step < WARM else "fail_on_recompile"):
            take(X[step])
        FORMS[form](other, eager(twin, None), X[step])
    torch.testing.assert_close(state(model, opt), state(twin, other))
    passes = 0 if form in ("by_closure", "by_batch") else 3  # the first in two parts
    assert counter.frame_count <= passes, "nothing but the passes outside the step"


def test_a_compiled_step_method_is_the_method() -> None:
    model, twin = Net(), Net()
    counter = CompileCounterWithBackend("eager")
    opt, other = sam(model), sam(twin)
    step = torch.compile(opt.step, backend=counter)
    for x in X:
        step(eager(model, None), x)
        other.step(eager(twin, None), x)
    assert all(map(torch.equal, state(model, opt), state(twin, other)))
    assert counter.frame_count == 0


@pytest.mark.supports("torch.compile", "misuse is refused by name")
@pytest.mark.parametrize("form", FORMS)
def test_a_step_in_one_graph_is_refused_with_the_right_call(form: str) -> None:
    model = Net()
    opt = sam(model)
    held = [p.detach().clone() for p in model.parameters()]
    take = torch.compile(lambda x: FORMS[form](opt, eager(model, None), x), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported) as raised:
        take(X[0])
    if form in ("by_closure", "by_batch"):  # in the others torch's own backward() or zero_grad() is met first
        assert REASON in str(raised.value)
    assert all(map(torch.equal, held, model.parameters()))


def test_a_compiled_model_inside_a_compiled_step_is_still_compiled() -> None:
    model = Net()
    counter = CompileCounterWithBackend("eager")
    opt, loss_of = sam(model), whole(model, counter)
    step = torch.compile(opt.step, backend="eager")
    for x in X:
        step(loss_of, x)
    assert counter.frame_count == 1


FIRST_CALL = """
import sys, torch, flatwise
assert "torch._dynamo" not in sys.modules, "importing flatwise imports the compiler"
model = torch.nn.Linear(2, 1)
opt = flatwise.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
try:
    torch.compile(opt.step, fullgraph=True, backend="eager")(lambda x: model(x).mean(), torch.ones(1, 2))
except torch._dynamo.exc.Unsupported as error:
    assert "Compile what the closure calls" in str(error), error
else:
    raise AssertionError("it was compiled")
"""


def test_the_compiler_is_imported_late_and_in_time_for_the_first_call() -> None:
    subprocess.run([sys.executable, "-c", FIRST_CALL], check=True, timeout=600)


# Addresses: what a CUDA graph has recorded must be there in the next step


@pytest.mark.supports("torch.compile", "addresses stay")
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", flatwise.list_variants())
def test_weights_buffers_and_state_keep_their_addresses(name: str, base: str) -> None:
    model = Net()
    made = sgd(model) if base == "sgd" else torch.optim.AdamW(model.parameters(), lr=0.01)
    opt = wrap(Method(name, name, {}), made, STEPS, model=model, train_size=12, batch_size=12)
    if name == "bsam" and base == "adamw":
        pytest.skip("bSAM is an optimizer of its own")

    def loss_of(x: Tensor) -> Tensor:
        reduction = "none" if getattr(opt, "wants_sample_losses", False) else "mean"
        return F.cross_entropy(model(x), Y[: len(x)], reduction=reduction)

    def addresses() -> list[int]:
        moments = [v for entry in opt.state.values() for v in entry.values() if isinstance(v, Tensor)]
        return [t.data_ptr() for t in (*model.parameters(), *model.buffers(), *moments)]

    seen: list[list[int]] = []
    for x in X:
        opt.step(lambda batch: loss_of(batch), x)
        seen.append(addresses())
    assert all(now == seen[0] for now in seen)

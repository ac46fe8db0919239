"""A step leaves the buffers and the random state of one plain pass."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from tests.core_cases import X, Y, assert_same, batch, closure_of, same, sgd, with_batchnorm, with_dropout
from torch import nn
from torch.nn import functional as F

from flatwise import SAM


class CustomNorm(nn.Module):
    """A normalisation of somebody's own: functional, with buffers under other names."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("spread", torch.ones(8))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return F.batch_norm(x, self.average, self.spread, self.scale, None, self.training, 0.1)


class Counter(nn.Module):
    """Buffers that are changed in place, re-bound, and large."""

    def __init__(self):
        super().__init__()
        self.register_buffer("in_place", torch.zeros(8))
        self.register_buffer("rebound", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("large", torch.zeros(400_000))
        self.register_buffer("large_rebound", torch.zeros(400_000))
        self.register_buffer("untouched", torch.arange(400_000.0))
        self.register_buffer("absent", None)
        self.register_buffer("hidden", torch.zeros(8), persistent=False)

    def forward(self, x):
        seen = x.detach().mean(0)
        self.in_place.mul_(0.9).add_(seen)
        self.rebound = 0.9 * self.rebound + seen
        self.calls += 1
        self.large[:8] += seen
        self.large_rebound = self.large_rebound + 1
        self.hidden.add_(seen)
        return x + 0.1 * self.in_place


def sequential(middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), middle, nn.ReLU(), nn.Linear(8, 3))


MODELS = {
    "batchnorm": with_batchnorm,
    "dropout": with_dropout,
    "cumulative": lambda: sequential(nn.BatchNorm1d(8, momentum=None)),
    "untracked": lambda: sequential(nn.BatchNorm1d(8, track_running_stats=False)),
    "custom": lambda: sequential(CustomNorm()),
    "counter": lambda: sequential(Counter()),
    "spectral": lambda: sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))),
}


def buffers(module):
    return {name: b.detach().clone() for name, b in module.named_buffers()}


def one_plain_pass(model, x, y, random):
    """Buffers, random state and loss that one forward pass at the same weights leaves."""
    twin = copy.deepcopy(model)
    before = torch.get_rng_state()
    torch.set_rng_state(random)
    loss = F.cross_entropy(twin(x), y).detach()
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    return buffers(twin), after, loss


def step_in(form, opt, model, x, y):
    if form == "closure":
        return opt.step(closure_of(model, opt, x, y))
    if form == "loss_fn":
        return opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (x, y))
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    if form == "two calls":
        opt.first_step(zero_grad=True)
        F.cross_entropy(model(x), y).backward()
        opt.second_step(zero_grad=True)
    elif form == "with":
        with opt.perturbed():
            F.cross_entropy(model(x), y).backward()
        opt.base_optimizer.step()
    else:
        opt.perturb()
        F.cross_entropy(model(x), y).backward()
        opt.restore()
        opt.step()
    return None


FORMS = ["closure", "loss_fn", "two calls", "with", "perturb"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MODELS)
def test_buffers_and_random_state_are_those_of_one_pass(kind, form):
    model = MODELS[kind]()
    opt = SAM(sgd(model), rho=0.5)
    for step in range(3):
        x, y = batch(step)
        expected, random, loss = one_plain_pass(model, x, y, torch.get_rng_state())
        got = step_in(form, opt, model, x, y)
        assert_same(buffers(model), expected)
        assert_same(torch.get_rng_state(), random)
        if got is not None:
            assert_same(got, loss)
        assert opt.last.active


@pytest.mark.parametrize("options", [{"ascent_steps": 3}, {"second_order": True}, {"adaptive": True}], ids=str)
@pytest.mark.parametrize("kind", ["batchnorm", "dropout", "counter"])
def test_more_passes_leave_no_more(kind, options):
    model = MODELS[kind]()
    opt = SAM(sgd(model), rho=0.5, **options)
    for step in range(3):
        x, y = batch(step)
        expected, random, _ = one_plain_pass(model, x, y, torch.get_rng_state())
        opt.step(closure_of(model, opt, x, y))
        assert_same(buffers(model), expected)
        assert_same(torch.get_rng_state(), random)


def test_micro_batches_leave_what_their_plain_passes_leave():
    model = with_dropout()
    opt = SAM(sgd(model), rho=0.5, micro_batch_size=6)
    twin = copy.deepcopy(model)
    random = torch.get_rng_state()
    for part in X.split(6):
        twin(part)
    after = torch.get_rng_state()
    torch.set_rng_state(random)
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (X, Y))
    assert_same(buffers(model), buffers(twin))
    assert_same(torch.get_rng_state(), after)


@pytest.mark.parametrize("run", [1, 2])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["batchnorm", "custom", "counter"])
def test_a_broken_step_leaves_what_one_pass_leaves(kind, error, run):
    model = MODELS[kind]()
    opt = SAM(sgd(model), rho=0.5)
    opt.step(closure_of(model, opt))
    expected, _, _ = one_plain_pass(model, X, Y, torch.get_rng_state())
    calls = []

    def closure():
        calls.append(1)
        loss = closure_of(model, opt)()
        if len(calls) == run:
            raise error
        return loss

    with pytest.raises(error):
        opt.step(closure)
    assert_same(buffers(model), expected)


def test_evaluation_mode_is_not_touched():
    model = with_batchnorm()
    opt = SAM(sgd(model), rho=0.5)
    opt.step(closure_of(model, opt))
    model.eval()
    before = buffers(model)
    versions = [b._version for b in model.buffers()]
    opt.step(closure_of(model, opt))
    assert opt.last.active
    assert_same(buffers(model), before)
    assert [b._version for b in model.buffers()] == versions
    model.train()
    expected, _, _ = one_plain_pass(model, X, Y, torch.get_rng_state())
    opt.step(closure_of(model, opt))
    assert_same(buffers(model), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [False, True])
def test_a_frozen_backbone_outside_the_optimizer(form, given):
    backbone = with_batchnorm().requires_grad_(False)
    head = nn.Linear(3, 3)
    both = nn.ModuleList([backbone, head])
    opt = SAM(torch.optim.SGD(head.parameters(), lr=0.1), rho=0.5, model=both if given else None)

    def model(x):
        return head(backbone(x))

    for step in range(3):
        x, y = batch(step)
        expected, _, _ = one_plain_pass(backbone, x, torch.zeros(16, dtype=torch.long), torch.get_rng_state())
        step_in(form, opt, model, x, y)
        assert_same(buffers(backbone), expected)
        assert opt.last.active


def test_a_model_that_is_given_is_guarded_where_watching_cannot_see_it():
    model = with_batchnorm()
    forward = type(model).forward  # no hook fires for a plain function
    opt = SAM(sgd(model), rho=0.5, model=model)
    for _ in range(2):
        twin = copy.deepcopy(model)
        forward(twin, X)
        opt.step(lambda b: F.cross_entropy(forward(model, b[0]), b[1]), (X, Y))
        assert_same(buffers(model), buffers(twin))


def check_compiled(backend, form, given):
    torch._dynamo.reset()
    model = with_batchnorm()
    compiled = torch.compile(model, backend=backend)
    eager = copy.deepcopy(model)
    opt = SAM(sgd(model), rho=0.5, model=model if given else None)
    twin = SAM(sgd(eager), rho=0.5, model=eager if given else None)
    for step in range(3):
        x, y = batch(step)
        expected, _, _ = one_plain_pass(eager, x, y, torch.get_rng_state())
        step_in(form, opt, compiled, x, y)
        step_in(form, twin, eager, x, y)
        torch.testing.assert_close(buffers(model), expected)
        assert model[1].num_batches_tracked == step + 1
    torch.testing.assert_close(list(model.parameters()), list(eager.parameters()))


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # torch, of the hook that is gone after a step
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend, form):
    check_compiled(backend, form, given=False)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_models_that_are_given_cause_no_warning(form):
    gc.collect()  # optimizers of other tests that never took a step
    check_compiled("eager", form, given=True)


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
@pytest.mark.parametrize("given", [False, True])
def test_a_compiled_step_is_not_compiled_again(given):
    torch._dynamo.reset()
    model = with_batchnorm()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    opt = SAM(sgd(model), rho=lambda step: 0.1 + 0.1 * step, model=model if given else None)
    opt.step(closure_of(compiled, opt))
    warm = len(graphs)
    for _ in range(4):
        opt.step(closure_of(compiled, opt))
    assert len(graphs) == warm <= 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fresh", [False, True])
def test_dropout_masks(form, fresh):
    model = with_dropout()
    masks = []
    model[2].register_forward_hook(lambda module, args, out: masks.append((out != 0) | (args[0] == 0)))
    opt = SAM(sgd(model), rho=1e-6, fresh_masks=fresh)
    for step in range(3):
        masks.clear()
        x, y = batch(step)
        _, random, _ = one_plain_pass(model, x, y, torch.get_rng_state())
        masks.clear()
        step_in(form, opt, model, x, y)
        first, second = masks
        assert same(first, second) is not fresh
        assert_same(torch.get_rng_state(), random)


def test_other_random_numbers_in_the_closure_are_repeated():
    model = with_batchnorm()
    opt = SAM(sgd(model), rho=0.3)
    noise = []

    def closure():
        opt.zero_grad()
        noise.append(torch.randn(16, 6))
        loss = F.cross_entropy(model(X + noise[-1]), Y)
        loss.backward()
        return loss

    opt.step(closure)
    opt.step(closure)
    assert same(noise[0], noise[1])
    assert same(noise[2], noise[3])
    assert not same(noise[1], noise[2])


@pytest.mark.parametrize("evaluation", ["no_grad", "grad"])
def test_masks_are_the_same_after_an_evaluation_between_steps(evaluation):
    model = with_dropout()
    masks = []
    model[2].register_forward_hook(lambda module, args, out: masks.append((out != 0) | (args[0] == 0)))
    opt = SAM(sgd(model), rho=1e-6)
    for step in range(3):
        x, y = batch(step)
        with torch.set_grad_enabled(evaluation == "grad"):
            model(x)
        torch.rand(3)
        masks.clear()
        step_in("two calls", opt, model, x, y)
        assert same(*masks)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_model_that_was_trained_can_be_copied(copier):
    model = with_batchnorm()
    opt = SAM(sgd(model), rho=0.5)
    step_in("two calls", opt, model, X, Y)
    step_in("two calls", opt, model, X, Y)
    twin = copier(model)
    assert_same(twin.state_dict(), model.state_dict())
    other = SAM(sgd(twin), rho=0.5)
    for _ in range(2):
        expected, _, _ = one_plain_pass(twin, X, Y, torch.get_rng_state())
        before = buffers(model)
        step_in("two calls", other, twin, X, Y)
        assert_same(buffers(twin), expected)
        assert_same(buffers(model), before)


def test_modules_of_a_later_group_are_guarded():
    first, second = nn.Linear(6, 6), with_batchnorm()
    opt = SAM(torch.optim.SGD(first.parameters(), lr=0.1), rho=0.5)
    opt.step(closure_of(first, opt, X, Y))
    opt.add_param_group({"params": list(second.parameters())})

    def model(x):
        return second(first(x))

    for _ in range(2):
        _, random, _ = one_plain_pass(first, X, Y, torch.get_rng_state())
        expected, _, _ = one_plain_pass(second, first(X), Y, random)
        opt.step(closure_of(model, opt))
        assert_same(buffers(second), expected)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_keeps_listening_to_all_modules(form):
    from torch.nn.modules.module import _global_forward_pre_hooks as hooks

    before = len(hooks)
    model = with_batchnorm()
    opt = SAM(sgd(model), rho=0.5)
    step_in(form, opt, model, X, Y)
    assert len(hooks) <= before
    assert opt.last.active

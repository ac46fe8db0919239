"""Every row of the registry: saved, loaded, copied, under a scheduler and in other precisions, it goes on the same."""

import copy
import io
import pickle

import pytest
import torch
from tests.core_cases import assert_same, batch, snapshot, with_dropout
from tests.family_cases import BASES, NAMES, NAMES_AND_BASES, STEPS, WRAPPED, make, train
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn import functional as F
from torch.optim import lr_scheduler

from flatwise import variant_info

LR = 0.1


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.supports("plain loop", "resume, bit for bit")
@pytest.mark.parametrize(("name", "base"), NAMES_AND_BASES)
def test_resuming_equals_never_having_stopped(name, base):
    straight = with_dropout()
    opt = make(name, straight, base)
    torch.manual_seed(7)
    expected = train(name, straight, opt, range(STEPS), lr=LR)

    first = with_dropout()
    first_opt = make(name, first, base)
    torch.manual_seed(7)
    seen = train(name, first, first_opt, range(7), lr=LR)
    saved = through_a_file({"model": first.state_dict(), "opt": first_opt.state_dict(), "rng": torch.get_rng_state()})
    second = with_dropout(seed=99)
    second_opt = make(name, second, base)
    second.load_state_dict(saved["model"])
    second_opt.load_state_dict(saved["opt"])
    torch.set_rng_state(saved["rng"])
    seen += train(name, second, second_opt, range(7, STEPS), lr=LR)
    assert_same(seen, expected)
    assert_same(snapshot(second), snapshot(straight))
    assert_same(second_opt.state_dict(), opt.state_dict())
    assert second_opt.last.step == STEPS - 1


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_with_its_model_goes_on_the_same(name, way):
    model = with_dropout()
    opt = make(name, model)
    train(name, model, opt, range(7), lr=LR)
    pair = (model, opt)
    twin, twin_opt = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    if variant_info(name).descent.needs_output:  # it looks at the module itself, which an optimizer does not copy
        with pytest.raises(RuntimeError, match=r"make the optimizer anew with model=model, and load_state_dict\(\)"):
            train(name, twin, twin_opt, [7])
        state = twin_opt.state_dict()
        twin_opt = make(name, twin)
        twin_opt.load_state_dict(state)
    torch.manual_seed(8)
    expected = train(name, model, opt, range(7, STEPS), lr=LR)
    before = snapshot(model)
    torch.manual_seed(8)
    assert_same(train(name, twin, twin_opt, range(7, STEPS), lr=LR), expected)
    assert_same(snapshot(twin), before)
    assert_same(snapshot(model), before)
    assert_same(twin_opt.state_dict(), opt.state_dict())


@pytest.mark.parametrize(("name", "base"), [row for row in NAMES_AND_BASES if row[0] in WRAPPED])
def test_checkpoints_of_the_plain_base_go_both_ways(name, base):
    plain_model, model = with_dropout(), with_dropout()
    plain = BASES[base](plain_model)
    for step in range(3):
        plain.zero_grad()
        F.cross_entropy(plain_model(batch(step)[0]), batch(step)[1]).backward()
        plain.step()
    opt = make(name, model, base)
    radius = opt.param_groups[0]["rho"]
    model.load_state_dict(plain_model.state_dict())
    opt.load_state_dict(through_a_file(plain.state_dict()))
    assert opt.param_groups[0]["rho"] == radius
    train(name, model, opt, range(STEPS))
    saved = opt.base_state_dict()
    names = [key for group in saved["param_groups"] for key in group]
    names += [key for entries in saved["state"].values() for key in entries]
    assert not [key for key in names if key.startswith("sam_") or key == "rho"]
    fresh = BASES[base](with_dropout())
    fresh.load_state_dict(through_a_file(saved))
    assert set(fresh.state_dict()["param_groups"][0]) == set(plain.state_dict()["param_groups"][0])
    assert_same(fresh.state_dict()["state"], opt.base_optimizer.state_dict()["state"])


@pytest.mark.supports("plain loop", "distributed checkpoint")
@pytest.mark.parametrize("name", [name for name in NAMES if variant_info(name).memory != "0"])
def test_the_distributed_checkpoint_keeps_what_a_method_remembers(name):
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=False)
    model, fresh = with_dropout(), with_dropout(seed=99)
    opt, other = make(name, model), make(name, fresh)
    train(name, model, opt, range(7))
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, opt, options=options))
    fresh.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(fresh, other, saved, options=options)
    for its_model, its in ((model, opt), (fresh, other)):
        torch.manual_seed(2)
        train(name, its_model, its, range(7, STEPS))
    assert_same(snapshot(fresh), snapshot(model))


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_on_the_wrapper(name):
    model, plain_model = with_dropout(), with_dropout()
    opt, plain = make(name, model), BASES["momentum"](plain_model)
    kinds = (
        lambda o: lr_scheduler.StepLR(o, 3),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    )
    for kind in kinds:
        wrapped, expected = kind(opt), kind(plain)
        for step in range(4):
            train(name, model, opt, [step])
            plain.step()
            value = (1.0,) if isinstance(wrapped, lr_scheduler.ReduceLROnPlateau) else ()
            wrapped.step(*value)
            expected.step(*value)
            assert opt.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_stay(name, dtype):
    model = with_dropout().to(dtype)
    opt = make(name, model)
    train(name, model, opt, range(7))
    other = with_dropout().to(dtype)
    loaded = make(name, other)
    loaded.load_state_dict(through_a_file(opt.state_dict()))
    better = {torch.bfloat16: torch.float32}.get(dtype, dtype)
    for entries in (opt.state_dict()["state"], loaded.state_dict()["state"]):
        assert entries
        for entry in entries.values():
            for key, value in entry.items():
                # What changes by little in a step: an average, and bSAM's two.
                fine = key in ("sam_average", "precision", "momentum")
                assert value.dtype == (better if fine else dtype), key
    assert_same(loaded.state_dict(), opt.state_dict())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} <= {dtype}
    other.load_state_dict(model.state_dict())
    for twin, its in ((model, opt), (other, loaded)):
        torch.manual_seed(9)
        train(name, twin, its, range(7, STEPS))
    assert_same(snapshot(other), snapshot(model))

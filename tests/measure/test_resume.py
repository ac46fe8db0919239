"""Every measure that takes ``resume=`` goes on to the same bits, and takes no file that is not its own."""

import pytest
import torch
from tests.measure.curvature_cases import cross_entropy, make, quadratic, with_spectrum
from tests.ranks.start import on_ranks

from flatwise.errors import UserError
from flatwise.measure import (
    WarmStart,
    hessian_density,
    hessian_eigenvalues,
    hessian_trace,
    journal,
    sharpness,
    spectrum,
)
from flatwise.measure.problem import Problem
from flatwise.measure.products import Products

torch.set_num_threads(1)


class Interrupted(Exception):
    pass


MEASURES = {
    "eigenvalues": lambda case, **more: hessian_eigenvalues(
        case.model, cross_entropy, [case.batch], tol=1e-8, keep_vectors=True, **more
    ),
    "trace": lambda case, **more: hessian_trace(case.model, cross_entropy, [case.batch], probes=20, **more),
    "exact trace": lambda case, **more: hessian_trace(case.model, cross_entropy, [case.batch], probes=200, **more),
    "density": lambda case, **more: hessian_density(
        case.model, cross_entropy, [case.batch], iterations=8, probes=3, points=20, **more
    ),
    "spectrum": lambda case, **more: spectrum(
        case.model, cross_entropy, [case.batch], k=3, iterations=8, probes=3, points=20, tol=1e-6, **more
    ),
    "restarted": lambda case, **more: hessian_eigenvalues(
        with_spectrum([1.1**i for i in range(80)]), quadratic, [None], 2, tol=1e-8, max_memory=20_000.0, **more
    ),
    "differences": lambda case, **more: spectrum(
        case.model,
        cross_entropy,
        [case.batch],
        k=1,
        iterations=6,
        probes=2,
        points=20,
        tol=1e-3,
        product="finite difference",
        **more,
    ),
}


def without_cost(nest):
    """What must be the same: everything but the cost of this call."""
    if isinstance(nest, dict):
        cost = ("cost", "seconds", "gradient_evaluations")
        return {key: without_cost(value) for key, value in nest.items() if key not in cost}
    return [without_cost(value) for value in nest] if isinstance(nest, list) else nest


@pytest.fixture(autouse=True)
def always_written(monkeypatch):
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(journal, "SHARE_OF_WRITING", 1e9)


def stopping(monkeypatch, cls, name, after):
    """Let a method raise from its so-and-so-many-th call on; return how often it was called."""
    method = getattr(cls, name)
    calls = [0]

    def stops(self, *args, **kwargs):
        if calls[0] >= after:
            raise Interrupted
        calls[0] += 1
        return method(self, *args, **kwargs)

    monkeypatch.setattr(cls, name, stops)
    return calls


@pytest.mark.parametrize("stop", [1, 9, 22])
@pytest.mark.parametrize("name", MEASURES)
def test_an_interrupted_run_goes_on_to_the_same_bits(name, stop, tmp_path, monkeypatch):
    measure, case, path = MEASURES[name], make("transformer"), tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        calls = stopping(patch, Products, "__call__", 10_000)
        whole = measure(case)
        products = calls[0]
    assert products > 9
    stop = min(stop, products - 1)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopping(patch, Products, "__call__", stop)
        measure(case, resume=path)
    with monkeypatch.context() as patch:
        calls = stopping(patch, Products, "__call__", 10_000)
        resumed = measure(case, resume=path)
        assert calls[0] == products - stop  # it did not begin again
    assert without_cost(resumed.as_dict()) == without_cost(whole.as_dict())
    if name == "eigenvalues":
        assert torch.equal(resumed.vectors, whole.vectors)
    with monkeypatch.context() as patch:
        stopping(patch, Products, "__call__", 0)
        again = measure(case, resume=path)  # what is complete needs no product
    assert without_cost(again.as_dict()) == without_cost(whole.as_dict())


@pytest.mark.parametrize(
    ("cls", "method", "stop"),
    [
        *((Problem, "gradients_of", stop) for stop in (0, 1, 8, 20, 30)),  # in first-order rows
        *((Products, "__call__", stop) for stop in (3, 22)),  # while eigenvalues, and the trace, are searched for
    ],
)
def test_a_table_of_sharpness_goes_on_to_the_same_rows(cls, method, stop, tmp_path, monkeypatch):
    path = tmp_path / "table.pt"

    def measure(**more):
        case = make("tied")
        settings = {"micro_batch_size": 4, "steps": 2, "draws": 4, "m": (1, 4, 100), "eigenvalues": 2}
        return sharpness(case.model, cross_entropy, case.batch, **settings, **more)

    whole = measure()
    assert any("left out" in sentence for sentence in whole.cautions)
    assert whole.conditions.unused == ("unused",)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopping(patch, cls, method, stop)
        measure(resume=path)
    with monkeypatch.context() as patch:
        calls = stopping(patch, Products, "__call__", 10_000)
        resumed = measure(resume=path)
    products = whole.row("lambda_max").settings["products"] + whole.row("trace").settings["probes"]
    assert calls[0] == products - (stop if cls is Products else 0)
    assert without_cost(resumed.as_dict()) == without_cost(whole.as_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.pt"]
    with monkeypatch.context() as patch:
        last = stopping(patch, Problem, "gradients_of", 0)
        again = measure(resume=path)
    assert last[0] == 0
    assert again.rows == resumed.rows  # with what each of them cost
    with pytest.raises(UserError, match="exclude each other"):
        measure(resume=path, warm_start=WarmStart())
    with pytest.raises(UserError, match="other rho"):
        measure(resume=path, rho=0.1)


def test_a_density_goes_on_to_more_probes(tmp_path):
    case, path = make("mlp"), tmp_path / "density.pt"

    def measure(probes, iterations=8, **more):
        return hessian_density(case.model, cross_entropy, [case.batch], iterations=iterations, probes=probes, **more)

    whole = measure(4)
    measure(2, resume=path)
    resumed = measure(4, resume=path)
    assert resumed.cost.gradient_evaluations < 0.75 * whole.cost.gradient_evaluations
    assert without_cost(resumed.as_dict()) == without_cost(whole.as_dict())
    with pytest.raises(UserError, match="other steps"):
        measure(4, iterations=9, resume=path)


@pytest.mark.parametrize("name", ["eigenvalues", "trace", "density", "spectrum"])
def test_a_file_of_another_run_is_refused(name, tmp_path):
    measure, path = MEASURES[name], tmp_path / "run.pt"
    case = make("transformer")
    measure(case, resume=path)
    with pytest.raises(UserError, match=r"from a run with other .*seed"):
        measure(case, resume=path, seed=1)
    x, y = case.batch
    moved = x.clone()
    moved[3, 1, 2] = torch.nextafter(moved[3, 1, 2], torch.tensor(9.0).double())
    case.batch = moved, y
    with pytest.raises(UserError, match=r"with other data \(a loader that shuffles"):
        measure(case, resume=path)
    case.batch = x, y
    with torch.no_grad():
        case.model.head.bias[0] += 1
    with pytest.raises(UserError, match="with other weights at"):
        measure(case, resume=path)


def test_a_file_of_another_measure_or_none_or_one_that_is_cut_off_is_refused(tmp_path):
    case, path = make("mlp"), tmp_path / "run.pt"
    hessian_trace(case.model, cross_entropy, case.batch, resume=path)
    with pytest.raises(UserError, match="the file of another measure, trace, not of density"):
        hessian_density(case.model, cross_entropy, case.batch, resume=path)
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], content[:10], b"", b"no such thing", b"[]"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"run\.pt is no file of a run that can be resumed"):
            hessian_trace(case.model, cross_entropy, case.batch, resume=path)
    torch.save({"settings": 1}, path)
    with pytest.raises(UserError, match="no file of a run"):
        hessian_trace(case.model, cross_entropy, case.batch, resume=path)


def test_a_changed_buffer_is_another_run(tmp_path):
    case, path = make("cnn eval"), tmp_path / "run.pt"
    hessian_trace(case.model, cross_entropy, case.batch, resume=path)
    case.model[1].running_var[0] += 1
    with pytest.raises(UserError, match="with other weights at"):
        hessian_trace(case.model, cross_entropy, case.batch, resume=path)


def test_a_file_holds_no_more_than_the_rows_that_are_filled(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    model = with_spectrum([float(i) for i in range(400)])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopping(patch, Products, "__call__", 3)
        hessian_eigenvalues(model, quadratic, [None], 1, tol=1e-12, resume=path)
    basis = 8 * 400 * 4
    projected = 8 * 301 * 300
    matrix = 8 * 400**2  # nothing of the model is in the file
    assert path.stat().st_size < basis + projected + 20_000 < matrix


def _interrupted_on_rank(rank, folder, stop, changed):
    case = make("mlp")
    x, y = case.batch
    mine = [(x[:8], y[:8]), (x[8:] + (rank == changed), y[8:])][rank]
    method, calls = Products.__call__, []

    def stops(self, vector):
        if len(calls) == stop:
            raise Interrupted
        calls.append(1)
        return method(self, vector)

    Products.__call__ = stops
    journal.SECONDS_BETWEEN_WRITES, journal.SHARE_OF_WRITING = 0.0, 1e9
    try:
        result = hessian_trace(
            case.model, cross_entropy, mine, probes=9, resume=folder, process_group=torch.distributed.group.WORLD
        )
    except Interrupted:
        return None
    except UserError as error:
        return str(error)
    finally:
        Products.__call__ = method
    return result.value, len(calls)


def test_processes_that_share_the_work_go_on_together_and_know_the_samples_of_all(tmp_path):
    file = tmp_path / "run.pt"
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    assert list(on_ranks(_interrupted_on_rank, tmp_path / "a", file, 4, None)) == [None, None]
    # The second process has other samples: the first one knows, too.
    first, second = on_ranks(_interrupted_on_rank, tmp_path / "b", file, 1000, 1)
    assert first == second
    assert "with other data" in first
    first, second = on_ranks(_interrupted_on_rank, tmp_path / "c", file, 1000, None)
    assert first == second
    case = make("mlp")
    alone = hessian_trace(case.model, cross_entropy, case.batch, probes=9)
    assert first[0] == pytest.approx(alone.value, rel=1e-9)
    assert first[1] == 9 - 4

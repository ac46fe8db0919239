"""What the top five eigenvalues and the spectral density cost, beside the peers, in gradient evaluations.

    python benchmarks/curvature.py                    # about half an hour on one core
    python benchmarks/curvature.py --quick            # a toy size, which shows only that everything runs
    python benchmarks/curvature.py --out docs/results/curvature.json

A convolutional network of 20,490 weights, 1,024 images of Fashion-MNIST, cross-entropy, one thread. All contestants get
the same weights and samples, once after three epochs of SGD and once after SAM, whose spectrum is clustered. Cost is
processor time over that of one gradient, measured in the same run, everything included that a contestant does from its
first call on. The residual is max over the five of ``|H v - lambda v| / |lambda_1|``, taken with exact products in
float64 for all contestants alike; each runs with its own settings from loose to tight, and for each of two residuals
(1e-2 and 1e-3) its cheapest run that reaches it counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatwise import SAM
from flatwise.lab.data import load_data
from flatwise.measure import hessian_density, hessian_eigenvalues
from flatwise.measure.problem import Problem
from flatwise.measure.products import Products

K = 5
TARGETS = (1e-2, 1e-3)
LONG = 300
"""Gradient evaluations above which a run is not repeated; above three times as many, no tighter setting is tried."""


@dataclass(frozen=True)
class Size:
    """How much is done."""

    images: int
    train: int
    sgd_epochs: int
    sam_epochs: int
    steps: int
    turns: int
    width: int


FULL = Size(images=1024, train=8192, sgd_epochs=3, sam_epochs=20, steps=100, turns=3, width=16)
QUICK = Size(images=32, train=64, sgd_epochs=1, sam_epochs=1, steps=12, turns=1, width=2)


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * width * 49, 10),
    )  # fmt: skip


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(size: Size, method: str, cache: Path | None) -> nn.Module:
    """Train, or load what was trained before with the same settings."""
    model = network(size.width)
    file = None if cache is None else cache / f"curvature-{method}-{size.train}-{size.sam_epochs}-{size.width}.pt"
    if file is not None and file.exists():
        model.load_state_dict(torch.load(file))
        return model
    data = load_data("fashion-mnist")
    x, y = data.train_inputs[: size.train], data.train_labels[: size.train]
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    opt: Any = base if method == "sgd" else SAM(base, rho=0.2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(size.sgd_epochs if method == "sgd" else size.sam_epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):

            def closure(rows: Tensor = rows) -> Tensor:
                opt.zero_grad()
                loss = loss_fn(model, (x[rows], y[rows]))
                loss.backward()
                return loss

            opt.step(closure)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    return model


def processor_time(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def gradient_seconds(model: nn.Module, batch: tuple[Tensor, Tensor], times: int) -> float:
    """Median processor time of one gradient."""

    def gradient() -> None:
        torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))

    gradient()
    return statistics.median(processor_time(gradient)[0] for _ in range(times))


class Exact:
    """The common judge: exact products in float64."""

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor], width: int) -> None:
        double = network(width).double()
        double.load_state_dict(model.state_dict())
        self.problem = Problem(double, loss_fn, [(batch[0].double(), batch[1])])
        self.products = Products(self.problem, matrix="hessian")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let it judge inside."""
        with self.problem.open():
            yield

    def residual(self, values: list[float], vectors: Tensor) -> float:
        """Return the largest residual, relative to the largest value."""
        left = []
        for value, vector in zip(values, vectors.double(), strict=True):
            unit = vector / vector.norm()
            left.append(float((self.products(unit) - value * unit).norm()))
        return max(left) / max(map(abs, values))


Answer = tuple[list[float], Tensor, int]
"""Values, vectors in rows, products."""


def flatwise_runs(model: nn.Module, batch: Any) -> dict[str, Callable[[], Answer]]:
    def run(tol: float) -> Answer:
        r = hessian_eigenvalues(
            model, loss_fn, [batch], K, tol=tol, keep_vectors=True, max_products=2000, progress=False
        )
        assert r.vectors is not None
        return list(r.values), r.vectors, r.products

    return {f"tol={tol:g}": (lambda tol=tol: run(tol)) for tol in (1e-2, 1e-3, 1e-4)}


def plain_runs(model: nn.Module, batch: Any) -> dict[str, Callable[[], Answer]]:
    """Double backward with a graph that is built anew for each product, and scipy's eigsh."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    params = list(model.parameters())
    n = sum(p.numel() for p in params)

    def run(tol: float) -> Answer:
        count = 0

        def multiply(v: np.ndarray) -> np.ndarray:
            nonlocal count
            count += 1
            pieces = torch.from_numpy(v.ravel().astype(np.float32)).split([p.numel() for p in params])
            grads = torch.autograd.grad(loss_fn(model, batch), params, create_graph=True)
            hv = torch.autograd.grad(grads, params, [d.view_as(p) for d, p in zip(pieces, params, strict=True)])
            return torch.cat([h.flatten() for h in hv]).numpy()

        start = np.random.default_rng(0).standard_normal(n).astype(np.float32)
        values, vectors = eigsh(LinearOperator((n, n), multiply, dtype=np.float32), k=K, which="LM", tol=tol, v0=start)
        return values.tolist(), torch.from_numpy(vectors.T.copy()), count

    return {f"tol={tol:g}": (lambda tol=tol: run(tol)) for tol in (1e-1, 1e-2, 1e-3)}


def curvlinops_runs(model: nn.Module, batch: Any) -> dict[str, Callable[[], Answer]]:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    def run(tol: float) -> Answer:
        operator = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), [batch], check_deterministic=False
        ).to_scipy()
        count = 0

        def multiply(v: np.ndarray) -> np.ndarray:
            nonlocal count
            count += 1
            return operator @ v.ravel().astype(np.float32)

        start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(np.float32)
        counted = LinearOperator(operator.shape, multiply, dtype=np.float32)
        values, vectors = eigsh(counted, k=K, which="LM", tol=tol, v0=start)
        return values.tolist(), torch.from_numpy(vectors.T.copy()), count

    return {f"tol={tol:g}": (lambda tol=tol: run(tol)) for tol in (1e-1, 1e-2, 1e-3)}


def pyhessian_runs(model: nn.Module, batch: Any) -> dict[str, Callable[[], Answer]]:
    from pyhessian import hessian

    def run(tol: float, most: int) -> Answer:
        inside: Any = sys.modules["pyhessian.hessian"]  # the package gives this name to the class
        count = 0
        multiply = inside.hessian_vector_product

        def counted(*args: Any) -> Any:
            nonlocal count
            count += 1
            return multiply(*args)

        inside.hessian_vector_product = counted
        try:
            values, vectors = hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=False).eigenvalues(
                maxIter=most, tol=tol, top_n=K
            )
        finally:
            inside.hessian_vector_product = multiply
            model.zero_grad()
        return values, torch.stack([torch.cat([t.detach().flatten() for t in v]) for v in vectors]), count

    runs: dict[str, Callable[[], Answer]] = {"default (tol=1e-3, maxIter=100)": lambda: run(1e-3, 100)}
    runs |= {f"tol={tol:g}, maxIter=1000": (lambda tol=tol: run(tol, 1000)) for tol in (1e-4, 1e-5, 1e-6, 1e-7)}
    return runs


def eigenthings_runs(model: nn.Module, batch: Any) -> dict[str, Callable[[], Answer]]:
    from hessian_eigenthings import HessianOperator, lanczos

    def run(steps: int) -> Answer:
        result = lanczos(HessianOperator(model, [batch], loss_fn), k=K, max_iter=steps, seed=0, reorthogonalize=True)
        vectors = torch.as_tensor(result.eigenvectors)
        rows = vectors if vectors.shape[0] == K else vectors.T
        return torch.as_tensor(result.eigenvalues).tolist(), rows, steps

    return {f"max_iter={steps}": (lambda steps=steps: run(steps)) for steps in (13, 16, 20, 25, 30, 40, 60, 80)}


CONTESTANTS = {
    "flatwise": flatwise_runs,
    "plain double backward + eigsh": plain_runs,
    "curvlinops + eigsh": curvlinops_runs,
    "hessian-eigenthings": eigenthings_runs,
    "pyhessian": pyhessian_runs,
}


def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
    """``torch.eig``, which pyhessian's density calls and torch has removed, for symmetric matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


def densities(model: nn.Module, batch: Any, steps: int) -> dict[str, Callable[[], Any]]:
    """One probe of so many steps, and the curve."""
    from curvlinops import HessianLinearOperator
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum
    from hessian_eigenthings import HessianOperator, spectral_density
    from pyhessian import hessian

    params = list(model.parameters())
    torch.eig = eig  # type: ignore[assignment]  # without it pyhessian has no density with this torch
    return {
        "flatwise": lambda: hessian_density(model, loss_fn, [batch], iterations=steps, probes=1, progress=False),
        "curvlinops": lambda: lanczos_approximate_spectrum(
            HessianLinearOperator(model, nn.CrossEntropyLoss(), params, [batch], check_deterministic=False), ncv=steps
        ),
        "hessian-eigenthings": lambda: spectral_density(
            HessianOperator(model, [batch], loss_fn), num_runs=1, lanczos_steps=steps, seed=0
        ),
        "pyhessian": lambda: hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=False).density(iter=steps, n_v=1),
    }


def measured(size: Size, method: str, cache: Path | None, record: dict[str, Any], save: Callable[[], None]) -> None:
    """Every contestant on one network; what is done is saved as it goes."""
    model = trained(size, method, cache).eval()
    data = load_data("fashion-mnist")
    batch = (data.train_inputs[: size.images].contiguous(), data.train_labels[: size.images])
    judge = Exact(model, batch, size.width)
    record |= {"loss": float(loss_fn(model, batch).detach())}
    record.setdefault("eigenvalues", {})
    record.setdefault("density", {})
    with judge.open():
        for name, make in CONTESTANTS.items():
            if name in record["eigenvalues"]:
                continue
            rows = []
            for setting, run in make(model, batch).items():
                turns = []
                for _ in range(size.turns):
                    before = gradient_seconds(model, batch, 3)
                    torch.manual_seed(0)
                    seconds, (values, vectors, products) = processor_time(run)
                    # Before and after, since other work on the machine comes and goes.
                    turns.append(2 * seconds / (before + gradient_seconds(model, batch, 3)))
                    if turns[0] > LONG:
                        break
                residual = judge.residual(values, vectors)
                rows.append(
                    {
                        "setting": setting, "residual": residual, "cost": statistics.median(turns), "turns": turns,
                        "products": products, "values": sorted(map(float, values), key=abs, reverse=True),
                    }
                )  # fmt: skip
                show(f"{method:4s} {name:30s} {setting:32s} {residual:9.1e} {products:6d} {rows[-1]['cost']:8.1f}")
                if residual <= min(TARGETS) or rows[-1]["cost"] > 3 * LONG:
                    break
            record["eigenvalues"][name] = rows
            save()
    for name, run in densities(model, batch, size.steps).items():
        if name in record["density"]:
            continue
        turns = []
        for _ in range(size.turns):
            before = gradient_seconds(model, batch, 3)
            torch.manual_seed(0)
            seconds, _ = processor_time(run)
            model.zero_grad()
            turns.append(2 * seconds / (before + gradient_seconds(model, batch, 3)))
            if turns[0] > LONG:
                break
        record["density"][name] = {"cost": statistics.median(turns), "turns": turns, "steps": size.steps}
        show(f"{method:4s} density: {name:21s} {size.steps:4d} steps {record['density'][name]['cost']:8.1f}")
        save()


def show(line: str) -> None:
    print(line, flush=True)


def table(record: dict[str, Any]) -> str:
    """The page's table: for each residual, the cheapest run of each contestant that reaches it."""
    lines = ["| network | contestant | residual | products | gradient evaluations |", "|---|---|---|---|---|"]
    for method, entry in record["networks"].items():
        for target in TARGETS:
            for name, rows in entry["eigenvalues"].items():
                reached = [row for row in rows if row["residual"] <= target]
                row = min(reached, key=lambda row: row["cost"]) if reached else rows[-1]
                seen = f"{row['residual']:.1e}" if reached else f"{row['residual']:.1e}, not {target:g}"
                cells = [
                    f"{method}, {target:g}",
                    f"{name}, {row['setting']}",
                    seen,
                    row["products"],
                    f"{row['cost']:.0f}",
                ]
                lines.append(f"| {' | '.join(map(str, cells))} |")
        for name, row in entry["density"].items():
            lines.append(f"| {method} | density, {name} | | {row['steps']} | {row['cost']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, help="a folder that keeps the trained networks")
    parser.add_argument("--networks", nargs="+", default=["sgd", "sam"], choices=["sgd", "sam"])
    parser.add_argument("--turns", type=int, help="how often each contestant runs; the median counts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    size = QUICK if given.quick else FULL
    if given.turns is not None:
        size = replace(size, turns=given.turns)
    record: dict[str, Any] = {
        "torch": torch.__version__, "machine": platform.machine(), "size": vars(size), "targets": TARGETS,
        "networks": {},
    }  # fmt: skip

    if given.out is not None and given.out.exists():
        held = json.loads(given.out.read_text())
        if held["size"] == {**vars(size), "turns": held["size"]["turns"]}:
            record["networks"] = held["networks"]  # go on where an earlier run stopped

    def save() -> None:
        if given.out is not None:
            given.out.write_text(json.dumps(record, indent=1) + "\n")

    for method in given.networks:
        measured(size, method, given.cache, record["networks"].setdefault(method, {}), save)
    show(table(record))


if __name__ == "__main__":
    main()

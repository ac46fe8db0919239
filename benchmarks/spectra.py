"""The Hessian's spectrum at the start, in the middle and at the end of training with SGD and with SAM.

The left part of Figure 3 of Foret et al. (ICLR 2021) in small: a network without normalisation (``cnn-plain``) on
Fashion-MNIST, from five seeds. Writes ``docs/results/spectra.json`` as it goes, so that a run that was stopped
continues, and draws ``docs/results/spectra.png``.

    python benchmarks/spectra.py            # about half an hour on two cores
    python benchmarks/spectra.py --draw     # the picture again, from the records
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from flatwise import measure
from flatwise.files import write_atomically
from flatwise.lab.config import CompareConfig
from flatwise.lab.data import load_data
from flatwise.lab.loop import Trainer, score
from flatwise.lab.methods import trained_methods
from flatwise.lab.statistics import estimate, paired_difference
from flatwise.measure.result import digits

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SETTINGS: dict[str, Any] = {
    "dataset": "fashion-mnist",
    "model": "cnn-plain",
    "methods": "sgd,sam:rho=0.1",
    "train_size": 10_000,
    "label_noise": 0.0,
    "epochs": 30,
    "seeds": 5,
    "quiet": True,
}
EPOCHS = (1, 10, 30)
SAMPLES = 1024
ITERATIONS, PROBES = 60, 2
FIELDS = ("grid", "density", "low", "high")


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def train(job: tuple[str, int, dict[str, Any]]) -> dict[str, Any]:
    """Train one method from one seed, and look at the Hessian after each of ``EPOCHS``."""
    name, seed, settings = job
    torch.set_num_threads(1)
    config = CompareConfig(**settings["config"])
    method = next(m for m in trained_methods(config) if m.name == name)
    trainer = Trainer(config, method, seed, load_data(config.dataset, config.data_root))
    probe = [(trainer.split.inputs[: settings["samples"]], trainer.split.labels[: settings["samples"]])]
    record: dict[str, Any] = {"method": name, "seed": seed, "looks": []}
    begun = time.perf_counter()
    for epoch in range(max(settings["epochs"])):
        loss = trainer.train_epoch(epoch)
        if epoch + 1 in settings["epochs"]:
            test = score(trainer.predict(trainer.data.test_inputs), trainer.data.test_labels)
            look = {"epoch": epoch + 1, "train_loss": loss, "test_accuracy": test.accuracy}
            record["looks"].append({**look, **spectrum(trainer.model, probe, settings)})
    record["seconds"] = round(time.perf_counter() - begun, 1)
    return record


def spectrum(model: nn.Module, probe: list[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Measure the five largest eigenvalues and the density."""
    top = measure.hessian_eigenvalues(model, loss_fn, probe, 5, which="largest", tol=1e-2, progress=False)
    density = measure.hessian_density(
        model, loss_fn, probe, iterations=settings["iterations"], probes=settings["probes"], progress=False
    )
    return {
        "eigenvalues": [float(f"{v:.5g}") for v in top.values],
        "residuals": [float(f"{v:.2g}") for v in top.residuals],
        "smallest": float(f"{density.smallest:.5g}"),
        "nodes": [[float(f"{v:.5g}") for v in row] for row in density.nodes],
        "weights": [[float(f"{v:.4g}") for v in row] for row in density.weights],
        "gradient_evaluations": round(top.cost.gradient_evaluations + density.cost.gradient_evaluations, 1),
    }


def density_of(look: dict[str, Any], grid: torch.Tensor, width: float) -> torch.Tensor:
    """Smooth the quadrature nodes of a look with a Gaussian, and average over its probes."""
    rows = []
    for nodes, weights in zip(look["nodes"], look["weights"], strict=True):
        n, w = torch.tensor(nodes, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
        kernels = torch.exp(-((grid[:, None] - n) ** 2) / (2 * width**2)) / (width * (2 * torch.pi) ** 0.5)
        rows.append(kernels @ w)
    return torch.stack(rows).mean(dim=0)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the densities: a panel for each epoch, a line and a band over the seeds for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from flatwise.report.bands import COLOURS
    from flatwise.report.figures import DASHES, FAINT, INK

    epochs = results["settings"]["epochs"]
    figure = Figure(figsize=(4.4 * len(epochs), 4.1), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, epoch in zip(figure.subplots(1, len(epochs), squeeze=False)[0], epochs, strict=True):
        looks = {
            name: [look for run in runs for look in run["looks"] if look["epoch"] == epoch]
            for name, runs in by_method(results).items()
        }
        high = max(look["eigenvalues"][0] for rows in looks.values() for look in rows)
        low = min(look["smallest"] for rows in looks.values() for look in rows)
        width = (high - low) / 100
        grid = torch.linspace(low - 4 * width, high + 4 * width, 400, dtype=torch.float64)
        lines = []
        for number, (name, rows) in enumerate(looks.items()):
            densities = torch.stack([density_of(look, grid, width) for look in rows]).clamp(min=1e-12)
            mean = densities.mean(dim=0)
            colour, dashes = COLOURS[number], DASHES[number]
            axes.fill_between(grid, densities.amin(0), densities.amax(0), color=colour, alpha=0.18, linewidth=0)
            top = estimate([look["eigenvalues"][0] for look in rows])
            ratio = estimate([look["eigenvalues"][0] / look["eigenvalues"][4] for look in rows])
            lines += axes.plot(grid, mean, color=colour, linestyle=dashes, linewidth=1.8)
            lines[-1].set_label(f"{name}: λmax {spread(top)}, λmax/λ5 {spread(ratio)}")
        axes.set_yscale("log")
        axes.set_ylim(1e-7 / width, 3 / width)
        axes.set_title(f"after epoch {epoch}", loc="left", fontsize=10.5, color=INK)
        axes.set_xlabel("eigenvalue of the Hessian", color=INK)
        axes.legend(frameon=False, fontsize=8, loc="upper right")
        axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=FAINT)
    title = "The spectrum of the Hessian during training, without and with SAM\n"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, color=INK)
    settings = results["settings"]
    config = settings["config"]
    caption = (
        f"{config['model']} on Fashion-MNIST, {config['train_size']:,} images, of which {settings['samples']:,} are "
        f"measured; {config['seeds']} seeds: line their mean, band from lowest to highest; ± 95 %"
    )
    figure.text(0.012, 0.915, caption, fontsize=8.5, color=FAINT)
    figure.savefig(path, format="png")


def spread(value: Any) -> str:
    return digits(value.mean, value.ci95)


def by_method(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        runs.setdefault(run["method"], []).append(run)
    return runs


def summary(results: dict[str, Any]) -> str:
    """Write the table that ``docs/curvature.md`` shows."""
    lines = ["| after epoch | method | λmax | λmax / λ5 | smallest | test accuracy, % |", "|---|---|---|---|---|---|"]
    runs = by_method(results)
    for epoch in results["settings"]["epochs"]:
        tops = {}
        for name, rows in runs.items():
            looks = [look for run in sorted(rows, key=lambda r: r["seed"]) for look in run["looks"]]
            looks = [look for look in looks if look["epoch"] == epoch]
            tops[name] = [look["eigenvalues"][0] for look in looks]
            ratio = [look["eigenvalues"][0] / look["eigenvalues"][4] for look in looks]
            lows, accuracy = [look["smallest"] for look in looks], [100 * look["test_accuracy"] for look in looks]
            cells = [spread(estimate(v)) for v in (tops[name], ratio, lows, accuracy)]
            lines.append(f"| {epoch} | {name} | " + " | ".join(cells) + " |")
        base, *others = tops
        for name in others:
            difference = paired_difference(tops[name], tops[base])
            lines.append(f"| {epoch} | {name} − {base} | {spread(difference)} (paired) | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only draw and print, from the records")
    parser.add_argument("--quick", action="store_true", help="a tiny setting, to see that it runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "spectra.json")
    options = parser.parse_args()
    settings = {
        "config": SETTINGS,
        "epochs": list(EPOCHS),
        "samples": SAMPLES,
        "iterations": ITERATIONS,
        "probes": PROBES,
    }
    if options.quick:
        tiny = {**SETTINGS, "dataset": "digits", "train_size": 200, "epochs": 2, "seeds": 2}
        settings |= {"config": tiny, "epochs": [1, 2], "samples": 64, "iterations": 12}
    config = CompareConfig(**settings["config"])
    settings["config"] = {**settings["config"], "methods": config.resolved().methods}
    results: dict[str, Any] = {"settings": settings, "runs": []}
    if options.out.exists():
        known = json.loads(options.out.read_text())
        if known["settings"] == json.loads(json.dumps(settings)) or options.draw:
            results = known
    done = {(run["method"], run["seed"]) for run in results["runs"]}
    jobs = [
        (method.name, seed, settings)
        for seed in range(config.seeds)
        for method in trained_methods(config)
        if (method.name, seed) not in done
    ]
    if jobs and not options.draw:
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            for number, record in enumerate(pool.imap_unordered(train, jobs), start=1):
                results["runs"].append(record)
                results["torch"] = torch.__version__
                text = json.dumps(results).encode()
                write_atomically(options.out, lambda file, text=text: file.write(text))
                print(
                    f"{number} of {len(jobs)}: {record['method']}, seed {record['seed']}, {record['seconds']} s",
                    flush=True,
                )
    draw(results, options.out.with_suffix(".png"))
    print(summary(results))


if __name__ == "__main__":
    main()

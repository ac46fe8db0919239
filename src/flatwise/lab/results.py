"""From finished runs to ``results.json``: every number with its spread, its cost and its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flatwise.lab.config import CompareConfig
from flatwise.lab.data import ImageData
from flatwise.lab.methods import Method, trained_methods
from flatwise.lab.split import make_split
from flatwise.lab.statistics import estimate, paired_difference
from flatwise.lab.timing import in_training

SCHEMA = "flatwise.compare/1"
BASE_STEP = {"ratio": 1.0, "quartiles": [1.0, 1.0], "step_seconds": None}
Result = dict[str, Any]


def assemble(
    config: CompareConfig,
    data: ImageData,
    runs: Mapping[str, Sequence[Result]],
    timing: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> Result:
    """Put the runs together.

    Args:
        config: the settings.
        data: the data set.
        runs: for each trained method its finished runs, in the order of the seeds.
        timing: what the interleaved timing found.
        environment: what it ran on.

    Returns:
        The content of ``results.json``; ``docs/compare.md`` describes it.
    """
    methods = trained_methods(config)
    records = {method.name: _record(method, runs[method.name], timing) for method in methods}
    equal_compute = _equal_compute(config, records) if config.equal_compute else None
    reference = methods[0].name
    baseline = records[reference]["test_accuracy"]["per_seed"]
    paired = {
        name: {
            "reference": reference,
            "difference": paired_difference(record["test_accuracy"]["per_seed"], baseline).as_dict(),
        }
        for name, record in records.items()
        if name != reference
    }
    split = make_split(
        data,
        0,
        train_size=config.train_size,
        validation_share=config.val_fraction,
        label_noise=config.label_noise,
    )
    return {
        "schema": SCHEMA,
        "config": asdict(config.resolved()),
        "data": {
            "name": data.name,
            "classes": data.classes,
            "train": len(split.labels),
            "validation": len(split.validation_labels),
            "test": len(data.test_labels),
            "wrong_training_labels": int(split.wrong.sum()),
        },
        "base": config.optimizer,
        "reference": reference,
        "methods": records,
        "paired": paired,
        "equal_compute": equal_compute,
        "timing": {
            "rounds": timing["rounds"],
            "how": "steps interleaved in one process, one thread, medians",
        },
        "environment": dict(environment),
    }


def _record(method: Method, runs: Sequence[Result], timing: Mapping[str, Any]) -> Result:
    def over_seeds(key: str) -> dict[str, Any]:
        return estimate([run[key] for run in runs]).as_dict()

    # The longer base has the base's step.
    step = timing["methods"].get(method.name, BASE_STEP)
    gradients = sum(run["gradient_evaluations_per_step"] for run in runs) / len(runs)
    ratio, quartiles = in_training(step, gradients)
    fitted = None if runs[0]["wrong_labels_fitted"] is None else over_seeds("wrong_labels_fitted")
    return {
        "variant": method.variant,
        "options": dict(method.options),
        "epochs": runs[0]["epochs"],
        "steps": runs[0]["steps"],
        "test_accuracy": over_seeds("test_accuracy"),
        "validation_accuracy": over_seeds("validation_accuracy"),
        "best_validation": _best_validation(runs),
        "train_accuracy": over_seeds("train_accuracy"),
        "wrong_labels_fitted": fitted,
        "gradient_evaluations_per_step": gradients,
        "wall_time": over_seeds("seconds"),
        "relative_time": ratio * method.longer,
        "relative_time_quartiles": [bound * method.longer for bound in quartiles],
        "step_seconds": step["step_seconds"],
    }


def _best_validation(runs: Sequence[Result]) -> Result:
    # Over the mean of the seeds: the best epoch of each seed alone would pick chance along with merit.
    means = [
        sum(record["validation_accuracy"] for record in epoch) / len(epoch)
        for epoch in zip(*(run["history"] for run in runs), strict=True)
    ]
    best = max(range(len(means)), key=means.__getitem__)
    return {"epoch": best + 1, "mean": means[best]}


def _equal_compute(config: CompareConfig, records: dict[str, Result]) -> Result:
    """Let the better of the two base trainings stand for the base, and keep both.

    Args:
        config: names the base.
        records: one for each trained method; the longer base leaves it.

    Returns:
        Which was chosen, how, and both records.
    """
    base = config.optimizer
    longer = next(name for name in records if name.startswith(f"{base}-2x"))
    candidates = {base: records[base], longer: records.pop(longer)}

    def validation(name: str) -> float:
        return float(candidates[name]["validation_accuracy"]["mean"])

    # At equal validation accuracy the cheaper one stands.
    chosen = longer if validation(longer) > validation(base) else base
    records[base] = candidates[chosen]
    return {
        "chosen": chosen,
        "rule": "higher mean validation accuracy after the last epoch; the test set had no part in it",
        "candidates": candidates,
    }

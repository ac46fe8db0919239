"""What follows from a comparison, and what does not, in plain words."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]

EARLY_PEAK = 0.03


def verdict(results: Result) -> list[str]:
    """Say what the numbers mean.

    Args:
        results: the content of ``results.json``.

    Returns:
        Sentences, each fit for a line of its own.
    """
    sentences = [_difference(name, pair, results) for name, pair in results["paired"].items()]
    sentences += _several(results)
    sentences += _collapsed(results)
    sentences += _fitted(results)
    sentences += _peaked(results)
    sentences += _cost(results)
    sentences.append(_scope(results))
    return sentences


def _seeds(results: Result) -> int:
    return len(results["methods"][results["reference"]]["test_accuracy"]["per_seed"])


def _difference(name: str, pair: Result, results: Result) -> str:
    reference, difference = pair["reference"], pair["difference"]
    mean, half = 100 * difference["mean"], difference["ci95"]
    if half is None:
        return f"{name} against {reference}: {mean:+.1f} points from one seed, which says nothing about chance."
    if not any(difference["per_seed"]):
        return f"{name} and {reference} reached the same test accuracy from each of the {_seeds(results)} seeds."
    low, high = mean - 100 * half, mean + 100 * half
    interval = f"95 % interval {low:+.1f} to {high:+.1f}, {_seeds(results)} paired seeds"
    if low > 0:
        return f"{name} is better than {reference} here, by {mean:.1f} points of test accuracy ({interval})."
    if high < 0:
        return f"{name} is worse than {reference} here, by {-mean:.1f} points of test accuracy ({interval})."
    return (
        f"{name} against {reference} is undecided: {mean:+.1f} points, but the interval includes 0 "
        f"({interval}). That is not evidence that they are equal."
    )


def _several(results: Result) -> list[str]:
    count = len(results["paired"])
    if count < 2:
        return []
    return [
        f"Each of the {count} intervals holds 95 % on its own; that all {count} hold at once is less sure "
        f"(at least {100 - 5 * count} %)."
        if count < 20
        else f"With {count} comparisons, expect about one interval in twenty to miss."
    ]


def _collapsed(results: Result) -> list[str]:
    chance = 1 / results["data"]["classes"]
    names = [
        name
        for name, record in results["methods"].items()
        # On the training labels, because that is what training failed at.
        if record["variant"] is not None and record["train_accuracy"]["mean"] < 2 * chance
    ]
    return [
        f"{name} hardly left chance on its own training labels: its radius "
        f"(rho = {results['methods'][name]['options'].get('rho')}) is probably too large for this network; "
        "try a smaller --rho."
        for name in names
    ]


def _fitted(results: Result) -> list[str]:
    shares = [
        f"{name} {100 * record['wrong_labels_fitted']['mean']:.0f} %"
        for name, record in results["methods"].items()
        if record["wrong_labels_fitted"] is not None
    ]
    if not shares:
        return []
    return [f"Share of the wrong training labels that the network learned by heart: {', '.join(shares)}."]


def _peaked(results: Result) -> list[str]:
    peaks = []
    for name, record in results["methods"].items():
        best, last = record["best_validation"], record["validation_accuracy"]["mean"]
        if best["mean"] - last > EARLY_PEAK:
            peaks.append(f"{name} ({100 * best['mean']:.1f} % at epoch {best['epoch']}, {100 * last:.1f} % at the end)")
    if not peaks:
        return []
    return [
        "Every test accuracy is that of the last epoch; by validation accuracy, stopping early would have helped "
        f"{_join(peaks)}."
    ]


def _cost(results: Result) -> list[str]:
    base = results["base"]
    costs = [
        f"{name} takes {record['relative_time']:.2f} times"
        for name, record in results["methods"].items()
        if record["variant"] is not None
    ]
    if not costs:
        return []
    price = f"For the same epochs, {_join(costs)} the time of {base}."
    equal = results["equal_compute"]
    if equal is None:
        return [f"{price} This compares equal epochs; --equal-compute also gives {base} twice the epochs."]
    candidates = equal["candidates"]
    scores = " and ".join(
        f"{candidate} {100 * record['validation_accuracy']['mean']:.1f} %" for candidate, record in candidates.items()
    )
    return [
        f"{price} {base} was also trained for twice the epochs; the row shows {equal['chosen']}, "
        f"the better of the two by validation accuracy ({scores})."
    ]


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _scope(results: Result) -> str:
    config, data = results["config"], results["data"]
    noise = config["label_noise"]
    labels = f"with {100 * noise:g} % of the training labels made wrong" if noise else "with the labels as they are"
    elsewhere = "clean labels, other data" if noise else "noisy labels, other data"
    return (
        f"This holds for one data set ({data['name']}, {data['train']} training images, {labels}), one "
        f"network ({config['model']}) and these settings; it says nothing about {elsewhere}, other networks "
        "or other radii. The intervals cover the seeds (weights, split, wrong labels, order), not the choice "
        f"of the {data['test']} test images."
    )

"""What a sharpness-aware step costs at scale: formulas, checked by counting in a few processes, and put on paper.

    python benchmarks/scale.py --count        # count in 2 and 4 processes, compare, write docs/results/scale.json
    python benchmarks/scale.py                # write the tables and the picture of docs/scale.md
    python benchmarks/scale.py --print --inter 25 --intra 300 --memory 141        # print them for other devices

Nothing larger than the counted model is run; no accelerator is used.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scale_count import FULL, MIXED, SAMPLES, SMALL, Setting, counted, settings
from scale_formula import Layout, Method, Model, Precision, blocks_at_once, gathered, held, methods, sent, traffic

DOCS = Path(__file__).parents[1] / "docs"
PAGE, RECORD, PICTURE = DOCS / "scale.md", DOCS / "results" / "scale.json", DOCS / "results" / "scale.png"
WORLDS = (2, 4)
DEVICES = (8, 64, 512, 4096)
NODE, TENSOR, TOKENS, EVERY = 8, 8, 4096, 5
METHODS = methods(EVERY)
GB = 1e9


def transformer(name: str, width: int, blocks: int, hidden: int, values: int, words: int) -> Model:
    """Return the sizes of a decoder with gated feed-forward blocks; ``values`` is the width of keys and of values."""
    square = (width, width)
    block = (square, (values, width), (values, width), square, (hidden, width), (hidden, width), (width, hidden))
    vectors = ((width,), (width,))
    return Model(
        name, ((words, width),), (*block, *vectors), blocks, ((width,), (words, width)), width, rows=(3, 6), sums=2
    )


MODELS = (  # the published sizes of TinyLlama and Llama 2
    transformer("1 B", 2048, 22, 5632, 256, 32000),
    transformer("7 B", 4096, 32, 11008, 4096, 32000),
    transformer("13 B", 5120, 40, 13824, 5120, 32000),
    transformer("70 B", 8192, 80, 28672, 1024, 32000),
)
SEVEN = MODELS[1]


@dataclass(frozen=True)
class Device:
    """What is assumed of a device.

    Attributes:
        memory: GB.
        intra: GB a second that it sends to devices of its node.
        inter: GB a second that it sends to other nodes.
    """

    memory: float = 80
    intra: float = 450
    inter: float = 50

    def seconds(self, layout: Layout, sizes: dict[str, float]) -> float:
        """Return how long sending takes, one group of devices after the other.

        Args:
            layout: tensor parallelism is innermost, replicas are outermost, and ranks that share a perturbation are
                neighbours.
            sizes: bytes for each group.
        """
        reach = {"tensor": layout.tensor, "ascent": int(layout.sync)}
        reach["shard"] = reach["tensor"] * layout.shards
        reach["replica"] = reach["shard"] * layout.replicas
        return sum(size / GB / (self.intra if reach[axis] <= NODE else self.inter) for axis, size in sizes.items())


def modes(devices: int) -> dict[str, tuple[Layout, Precision]]:
    """Return the modes of the page on so many devices."""
    ddp, fsdp = Layout("ddp", replicas=devices), Layout("fsdp", shards=devices)
    found = {
        "DDP": (ddp, FULL),
        "DDP, `sync_ascent=False`": (replace(ddp, sync=False), FULL),
        "DDP, `sync_ascent=8`": (replace(ddp, sync=8), FULL),
        "FSDP2": (fsdp, MIXED),
        "FSDP2, no reshard": (replace(fsdp, reshard=False), MIXED),
    }
    for shards in (NODE, 8 * NODE):
        if devices > shards:
            found[f"HSDP, {shards} shards"] = (replace(fsdp, replicas=devices // shards, shards=shards), MIXED)
    if devices > TENSOR:
        found[f"FSDP2 × TP {TENSOR}"] = (replace(fsdp, shards=devices // TENSOR, tensor=TENSOR), MIXED)
    return found


def expected(setting: Setting) -> dict[str, Any]:
    """Return what the formulas say of a setting that is counted, in the form of ``scale_count.count``."""
    layout, precision = setting.layout, setting.precision
    calls = traffic(
        SMALL, layout, setting.method, precision, tokens=SAMPLES, micro_batches=setting.micro_batches
    )  # fmt: skip
    bytes_held = held(SMALL, layout, setting.method, precision)
    found: dict[str, Any] = {
        "calls": sorted([*key, size, times] for (key, size), times in calls.items()),
        "between steps": bytes_held["state"] + bytes_held["kept"],
        "during the last pass": bytes_held["copies"],
    }
    if layout.kind == "ddp":
        found["buckets"] = bytes_held["buckets"]
    elif layout.tensor == 1:
        ran = 1 if layout.reshard else SMALL.blocks
        after = 0 if layout.reshard else SMALL.blocks
        found["gathered"] = gathered(SMALL, layout, precision, ran)
        found["gathered after forward"] = gathered(SMALL, layout, precision, after, root=not layout.root_too)
        found["blocks at once"] = blocks_at_once(SMALL, layout)
    return found


def rows_of(world: int, counts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the record of what was counted with so many processes, beside the formulas."""
    return [
        {"processes": world, "mode": s.name, "method": s.method.name, "steps": len(s.method.passes),
         "counted": found, "formula": expected(s)}
        for s, found in zip(settings(world), counts, strict=True)
    ]  # fmt: skip


def check(rows: list[dict[str, Any]]) -> None:
    """Compare what was counted with the formulas.

    Args:
        rows: of the record.

    Raises:
        AssertionError: if any number differs.
    """
    wrong = [row for row in rows if row["counted"] != row["formula"]]
    for row in wrong:
        print(f"{row['mode']}, {row['method']}:\n  counted {row['counted']}\n  formula {row['formula']}")
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(rows)} settings are not what the formulas say")


# Tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def counted_table(record: dict[str, Any]) -> str:
    """Return what was counted, in one step on average, beside the formulas."""
    rows = []
    for row in record["settings"]:
        numbers = []
        for source in (row["counted"], row["formula"]):
            times = sum(times for *_, times in source["calls"]) / row["steps"]
            size = sum(size * times for *_, size, times in source["calls"]) / row["steps"]
            held_now = source["between steps"] + source["during the last pass"] + source.get("gathered", 0)
            numbers.append((f"{times:g}", f"{size:g}", f"{held_now:,}".replace(",", " ")))
        (times, size, now), (times2, size2, now2) = numbers
        rows.append([row["mode"], f"`{row['method']}`", times, times2, size, size2, now, now2])
    head = ["mode", "method", "collectives", "formula", "bytes", "formula", "bytes held", "formula"]
    return table(head, rows)


def memory_table(device: Device) -> str:
    """Return the memory per device: plain training, then SAM."""
    rows = []
    for model in MODELS:
        for devices in DEVICES:
            cells = [f"{model.name}, {devices}"]
            known = modes(devices)
            for mode in ("DDP", "FSDP2", "FSDP2, no reshard", f"HSDP, {NODE} shards", f"HSDP, {8 * NODE} shards"):
                if mode not in known:
                    cells.append("")
                    continue
                layout, precision = known[mode]
                plain, sam = (total(model, layout, METHODS[name], precision) for name in ("plain", "sam"))
                cells.append(f"{amount(plain)} → {amount(sam)}" + (" ✗" if sam > device.memory else ""))
            rows.append(cells)
    head = ["parameters, devices", "DDP", "FSDP2", "FSDP2, no reshard", f"HSDP, {NODE} shards"]
    return table([*head, f"HSDP, {8 * NODE} shards"], rows)


def amount(value: float) -> str:
    """Return a number with about three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def total(model: Model, layout: Layout, method: Method, precision: Precision) -> float:
    """Return the GB held by a device."""
    return sum(held(model, layout, method, precision).values()) / GB


def per_step(model: Model, layout: Layout, method: Method, precision: Precision) -> tuple[dict[str, float], float]:
    """Return, for one step on average, the bytes sent over each group of devices, and the number of collectives."""
    calls, steps = traffic(model, layout, method, precision, tokens=TOKENS), len(method.passes)
    sizes = {axis: size / steps for axis, size in sent(calls, layout.axes).items()}
    return sizes, sum(calls.values()) / steps


def traffic_table(device: Device, devices: int = 512) -> str:
    """Return what a device sends in a step of 7 B parameters, relative to plain training in the same mode."""
    names = [name for name in METHODS if name != "plain"]
    rows = []
    for mode, (layout, precision) in modes(devices).items():
        plain, calls = per_step(SEVEN, layout, METHODS["plain"], precision)
        base, cells = sum(plain.values()), []
        for name in names:
            if layout.sync is not True and name in ("gsam", "looksam"):
                cells.append("refused")
                continue
            sizes, _ = per_step(SEVEN, layout, METHODS[name], precision)
            cells.append(f"{sum(sizes.values()) / base:.2f}")
        _, twice = per_step(SEVEN, layout, METHODS["sam"], precision)
        rows.append([mode, amount(base / GB), f"{calls:g} → {twice:g}", *cells])
    head = ["mode", "GB sent, plain", "collectives, plain → `sam`", *(f"`{name}`" for name in names)]
    return table(head, rows)


def time_table(device: Device) -> str:
    """Return how long what SAM sends beyond plain training takes to send."""
    known = list(dict.fromkeys(mode for devices in DEVICES for mode in modes(devices)))
    rows = []
    for model in MODELS:
        for devices in DEVICES:
            cells = [f"{model.name}, {devices}"]
            for mode in known:
                if mode not in modes(devices):
                    cells.append("")
                    continue
                layout, precision = modes(devices)[mode]
                plain, sam = (
                    device.seconds(layout, per_step(model, layout, METHODS[name], precision)[0])
                    for name in ("plain", "sam")
                )
                cells.append(f"{amount(sam - plain)} ({amount(plain)})")
            rows.append(cells)
    return table(["parameters, devices", *known], rows)


def held_table() -> str:
    """Return the bytes per parameter that a method adds, on a device that holds 1 / n of the parameters."""
    rows = []
    for name, method in METHODS.items():
        size = FULL.weight
        rows.append(
            [f"`{name}`", f"{method.mean_passes:.2f}", f"{size * method.copies} / n", f"{size * method.kept} / n"]
        )
    return table(["method", "passes", "bytes per parameter, during the last pass", "bytes, between steps"], rows)


def tables(record: dict[str, Any], device: Device) -> dict[str, str]:
    """Return the tables of the page by their markers."""
    return {
        "counted": counted_table(record),
        "held": held_table(),
        "memory": memory_table(device),
        "traffic": traffic_table(device),
        "time": time_table(device),
    }


def filled(page: str, record: dict[str, Any], device: Device) -> str:
    """Return the page with its tables made anew.

    Args:
        page: as it is.
        record: what was counted.
        device: what is assumed of one.

    Raises:
        ValueError: if the page lacks the markers of a table.
    """
    for name, text in tables(record, device).items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.S)
        if not between.search(page):
            raise ValueError(f"the page has no place for the table {name!r}")
        page = between.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    return page


# Picture


def draw(device: Device, file: Path, devices: int = 64) -> None:
    """Draw memory per device and bytes sent, by mode, for 7 B parameters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    known = modes(devices)
    labels = [mode.replace("`", "").replace(", ", ",\n") for mode in known]
    ink = ("#777777", "#BBBBBB", "#56B4E9", "#E69F00", "#D55E00")
    groups = (("weights",), ("gradients", "buckets"), ("state",), ("gathered",), ("copies",))
    names = ("weights", "gradients (DDP: and buckets)", "state of AdamW", "gathered weights", "SAM's exact copy of w")
    bottoms = [0.0] * len(known)
    for colour, group, name in zip(ink, groups, names, strict=True):
        heights = []
        for layout, precision in known.values():
            bytes_held = held(SEVEN, layout, METHODS["sam"], precision)
            heights.append(sum(bytes_held[key] for key in group) / GB)
        left.barh(labels, heights, left=bottoms, color=colour, label=name, height=0.7)
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    left.axvline(device.memory, color="#222222", linestyle=(0, (4, 2)), linewidth=1)
    left.set_title("GB held by a device, SAM (dashed: 80 GB)", loc="left", fontsize=10.5)
    left.legend(fontsize=8, frameon=False, loc="lower right")
    shown = {"plain, msam": "plain", f"looksam, every-k ({EVERY})": "every-k", "sam": "sam"}
    ink = ("#777777", "#56B4E9", "#D55E00")
    for number, (label, name) in enumerate(shown.items()):
        heights = [sum(per_step(SEVEN, at, METHODS[name], p)[0].values()) / GB for at, p in known.values()]
        places = [row + (number - 1) * 0.26 for row in range(len(known))]
        bars = right.barh(places, heights, color=ink[number], label=label, height=0.24)
        plain = [sum(per_step(SEVEN, at, METHODS["plain"], p)[0].values()) / GB for at, p in known.values()]
        ratios = [f"×{height / base:.2f}" for height, base in zip(heights, plain, strict=True)]
        right.bar_label(bars, ratios, fontsize=7, padding=2)
    right.set_yticks(range(len(known)), labels)
    right.set_title("GB sent by a device in a step, and times plain training", loc="left", fontsize=10.5)
    right.legend(fontsize=8, frameon=False, loc="lower right")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.suptitle(f"7 B parameters on {devices} devices, on paper", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(file, format="png")


def main() -> None:
    """Parse; count, or write the page."""
    usual = Device()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", action="store_true", help="count in 2 and 4 processes, and write the record")
    parser.add_argument("--print", action="store_true", help="print the tables, and write nothing")
    parser.add_argument("--memory", type=float, default=usual.memory, help="GB of a device")
    parser.add_argument("--intra", type=float, default=usual.intra, help="GB/s that a device sends inside its node")
    parser.add_argument("--inter", type=float, default=usual.inter, help="GB/s that a device sends to other nodes")
    arguments = parser.parse_args()
    device = Device(arguments.memory, arguments.intra, arguments.inter)
    if device != usual and not arguments.print:
        parser.error("the page holds the usual assumptions: for others, add --print")
    if arguments.count:
        rows = [row for world in WORLDS for row in rows_of(world, counted(world))]
        check(rows)
        lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
        RECORD.write_text(f'{{"torch": "{torch.__version__}", "backend": "gloo", "settings": [\n  {lines}\n]}}\n')
        print(f"{len(rows)} settings counted, all as the formulas say")
    record = json.loads(RECORD.read_text())
    if arguments.print:
        print("\n\n".join(tables(record, device).values()))
        return
    PAGE.write_text(filled(PAGE.read_text(), record, device))
    draw(device, PICTURE)


if __name__ == "__main__":
    main()

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
from scale_formula import Layout, Model, Precision, blocks_at_once, gathered, held, methods, sent, traffic

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
            layout: of the devices.
            sizes: bytes for each group.
        """
        return sum(
            size / GB / (self.intra if layout.reach(axis) <= NODE else self.inter) for axis, size in sizes.items()
        )


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
    many = setting.micro_batches
    calls = traffic(SMALL, layout, setting.method, precision, tokens=SAMPLES, micro_batches=many)
    bytes_held = held(SMALL, layout, setting.method, precision)
    found: dict[str, Any] = {
        "calls": sorted([*key, size, times] for (key, size), times in calls.items()),
        # Gradients that are views of the buckets stay as long as these.
        "between steps": bytes_held["state"] + bytes_held["kept"] + layout.views * bytes_held["gradients"],
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


def amount(value: float) -> str:
    """Return a number with about three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def counted_table(record: dict[str, Any]) -> str:
    """Return what was counted, in one step on average, beside the formulas."""
    rows = []
    for row in record["settings"]:
        cells: list[list[str]] = []
        for source in (row["counted"], row["formula"]):
            times = sum(times for *_, times in source["calls"]) / row["steps"]
            size = sum(size * times for *_, size, times in source["calls"]) / row["steps"]
            beside = source["between steps"] + source["during the last pass"]
            whole = source.get("gathered", source.get("buckets"))
            cells.append([f"{times:g}", f"{size:g}", str(beside), "" if whole is None else str(whole)])
        rows.append([row["mode"], f"`{row['method']}`", *("**≠**" if a != b else f"{a} = {b}" if a else ""
                                                         for a, b in zip(*cells, strict=True))])  # fmt: skip
    return table(["mode", "method", "collectives", "bytes", "held beside weights", "gathered, or buckets"], rows)


def total(model: Model, layout: Layout, name: str, precision: Precision) -> float:
    """Return the GB held by a device."""
    return sum(held(model, layout, METHODS[name], precision).values()) / GB


def memory_table(device: Device) -> str:
    """Return the memory per device: plain training, then SAM."""
    shown = ("DDP", "FSDP2", "FSDP2, no reshard", f"HSDP, {NODE} shards", f"HSDP, {8 * NODE} shards")
    rows = []
    for model in MODELS:
        for devices in DEVICES:
            known, cells = modes(devices), []
            for mode in shown:
                if mode not in known:
                    cells.append("")
                    continue
                plain, sam = (total(model, known[mode][0], name, known[mode][1]) for name in ("plain", "sam"))
                cells.append(f"{amount(plain)} → {amount(sam)}" + (" ✗" if sam > device.memory else ""))
            layout, precision = known["FSDP2"]
            most = total(model, layout, "looksam", precision)
            cells.append(amount(most) + (" ✗" if most > device.memory else ""))
            rows.append([f"{model.name}, {devices}", *cells])
    return table(["parameters, devices", *shown, "FSDP2, `looksam`"], rows)


def per_step(model: Model, layout: Layout, name: str, precision: Precision) -> tuple[dict[str, float], float]:
    """Return, for one step on average, the bytes sent over each group of devices, and the number of collectives."""
    method = METHODS[name]
    calls, steps = traffic(model, layout, method, precision, tokens=TOKENS), len(method.passes)
    sizes = {axis: size / steps for axis, size in sent(calls, layout.axes).items()}
    return sizes, sum(calls.values()) / steps


def traffic_table(devices: int = 512) -> str:
    """Return what a device sends in a step of 7 B parameters, relative to plain training in the same mode."""
    names = [name for name in METHODS if name != "plain"]
    rows = []
    for mode, (layout, precision) in modes(devices).items():
        plain, calls = per_step(SEVEN, layout, "plain", precision)
        cells = []
        for name in names:
            if layout.sync is not True and name in ("gsam", "looksam"):
                cells.append("refused")
                continue
            cells.append(f"{sum(per_step(SEVEN, layout, name, precision)[0].values()) / sum(plain.values()):.2f}")
        twice = per_step(SEVEN, layout, "sam", precision)[1]
        rows.append([mode, amount(sum(plain.values()) / GB), f"{calls:g} → {twice:g}", *cells])
    return table(["mode", "GB, plain", "collectives, plain → `sam`", *(f"`{name}`" for name in names)], rows)


def extra_seconds(model: Model, layout: Layout, name: str, precision: Precision, device: Device) -> float:
    """Return how long it takes to send what a method sends beyond plain training."""
    both = [device.seconds(layout, per_step(model, layout, which, precision)[0]) for which in (name, "plain")]
    return both[0] - both[1]


def time_table(device: Device) -> str:
    """Return how long what SAM sends beyond plain training takes to send, where the model has room."""
    shown = list(dict.fromkeys(mode for devices in DEVICES for mode in modes(devices)))
    rows = []
    for model in MODELS:
        for devices in DEVICES:
            known, cells = modes(devices), []
            for mode in shown:
                room = mode in known and total(model, known[mode][0], "sam", known[mode][1]) <= device.memory
                cells.append(
                    amount(extra_seconds(model, known[mode][0], "sam", known[mode][1], device)) if room else ""
                )
            rows.append([f"{model.name}, {devices}", *cells])
    return table(["parameters, devices", *shown], rows)


def methods_table() -> str:
    """Return what a method adds to the numbers of a pass."""
    rows = []
    for name, method in METHODS.items():
        steps = [f"{norms + votes}" for norms, votes in zip(method.norms, method.verdicts, strict=True)]
        singles = steps[0] if len(set(steps)) == 1 else f"{steps[0]}, then {steps[1]}"
        size = FULL.weight
        rows.append(
            [f"`{name}`", f"{method.mean_passes:g}", str(size * method.copies), str(size * method.kept), singles]
        )
    return table(["method", "passes", "bytes during the last pass", "bytes between steps", "single numbers"], rows)


def tables(record: dict[str, Any], device: Device) -> dict[str, str]:
    """Return the tables of the page by their markers."""
    return {
        "methods": methods_table(),
        "memory": memory_table(device),
        "traffic": traffic_table(),
        "time": time_table(device),
        "counted": counted_table(record),
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
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.S)
        if not place.search(page):
            raise ValueError(f"the page has no place for the table {name!r}")
        page = place.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    return page


# Picture

HELD = {
    "weights": ("#555555", ("weights",)),
    "gradients, and buckets of DDP": ("#AAAAAA", ("gradients", "buckets")),
    "state of AdamW": ("#56B4E9", ("state",)),
    "gathered weights": ("#E69F00", ("gathered",)),
    "SAM's copy of w": ("#D55E00", ("copies",)),
}
SENT = {
    "plain, msam": ("#777777", "plain"),
    f"every-k, k = {EVERY}": ("#0072B2", "every-k"),
    "sam": ("#D55E00", "sam"),
}


def draw(device: Device, file: Path, model: Model = MODELS[2], devices: int = 64) -> None:
    """Draw memory per device and bytes sent, by mode."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    known = modes(devices)
    draw_memory(left, device, model, {mode: at for mode, at in known.items() if "sync" not in mode})
    draw_traffic(right, model, known)
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, framealpha=1, edgecolor="none", loc="lower right")
    title = f"{model.name} parameters on {devices} devices, on paper"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(file, format="png")


def draw_memory(axes: Any, device: Device, model: Model, known: dict[str, tuple[Layout, Precision]]) -> None:
    """Draw what a device holds under SAM; what leaves the picture is cut, and its size written."""
    limit = 1.1 * device.memory
    ends = [0.0] * len(known)
    for label, (colour, parts) in HELD.items():
        sizes = [held(model, layout, METHODS["sam"], precision) for layout, precision in known.values()]
        widths = [sum(found[part] for part in parts) / GB for found in sizes]
        axes.barh(range(len(known)), widths, left=ends, color=colour, label=label, height=0.7)
        ends = [a + b for a, b in zip(ends, widths, strict=True)]
    for row, end in enumerate(ends):
        inside = end > limit
        axes.text(min(end, limit) - inside, row, f" {amount(end)}", ha="right" if inside else "left", va="center",
                  fontsize=8)  # fmt: skip
    axes.axvline(device.memory, color="#222222", linestyle=(0, (4, 2)), linewidth=1)
    axes.set_xlim(0, limit)
    axes.set_yticks(range(len(known)), [mode.replace(", ", ",\n") for mode in known])
    axes.set_title(f"GB held by a device under SAM (dashed: {device.memory:g} GB)", loc="left", fontsize=10.5)


def draw_traffic(axes: Any, model: Model, known: dict[str, tuple[Layout, Precision]]) -> None:
    """Draw what a device sends in a step, pale where it stays inside the node."""
    for number, (label, (colour, name)) in enumerate(SENT.items()):
        places = [row + (number - 1) * 0.26 for row in range(len(known))]
        whole, far, ratios = [], [], []
        for layout, precision in known.values():
            sizes = per_step(model, layout, name, precision)[0]
            plain = sum(per_step(model, layout, "plain", precision)[0].values())
            whole.append(sum(sizes.values()) / GB)
            far.append(sum(size for axis, size in sizes.items() if layout.reach(axis) > NODE) / GB)
            ratios.append(f"× {sum(sizes.values()) / plain:.2f}")
        bars = axes.barh(places, whole, color=colour, height=0.24, alpha=0.35)
        axes.barh(places, far, color=colour, height=0.24, label=label)
        axes.bar_label(bars, ratios, fontsize=7, padding=2)
    axes.set_yticks(range(len(known)), [mode.replace("`", "").replace(", ", ",\n") for mode in known])
    title = "GB sent by a device in a step (pale: inside its node)\nand how many times that of plain training"
    axes.set_title(title, loc="left", fontsize=10.5)


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

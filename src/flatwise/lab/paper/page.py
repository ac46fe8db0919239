"""The page docs/reproduction.md, written from the records, so that no number in it is typed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatwise.lab.paper.findings import Findings, Judged, find
from flatwise.lab.paper.layout import cells_of, choices_of, claims_of, quantities_of, ranks_of
from flatwise.lab.paper.small import STUDIES
from flatwise.lab.paper.spectra import spectra_findings
from flatwise.lab.paper.store import Stored, read_record
from flatwise.lab.paper.study import Study

HEAD = """\
# The paper's experiments, at a small size

Foret et al. (*Sharpness-Aware Minimization for Efficiently Improving Generalization*, ICLR 2021) and two later papers
make claims; this page says which of them hold here, on two CPU cores, with subsets of Fashion-MNIST and small
networks. It is written by `flatwise reproduce --page` from the records in
[results/reproduction](results/reproduction), and a test checks that it says what they say. What a row of the paper
takes at its own size says `flatwise reproduce --list`.

```bash
flatwise reproduce table4              # trains what is missing, and prints the table
flatwise reproduce table4 --seeds 2    # shorter, with wider intervals
flatwise reproduce all                 # every study of this page
```

A command that was stopped goes on where it was.

**The protocol is the paper's.** A tenth of the training images, with right labels, is held out. On it the learning
rate and the weight decay are chosen for the base optimizer alone; SAM takes them over, and only its rho is chosen.
The base is also trained for twice the epochs, since a SAM step costs two gradients, and the better on the held-out
tenth is what every table shows. Two seeds choose; five others are reported, the same for every method: weights,
split, wrong labels and order.

**Reading the tables.** A cell has the paper's number (as printed), ours, and the paired difference from the base,
each with its 95 % interval over the seeds (Student's t). *Confirmed* means that the whole interval has the claimed
sign, *not confirmed* that it has the other one, *not decided* that it has both. For "the same" the interval must lie
within the margin that is stated. A claim about several settings is confirmed where it is in all of them, and not
confirmed where it fails in one. A claim "beyond" a place was made there for right labels, and not for wrong ones.
Numbers of different sizes are not comparable; their signs are. The intervals cover the seeds, not the choice of data
and network. Times are of a machine that did other work too; gradients a step are counted.
"""


FULL = """\
## At the paper's own size

None of this has been run here: it takes GPUs and CIFAR, SVHN or ImageNet.

```bash
flatwise reproduce --list                                        # data, steps and hours of every row
flatwise reproduce table1 --list                                 # of one table, with a step timed on this machine
flatwise reproduce table1 wrn28-10-basic --scale full            # one row, with the paper's five seeds
flatwise reproduce table4 sam --scale full --data-root data --seeds 2
flatwise reproduce table3 pets --scale full --tune               # rho chosen on a held-out tenth first
```

The settings are the recipes' (`flatwise recipes`), with the radii that the paper prints; `--tune` chooses rho anew, as
the paper did, from its six radii and with a seed of its own. For Table 3 that is the only way to the paper's protocol:
it does not print those radii, and the recipes have 0.05. The base also trains for twice the epochs where the paper says
so, and of the two the better test error counts, as the paper reports it. The numbers of seeds are the paper's, twenty
for Table 11.

A line of the table has the paper's number, ours, the difference from the base and whether that confirms the claim, the
gradients a step and the hours of a training. Beside the error stand the top-5 error (Table 2), the sharpness (Table
11), the cosine between the two updates (c4), m-sharpness and the generalisation gap (m), and the Hessian's eigenvalues
(spectra), which are measured when the trainings have finished. What is compared with another row, as Table 4 is with
its row `sgd`, needs that row's trainings too. A cell whose trainings have not all finished is said to be missing, and
one whose loss became infinite to have broken down. In c5 no row is the base: its differences are left to the reader,
and so is the correlation of m-sharpness with the gap in m, which the small size computes.

The trainings of a row run one after the other, on one GPU; give each of several GPUs a row of its own
(`CUDA_VISIBLE_DEVICES`). A row that was stopped goes on, and the numbers go to `runs/reproduce/records`.
"""


def page_of(records: Path, spectra: Path) -> str:
    """Write the page.

    Args:
        records: folder with one record a study.
        spectra: the record of the spectra.

    Returns:
        Markdown.
    """
    sections, summary = [], []
    for name, study in STUDIES.items():
        stored = read_record(records / f"{name}.json", study)
        if stored is None:
            sections.append(f"## {study.title}\n\n{study.paper}. Not run yet: `flatwise reproduce {name}` runs it.")
            continue
        findings = find(stored.record)
        picture = f"results/reproduction/{name}.png" if (records / f"{name}.png").exists() else None
        sections.append(_section(study, stored, findings, picture))
        summary += [(study.title, claim) for claim in findings.claims]
    if spectra.exists():
        findings = spectra_findings(json.loads(spectra.read_text(encoding="utf-8")))
        sections.append(_spectra(findings))
        summary += [("Hessian spectra", claim) for claim in findings.claims]
    return "\n\n".join([HEAD.strip(), _summary(summary), *sections, FULL.strip()]) + "\n"


def _summary(claims: Sequence[tuple[str, Judged]]) -> str:
    counts: dict[str, int] = {}
    for _, claim in claims:
        counts[str(claim.verdict)] = counts.get(str(claim.verdict), 0) + 1
    words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    lines = ["| study | claim | here |", "| --- | --- | --- |"]
    lines += [f"| {title} | {claim.text} | **{claim.verdict}** |" for title, claim in claims]
    return f"## All claims\n\nOf {len(claims)} claims: {words}.\n\n" + "\n".join(lines)


def _section(study: Study, stored: Stored, findings: Findings, picture: str | None) -> str:
    about = stored.about
    parts = [f"## {study.title}", f"{study.paper}. `flatwise reproduce {study.name}`. {_cost(stored)}"]
    parts.append(claims_of(findings).markdown())
    versus = study.versus or study.settings[0].arms[0].name
    parts.append(f"Cells: {findings.quantity}; the difference is from {versus}.")
    parts.append(cells_of(findings).markdown())
    parts += [grid.markdown() for grid in (quantities_of(findings), ranks_of(findings)) if grid is not None]
    if picture is not None:
        parts.append(f"![{study.title}]({picture})")
    parts.append("Chosen on the held-out tenth:\n\n" + choices_of(findings).markdown())
    parts.append("Where this differs from the paper:\n\n" + "\n".join(f"- {text}." for text in study.differs))
    parts.append(f"Record: [{study.name}.json](results/reproduction/{study.name}.json), {_versions(about)}.")
    return "\n\n".join(parts)


def _cost(stored: Stored) -> str:
    record, about = stored.record, stored.about
    seconds = sum(line["seconds"] or 0 for line in record.lines)
    seeds = ", ".join(map(str, record.seeds))
    wall = about.get("wall_seconds")
    beside = "" if not wall else f", {wall / 60:.0f} minutes of wall time for those that no study above had made"
    return f"Seeds {seeds}; {len(record.lines)} trainings, {seconds / 60:.0f} minutes on one core together{beside}."


def _versions(about: Mapping[str, Any]) -> str:
    environment = about.get("environment", {})
    packages = environment.get("packages", {})
    workers = environment.get("workers")
    return f"torch {packages.get('torch')}, {environment.get('processor')}, {workers} trainings at a time"


def _spectra(findings: Findings) -> str:
    parts = [
        "## Hessian spectra",
        "Figure 3, left. `flatwise reproduce spectra` runs `benchmarks/spectra.py`, which has a page of its own: "
        "[spectra.md](spectra.md), with the picture, all numbers, and in what it differs.",
        claims_of(findings).markdown(),
    ]
    return "\n\n".join(parts)

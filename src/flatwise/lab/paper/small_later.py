"""Claims of later papers, at a size for two CPU cores: SAM late in training, and Momentum-SAM."""

from __future__ import annotations

from flatwise.lab.paper.small_parts import CLEAN, NOISY, SAM, SGD, SIZES, SMALL, apart, as_sam, radii
from flatwise.lab.paper.study import Arm, Claim, Setting, Study

LATE = Study(
    name="late-phase",
    title="SAM in the last part of training only",
    paper="Zhou et al., ICLR 2025 (arXiv 2410.10373)",
    settings=tuple(
        Setting(
            name,
            {**SMALL, "label_noise": noise},
            (
                SGD,
                SAM,
                *(as_sam(f"SAM, {words}", f"sam:window=({start},{stop})") for words, start, stop in (
                    ("last half", 0.5, 1.0), ("last quarter", 0.75, 1.0), ("last tenth", 0.9, 1.0),
                    ("first half", 0.0, 0.5))),
            ),
        )
        for name, noise in ((CLEAN, 0.0), (NOISY, 0.4))
    ),
    claims=apart(
        *(Claim(f"SAM in the {part} of training is better than SGD", "Zhou et al., Figure 1", f"SAM, {part}", "SGD")
          for part in ("last half", "last quarter", "last tenth")),
        *(Claim(f"SAM in the {part} of training is as good as SAM throughout, to half a point", "Zhou et al., Figure 1",
                f"SAM, {part}", "SAM", "same", margin=0.5) for part in ("last half", "last quarter", "last tenth")),
        Claim("SAM late is better than SAM early", "Zhou et al., section 3", "SAM, last half", "SAM, first half"),
    ),
    differs=SIZES,
)  # fmt: skip


MSAM = Study(
    name="msam",
    title="Momentum-SAM at the base's cost",
    paper="Becker, Altrock, Risse (arXiv 2401.12033), Table 1",
    settings=tuple(
        Setting(
            name,
            {**SMALL, "label_noise": noise},
            (SGD, SAM, Arm("MSAM", {"method": "msam"}, radii(0.1, 0.3, 1.0, 3.0, 10.0))),
        )
        for name, noise in ((CLEAN, 0.0), (NOISY, 0.4))
    ),
    claims=(
        *apart(
            Claim("Momentum-SAM is better than SGD", "Table 1", "MSAM", "SGD"),
            Claim("SAM is better than Momentum-SAM for the same epochs", "Table 1", "SAM", "MSAM"),
        ),
        Claim("Momentum-SAM costs as many gradients a step as SGD", "Table 1", "MSAM", "SGD", "same",
              of="gradients_per_step", margin=0.01),
    ),
    differs=SIZES,
)  # fmt: skip

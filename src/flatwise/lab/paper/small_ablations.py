"""The ablations of the paper, at a size for two CPU cores: p, m and the second-order term."""

from __future__ import annotations

from flatwise.lab.paper.small_parts import (
    CLEAN,
    KEPT,
    NOISY,
    PLAIN,
    RADII,
    SAM,
    SGD,
    SIZES,
    SMALL,
    apart,
    as_sam,
    radii,
)
from flatwise.lab.paper.study import Arm, Claim, Setting, Study

C5 = Study(
    name="c5",
    title="The norm of the perturbation",
    paper="Appendix C.5, Figure 6",
    settings=tuple(
        Setting(
            name,
            {**SMALL, "label_noise": noise},
            (
                SGD,
                SAM,
                Arm("p = inf", {"method": "lp:p=inf"}, radii(0.0001, 0.0003, 0.001, 0.003)),
                Arm("p = 1", {"method": "lp:p=1"}, radii(0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)),
                # rho times the root of the number of weights, 455, is the length of the perturbation.
                Arm("random", {"method": "random:filter_scaled=False:noise_seed={seed}"},
                    radii(0.0003, 0.001, 0.003, 0.01, 0.02, 0.05)),
            ),
        )
        for name, noise in ((NOISY, 0.4), (CLEAN, 0.0))
    ),
    claims=apart(
        Claim("p = 2 is better than p = infinity", "Figure 6", "SAM", "p = inf"),
        Claim("p = 2 is better than a random direction", "Figure 6", "SAM", "random"),
        Claim("p = infinity is better than a random direction", "Figure 6", "p = inf", "random"),
        Claim("p = 2 is better than p = 1 (which the paper leaves out)", "section 2", "SAM", "p = 1"),
    ),
    differs=(*SIZES, "the length of the random direction is rho times the root of the number of weights to 0.2 % only"),
)  # fmt: skip


M = Study(
    name="m",
    title="m-sharpness",
    paper="Figure 3, middle and right",
    settings=(
        Setting(
            CLEAN,
            {**PLAIN, "train_size": 2000},
            (
                SGD,
                *(Arm(f"SAM, m = {m}", {"method": "sam", "m": m}, radii(0.005, 0.01, 0.02, 0.05, 0.1))
                  for m in (1, 4, 16, 64)),
                # More networks for the ranking, of more and less generalisation.
                Arm("SGD, rate 0.01", {"method": "base"}, ({"lr": 0.01},)),
                Arm("SGD, rate 0.05", {"method": "base"}, ({"lr": 0.05},)),
                Arm("SGD, decay 0.02", {"method": "base"}, ({"weight_decay": 0.02},)),
                Arm("SGD, batch 256", {"method": "base", "batch_size": 256}),
                Arm("SGD, batch 16", {"method": "base", "batch_size": 16}, ({"lr": 0.01},)),
                Arm("SAM, rho = 0.2", {"method": "sam"}, radii(0.2)),
            ),
        ),
    ),
    claims=(
        Claim("m = 1 is better than m = 64", "Figure 3 middle", "SAM, m = 1", "SAM, m = 64"),
        Claim("m = 4 is better than m = 64", "Figure 3 middle", "SAM, m = 4", "SAM, m = 64"),
        Claim("m = 16 is better than m = 64", "Figure 3 middle", "SAM, m = 16", "SAM, m = 64"),
        Claim("m = 1 is better than m = 16", "Figure 3 middle", "SAM, m = 1", "SAM, m = 16"),
    ),
    measure="by-size",
    quantities=(("m_sharpness_1", "1-sharpness"), ("m_sharpness_64", "64-sharpness"), ("gap", "gap")),
    rank=("m_sharpness_1", "m_sharpness_4", "m_sharpness_16", "m_sharpness_64"),
    differs=(
        "Fashion-MNIST instead of CIFAR-10, 1,800 images to train on and 200 held out instead of 50,000",
        "cnn-plain (two convolutions, two linear layers; no normalisation, for which one sample is too few; 26,698 "
        "weights) instead of a small ResNet",
        *SIZES[2:3],
        "m up to 64, the batch, instead of 256; rho from 0.005 to 0.1 for each m",
        "the ranking is of the trained networks of this study instead of those of the NeurIPS 2020 competition, by "
        "Kendall's tau instead of mutual information; m-sharpness at rho = 0.05 on up to 64 micro-batches of 1,024 "
        "training images",
        "the ranked networks do not all fit their images, as those of the competition do: one that fits less has the "
        "smaller gap and the steeper loss, which alone makes tau negative",
    ),
)  # fmt: skip


M_NOISE = Study(
    name="m-noise",
    title="m-sharpness with wrong labels",
    paper="Figure 3 middle, in the setting of Table 4",
    settings=(
        Setting(
            NOISY,
            {**SMALL, "label_noise": 0.4},
            (
                SGD,
                Arm("SAM, m = 4", {"method": "sam", "m": 4}, radii(0.01, 0.02, 0.05, 0.1, 0.2)),
                Arm("SAM, m = 16", {"method": "sam", "m": 16}, radii(0.05, 0.1, 0.2, 0.5)),
                Arm("SAM, m = 64", {"method": "sam"}, radii(*RADII)),
            ),
        ),
    ),
    claims=(
        Claim("m = 4 is better than m = 64", "beyond Figure 3 middle", "SAM, m = 4", "SAM, m = 64"),
        Claim("m = 16 is better than m = 64", "beyond Figure 3 middle", "SAM, m = 16", "SAM, m = 64"),
        Claim("m = 4 is better than m = 16", "beyond Figure 3 middle", "SAM, m = 4", "SAM, m = 16"),
    ),
    differs=(*SIZES, "40 % wrong labels; m = 4, 16 and 64, the batch; normalisation in a pass is over its m images"),
)  # fmt: skip


C4 = Study(
    name="c4",
    title="The second-order term",
    paper="Appendix C.4, Figures 4 and 5",
    settings=(Setting(CLEAN, SMALL, (SGD, SAM, as_sam("SAM, second order", "second-order"))),),
    claims=(
        Claim("without the second-order term the accuracy is higher", "Figure 5", "SAM", "SAM, second order"),
        Claim("the cosine between the two updates is lower at the end than in the first half", "Figure 4", "SAM", "SAM",
              of="cosine_first_half", of_than="cosine_end"),
    ),
    measure="by-epoch",
    quantities=(
        ("cosine_1", "cosine, epoch 1"), ("cosine_first_half", "cosine, first half"), ("cosine_end", "cosine, end"),
    ),
    kept=KEPT,
    differs=(*SIZES, "the cosine is on eight fixed batches of 64 training images, in evaluation mode"),
)  # fmt: skip

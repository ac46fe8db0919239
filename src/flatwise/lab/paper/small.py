"""The studies at a size for two CPU cores: subsets of Fashion-MNIST, small networks, the paper's protocol.

Every training is cut down from 200 epochs on 50,000 images to 15 on 2,700 (300 more are held out), so that all studies
together take about two hours on two cores. Nothing is augmented except where a study is about that: with so few steps
an augmented small network does not come to fit its images, and SAM has nothing to prevent.
"""

from __future__ import annotations

from flatwise.errors import UnknownNameError
from flatwise.lab.paper.study import Arm, Claim, Fields, Setting, Study

COMMON: Fields = {"dataset": "fashion-mnist", "train_size": 3000, "batch_size": 64, "epochs": 15, "augment": "none"}
SMALL: Fields = {**COMMON, "model": "cnn-small"}
PLAIN: Fields = {**COMMON, "model": "cnn-plain"}
WIDE: Fields = {**COMMON, "model": "wrn-10-1", "train_size": 2000, "epochs": 12}
CLEAN, NOISY = "clean labels", "40 % wrong labels"
KEPT = "1,2,4,6,8,10,12"

RATES: tuple[Fields, ...] = tuple({"lr": lr, "weight_decay": decay} for lr in (0.02, 0.1) for decay in (0.0005, 0.005))
RADII = (0.05, 0.1, 0.2, 0.5, 1.0)


def _radii(*values: float) -> tuple[Fields, ...]:
    return tuple({"rho": value} for value in values)


SGD = Arm("SGD", {"method": "base"}, RATES, twice=True, printed="sgd")
SAM = Arm("SAM", {"method": "sam"}, _radii(*RADII), printed="sam")


def _as_sam(name: str, method: str) -> Arm:
    return Arm(name, {"method": method}, like="SAM")


SIZES = (
    "Fashion-MNIST instead of CIFAR-10, 2,700 images to train on and 300 held out instead of 50,000; 10,000 test it",
    "cnn-small (two convolutions, two linear layers, batch normalisation; 207,098 weights) instead of a residual "
    "network",
    "15 epochs of batch 64 instead of 200 of batch 256; no augmentation",
    "rho from 0.05, 0.1, 0.2, 0.5, 1 instead of 0.01 … 0.5: a smaller network takes a larger radius",
    "learning rate from 0.02, 0.1 and weight decay from 5e-4, 5e-3, chosen for SGD in each setting (two values each: "
    "the best may lie outside); SGD with the momentum of Nesterov, as in the official code",
)

TABLE4 = Study(
    name="table4",
    title="Label noise",
    paper="Table 4",
    table="4",
    settings=tuple(
        Setting(
            f"{noise} %",
            {**SMALL, "label_noise": noise / 100},
            (
                SGD,
                Arm("Mixup", {"method": "base"}, tuple({"mixup": alpha} for alpha in (1.0, 8.0, 16.0, 32.0)),
                    printed="mixup"),
                Arm("Bootstrap", {"method": "base"}, labels_from="SGD"),
                Arm("Bootstrap + Mixup", {"method": "base"}, like="Mixup", labels_from="Mixup",
                    printed="bootstrap-mixup"),
                SAM,
                Arm("Bootstrap + SAM", {"method": "sam"}, like="SAM", labels_from="SAM", printed="bootstrap-sam"),
            ),
            printed=str(noise),
        )
        for noise in (20, 40, 60, 80)
    ),
    claims=(
        Claim("SAM is better than SGD at every noise level", "Table 4", "SAM", "SGD"),
        Claim("SAM is better than Mixup at every noise level", "Table 4", "SAM", "Mixup"),
        Claim("SAM is better than Bootstrap + Mixup at every noise level", "Table 4", "SAM", "Bootstrap + Mixup"),
        Claim("Bootstrap + SAM is better than SAM at every noise level", "Table 4", "Bootstrap + SAM", "SAM"),
        Claim("Bootstrap + SAM is better than Bootstrap + Mixup at every noise level", "Table 4", "Bootstrap + SAM",
              "Bootstrap + Mixup"),
    ),
    differs=(*SIZES, "the bootstrap takes over the learning rate, weight decay, rho and alpha of the first training"),
)  # fmt: skip

RHO = Study(
    name="rho",
    title="Sensitivity to rho",
    paper="Appendix C.3, Tables 8 and 9",
    settings=tuple(
        Setting(
            name,
            {**SMALL, "label_noise": noise},
            (SGD, SAM, *(Arm(f"SAM, rho = {rho:g}", {"method": "sam"}, _radii(rho)) for rho in RADII)),
        )
        for name, noise in ((CLEAN, 0.0), (NOISY, 0.4))
    ),
    claims=(
        Claim("SAM with rho chosen on the held-out tenth is better than SGD", "Table 1, Table 4", "SAM", "SGD"),
        Claim("rho = 0.05 is a solid default: also better than SGD", "Appendix C.3, Table 9", "SAM, rho = 0.05", "SGD"),
        Claim("with wrong labels rho matters: the chosen one is better than 0.05", "Table 8", "SAM", "SAM, rho = 0.05",
              settings=(NOISY,)),
    ),
    kept=KEPT,
    differs=SIZES,
)  # fmt: skip

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
                Arm("p = inf", {"method": "lp:p=inf"}, _radii(0.0001, 0.0003, 0.001, 0.003)),
                Arm("p = 1", {"method": "lp:p=1"}, _radii(0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)),
                # rho times the root of the number of weights, 455, is the length of the perturbation.
                Arm("random", {"method": "random:filter_scaled=False:noise_seed={seed}"},
                    _radii(0.0003, 0.001, 0.003, 0.01, 0.02, 0.05)),
            ),
        )
        for name, noise in ((NOISY, 0.4), (CLEAN, 0.0))
    ),
    claims=(
        Claim("p = 2 is better than p = infinity", "Figure 6", "SAM", "p = inf"),
        Claim("p = 2 is better than a random direction", "Figure 6", "SAM", "random"),
        Claim("p = infinity is better than a random direction", "Figure 6", "p = inf", "random"),
        Claim("p = 2 is better than p = 1 (the paper argues, and does not run it)", "Section 2", "SAM", "p = 1"),
    ),
    differs=(*SIZES, "the length of the random direction is rho times the root of the number of weights to 0.2 % only"),
)  # fmt: skip

TABLE11 = Study(
    name="table11",
    title="Inner ascent steps",
    paper="Table 11, Appendix C.6",
    settings=(
        Setting(
            CLEAN,
            SMALL,
            (SGD, SAM, *(_as_sam(f"SAM, {n} steps", f"multi-step:ascent_steps={n}") for n in (2, 3, 5))),
        ),
    ),
    claims=(
        *(Claim(f"{n} steps change the accuracy by less than half a point", "Table 11", f"SAM, {n} steps", "SAM",
                "same", margin=0.5) for n in (2, 3, 5)),
        *(Claim(f"at the end {n} steps find a higher maximum than 1 step does where 1 step trained", "Table 11",
                f"SAM, {n} steps", "SAM", of="sharpness_own_steps") for n in (2, 3, 5)),
    ),
    measure="by-steps",
    quantities=(("sharpness_own_steps", "rise, own steps"), ("sharpness_common_steps", "rise, 20 steps")),
    differs=(
        *SIZES,
        'the paper\'s "sharpness" is of the error rate of a batch; here it is the rise of the cross-entropy on a batch '
        "of 64, in evaluation mode, mean over eight batches",
    ),
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
                *(Arm(f"SAM, m = {m}", {"method": "sam", "m": m}, _radii(0.02, 0.05, 0.1)) for m in (1, 4, 16, 64)),
                # More networks for the ranking, of more and less generalisation.
                Arm("SGD, rate 0.01", {"method": "base"}, ({"lr": 0.01},)),
                Arm("SGD, rate 0.05", {"method": "base"}, ({"lr": 0.05},)),
                Arm("SGD, decay 0.02", {"method": "base"}, ({"weight_decay": 0.02},)),
                Arm("SGD, batch 256", {"method": "base", "batch_size": 256}),
                Arm("SGD, batch 16", {"method": "base", "batch_size": 16}, ({"lr": 0.01},)),
                Arm("SAM, rho = 0.2", {"method": "sam"}, _radii(0.2)),
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
        "m up to 64, the batch, instead of 256; rho from 0.02, 0.05, 0.1 for each m",
        "the ranking is of the trained networks of this study instead of those of the NeurIPS 2020 competition, by "
        "Kendall's tau instead of mutual information; m-sharpness at rho = 0.05 on up to 64 micro-batches of 1,024 "
        "training images",
    ),
)  # fmt: skip

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
                *(_as_sam(f"SAM, {words}", f"sam:window=({start},{stop})") for words, start, stop in (
                    ("last half", 0.5, 1.0), ("last quarter", 0.75, 1.0), ("last tenth", 0.9, 1.0),
                    ("first half", 0.0, 0.5))),
            ),
        )
        for name, noise in ((CLEAN, 0.0), (NOISY, 0.4))
    ),
    claims=(
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
            (SGD, SAM, Arm("MSAM", {"method": "msam"}, _radii(0.1, 0.3, 1.0, 3.0))),
        )
        for name, noise in ((CLEAN, 0.0), (NOISY, 0.4))
    ),
    claims=(
        Claim("Momentum-SAM is better than SGD", "Table 1", "MSAM", "SGD"),
        Claim("SAM is better than Momentum-SAM for the same epochs", "Table 1", "SAM", "MSAM"),
        Claim("Momentum-SAM costs as many gradients a step as SGD", "Table 1", "MSAM", "SGD", "same",
              of="gradients_per_step", margin=0.01),
    ),
    differs=SIZES,
)  # fmt: skip

C4 = Study(
    name="c4",
    title="The second-order term",
    paper="Appendix C.4, Figures 4 and 5",
    settings=(Setting(CLEAN, SMALL, (SGD, SAM, _as_sam("SAM, second order", "second-order"))),),
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


def _fashion(augment: str, row: str) -> Setting:
    rates = tuple({"lr": lr} for lr in (0.02, 0.1))
    sgd = Arm("SGD", {"method": "base"}, rates, twice=True, printed=f"{row}/base")
    sam = Arm("SAM", {"method": "sam"}, _radii(0.02, 0.05, 0.1), printed=f"{row}/sam")
    return Setting(augment, {**WIDE, "augment": augment}, (sgd, sam), printed="fashion-mnist")


TABLE5 = Study(
    name="table5",
    title="Fashion-MNIST with a small WideResNet",
    paper="Table 5, Fashion-MNIST",
    table="5",
    settings=(_fashion("basic", "wrn28-10-basic"), _fashion("basic+cutout", "wrn28-10-autoaugment")),
    claims=(Claim("SAM is better than SGD", "Table 5", "SAM", "SGD"),),
    differs=(
        "WRN-10-1 instead of WRN-28-10; 1,800 images to train on and 200 held out instead of 60,000; 12 epochs of "
        "batch 64 instead of 200 of batch 256",
        "learning rate from 0.02, 0.1 with weight decay 5e-4; rho from 0.02, 0.05, 0.1 (the paper's table says 0.05)",
    ),
)


STUDIES: dict[str, Study] = {
    study.name: study for study in (TABLE4, RHO, C5, TABLE11, M, LATE, MSAM, C4, TABLE5)
}  # fmt: skip


def small_study(name: str) -> Study:
    """Find a study by its name.

    Args:
        name: such as ``"table4"``.

    Returns:
        The study.

    Raises:
        UnknownNameError: no such study.
    """
    if name not in STUDIES:
        raise UnknownNameError("study", name, STUDIES)
    return STUDIES[name]

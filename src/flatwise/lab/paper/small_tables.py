"""Tables 4, 5 and 11 and the sensitivity to rho, at a size for two CPU cores."""

from __future__ import annotations

from flatwise.lab.paper.small_parts import CLEAN, KEPT, NOISY, RADII, SAM, SGD, SIZES, SMALL, WIDE, apart, as_sam, radii
from flatwise.lab.paper.study import Arm, Claim, Setting, Study

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
    quantities=(("wrong_labels_fitted", "wrong labels learnt, %"),),
    differs=(
        *SIZES,
        "the bootstrap takes over the learning rate, weight decay, rho and alpha of the first training; its wrong "
        "labels are the mistakes of that training",
    ),
)  # fmt: skip


RHO = Study(
    name="rho",
    title="Sensitivity to rho",
    paper="Appendix C.3, Tables 8 and 9",
    settings=tuple(
        Setting(
            name,
            {**SMALL, "label_noise": noise},
            (SGD, SAM, *(Arm(f"SAM, rho = {rho:g}", {"method": "sam"}, radii(rho)) for rho in RADII)),
        )
        for name, noise in ((CLEAN, 0.0), (NOISY, 0.4))
    ),
    claims=(
        Claim("SAM with rho chosen on the held-out tenth is better than SGD", "Table 1, Table 4", "SAM", "SGD"),
        *apart(Claim("rho = 0.05 is a solid default: also better than SGD", "Appendix C.3, Table 9", "SAM, rho = 0.05",
                     "SGD")),
        Claim("with wrong labels rho matters: the chosen one is better than 0.05", "Table 8", "SAM", "SAM, rho = 0.05",
              settings=(NOISY,)),
    ),
    kept=KEPT,
    differs=SIZES,
)  # fmt: skip


TABLE11 = Study(
    name="table11",
    title="Inner ascent steps",
    paper="Table 11, Appendix C.6",
    settings=(
        Setting(
            CLEAN,
            SMALL,
            (SGD, SAM, *(as_sam(f"SAM, {n} steps", f"multi-step:ascent_steps={n}") for n in (2, 3, 5))),
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
        "the claims of higher maxima ask each network for its own steps, as the paper does; asked for 20 steps alike, "
        "the network that was trained with more steps is the flatter one",
        'the paper\'s "sharpness" is of the error rate of a batch; here it is the rise of the cross-entropy on a batch '
        "of 64, in evaluation mode, mean over eight batches",
    ),
)  # fmt: skip


def _fashion(augment: str, row: str) -> Setting:
    rates = tuple({"lr": lr} for lr in (0.02, 0.1))
    sgd = Arm("SGD", {"method": "base"}, rates, twice=True, printed=f"{row}/base")
    sam = Arm("SAM", {"method": "sam"}, radii(0.02, 0.05, 0.1), printed=f"{row}/sam")
    same = Arm("SGD, same epochs", {"method": "base"})
    return Setting(augment, {**WIDE, "augment": augment}, (sgd, same, sam), printed="fashion-mnist")


TABLE5 = Study(
    name="table5",
    title="Fashion-MNIST with a small WideResNet",
    paper="Table 5, Fashion-MNIST",
    table="5",
    settings=(_fashion("basic", "wrn28-10-basic"), _fashion("basic+cutout", "wrn28-10-autoaugment")),
    claims=(
        Claim("SAM is better than SGD, which has the better of once and twice the epochs", "Table 5", "SAM", "SGD"),
        Claim("SAM is better than SGD for the same epochs", "Table 5", "SAM", "SGD, same epochs"),
    ),
    quantities=(("train_accuracy", "accuracy on the training images, %"),),
    differs=(
        "WRN-10-1 instead of WRN-28-10; 1,800 images to train on and 200 held out instead of 60,000; 12 epochs of "
        "batch 64 instead of 200 of batch 256",
        "in so short a training the network does not fit even its own images (see the accuracy on them): what helps is "
        "a longer one, and there is no overfitting for SAM to prevent",
        "learning rate from 0.02, 0.1 with weight decay 5e-4; rho from 0.02, 0.05, 0.1 (the paper's table says 0.05)",
    ),
)

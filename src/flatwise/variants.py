"""The registry: a method by its name is a row of four choices, with what it costs and how solid its evidence is."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, overload

from torch.optim import Optimizer

from flatwise.ascent import Ball, GradientAscent
from flatwise.batching import Batching
from flatwise.bsam import BSAM
from flatwise.descent import Descent, PerturbedGradient
from flatwise.directions import (
    AveragedGradient,
    Direction,
    FriendlyGradient,
    Gradient,
    Momentum,
    Noise,
    PreviousGradient,
)
from flatwise.functional import FunctionalGradient
from flatwise.lora import MergedNoise
from flatwise.mixing import GradientNormPenalty, Renormalised, ReusedPart, SurrogateGap, WeightedSharpness
from flatwise.optimizer import SAM
from flatwise.radius import as_auto
from flatwise.schedule import AdaptiveSchedule, Schedule


@dataclass(frozen=True)
class Variant:
    """A published method as a choice for each slot.

    Attributes:
        name: what to pass to :func:`create`.
        summary: what it changes, in one line.
        slots: the slots it answers differently from SAM.
        rho: default radius, the first one where it sets itself. Radii of different methods are not comparable.
        rho_range: usual radii, for this method.
        passes: gradients computed per step, as a formula where it depends on an option.
        memory: what is kept between steps beyond the base, in units of the parameters; beside it every step needs at
            most one copy of the perturbed weights, and where the gradient at w or the next value of an average is
            kept, that.
        source: author, venue, equation.
        evidence: how solid the claim is that it helps.
        options: default options.
        needs: options without a default.
        direction: what is climbed along.
        descent: what is stepped with.
        schedule: when.
        own: an optimizer of its own, instead of the four.
        adapters: whether it is for models with adapters (LoRA) only.
    """

    name: str
    summary: str
    slots: tuple[str, ...]
    rho: float
    rho_range: tuple[float, float]
    passes: str
    source: str
    evidence: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    needs: tuple[str, ...] = ()
    memory: str = "0"
    direction: type[Direction] = Gradient
    descent: type[Descent] = PerturbedGradient
    schedule: type[Schedule] = Schedule
    own: type[BSAM] | None = None
    adapters: bool = False


def _options(**options: Any) -> Mapping[str, Any]:
    return MappingProxyType(options)


_WIDE = (0.01, 0.5)

_ROWS = (
    Variant("sam", "up the gradient, in a ball of radius rho", (), 0.05, _WIDE, "2",
            "Foret et al., ICLR 2021, eq. 2 and 3", "strong: many groups, many tasks"),
    Variant("asam", "the ball is scaled by |w| + eta", ("ascent",), 0.5, (0.2, 5.0), "2",
            "Kwon et al., ICML 2021, eq. 7 (all parameters; scaled='weights' is the authors' convention)",
            "good: replicated, not everywhere", _options(adaptive=True, eta=0.01)),
    Variant("usam", "no normalisation: eps = rho g", ("ascent",), 0.05, (0.005, 0.5), "2",
            "Andriushchenko and Flammarion, ICML 2022", "mixed: can diverge", _options(normalised=False)),
    Variant("lp", "a ball of another norm: p = 1 ... inf", ("ascent",), 0.05, (1e-4, 1.0), "2", "Foret et al., eq. 2",
            "weak: p = 2 is better in the paper", needs=("p",)),
    Variant("sam-on", "perturbs normalisation layers only", ("ascent",), 0.5, (0.1, 10.0), "about 1.7",
            "Mueller et al., NeurIPS 2023", "good: replicated", _options(only="norm"), ("model",)),
    Variant("layerwise", "every tensor has a ball of its own", ("ascent",), 0.01, (0.001, 0.1), "2",
            "common practice; the radius grows with the number of tensors", "none", _options(scope="tensor")),
    Variant("filterwise", "the ball is scaled by the norm of each filter", ("ascent",), 0.05, (0.005, 0.5), "2",
            "Kwon et al., ICML 2021, filter-wise normalisation", "weak", _options(adaptive="filter", eta=0.01)),
    Variant("msam", "against the base's momentum", ("ascent",), 3.0, (0.3, 10.0), "1",
            "Becker, Altrock, Risse, arXiv 2401.12033", "fair: one group, many models", direction=Momentum),
    Variant("adaptive-msam", "against the base's momentum, scaled by |w| + eta", ("ascent",), 3.0, (0.3, 10.0), "1",
            "Becker, Altrock, Risse, arXiv 2401.12033", "fair: one group", _options(adaptive=True, eta=0.01),
            direction=Momentum),
    Variant("frugal", "against the base's momentum, at a radius that sets itself", ("ascent",), 0.3, (0.3, 10.0),
            "1 + 1/32", "Becker, Altrock, Risse, arXiv 2401.12033; the radius: docs/frugal.md",
            "weak: fifteen small tasks of our own", _options(rho="auto"), direction=Momentum),
    Variant("stale", "up the last step's gradient", ("ascent",), 0.05, _WIDE, "1",
            "Jo, Lim, Lee, arXiv 2503.11147; S2-SAM, NeurIPS 2024", "mixed: three groups for, one against", memory="1",
            direction=PreviousGradient),
    Variant("random", "Gaussian noise, scaled by the norm of each filter", ("ascent",), 0.002, (0.0005, 0.05), "1",
            "Bisla, Wang, Choromanska, AISTATS 2022", "fair: weaker than SAM in two ablations",
            _options(normalised=False), direction=Noise),
    Variant("flat-lora", "noise on the frozen weights below LoRA adapters", ("ascent",), 0.05, (0.01, 0.3), "1",
            "Li et al., ICML 2025 (arXiv 2409.14396)", "fair: one group, language and vision models",
            _options(normalised=False), ("model",), direction=MergedNoise, adapters=True),
    Variant("vasso", "up a running average of gradients", ("ascent",), 0.2, _WIDE, "2",
            "Li and Giannakis, NeurIPS 2023", "weak: one group, small gains", memory="1", direction=AveragedGradient),
    Variant("fsam", "up the gradient minus its running average", ("ascent",), 0.2, _WIDE, "2",
            "Li et al., CVPR 2024", "weak: one group, small gains", memory="1", direction=FriendlyGradient),
    Variant("fisher", "a ball of the diagonal Fisher metric", ("ascent",), 0.05, _WIDE, "2",
            "Kim et al., ICML 2022", "weak: one group", _options(adaptive="fisher", eta=1.0)),
    Variant("multi-step", "several projected ascent steps", ("ascent",), 0.05, _WIDE, "1 + ascent_steps",
            "Foret et al., App. C.6", "weak: no gain in the paper", _options(ascent_steps=2)),
    Variant("pgn", "mixes both gradients: (1 - alpha) g + alpha g'", ("descent",), 0.1, _WIDE, "2",
            "Zhao, Zhang, Hu, ICML 2022", "fair: one group, several models", descent=GradientNormPenalty),
    Variant("wsam", "weighs sharpness by gamma / (1 - gamma)", ("descent",), 0.05, _WIDE, "2",
            "Yue et al., KDD 2023 (decoupled, as the authors' default; decoupled=False couples)",
            "weak: one group", descent=WeightedSharpness),
    Variant("stable", "gives g' the length of g", ("descent",), 0.05, _WIDE, "2",
            "Tan et al., JMLR 2025", "weak: one group", descent=Renormalised),
    Variant("gsam", "removes what of g is orthogonal to g'; rho follows the learning rate", ("descent", "schedule"),
            0.6, (0.04, 0.6), "2", "Zhuang et al., ICLR 2022 (radii of the ViT recipe)", "fair: used in practice",
            _options(rho_min=0.1), descent=SurrogateGap),
    Variant("second-order", "keeps the term that SAM drops", ("descent",), 0.05, _WIDE,
            "2 + one Hessian-vector product", "Foret et al., section 3", "weak: no gain in the paper",
            _options(second_order=True)),
    Variant("functional", "Jacobian at w + eps, output gradient from w", ("descent",), 0.05, _WIDE, "2",
            "Singh et al., ICML 2025", "fair: one group, language models", needs=("model",),
            descent=FunctionalGradient),
    Variant("looksam", "reuses the orthogonal part of g' between SAM steps", ("descent", "schedule"), 0.1, (0.05, 1.0),
            "1 + 1/every", "Liu et al., CVPR 2022 (alpha 0.1 as independent groups find, not the paper's 0.7)",
            "fair: replicated with another alpha", _options(every=5), memory="1", descent=ReusedPart),
    Variant("every-k", "SAM on every k-th step", ("schedule",), 0.05, (0.05, 0.5), "1 + 1/every", "common practice",
            "fair: one vendor report", _options(every=5)),
    Variant("late", "SAM in the last part of training", ("schedule",), 0.05, _WIDE, "1 + last fraction",
            "Zhou et al., ICLR 2025", "good: several lines of work", _options(window=(0.9, 1.0)), ("total_steps",)),
    Variant("warmup-off", "no SAM during the warm-up of the learning rate", ("schedule",), 0.05, _WIDE,
            "2 - warm-up fraction", "Zhao et al., ICML 2024", "good: two groups, ViT", needs=("warmup_steps",)),
    Variant("bernoulli", "SAM on random steps", ("schedule",), 0.05, _WIDE, "1 + probability",
            "SS-SAM; Zhao et al., arXiv 2203.09962", "weak: one group", _options(probability=0.5)),
    Variant("ae-sam", "SAM where the gradient is larger than usual", ("schedule",), 0.05, _WIDE, "1 + about 0.5",
            "Jiang et al., ICLR 2023", "weak: one group, no public code", needs=("total_steps",),
            schedule=AdaptiveSchedule),
    Variant("m-sam", "one perturbation for each m samples", ("batching",), 0.05, _WIDE, "2",
            "Foret et al., section 4.1", "strong: several groups", needs=("micro_batch_size",)),
    Variant("quarter", "the ascent sees a part of the batch", ("batching",), 0.05, _WIDE, "1 + ascent_fraction",
            "Bahri et al., ACL 2022", "good: used in practice", _options(ascent_fraction=0.25)),
    Variant("k-sam", "both passes on the samples with the largest loss", ("batching",), 0.05, _WIDE,
            "2 top_fraction + one forward pass", "Ni et al., arXiv 2210.12864", "weak: not replicated",
            _options(top_fraction=0.5)),
    Variant("esam-sds", "the second pass on the samples whose loss rises most", ("batching",), 0.05, _WIDE,
            "1 + rising_fraction + one forward pass", "Du et al., ICLR 2022", "contradicted: does not replicate",
            _options(rising_fraction=0.5)),
    Variant("bsam", "an optimizer with a Gaussian over the weights", ("own",), 0.01, (0.001, 0.1), "2",
            "Möllenhoff and Khan, ICLR 2023", "fair: one group; calibration", needs=("train_size",), memory="2",
            own=BSAM),
)  # fmt: skip

_VARIANTS = {row.name: row for row in _ROWS}


def list_variants(*, adapters: bool = False) -> list[str]:
    """Return the names of all methods.

    Args:
        adapters: also those for models with adapters (LoRA).

    Returns:
        Names that :func:`create` takes.
    """
    return [name for name, row in _VARIANTS.items() if adapters or not row.adapters]


def variant_info(name: str) -> Variant:
    """Return what is known about a method.

    Args:
        name: one of :func:`list_variants`.

    Returns:
        Its row.

    Raises:
        ValueError: if there is no such method.
    """
    if name not in _VARIANTS:
        near = difflib.get_close_matches(name, _VARIANTS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown method {name!r}.{hint} Known: {', '.join(_VARIANTS)}")
    return _VARIANTS[name]


def _fields(kind: type, *without: str) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)} - set(without)


_PASSED = (
    "rho",
    "model",
    "fresh_masks",
    "grad_scaler",
    "max_grad_norm",
    "sync_ascent",
    "ascent",
    "descent",
    "schedule",
    "batching",
)


@overload
def create(name: Literal["bsam"], base_optimizer: Any, **options: Any) -> BSAM: ...


@overload
def create(name: str, base_optimizer: Optimizer | Sequence[Optimizer], **options: Any) -> SAM: ...


def create(name: str, base_optimizer: Any, **options: Any) -> SAM | BSAM:
    """Make the optimizer of a method.

    Options of every slot are given flat: those of the ball (``p``, ``adaptive``, ``eta``, ``scope``, ``normalised``),
    of the ascent (``ascent_steps``, ``only``, ``scaled``), of the method's direction, descent and schedule, and of the
    batching. So ``create("gsam", base, every=2, adaptive=True, micro_batch_size=32)`` composes four methods.

    Args:
        name: one of :func:`list_variants`.
        base_optimizer: a ready optimizer, or a list of them (see :class:`flatwise.SAM`). ``"bsam"`` is an optimizer
            itself: it takes over the parameters and the learning rate.
        **options: override the method's defaults; or ``rho``, ``model``, ``fresh_masks``, ``grad_scaler``,
            ``max_grad_norm``, ``sync_ascent``, and whole slots (``ascent=``, ``descent=``, ``schedule=``,
            ``batching=``).

    Returns:
        A :class:`flatwise.SAM`; for ``"bsam"`` a :class:`flatwise.BSAM`.

    Raises:
        TypeError: if an option that the method needs is missing, or one is unknown.
    """
    row = variant_info(name)
    missing = [option for option in row.needs if option not in options and not _slot_given(row, option, options)]
    if missing:
        raise TypeError(f"{name!r} needs {', '.join(missing)}: create({name!r}, base, {missing[0]}=...)")
    if row.own is not None:
        return _create_own(row.own, base_optimizer, {"rho": row.rho, **row.options, **options})
    slots: dict[str, list[tuple[type, set[str]]]] = {
        "ascent": [
            (Ball, _fields(Ball)),
            (row.direction, _fields(row.direction)),
            (GradientAscent, (_fields(GradientAscent, "ball", "direction", "steps")) | {"ascent_steps"}),
        ],
        "descent": [(row.descent, _fields(row.descent))],
        "schedule": [(row.schedule, _fields(row.schedule))],
        "batching": [(Batching, _fields(Batching))],
    }
    known = {option for kinds in slots.values() for _, names in kinds for option in names}
    unknown = [option for option in options if option not in known and option not in _PASSED]
    if unknown:
        raise TypeError(_unknown(name, unknown, [*sorted(known), *_PASSED]))
    passed: dict[str, Any] = {
        "rho": row.options.get("rho", row.rho),
        **{k: v for k, v in options.items() if k in _PASSED},
    }
    for slot, kinds in slots.items():
        names = {option for _, fields in kinds for option in fields}
        if slot in options:
            both = sorted(names & set(options))
            if both:
                raise TypeError(f"{slot}= and {', '.join(both)} were both given: put the options into {slot}=")
            continue
        chosen = {k: v for k, v in {**row.options, **options}.items() if k in names}
        parts = [kind(**{_field(k): v for k, v in chosen.items() if k in fields}) for kind, fields in kinds[:2]]
        if slot == "ascent":
            rest = {_field(k): v for k, v in chosen.items() if k in kinds[2][1]}
            passed[slot] = GradientAscent(ball=parts[0], direction=parts[1], **rest)
        else:
            passed[slot] = parts[0]
    auto = as_auto(passed["rho"])
    if auto is not None and auto.start is None and row.direction is not Momentum:
        passed["rho"] = dataclasses.replace(auto, start=row.rho)
    return SAM(base_optimizer, **passed)


def _field(option: str) -> str:
    return "steps" if option == "ascent_steps" else option


def _slot_given(row: Variant, option: str, options: dict[str, Any]) -> bool:
    """Tell whether an option that is needed may be inside a slot that was given as an object."""
    kinds = {"schedule": row.schedule, "batching": Batching, "ascent": Ball}
    return any(slot in options and option in _fields(kind) for slot, kind in kinds.items())


def _unknown(name: str, unknown: list[str], known: list[str]) -> str:
    parts = []
    for option in unknown:
        near = difflib.get_close_matches(option, known, n=1)
        parts.append(f"{option!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return f"{name!r} got unknown options: {', '.join(parts)}. Known: {', '.join(known)}"


def _create_own(kind: type[BSAM], base: Any, options: dict[str, Any]) -> BSAM:
    if isinstance(base, Optimizer):
        shared = {"params", "lr", "weight_decay", "initial_lr", "param_names"} - set(options)
        if "lr" in options:  # what was asked for goes before what the base has
            shared.discard("initial_lr")
        base = [{k: v for k, v in group.items() if k in shared} for group in base.param_groups]
    try:
        return kind(base, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise TypeError(f"{kind.__name__} does not know this option: {error}") from error

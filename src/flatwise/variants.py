"""The registry: a method by its name is a row of four choices."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch.optim import Optimizer

from flatwise.optimizer import SAM


@dataclass(frozen=True)
class Variant:
    """A published method as options of :class:`flatwise.SAM`.

    Attributes:
        name: what to pass to :func:`create`.
        summary: what it changes, in one line.
        slots: the slots it answers differently from SAM.
        rho: default radius. Radii of different methods are not comparable.
        passes: gradients computed per step, as a formula where it depends on an option.
        source: author, venue, equation.
        options: default options.
        needs: options without a default.
    """

    name: str
    summary: str
    slots: tuple[str, ...]
    rho: float
    passes: str
    source: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    needs: tuple[str, ...] = ()


def _options(**options: Any) -> Mapping[str, Any]:
    return MappingProxyType(options)


_ROWS = (
    Variant("sam", "up the gradient, in a ball of radius rho", (), 0.05, "2", "Foret et al., ICLR 2021, eq. 2 and 3"),
    Variant(
        "asam",
        "the ball is scaled by |w| + eta, on every parameter",
        ("ascent",),
        0.5,
        "2",
        "Kwon et al., ICML 2021, eq. 7 (the authors' code scales weights only; here every parameter is scaled)",
        _options(adaptive=True, eta=0.01),
    ),
    Variant("lp", "a ball of another norm: p = 1 ... inf", ("ascent",), 0.05, "2", "Foret et al., eq. 2", needs=("p",)),
    Variant(
        "multi-step",
        "several projected ascent steps",
        ("ascent",),
        0.05,
        "1 + ascent_steps",
        "Foret et al., App. C.6",
        _options(ascent_steps=2),
    ),
    Variant(
        "second-order",
        "keeps the term that SAM drops",
        ("descent",),
        0.05,
        "2 + one Hessian-vector product",
        "Foret et al., section 3",
        _options(second_order=True),
    ),
    Variant(
        "every-k", "SAM on every k-th step", ("schedule",), 0.05, "1 + 1/every", "common practice", _options(every=5)
    ),
    Variant(
        "late",
        "SAM in the last part of training",
        ("schedule",),
        0.05,
        "1 + last fraction",
        "Zhou et al., ICLR 2025",
        _options(window=(0.9, 1.0)),
        ("total_steps",),
    ),
    Variant(
        "m-sam",
        "one perturbation for each m samples",
        ("batching",),
        0.05,
        "2",
        "Foret et al., section 4.1",
        needs=("micro_batch_size",),
    ),
    Variant(
        "quarter",
        "the ascent sees a part of the batch",
        ("batching",),
        0.05,
        "1 + ascent_fraction",
        "Bahri et al., ACL 2022",
        _options(ascent_fraction=0.25),
    ),
)

_VARIANTS = {row.name: row for row in _ROWS}


def list_variants() -> list[str]:
    """Return the names of all methods.

    Returns:
        Names that :func:`create` takes.
    """
    return list(_VARIANTS)


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


def create(name: str, base_optimizer: Optimizer, **options: Any) -> SAM:
    """Make the optimizer of a method.

    Args:
        name: one of :func:`list_variants`.
        base_optimizer: a ready optimizer.
        **options: override the method's defaults; any option of :class:`flatwise.SAM`.

    Returns:
        The optimizer.

    Raises:
        TypeError: if an option that the method needs is missing.
    """
    row = variant_info(name)
    missing = [option for option in row.needs if option not in options]
    if missing:
        raise TypeError(f"{name!r} needs {', '.join(missing)}: create({name!r}, base, {missing[0]}=...)")
    return SAM(base_optimizer, **{"rho": row.rho, **row.options, **options})

"""A measure for each layer, module or block: the same measure, each time about other parameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor
from torch.nn import Module

from flatwise.errors import UserError
from flatwise.measure.data import read_batches
from flatwise.measure.problem import NotInTheLossError
from flatwise.measure.select import Parameters, selected

Result = TypeVar("Result")

KINDS = ("tensor", "module", "block")


def by_group(
    measure: Callable[..., Result],
    model: Module,
    loss_fn: Callable[[Module, Any], Tensor],
    data: Any,
    *,
    groups: str = "module",
    parameters: Parameters = None,
    **options: Any,
) -> dict[str, Result]:
    """Measure each group of parameters by itself, on the same samples.

    For eigenvalues, trace and density that is the diagonal block of the matrix that belongs to the group.

    Args:
        measure: such as :func:`hessian_eigenvalues`.
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        data: one batch, or an iterable of batches.
        groups: ``"tensor"``: each parameter. ``"module"``: those of one module. ``"block"``: those of one child of the
            model. Anything else is a regular expression, searched in the names: what it matches (what its groups match,
            if it has some) is the name of the group; other parameters are left out.
        parameters: which parameters to group; None: all that are trainable.
        **options: of the measure.

    Returns:
        For each group its result, in the order of the parameters. A group that the loss does not depend on is left
        out, with a note in the others.

    Raises:
        NotInTheLossError: if it depends on none of them.
    """
    batches = read_batches(data)
    chosen, _ = selected(model, parameters)
    results: dict[str, Result] = {}
    left_out: list[str] = []
    for name, members in grouped(list(chosen), groups).items():
        try:
            results[name] = measure(model, loss_fn, iter(batches), parameters=members, **options)
        except NotInTheLossError:  # noqa: PERF203 - beside a measure it costs nothing
            left_out.append(name)
    if not results:
        raise NotInTheLossError("the loss depends on none of the groups' parameters")
    if not left_out:
        return results
    note = f"left out, since the loss does not depend on their parameters: {', '.join(left_out)}"
    return {name: noted(result, note) for name, result in results.items()}


def noted(result: Result, note: str) -> Result:
    """Add a note to the conditions of a result.

    Args:
        result: of a measure.
        note: a sentence.

    Returns:
        The same with the note.
    """
    entry: Any = result
    conditions = entry.conditions
    changed: Result = replace(entry, conditions=replace(conditions, notes=(*conditions.notes, note)))
    return changed


def grouped(names: list[str], groups: str) -> dict[str, list[str]]:
    """Sort parameter names into groups.

    Args:
        names: of parameters.
        groups: ``"tensor"``, ``"module"``, ``"block"`` or a regular expression.

    Returns:
        The members of each group.

    Raises:
        UserError: if a regular expression is none, or matches nothing.
    """
    result: dict[str, list[str]] = {}
    try:
        pattern = None if groups in KINDS else re.compile(groups)
    except re.error as error:
        raise UserError(f"groups must be one of {', '.join(KINDS)} or a regular expression: {error}") from error
    for name in names:
        if pattern is not None:
            found = pattern.search(name)
            if found is None:
                continue
            key = ".".join(part for part in found.groups() if part is not None) if pattern.groups else found.group()
        else:
            key = {"tensor": name, "module": name.rpartition(".")[0], "block": name.partition(".")[0]}[groups]
        result.setdefault(key, []).append(name)
    if not result:
        raise UserError(f"no parameter's name matches {groups!r} (such as {', '.join(names[:3])})")
    return result

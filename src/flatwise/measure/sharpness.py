"""How sharp is this minimum? One call, one table: worst cases, averages, m-sharpness and curvature, with errors.

Each row answers another question about the same loss at the same weights on the same samples; none of them is *the*
sharpness. What a row shares with another, such as the gradient at w, is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn import Module

from flatwise.errors import UserError
from flatwise.measure.curvature import WarmStart
from flatwise.measure.journal import Journal
from flatwise.measure.measuring import Measuring
from flatwise.measure.menu import AVERAGE, WORST, Settings, chosen, expected, work
from flatwise.measure.problem import LossFn, Mode, Problem
from flatwise.measure.progress import Bar, announce
from flatwise.measure.rows import Sharpness
from flatwise.measure.select import Parameters


def sharpness(
    model: Module,
    loss_fn: LossFn,
    data: Any,
    *,
    measures: str | Sequence[str] | None = None,
    rho: float = 0.05,
    adaptive_rho: float = 0.5,
    rho_inf: float = 0.001,
    adaptive_rho_inf: float = 0.01,
    eta: float = 0.0,
    steps: int = 5,
    draws: int = 20,
    m: Sequence[int] = (1, 16, 128),
    micro_batches: int | None = 128,
    eigenvalues: int = 5,
    trace: bool = True,
    resume: str | Path | None = None,
    max_memory: float | None = None,
    warm_start: WarmStart | None = None,
    parameters: Parameters = None,
    mode: Mode = "eval",
    micro_batch_size: int | None = None,
    seed: int = 0,
    process_group: Any = None,
    progress: bool = True,
) -> Sharpness:
    """Measure how sharp a minimum is, by several measures at once.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch as one number.
        data: one batch, or an iterable of batches, read once.
        measures: names of measures, or of groups of them (``"worst"``, ``"averages"``, ``"curvature"``,
            ``"first_order"``); None: all.
        rho: radius of the plain L2 ball; also the size of the plain noise, and the radius for m-sharpness.
        adaptive_rho: radius of the adaptive L2 ball (T = |w| + eta); also the size of the adaptive noise.
        rho_inf: radius of the plain L-infinity ball.
        adaptive_rho_inf: radius of the adaptive L-infinity ball: the largest relative change of a weight.
        eta: offset in T. At 0 the adaptive measures do not change under rescaling of a network.
        steps: of the ascent of the rows ``n_steps``.
        draws: of noise for the averages, in antithetic pairs; an odd number is rounded up.
        m: sizes of micro-batches for m-sharpness.
        micro_batches: at most so many micro-batches for each m and process, evenly spaced; None: all.
        eigenvalues: how many eigenvalues of the Hessian, for the first and its ratio to the last; 0: none.
        trace: whether the trace is among all measures.
        resume: a file that is written as it goes, and that a later call with the same arguments continues from; while
            eigenvalues and the trace are searched for, two more lie beside it.
        max_memory: bytes that the graphs of curvature may take; None: half of what is free.
        warm_start: passed from call to call, it lets the search for eigenvalues start where the last one ended.
        parameters: which parameters are moved: a regular expression, a module, names, tensors or a rule; None: all.
        mode: ``"eval"``, ``"train"`` or ``"as is"``.
        micro_batch_size: evaluate at most so many samples at once; None: a batch at once. The parts so made are what
            standard errors are over.
        seed: of the noise, and of what the loss draws.
        process_group: processes that each bring their own share of the data.
        progress: show a bar where it takes long.

    Returns:
        The rows, with what they cost and what to be careful about.

    Raises:
        UserError: a warm start together with a file.
    """
    wanted = chosen(measures)
    settings = Settings(
        rho, adaptive_rho, rho_inf, adaptive_rho_inf, eta, steps, draws, tuple(dict.fromkeys(m)), micro_batches
    )
    problem = Problem(
        model,
        loss_fn,
        data,
        parameters=parameters,
        mode=mode,
        micro_batch_size=micro_batch_size,
        seed=seed,
        process_group=process_group,
    )
    if resume is not None and warm_start is not None:
        raise UserError("resume= and warm_start= exclude each other: the file does not hold where a search ended")
    with problem.open(), Bar("sharpness", work(wanted, settings), shown=progress) as bar:
        more = {"measures": wanted, "eigenvalues": eigenvalues, "micro_batch_size": micro_batch_size}
        journal = Journal(resume, "sharpness", problem, {**asdict(settings), **more})
        measuring = Measuring(problem, settings, journal, bar, progress)
        if progress and problem.leads and measuring.fresh:
            left = [name for name in wanted if trace or name != "trace"]
            usual = expected(left, settings, sum(part.samples for part in problem.parts), eigenvalues)
            announce("sharpness", "a gradient", measuring.gradient_seconds, usual, usual)
        if "gradient_norm" in wanted:
            measuring.stage("gradient_norm", measuring.gradient)
        for ball in WORST:
            measuring.stage(f"worst{ball}", partial(measuring.worst, ball, wanted))
        for name in AVERAGE:
            if name in wanted:
                measuring.stage(name, partial(measuring.average, name))
        if "m_sharpness" in wanted:
            measuring.all_m()
        if eigenvalues and ("lambda_max" in wanted or "lambda_ratio" in wanted):
            warm = warm_start or WarmStart()
            measuring.stage("eigenvalues", lambda: measuring.eigenvalues(wanted, eigenvalues, max_memory, warm))
        if trace and "trace" in wanted:
            measuring.stage("trace", lambda: measuring.trace(max_memory))
    return measuring.result()

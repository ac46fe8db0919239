"""The rows of the table of sharpness, one after the other: what they share, and what each of them cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flatwise.batching import count
from flatwise.measure.average import noise_scale, under_noise
from flatwise.measure.cautions import cautions
from flatwise.measure.curvature import WarmStart, top
from flatwise.measure.hessian import hessian_eigenvalues
from flatwise.measure.journal import Journal
from flatwise.measure.menu import AVERAGE, WORST, Settings
from flatwise.measure.micro import gaps, micro_batches, spread_out
from flatwise.measure.problem import Problem
from flatwise.measure.progress import Bar
from flatwise.measure.result import Cost
from flatwise.measure.rows import Row, Sharpness
from flatwise.measure.slope import gradient_and_noise
from flatwise.measure.spread import Estimate, over_clusters, over_draws_and_parts, over_parts
from flatwise.measure.trace import hessian_trace
from flatwise.measure.worst import climb, turning


class Measuring:
    """The rows as they come: what they share, and what each of them cost."""

    def __init__(self, problem: Problem, settings: Settings, journal: Journal, bar: Bar, progress: bool) -> None:
        self.problem, self.settings, self._journal, self._bar = problem, settings, journal, bar
        self._progress = progress
        self.rows: list[Row] = []
        self.cautions: list[str] = []
        self._gradient: Tensor | None = None
        begin = time.perf_counter()
        self.base = problem.losses()
        self.gradient_seconds = 3 * (time.perf_counter() - begin)  # of which a forward pass is a third
        self.fresh = journal.get("loss") is None
        estimate = over_parts(problem, self.base)
        self.loss = estimate.value
        self.stage("loss", lambda: self.add("loss", estimate, {}, "The loss at the weights as they are."))

    def stage(self, name: str, measure: Callable[[], object]) -> None:
        """Take up the rows of a stage, or measure and put them down.

        Args:
            name: of the stage.
            measure: adds its rows and cautions.
        """
        held = self._journal.get(name)
        if held is not None:
            self.rows += [Row(**row) for row in held["rows"]]
            self.cautions += held["cautions"]
            self.problem.cost()  # what is done again, to be able to go on, belongs to no row
            return
        rows, cautions = len(self.rows), len(self.cautions)
        measure()
        new = [{entry.name: getattr(row, entry.name) for entry in fields(row)} for row in self.rows[rows:]]
        self._journal.put(name, {"rows": new, "cautions": self.cautions[cautions:]}, now=True)
        self._journal.clear(name)

    def add(self, name: str, estimate: Estimate, settings: dict[str, Any], meaning: str, *costs: Cost) -> None:
        """Add a row, which cost what was spent since the last one.

        Args:
            name: of the row.
            estimate: its value.
            settings: what it depends on.
            meaning: a sentence.
            *costs: of this row, where they are known already.
        """
        costs = costs or (self.problem.cost(),)
        spent, seconds = sum(c.gradient_evaluations for c in costs), sum(c.seconds for c in costs)
        value, error, over = estimate.value, estimate.standard_error, estimate.over
        self.rows.append(Row(name, value, error, over, settings, spent, seconds, meaning))

    def gradient(self) -> Tensor:
        """Return the gradient at w; a row of its own says its norm, and what it cost.

        Returns:
            Shape (weights,).
        """
        if self._gradient is None:
            self._gradient, noise = gradient_and_noise(self.problem)
            norm = float(torch.linalg.vector_norm(self._gradient, dtype=torch.float64))
            if any(row.name == "gradient_norm" for row in self.rows):  # it was taken up from a file
                self.problem.cost()
                return self._gradient
            known = not math.isnan(noise)
            alone = f"; sampling alone would give {noise:.2g}" if known else ""
            meaning = f"How steep the loss is at w (L2 norm of its gradient){alone}."
            self.add("gradient_norm", Estimate(norm, None, ""), {"noise": noise} if known else {}, meaning)
        return self._gradient

    def worst(self, suffix: str, wanted: Sequence[str]) -> None:
        """Add the worst cases of one ball.

        Args:
            suffix: of the names of its rows.
            wanted: names of rows.
        """
        one, several = f"one_step{suffix}" in wanted, f"n_steps{suffix}" in wanted
        if not (one or several):
            return
        p, adaptive = WORST[suffix]
        ball, rho = self.settings.ball(p, adaptive)
        steps = self.settings.steps if several else 1
        found = climb(self.problem, ball, rho, steps, self.gradient(), self.base, self._bar.advance)
        place = _described(p, adaptive, rho)
        settings: dict[str, Any] = {"rho": rho, "p": p} | ({"adaptive": True, "eta": ball.eta} if adaptive else {})
        if one:
            rises = found[0].losses - self.base
            estimate = over_parts(self.problem, rises)
            if estimate.standard_error is not None and found[0].steps and not math.isinf(p):
                turned = turning(self.problem, ball, rho, self.gradient(), found[0].gradient)
                error = over_parts(self.problem, rises + turned).standard_error
                estimate = replace(estimate, standard_error=error)
            self.add(
                f"one_step{suffix}",
                estimate,
                settings | {"steps": 1},
                f"How much the loss rises by SAM's own step uphill {place}.",
                found[0].cost,
                self.problem.cost(),
            )
        if several:
            self.add(
                f"n_steps{suffix}",
                over_parts(self.problem, found[-1].losses - self.base),
                settings | {"steps": steps, "highest_after": found[-1].steps},
                f"How much the loss rises at the highest point that {steps} steps uphill found {place}.",
                *(entry.cost for entry in (found[-1:] if one else found)),
            )

    def average(self, name: str) -> None:
        """Add an average case.

        Args:
            name: of the row.
        """
        ball, rho = self.settings.ball(2.0, AVERAGE[name])
        pairs = (self.settings.draws + 1) // 2
        scale = noise_scale(self.problem, ball, rho)
        losses = under_noise(self.problem, ball, scale, pairs, self._bar.advance)
        estimate, draws, parts = over_draws_and_parts(self.problem, losses - self.base, "pairs of draws")
        settings: dict[str, Any] = {"rho": rho, "sigma": scale, "draws": 2 * pairs}
        if ball.adaptive:
            settings |= {"adaptive": True, "eta": ball.eta}
        settings |= {"error_of_draws": draws, "error_of_parts": parts}
        how = " in proportion to each weight's size," if ball.adaptive else ""
        meaning = f"How much the loss rises on average under Gaussian noise{how} of root mean square length {rho:g}."
        self.add(name, estimate, settings, meaning)

    def m_sharpness(self, m: int) -> None:
        """Add the m-sharpness of one m.

        Args:
            m: how many samples share a perturbation.
        """
        if m > self.problem.samples:
            self.cautions.append(f"m-sharpness for m={m} was left out: there are {self.problem.samples} samples")
            return
        ball, rho = self.settings.ball(2.0, False)
        everything = micro_batches(self.problem, m, self.problem.asked)
        entries = spread_out(everything, self.settings.micro_batches)
        if self.problem.batch_statistics and any(part.samples == 1 for entry in entries for part in entry.parts):
            self.cautions.append(f"m-sharpness for m={m} was left out: one sample has no batch statistics")
            return
        rises = gaps(self.problem, ball, rho, entries, self._bar.advance)
        sizes = torch.tensor([entry.samples for entry in entries])
        estimate = over_clusters(self.problem, rises, sizes, "micro-batches")
        settings = {"rho": rho, "p": 2.0, "m": m, "steps": 1, "micro_batches": f"{len(entries)} of {len(everything)}"}
        whom, them = ("each sample is", "it") if m == 1 else (f"each {m} samples are", "them")
        meaning = f"How much the loss rises when {whom} given the step uphill that is worst for {them} alone."
        self.add(f"m_sharpness_{m}", estimate, settings, meaning)

    def all_m(self) -> None:
        """Add the m-sharpness of every m, where batches can be cut."""
        try:
            for batch in self.problem.batches:
                count(batch)
        except ValueError as error:
            self.cautions.append(f"m-sharpness was left out: {error}")
            return
        for m in self.settings.m:
            self.stage(f"m={m}", partial(self.m_sharpness, m))

    def eigenvalues(self, wanted: Sequence[str], k: int, max_memory: float | None, warm: WarmStart) -> None:
        """Add the largest eigenvalue and its ratio to the k-th.

        Args:
            wanted: names of rows.
            k: how many eigenvalues.
            max_memory: in bytes.
            warm: where an earlier search ended; this one's end is written into it.
        """
        of = self.problem
        k = min(k, of.weights) if "lambda_ratio" in wanted else 1
        found = warm.found = hessian_eigenvalues(
            of.model,
            of.loss_fn,
            iter(of.batches),
            k,
            which="largest",
            warm_start=warm.found,
            keep_vectors=True,
            resume=self._journal.beside("eigenvalues"),
            max_memory=max_memory,
            **self._same(),
        )
        # On parts as small as the memory asked for; a part's graph is kept for one part at a time.
        options = self._same() | {"micro_batch_size": of.asked and found.conditions.micro_batch_size}
        del options["progress"]
        parts = Problem(of.model, of.loss_fn, iter(of.batches), **options)
        with parts.open():
            largest, ratio = top(parts, found)
        cost = parts.cost()
        settings = {"k": k, "residual": found.residuals[0], "products": found.products}
        if "lambda_max" in wanted:
            meaning = "The largest eigenvalue of the Hessian: the curvature in the direction in which it is largest."
            self.add("lambda_max", largest, settings, meaning, found.cost, cost)
            found_cost: tuple[Cost, ...] = (Cost(0.0, 0.0),)
        else:
            found_cost = (found.cost, cost)
        if "lambda_ratio" in wanted and ratio is not None:
            meaning = f"The largest eigenvalue over number {k}: how far one direction stands out."
            self.add("lambda_ratio", ratio, {"k": k, "residual": found.residuals[-1]}, meaning, *found_cost)
        if not all(found.converged):
            residuals = ", ".join(f"{residual:.2g}" for residual in found.residuals)
            self.cautions.append(
                f"the eigenvalues have not converged (residuals {residuals}): hessian_eigenvalues can go on"
            )
        for note in found.conditions.notes:
            of.note(note)

    def trace(self, max_memory: float | None) -> None:
        """Add the trace.

        Args:
            max_memory: in bytes.
        """
        of = self.problem
        found = hessian_trace(
            of.model,
            of.loss_fn,
            iter(of.batches),
            resume=self._journal.beside("trace"),
            max_memory=max_memory,
            **self._same(),
        )
        over = f"{found.degrees + 1} probes, on these samples" if found.degrees else ""
        error = found.standard_error if found.degrees else None
        settings = {"method": found.method, "probes": found.probes}
        meaning = "The sum of all eigenvalues of the Hessian: curvature over all directions together."
        self.add("trace", Estimate(found.value, error, over), settings, meaning, found.cost)
        for note in found.conditions.notes:
            of.note(note)

    def _same(self) -> dict[str, Any]:
        """What a measure of the same problem is called with."""
        of = self.problem
        return {
            "parameters": of.params,
            "mode": of.mode,
            "micro_batch_size": of.asked,
            "seed": of.seed,
            "process_group": of.group,
            "progress": self._progress,
        }

    def result(self) -> Sharpness:
        """Return the table.

        Returns:
            All rows, with what to be careful about.
        """
        rows, problem = tuple(self.rows), self.problem
        cost = Cost(sum(row.gradient_evaluations for row in rows), sum(row.seconds for row in rows))
        sentences = (*cautions(rows, problem), *self.cautions)
        return Sharpness(rows, self.loss, sentences, problem.conditions(), cost)


def _described(p: float, adaptive: bool, rho: float) -> str:
    if math.isinf(p):
        return f"while each weight moves by at most {f'{rho:g} of itself' if adaptive else f'{rho:g}'}"
    moves = "relative moves" if adaptive else "moves"
    return f"while the {moves} of all weights together are at most {rho:g} (L2 norm)"

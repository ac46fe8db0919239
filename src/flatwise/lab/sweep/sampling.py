"""How a trial's settings are chosen, and when it is stopped early: Optuna's samplers and pruners, made repeatable."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from flatwise.lab.train.config import TrainConfig
from flatwise.seeds import derive

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial


class ByNumber(BaseSampler):
    """A sampler whose draws for a trial depend on the seed and the trial's place alone, beside what it has seen.

    Optuna's own begin their stream anew with each process: a sweep that continues would repeat its first draws, and
    machines that share a study would all try the same. A trial that is begun again takes no place of its own, so
    that those after it are as if nothing had happened.

    Args:
        kind: "tpe" (Bergstra et al., NeurIPS 2011; jointly over all settings, conditional ones in groups) or "random".
        seed: of the search.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self._kind, self._seed = kind, seed
        self._made: tuple[int, BaseSampler] | None = None
        # The whole study, set once it is made: Hyperband shows a sampler only the trials of one bracket.
        self.study: Study | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Say what is drawn jointly; see Optuna."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw jointly; see Optuna."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one setting; see Optuna."""
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if self._made is None or self._made[0] != trial.number:
            assert self.study is not None
            earlier = self.study.get_trials(deepcopy=False)[: trial.number]
            place = sum("follows" not in other.user_attrs for other in earlier)
            seed = derive(self._seed, "sweep", place) % 2**32  # as many as NumPy takes
            self._made = trial.number, self._make(seed)
        return self._made[1]

    def _make(self, seed: int) -> BaseSampler:
        if self._kind == "random":
            return RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            # Trials that run elsewhere count as bad ones meanwhile, so that workers do not all try the same.
            return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


def make_pruner(kind: str, training: TrainConfig, seeds: int) -> BasePruner:
    """Make what stops trials early.

    Args:
        kind: "median", "hyperband" or "none".
        training: what all trainings share.
        seeds: trainings of a trial.

    Returns:
        The pruner.
    """
    if kind == "none":
        return NopPruner()
    known = training.steps is None
    if kind == "hyperband":
        # Li et al., JMLR 2018. Where the length is given in steps, Optuna reads it off the first trial that ends.
        return HyperbandPruner(1, training.epochs * seeds if known else "auto", reduction_factor=3)
    # A quarter of the training is let pass: a large radius starts slowly.
    return MedianPruner(n_startup_trials=5, n_warmup_steps=training.epochs // 4 if known else 0, n_min_trials=3)

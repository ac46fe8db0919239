"""The study: made once with its settings, opened again by the same, and put right after a process that died."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatwise.errors import UserError
from flatwise.lab.sweep.config import SweepConfig, differences
from flatwise.lab.sweep.storage import journal_storage, shared_storage

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

JOURNAL = "study.journal"
TRIES = 3
"""How often a trial is begun whose process keeps dying."""


@dataclass(frozen=True)
class Opened:
    """A study and where it is kept.

    Attributes:
        study: Optuna's.
        shared: its database, or None where it is a journal of this machine's own.
        owner: this machine and folder, written into each trial that is begun here.
    """

    study: Study
    shared: RDBStorage | None
    owner: str


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Let Optuna say nothing but errors while the block runs.

    Yields:
        Nothing.

    Raises:
        UserError: Optuna is missing.
    """
    try:
        from optuna import logging
    except ImportError as error:
        raise UserError(f"a sweep needs pip install 'flatwise[sweep]' ({error})") from error
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def open_study(config: SweepConfig, folder: Path) -> Opened:
    """Open the study of a sweep, or make it. The caller holds the folder's lock.

    Args:
        config: the settings.
        folder: the study's folder.

    Returns:
        The study; no trial of this folder is marked as running.

    Raises:
        UserError: the study was made with other settings.
    """
    import optuna

    from flatwise.lab.sweep.sampling import ByNumber, make_pruner

    shared = None if config.storage is None else shared_storage(config.storage, _retry_stale)
    sampler = ByNumber(config.sampler, config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            study_name=config.name,
            storage=journal_storage(folder / JOURNAL) if shared is None else shared,
            sampler=sampler,
            pruner=make_pruner(config.pruner, config.training, config.seeds),
            direction="maximize",
            load_if_exists=True,
        )
    sampler.study = study
    there = study.user_attrs.get("settings")
    if there is None:
        study.set_user_attr("settings", config.settings())
    elif differing := differences(there, config.settings()):
        place = folder if shared is None else "the database"
        raise UserError(
            f"the study {config.name!r} in {place} was made with other settings ({'; '.join(differing)}): "
            "repeat its settings, or name another study with --study"
        )
    opened = Opened(study, shared, f"{socket.gethostname()}:{folder.resolve()}")
    recover(opened)
    return opened


def recover(opened: Opened) -> None:
    """Queue the trials again that died with an earlier process of this folder, or with another machine.

    Args:
        opened: the study.
    """
    from optuna.trial import TrialState

    for trial in opened.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # Nobody else is in this folder, so what it runs according to the study is dead.
        if opened.shared is None or trial.user_attrs.get("owner") == opened.owner:
            give_back(opened.study, trial)
    reclaim(opened)


def reclaim(opened: Opened) -> None:
    """Queue the trials again whose machine has given no sign of life for too long.

    Args:
        opened: the study.
    """
    if opened.shared is not None:
        from optuna.exceptions import ExperimentalWarning
        from optuna.storages import fail_stale_trials

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(opened.study)


def give_back(study: Study, trial: FrozenTrial, *, innocent: bool = False) -> bool:
    """Queue a trial again that did not end, and mark the one that it was as failed.

    Args:
        study: its study.
        trial: as the study knows it.
        innocent: it was asked to end; this try does not count.

    Returns:
        False where it was tried too often.
    """
    from optuna.trial import TrialState

    # In this order: killed in between, the next process meets the trial again, and queues it no second time.
    again = retry(study, trial, innocent=innocent)
    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    return again


def retry(study: Study, trial: FrozenTrial, *, innocent: bool = False) -> bool:
    """Queue a trial again under a new number, with the same settings and folder.

    Args:
        study: its study.
        trial: as the study knows it.
        innocent: this try does not count.

    Returns:
        False where it was tried too often.
    """
    from optuna.trial import TrialState, create_trial

    tries = trial.user_attrs.get("tries", 1)
    if tries >= TRIES and not innocent:
        return False
    if any(other.user_attrs.get("follows") == trial.number for other in study.get_trials(deepcopy=False)):
        return True
    attributes: dict[str, Any] = {"first": first(trial), "follows": trial.number, "tries": tries + (not innocent)}
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=attributes,
            system_attrs=trial.system_attrs,
        )
    )
    return True


def _retry_stale(study: Study, trial: FrozenTrial) -> None:
    retry(study, trial)


def first(trial: FrozenTrial) -> int:
    """Say under which number a trial was begun first, which names its folder.

    Args:
        trial: as the study knows it.

    Returns:
        The number.
    """
    return int(trial.user_attrs.get("first", trial.number))

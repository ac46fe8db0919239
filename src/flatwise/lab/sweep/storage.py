"""Where a study is kept: a journal in its folder, or a database that machines share."""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flatwise.errors import CannotWriteError, TrainingError, UserError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage, RDBStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

HEARTBEAT, GRACE = 30, 300
"""Seconds between two signs of life of a trial in a database, and after how many without one it counts as dead."""
DRIVERS = {"psycopg2": "psycopg2-binary", "psycopg": "psycopg[binary]", "MySQLdb": "mysqlclient"}
"""What to install for a module of another name."""


def journal_storage(path: Path) -> BaseStorage:
    """Open the journal of a study, of which the caller is the only writer.

    Args:
        path: the file; made where it is missing.

    Returns:
        The storage.

    Raises:
        CannotWriteError: the place cannot be written.
        UserError: the journal is damaged.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    try:
        _mend(path)
        # Whoever was killed while it held the lock left it behind.
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
    except OSError as error:
        raise CannotWriteError(path, error) from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged: --fresh begins again, or name another study with --study") from error


def _mend(path: Path) -> None:
    """Take away half a line at the end, as a full disk or a loss of power leaves it: it would stop all reading."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        text = file.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            file.truncate(whole)
            file.flush()
            os.fsync(file.fileno())


def shared_storage(url: str, on_stale: Callable[[Study, FrozenTrial], None]) -> RDBStorage:
    """Open a database.

    Args:
        url: where it is; a password in it is never shown.
        on_stale: called, on one machine only, with a trial that gave no sign of life for too long.

    Returns:
        The storage.

    Raises:
        UserError: the URL cannot be read.
    """
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        _need_driver(url)
    except (ArgumentError, NoSuchModuleError):
        # Their texts quote what was given, password and all; so would the chain of errors in a log.
        raise UserError(
            "--storage is no URL of a known database; it looks like postgresql://user@host:5432/name"
        ) from None
    # Optuna gave the option its present name in 4.9.
    names = inspect.signature(RDBStorage).parameters
    callback = next(name for name in ("heartbeat_stale_trial_callback", "failed_trial_callback") if name in names)
    options: dict[str, Any] = {callback: on_stale}
    with answering(url), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # heartbeats are marked experimental
        # A connection that the server or a firewall has closed between two epochs is opened again.
        return RDBStorage(
            url, engine_kwargs={"pool_pre_ping": True}, heartbeat_interval=HEARTBEAT, grace_period=GRACE, **options
        )


@contextlib.contextmanager
def answering(url: str | None) -> Iterator[None]:
    """Make one clear line of it, if the database of a study fails while the block runs.

    Args:
        url: where it is; None where there is none.

    Yields:
        Nothing.

    Raises:
        TrainingError: the database does not answer.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        assert url is not None
        raise TrainingError(
            f"the study's database {shown_url(url)} does not answer: {_reason(error, url)}; the same command continues"
        ) from None


def shown_url(url: str) -> str:
    """Write a URL as it may be shown.

    Args:
        url: where a database is.

    Returns:
        The same with ``***`` for the password, and without options, which may hold one too.
    """
    from sqlalchemy.engine import make_url

    return make_url(url).set(query={}).render_as_string(hide_password=True)


def _need_driver(url: str) -> None:
    from sqlalchemy.engine import make_url

    try:
        make_url(url).get_dialect().import_dbapi()
    except ImportError as error:
        package = DRIVERS.get(error.name or "", error.name)
        raise UserError(f"{shown_url(url)} needs a driver: pip install '{package}'") from None


def _reason(error: BaseException, url: str) -> str:
    from sqlalchemy.engine import make_url

    # Optuna wraps what the driver said; that is the part that helps.
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    password = make_url(url).password
    return text.replace(str(password), "***") if password else text


class Heart:
    """Signs of life of running trials, in a thread of its own: an epoch may take longer than the grace.

    Use it as a context.

    Args:
        storage: the database; None for a journal, which has one writer and needs none.
        interval: seconds between two signs.
    """

    def __init__(self, storage: RDBStorage | None, interval: float = HEARTBEAT) -> None:
        self._storage, self._interval = storage, interval
        self._trials: dict[int, int] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Heart:
        """Start."""
        if self._storage is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self._end.set()
        if self._storage is not None:
            self._thread.join()

    def add(self, study: str, number: int) -> None:
        """Give signs of life for a trial from now on, the first at once.

        Args:
            study: the study's name.
            number: the trial.
        """
        if self._storage is not None:
            study_id = self._storage.get_study_id_from_name(study)
            trial = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
            self._storage.record_heartbeat(trial)
            with self._lock:
                self._trials[number] = trial

    def remove(self, number: int) -> None:
        """Give none for a trial any more.

        Args:
            number: the trial.
        """
        with self._lock:
            self._trials.pop(number, None)

    def _run(self) -> None:
        assert self._storage is not None
        while not self._end.wait(self._interval):
            with self._lock:
                trials = list(self._trials.values())
            for trial in trials:
                # A database that is away for a while is no reason to end a training: the next sign may reach it.
                with contextlib.suppress(Exception):
                    self._storage.record_heartbeat(trial)

"""``make board``: train what is missing, then write the page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flatwise.errors import UserError
from flatwise.lab.board.page import write_page
from flatwise.lab.board.plan import SEEDS, TASKS, Task, all_methods, chosen
from flatwise.lab.board.store import Store
from flatwise.lab.board.train import train
from flatwise.lab.environment import cores

INTERRUPTED = 130


def main(words: Sequence[str] | None = None, tasks: Sequence[Task] = TASKS) -> int:
    """Run the board.

    Args:
        words: the arguments; None reads them from the command line.
        tasks: what ``--tasks`` chooses from.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a mistake in the command, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="make board ARGS=...", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--tasks", help=f"names, separated by commas (default: all): {', '.join(t.name for t in tasks)}"
    )
    parser.add_argument("--methods", help="names, separated by commas (default: all); sgd is always trained")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds of each training (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=cores(), help="trainings side by side (default: the cores)")
    parser.add_argument("--fresh", action="store_true", help="train again what is there already")
    parser.add_argument(
        "--render", action="store_true", help="train nothing; write page and pictures from what is there"
    )
    parser.add_argument(
        "--store", type=Path, default=Path("docs/results/board"), help="folder of the finished trainings"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/board"), help="folder of the unfinished ones")
    parser.add_argument("--page", type=Path, default=Path("docs/methods.md"), help="page to write")
    options = parser.parse_args(words)
    if options.seeds < 1 or options.workers < 1:
        parser.error("--seeds and --workers must be at least 1")
    store = Store(options.store)
    try:
        names = chosen(options.tasks, [task.name for task in tasks], "task")
        methods = chosen(options.methods, all_methods(), "method")
        if not options.render:
            wanted = [task for task in tasks if task.name in names]
            train(wanted, methods, options.seeds, store, options.runs, options.workers, fresh=options.fresh)
        write_page(tasks, store, options.page)
    except UserError as error:
        print(f"board: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "\nInterrupted. The same command continues; --render writes the page from what is there.", file=sys.stderr
        )
        return INTERRUPTED
    print(f"Written: {options.page}, and pictures in {options.store}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

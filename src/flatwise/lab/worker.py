"""A process that trains: ``python -m flatwise.lab.worker``, spoken to in lines of JSON.

Standard input brings what all tasks share in the first line and one task in each further line; standard output
returns events. When the input ends, the parent is gone or done, and the worker ends at once: nobody is left
to write into the folder of a comparison that was killed.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from flatwise.errors import UserError
from flatwise.lab.child import Event
from flatwise.lab.config import config_from
from flatwise.lab.folder import RunFolder
from flatwise.lab.tasks import perform

Perform = Callable[[Any, Callable[[Event], None]], object]


def heard(lines: TextIO) -> queue.SimpleQueue[str]:
    """Listen in a thread of its own; when the input ends, so does this process, whatever it is doing.

    Args:
        lines: what the parent says.

    Returns:
        Takes the lines.
    """
    incoming: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in lines:
            incoming.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    return incoming


def channel() -> TextIO:
    """Keep standard output for events: what a library prints must not get between them, and goes to standard error.

    Returns:
        What was standard output.
    """
    kept = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return kept


def serve(lines: TextIO, replies: TextIO, prepare: Callable[[Any], Perform]) -> None:
    """Work until the input ends.

    Args:
        lines: what all tasks share, then the tasks.
        replies: takes the events, and after each task ``done`` or ``error``.
        prepare: from the first line makes what does a task and sends its events.
    """
    incoming = heard(lines)

    def send(event: Event) -> None:
        replies.write(json.dumps(event) + "\n")
        replies.flush()

    perform_task = prepare(json.loads(incoming.get()))
    while True:
        task = json.loads(incoming.get())
        try:
            perform_task(task, send)
        except UserError as error:
            send({"event": "error", "task": task, "text": str(error)})
        except Exception as error:  # whatever it is, the parent must hear of it
            traceback.print_exc()
            send({"event": "error", "task": task, "text": f"{type(error).__name__}: {error}"})
        else:
            send({"event": "done", "task": task})


def main(prepare: Callable[[Any], Perform]) -> None:
    """Serve on standard input and output.

    Args:
        prepare: see :func:`serve`.
    """
    serve(sys.stdin, channel(), prepare)


def _comparison(settings: dict[str, Any]) -> Perform:
    config, folder = config_from(settings["config"]), RunFolder(Path(settings["folder"]))
    return lambda task, send: perform(config, folder, task, send)


if __name__ == "__main__":
    main(_comparison)

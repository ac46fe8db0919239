"""A process that trains: ``python -m flatwise.lab.worker``, spoken to in lines of JSON.

Standard input brings the settings in the first line and one task in each further line; standard output
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
from pathlib import Path
from typing import TextIO

from flatwise.errors import UserError
from flatwise.lab.config import config_from
from flatwise.lab.folder import RunFolder
from flatwise.lab.tasks import Event, perform


def serve(lines: TextIO, replies: TextIO) -> None:
    """Work until the input ends.

    Args:
        lines: the settings, then the tasks.
        replies: takes the events, and after each task ``done`` or ``error``.
    """
    incoming: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in lines:
            incoming.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()

    def send(event: Event) -> None:
        replies.write(json.dumps(event) + "\n")
        replies.flush()

    settings = json.loads(incoming.get())
    config, folder = config_from(settings["config"]), RunFolder(Path(settings["folder"]))
    while True:
        task = json.loads(incoming.get())
        try:
            perform(config, folder, task, send)
        except UserError as error:
            send({"event": "error", "task": task, "text": str(error)})
        except Exception as error:  # whatever it is, the parent must hear of it
            traceback.print_exc()
            send({"event": "error", "task": task, "text": f"{type(error).__name__}: {error}"})
        else:
            send({"event": "done", "task": task})


if __name__ == "__main__":
    # What a library prints must not get between the events.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, channel)

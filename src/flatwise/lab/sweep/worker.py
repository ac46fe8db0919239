"""A process that trains the trials of a sweep: ``python -m flatwise.lab.sweep.worker``, spoken to in lines of JSON.

Standard input brings a task, and after each epoch's event one word, ``go`` or ``stop``; standard output returns events.
The worker knows nothing of the study, so none can be left half told by one that dies. When its input ends, the search
is gone, and it ends at once.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import TextIO

from flatwise.errors import UserError
from flatwise.lab.child import Event
from flatwise.lab.sweep.perform import perform
from flatwise.lab.worker import channel, heard


def serve(lines: TextIO, replies: TextIO) -> None:
    """Work until the input ends.

    Args:
        lines: tasks, and answers to epochs.
        replies: takes the events.
    """
    incoming = heard(lines)

    def tell(event: Event) -> bool:
        replies.write(json.dumps(event) + "\n")
        replies.flush()
        return event["event"] == "epoch" and bool(json.loads(incoming.get()) == "stop")

    while True:
        task = json.loads(incoming.get())
        try:
            perform(task, tell)
        except UserError as error:
            tell({"event": "error", "trial": task["trial"], "text": str(error)})
        except Exception as error:  # whatever it is, the search must hear of it
            traceback.print_exc()
            tell({"event": "error", "trial": task["trial"], "text": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    serve(sys.stdin, channel())

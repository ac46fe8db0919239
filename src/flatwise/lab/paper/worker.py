"""A process that trains for a study: ``python -m flatwise.lab.paper.worker``, spoken to in lines of JSON."""

from __future__ import annotations

from flatwise.lab.paper.tasks import perform
from flatwise.lab.worker import main

if __name__ == "__main__":
    main(lambda hello: perform)

"""Records on disk: JSON with one line a training, so that a difference between two of them can be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatwise.errors import UserError
from flatwise.files import finite, read_json, write_atomically
from flatwise.lab.paper.record import SCHEMA, Record
from flatwise.lab.paper.study import Study


@dataclass(frozen=True)
class Stored:
    """A record and what it ran on.

    Attributes:
        record: the trainings.
        about: command, versions, processor, wall time.
    """

    record: Record
    about: Mapping[str, Any]


def write_record(path: Path, stored: Stored) -> None:
    """Write a record.

    Args:
        path: the file; its folder exists.
        stored: what to write.
    """
    record = stored.record
    shared = {setting.name: dict(setting.fields) for setting in record.study.settings}
    lines = []
    for line in record.lines:
        common = shared[line["setting"]]
        config = {name: value for name, value in line["config"].items() if common.get(name) != value}
        lines.append(json.dumps(finite({**line, "config": config}), ensure_ascii=False, allow_nan=False))
    head = {
        "schema": SCHEMA, "study": record.study.name, "seeds": list(record.seeds), **stored.about, "settings": shared,
    }  # fmt: skip
    text = json.dumps(finite(head), indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    text += ',\n "trainings": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    write_atomically(path, lambda file: file.write(text.encode()), durable=True)


def read_record(path: Path, study: Study) -> Stored | None:
    """Read a record.

    Args:
        path: the file.
        study: what it is of.

    Returns:
        The record, or None where there is no file.

    Raises:
        UserError: the file is no record of this study.
    """
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or (content.get("schema"), content.get("study")) != (SCHEMA, study.name):
        raise UserError(f"{path} is no record of the study {study.name}; flatwise reproduce {study.name} makes one")
    shared = content.pop("settings")
    lines = [{**line, "config": {**shared[line["setting"]], **line["config"]}} for line in content.pop("trainings")]
    return Stored(Record(study, lines, tuple(content.pop("seeds"))), content)

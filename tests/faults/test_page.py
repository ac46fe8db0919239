"""The page of the faults shows the record, and the record is of all seeds and kinds."""

from __future__ import annotations

import json

from tests.faults.__main__ import PAGE, RECORD, SEEDS, page
from tests.faults.kinds import KINDS


def test_the_page_is_the_record() -> None:
    record = json.loads(RECORD.read_text())
    text = PAGE.read_text()
    assert text == page(text, record)
    assert record["seeds"] == len(SEEDS) == sum(row["injected"] for row in record["kinds"].values())
    assert list(record["kinds"]) == list(KINDS)
    assert not record["failed"]

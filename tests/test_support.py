"""The table of what works where is what the tests say."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def load():
    spec = importlib.util.spec_from_file_location("support", ROOT / "tools" / "support.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


support = load()


def test_the_page_is_the_record():
    assert support.PAGE.read_text() == support.render(json.loads(support.RECORD.read_text()))


def test_the_record_holds_what_the_tests_claim_and_nothing_else():
    cells = json.loads(support.RECORD.read_text())["runs"]["newest"]["cells"]
    recorded = {(framework, feature) for framework, features in cells.items() for feature in features}
    assert recorded == support.marked()


def test_everything_in_the_record_passed():
    cells = json.loads(support.RECORD.read_text())["runs"]["newest"]["cells"]
    for framework, features in cells.items():
        for feature, counts in features.items():
            assert counts["passed"], (framework, feature)
            assert not counts["failed"], (framework, feature)

"""The pages that people choose by hold every method of the registry and every message that the core raises."""

import ast
import re
from pathlib import Path

import pytest

import flatwise

ROOT = Path(__file__).parents[1]
FAMILY = (ROOT / "docs" / "family.md").read_text()
ERRORS = (ROOT / "docs" / "errors.md").read_text()
CORE = [path for folder in ("", "integrations") for path in sorted((ROOT / "src" / "flatwise" / folder).glob("*.py"))]


def table_row(name: str) -> list[str]:
    """The cells of a method's row in the first table."""
    line = re.search(rf"^\| \[`{name}`\]\(#{name}\) \|.*$", FAMILY, re.M)
    assert line, f"docs/family.md has no row for {name}"
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line[0])[1:-1]]


def section(name: str) -> str:
    found = re.search(rf"^### `{name}`\n(.*?)(?=^##|\Z)", FAMILY, re.M | re.S)
    assert found, f"docs/family.md has no section for {name}"
    return found[1]


@pytest.mark.parametrize("name", flatwise.list_variants())
def test_the_row_of_a_method_is_that_of_the_registry(name):
    row = flatwise.variant_info(name)
    _, summary, passes, memory, rho, usual, evidence = table_row(name)
    assert (summary, passes, evidence) == (row.summary, row.passes, row.evidence)
    assert memory == row.memory + (" †" if row.descent.needs_clean else "")
    assert (float(rho), tuple(map(float, usual.split(" to ")))) == (row.rho, row.rho_range)


@pytest.mark.parametrize("name", flatwise.list_variants())
def test_a_method_has_its_default_evidence_trap_and_a_line_of_code(name):
    text = section(name)
    assert all(f"\n- {item}: " in text for item in ("Default", "Evidence", "Trap"))
    assert f'flatwise.create("{name}", ' in text
    assert re.search(rf"^- Default: (rho )?{flatwise.variant_info(name).rho:g}(?![\d.]*\d)", text, re.M)
    strength = re.split("[:;]", flatwise.variant_info(name).evidence)[0]
    assert re.search(rf"Evidence: {strength}\b", text)


def literals(node: ast.expr) -> list[str]:
    """The fixed parts of a string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [text for part in node.values for text in literals(part)]
    return []


def raised(source: str) -> list[str]:
    """A fixed part (the first that says something) of each message that a module raises, or keeps to raise it."""
    messages = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            messages.append(literals(node.exc.args[0]))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if names == ["refused"]:
                messages += [literals(key) for key in node.value.keys if key is not None]
    return [next((part for part in parts if len(part) > 12), max(parts, key=len)) for parts in messages if parts]


def told(text: str, page: str) -> bool:
    """Does the page hold the first words of a fixed part?"""
    words = " ".join(text.replace("`", "").split())[:24].strip(": ")
    return words in " ".join(page.replace("`", "").split())


@pytest.mark.parametrize("path", [path for path in CORE if path.name != "cli.py"], ids=lambda path: path.name)
def test_the_page_of_errors_has_every_message(path):
    missing = [text for text in raised(path.read_text()) if not told(text, ERRORS)]
    assert not missing


def test_a_message_that_is_not_told_is_noticed():
    source = 'raise ValueError(f"{name} was never heard of anywhere")\nrefused = {f"{a} and {b} never met": True}'
    assert raised(source) == [" was never heard of anywhere", " never met"]
    assert not any(told(text, ERRORS) for text in raised(source))

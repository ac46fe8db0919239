"""Every block of code in the README and in docs/ runs, and every example does.

- `python` blocks of one page run in order, in one namespace, after `PRELUDE`.
- `python raises` blocks must raise; the message must hold the text of the heading that they stand under.
- `bash` blocks: each command must be one whose arguments can be checked here without doing the work.
- `text` blocks quote an output: each line must stand in a record under docs/results/. So must each line of a table
  that stands under a heading of a quoted output ("What ... shows").

A block in any other language fails, so that nothing is shown which nothing checks.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Frameworks that a page is about; it is read where they are installed.
NEEDS = {
    "frameworks.md": ("timm", "skorch", "peft"),
    "huggingface.md": ("transformers", "accelerate"),
    "lightning.md": ("lightning",),
}

# What the reader of a page is taken to have: a model, a loader and a loss.
PRELUDE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
loader = DataLoader(TensorDataset(torch.randn(24, 6), torch.randint(3, (24,))), batch_size=8, shuffle=True)
criterion = nn.CrossEntropyLoss()
inputs, targets = batch = next(iter(loader))
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string, its text, the line it starts on, the heading above it."""

    info: str
    text: str
    line: int
    heading: str


def blocks_of(page: str) -> list[Block]:
    blocks, heading, opened = [], "", None
    for number, line in enumerate(page.splitlines(), start=1):
        if line.startswith("```"):
            if opened is None:
                opened = (line[3:].strip(), number, [])
            else:
                info, start, lines = opened
                blocks.append(Block(info, "\n".join(lines), start, heading))
                opened = None
        elif opened is not None:
            opened[2].append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    assert opened is None, f"the block that opens on line {opened[1]} is never closed"
    return blocks


def matches(heading: str, message: str) -> bool:
    """Does the message hold the heading's text? `...` in the heading stands for anything."""
    parts = [re.escape(" ".join(part.split())) for part in heading.replace("`", "").split("...")]
    return re.search(r".*?".join(parts), " ".join(message.replace("`", "").split())) is not None


def run_python(blocks: list[Block], name: str) -> None:
    namespace: dict[str, object] = {}
    exec(PRELUDE, namespace)
    for block in blocks:
        if not block.info.startswith("python"):
            continue
        # blank lines above the code make a traceback show the line of the page
        code = compile("\n" * block.line + block.text, name, "exec")
        if block.info == "python":
            exec(code, namespace)
        elif block.info == "python raises":
            with pytest.raises(Exception) as raised:
                exec(code, namespace)
            assert matches(block.heading, str(raised.value)), (
                f"{name}:{block.line} raised a message that does not hold its heading:\n{raised.value}"
            )


def call(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_flatwise(arguments: list[str]) -> None:
    """Read the command line and its methods as the program does, and stop there."""
    cli = pytest.importorskip("flatwise.cli")
    methods = pytest.importorskip("flatwise.lab.methods", reason="needs flatwise[lab]")
    settings = cli.parse(arguments)
    if arguments[:1] == ["compare"] and settings is not None:  # None: the help was asked for
        methods.trained_methods(settings)


def check_make(arguments: list[str]) -> None:
    call("make", "--dry-run", "--no-print-directory", *arguments)
    goals = [argument for argument in arguments if "=" not in argument]
    settings = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if goals == ["compare"]:
        check_flatwise(["compare", *shlex.split(settings.get("ARGS", ""))])


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install", arguments
    wanted = Requirement(arguments[1])
    assert wanted.name == "flatwise"
    assert wanted.extras <= set(metadata.metadata("flatwise").get_all("Provides-Extra", []))


def check_python(arguments: list[str]) -> None:
    """A script or a module that is there, and paths that are."""
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None, arguments
        arguments = arguments[2:]
    paths = [argument for argument in arguments if "/" in argument]
    assert all((ROOT / path).exists() for path in paths), arguments


def check_launch(arguments: list[str]) -> None:
    """What starts several processes of `-m flatwise`: the part behind it is read as the program reads it."""
    place = arguments.index("flatwise")
    assert arguments[place - 1] == "-m", arguments
    check_flatwise(arguments[place + 1 :])


COMMANDS = {
    "torchrun": check_launch,
    "accelerate": check_launch,
    "python": check_python,
    "flatwise": check_flatwise,
    "make": check_make,
    "pip": check_pip,
}


def check_bash(block: Block) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] in COMMANDS, f"no check for the command {words[0]!r} of line {block.line}"
            COMMANDS[words[0]](words[1:])


def recorded(text: str) -> None:
    """Each line must be one that a run printed."""
    records = [path.read_text().splitlines() for path in sorted((ROOT / "docs" / "results").glob("*.txt"))]
    known = {line.strip() for record in records for line in record}
    for line in text.splitlines():
        assert line.strip() in known | {""}, f"no record holds the line {line!r}"


def quoted_tables(page: str) -> str:
    """The tables under headings that say that an output is shown."""
    sections = re.findall(r"^#+ What [^\n]* shows\n(.*?)(?=^#|\Z)", page, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(line for section in sections for line in section.splitlines() if line.startswith("|"))


def check_page(page: str, name: str) -> None:
    blocks = blocks_of(page)
    recorded(quoted_tables(page))
    run_python(blocks, name)
    for block in blocks:
        if block.info == "bash":
            check_bash(block)
        elif block.info == "text":
            recorded(block.text)
        else:
            assert block.info in ("python", "python raises"), f"{name}:{block.line} is in {block.info!r}"


def links_of(page: str) -> list[str]:
    """The targets of the page's links that are files of this repository."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target.split("#")[0] for target in targets if "://" not in target and not target.startswith("#")]


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_block_of_the_page_works(path, tmp_path, monkeypatch):
    for framework in NEEDS.get(path.name, ()):
        pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)  # where a page writes files
    check_page(path.read_text(), str(path.relative_to(ROOT)))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_of_the_page_leads_to_a_file(path):
    missing = [target for target in links_of(path.read_text()) if not (path.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_test_that_the_page_names_exists(path):
    named = re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", path.read_text())
    missing = [name for name, file in named if f"def {name}(" not in (path.parent / file).read_text()]
    assert not missing


def test_the_readme_has_blocks_of_each_kind():
    page = (ROOT / "README.md").read_text()
    assert {block.info for block in blocks_of(page)} >= {"python", "bash"}
    assert quoted_tables(page)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ("```python\nfrom flatwise import NoSuchName\n```", "NoSuchName"),
        ("```python\nprint(\n```", "never closed"),
        ("```python\nfirst = 1\n```\n```python\nprint(frist)\n```", "frist"),
        ("# An error\n```python raises\n1 + 1\n```", "DID NOT RAISE"),
        ("# An error\n```python raises\nraise ValueError('another')\n```", "does not hold its heading"),
        ("```bash\nflatwise compare --no-such-option 3\n```", "no-such-option"),
        ("```bash\nflatwise compare --methods nosuchmethod\n```", "nosuchmethod"),
        ("```bash\nmake compare ARGS='--no-such-option 3'\n```", "no-such-option"),
        ("```bash\nmake no-such-goal\n```", "no-such-goal"),
        ("```bash\npip install 'flatwise[nosuchextra]'\n```", "nosuchextra"),
        ("```bash\nrm -rf runs\n```", "no check for the command 'rm'"),
        ("```text\na line that no run ever printed\n```", "no record holds"),
        ("## What it shows\n| method | accuracy |\n", "no record holds"),
        ("```\nwithout a language\n```", "is in ''"),
        ("```python\nx = 1\n", "never closed"),
    ],
)
def test_a_broken_block_is_noticed(broken, complaint):
    with pytest.raises((Exception, pytest.fail.Exception), match=re.escape(complaint)):
        check_page(broken, "broken.md")


def test_a_good_page_is_not_called_broken():
    check_page("# An error\n```python raises\nraise ValueError('An   `error`, and more')\n```\n", "good.md")


def test_the_table_of_the_readme_holds_the_numbers_of_its_raw_record():
    raw = json.loads((ROOT / "docs" / "results" / "compare.json").read_text())
    rows = [line for line in quoted_tables((ROOT / "README.md").read_text()).splitlines() if line[2].isalpha()][1:]
    assert len(rows) == len(raw["methods"])
    for row, (name, method) in zip(rows, raw["methods"].items(), strict=True):
        accuracy = method["test_accuracy"]
        assert row.startswith(f"| {name} ")
        assert f" {100 * accuracy['mean']:.1f} ± {100 * accuracy['ci95']:.1f} " in row


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_example_runs(path):
    pytest.importorskip("sklearn", reason="the examples train on scikit-learn's digits")
    assert call(sys.executable, str(path)).strip()

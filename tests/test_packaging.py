"""What is installed: names, versions, files, and what `import flatwise` drags in."""

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import pytest

import flatwise

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_flatwise_imports_torch_and_the_standard_library_only():
    # what torch itself imports is not ours to answer for
    code = "import sys, torch; before = set(sys.modules); import flatwise; print(*(set(sys.modules) - before))"
    foreign = {
        name
        for name in python(code).split()
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "torch", "flatwise"}
    }
    assert not foreign


@pytest.mark.parametrize(
    "module",
    [
        "torchvision",
        "matplotlib",
        "scipy",
        "sklearn",
        "rich",
        "jsonargparse",
        "flatwise.lab",
        "flatwise.report",
        "flatwise.measure",
    ],
)
def test_importing_flatwise_leaves_out(module):
    assert python(f"import sys, flatwise; print({module!r} in sys.modules)").strip() == "False"


def test_the_measures_are_there_once_they_are_touched():
    code = "import flatwise; print(flatwise.measure.__name__, hasattr(flatwise, 'measures'))"
    assert python(code).split() == ["flatwise.measure", "False"]


def test_the_public_names_are_there():
    assert set(flatwise.__all__) >= {"SAM", "StepRecord", "create", "list_variants", "variant_info"}
    assert not [name for name in flatwise.__all__ if not hasattr(flatwise, name)]


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert metadata.version("flatwise") == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_extras_are_those_of_the_project_file():
    provided = metadata.metadata("flatwise").get_all("Provides-Extra", [])
    assert {"measure", "lab", "jax", "dev"} <= set(provided) == set(PROJECT["optional-dependencies"])


def test_the_core_depends_on_torch_alone():
    assert [re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]] == ["torch"]


def test_the_types_are_marked_as_shipped():
    assert files("flatwise").joinpath("py.typed").is_file()


def test_the_citation_names_the_paper():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Foret",
        "Kleiner",
        "Mobahi",
        "Neyshabur",
    ]
    assert (paper["year"], paper["identifiers"][0]["value"]) == (2021, "arXiv:2010.01412")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source archive, built offline by the backend of the project file."""
    pytest.importorskip("hatchling", reason="hatchling (in the dev extra) builds the wheel")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, archive


def test_the_wheel_holds_the_package_its_types_and_its_licence(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    information = f"flatwise-{PROJECT['version']}.dist-info"
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert names >= modules | {
        "flatwise/py.typed",
        "flatwise/report/assets/script.js",
        f"{information}/licenses/LICENSE",
    }
    assert {name.partition("/")[0] for name in names} == {"flatwise", information}


def test_the_source_archive_holds_what_its_tests_need(built):
    root = f"flatwise-{PROJECT['version']}"
    with tarfile.open(built[1]) as archive:
        names = {name.removeprefix(f"{root}/") for name in archive.getnames()}
    wanted = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "Makefile",
        "tools/venv.sh",
    }
    assert names >= wanted | {"docs/step.md", "tests/test_readme.py", "src/flatwise/py.typed"}

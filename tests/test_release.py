"""Files of a release agree with each other and have no placeholders."""

import os
import pathlib
import re
import tomllib

import pytest

import mtljax

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TAG = os.environ.get("MTLJAX_RELEASE")  # set by the workflow of a release
release = pytest.mark.skipif(not TAG, reason="only for the tag of a release")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def cited(field):
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    found = re.search(rf"^{field}: (.+)$", text, re.M)
    return found and found[1]


def test_the_citation_has_the_version_of_the_package():
    assert cited("version") == mtljax.__version__
    assert cited("license") == PROJECT["project"]["license"]
    assert cited("cff-version") == "1.2.0"


def test_the_floors_have_no_gap_between_versions_of_python():
    jax = [d for d in PROJECT["project"]["dependencies"] if d.startswith("jax>")]
    markers = sorted(d.partition(";")[2].strip() for d in jax)
    assert markers == ["python_version < '3.14'", "python_version >= '3.14'"]


def test_the_sdist_leaves_results_and_built_pages_out():
    sdist = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]
    listed = [ROOT / path.lstrip("/") for path in sdist["include"] if "*" not in path]
    assert all(path.exists() for path in listed)
    size = 0
    for top in listed:
        for file in [top] if top.is_file() else top.rglob("*"):
            path = file.relative_to(ROOT)
            built = {"results", "_build", "_generated", "api", "repository"}
            copied = path.parts[:2] == ("docs", "notebooks")
            unwanted = copied or set(path.parts) & {"__pycache__", *built}
            if file.is_file() and not unwanted and file.suffix != ".ipynb":
                size += file.stat().st_size
    assert "/notebooks/*.ipynb" in sdist["exclude"]
    assert size < 5e6  # compressed to at most 2 MB


@pytest.mark.skipif(not WORKFLOWS, reason="workflows are part of a clone only")
@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows(file):
    yaml = pytest.importorskip("yaml")
    text = file.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"])
            for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", "")):
                assert re.search(rf"^{target}:", makefile, re.M), target


@release
def test_the_tag_is_the_version():
    assert f"v{mtljax.__version__}" == TAG


@release
def test_no_placeholder_remains():
    assert "example.org" not in str(PROJECT["project"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", cited("date-released") or "")


@release
def test_the_pages_are_those_of_a_published_package():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # An index shows the README without the files that relative links lead to.
    for link in re.findall(r"\]\(([^)\s]+)\)", readme):
        assert re.match(r"https?://|#", link), link
    for page in ("README.md", "docs/index.md", "docs/installation.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert "not on a package index" not in text, page


@release
def test_the_readme_has_absolute_links():
    """Relative links and images do not work on the package index."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((?!https://)([^)]*)\)", text) == []


@release
def test_the_changelog_has_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[?([^\]\s]+)", text, re.M)
    assert next(h for h in headings if h != "Unreleased") == mtljax.__version__

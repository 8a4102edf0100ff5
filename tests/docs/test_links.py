"""README and docs/: links lead somewhere, tables name tests that exist, and README stays short."""

import re
from pathlib import Path

import pytest
import yaml

import afcache
from bench.readme_numbers import PAGES
from tests.docs.pages import ROOT, anchors, name_of, without_code

TESTS = "\n".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file_and_its_anchor_to_a_heading(page: Path):
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)) if "://" not in target]
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(file), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_page_can_be_reached_and_begins_with_its_title(page: Path):
    readme = (ROOT / "README.md").read_text()
    assert page.read_text().startswith("# ")
    assert page.name == "README.md" or f"]({name_of(page)})" in readme


def test_tables_name_tests_that_exist():
    page = (ROOT / "docs" / "compatibility.md").read_text()
    named = set(re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", page))
    assert len(named) > 50
    assert {name for name in named if f"def {name}(" not in TESTS} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path):
    named = set(re.findall(r"`((?:tests|bench|afcache|docs)/[\w/.]+)`", page.read_text()))
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_readme_is_short_and_says_beside_its_first_number_what_it_was_measured_on():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    first = next(i for i, line in enumerate(lines) if re.search(r"\d\.\d\dx", line))
    near = " ".join(lines[first : first + 4])
    for word in ("mini-FLUX", "32 x 32 pixels with 12 blocks", "Nothing was run on FLUX.1-dev's own weights"):
        assert word in near


def test_the_words_of_the_measurements_are_said_before_they_are_used():
    readme = (ROOT / "README.md").read_text()
    results = (ROOT / "docs" / "results.md").read_text()
    for word in ("Block evaluation", "Refresh", "True CFG", "Graph break"):
        assert readme.index(f"*{word}*") < readme.index("## Two commands")
    for word in ("block evaluation", "refresh", "residual", "True CFG", "PSNR", "Efficiency", "graph break"):
        assert results.index(f"**{word}**") < results.index("## Presets")


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert all(set(author) & {"name", "family-names"} for author in citation["authors"])
    assert (citation["version"], citation["license"]) == (afcache.__version__, "Apache-2.0")
    assert citation["title"].startswith("AFCache")


def test_the_changelog_tells_of_this_version():
    log = (ROOT / "CHANGELOG.md").read_text()
    assert log.startswith("# Changelog")
    versions = re.findall(r"^## \[([^\]]+)\]", log, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert afcache.__version__ in versions

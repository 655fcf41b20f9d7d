"""The files that state a version state the same one."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def test_the_newest_section_of_the_changelog_is_the_version():
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert sections[:2] == ["Unreleased", VERSION]


def test_the_citation_names_the_version_and_its_date():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    (date,) = re.findall(r'^date-released: "(.+)"', citation, re.MULTILINE)
    assert re.findall(r"^version: (.+)", citation, re.MULTILINE) == [VERSION]
    assert f"## [{VERSION}] - {date}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")

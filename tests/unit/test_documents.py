"""The documents as people read them in the repository: their tables, their links, and the README's first screen."""

import re
import runpy
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from aurora_router import __version__

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/[!_]*.md")])
CODE = re.compile(r"^ *```.*?^ *```$|``.*?``|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(document: Path) -> set[str]:
    """The anchors that a forge and the site make of headings: lower case, hyphens for spaces, no punctuation."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document):
    """A link is https, or leads to a file of the repository, and to a heading that it has."""
    for link in LINK.findall(CODE.sub("", document.read_text())):
        url = urlsplit(link)
        if url.scheme or url.netloc:
            assert url.scheme == "https", link
            assert url.netloc, link
            continue
        target = (document.parent / url.path).resolve() if url.path else document
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not url.fragment or url.fragment in anchors(target), link


def test_what_is_made_of_the_code_is_what_it_says(monkeypatch):
    """The tables of settings, failures, events and errors are those that `scripts/render` makes now."""
    monkeypatch.setattr(sys, "argv", ["render", "--check"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(ROOT / "scripts" / "render"))


def test_the_readme_is_short_and_begins_with_commands():
    """The README has at most 200 lines, and its first screen says how to run the demo and the tests."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert [line.partition("#")[0].strip() for line in lines[3:5]] == ["bash scripts/demo", "bash scripts/test"]


def test_the_changelog_knows_this_version():
    """CHANGELOG.md has a section on the version of the package."""

    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_index_gets_links_that_work_there():
    """The README in the package's metadata has absolute links only, because the index has no other files."""
    description = metadata.metadata("aurora-router").get_payload()
    links = LINK.findall(CODE.sub("", description))
    assert links
    assert [link for link in links if not link.startswith("https://")] == []

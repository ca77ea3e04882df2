"""The documentation: it builds, what it names is there, and what stands twice says the same."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import layalign

ROOT = Path(__file__).parents[1]
REPOSITORY = re.compile(r"https://github\.com/layalign/layalign/(?:blob|tree)/main/([^\s)>\"#]+)")
PROSE = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml"),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
]


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed; `make docs` installs it"
)
def test_site_builds_without_a_broken_link_or_reference(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "site" / "api" / "operators" / "index.html").read_text(encoding="utf-8")
    for name in ("adaptive_fusion_attention", "cross_key_values", "layer_mix", "stream_linear"):
        assert 'id="layalign.kernels' in page and name in page
    for page in (tmp_path / "site").rglob("index.html"):
        fetched = re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)\"", page.read_text(encoding="utf-8")
        )
        assert not fetched, f"{page} fetches {fetched}"


def test_links_to_the_repository_name_what_exists():
    found = 0
    for page in PROSE:
        for path in REPOSITORY.findall((ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page}: {path}"
            found += 1
    assert found > 10


@pytest.mark.parametrize("page", [page for page in PROSE if page.endswith(".md")])
def test_paths_in_prose_name_what_exists(page):
    """`kernels/...`, `train/...` and the like in code spans; names with NAME or a star apart."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for path in re.findall(r"`((?:kernels|layalign|train|bench|tests|docs|examples)/[\w./-]*)`", text):
        assert "NAME" in path or (ROOT / path).exists(), f"{page}: {path}"


def test_figures_are_well_formed():
    figures = sorted((ROOT / "docs" / "figures").glob("*.svg"))
    assert figures
    for path in figures:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
        assert "http://" not in path.read_text(encoding="utf-8").replace("http://www.w3.org/", "")


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == layalign.__version__
    paper = citation["preferred-citation"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["title"] in readme
    authors = " and ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    assert authors in readme


def test_changelog_has_this_version():
    assert f"## {layalign.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_benchmarks_page_shows_what_is_recorded():
    """Each machine with recorded results has its section, and the marks that the report writes between are there."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.count("<!-- bench:begin -->") == page.count("<!-- bench:end -->") == 1
    for path in (ROOT / "bench" / "results").glob("*/benchmarks.json"):
        machine = json.loads(path.read_text(encoding="utf-8"))["machine_info"]
        assert f"### On {machine['device']}" in page


def test_extras_are_installed_from_the_checkout():
    """The package is on no index. Each command names an extra that there is, and the table says of `all` what it brings."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = []
    for page in PROSE:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert not re.search(r"pip install (-\S+ )*[\"']?layalign", text), page
        found += re.findall(r'pip install -e "\.\[([\w-]+)\]"', text)
    assert {"all", "vllm", "ui", "lm-eval"} <= set(found)
    assert all(f"\n{extra} = [" in settings for extra in found)
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| `all` \| (.*?) \|", page, re.MULTILINE)
    assert f'\nall = ["layalign[{",".join(re.findall("`([a-z]+)`", row))}]"]\n' in settings

"""The documentation is built without a warning: every link leads somewhere, and the references are complete."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.main import get_command

import fa2gen
import fa2gen.distributed
from fa2gen.cli import app

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "examples", "fa2gen", "generated", "specs", "templates", "tests")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if find_spec("material") is None:
        pytest.skip("pip install mkdocs-material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "NO_MKDOCS_2_WARNING": "1",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "excluded from the built site" not in done.stderr
    return folder


def text_of(page):
    return html.unescape(re.sub("<[^>]*>", "", page.read_text()))


def test_the_reference_of_python_has_every_public_name(site):
    page = site / "docs" / "python" / "index.html"
    anchors = set(re.findall(r'<h3 id="([^"]+)"', page.read_text()))
    names = {*fa2gen.__all__, *fa2gen.distributed.__all__}
    assert {name.lower() for name in names} <= anchors
    text = text_of(page)
    assert "cu_seqlens  (documents + 1,) int32" in text, "docstrings keep their columns"
    assert "scheme: Scheme = 'auto'" in text


def test_the_reference_of_commands_has_every_command(site):
    text = text_of(site / "docs" / "command-line" / "index.html")
    for name in get_command(app).commands:
        assert f"Usage: fa2gen {name}" in text
    assert "--head-dim" in text and "Exit status" in text


def test_pages_lie_where_their_sources_do(site):
    """So that a link between two pages holds in a checkout and on the site, and what they link to is there as well."""
    for source in ("README.md", "templates/README.md", "templates/sm90/README.md", "tests/bench/README.md"):
        assert (site / source).with_name("index.html").is_file()
    assert (site / "tests/bench/results/h200-paper-fwd-bf16.png").is_file()
    assert (site / "examples/context_parallel.py").is_file()


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert not loaded, (page, loaded)


def test_lines_of_pages_are_within_120_columns():
    """Of the notebook's tables not; ruff holds Python to it."""
    pages = [
        path for folder in (".", *FOLDERS) for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
    ]
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in pages
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > 120 and not path.match("notes-*.md")
    ]
    assert len(pages) > 20 and not long, long

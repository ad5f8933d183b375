"""`fa2gen report`: what it says of lines is what the cubin holds, and its page is one that browsers show whole."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from fa2gen import KernelSpec, make_plan
from fa2gen.cli.app import app
from fa2gen.errors import Fa2GenError, InvalidInput
from fa2gen.explain import device_named, explain
from fa2gen.report import disassembler, listing_of, page, sass

NAME = "fa2_bwd_sm80_bf16_d64_causal_m64_n64_s2_w4"  # several entry points
needs_nvdisasm = pytest.mark.skipif(disassembler() is None, reason="pip install nvidia-cuda-nvdisasm")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FA2GEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def plan():
    return make_plan(KernelSpec.from_name(NAME))


@pytest.fixture(scope="module")
def listing(plan, cache):
    try:
        return listing_of(plan)
    except Fa2GenError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def explanation(plan):
    return explain(plan.problem, device_named("A100"), "sm80", tiling=plan.tiling)


RESULT = {
    "provenance": {"gpu": "NVIDIA A100", "measured": "2026-01-02", "kernels": [NAME]},
    "rows": [
        {"preset": "paper", "direction": "bwd", "head_dim": 64, "dtype": "bf16", "causal": causal, "batch": 1}
        | {"seqlen": 4096, "heads": 8, "heads_kv": 8, "tflops": {"fa2gen-sm80": 123.0, "fa2": ours, "math": 7.0}}
        for causal, ours in ((True, 100.0), (False, 61.0))
    ],
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "mine.json"
    path.write_text(json.dumps(RESULT))
    return path


@pytest.fixture(scope="module")
def text(listing, explanation, result):
    return page(listing, explanation, [result])


def parsed(text):
    """The page as XML, which forgives nothing."""
    head, _, rest = text.partition("\n")
    assert head == "<!DOCTYPE html>"
    return ElementTree.fromstring(rest.replace(' xmlns="http://www.w3.org/1999/xhtml"', ""))


@needs_nvdisasm
def test_instructions_belong_to_the_lines_that_they_came_from(listing, plan):
    found = sass.instructions(listing.entry.cubin)
    assert {one.symbol for one in found} == {entry.symbol for entry in plan.entry_points}
    assert sum(len(line.instructions) for line in listing.lines) == len(found)
    products = [line for line in listing.lines if any("HMMA" in one.text for one in line.instructions)]
    assert products and all("mma.sync" in "\n".join(around(listing, line, 8)) for line in products)
    for symbol, live in listing.live.items():
        registers = listing.entry.report.registers_of[symbol]
        assert registers - 12 <= max(live) <= registers, "more than half of what ptxas took is alive somewhere"


def around(listing, line, lines):
    return [other.text for other in listing.lines[max(0, line.number - lines) : line.number + lines]]


def test_the_page_has_the_whole_source(text, listing):
    rows = {row.get("id"): row for row in parsed(text).iter("tr") if (row.get("id") or "").startswith("L")}
    assert list(rows) == [f"L{line.number}" for line in listing.lines]
    shown = []
    for row in rows.values():
        summary = row.find(".//summary")
        shown.append("".join((row[-1] if summary is None else summary).itertext()))
    assert shown == listing.entry.source.splitlines()
    counts = [int(row[2].text) for row in rows.values() if row[2].text]
    assert sum(counts) == sum(map(len, listing.live.values()))


def test_the_page_needs_nothing_else(text):
    """No script, nothing that is loaded from elsewhere; links stay on the page."""
    root = parsed(text)
    assert not [tag for tag in ("script", "link", "img", "iframe", "object") if root.find(f".//{tag}") is not None]
    assert "url(" not in text and "@import" not in text
    anchors = {element.get("id") for element in root.iter()}
    for link in root.iter("a"):
        assert link.get("href").removeprefix("#") in anchors


def test_the_map_is_drawn_to_scale(text, explanation):
    svg = next(parsed(text).iter("svg"))
    width = float(svg.get("viewBox").split()[2])
    rects = [rect for rect in svg.iter("rect") if rect.get("class") != "frame"]
    assert len(rects) == len(explanation.shared_memory)
    for rect, (_, offset, size) in zip(rects, explanation.shared_memory, strict=True):
        drawn = [float(rect.get(name)) * explanation.shared_memory_limit / width for name in ("x", "width")]
        assert drawn == pytest.approx([offset, size], abs=explanation.shared_memory_limit / width / 50)


def test_the_page_says_why_and_how_fast(text, explanation):
    words = html.unescape(re.sub("<[^>]*>", " ", text))
    assert explanation.reason in words
    assert "1.230" in words and "this kernel" in words  # 123 over the best peer's 100, of the causal row alone
    assert "2.016" not in words
    assert all(other.kernel in words for other in explanation.alternatives)


def test_a_file_that_is_no_result(listing, explanation, tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(InvalidInput, match=r"other\.json"):
        page(listing, explanation, [path])


def test_without_nvdisasm(plan, explanation, monkeypatch, listing):
    monkeypatch.setattr(sass, "disassembler", lambda: None)
    text = page(listing_of(plan), explanation, [])
    assert "pip install nvidia-cuda-nvdisasm" in text and not list(parsed(text).iter("details"))
    assert text.count('<tr id="L') == len(listing.lines)


def test_an_unreadable_cubin(listing):
    assert sass.instructions(listing.entry.cubin[:100]) == []


def test_the_command(listing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    assert run(app, ["report", NAME, "--html"]).exit_code == 0
    assert Path(f"{NAME}.html").read_text().startswith("<!DOCTYPE html>")
    rows = json.loads(run(app, ["report", NAME, "--json"]).stdout)
    assert [row["line"] for row in rows] == [line.number for line in listing.lines]
    said = run(app, ["report", NAME])
    assert said.exit_code == 0 and not list(Path().glob("*.json"))
    assert run(app, ["report", NAME, "--out", "x.html"]).exit_code == 2
    assert run(app, ["report", NAME, "--html", "--out", f"{NAME}.html/x.html"]).exit_code == 2
    (example,) = (line for line in get_command(app).commands["report"].epilog.splitlines() if "--out" in line)
    assert run(app, example.split()[1:]).exit_code == 0 and Path(example.split()[-1]).exists()


# In a browser -----------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """<script>
const lines = [...document.querySelectorAll("details")];
const before = lines.map(line => line.getBoundingClientRect().height);
lines.forEach(line => line.querySelector("summary").click());
const grown = lines.filter((line, i) => line.getBoundingClientRect().height > before[i]).length;
const map = document.querySelector("svg").getBoundingClientRect();
document.title = JSON.stringify({lines: lines.length, grown, map: map.width,
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  curves: [...document.querySelectorAll("polyline")].map(curve => curve.getBBox().width)});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_in_a_browser(text, listing, tmp_path):
    """Lines fold out at a click, pictures have a size, and nothing is wider than the window."""
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", LOOK))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1100,900", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    title = re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-2000:]
    seen = json.loads(html.unescape(title[1]))
    with_sass = sum(bool(line.instructions) for line in listing.lines)
    assert seen["lines"] == seen["grown"] == with_sass
    assert seen["map"] > 500 and seen["overflow"] <= 0
    assert len(seen["curves"]) == len(listing.live) and all(width > 100 for width in seen["curves"])

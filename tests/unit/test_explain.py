"""`fa2gen explain`: the choice, what else there was and why, the shared-memory map, and the resource report."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from fa2gen.catalog import TunedRow
from fa2gen.cli import app
from fa2gen.compile import ResourceReport
from fa2gen.errors import CompileError, InvalidInput
from fa2gen.explain import KNOWN_DEVICES, device_named, explain, lines
from fa2gen.select import default_tiling, forget
from fa2gen.spec import KernelSpec, Problem, Tiling

H200 = KNOWN_DEVICES[0]
PROBLEM = Problem(head_dim=80, mask="causal")


@pytest.fixture(autouse=True)
def _no_gpu_and_no_compiler(monkeypatch):
    def refuse(*_):
        raise CompileError("there is no compiler in this test")

    monkeypatch.setattr("fa2gen.store.Store.get_or_compile", refuse)
    monkeypatch.setattr("fa2gen.explain._gpu_here", lambda: None)


@pytest.fixture
def tuned(monkeypatch):
    """Nothing is in specs/ but the rows that a test puts into this dict."""
    rows: dict[tuple[Problem, str], tuple[TunedRow, ...]] = {}
    monkeypatch.setattr("fa2gen.select.tuned_rows", lambda: rows)
    monkeypatch.setattr("fa2gen.select.written_tilings", dict)
    forget()
    yield rows
    forget()


def text_of(found):
    return "\n".join(f"{label:<14}{text}" for label, text in lines(found))


def test_default_is_explained(tuned):
    found = explain(PROBLEM, H200, seqlen=4096)
    assert found.kernel == KernelSpec(problem=PROBLEM, tiling=default_tiling(PROBLEM, "sm90")).name
    text = text_of(found)
    assert "default tiling for head dim 80 on sm90" in text and "cost model" in text
    assert "not compiled: there is no compiler in this test" in text
    assert "shared memory" in text and f"{found.shared_memory_bytes:,} B of 232,448 B" in text


def test_a_tuned_row_is_explained(tuned):
    def kernel(tile_n):
        tiling = Tiling(arch="sm90", tile_m=128, tile_n=tile_n, num_mma_warps=8)
        return KernelSpec(problem=PROBLEM, tiling=tiling).name

    origin = {"gpu": "NVIDIA H200", "nvrtc": "1.2.3", "measured": "2026-01-01"}
    figures = ((2048, 8192), (600.0, 620.0), (550.0, 560.0), (590.0, 610.0), 33, origin)
    mine = TunedRow(kernel(96), 1024, None, kernel(128), kernel(112), *figures)
    short = TunedRow(kernel(64), 0, 1023, kernel(128), kernel(96), *figures)
    tuned[PROBLEM, "sm90"] = (short, mine)
    found = explain(PROBLEM, H200, seqlen=4096)
    assert found.kernel == kernel(96)
    why_not = {other.kernel: other.why_not for other in found.alternatives}
    assert why_not[kernel(64)] == "meant for seqlen 0 to 1023, not 4096"
    assert why_not[kernel(112)].startswith("measured: 0.98")
    assert "NVRTC 1.2.3" in found.warning  # another compiler is a warning, not a refusal
    text = text_of(found)
    assert "TFLOP/s at seqlen 2048: 600 (550, 590), 8192: 620 (560, 610)" in text
    assert "best of 33 on NVIDIA H200, NVRTC 1.2.3, 2026-01-01" in text
    json.dumps(found.to_json(), allow_nan=False)


def test_a_backward_choice_is_explained(tuned, monkeypatch):
    problem = Problem(direction="bwd", head_dim=80, mask="causal")
    name = KernelSpec(problem=problem, tiling=default_tiling(problem, "sm90")).name
    counts = {name: 168, f"{name}_preprocess": 38, f"{name}_postprocess": 34}
    compiled = SimpleNamespace(report=ResourceReport(168, 0, 0, 0, 1, 0.5, (), counts))
    monkeypatch.setattr("fa2gen.store.Store.get_or_compile", lambda *_: compiled)
    found = explain(problem, H200, seqlen=4096)
    assert found.kernel == name and [kernel["symbol"] for kernel in found.kernels] == [
        f"{name}_preprocess",
        name,
        f"{name}_postprocess",
    ]
    text = text_of(found)
    assert text.startswith("problem       bwd, head dim 80, bf16, causal mask, seqlen 4096, on NVIDIA H200")
    assert "168 registers a thread at the launch" in text
    assert "preprocess: 38 registers a thread, 128 threads, 0 B of shared memory" in text
    assert "postprocess: 34 registers a thread, 160 threads, 16,384 B of shared memory" in text
    assert any(other.cycles for other in found.alternatives)
    json.dumps(found.to_json(), allow_nan=False)


def test_an_expression_is_explained():
    """Formula, derivative and what an element costs, in the names that code has."""
    problem = Problem(direction="bwd", head_dim=64, score="cap * tanh(s / cap)", allow="j <= i or j < prefix")
    found = explain(problem, H200)
    text = text_of(found)
    assert "number_0 * tanh(s / number_0)" in text and "1.0 - tanh(s / number_0) ** 2" in text
    assert "j <= i or j < number_1" in text
    assert "instructions for the score and its derivative by s, about" in text
    assert json.loads(json.dumps(found.to_json()))["formulas"]["allow"] == "j <= i or j < number_1"
    assert explain(Problem(head_dim=64), H200).formulas == {}


def test_an_explanation_says_what_tiles_are_passed_by_for():
    problem = Problem(head_dim=64, allow="document[b, i] == document[b, j] and i - j < width")
    assert "numbers of input_0 that" in explain(problem, device_named("h100", "sm90")).formulas["a tile"]
    positions = Problem(head_dim=64, allow="i - j < width")
    assert explain(positions, device_named("h100", "sm90")).formulas["a tile"].endswith("sees a key of it")


def test_devices_by_name():
    assert device_named("h100").name == "NVIDIA H100 80GB HBM3"
    assert device_named(None) == H200
    assert device_named(None, "sm80").compute_capability[0] == 8
    assert device_named("rtx 4090") == device_named("4090") == device_named("NVIDIA GeForce RTX 4090")


@pytest.mark.parametrize("name", ["V100", "h20", "a10", "l4", "n", "", "-", "h100x"])
def test_a_part_of_a_word_is_no_name(name):
    """An H20 is no H200."""
    with pytest.raises(InvalidInput, match="is no GPU that is known here; known: NVIDIA H200"):
        device_named(name)


def test_a_name_of_several_is_refused():
    with pytest.raises(InvalidInput, match=r"'nvidia' is the name of several GPUs: NVIDIA H200, NVIDIA H100"):
        device_named("nvidia")


def test_a_kernel_that_is_asked_for_is_explained(tuned):
    tiling = Tiling(arch="sm90", tile_m=128, tile_n=96, num_mma_warps=8)
    found = explain(PROBLEM, H200, seqlen=4096, tiling=tiling)
    assert found.kernel == KernelSpec(problem=PROBLEM, tiling=tiling).name
    taken = KernelSpec(problem=PROBLEM, tiling=default_tiling(PROBLEM, "sm90")).name
    assert found.reason == f"asked for; the selector takes {taken}"
    assert taken in {other.kernel for other in found.alternatives}


def test_command():
    runner = CliRunner()
    done = runner.invoke(app, ["explain", "--head-dim", "80", "--seqlen", "4096", "--mask", "causal", "--gpu", "h200"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("problem        fwd, head dim 80, bf16, causal mask, seqlen 4096, on NVIDIA H200")
    done = runner.invoke(app, ["explain", "--head-dim", "72", "--direction", "bwd"])
    assert done.exit_code == 0 and done.stdout.startswith("problem        bwd, head dim 72")
    done = runner.invoke(app, ["explain", "--head-dim", "72", "--json"])
    assert [one["problem"]["head_dim"] for one in json.loads(done.stdout)] == [72]

"""Benchmarks with no GPU: what is measured, how time is taken, what ratios mean, and figures from a small result."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from fa2gen.bench import peers, protocol, provenance, report, run
from fa2gen.bench.plot import plot
from fa2gen.bench.points import HIDDEN, PRESETS, TOKENS, Point, flops_of, preset_points, spec_points
from fa2gen.bench.workloads import WORKLOADS
from fa2gen.cli import app
from fa2gen.cli.options import Asked
from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.expression import evaluate, parse
from fa2gen.options import Options, Shape
from fa2gen.select import best_spec
from fa2gen.spec import KernelSpec, Problem, Tiling
from fa2gen.testing import problems


def row(preset="paper", head_dim=64, causal=False, seqlen=4096, heads_kv=None, direction="fwd", **tflops):
    heads = 2048 // head_dim
    return {
        "preset": preset,
        "direction": direction,
        "head_dim": head_dim,
        "dtype": "bf16",
        "causal": causal,
        "batch": 16384 // seqlen,
        "seqlen": seqlen,
        "heads": heads,
        "heads_kv": heads_kv or heads,
        "tflops": {name.replace("_", "-"): value for name, value in tflops.items()},
    }


@pytest.fixture
def document():
    grid = itertools.product((64, 128), (False, True), (512, 2048, 16384))
    rows = [row("paper", d, c, s, fa2gen_sm90=500.0 + s / 100, cudnn=450.0, fa3=520.0) for d, c, s in grid]
    rows += [row("odd", d, c, 4096, fa2gen_sm90=500.0, fa3=400.0) for d in (40, 72) for c in (False, True)]
    facts = {"gpu": "NVIDIA H200", "torch": "2.11", "nvrtc": "13.0.88", "matmul_8192_bf16_tflops": [700.0, 690.0]}
    return {"provenance": facts, "rows": rows}


# Points


def test_presets_are_those_of_the_paper():
    points = preset_points("paper")
    assert len(points) == 3 * 2 * 6
    assert all(point.batch * point.seqlen == 16384 and point.heads * point.head_dim == 2048 for point in points)
    odd = preset_points("odd")
    assert {(point.batch, point.seqlen) for point in odd} == {(4, 4096)}
    assert {32, 40, 48, 72, 80, 96, 112, 144, 160, 176, 192} == {point.head_dim for point in odd}
    assert all(point.heads % point.heads_kv == 0 for preset in PRESETS for point in preset_points(preset))


def test_presets_can_be_narrowed():
    assert [p.head_dim for p in preset_points("odd", head_dims=[80])] == [80, 80]
    with pytest.raises(InvalidInput, match=r"head dims are \[64, 128, 256\]"):
        preset_points("paper", head_dims=[80])
    with pytest.raises(InvalidInput, match="no preset"):
        preset_points("papers")


def test_backward_points_are_the_forward_ones():
    for preset in ("paper", "odd", "gqa"):
        forward, backward = preset_points(preset), preset_points(preset, direction="bwd")
        assert [replace(point, direction="bwd") for point in forward] == backward
        assert [point.flops for point in backward] == [2.5 * point.flops for point in forward]
        assert {point.problem.direction for point in backward} == {"bwd"}
    with pytest.raises(InvalidInput, match="forward only; bwd has paper, odd, gqa, sharded, window"):
        preset_points("host", direction="bwd")
    assert {point.direction for point in preset_points("host")} == {"fwd", "decode"}


def test_points_over_caches_are_a_direction_of_their_own():
    torch = pytest.importorskip("torch")
    points = preset_points("decode")
    assert {point.problem.direction for point in points} == {"decode"} and points[0].shape == Shape(128, 1, 4096, 32, 8)
    assert {point.problem.paged for point in points} == {False, True}
    assert points[0].size(32, 128, of_query=True) == (128, 1, 32, 128) and points[0].size(8, 128) == (128, 4096, 8, 128)
    (ragged,) = (point for point in points if point.keys)
    assert ragged.shape[:3] == (32, 1, max(ragged.keys)) and ragged.size(8, 128) == (32, max(ragged.keys), 8, 128)
    assert ragged.flops == sum(replace(points[0], batch=1, seqlen=keys).flops for keys in ragged.keys)
    assert Point.of_row(json.loads(json.dumps(ragged.to_json()))) == ragged
    assert {point.problem.cache_dtype for point in points} == {"same", "e4m3", "int8"}
    assert len(set(points)) == len(points) == len({str(point) for point in points})
    for point in points:
        kv = torch.randn(2, 64, 2, 16).bfloat16()
        k_cache, _, said = peers._cache(replace(point, batch=2, seqlen=64, heads_kv=2, keys=point.keys[:2]), kv, kv)
        assert k_cache.shape[1] == (point.page_size or 64) and said["cache_seqlens"].shape == (2,)
        whole = k_cache.float() * said["k_descale"][0, 0] if "k_descale" in said else k_cache.float()
        assert ("k_descale" in said) == (k_cache.element_size() == 1) == (point.cache_dtype != "same")
        if "block_table" in said:
            whole = whole[said["block_table"].long()].flatten(1, 2)
        torch.testing.assert_close(whole, kv.float(), atol=0.07, rtol=0.07)
    for preset, direction in (("decode", "bwd"), ("paper", "decode")):
        with pytest.raises(InvalidInput, match=f"preset {preset} has no points of direction {direction}"):
            preset_points(preset, direction=direction)
    for name, why in peers.find(["cudnn", "fa2"], direction="decode")[1].items():
        assert name in ("cudnn", "fa2") and why == f"over caches there are {', '.join(peers.OVER_CACHES)}"


def test_flops_as_the_paper_counts():
    point = Point("paper", "fwd", 128, "bf16", False, 4, 4096, 16, 16)
    assert point.flops == 4 * 4096**2 * 128 * 16 * 4
    assert Point("paper", "fwd", 128, "bf16", True, 4, 4096, 16, 16).flops == point.flops / 2
    chunk = replace(point, causal=True, tokens=1024)  # behind 3072 keys that all of it sees
    assert (
        chunk.flops == replace(point, seqlen=1024, causal=True).flops + replace(point, seqlen=3072, tokens=1024).flops
    )
    assert Point("paper", "bwd", 128, "bf16", False, 4, 4096, 16, 16).flops == point.flops * 2.5


# Protocol


class FakeTimer:
    """A device whose calls take the milliseconds that they add to `now`; `log` is the order of events."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def flush(self):
        self.now += 0.1
        self.log.append("flush")

    def mark(self):
        self.log.append("mark")
        return self.now

    def milliseconds(self, start, stop):
        return stop - start

    def synchronize(self):
        self.log.append("synchronize")

    def call(self, name, milliseconds):
        def run():
            self.now += milliseconds
            self.log.append(name)

        return run


def test_contestants_take_turns_and_each_call_follows_a_flush():
    timer = FakeTimer()
    times = protocol.interleaved({"a": timer.call("a", 1.0), "b": timer.call("b", 2.0)}, timer, rounds=4)
    assert times == {"a": pytest.approx([1.0] * 4), "b": pytest.approx([2.0] * 4)}
    turn = ["flush", "mark", "a", "mark", "flush", "mark", "b", "mark"]
    assert timer.log == turn * (protocol.WARMUP_ROUNDS + 4) + ["synchronize"]  # nothing is awaited in between


def test_rounds_fit_the_time():
    timer = FakeTimer()
    assert protocol.rounds_for({"a": timer.call("a", 9.9)}, timer, seconds=0.2) == 20 - protocol.WARMUP_ROUNDS
    assert protocol.rounds_for({"a": timer.call("a", 900.0)}, timer, seconds=0.2) == protocol.MIN_ROUNDS
    assert protocol.rounds_for({"a": timer.call("a", 0.01)}, timer, seconds=9.0) == protocol.MAX_ROUNDS


def test_host_time_is_a_call_of_many_inside_the_context():
    now = [0.0]
    inside = []

    @contextlib.contextmanager
    def context():
        inside.append(True)
        yield
        inside.pop()

    def call():
        assert inside
        now[0] += 5e-6

    found = protocol.host_microseconds({"a": call}, lambda: None, {"a": context}, clock=lambda: now[0])
    assert found == {"a": pytest.approx(5.0)}


def test_host_time_has_no_noise_in_it():
    """Neither of a machine that is slow at first, nor of one that does something else now and then; all take turns."""
    now = [0.0]
    turns = []

    def contestant(name, microseconds):
        def call():
            if turns[-1:] != [name]:
                turns.append(name)
            cold = now[0] < protocol.HOST_WARMUP_SECONDS / 2
            disturbed = len(turns) % 5 == 0
            # Cold it is quicker than ever after: a clock that has yet to fall counts as little.
            now[0] += 1e-6 * (microseconds * (0.5 if cold else 1.0) + (7.0 if disturbed else 0.0))

        return call

    calls = {"a": contestant("a", 50.0), "b": contestant("b", 80.0)}
    found = protocol.host_microseconds(calls, lambda: None, {}, clock=lambda: now[0])
    assert found == {"a": pytest.approx(50.0), "b": pytest.approx(80.0)}
    assert turns == ["a", "b"] * (len(turns) // 2) and len(turns) > 2 * protocol.HOST_ROUNDS
    assert now[0] > protocol.HOST_WARMUP_SECONDS
    assert protocol.host_microseconds({}, lambda: None, {}) == {}


def test_the_protocol_of_host_time_says_what_is_done():
    for number in (protocol.HOST_CALLS, protocol.HOST_ROUNDS, f"{protocol.HOST_WARMUP_SECONDS:g} s"):
        assert str(number) in protocol.HOST_PROTOCOL


# Peers and provenance


def test_unknown_contestants_are_refused():
    with pytest.raises(InvalidInput, match="no contestant 'fa5'; there are fa2gen-sm90"):
        peers.find(["fa5"])


def test_missing_peers_are_named_with_the_reason(tmp_path):
    broken = tmp_path / "fa3.so"
    broken.write_bytes(b"no library")
    found, missing = peers.find(["fa3", "fa4", "math"], broken)
    assert [one.name for one in found] == ["math"]
    assert missing["fa3"].startswith("fa3.so does not load") and "flash_attn.cute" in missing["fa4"]


def test_what_stands_for_some_points_says_for_which():
    """It is missed at no other: of 33 points over caches 27 had a note that `fa2gen-dense` stands for pages."""
    pytest.importorskip("torch")
    found, _ = peers.find([peers.DENSE, peers.PLAIN, peers.VARLEN])
    taken = {one.name: {p.preset for n in PRESETS for p in preset_points(n) if one.stands_for(p)} for one in found}
    assert taken == {peers.DENSE: {"varlen", "decode", "prefill"}, peers.PLAIN: {"flex"}, peers.VARLEN: {"flex"}}
    dense, *_ = found
    assert all(dense.stands_for(point) == bool(point.page_size) for point in preset_points("decode"))


@pytest.fixture
def libraries(monkeypatch):
    """FlashAttention-3 and -4 stand in, with the calls that theirs take, on the CPU."""
    torch = pytest.importorskip("torch")
    from fa2gen.reference import attention_backward_tiled, attention_reference

    def sequences(x, bounds, longest):
        lengths = bounds.diff().tolist()
        assert max(lengths) == longest
        return [part.unsqueeze(0) for part in x.split(lengths)]

    def fwd(
        q, k, v, *, softmax_scale, is_causal, num_splits,
        cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    ):  # fmt: skip
        options = {"causal": is_causal, "softmax_scale": softmax_scale}
        if cu_seqlens_q is None:
            return (*attention_reference(q, k, v, **options), None, None)
        parts = [sequences(x, cu_seqlens_k, max_seqlen_k) for x in (q, k, v)]
        found = [attention_reference(*of_one, **options) for of_one in zip(*parts, strict=True)]
        return torch.cat([out[0] for out, _ in found]), torch.cat([lse[0] for _, lse in found], 1), None, None

    def bwd(
        dout, q, k, v, out, lse, dq, dk, dv, *, softmax_scale, is_causal, cu_seqlens_q=None, max_seqlen_q=None, **_
    ):
        options = {"causal": is_causal, "softmax_scale": softmax_scale}
        parts = [[x] for x in (dout, q, k, v, out, lse, dq, dk, dv)]
        if cu_seqlens_q is not None:
            parts = [
                sequences(x.T if x is lse else x, cu_seqlens_q, max_seqlen_q)
                for x in (dout, q, k, v, out, lse, dq, dk, dv)
            ]
            parts[5] = [x.transpose(1, 2) for x in parts[5]]
        for *of_one, dq, dk, dv in zip(*parts, strict=True):
            for x, right in zip((dq, dk, dv), attention_backward_tiled(*of_one, **options), strict=True):
                x.copy_(right)
        return [lse]

    def flash_attn_func(q, k, v, causal):
        return attention_reference(q, k, v, causal=causal)

    operators = SimpleNamespace(fwd=fwd, bwd=bwd)
    monkeypatch.setattr(torch.ops, "flash_attn_3", operators, raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn_3", ModuleType("flash_attn_3"))
    monkeypatch.setitem(sys.modules, "flash_attn_3._C", ModuleType("flash_attn_3._C"))
    fa4 = ModuleType("flash_attn.cute")
    fa4.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", fa4)
    return operators


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("causal", [False, True])
def test_peers_compute_attention_and_its_gradients(libraries, direction, causal):
    """fa2 is torch's own on the CPU too. A call can be repeated, and returns nothing but what is timed."""
    torch = pytest.importorskip("torch")
    from fa2gen.reference import attention_reference

    found, missing = peers.find(["math", "fa2", "fa3", "fa4"], direction=direction)
    assert not missing
    point = Point("gqa", direction, 32, "bf16", causal, 2, 48, 4, 4)
    q, k, v, dout = (torch.randn(2, 48, 4, 32) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = attention_reference(*leaves, causal=causal)
    expected = (out.detach(),) if direction == "fwd" else torch.autograd.grad(out, leaves, dout)
    for one in found:
        with torch.no_grad(), one.context():
            call = one.prepare(point, q, k, v, dout)
            for results in (call(), call()):
                torch.testing.assert_close(tuple(results), expected, msg=lambda text, one=one: f"{one.name}: {text}")
    assert not any(x.requires_grad for x in (q, k, v))


def test_a_step_is_both_passes(libraries):
    """The same gradients at each call; and of operators without an autograd formula it is not measured."""
    torch = pytest.importorskip("torch")
    found, _ = peers.find(["math", "fa2", "fa3"])
    assert [one.name for one in found] == ["math", "fa2", "fa3"]
    point = Point("host", "fwd", 32, "bf16", True, 1, 48, 1, 1, calls="step")
    q, k, v, dout = (torch.randn(1, 48, 1, 32) for _ in range(4))
    alone = found[0].prepare(replace(point, direction="bwd", calls="same"), q, k, v, dout)()
    for one in found:
        with torch.no_grad(), one.context():
            if one.name == "fa3":
                with pytest.raises(peers.Missing, match="no autograd formula"):
                    one.prepare(point, q, k, v, dout)
                continue
            call = one.prepare(point, q, k, v, dout)
            for _ in range(2):
                torch.testing.assert_close(tuple(call()), alone)


def test_new_lengths_are_ever_new():
    torch = pytest.importorskip("torch")
    from fa2gen.bench.run import _in_turn
    from fa2gen.ops import call as calls

    point, ragged = (point for point in preset_points("host") if point.calls == "new lengths")
    assert point.seqlen == sum(ragged.lengths) > calls._REMEMBERED_CALLS
    seen = []
    one = peers.Contestant("math", lambda point, q, *_: lambda: seen.append((point.seqlen, q.shape[1])))
    call = _in_turn(one, replace(point, seqlen=3), [torch.zeros(1, 3, 1, 8)] * 4)
    for _ in range(4):
        call()
    assert seen == [(3, 3), (2, 2), (1, 1), (3, 3)]
    one = peers.Contestant("math", lambda point, q, *_: lambda: seen.append((*point.lengths, point.seqlen, q.shape[0])))
    call = _in_turn(one, replace(ragged, seqlen=3, lengths=(3,)), [torch.zeros(3, 1, 8)] * 4)
    for _ in range(3):
        call()
    assert seen[4:] == [(2, 1, 2, 3), (1, 1, 1, 2), (1, 0, 1, 1)]


def test_math_of_grouped_heads():
    torch = pytest.importorskip("torch")
    from fa2gen.reference import attention_reference

    (math_peer,), _ = peers.find(["math"])
    q, k, v = (torch.randn(2, 48, heads, 32) for heads in (4, 2, 2))
    expected, _ = attention_reference(q, k, v, causal=True)
    (out,) = math_peer.prepare(Point("gqa", "fwd", 32, "bf16", True, 2, 48, 4, 2), q, k, v, q)()
    torch.testing.assert_close(out, expected)


def test_a_peer_without_a_backward_pass_is_missing(libraries):
    del libraries.bwd
    assert not peers.find(["fa3"])[1]
    assert "registers no operator flash_attn_3::bwd" in peers.find(["fa3"], direction="bwd")[1]["fa3"]


def test_only_gradients_have_a_deterministic_contestant():
    assert "always deterministic" in peers.find(["fa2gen-sm90-det"])[1]["fa2gen-sm90-det"]


def test_results_that_disagree_are_named():
    torch = pytest.importorskip("torch")
    truth = [torch.randn(4, 4) for _ in range(3)]
    assert run._disagreement(truth, truth) is None
    assert "its dk is 0.1 away" in run._disagreement([truth[0], truth[1] * 1.1, truth[2]], truth)
    assert "its dv is nan away" in run._disagreement([truth[0], truth[1], truth[2] * math.nan], truth)
    assert "its output is 1 away" in run._disagreement([truth[0] * 2], truth[:1])


def test_clocks_as_nvidia_smi_prints_them():
    found = provenance.parse("580.159.04, 1665, 1980, 3201, 688.42, 700.00, [N/A]\n")
    assert found["driver"] == "580.159.04" and found["sm_mhz"] == 1665 and found["temperature_c"] is None


# Report


def test_ratios_are_to_the_best_peer():
    one = row(fa2gen_sm90=600.0, fa2=300.0, cudnn=500.0)
    assert report.best_peer(one) == ("cudnn", 500.0)
    assert report.ratio(one, "fa2gen-sm90") == pytest.approx(1.2)
    assert report.ratio(one, "fa2gen-sm90", "fa2") == pytest.approx(2.0)
    assert report.ratio(one, "fa2gen-sm80") is None
    assert report.ratio(row(fa2gen_sm90=600.0), "fa2gen-sm90") is None
    host = {**row("host"), "microseconds": {"fa2gen-sm90": 15.0, "fa3": 27.0, "fa2": 39.0}}
    assert report.best_peer(host) == ("fa3", 27.0)
    assert report.ratio(host, "fa2gen-sm90") == pytest.approx(27 / 15)


def test_headlines(document):
    lines = report.headlines(document["rows"])
    best = next(line for line in lines if line["peer"] == "best")
    values = [report.ratio(one, "fa2gen-sm90") for one in document["rows"]]
    assert best["points"] == len(values)
    assert best["geometric_mean"] == pytest.approx(math.prod(values) ** (1 / len(values)), abs=1e-3)
    assert {line["peer"] for line in lines} == {"best", "cudnn", "fa3"}


def test_a_result_survives_the_disk(document, tmp_path):
    path = tmp_path / "deep" / "result.json"
    report.save(document, path)
    assert report.load(path) == document
    assert len(path.read_text().splitlines()) > len(document["rows"])  # a row a line
    assert os.listdir(path.parent) == ["result.json"]


@pytest.mark.parametrize("text", ["nonsense", "[]", '{"rows": []}', '{"provenance": {}, "rows": [{"preset": "odd"}]}'])
def test_what_is_no_result_is_refused(text, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=r"result\.json"):
        report.load(path)


# Figures


def test_figures_from_a_result(document, tmp_path):
    pytest.importorskip("matplotlib")
    written = plot(document, tmp_path, "h200")
    assert [path.name for path in written] == ["h200-paper-fwd-bf16.png", "h200-odd-fwd-bf16.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    with pytest.raises(InvalidInput, match="nothing to draw"):
        plot({"provenance": {}, "rows": []}, tmp_path, "none")


def test_figures_of_the_backward_pass(document, tmp_path):
    pytest.importorskip("matplotlib")
    document["rows"] = [{**one, "direction": "bwd"} for one in document["rows"] if one["preset"] == "paper"]
    assert [path.name for path in plot(document, tmp_path, "h200-paper-bwd")] == ["h200-paper-bwd-bf16.png"]
    assert [path.name for path in plot(document, tmp_path, "h200")] == ["h200-paper-bwd-bf16.png"]


def test_bench_plot_command(document, tmp_path):
    pytest.importorskip("matplotlib")
    report.save(document, tmp_path / "h200-all.json")
    done = CliRunner().invoke(app, ["bench", "--plot", str(tmp_path / "h200-all.json"), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "fa2gen-sm90 / fa3: geometric mean" in done.stdout
    assert (tmp_path / "h200-all-paper-fwd-bf16.png").exists()


def test_committed_results_can_be_drawn(tmp_path):
    """Whatever lies in tests/bench/results obeys the schema; of each preset and direction one makes figures."""
    from pathlib import Path

    pytest.importorskip("matplotlib")
    results = Path(__file__).resolve().parents[1] / "bench" / "results"
    drawn = set()
    for path in sorted(results.glob("*.json")):
        document = report.load(path)
        assert {"gpu", "torch", "nvrtc", "command"} <= document["provenance"].keys(), path.name
        kinds = {(row["preset"], row["direction"]) for row in document["rows"] if row["tflops"]} - drawn
        drawn |= kinds
        if kinds:
            assert plot(document, tmp_path, path.stem)


def test_bench_without_a_gpu_says_so():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for direction in ("fwd", "bwd"):
        done = CliRunner().invoke(app, ["bench", "--preset", "odd", "--direction", direction])
        assert done.exit_code == 3
        assert "no NVIDIA GPU" in done.stderr
        assert done.stdout == ""


# Which points


def points_of(**given):
    from fa2gen.cli.measure import _points

    return _points(Asked(base="preset", **given), "paper", ())


@pytest.mark.parametrize(
    ("field", "value"),
    [("direction", "bwd"), ("head_dim", 256), ("dtype", "fp16"), ("mask", "causal")],
)
def test_a_field_narrows_a_preset(field, value):
    points, specs = points_of(fields={field: (value,)})
    assert points and not specs
    assert {getattr(point.problem, field) for point in points} == {value}


@pytest.mark.parametrize(
    "problem",
    problems(head_dim=72, varlen=False, sink=False, dropout=False, partial=False, cache_dtype="same"),
    ids=lambda problem: problem.text,
)
def test_a_kernel_that_is_named_is_measured(problem):
    """At the paper's lengths, every field of it; the contestant is that very kernel."""
    spec = best_spec(problem, "sm90")
    points, specs = points_of(sources=(spec.name,))
    assert specs == [spec] and {point.problem for point in points} == {problem}
    assert [point.seqlen for point in points] == [512, 1024, 2048, 4096, 8192, 16_384]
    assert all(point.batch * point.seqlen == TOKENS and point.heads == HIDDEN // 72 for point in points)
    (contestant,) = peers.of_specs(specs)
    assert contestant.specs == (spec,) and peers.is_ours(contestant.name)
    assert contestant.name == f"fa2gen-sm90_m{spec.name.split('_m')[-1]}"


@pytest.mark.parametrize(
    "problem",
    problems(head_dim=72, dtype="bf16", varlen=True, sink=False, dropout=False, partial=False, paged=False),
    ids=lambda problem: problem.text,
)
def test_a_ragged_kernel_is_measured_on_documents(problem):
    spec = best_spec(problem, "sm90")
    points, specs = points_of(sources=(spec.name,))
    assert specs == [spec] and {point.problem for point in points} == {problem}
    for point, longest in zip(points, [512, 1024, 2048, 4096, 8192, 16_384], strict=True):
        assert sum(point.lengths) == TOKENS and max(point.lengths) == point.seqlen <= longest
        assert point.shape[:3] == (len(point.lengths), TOKENS, TOKENS)


def test_ragged_points():
    """What they are made of is said in the results, and their work is that of their sequences."""
    for point in preset_points("varlen"):
        assert point.options.varlen and point.batch == len(point.lengths) and point.seqlen == max(point.lengths)
        assert point.flops == sum(one.flops for one in point.sequences)
        assert Point.of_row(json.loads(json.dumps(point.to_json()))) == point
    for point in preset_points("varlen")[1:5]:
        assert point.seqlen <= sum(point.lengths) // 4
    equal, dense = preset_points("varlen")[-1], Point("", "fwd", 128, "bf16", True, 8, 2048, 16, 16)
    assert equal.flops == pytest.approx(dense.flops)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_peers_of_ragged_batches(libraries, direction):
    """math takes each sequence by itself, fa3 all of them; the others say why not."""
    torch = pytest.importorskip("torch")
    from fa2gen.reference import attention_reference

    found, _ = peers.find(["math", "fa3", "fa4"], direction=direction)
    point = Point("varlen", direction, 32, "bf16", True, 3, 40, 4, 4, lengths=(40, 9, 9))
    q, k, v, dout = (torch.randn(58, 4, 32) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    cuts = [x.unsqueeze(0).split(point.lengths, 1) for x in leaves]
    out = torch.cat([attention_reference(*parts, causal=True)[0][0] for parts in zip(*cuts, strict=True)])
    expected = (out.detach(),) if direction == "fwd" else torch.autograd.grad(out, leaves, dout)
    for one in found:
        with torch.no_grad():
            if one.name == "fa4":
                with pytest.raises(peers.Missing, match="dense batches alone"):
                    one.prepare(point, q, k, v, dout)
                continue
            torch.testing.assert_close(tuple(one.prepare(point, q, k, v, dout)()), expected)


def test_prefill_over_pages():
    """New queries at the end of what each sequence has, whole prompts among them; pages or packed keys, our answer is
    the definition's, and the others of torch say why they have none."""
    torch = pytest.importorskip("torch")
    from fa2gen.reference import attention_reference

    points = preset_points("prefill")
    assert {point.page_size for point in points} == {16, 1} and all(point.problem.paged for point in points)
    assert {point.cache_dtype for point in points} == {"same", "e4m3"} and len(set(map(str, points))) == len(points)
    for point in points:
        assert all(n <= keys <= point.seqlen for n, keys in zip(point.lengths, point.keys, strict=True))
        assert point.flops == sum(one.flops for one in point.sequences)
        assert Point.of_row(json.loads(json.dumps(point.to_json()))) == point
    assert points[0].flops == Point("", "fwd", 128, "bf16", True, 16, 512, 32, 8).flops
    point = replace(
        points[0], head_dim=32, batch=3, seqlen=48, lengths=(7, 40, 2), keys=(7, 48, 33), heads=4, heads_kv=2
    )
    q, k, v = (
        torch.randn(point.size(h, 32, of_query)).bfloat16() for h, of_query in ((4, True), (2, False), (2, False))
    )
    each = zip(q.split(point.lengths), k, v, point.keys, strict=True)
    expected = [attention_reference(x[None], y[None, :n], z[None, :n], causal=True)[0][0] for x, y, z, n in each]
    for page_size in (16, 1, 0):
        found = peers._called(replace(point, page_size=page_size), q, k, v)()
        torch.testing.assert_close(found, torch.cat(expected), atol=0.02, rtol=0.02)
    found = peers._called(replace(point, cache_dtype="e4m3"), q, k, v)()
    assert (found - torch.cat(expected)).norm() < 0.1 * found.norm()
    with pytest.raises(peers.Missing, match="over caches there are"):
        peers.refuse_caches("math", True)


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_of_expressions(name):
    """What FlexAttention is told is what the texts say, the scores that count are those that are seen, and `math`
    computes the definition."""
    torch = pytest.importorskip("torch")
    from fa2gen.reference import Place, attention_reference

    of, points = WORKLOADS[name], [point for point in preset_points("flex") if point.workload == name]
    assert [(point.head_dim, point.seqlen) for point in points] == [(64, 2048), (64, 8192), (128, 2048), (128, 8192)]
    point = replace(points[0], batch=2, seqlen=700, heads=4, heads_kv=2)
    assert Point.of_row(json.loads(json.dumps(point.to_json()))) == point
    b, h, i, j = (torch.arange(n).view(-1, *[1] * at) for at, n in zip((3, 2, 1, 0), (2, 4, 700, 700), strict=True))
    given = of.input(2, 700, 4, "cpu")
    seen = of.visible(given)(b, h, i, j).expand(2, 4, 700, 700)
    counted = point.flops / flops_of(Problem(head_dim=64), point.shape, Options())
    assert seen.double().mean() == pytest.approx(counted, rel=0.02)
    program = parse(of.score, of.allow)
    s = torch.randn(2, 4, 700, 700)
    values = {"s": s, "b": b, "h": h, "i": i, "j": j, **{x.name: given for x in program.inputs}}
    values |= {"seqlen_q": 700, "seqlen_k": 700}
    allowed = evaluate(program, "allow", torch, values) & ((j <= i) | torch.tensor(not of.causal))
    assert torch.equal(allowed.expand_as(seen), seen)
    if of.modify:
        torch.testing.assert_close(of.modify(given)(s, b, h, i, j), evaluate(program, "score", torch, values))
    q, k, v = (torch.randn(2, 700, heads, 64) for heads in (4, 2, 2))
    ((found,),) = [one.prepare(point, q, k, v, None)() for one in peers.find(["math"])[0]]
    tensors = [given] if of.numbers else []
    truth, _ = attention_reference(q, k, v, **point.options._asdict(), place=Place(tensors, 0))
    torch.testing.assert_close(found, truth)


def test_who_takes_expressions(libraries):
    """FlashAttention-3 a cap alone; torch's operator none; our plain kernel in the place of all, our ragged one in that
    of documents. Specs are measured with inputs that are made up."""
    torch = pytest.importorskip("torch")
    found = {one.name: one for one in peers.find(["fa3", "math"])[0]}
    alibi = next(point for point in preset_points("flex") if point.workload == "alibi")
    with pytest.raises(peers.Missing, match="FlashAttention-3 takes no score"):
        found["fa3"].prepare(alibi, *[torch.randn(1, 2, 32, 64)] * 4)
    problem = Problem(head_dim=64, score="s + bias[h, j]", allow="j < 3 * kind[b, i]")
    (point,) = spec_points([problem], [128])
    assert point.problem == problem and point.options.expression.shapes == ((32, 128), (128, 128))
    small = replace(point, batch=2, heads=2, heads_kv=1, seqlen=40)
    out = found["math"].prepare(small, *(torch.randn(2, 40, heads, 64) for heads in (2, 1, 1)), None)()[0]
    assert out.shape == (2, 40, 2, 64)
    with pytest.raises(UnsupportedProblem, match="no expressions over caches"):
        spec_points([Problem(direction="decode", head_dim=64, score="cap * tanh(s / cap)")])
    with pytest.raises(UnsupportedProblem, match="no caches of 8-bit numbers"):
        spec_points([Problem(direction="decode", head_dim=64, cache_dtype="int8")])


def test_tilings_are_contestants_with_all_their_problems():
    tilings = [Tiling(arch="sm90", tile_m=128, tile_n=n, num_mma_warps=8) for n in (64, 80)]
    given = [KernelSpec(problem=Problem(head_dim=d), tiling=tiling) for d in (64, 128) for tiling in tilings]
    found = peers.of_specs(given)
    assert [one.name for one in found] == ["fa2gen-sm90_m128_n64_s2_w8", "fa2gen-sm90_m128_n80_s2_w8"]
    assert [one.specs for one in found] == [tuple(given[0::2]), tuple(given[1::2])]


def test_a_point_is_read_back_from_its_row():
    for point in preset_points("window"):
        assert Point.of_row(json.loads(json.dumps(point.to_json()))) == point
    old = {name: value for name, value in point.to_json().items() if "window" not in name and name != "deterministic"}
    assert Point.of_row(old).shape == point.shape

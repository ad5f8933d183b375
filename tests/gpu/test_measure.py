"""`bench` and `tune` with a device: everybody runs and agrees, whatever the time."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from fa2gen.bench import peers, protocol
from fa2gen.bench.points import preset_points, spec_points
from fa2gen.bench.run import Bench
from fa2gen.spec import Direction, KernelSpec, Problem, Tiling
from fa2gen.testing import problems
from fa2gen.tune.gpu import GpuRunner
from fa2gen.tune.journal import Journal
from fa2gen.tune.search import Search

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_bench(direction):
    """Ours and torch's own at the shortest point: all agree, and each kernel of ours has a time."""
    found, missing = peers.find(["fa2gen-sm90", "cudnn", "fa2", "math"], direction=direction)
    assert not missing
    run = Bench(found, missing, "fa2gen bench", parts=True)
    for row in run.rows(preset_points("paper", head_dims=[64], seqlens=[512], direction=direction), seconds=0.05):
        assert row["tflops"].keys() == {one.name for one in found} and min(row["tflops"].values()) > 0
        assert len(row["parts"]["fa2gen-sm90"]) == (1 if direction == "fwd" else 3)
    document = run.result()
    assert not document["provenance"]["missing"]
    assert all(name.startswith(f"fa2_{direction}_sm90_") for name in document["provenance"]["kernels"])


@pytest.mark.parametrize(
    ("preset", "direction", "cache_dtype"),
    [("decode", "decode", "same"), ("prefill", "fwd", "same"), ("prefill", "fwd", "e4m3")],
)
def test_bench_over_pages(preset, direction, cache_dtype):
    """Keys in pages beside the same keys in order: both give the same numbers, and standard attention is not asked. At
    points without pages nobody misses what stands for them."""
    found, missing = peers.find(["fa2gen-sm90", peers.DENSE, "math"])
    points = preset_points(preset, direction=direction)
    paged = next(point for point in points if point.page_size and point.cache_dtype == cache_dtype)
    points = [paged, *[point for point in points if not point.page_size][:1]]
    run = Bench(found, missing, "fa2gen bench")
    for point, row in zip(points, run.rows(points, seconds=0.05), strict=True):
        assert row["tflops"].keys() == {"fa2gen-sm90", *[peers.DENSE] * (point is paged)}
        assert min(row["tflops"].values()) > 0
    assert run.result()["provenance"]["missing"].keys() == {f"math at {point}" for point in points}


@pytest.mark.parametrize(
    "problem",
    problems(
        head_dim=64, dtype="bf16", direction=["fwd", "bwd"], varlen=False, sink=False, dropout=False, partial=False
    ),
    ids=lambda problem: problem.text,
)
def test_bench_of_a_kernel_that_is_named(problem):
    """That very kernel runs, agrees with standard attention, and is what the provenance names."""
    tiling = Tiling(arch="sm90", tile_m=64, tile_n=64, num_mma_warps=4)
    spec = KernelSpec(problem=problem, tiling=tiling)
    others, missing = peers.find(["math"], direction=problem.direction)
    assert not missing
    ours = peers.of_specs([spec])
    run = Bench([*ours, *others], missing, "fa2gen bench")
    for row in run.rows(spec_points([problem], [512]), seconds=0.05):
        assert row["tflops"].keys() == {ours[0].name, "math"}
    document = run.result()
    assert document["provenance"]["kernels"] == [spec.name] and not document["provenance"]["missing"]


def test_bench_of_the_host(monkeypatch):
    monkeypatch.setattr(protocol, "HOST_WARMUP_SECONDS", 0.1)
    found, _ = peers.find(["fa2gen-sm90", "fa2gen-sm80", "cudnn"])
    run = Bench(found, {}, "fa2gen bench --preset host")
    for row in run.rows(preset_points("host")):
        assert "fa2gen-sm90" in row["microseconds"] and not row["tflops"]
        assert min(row["microseconds"].values()) > 1
    assert run.result()["provenance"]["protocol"] == protocol.HOST_PROTOCOL


@pytest.mark.parametrize("direction", get_args(Direction))
def test_tune(direction):
    """Candidates are built, checked and timed, and a second run finds all of it in the journal."""
    problem, journal = Problem(direction=direction, head_dim=80, mask="causal"), Journal(None)
    runner = GpuRunner("sm90")
    try:
        found = Search(runner, journal, (512,), keep=3).run(problem, "sm90")
        assert found.complete and found.num_candidates >= 2
        assert all(min(winner.tflops) > 0 for winner in found.winners)
        assert Search(runner, journal, (512,), keep=3).run(problem, "sm90") == found
    finally:
        runner.close()

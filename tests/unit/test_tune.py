"""Tuning with no GPU: the space by brute force, the model beside measurements, the search on a fake device."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import fa2gen.spec
from fa2gen import catalog
from fa2gen.catalog import read_tuned
from fa2gen.cli import app
from fa2gen.compile import ResourceReport
from fa2gen.errors import Fa2GenError, InvalidInput
from fa2gen.plan import feasible, feasible_tilings, fits, make_plan
from fa2gen.select import default_tiling, forget
from fa2gen.spec import KernelSpec, Problem, Tiling
from fa2gen.testing import problems
from fa2gen.tune import batch, cost_bwd, cost_fwd, record, space
from fa2gen.tune.cost import VARIANTS_PER_SHAPE, block_cycles, cycles, prune
from fa2gen.tune.journal import Journal, key_of
from fa2gen.tune.search import ATTEMPTS, FINALISTS, Built, DeviceLost, Search, candidates, ranges
from fa2gen.tune.visits import floor_sum, visits

SEQLENS = (512, 2048, 8192)
PROBLEM = Problem(head_dim=80, mask="causal")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """What the search knows beforehand, for a test to fill in: by itself nothing, whatever specs/ says today."""
    found = SimpleNamespace(written={}, tuned={})
    monkeypatch.setattr("fa2gen.tune.search.written_tilings", lambda: found.written)
    monkeypatch.setattr("fa2gen.tune.search.tuned_rows", lambda: found.tuned)
    return found


# The space


@pytest.mark.parametrize("head_dim", [8, 40, 80, 128, 192, 256])
def test_enumeration_is_brute_force(head_dim):
    """Every tiling of the whole grid that the plan's rules allow, no other, none twice."""
    problem = Problem(head_dim=head_dim)
    grid = itertools.product(*dataclasses.astuple(feasible._GRIDS["sm90", "fwd"]), (128, 64, 32))
    names = ("tile_m", "tile_n", "num_stages", "num_mma_warps", "swizzle_bytes")
    tilings = [Tiling(arch="sm90", **dict(zip(names, values, strict=True))) for values in grid]
    expected = {tiling for tiling in tilings if fits(KernelSpec(problem=problem, tiling=tiling))}
    found = list(feasible_tilings(problem, "sm90"))
    assert len(found) == len(set(found))
    assert set(found) == expected


@pytest.mark.parametrize("head_dim", [64, 144, 256])  # one of each way to split the work
def test_backward_enumeration_is_brute_force(head_dim):
    """With at most two switches on, which may make room for each other; all of them over what fits are below."""
    problem = Problem(direction="bwd", head_dim=head_dim)
    sizes = (range(48, 129, 16), range(16, 257, 16), range(1, 5), (4, 8, 12), (128, 64, 32))
    settings = [values for values in itertools.product(*space.switches().values()) if sum(values) <= 2]
    names = ("tile_m", "tile_n", "num_stages", "num_mma_warps", "swizzle_bytes", *space.switches())
    grid = itertools.product(itertools.product(*sizes), settings)
    tilings = [Tiling(arch="sm90", **dict(zip(names, size + setting, strict=True))) for size, setting in grid]
    expected = {tiling for tiling in tilings if fits(KernelSpec(problem=problem, tiling=tiling))}
    found = [tiling for tiling in space.tilings(problem, "sm90") if sum(space.settings(tiling)) <= 2]
    assert len(found) == len(set(found)) and set(found) == expected


@pytest.mark.parametrize(("direction", "head_dim"), [("fwd", 256), ("bwd", 64), ("bwd", 144), ("bwd", 256)])
def test_every_setting_of_every_switch_is_tried(direction, head_dim):
    """Brute force over the fields themselves: any Literal of Tiling that is not a shape, a depth or a swizzle."""
    problem = Problem(direction=direction, head_dim=head_dim)
    found = list(space.tilings(problem, "sm90"))
    expected = set()
    for tiling in feasible_tilings(problem, "sm90"):
        for values in itertools.product(*space.switches().values()):
            varied = tiling.model_copy(update=dict(zip(space.switches(), values, strict=True)))
            if fits(KernelSpec(problem=problem, tiling=varied)):
                expected.add(varied)
    assert len(found) == len(set(found)) and set(found) == expected
    assert (
        space.switches().keys().isdisjoint({"arch", "tile_m", "tile_n", "num_stages", "num_mma_warps", "swizzle_bytes"})
    )


@pytest.mark.parametrize("head_dim", range(8, 257, 24))
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_candidates_are_feasible_and_begin_with_the_default(head_dim, mask, direction):
    problem = Problem(direction=direction, head_dim=head_dim, mask=mask)
    specs = candidates(problem, "sm90", SEQLENS, keep=12)
    assert specs[0].tiling == default_tiling(problem, "sm90")
    assert len(specs) == len(set(specs)) and len(specs) <= 13
    for spec in specs:
        make_plan(spec)


@pytest.mark.parametrize("limit", [101_376, 166_912, 232_448])
def test_candidates_fit_the_device(known, limit):
    problem = Problem(direction="bwd", head_dim=256)
    sibling = problem.model_copy(update={"dtype": "fp16"})
    wide = KernelSpec.from_name("fa2_bwd_sm80_fp16_d256_m64_n64_s2_w8")
    known.tuned[sibling, "sm80"] = (SimpleNamespace(spec=wide),)
    specs = candidates(problem, "sm80", SEQLENS, 12, limit)
    assert specs[0].tiling == default_tiling(problem, "sm80", limit) and len(specs) > 1
    assert max(make_plan(spec).shared_memory_bytes for spec in specs) <= limit
    assert (wide.tiling in {spec.tiling for spec in specs}) == (limit == 232_448)


def test_what_is_known_is_tried_first(known):
    """The tiling of specs/ is what the others are compared with; then comes what won for the other dtype."""
    written, won = (Tiling(arch="sm90", tile_m=128, tile_n=tile_n, num_mma_warps=8) for tile_n in (32, 48))
    known.written[PROBLEM, "sm90"] = written
    sibling = PROBLEM.model_copy(update={"dtype": "fp16"})
    known.tuned[sibling, "sm90"] = (SimpleNamespace(spec=KernelSpec(problem=sibling, tiling=won)),)
    specs = candidates(PROBLEM, "sm90", SEQLENS, keep=12)
    assert [spec.tiling for spec in specs[:2]] == [written, won]
    assert len(specs) == len(set(specs)) <= 14 and {spec.problem for spec in specs} == {PROBLEM}


def test_pruning_keeps_what_the_model_likes_and_some_variety():
    tilings = list(space.tilings(PROBLEM, "sm90"))
    kept = prune(PROBLEM, tilings, SEQLENS, keep=16)
    shapes = [(t.tile_m, t.tile_n, t.num_mma_warps, space.settings(t)) for t in kept]
    assert len(kept) == 16 and max(shapes.count(shape) for shape in shapes) <= VARIANTS_PER_SHAPE
    everything = prune(PROBLEM, tilings, SEQLENS, keep=len(tilings))
    assert everything[:16] == kept

    def cost(tiling):
        plan = make_plan(KernelSpec(problem=PROBLEM, tiling=tiling))
        return math.prod(cycles(plan, seqlen) for seqlen in SEQLENS)

    assert cost(kept[0]) == pytest.approx(min(map(cost, tilings)))


# Fraction of the tensor cores' peak in SM cycles, measured with prototypes on an H200 at seqlen 8192, full mask; of the
# main kernel backward: (direction, head dim, tile_m, tile_n, warps).
MEASURED = {
    ("fwd", 128, 128, 128, 8): 0.770,
    ("fwd", 128, 128, 160, 8): 0.779,
    ("fwd", 128, 128, 176, 8): 0.785,
    ("fwd", 128, 128, 192, 8): 0.801,
    ("fwd", 64, 192, 128, 12): 0.560,
    ("fwd", 64, 128, 128, 8): 0.485,
    ("fwd", 64, 128, 192, 8): 0.468,
    ("fwd", 256, 128, 80, 8): 0.857,
    ("fwd", 256, 128, 64, 8): 0.827,
    ("bwd", 128, 64, 128, 8): 0.691,
    ("bwd", 128, 80, 128, 8): 0.721,
    ("bwd", 64, 128, 128, 8): 0.591,
}


@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_the_model_is_near_what_was_measured(shape):
    direction, head_dim, tile_m, tile_n, warps = shape
    tiling = Tiling(arch="sm90", tile_m=tile_m, tile_n=tile_n, num_stages=2, num_mma_warps=warps)
    plan = make_plan(KernelSpec(problem=Problem(direction=direction, head_dim=head_dim), tiling=tiling))
    products = {"fwd": 2, "bwd": 5}[direction]
    ideal = products * 2 * tile_m * tile_n * head_dim / 4096  # FLOPs of an SM in one cycle
    assert ideal / block_cycles(plan) == pytest.approx(MEASURED[shape], rel=0.07)


def test_the_backward_model_counts_operand_reads():
    """A from shared memory and every B, 128 bytes a cycle: counted by hand; with 2.5 times the forward's products."""
    for name, cycles_of_reads in (
        ("fa2_bwd_sm90_bf16_d64_m128_n128_s2_w8", 1792),
        ("fa2_bwd_sm90_bf16_d128_m64_n128_s2_w8", 2048),
        ("fa2_bwd_sm90_bf16_d128_m80_n128_s2_w8", 2368),
    ):
        plan = make_plan(KernelSpec.from_name(name))
        read = sum(count * (a_bytes + 32 * n) for count, n, a_bytes in cost_bwd._wgmmas(plan))
        assert read / 128 == cycles_of_reads
        assert sum(count * n / 2 for count, n, _ in cost_bwd._wgmmas(plan)) == (
            10 * plan.tile_m * plan.tile_n * plan.head_dim / 4096
        )


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize(("tile_m", "tile_n"), [(64, 128), (80, 128), (64, 64)])
def test_blocks_of_queries_by_brute_force(mask, tile_m, tile_n):
    tiling = Tiling(arch="sm90", tile_m=tile_m, tile_n=tile_n, num_mma_warps=8)
    plan = make_plan(KernelSpec(problem=Problem(direction="bwd", head_dim=128, mask=mask), tiling=tiling))
    for seqlen in (1, 100, 128, 600, 1024):
        expected = []
        for first_key in range(0, seqlen, tile_n):
            seen = [i for i in range(seqlen) if mask == "full" or i >= first_key]
            expected.append(len({i // tile_m for i in seen}))
        assert cost_bwd.visits(plan, seqlen) == (len(expected), sum(expected), max(expected))


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize(("tile_m", "tile_n"), [(128, 128), (192, 96), (128, 80)])
def test_blocks_of_keys_by_brute_force(mask, tile_m, tile_n):
    warps = 12 if tile_m == 192 else 8
    tiling = Tiling(arch="sm90", tile_m=tile_m, tile_n=tile_n, num_mma_warps=warps)
    plan = make_plan(KernelSpec(problem=Problem(head_dim=64, mask=mask), tiling=tiling))
    for seqlen in (1, 100, 128, 600, 1024):
        expected = []
        for first in range(0, seqlen, tile_m):
            last = min(first + tile_m, seqlen) - 1
            expected.append(len({j // tile_n for j in range(seqlen) if mask == "full" or j <= last}))
        assert cost_fwd.visits(plan, seqlen) == (len(expected), sum(expected), max(expected))


def test_visits_by_brute_force():
    """Without limits, causal both ways, and windows: what tiles meet, block by block."""
    rng = random.Random(2)
    for _ in range(2000):
        seqlen, tile, block = rng.randrange(1, 300), rng.randrange(1, 90), rng.randrange(1, 90)
        before, after = (rng.choice([None, 0, rng.randrange(0, 320)]) for _ in range(2))
        expected = []
        for first in range(0, seqlen, tile):
            last = min(first + tile, seqlen) - 1
            low = 0 if before is None else max(0, first - before)
            high = seqlen if after is None else min(seqlen, first + tile + after)
            assert low <= last < high
            expected.append(-(-high // block) - low // block)
        found = visits(seqlen, tile, block, before, after)
        assert found[:2] == (len(expected), sum(expected))
        both = before is not None and after is not None
        assert max(expected) <= found.most <= max(expected) + (tile + block if both else 0)


def test_floor_sum_by_brute_force():
    rng = random.Random(1)
    for _ in range(2000):
        count, step, start, divisor = (rng.randrange(low, 200) for low in (0, 0, 0, 1))
        expected = sum((step * i + start) // divisor for i in range(count))
        assert floor_sum(count, step, start, divisor) == expected


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_the_model_loops_over_nothing(direction):
    """At the longest length that a kernel takes it is as quick as at the shortest; and linear in the causal area."""
    problem = Problem(direction=direction, head_dim=128, mask="causal")
    plan = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, "sm90")))
    assert cycles(plan, 2**31 - 1) == pytest.approx(4 * cycles(plan, 2**30), rel=1e-3)


def test_both_families_have_a_backward_model():
    """Of sm80 by the facts that every plan has: more work than the forward pass, and more for a single stage."""
    one, two = (Tiling(arch="sm80", tile_m=64, tile_n=64, num_stages=s, num_mma_warps=4) for s in (1, 2))
    plans = [make_plan(KernelSpec(problem=Problem(head_dim=64), tiling=tiling)) for tiling in (one, two)]
    single, ring = (cost_bwd.block_cycles(plan) for plan in plans)
    assert single > ring > 2.5 * 4 * 64 * 64 * 64 / 2048


def test_the_model_counts_ragged_tiles_and_causal_blocks():
    def plan(mask, **fields):
        tiling = Tiling(**{"arch": "sm90", "tile_m": 128, "tile_n": 128, "num_mma_warps": 8, **fields})
        return make_plan(KernelSpec(problem=Problem(head_dim=128, mask=mask), tiling=tiling))

    full, causal = plan("full"), plan("causal")
    assert 0.45 < cycles(causal, 8192) / cycles(full, 8192) < 0.6
    assert cycles(full, 8192) / 8192 < cycles(full, 512) / 512  # FLOPs grow with the length, a tile's own cost does not


# The journal


def test_journal_survives_any_cut(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for number in range(5):
        journal.append("timed", f"key{number}", ratios=[number, 1.0])
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        found = [Journal(path).find("timed", f"key{number}") for number in range(5)]
        kept = whole[:length].count(b"\n") + (length < len(whole) and whole[length : length + 1] == b"\n")
        assert [line is not None for line in found] == [number < kept for number in range(5)]
        Journal(path).append("timed", "new", ratios=[])
        assert Journal(path).find("timed", "new")


def test_journal_ignores_what_is_not_its_own(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'[1]\n{"what": 3}\nnonsense\n\xff\xfe\n{"what": "timed", "key": "k", "x": 1}\n')
    assert Journal(path).find("timed", "k") == {"what": "timed", "key": "k", "x": 1}


def test_keys_tell_circumstances_apart():
    assert key_of("H200", "13.0", (1, 2)) == key_of("H200", "13.0", [1, 2])
    assert len({key_of("H200", "13.0"), key_of("H100", "13.0"), key_of("H200", "13.1"), key_of("H20013.0")}) == 4


# The search


class Killed(BaseException):
    """What a kill looks like from inside: nothing after it runs in this process."""


class FakeRunner:
    """A device on which the speed of a kernel is a function of its tiling and the length."""

    def __init__(self, speed, kill_at=None, wrong=(), spills=(), hangs=()):
        self.speed, self.kill_at = speed, kill_at
        self.wrong, self.spills, self.hangs = set(wrong), set(spills), set(hangs)
        self.circumstances = ("NVIDIA H200", "13.0.88", "fake")
        self.shared_memory_limit = None
        self.calls = []
        self.ahead = []

    def _step(self, *call):
        self.calls.append(call)
        if self.kill_at is not None and len(self.calls) >= self.kill_at:
            raise Killed

    def build_ahead(self, specs):
        self.ahead += specs

    def build(self, spec):
        if spec.tiling.tile_n == 48:
            raise Fa2GenError("no such instruction")
        spilled = 64 if spec.name in self.spills else 0
        return Built(spec, f"digest of {spec.name}", ResourceReport(168, spilled, spilled, 0, 1000, 0.5, ()))

    def check(self, built):
        self._step("check", built.spec.name)
        if built.spec.name in self.hangs:
            raise DeviceLost("illegal address")
        return "max 9 of 0.1" if built.spec.name in self.wrong else None

    def time(self, kernels, seqlen, rounds):
        self._step("time", tuple(built.spec.name for built in kernels), seqlen, rounds)
        return [self.speed(built.spec.tiling, seqlen) for built in kernels]


def favourite(tiling, seqlen):
    """Smooth, with its top at 128 keys, 3 stages and narrow panels; at short lengths at fewer keys."""
    keys = 3 * abs(tiling.tile_n - (128 if seqlen > 1000 else 96))
    return 700 - keys - 20 * abs(tiling.num_stages - 3) - tiling.swizzle_bytes / 16 - tiling.tile_m / 8


def search(runner, journal=None, keep=24, **options):
    return Search(runner, journal or Journal(None), SEQLENS, keep, **options)


def test_search_finds_the_best_of_its_candidates():
    runner = FakeRunner(lambda tiling, _: favourite(tiling, 4096))
    found = search(runner).run(PROBLEM, "sm90")
    pool = [s for s in candidates(PROBLEM, "sm90", SEQLENS, 24) if s.tiling.tile_n != 48]
    best = max(pool, key=lambda spec: favourite(spec.tiling, 4096))
    (winner,) = found.winners
    assert winner.spec == best and (winner.seqlen_min, winner.seqlen_max) == (0, None)
    assert winner.seqlens == SEQLENS and found.complete and found.num_candidates == len(pool)
    assert all(mine >= its for mine, its in zip(winner.tflops, winner.tflops_default, strict=True))
    assert winner.runner_up != winner.spec


def test_lengths_get_winners_of_their_own():
    found = search(FakeRunner(favourite)).run(PROBLEM, "sm90")
    assert len(found.winners) == 2
    short, long = found.winners
    assert short.seqlens == (512,) and long.seqlens == (2048, 8192)
    assert (short.seqlen_min, short.seqlen_max) == (0, 1023) and (long.seqlen_min, long.seqlen_max) == (1024, None)
    assert short.spec.tiling.tile_n <= long.spec.tiling.tile_n


def test_wrong_spilling_and_broken_candidates_are_dropped():
    specs = candidates(PROBLEM, "sm90", SEQLENS, 24)
    runner = FakeRunner(favourite, wrong={specs[1].name}, spills={specs[2].name})
    found = search(runner).run(PROBLEM, "sm90")
    assert found.dropped[specs[1].name] == "max 9 of 0.1"
    assert "spills 128 B" in found.dropped[specs[2].name]
    timed = {name for call in runner.calls if call[0] == "time" for name in call[1]}
    assert not timed & found.dropped.keys()


def test_a_default_that_is_wrong_is_an_error():
    default = candidates(PROBLEM, "sm90", SEQLENS, 24)[0]
    with pytest.raises(Fa2GenError, match="nothing to compare with"):
        search(FakeRunner(favourite, wrong={default.name})).run(PROBLEM, "sm90")


def test_resume_after_a_kill_at_any_point(tmp_path, monkeypatch):
    """Whenever it is killed, a second run measures what is left and the candidate in hand, and finds the same."""
    listed = candidates(PROBLEM, "sm90", SEQLENS, 5)  # once: ranking them is what takes time here
    monkeypatch.setattr("fa2gen.tune.search.candidates", lambda *_: listed)
    unharmed = FakeRunner(favourite)
    expected = search(unharmed, keep=5).run(PROBLEM, "sm90")
    total = len(unharmed.calls)
    for kill_at in range(1, total + 1):
        path = tmp_path / f"{kill_at}.jsonl"
        killed = FakeRunner(favourite, kill_at=kill_at)
        with pytest.raises(Killed):
            search(killed, Journal(path), keep=5).run(PROBLEM, "sm90")
        again = FakeRunner(favourite)
        assert search(again, Journal(path), keep=5).run(PROBLEM, "sm90") == expected
        lost = len(killed.calls) + len(again.calls) - total
        assert lost <= len(SEQLENS)  # one candidate: its timings at each length
        third = FakeRunner(favourite)
        assert search(third, Journal(path), keep=5).run(PROBLEM, "sm90") == expected
        assert third.calls == []


def test_what_kills_the_process_is_tried_twice(tmp_path):
    path = tmp_path / "journal.jsonl"
    bad = next(s.name for s in candidates(PROBLEM, "sm90", SEQLENS, 5)[3:] if s.tiling.tile_n != 48)  # 48: not built
    for _ in range(ATTEMPTS):
        with pytest.raises(DeviceLost):
            search(FakeRunner(favourite, hangs={bad}), Journal(path), keep=5).run(PROBLEM, "sm90")
    found = search(FakeRunner(favourite, hangs={bad}), Journal(path), keep=8).run(PROBLEM, "sm90")
    assert "ended the run" in found.dropped[bad]


def test_other_circumstances_are_measured_anew():
    journal = Journal(None)
    search(FakeRunner(favourite), journal, keep=8).run(PROBLEM, "sm90")
    other = FakeRunner(favourite)
    other.circumstances = ("NVIDIA H100", "13.0.88", "fake")
    search(other, journal, keep=8).run(PROBLEM, "sm90")
    assert other.calls


def test_a_deadline_still_gives_a_confirmed_result():
    clock = itertools.count().__next__
    found = search(FakeRunner(favourite), clock=clock).run(PROBLEM, "sm90", deadline=3)
    assert not found.complete and found.winners
    for winner in found.winners:
        assert all(mine >= its for mine, its in zip(winner.tflops, winner.tflops_default, strict=True))


def test_progress_tells_the_best_so_far():
    steps = []
    search(FakeRunner(favourite), keep=8, progress=steps.append).run(PROBLEM, "sm90")
    first = [step for step in steps if step.stage == steps[0].stage]
    total = len(candidates(PROBLEM, "sm90", SEQLENS, 8)) - 1  # the default is not compared with itself
    assert [(step.done, step.total) for step in first] == [(done, total) for done in range(1, total + 1)]
    assert [step.ratio for step in first] == sorted(step.ratio for step in first)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([(100, 110), (100, 110), (100, 110)], [(0, None, 1, (0, 1, 2))]),
        ([(100, 90), (100, 130), (100, 130)], [(0, 1023, 0, (0,)), (1024, None, 1, (1, 2))]),
        ([(100, 100.5), (100, 101), (100, 110)], [(0, None, 1, (0, 1, 2))]),
        ([(100, 99.9), (100, 110), (100, 99.9)], [(0, 1023, 0, (0,)), (1024, 4095, 1, (1,)), (4096, None, 0, (2,))]),
        ([(100, 90), (100, 90), (100, 90)], [(0, None, 0, (0, 1, 2))]),
    ],
)
def test_ranges(table, expected):
    found = ranges(SEQLENS, table)
    assert found == expected
    for _, _, column, places in found:
        assert all(table[place][column] >= table[place][0] for place in places)  # never slower than the default


def test_finalists_are_timed_together():
    runner = FakeRunner(favourite)
    search(runner).run(PROBLEM, "sm90")
    last = runner.calls[-1]
    assert len(last[1]) >= FINALISTS and last[1][0] == candidates(PROBLEM, "sm90", SEQLENS, 24)[0].name


# The record


ORIGIN = {
    "gpu": "NVIDIA H200",
    "num_sms": 132,
    "nvrtc": "13.0.88",
    "protocol": 'events, "flushed"',
    "measured": "2026-01-01",
}


def test_rows_survive_the_disk(tmp_path):
    found = search(FakeRunner(favourite)).run(PROBLEM, "sm90")
    rows = record.rows_of(found, ORIGIN)
    path = record.write(rows, tmp_path)
    assert path.name == "nvidia-h200-sm90-fwd-d80.toml"
    assert read_tuned(path) == rows
    other = record.rows_of(search(FakeRunner(favourite)).run(Problem(head_dim=80, dtype="fp16"), "sm90"), ORIGIN)
    record.write(other, tmp_path)
    record.write(rows, tmp_path)  # again: in place of what was there
    assert read_tuned(path) == [*rows, *other]


def test_rows_of_an_expression_say_it(tmp_path, monkeypatch):
    """A process that has not met it reads its rows, beside those of the plain problem; a row of another is refused."""
    problem = Problem(head_dim=80, score="cap * tanh(s / cap)", allow="kind[b, i] == kind[b, j]")
    rows = record.rows_of(search(FakeRunner(favourite)).run(problem, "sm90"), ORIGIN)
    plain = record.rows_of(search(FakeRunner(favourite)).run(PROBLEM, "sm90"), ORIGIN)
    record.write(rows, tmp_path)
    path = record.write(plain, tmp_path)
    monkeypatch.setattr(fa2gen.spec, "_known", {})
    read = read_tuned(path)
    assert sorted(read, key=str) == sorted([*rows, *plain], key=str)
    assert {row.spec.problem for row in read} == {problem, PROBLEM}
    for old, new, complaint in (
        ("tanh(s / number_0)", "tanh(s) / number_0", "another expression"),
        ("tanh(s / number_0)", "open(s)", "no function"),
        ('score = "', 'scores = "', "not in score or allow"),
    ):
        damaged = tmp_path / "damaged.toml"
        damaged.write_text(path.read_text().replace(old, new))
        with pytest.raises(InvalidInput, match=complaint):
            read_tuned(damaged)


def test_backward_rows_have_a_file_of_their_own(tmp_path):
    problem = Problem(direction="bwd", head_dim=80, mask="causal")
    runner = FakeRunner(lambda tiling, _: tiling.tile_m)
    found = search(runner).run(problem, "sm90")
    rows = record.rows_of(found, ORIGIN)
    path = record.write(rows, tmp_path)
    assert path.name == "nvidia-h200-sm90-bwd-d80.toml" and read_tuned(path) == rows
    assert found.winners[0].spec.tiling.tile_m == 80  # beside what the default has
    record.write(record.rows_of(search(FakeRunner(favourite)).run(PROBLEM, "sm90"), ORIGIN), tmp_path)
    assert read_tuned(path) == rows


def test_another_gpus_rows_have_another_file(tmp_path):
    found = search(FakeRunner(favourite)).run(PROBLEM, "sm90")
    first = record.write(record.rows_of(found, ORIGIN), tmp_path)
    second = record.write(record.rows_of(found, {**ORIGIN, "gpu": "NVIDIA H100 80GB HBM3"}), tmp_path)
    assert second.name == "nvidia-h100-80gb-hbm3-sm90-fwd-d80.toml" and first != second


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("schema = 1", "schema = 2", "schema 2"),
        ("kernel = ", "kernels = ", "kernels"),
        ('kernel = "fa2_', 'kernel = "fa3_', "not a kernel name"),
        ("seqlens = [", "seqlens = [1, ", "one length"),
        ("gpu = ", "gpus = ", "name gpu"),
        ("[[row]]", "[row", "nvidia"),
    ],
)
def test_damaged_rows_are_refused_by_name(old, new, complaint, tmp_path):
    path = record.write(record.rows_of(search(FakeRunner(favourite)).run(PROBLEM, "sm90"), ORIGIN), tmp_path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InvalidInput, match=complaint) as error:
        read_tuned(path)
    assert path.name in str(error.value)


# Many problems


def test_a_batch_shares_its_budget_and_writes_as_it_goes(tmp_path):
    now = [0.0]

    class SlowRunner(FakeRunner):
        def time(self, kernels, seqlen, rounds):
            now[0] += 1.0
            return super().time(kernels, seqlen, rounds)

    todo = problems(
        direction="fwd",
        head_dim=[232, 240],
        dtype="bf16",
        mask=["full", "causal"],
        varlen=False,
        sink=False,
        dropout=False,
        partial=False,
    )
    runner = SlowRunner(favourite)
    outcomes = []
    for outcome in batch.tune(
        search(runner, keep=8, clock=lambda: now[0]), todo, "sm90", 60.0, ORIGIN, tmp_path, clock=lambda: now[0]
    ):
        outcomes.append(outcome)
        assert outcome.error or outcome.path.exists()
    assert [outcome.problem for outcome in outcomes] == todo
    assert all(outcome.rows for outcome in outcomes) and now[0] < 60 + 4 * 10
    assert len(runner.ahead) == sum(len(candidates(problem, "sm90", SEQLENS, 8)) for problem in todo)


def test_a_batch_without_budget_measures_nothing(tmp_path):
    runner = FakeRunner(favourite)
    outcomes = list(batch.tune(search(runner), [PROBLEM], "sm90", 0.0, ORIGIN, tmp_path, clock=lambda: 5.0))
    assert "run again" in outcomes[0].error and not runner.calls and not list(tmp_path.iterdir())


def test_one_problems_failure_is_its_own(tmp_path):
    todo = problems(
        direction="fwd", head_dim=[232, 240], dtype="bf16", mask="causal", sink=False, dropout=False, partial=False
    )
    wrong = {candidates(todo[0], "sm90", SEQLENS, 8)[0].name}
    outcomes = list(batch.tune(search(FakeRunner(favourite, wrong=wrong), keep=8), todo, "sm90", 1e9, ORIGIN, tmp_path))
    assert outcomes[0].error and not outcomes[0].rows
    assert outcomes[1].error is None and outcomes[1].rows


def test_the_selector_sees_a_row_at_once(tmp_path, monkeypatch):
    from fa2gen.select import Device, select

    monkeypatch.setattr(catalog, "tuned_folders", lambda: (tmp_path,))
    catalog.tuned_rows.cache_clear()
    forget()
    device = Device("NVIDIA H200", (9, 0), 232_448, 132)
    before = select(PROBLEM, device, None, 512)
    (outcome,) = batch.tune(search(FakeRunner(favourite)), [PROBLEM], "sm90", 1e9, ORIGIN, tmp_path)
    after = select(PROBLEM, device, None, 512)
    assert before.row is None and after.row == outcome.rows[0] and after.plan.name == outcome.rows[0].kernel
    monkeypatch.undo()
    catalog.tuned_rows.cache_clear()
    forget()


# The command


def test_dry_run_needs_no_gpu():
    done = CliRunner().invoke(
        app, ["tune", "--head-dim", "80", "--mask", "causal", "--dry-run", "--candidates", "6", "--json"]
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert rows[0]["default"] and [row["kernel"] for row in rows] == [
        s.name for s in candidates(PROBLEM, "sm90", SEQLENS, 6)
    ]
    assert len(rows) == 1 + 6  # the default, and as many beside it
    text = CliRunner().invoke(
        app, ["tune", "--head-dim", "40", "--head-dim", "72", "--mask", "full", "--mask", "causal", "--dry-run"]
    )
    assert text.exit_code == 0 and "of 4 problems (" in text.stderr and "nothing was measured" in text.stderr


def test_dry_run_of_the_backward_pass():
    problem = Problem(direction="bwd", head_dim=80, mask="causal")
    arguments = ["tune", "--direction", "bwd", "--head-dim", "80", "--mask", "causal", "--dry-run", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    names = [row["kernel"] for row in json.loads(done.stdout)]
    assert names == [spec.name for spec in candidates(problem, "sm90", SEQLENS, 40)]
    assert len(names) > 4 and all(name.startswith("fa2_bwd_sm90_bf16_d80_causal_") for name in names)


@pytest.mark.parametrize("arguments", [["--head-dim", "80", "--mask", "none"], [], ["--direction", "both"]])
def test_tune_usage(arguments):
    assert CliRunner().invoke(app, ["tune", *arguments]).exit_code == 2


def test_tune_without_a_gpu_says_so():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for direction in ("fwd", "bwd"):
        done = CliRunner().invoke(app, ["tune", "--head-dim", "80", "--direction", direction])
        assert done.exit_code == 3 and "no NVIDIA GPU" in done.stderr

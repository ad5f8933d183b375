"""Selection: total over the supported problems, pure, in the promised order, and honest about why."""

from __future__ import annotations

import itertools

import pytest

from fa2gen import catalog
from fa2gen.catalog import TunedRow
from fa2gen.errors import UnsupportedProblem
from fa2gen.explain import KNOWN_DEVICES
from fa2gen.plan import is_apart, make_plan
from fa2gen.select import Device, choices, default_tiling, forget, select, seqlen_bounds, served_by
from fa2gen.spec import KernelSpec, Problem, Tiling
from fa2gen.testing import problems

H200 = Device("NVIDIA H200", (9, 0), 232_448, 132)
H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 232_448, 132)
PROBLEM = Problem(head_dim=80, mask="causal")


def name_of(tile_n, stages=2, problem=PROBLEM):
    tiling = Tiling(arch="sm90", tile_m=128, tile_n=tile_n, num_stages=stages, num_mma_warps=8)
    return KernelSpec(problem=problem, tiling=tiling).name


def tuned(kernel, low=0, high=None, gpu="NVIDIA H200", nvrtc="13.0.88"):
    return TunedRow(
        kernel=kernel,
        seqlen_min=low,
        seqlen_max=high,
        default=name_of(128),
        runner_up=name_of(112),
        seqlens=(512,),
        tflops=(550.0,),
        tflops_default=(500.0,),
        tflops_runner_up=(540.0,),
        num_candidates=33,
        provenance={"gpu": gpu, "nvrtc": nvrtc},
    )


@pytest.fixture
def rows(monkeypatch):
    """A list that is the whole catalogue: its tuned rows, and nothing else is in specs/."""
    held: list[TunedRow] = []

    def tuned_rows():
        found = {}
        for row in held:
            key = (row.spec.problem, row.spec.tiling.arch)
            found[key] = (*found.get(key, ()), row)
        return found

    monkeypatch.setattr("fa2gen.select.tuned_rows", tuned_rows)
    monkeypatch.setattr("fa2gen.select.written_tilings", dict)
    forget()
    yield held
    forget()


def test_total_over_problems_devices_and_lengths():
    """Something for every head dim, dtype, mask and length on every GPU that is served, and it fits the GPU."""
    everything = problems(direction="fwd", head_dim=range(8, 257, 8))
    assert len({problem.mask for problem in everything}) > 1 < len({problem.dtype for problem in everything})
    for number, problem in enumerate(everything):
        for device, seqlen in itertools.product(KNOWN_DEVICES, (None, (1, 4096, 10**7)[number % 3])):
            found = select(problem, device, None, seqlen)
            assert found.plan.problem == problem and found.reason
            assert found.plan.shared_memory_bytes <= device.shared_memory_per_block
            assert found.target == {9: "sm_90a", 8: "sm_80"}[device.compute_capability[0]]


def test_other_gpus_are_refused():
    with pytest.raises(UnsupportedProblem, match=r"has compute capability 7\.5"):
        select(PROBLEM, Device("Tesla T4", (7, 5), 65_536, 40))


def test_own_row_then_same_arch_then_default(rows):
    default = select(PROBLEM, H200, None, 512)
    assert default.row is None and default.plan.tiling == default_tiling(PROBLEM, "sm90")
    rows.append(tuned(name_of(96), gpu="NVIDIA H100 80GB HBM3"))
    forget()
    neighbour = select(PROBLEM, H200, None, 512)
    assert neighbour.plan.name == name_of(96) and "NVIDIA H100" in neighbour.reason and "same arch" in neighbour.reason
    rows.append(tuned(name_of(64)))
    forget()
    own = select(PROBLEM, H200, None, 512)
    assert own.plan.name == name_of(64) and "1.10x the default" in own.reason
    assert select(PROBLEM, H100, None, 512).plan.name == name_of(96)  # whose own row that is
    assert select(Problem(head_dim=80), H200, None, 512).row is None  # another problem


def test_the_specs_of_a_person_come_before_the_default(rows, monkeypatch):
    written = Tiling(arch="sm90", tile_m=128, tile_n=48, num_mma_warps=8)
    monkeypatch.setattr("fa2gen.select.written_tilings", lambda: {(PROBLEM, "sm90"): written})
    found = select(PROBLEM, H200)
    assert found.plan.tiling == written and found.reason.startswith("specs/")
    rows.append(tuned(name_of(64)))
    forget()
    assert select(PROBLEM, H200).plan.name == name_of(64)


def test_ranges_of_lengths(rows):
    rows += [tuned(name_of(64), 0, 1023), tuned(name_of(96), 1024, 4095), tuned(name_of(112), 4096)]
    for seqlen, tile_n in ((1, 64), (1023, 64), (1024, 96), (4095, 96), (4096, 112), (10**6, 112), (None, 112)):
        assert select(PROBLEM, H200, None, seqlen).plan.tile_n == tile_n
    rows[:] = rows[:1]
    forget()
    assert select(PROBLEM, H200, None, 5000).row is None  # a gap falls through


def test_a_selection_is_made_once_for_a_range_of_lengths(rows, monkeypatch):
    rows += [tuned(name_of(64), 0, 1023), tuned(name_of(96), 1024, 4095)]
    assert seqlen_bounds(PROBLEM, "sm90") == (1024, 4096)
    for first, last in ((1, 1023), (1024, 4095), (4096, 10**7)):
        found = select(PROBLEM, H200, None, first)
        assert all(select(PROBLEM, H200, None, seqlen) is found for seqlen in (first + 1, last - 1, last))


def test_rows_that_do_not_fit_are_passed_over(rows):
    """A row of an older version that breaks a rule of today must not break selection."""
    big = KernelSpec(
        problem=PROBLEM, tiling=Tiling(arch="sm90", tile_m=128, tile_n=256, num_stages=8, num_mma_warps=8)
    ).name
    rows.append(tuned(big))
    assert select(PROBLEM, H200).row is None
    refused = next(choice for choice in choices(PROBLEM, H200, "sm90", 512) if choice.row)
    assert "shared memory" in refused.refused
    small = Device("NVIDIA H200", (9, 0), 180_000, 132)
    rows[:] = [tuned(name_of(128, 3))]
    forget()
    assert select(PROBLEM, small).row is None


def test_pure():
    assert select(PROBLEM, H200, None, 512) is select(PROBLEM, H200, None, 512)
    forget()
    first = select(PROBLEM, H200, None, 512)
    forget()
    assert select(PROBLEM, H200, None, 512) == first


def test_choices_end_with_the_default_and_say_why(rows):
    rows += [tuned(name_of(64), 0, 1023), tuned(name_of(96), gpu="NVIDIA L40S")]
    found = list(choices(PROBLEM, H200, "sm90", 4096))
    assert [choice.source for choice in found] == ["tuned for this GPU", "tuned for the architecture", "default"]
    assert found[0].refused == "meant for seqlen 0 to 1023, not 4096"
    assert found[-1].refused is None and all(choice.reason for choice in found)


def test_provenance_mismatches():
    row = tuned(name_of(64))
    assert row.refusal("NVIDIA H200") is None
    assert row.refusal("NVIDIA H100") == "measured on NVIDIA H200; this is NVIDIA H100"
    assert row.warning("13.0.88") is None
    assert "NVRTC 13.0.88; this is 13.1.1" in row.warning("13.1.1")


def test_committed_rows_are_sound():
    """Every row of specs/tuned/ is feasible, covers what it was timed at, and was never slower than its default."""
    catalog.tuned_rows.cache_clear()
    for (problem, arch), found in catalog.tuned_rows().items():
        for row in found:
            make_plan(row.spec)
            assert all(row.covers(seqlen) for seqlen in row.seqlens)
            assert all(a >= b for a, b in zip(row.tflops, row.tflops_default, strict=True)), row.kernel
            assert KernelSpec.from_name(row.default).problem == problem
        for gpu in {row.gpu for row in found}:
            own = sorted((row for row in found if row.gpu == gpu), key=lambda row: row.seqlen_min)
            assert own[0].seqlen_min == 0 and own[-1].seqlen_max is None, (problem, arch)
            assert all(a.seqlen_max + 1 == b.seqlen_min for a, b in itertools.pairwise(own)), (problem, arch)


def test_what_is_tuned_for_deterministic_kernels_comes_first(rows):
    """`fa2gen tune --deterministic` is not in vain."""
    problem = Problem(direction="bwd", head_dim=128, mask="causal", deterministic=True)
    usual = Problem(direction="bwd", head_dim=128, mask="causal")

    def name_of(problem: Problem, tile_m: int) -> str:
        tiling = Tiling(arch="sm90", tile_m=tile_m, tile_n=128, num_mma_warps=8)
        return KernelSpec(problem=problem, tiling=tiling).name

    figures = ((512,), (550.0,), (500.0,), (540.0,), 33, {"gpu": H200.name, "nvrtc": "13.0"})
    of = {
        key: TunedRow(name_of(key, m), 0, None, name_of(key, 64), name_of(key, 48), *figures)
        for key, m in ((usual, 80), (problem, 48))
    }
    rows.extend(of.values())
    assert select(problem, H200).plan.name == name_of(problem, 48)
    assert select(usual, H200).plan.name == name_of(usual, 80)
    kinds = itertools.product((False, True), (False, True), (False, True))
    names = [dict(zip(("deterministic", "varlen", "sink"), kind, strict=True)) for kind in kinds]
    assert {spec.name for row in rows for spec in served_by(row)} == {
        name_of(problem, 48),
        *(name_of(usual.model_copy(update=kind), 80) for kind in names),
    }


def test_kernels_with_what_costs_every_tiling_alike_take_the_tilings_that_were_measured_without(rows):
    problem = Problem(direction="bwd", head_dim=128)
    tiling = Tiling(arch="sm90", tile_m=48, tile_n=128, num_stages=2, num_mma_warps=8)
    rows.append(tuned(KernelSpec(problem=problem, tiling=tiling).name))
    for changed in ({"deterministic": True}, {"varlen": True}, {"sink": True}):
        served = problem.model_copy(update=changed)
        assert default_tiling(served, "sm90") != tiling
        assert select(served, H200).plan.spec == KernelSpec(problem=served, tiling=tiling)


def test_scores_that_look_up_scattered_numbers_have_tilings_of_their_own(rows):
    """What was tuned for plain kernels spills beside them, and has 0.6 to 0.9 of their speed."""
    plain = Problem(head_dim=64, mask="causal")
    tiling = Tiling(arch="sm90", tile_m=256, tile_n=64, num_stages=4, num_mma_warps=16)
    rows.append(tuned(KernelSpec(problem=plain, tiling=tiling).name))

    def is_tuned(score: str) -> bool:
        return select(plain.model_copy(update={"score": score}), H200).plan.tiling == tiling

    for score in ("cap * tanh(s / cap)", "s - slope[h] * (i - j)", "s + bias[b, j]", "s + r[h, abs(i - j)]"):
        assert is_tuned(score), score
    full = plain.model_copy(update={"mask": "full", "score": "s + bias[h, bucket[i - j]]"})
    assert [is_apart(problem, "sm90") for problem in (full, full.model_copy(update={"mask": "causal"}))] == [
        False,
        True,
    ]
    for score in ("s + bias[b, h, i, j]", "s + bias[h, bucket[i - j]]", "s + bias[h, place[i, j]]"):
        assert not is_tuned(score), score

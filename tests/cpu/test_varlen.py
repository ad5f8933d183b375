"""Ragged batches on the CPU: both passes, every mask, and what must not leak from one sequence into the next."""

from __future__ import annotations

import math

import pytest
import torch

from fa2gen import cases
from fa2gen.cpu import RunOptions, run_kernel
from fa2gen.features import examples_of
from fa2gen.launch import launches_of
from fa2gen.options import Options, Shape
from fa2gen.plan import make_plan
from fa2gen.select import best_spec
from fa2gen.spec import Direction, KernelSpec, Mask, Problem
from fa2gen.testing import problems
from tests.cpu.faults import Fault, seeded, symptom

ARCHES = ("sm80", "sm90")
SHAPES = (Shape(1, 37, 150, 2, 1), Shape(4, 150, 203, 2, 2))
"""Of cases.make: sequences but two, and the longest one's lengths; the other lengths and those used are drawn."""


@pytest.fixture(autouse=True)
def own_sequences(monkeypatch, request):
    """Of how many SM90's forward blocks make the table: of the first shape's, and that of the second is prepared."""
    launches_of.cache_clear()  # by a plan's spec
    monkeypatch.setattr("fa2gen.plan.sm90_fwd.OWN_SEQUENCES", getattr(request, "param", 3))
    yield
    launches_of.cache_clear()


def kernel(
    arch: str, direction: Direction = "fwd", mask: Mask = "full", head_dim: int = 64, **fields: bool
) -> KernelSpec:
    problem = Problem(direction=direction, head_dim=head_dim, mask=mask, varlen=True, **fields)
    return best_spec(problem, arch)


def run(name: str, shape: Shape, options: Options | None = None, rendered=None, **how):
    """(verdict, tensors) of a case; what is beside the rows that see something is looked at too."""
    spec = KernelSpec.from_name(name)
    case = cases.make(spec, shape, options)
    run_kernel(make_plan(spec), case.tensors, case.options, run_options=RunOptions(**how), rendered=rendered)
    assert cases.written_outside(case) is None
    return cases.verdict(case), case.tensors


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    "problem",
    [  # partial results differ by a store, whatever the mask and the order; more of them are in test_partial.py
        problem
        for problem in problems(head_dim=64, dtype="bf16", varlen=True, sink=False, dropout=False, paged=False)
        if not problem.partial or (problem.mask == "window" and not problem.deterministic)
    ],
    ids=lambda problem: problem.text,
)
def test_every_kind(arch, problem):
    """The shapes take turns, with the other one on the other architecture."""
    for number, options in enumerate(examples_of(problem), ARCHES.index(arch) + (problem.direction == "bwd")):
        verdict, _ = run(best_spec(problem, arch).name, SHAPES[number % 2], options)
        assert verdict.ok, verdict


@pytest.mark.parametrize(
    "name",
    [kernel(a, d, "causal", head_dim).name for a in ARCHES for d in ("fwd", "bwd") for head_dim in (80, 128, 192, 256)],
)
def test_every_shape_of_kernel(name):
    verdict, _ = run(name, SHAPES[1])
    assert verdict.ok, verdict


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_even_lengths_give_the_bits_of_a_dense_batch(arch, direction, mask):
    spec = kernel(arch, direction, mask, deterministic=direction == "bwd")
    plain = KernelSpec(problem=spec.problem.model_copy(update={"varlen": False}), tiling=spec.tiling)
    dense = cases.make(plain, Shape(3, 113, 203, 2, 1))
    cases.run(dense, "cpu")
    packed = {
        name: x.transpose(0, 1).reshape(1, x.shape[1], -1) if name == "lse" else x.flatten(0, 1)[None]
        for name, x in dense.tensors.items()
    }
    results = dense.results.keys()
    tensors = {name: torch.full_like(x, math.nan) if name in results else x.contiguous() for name, x in packed.items()}
    tensors |= {
        f"cu_seqlens_{of}": torch.arange(4, dtype=torch.int32) * length for of, length in (("q", 113), ("k", 203))
    }
    options = Options(causal=mask == "causal", deterministic=spec.problem.deterministic, varlen=True)
    run_kernel(make_plan(spec), tensors, options)
    for name in results:
        assert torch.equal(tensors[name], packed[name]), name


MANY = KernelSpec.from_name("fa2_fwd_sm90_bf16_d64_causal_varlen_m64_n64_s2_w4")


@pytest.mark.parametrize("own_sequences", [47, 48], indirect=True)
def test_who_makes_the_table_changes_nothing(own_sequences):
    """Of as many sequences as there may be, and one more: 97 entries, of which lanes look at up to four."""
    verdict, _ = run(MANY.name, Shape(46, 130, 150, 1, 1), num_sms=3)
    assert verdict.ok, verdict


def test_more_sequences_than_a_warp_asks_for_at_once():
    """Gradients' blocks of queries look theirs up among the bounds: of 38 in two steps."""
    verdict, _ = run(SM80_BACKWARD, Shape(36, 70, 20, 1, 1))
    assert verdict.ok, verdict


@pytest.mark.parametrize("bounds", [[0, 40, 0, 40], [40, 30, 7, 0], [-5, 2**31 - 1, -(2**31), 9]], ids=str)
def test_bounds_that_make_no_sense_stay_within_memory(bounds):
    """The machine would say what is read or written outside, and that a launch never ends."""
    q = torch.randn(1, 40, 2, 64).to(torch.bfloat16)
    cu = torch.tensor(bounds, dtype=torch.int32)
    results = {"o": torch.empty_like(q), "lse": torch.empty(1, 2, 40)}
    tensors = {"q": q, "k": q, "v": q, **results, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    run_kernel(make_plan(kernel("sm90", mask="causal")), tensors, Options(causal=True, varlen=True))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_no_schedule_changes_the_result(arch, direction):
    """However many blocks of threads share the lists, and in whatever order they come."""
    name = kernel(arch, direction, "causal", deterministic=direction == "bwd").name
    results = ("o", "lse") if direction == "fwd" else ("dq", "dk", "dv")
    _, first = run(name, SHAPES[1])
    for seed in range(1, 4):
        verdict, again = run(name, SHAPES[1], seed=seed, num_sms=1 + seed)
        assert verdict.ok and all(torch.equal(again[x], first[x]) for x in results), f"seed {seed}"


SM80, SM90 = (kernel(arch, "fwd", "causal").name for arch in ARCHES)
SM80_BACKWARD, SM90_BACKWARD = (kernel(arch, "bwd", "causal").name for arch in ARCHES)
FAULTS = [
    Fault("no-wait-for-the-table", SM90, "griddepcontrol_wait();  // for the table", "//", schedules=8),
    Fault("rows-behind-a-sequence-are-seen", SM90, "kRaggedRows - s.k + row", "row"),
    Fault("first-key-forgotten", SM90, "s.first_k + s.k}", "s.k}"),
    Fault("first-query-forgotten", SM80, "return s.first_q * row_stride;", "return 0;"),
    Fault("first-key-forgotten", SM80, "return s.first_k * row_stride;", "return 0;"),
    Fault("lse-of-the-batch", SM90, "p.seqlen_q + s.first_q;", "p.seqlen_q;"),
    Fault("gaps-are-not-listed", SM90, "num_entries = 2 * p.num_sequences + 1;", "num_entries = p.num_sequences;"),
    Fault("gaps-of-keys-are-not-listed", SM90_BACKWARD, "entry <= 3 * p.num_sequences + 1", "entry < 0"),
    Fault("sequence-of-the-next-block", SM80_BACKWARD, "sequence) <= place;", "sequence) < place;"),
    Fault("gaps-from-their-sequence-on", SM80_BACKWARD, "found - 1) + is_gap}", "found - 1)}"),
    Fault(
        "statistics-wait-for-nobody",
        SM90_BACKWARD,
        "griddepcontrol_wait();\n    griddepcontrol_launch",
        "griddepcontrol_launch",
    ),
    Fault("statistics-of-another-sequence", SM80_BACKWARD, "+ s.first_m_block + m_block;", "+ m_block;"),
    Fault(
        "counter-begins-late",
        SM90,
        "store_global_int(p.tile_counter, 0);",
        "store_global_int(p.tile_counter, 3);",
    ),
]
LAST_PLACE = "load_shared_int(own_order(2 * p.num_sequences + 1)) * p.num_heads"
DIFFERENT = Fault("blocks-have-different-tables", SM90, f"{LAST_PLACE};", f"{LAST_PLACE} - blockIdx.x % 3;")


def test_blocks_that_differ_leave_the_counter_as_it_was():
    """As where lengths change under a launch: that is wrong, and its results may be, but not those of the next one."""
    case = cases.make(KernelSpec.from_name(SM90), SHAPES[0])
    for seed in range(3):  # the machine would say what is left there
        run_kernel(case.spec, case.tensors, case.options, run_options=RunOptions(seed), rendered=seeded(DIFFERENT))


OWN_FAULTS = [
    Fault(
        "gaps-have-no-row",
        SM90,
        "if (entry <= last) {\n        EntryRows",
        "if (entry < p.num_sequences) {\n        EntryRows",
    ),
    Fault(
        "places-before-all-rows",
        SM90,
        "measure_own_entry(p, thread);\n        sync_block();",
        "measure_own_entry(p, thread);",
        schedules=8,
        time_limit=2.0,
    ),
    Fault(
        "all-but-the-last",
        SM90,
        "for (int first = 0; first <= last; first += 4)",
        "for (int first = 0; first < last - 4; first += 4)",
    ),
]


@pytest.mark.parametrize(
    ("fault", "own_sequences"),
    [*((fault, 3) for fault in FAULTS), *((fault, 6) for fault in OWN_FAULTS)],
    ids=str,
    indirect=["own_sequences"],
)
def test_a_fault_is_seen(fault, own_sequences):
    if not any(symptom(run, fault, SHAPES[1:], seed) for seed in range(fault.schedules)):
        pytest.fail("no run shows it")

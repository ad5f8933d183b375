"""Gradients with groups of heads, or the last blocks of keys, in parts: the sums of all, in an order that never
changes."""

from __future__ import annotations

import pytest

from fa2gen import cases
from fa2gen.cpu import RunOptions, run_kernel
from fa2gen.options import Shape
from fa2gen.plan import make_plan
from fa2gen.spec import KernelSpec
from tests.cpu.faults import Fault, symptom

BY_KEYS = "fa2_bwd_sm90_bf16_d64_causal_m128_n128_s2_w8_g4"
ABREAST = "fa2_bwd_sm90_bf16_d128_causal_varlen_m64_n128_s2_w8_l1_h1_g2"
AMPERE = "fa2_bwd_sm80_fp16_d64_m128_n64_s2_w8_g2"
KERNELS = (
    BY_KEYS,
    "fa2_bwd_sm90_bf16_d128_v64_sink_m80_n128_s2_w8_g2",
    "fa2_bwd_sm90_bf16_d168_causal_det_m64_n96_s2_w8_g4",  # P passes
    ABREAST,
    AMPERE,
    "fa2_bwd_sm80_bf16_d72_v40_causal_varlen_det_m64_n64_s2_w8_h1_g2",
)
SHAPES = (Shape(1, 140, 203, 8, 2), Shape(1, 133, 60, 4, 1))
TAIL = "fa2_bwd_sm90_bf16_d72_m64_n128_s2_w8_l1_e2"
TAIL_PASSING = "fa2_bwd_sm90_fp16_d256_m64_n80_s2_w8_e3"
TAILS = (  # of 4 multiprocessors: blocks of keys beyond the fourth; a wave that is full; fewer queries than parts
    (TAIL, Shape(1, 300, 700, 2, 1)),
    (TAIL, Shape(2, 140, 203, 4, 2)),
    (TAIL_PASSING, Shape(1, 200, 420, 1, 1)),
    (TAIL_PASSING, Shape(1, 100, 500, 2, 1)),
    ("fa2_bwd_sm90_bf16_d128_v64_sink_drop_m64_n128_s2_w8_l1_e4", Shape(1, 250, 300, 2, 2)),
    ("fa2_bwd_sm90_bf16_d64_causal_det_m128_n128_s2_w8_l1_e2", Shape(1, 300, 300, 4, 2)),
    ("fa2_bwd_sm90_bf16_d192_window_partial_m64_n96_s2_w8_e3", Shape(1, 300, 350, 1, 1)),
)


def run(name: str, shape: Shape, rendered=None, **how):
    case = cases.make(KernelSpec.from_name(name), shape, with_dlse=True)
    run_kernel(make_plan(case.spec), case.tensors, case.options, run_options=RunOptions(**how), rendered=rendered)
    assert cases.written_outside(case) is None
    return cases.verdict(case), (case.tensors["dk"].clone(), case.tensors["dv"].clone())


@pytest.mark.parametrize("name", KERNELS)
def test_gradients(name):
    for shape in SHAPES:
        verdict, first = run(name, shape)
        assert verdict.ok, f"{shape}: {verdict}"
    _, again = run(name, shape, seed=5)
    assert all(x.equal(y) for x, y in zip(first, again, strict=True)), "dK and dV are sums in one order"


@pytest.mark.parametrize(("name", "shape"), TAILS, ids=str)
def test_the_last_blocks_of_keys(name, shape):
    verdict, _ = run(name, shape)
    assert verdict.ok, str(verdict)


TAIL_FAULTS = (
    Fault("queries-of-two-parts", TAIL, "all.begin + count * part / kParts", "all.begin"),
    Fault("queries-of-no-part", TAIL, "count * (part + 1) / kParts", "count * part / kParts"),
    Fault("a-block-of-keys-too-late", TAIL, "p.num_whole_blocks + beyond / kParts", "p.num_whole_blocks + beyond"),
    Fault("a-part-is-stored", TAIL, "int>(blockIdx.x) >= p.num_whole_blocks", "int>(blockIdx.x) > p.num_whole_blocks"),
    Fault("dv-over-dk", TAIL_PASSING, "leave_part(part + kDkFloats", "leave_part(part"),
)


@pytest.mark.parametrize("fault", TAIL_FAULTS, ids=str)
def test_a_fault_in_the_tail_is_seen(fault):
    assert symptom(run, fault, [shape for name, shape in TAILS if name == fault.kernel][:1], 0), "no run shows it"


FAULTS = (
    Fault("a-part-left-out", BY_KEYS, "other < kParts", "other < kParts - 1"),
    Fault(
        "parts-of-one-head",
        BY_KEYS,
        "block.head_kv * (p.num_heads_per_kv / kParts)",
        "block.head_kv / kParts",
    ),
    Fault("keys-of-a-part", BY_KEYS, "block.head_kv / kParts", "block.head_kv % 2", count=2),
    Fault("sums-not-awaited", BY_KEYS, "griddepcontrol_wait();\n    int const index", "int const index"),
    Fault(
        "a-part-over-another",
        AMPERE,
        "static_cast<int64_t>(index) * kPartFloats",
        "static_cast<int64_t>(index / 2) * kPartFloats",
    ),
    Fault("abreast-at-one-block-of-queries", ABREAST, "m_block -= 1;\n            step", "step"),
    Fault("abreast-but-for-the-last-head", ABREAST, "bidh == last_head", "bidh == last_head - 1"),
    Fault("a-block-of-queries-left-out", AMPERE, "gridDim.x - 1 - blockIdx.x", "gridDim.x - blockIdx.x"),
    Fault("dv-over-dk", AMPERE, "leave_part(part + kDkFloats", "leave_part(part"),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_seen(fault):
    assert symptom(run, fault, SHAPES[:1], 0), "no run shows it"

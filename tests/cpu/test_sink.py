"""Attention sinks on the CPU: the bits of plain kernels where there is none, logits from -inf to 1e4, both passes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fa2gen import cases
from fa2gen.cpu import RunOptions, run_kernel
from fa2gen.options import Shape
from fa2gen.plan import make_plan
from fa2gen.reference import attention_reference
from fa2gen.select import best_spec
from fa2gen.spec import KernelSpec, Problem
from tests.cpu.faults import Fault, symptom

ARCHES = ("sm80", "sm90")
DIRECTIONS = ("fwd", "bwd")
BOTH = list(itertools.product(ARCHES, DIRECTIONS))
RAGGED, NO_KEYS = Shape(1, 113, 203, 4, 2), Shape(1, 203, 60, 4, 1)  # causal: the first 143 rows see no key
SINKS = (-math.inf, 0.0, 10.0, 1e4)


def kernel(arch: str, direction: str, mask: str = "causal", **fields: bool) -> str:
    return best_spec(Problem(direction=direction, head_dim=64, mask=mask, sink=True, **fields), arch).name


def case_of(name: str, shape: Shape, sinks: tuple[float, ...] = SINKS) -> cases.Case:
    """With these logits, one a head; O and LSE of a backward pass follow them."""
    case = cases.make(KernelSpec.from_name(name), shape, with_dlse=True)
    if not case.options.varlen:
        case.tensors["s_aux"].copy_(torch.tensor(sinks))
        if "dout" in case.tensors:
            q, k, v, s_aux = (case.tensors[x] for x in ("q", "k", "v", "s_aux"))
            out, lse = attention_reference(q, k, v, s_aux=s_aux, **case.options._asdict())
            case.tensors["o"].copy_(out)
            case.tensors["lse"].copy_(lse)
    return case


def run(name: str, shape: Shape, rendered=None, **how):
    case = case_of(name, shape)
    run_kernel(make_plan(case.spec), case.tensors, case.options, run_options=RunOptions(**how), rendered=rendered)
    assert cases.written_outside(case) is None
    return cases.verdict(case), case.tensors


@pytest.mark.parametrize(("arch", "direction"), BOTH)
def test_sinks_of_every_size(arch, direction):
    for shape in (RAGGED, NO_KEYS):
        verdict, tensors = run(kernel(arch, direction), shape)
        assert verdict.ok, verdict
    if direction == "fwd":
        no_key = slice(0, 143)
        assert not tensors["o"][:, no_key].any()
        assert (tensors["lse"][0, :, no_key] == torch.tensor(SINKS)[:, None]).all(), "of such a row LSE is the sink"


@pytest.mark.parametrize(("arch", "direction"), BOTH)
def test_no_sink_gives_the_bits_of_the_plain_kernel(arch, direction):
    spec = KernelSpec.from_name(kernel(arch, direction, deterministic=direction == "bwd"))
    plain = KernelSpec(problem=spec.problem.model_copy(update={"sink": False}), tiling=spec.tiling)
    for shape in (RAGGED, NO_KEYS):
        case = case_of(spec.name, shape, (-math.inf,) * 4)
        again = {name: x.clone() for name, x in case.tensors.items() if name not in ("s_aux", "ds_aux")}
        cases.run(case, "cpu")
        run_kernel(make_plan(plain), again, case.options._replace(sink=False))
        assert all(torch.equal(again[name], case.tensors[name]) for name in case.results if name != "ds_aux")
        assert direction == "fwd" or not case.tensors["ds_aux"].any()


@pytest.mark.parametrize("arch", ARCHES)
def test_no_schedule_changes_a_bit_of_the_sinks_gradient(arch):
    """Of a ragged batch, whose blocks are listed in an order that differs from run to run."""
    name, shape = kernel(arch, "bwd", varlen=True), Shape(2, 80, 40, 2, 1)
    verdict, first = run(name, shape)
    assert verdict.ok, verdict
    for seed in (1, 2):
        _, again = run(name, shape, seed=seed)
        assert torch.equal(again["ds_aux"], first["ds_aux"]), f"seed {seed}"


# What both families share is looked at in one of them.
FORWARD, BACKWARD = kernel("sm80", "fwd"), kernel("sm90", "bwd")
PACKED, PACKED_BACKWARD = kernel("sm80", "fwd", varlen=True), kernel("sm90", "bwd", varlen=True)
TERM = "exp2_approx((sink - lse) * kLog2E) * sum"
FAULTS = [
    Fault("sink-scaled", FORWARD, "[row], softmax_scale, sink);", "[row], softmax_scale, sink * softmax_scale);"),
    Fault("sink-of-the-key-head", FORWARD, "p.s_aux + bidh", "p.s_aux + bidh / p.num_heads_per_kv"),
    Fault("a-great-sink-overflows", FORWARD, "leads = above > 0.0f;", "leads = false;"),
    Fault("no-key-has-no-sink", FORWARD, "sum == 0.0f ? kInfinity :", ""),
    Fault("lse-without-the-sink", FORWARD, "leads ? sink + log_sum", "leads ? log_sum"),
    Fault("gaps-have-a-sink", PACKED, "bidb < p.num_sequences ?", "bidb >= 0 ?"),
    Fault("sink-of-another-head", kernel("sm90", "fwd"), "(p, tile.bidh, tile.bidb)", "(p, 0, tile.bidb)"),
    Fault("gradient-of-the-other-sign", BACKWARD, "sink_sum -= sees_keys", "sink_sum += sees_keys"),
    Fault("gradient-without-dlse", BACKWARD, "sum -= load_global_float(p.dlse + of_head + row);", ""),
    Fault("no-sink-is-nan", BACKWARD, f"sees_keys ? {TERM} : 0.0f;", f"{TERM};"),
    Fault("sums-of-one-batch", BACKWARD, "+ bidb * p.num_m_blocks + m_block", "+ m_block"),
    Fault("sums-of-three-warps", BACKWARD, "(warps[2] + warps[3])", "warps[2]"),
    Fault("places-that-no-block-has", PACKED_BACKWARD, "+ threadIdx.x / 32, 0.0f);", "+ threadIdx.x / 32, kInfinity);"),
    Fault(
        "places-of-other-sequences", PACKED_BACKWARD, "place = block.index;", "place = bidh * p.num_m_blocks + m_block;"
    ),
    Fault(
        "no-wait-for-the-sums",
        BACKWARD,
        "griddepcontrol_wait();\n    if (warp_id() == 0 &&",
        "if (warp_id() == 0 &&",
        8,
    ),
    Fault("not-summed", kernel("sm80", "bwd"), "sum_sink_gradient(p);\n", "\n"),
]
SHAPES = (Shape(2, 140, 90, 4, 2), Shape(2, 3, 200, 4, 2))


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_seen(fault):
    for shape, seed in itertools.product(SHAPES, range(fault.schedules)):
        if symptom(run, fault, [shape], seed):
            return
    pytest.fail("no run shows it")

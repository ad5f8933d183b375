"""Maxima that rise by more than 2^8 within a row, each in the scores of one thread: what lazy rescale must not miss.

fp16, since a P that nobody scaled down is infinite there.
"""

from __future__ import annotations

import pytest
import torch

from fa2gen.cpu import RunOptions, run_kernel
from fa2gen.features import examples_of
from fa2gen.plan import make_plan
from fa2gen.reference import check
from fa2gen.spec import KernelSpec, Problem
from tests.cpu.faults import Fault, symptom

FULL = "fa2_fwd_sm90_fp16_d64_m64_n32_s2_w4_r1"
CAUSAL = "fa2_fwd_sm90_fp16_d64_causal_m64_n32_s2_w4_r1"
MASKED = Problem(head_dim=64, dtype="fp16", allow="(i + j) % 13 != 12")  # no block is free of what is hidden
HIDDEN = f"fa2_fwd_sm90_fp16_d64_{MASKED.words[-1]}_m64_n32_s2_w4_r1"

SEQLEN = 160  # five blocks of keys, visited from the last to the first
RISES = ((69, 40, 3.0), (69, 9, 6.0), (76, 5, 4.0), (140, 70, 3.0))
"""(query, key, size): the key points where the query does. Rows of both halves of a thread's, one of them twice."""


def rising(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v (1, SEQLEN, 1, 64): of the rows of RISES a score is 8 * size natural units, of all others a few."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, SEQLEN, 1, 64, generator=generator) for _ in range(3))
    for query, key, size in RISES:
        k[0, key, 0] = 8 * size * q[0, query, 0] / q[0, query, 0].norm()
    return tuple(x.to(dtype) for x in (q, k, v))


def run(name, sizes=(), rendered=None, **options):
    plan = make_plan(KernelSpec.from_name(name))
    q, k, v = rising(torch.float16)
    out, lse = torch.empty_like(q), torch.empty(1, 1, SEQLEN)
    tensors = {"q": q, "k": k, "v": v, "o": out, "lse": lse}
    call = examples_of(plan.problem)[0]
    run_kernel(plan, tensors, call, run_options=RunOptions(**options), rendered=rendered)
    return (check(out, lse, q, k, v, **call._asdict()),)


FAULTS = (
    Fault(
        "first-row-missed", FULL, "any_lane(((maxima[0] - row_max[0]) * softmax_scale_log2 > kMaxRise) |", "any_lane("
    ),
    Fault(
        "second-row-missed", FULL, "((maxima[1] - row_max[1]) * softmax_scale_log2 > kMaxRise) | has_large", "has_large"
    ),
    Fault("lanes-decide-alone", FULL, "bool const risen = any_lane(", "bool const risen = ("),
    Fault(
        "maximum-of-one-lane",
        FULL,
        "float const new_max = quad_max(maxima[row]);",
        "float const new_max = maxima[row];",
    ),
    Fault("sum-not-rescaled", FULL, "row_sum[row] *= correction[row];", "", count=2),
    Fault("o-not-rescaled", FULL, "                    rescale_o(acc_o, correction);", ""),
    Fault("o-never-rescaled", CAUSAL, "return risen;", "return false;"),
    Fault("kept-where-it-rose", HIDDEN, "softmax_scale_log2 <= kMaxRise;", "softmax_scale_log2 <= 64.0f;"),
)


@pytest.mark.parametrize("name", [FULL, CAUSAL, HIDDEN])
def test_maxima_may_rise_in_any_thread(name):
    (verdict,) = run(name)
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_seen(fault):
    assert symptom(run, fault, ((),), seed=0)

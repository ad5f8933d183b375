"""Values of a head dim of their own on the CPU: pairs of both passes and families, and seeded mix-ups of the two."""

from __future__ import annotations

import pytest

from fa2gen import cases
from fa2gen.cpu import RunOptions, run_kernel
from fa2gen.options import Shape
from fa2gen.plan import make_plan
from fa2gen.select import best_spec
from fa2gen.spec import KernelSpec, Problem
from tests.cpu.faults import Fault, symptom

# DeepSeek's; O in Q's place and larger than it; one panel beside several; odd multiples of 8, both ways round.
PAIRS = ((192, 128), (192, 256), (64, 256), (256, 8), (72, 136), (136, 40))
SHAPES = (Shape(1, 113, 203, 2, 1), Shape(1, 203, 60, 1, 1))  # causal: the first 143 rows of the second see no key


def run(name, sizes, rendered=None, **how):
    case = cases.make(KernelSpec.from_name(name), Shape(*sizes))
    run_kernel(make_plan(case.spec), case.tensors, case.options, run_options=RunOptions(**how), rendered=rendered)
    assert cases.written_outside(case) is None
    return (cases.verdict(case),)


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "d{}_v{}".format(*pair))
def test_pairs(pair, direction, arch):
    """Each pass of a pair under one mask on one architecture, under the other on the other."""
    mask = ("full", "causal")[(PAIRS.index(pair) + (arch == "sm90")) % 2]
    problem = Problem(direction=direction, head_dim=pair[0], head_dim_v=pair[1], mask=mask)
    for shape in SHAPES:
        (verdict,) = run(best_spec(problem, arch).name, shape)
        assert verdict.ok, f"{shape}: {verdict}"


SM90_FWD = "fa2_fwd_sm90_bf16_d72_v136_causal_m128_n64_s2_w8"
SM80_FWD = "fa2_fwd_sm80_bf16_d72_v136_causal_m64_n32_s2_w4"
KEYS = "fa2_bwd_sm90_bf16_d72_v136_causal_m64_n128_s2_w8"  # split by keys
PRODUCTS = "fa2_bwd_sm90_bf16_d136_v72_causal_m64_n64_s2_w8"
SM80_BWD = "fa2_bwd_sm80_bf16_d136_v72_causal_m64_n64_s1_w8"

OVER_V = "panel < kNumPanelsV; ++panel) {\n"
LOADS, STORES = "        load_box(", "            store_box("
OVER_K = OVER_V.replace("kNumPanelsV", "kNumPanels")
# (what, kernel, the text, what it becomes, how often it is there)
MIX_UPS = (
    ("v-has-the-panels-of-k", SM90_FWD, OVER_V + LOADS, OVER_K + LOADS, 1),
    ("v-expects-the-bytes-of-k", SM90_FWD, "expect_tx(full, kKvReadBytesV)", "expect_tx(full, kKvReadBytes)", 1),
    ("v-has-the-stages-of-k", SM90_FWD, "tiles + state.stage * kStageBytesV", "tiles + state.stage * kStageBytes", 1),
    ("v-is-read-in-the-stages-of-k", SM90_FWD, "(kStageBytesV / kDescUnit)", "(kStageBytes / kDescUnit)", 2),
    ("o-is-stored-in-the-panels-of-q", SM90_FWD, OVER_V + STORES, OVER_K + STORES, 1),
    ("v-is-copied-as-k", SM80_FWD, "load_tile_v(stages + write", "load_tile(stages + write", 1),
    ("o-is-stored-as-q", SM80_FWD, "8 * lane_chunk < kHeadDimV", "8 * lane_chunk < kHeadDim", 1),
    ("dp-has-the-steps-of-s", KEYS, "gemm_s_v(acc_dp,", "gemm_s(acc_dp,", 1),
    ("dout-has-the-stages-of-q", KEYS, "state.stage * kQBytesV,", "state.stage * kQBytes,", 1),
    ("dout-expects-the-bytes-of-q", KEYS, "kQReadBytesV + kStatisticsBytes", "kQReadBytes + kStatisticsBytes", 1),
    ("dv-is-stored-as-dk", KEYS, "store_rows_v(map, s, rows,", "store_rows(map, s, rows,", 1),
    ("dp-has-the-steps-of-s", PRODUCTS, "gemm_s_v(acc_dp,", "gemm_s(acc_dp,", 1),
    ("dout-is-read-in-the-stages-of-q", PRODUCTS, "dout_state.stage * kQBytesV)", "dout_state.stage * kQBytes)", 2),
    ("v-is-copied-as-k", SM80_BWD, "load_tile_v(smem + kSmemV,", "load_tile(smem + kSmemV,", 1),
    ("dp-has-the-steps-of-s", SM80_BWD, "gemm_s_v(acc_dp,", "gemm_s(acc_dp,", 1),
    ("dv-is-stored-as-dk", SM80_BWD, "store_tile_v(smem + kSmemV,", "store_tile(smem + kSmemV,", 1),
)
FAULTS = [Fault(what, kernel, old, new, count=count) for what, kernel, old, new, count in MIX_UPS]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_mixed_up_head_dims_are_seen(fault):
    assert symptom(run, fault, ((1, 150, 220, 2, 1),), seed=0)

"""Dropout on the CPU: one mask, bit for bit, whatever the tiling, the pass and the architecture; what it does to P."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fa2gen import cases
from fa2gen.cpu import RunOptions, run_kernel
from fa2gen.features import examples_of
from fa2gen.options import Options, Shape
from fa2gen.plan import make_plan
from fa2gen.reference import dropout_keep
from fa2gen.select import best_spec
from fa2gen.spec import KernelSpec, Problem
from tests.cpu.faults import Fault, symptom

ARCHES = ("sm80", "sm90")
ODD_FORWARD = "fa2_fwd_sm90_fp16_d128_drop_m64_n96_s2_w4"  # whose blocks begin in the middle of 64 keys
TILINGS = (
    "fa2_fwd_sm80_bf16_d128_drop_m128_n64_s1_w8",
    "fa2_fwd_sm80_fp16_d128_drop_m64_n32_s2_w4",
    "fa2_fwd_sm90_bf16_d128_drop_m128_n128_s2_w8_r1",
    ODD_FORWARD,
    "fa2_bwd_sm80_bf16_d128_drop_m64_n64_s2_w8",
    "fa2_bwd_sm80_fp16_d128_drop_m32_n32_s1_w4",
    "fa2_bwd_sm90_bf16_d128_drop_m48_n128_s2_w8",
    "fa2_bwd_sm90_bf16_d128_drop_m64_n128_s2_w8_l1",
    "fa2_bwd_sm90_fp16_d128_drop_m64_n64_s2_w8",
)


@pytest.mark.parametrize("name", TILINGS)
def test_one_mask(name):
    """128 equal scores a row, and unit vectors for V and dO: so O is the mask, and dV is the mask transposed."""
    options = Options(dropout_p=0.3)
    case = cases.make(KernelSpec.from_name(name), Shape(2, 128, 128, 4, 2), options)
    for x in ("q", "k"):
        case.tensors[x].zero_()
    for x in ("v", "dout"):
        if x in case.tensors:
            case.tensors[x].copy_(torch.eye(128)[None, :, None].expand_as(case.tensors[x]))
    keep = dropout_keep(case.tensors["rng_state"], 0.3, 4, (0, 128), (0, 128), (0, 2))  # (batch, heads, query, key)
    if "dout" not in case.tensors:
        cases.run(case, "cpu")
        assert torch.equal(case.tensors["o"].transpose(1, 2) != 0, keep)
        return
    case.tensors["lse"].fill_(torch.tensor(128.0).log())
    for head in range(4):  # those of one head of K and V are summed
        case.forget_results()
        of_head = case.tensors["dout"].clone()
        case.tensors["dout"][:, :, torch.arange(4) != head] = 0
        cases.run(case, "cpu")
        case.tensors["dout"].copy_(of_head)
        assert torch.equal(case.tensors["dv"][:, :, head // 2].transpose(1, 2) != 0, keep[:, head]), head


def kernel(arch: str, direction: str, mask: str = "causal", head_dim: int = 64, **fields: Any) -> str:
    problem = Problem(direction=direction, head_dim=head_dim, mask=mask, dropout=True, **fields)
    return best_spec(problem, arch).name


def run(name: str, shape: Shape, rendered=None, p=0.3, seed=0, **how):
    spec = KernelSpec.from_name(name)
    given = next(iter(examples_of(spec.problem)))._replace(dropout_p=p)
    case = cases.make(spec, shape, given, with_dlse=True)
    run_options = RunOptions(seed=seed, **how)
    run_kernel(make_plan(spec), case.tensors, case.options, rendered=rendered, run_options=run_options)
    assert cases.written_outside(case) is None
    return cases.verdict(case), case.tensors


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("direction", "p"), [("fwd", 0.001), ("fwd", 0.95), ("bwd", 0.001), ("bwd", 0.95)])
def test_probabilities(arch, direction, p):
    for shape in (Shape(1, 113, 203, 4, 2), Shape(1, 203, 60, 2, 1)):
        verdict, _ = run(kernel(arch, direction), shape, p=p)
        assert verdict.ok, verdict


CAP = {"score": "cap * tanh(s / cap)"}
SINKS_OF_KEYS = {"allow": "j <= i and (i - j < window or j < sinks)"}


@pytest.mark.parametrize(("direction", "arch"), [("fwd", "sm80"), ("fwd", "sm90"), ("bwd", "sm80"), ("bwd", "sm90")])
def test_with_a_mask_of_an_expression(direction, arch):
    """With a score it meets in tests/cpu/test_pairs.py."""
    spec = best_spec(Problem(direction=direction, head_dim=64, dropout=True, **SINKS_OF_KEYS), arch)
    case = cases.make(spec, Shape(1, 70, 131, 2, 1), with_dlse=True)
    cases.run(case, "cpu")
    assert cases.verdict(case).ok, cases.verdict(case)


FORWARD, BACKWARD, SM80, PRODUCTS = (
    kernel("sm90", "fwd", "full"),  # of whose keys a call here has two blocks
    kernel("sm90", "bwd"),
    kernel("sm80", "bwd"),
    kernel("sm90", "bwd", head_dim=192),
)
SM80_FORWARD, FULL = kernel("sm80", "fwd"), kernel("sm90", "bwd", "full")
CAPPED_FORWARD, CAPPED = kernel("sm90", "fwd", "full", **CAP), kernel("sm90", "bwd", **CAP)
QUERIES = "walk.m_block * kTileM"
DRAW_FORWARD = "draw_kept(kept, p, random_state(p, tile.bidh, tile.bidb), row, n_block * kTileN, lane_id());"
OF_STATE = "static_cast<uint32_t>(bits[{}]) + {}"
FAULTS = [
    Fault("heads-drop-the-same", FORWARD, OF_STATE.format(0, "bidh"), "static_cast<uint32_t>(bits[0])"),
    Fault("batches-drop-the-same", FORWARD, OF_STATE.format(1, "bidb"), "static_cast<uint32_t>(bits[1])"),
    Fault("rounds-without-keys", FORWARD, "^ round * kRound0", ""),
    Fault("first-rounds-without-keys", FORWARD, "^ state.of_sequence[0] ^ kRound0", "^ state.of_sequence[0]"),
    Fault("words-of-two-rounds-before", FORWARD, "^ of_rows.words[2]", ""),
    Fault("sums-of-the-own-word", FORWARD, "rotate_left(words[2], 28)", "words[2]"),
    Fault("sums-of-one-word-less", FORWARD, " ^ again[(i + 2) % 4]", ""),
    Fault("last-digits-of-the-own-sums", FORWARD, "kept = rotate_left(kept, 11);", ""),
    Fault("a-digit-is-passed-over", FORWARD, "kept = majority(kept, words[3], p.keep_digit_11);", ""),
    Fault("block-begins-with-a-unit", ODD_FORWARD, "0x6341u", "0x3210u"),
    Fault("keys-of-the-other-half", FORWARD, "bit < 8 ? 0xaa88u : 0xbb99u", "0xaa88u"),
    Fault("rows-of-the-other-half", FORWARD, "<< (7 - bit % 8)", "<< (7 - bit / 2 % 4 * 2)"),
    Fault("not-scaled", FORWARD, "inverse_sum[0] *= p.keep_scale;", ""),
    Fault(
        "first-block-keeps-all",
        FORWARD,
        "pack_p(p_tile, acc_s);\n            drop(p_tile, kept);",
        "pack_p(p_tile, acc_s);",
    ),
    Fault("later-blocks-keep-all", FORWARD, "packed[i] & masks[i]", "packed[i]"),
    Fault("bits-of-the-first-block", FORWARD, "n_block * kTileN, lane_id()};", "blocks.begin * kTileN, lane_id()};"),
    Fault("bits-of-the-block-before", CAPPED_FORWARD, f"{DRAW_FORWARD}\n                wgmma_wait_0", "wgmma_wait_0"),
    Fault("row-of-the-warp", SM80_FORWARD, "drop_thread / 32 * kNumRowTiles * 16 + 16 * i", "16 * i"),
    Fault("keys-of-the-first-quarter", BACKWARD, "first_key / 4 % 16", "0"),
    Fault("units-in-the-wrong-place", SM80, "first_query / 16 + 4 * i + unit", "first_query / 16 + 4 * i + 3 - unit"),
    Fault("not-transposed", BACKWARD, "transpose_halves(compare(p, words))", "compare(p, words)"),
    Fault("not-transposed-either", SM80, "transpose_halves(kept[tile][i])", "kept[tile][i]"),
    Fault("a-quarter-four-times", BACKWARD, "static_cast<uint32_t>(words[unit])", "static_cast<uint32_t>(words[0])"),
    Fault(
        "keys-of-the-first-warpgroup",
        BACKWARD,
        "block.n_block * (kTileN / 64) + warpgroup",
        "block.n_block * (kTileN / 64)",
    ),
    Fault(
        "nobody-waits-for-the-other-quarters",
        BACKWARD,
        "named_barrier_sync(kFirstWarpgroup + warpgroup, 128);",
        "",
        schedules=4,
    ),
    Fault("bits-of-the-step-before", BACKWARD, "draw(ds_stage ^ 1);", "draw(ds_stage);"),
    Fault(
        "bits-of-the-same-queries",
        BACKWARD,
        "walk.next(p, blocks);\n        draw(ds_stage ^ 1);",
        "draw(ds_stage ^ 1);\n        walk.next(p, blocks);",
    ),
    Fault("queries-of-the-other-half", BACKWARD, "bit % 2 * 4 + bit / 2 % 2 * 2", "bit / 2 % 2 * 4 + bit % 2 * 2"),
    Fault("p-keeps-its-minus", BACKWARD, "fabsf(p[tile][j])", "p[tile][j]"),
    Fault("dp-is-not-dropped", BACKWARD, "saturate(p[tile][j])", "fabsf(p[tile][j])"),
    Fault("dpsum-is-not-scaled", BACKWARD, "sum * reciprocal_approx(p.keep_scale)", "sum"),
    Fault(
        "dq-is-not-scaled", BACKWARD, "kQPanelBytes, (p.softmax_scale * p.keep_scale)", "kQPanelBytes, p.softmax_scale"
    ),
    Fault(
        "dk-is-not-scaled",
        BACKWARD,
        "kSmemK, (p.softmax_scale * p.keep_scale), s",
        "kSmemK, p.softmax_scale, s",
    ),
    Fault("dv-is-not-scaled", BACKWARD, "kSmemV, p.keep_scale, s", "kSmemV, 1.0f, s"),
    Fault("head-of-the-first-step", BACKWARD, "walk.bidh != drawn_head", "false"),
    Fault("head-of-the-first-step-anew", FULL, "random_state(p, walk.bidh,", "random_state(p, block.head_kv,"),
    Fault("keys-of-the-first-warp", PRODUCTS, "words_of_lane, 16 * warp)", "words_of_lane, 0)"),
    Fault(
        "keys-of-the-first-tile",
        SM80,
        "quarter_of(word, first_key + 16 * tile, unit)",
        "quarter_of(word, first_key, unit)",
    ),
    Fault(
        "queries-of-the-first-warp",
        SM80,
        f"{QUERIES} + warp_query, recompute(lane));\n            float",
        f"{QUERIES}, recompute(lane));\n            float",
    ),
    Fault("p-of-a-cap-is-not-dropped", CAPPED, "drop(p_tile, kept);", ""),
    Fault("dp-of-a-cap-is-not-dropped", CAPPED, "drop(acc_dp, kept);", ""),
    Fault("bits-of-p-in-the-order-of-s", CAPPED, "i % 2 * 2 + i / 2 % 2", "i % 4"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_seen(fault):
    shapes = [Shape(2, 90, 140, 4, 2)]
    assert any(symptom(run, fault, shapes, seed) for seed in range(fault.schedules)), "no run shows it"

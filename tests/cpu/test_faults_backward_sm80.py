"""Seeded faults in the SM80 backward kernels, as tests/cpu/test_faults.py has them for the forward pass."""

from __future__ import annotations

import pytest

from tests.cpu.faults import Fault, symptom
from tests.cpu.test_backward import run

DOUBLE = "fa2_bwd_sm80_bf16_d64_causal_m64_n64_s2_w4"  # two peers
SINGLE = "fa2_bwd_sm80_bf16_d72_causal_m64_n64_s1_w8_z64"  # four peers that share columns unevenly

ALONE = "fa2_bwd_sm80_bf16_d64_causal_m32_n128_s2_w4"  # warps without peers, and one stage of row statistics

# Ragged, GQA, several blocks each way; then two batches, and rows that see no key.
SHAPES = ((1, 110, 150, 4, 2), (2, 150, 60, 2, 1))

FAULTS = (
    # Waiting for cp.async, and for each other
    Fault("no-wait-for-stage", DOUBLE, "cp_async_wait_0();\n        sync_block();", "sync_block();"),
    Fault("no-wait-for-stage", SINGLE, "cp_async_wait_0();\n        sync_block();", "sync_block();"),
    Fault("no-barrier-for-stage", DOUBLE, "cp_async_wait_0();\n        sync_block();", "cp_async_wait_0();", 8),
    Fault("no-barrier-for-stage", SINGLE, "cp_async_wait_0();\n        sync_block();", "cp_async_wait_0();", 8),
    Fault(
        "loads-not-committed",
        SINGLE,
        "        cp_async_commit();\n    }\n\n    // The block behind",
        "    }\n\n    // The block behind",
    ),
    Fault(
        "stage-loaded-too-early",
        SINGLE,
        "        sync_block();\n        loads.load_next(",
        "        loads.load_next(",
        8,
    ),
    Fault("same-stage-twice", DOUBLE, "read ^= kStageBytes;", ""),
    Fault(
        "p-and-ds-not-published",
        DOUBLE,
        "            sync_block();\n            gemm_dkv_peers",
        "            gemm_dkv_peers",
        8,
    ),
    Fault(
        "ds-not-published",
        ALONE,
        "            sync_block();\n            pipeline.release",
        "            pipeline.release",
        8,
    ),
    Fault(
        "statistics-loaded-too-early",
        ALONE,
        "            sync_block();\n            pipeline.release(p, s, blocks, walk);\n",
        "            pipeline.release(p, s, blocks, walk);\n            sync_block();\n",
        8,
    ),
    Fault("statistics-of-the-first-block", ALONE, "            loads.load_statistics(p, next);\n", ""),
    Fault("dk-put-over-k-in-use", SINGLE, "    sync_block();\n    finish(p,", "    finish(p,", 8),
    Fault(
        "rows-stored-before-they-are-there",
        SINGLE,
        "    sync_block();\n    int const key = block",
        "    int const key = block",
        8,
    ),
    # Which block of queries
    Fault("next-block-of-queries", DOUBLE, "q += kElementBytes * (rows", "q += 0 * kElementBytes * (rows"),
    Fault("next-head-of-queries", DOUBLE, "next.bidh - walk.bidh;", "0;"),
    Fault(
        "next-head-begins-at-block-0",
        DOUBLE,
        "m_block = blocks.begin;\n            bidh",
        "m_block = 0;\n            bidh",
    ),
    Fault(
        "statistics-of-another-block",
        DOUBLE,
        "loads.load(p, s, walk, loads.stages)",
        "loads.load(p, s, {walk.m_block, 0, 0, 1}, loads.stages)",
    ),
    Fault("statistics-and-dq-of-another-head", DOUBLE, "skipped = p.num_m_blocks - (blocks.end - blocks.begin);", ""),
    Fault("one-block-more-of-a-head", DOUBLE, "if (m_block == blocks.end) {", "if (m_block > blocks.end) {"),
    Fault(
        "a-head-too-few", SINGLE, "(blocks.end - blocks.begin) * p.num_heads_per_kv}", "(blocks.end - blocks.begin)}"
    ),
    Fault("dpsum-is-lse", SINGLE, "thread < kTileM / 4 ? p.lse_log2 : p.dpsum", "p.lse_log2"),
    Fault(
        "kv-head",
        DOUBLE,
        "int const bidh = block.head_kv * p.num_heads_per_kv;",
        "int const bidh = block.head_kv;",
    ),
    # Products, and who has which part of them
    Fault("peer-reads-its-own", DOUBLE, "(peer ^ other) * kStepsWarpQueries;", "peer * kStepsWarpQueries;"),
    Fault("only-own-queries", SINGLE, "other < kNumPeers; ++other", "other < 2; ++other"),
    Fault("rows-of-peers", SINGLE, "rows_lane + first * 16 * kPanelRowBytes;", "rows_lane;"),
    Fault("ds-not-transposed", DOUBLE, "ldmatrix_x4_trans(ds[tile]", "ldmatrix_x4(ds[tile]"),
    Fault("dout-not-transposed", DOUBLE, "ldmatrix_x4_trans(b, ", "ldmatrix_x4(b, "),
    Fault(
        "queries-of-s-swapped", DOUBLE, "keys[tile], queries[0], queries[1]);", "keys[tile], queries[0], queries[2]);"
    ),
    Fault("dq-not-cleared", DOUBLE, "acc_dq[tile][i] = 0.0f;", "acc_dq[tile][i] = 1.0f;"),
    Fault("last-step-of-nobody", SINGLE, "column_warp + num_warps * i < kStepsHeadDim;", "false;"),
    Fault(
        "p-not-swizzled", DOUBLE, "((chunk % kPanelChunks ^ row_swizzle(lane_row)) << 4)", "(chunk % kPanelChunks << 4)"
    ),
    Fault(
        "p-eight-rows-on",
        DOUBLE,
        "store_shared_32(to + 8 * kPanelRowBytes, p_tile",
        "store_shared_32(to + 4 * kPanelRowBytes, p_tile",
    ),
    # Numbers
    Fault(
        "diagonal-off-by-one",
        DOUBLE,
        "max(key + s.q - s.k, 0)",
        "max(key + 1 + s.q - s.k, 0)",
    ),
    Fault(
        "keys-that-do-not-exist",
        SINGLE,
        "if (walk.needs_mask(blocks)) {",
        "if (walk.needs_mask(blocks) && (block.n_block + 1) * kTileN <= s.k) {",
    ),
    Fault("no-dpsum", DOUBLE, "(acc_dp[tile][j] - offset[j % 2]);", "acc_dp[tile][j];"),
    Fault(
        "lse-of-the-other-query", DOUBLE, "softmax_scale_log2, -offset[j % 2]));", "softmax_scale_log2, -offset[0]));"
    ),
    Fault("dk-not-scaled", DOUBLE, "rows, kKvPanelBytes, p.softmax_scale, peer);", "rows, kKvPanelBytes, 1.0f, peer);"),
    Fault("dq-not-zeroed", DOUBLE, "store_global_float4(dq_acc + i, 0.0f, 0.0f, 0.0f, 0.0f);", ""),
    Fault(
        "dq-adds-overlap",
        DOUBLE,
        "thread / 32 * kDqSliceFloats + thread % 32;",
        "thread / 64 * kDqSliceFloats + thread % 32;",
    ),
    Fault(
        "store-past-the-last-key",
        SINGLE,
        "if (lane.row + first < min(rows, num_rows)) {",
        "if (lane.row + first < rows) {",
    ),
    Fault("store-past-the-head-dim", SINGLE, "if (panel * kPanelColumns + lane.column < kHeadDim) {", "if (true) {"),
)

HARMLESS = (
    Fault(
        "one-more-barrier",
        DOUBLE,
        "            sync_block();\n            gemm_dkv_peers",
        "            sync_block();\n            sync_block();\n            gemm_dkv_peers",
    ),
    Fault("no-swizzle", SINGLE, "constexpr int kSwizzleMask = 3;", "constexpr int kSwizzleMask = 0;"),
    Fault(
        "products-with-zeros",
        SINGLE,
        "column_warp + num_warps * i < kStepsHeadDim;",
        "column_warp + num_warps * i <= kStepsHeadDim;",
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_seen(fault):
    seen = (symptom(run, fault, SHAPES, seed) for seed in range(fault.schedules))
    assert any(seen), f"not seen on {fault.schedules} schedules"


@pytest.mark.parametrize("change", HARMLESS, ids=str)
def test_harmless_change_passes(change):
    for seed in range(2):
        assert symptom(run, change, SHAPES, seed) == ""

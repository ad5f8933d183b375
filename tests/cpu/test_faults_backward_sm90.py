"""Seeded faults of the backward kernels of SM90, one at a time, over the ways in which they split their work.

As in test_faults: a fault is a replacement in the rendered source, and must be seen, by a KernelFault or by a gradient
that breaks the rule, within `schedules` schedules; harmless changes must pass. Deterministic kernels have their own, in
test_deterministic.
"""

from __future__ import annotations

import pytest

from tests.cpu.faults import Fault, symptom
from tests.cpu.test_backward import NO_KEYS, run

SMALL = "fa2_bwd_sm90_bf16_d64_m64_n64_s2_w4"  # dQ in its rows, one mma warpgroup
STAGED = "fa2_bwd_sm90_bf16_d128_causal_m80_n128_s2_w8"  # split by keys, dQ through shared memory
LAGGING = "fa2_bwd_sm90_bf16_d64_causal_m128_n128_s2_w8_l1"  # dQ a step later
TURNS = "fa2_bwd_sm90_bf16_d64_causal_m128_n128_s2_w8_l1_t1"  # and one block of keys after the other
HOLDING = "fa2_bwd_sm90_bf16_d96_causal_m64_n128_s2_w8_l1_t1"  # likewise, with V in registers
SHARED = "fa2_bwd_sm90_bf16_d40_causal_m80_n128_s2_w8"  # one panel of dQ, half of the queries a warpgroup
PANEL = "fa2_bwd_sm90_fp16_d136_causal_m64_n128_s2_w8"  # split by keys, a third panel of dQ, from registers
PRODUCTS = "fa2_bwd_sm90_fp16_d168_causal_m64_n64_s2_w8"  # split by products, dS from one warpgroup to the other
PASSING = "fa2_bwd_sm90_fp16_d168_causal_m64_n96_s2_w8"  # P and dS from one warpgroup to both

# Two batches and three blocks of queries for each of two heads, all ragged; rows that see no key; many blocks of keys.
SHAPES = ((2, 150, 220, 2, 1), NO_KEYS, (1, 40, 600, 3, 3))

# Pieces of source that several faults begin from.
SYNC = "named_barrier_sync(kAllMmaWarps, kNumMmaThreads);"
WAIT_Q = "mbarrier_wait(barriers.q_full(q_state.stage), q_state.phase);"
WAIT_DOUT = "mbarrier_wait(barriers.dout_full(dout_state.stage), dout_state.phase);"
WAIT_EMPTY = "mbarrier_wait(empty, state.phase ^ 1);"
RELEASE_Q = "mbarrier_arrive_if(barriers.q_empty(q_state.stage), leader);"
DK_DONE = "wgmma_wait_0();\n        wgmma_touch(acc_dk);"
RELEASE_DOUT = (
    "wgmma_touch(acc_dv);\n        wgmma_touch_a(p_tile);\n        "
    "mbarrier_arrive_if(barriers.dout_empty(dout_state.stage), leader);"
)
PUBLISH_DS = "fence_proxy_async();\n        sync_warp();\n        "
DS_FULL = "mbarrier_arrive_if(barriers.ds_full(ds_state.stage), leader);"
DS_EMPTY = "mbarrier_arrive_if(barriers.ds_empty(ds_state.stage), leader);"
ADD_REST = "add_dq(acc_dq_rest, dq_acc + kNumAccDq * 32, kNumAccDqRest);"
PUBLISH_SCORES = "fence_proxy_async();\n        sync_warp();\n        "
P_FULL = "mbarrier_arrive_if(barriers.p_full(), leader);"
RELEASE_BEFORE = "mbarrier_arrive_if(barriers.k_empty(k_state.stage ^ 1), leader)"
PUBLISH = "fence_proxy_async();\n    sync_warp();\n"
PUBLISH_DQ = PUBLISH + "    mbarrier_arrive_if(full"
PUBLISH_ROWS = PUBLISH + "    if (elect_one()) {"
TAKE_DQ = "tma_store_wait_read();\n        mbarrier_arrive(barriers.dq_empty());"

FAULTS = (
    # dQ of half the queries
    Fault("queries-of-the-first-warpgroup", SHARED, "warpgroup * kQueriesOfDq", "0 * warpgroup * kQueriesOfDq"),
    Fault("half-of-dq-over-the-other", SHARED, "warpgroup * kNumAccDq * 32", "0 * warpgroup"),
    # dQ a step later
    Fault(
        "dq-before-all-ds",
        LAGGING,
        "mbarrier_wait(barriers.ds_full(ds_stage ^ 1), (step - 1) / 2 & 1);",
        "",
        schedules=4,
    ),
    Fault(
        "ds-over-what-is-read",
        LAGGING,
        "mbarrier_wait(barriers.ds_empty(ds_stage), (step / 2 & 1) ^ 1);",
        "",
        schedules=4,
    ),
    Fault("dq-of-this-step", LAGGING, "(ds_stage ^ 1) * (kDsBytes", "ds_stage * (kDsBytes", schedules=4),
    Fault("no-wait-for-lagging-dq", LAGGING, "wgmma_wait_1();\n        wgmma_touch(acc_dq);", ""),
    Fault("no-dq-of-the-last-step", LAGGING, "int const last = step - 1;", "int const last = step;"),
    Fault("one-half-of-dq", LAGGING, "kDqBlockFloats + warpgroup * kShareFloats", "kDqBlockFloats + kShareFloats"),
    Fault("no-wait-for-lagging-dk", LAGGING, DK_DONE, "wgmma_touch(acc_dk);"),
    # One block of keys after the other
    Fault("dq-with-the-next-k", TURNS, "gemm_dq(acc_dq, ds_before, k_before);", "gemm_dq(acc_dq, ds_before, k_panel);"),
    Fault("k-never-released", TURNS, f"{RELEASE_BEFORE};\n        tma", "tma"),
    Fault(
        "k-over-k-in-use",
        TURNS,
        "mbarrier_wait(barriers.k_empty(k_state.stage), k_state.phase ^ 1);\n        if",
        "if",
    ),
    Fault("k-empty-count-too-small", TURNS, "(k_empty(stage), kNumMmaWarps + 2)", "(k_empty(stage), kNumMmaWarps)", 4),
    Fault("dv-over-dq", TURNS, "mbarrier_wait(barriers.dq_empty(warpgroup), dq_phase ^ 1);", "", schedules=4),
    Fault("dq-over-dv", TURNS, "tma_store_wait_read();\n        sync_warp();\n    };", "};", schedules=4),
    Fault("dk-over-dv", TURNS, "dq_slice + kNumPanels * kStoredPanelBytes", "dq_slice"),
    Fault("dk-over-dv-in-its-place", HOLDING, "tma_store_wait_read();\n        sync_warp();\n        stage", "stage"),
    Fault(
        "sums-of-the-block-before", TURNS, "k_state.advance(kNumKeyStages);\n        clear();", "k_state.advance(2);"
    ),
    Fault("blocks-not-counted-from-0", TURNS, "store_global_int(p.tile_counter, 0);", ""),
    Fault("first-blocks-again", TURNS, "static_cast<int>(gridDim.x) + shfl_from_lane_0", "shfl_from_lane_0"),
    Fault("v-never-released", HOLDING, "mbarrier_arrive_if(barriers.v_empty(), leader && has_new_v);", ""),
    Fault("v-over-v-in-use", HOLDING, "mbarrier_wait(barriers.v_empty(), v_phase ^ 1);", "", schedules=8),
    Fault("v-of-the-block-before", HOLDING, "mbarrier_wait(barriers.v_full(), v_phase);\n", "", schedules=8),
    # Waiting for wgmma
    Fault("no-wait-for-s", STAGED, "wgmma_wait_1();\n        wgmma_touch(acc_s);", "wgmma_touch(acc_s);"),
    Fault("waits-allow-one-more", STAGED, "machine::wgmma_wait(1, line);", "machine::wgmma_wait(2, line);"),
    Fault(
        "s-not-committed",
        STAGED,
        "gemm_s(acc_s, k_rows, q_tile);\n        wgmma_commit();",
        "gemm_s(acc_s, k_rows, q_tile);",
    ),
    Fault("no-wait-for-dp", STAGED, "wgmma_wait_0();\n        wgmma_touch(acc_dp);", "wgmma_touch(acc_dp);"),
    Fault("no-wait-for-dq", STAGED, "wgmma_wait_1();\n        wgmma_touch(acc_dq);", "wgmma_touch(acc_dq);"),
    Fault("wait-for-dq-allows-one", PRODUCTS, "wgmma_wait_0();\n        wgmma_touch(acc_dq);", "wgmma_wait_1();"),
    Fault("no-wait-for-rest-of-dq", PRODUCTS, "wgmma_wait_0();\n        wgmma_touch(acc_dq_rest);", ""),
    Fault("no-wait-for-dv", PRODUCTS, f"wgmma_wait_1();\n        {RELEASE_DOUT}", RELEASE_DOUT, schedules=4),
    Fault("no-wait-for-dk", STAGED, DK_DONE, "wgmma_touch(acc_dk);"),
    Fault("p-changed-under-dv", PANEL, "auto release_dout", "p_tile[3] ^= 0x10001u; auto release_dout"),
    Fault("ds-changed-under-dk", SMALL, "hand_over_dq(acc_dq,", "ds_tile[3] = 0; hand_over_dq(acc_dq,"),
    # wgmma.fence
    Fault("no-fence-before-s", STAGED, "wgmma_fence();\n        gemm_s(acc_s", "gemm_s(acc_s"),
    Fault("no-fence-before-dv", STAGED, "wgmma_fence();\n        gemm_dkv(acc_dv", "gemm_dkv(acc_dv"),
    Fault("no-fence-before-dk", PRODUCTS, "wgmma_fence();\n        gemm_dkv(acc_dk", "gemm_dkv(acc_dk"),
    # Full and empty barriers
    Fault("no-wait-for-q", STAGED, WAIT_Q, ""),
    Fault("no-wait-for-dout", STAGED, WAIT_DOUT, ""),
    Fault("no-wait-for-k", SMALL, "mbarrier_wait(barriers.k_full(), 0);", "", schedules=8),
    Fault("no-wait-for-v", PRODUCTS, "mbarrier_wait(barriers.v_full(), 0);", "", schedules=8),
    Fault("q-parity", SMALL, WAIT_Q, WAIT_Q.replace(".phase)", ".phase ^ 1)")),
    Fault("parity-never-flips", SMALL, "stage = 0;\n            phase ^= 1;", "stage = 0;"),
    Fault("overwritten-early", STAGED, WAIT_EMPTY, ""),
    Fault("producer-parity", SMALL, WAIT_EMPTY, "mbarrier_wait(empty, state.phase);"),
    Fault("q-released-early", STAGED, DK_DONE, f"{RELEASE_Q} wgmma_wait_0();", schedules=4),
    Fault("q-never-released", SMALL, RELEASE_Q, ""),
    Fault(
        "q-empty-count-too-small",
        STAGED,
        "mbarrier_init(q_empty(stage), kNumMmaWarps);",
        "mbarrier_init(q_empty(stage), kNumMmaWarps - 1);",
        schedules=4,
    ),
    Fault(
        "dout-empty-count-too-large",
        STAGED,
        "mbarrier_init(dout_empty(stage), kNumMmaWarps);",
        "mbarrier_init(dout_empty(stage), kNumMmaWarps + 1);",
    ),
    Fault("statistics-not-expected", STAGED, "kQReadBytes + kStatisticsBytes);", "kQReadBytes);"),
    Fault("barriers-not-published-to-tma", SMALL, "        fence_mbarrier_init();\n", ""),
    Fault("barriers-used-before-init", SMALL, "sync_block();\n\n    if (warp < 4)", "if (warp < 4)", schedules=4),
    Fault("registers-overcommitted", STAGED, "machine::set_max_registers(240,", "machine::set_max_registers(248,"),
    # dS between the warps
    Fault("no-barrier-before-dq", STAGED, f"{SYNC}\n\n        float acc_dq", "float acc_dq", schedules=4),
    Fault(
        "barrier-of-one-warpgroup",
        STAGED,
        f"{SYNC}\n\n        float acc_dq",
        "named_barrier_sync(kAllMmaWarps, 128); float acc_dq",
        schedules=4,
    ),
    Fault("ds-not-published", STAGED, "fence_proxy_async();\n        auto release_dout", "auto release_dout"),
    Fault("ds-does-not-alternate", STAGED, "ds_stage ^= 1;", "", schedules=4),
    Fault("no-wait-for-ds", PRODUCTS, "mbarrier_wait(barriers.ds_full(ds_state.stage), ds_state.phase);", ""),
    Fault(
        "ds-overwritten",
        PRODUCTS,
        "mbarrier_wait(barriers.ds_empty(ds_state.stage), ds_state.phase ^ 1);",
        "",
        schedules=4,
    ),
    Fault(
        "ds-released-before-its-last-product",
        PRODUCTS,
        f"wgmma_wait_0();\n        wgmma_touch(acc_dq_rest);\n        {DS_EMPTY}",
        f"{DS_EMPTY} wgmma_wait_0();",
        schedules=4,
    ),
    Fault(
        "ds-not-published",
        PRODUCTS,
        f"{PUBLISH_DS}{DS_FULL}",
        f"sync_warp();\n        {DS_FULL}",
    ),
    Fault(
        "ds-full-before-the-warp-is-done",
        PRODUCTS,
        f"{PUBLISH_DS}{DS_FULL}",
        f"fence_proxy_async();\n        {DS_FULL}",
        schedules=4,
    ),
    Fault(
        "ds-full-count-of-both-warpgroups",
        PRODUCTS,
        "mbarrier_init(ds_full(stage), kNumMmaWarps / 2);",
        "mbarrier_init(ds_full(stage), kNumMmaWarps);",
    ),
    Fault("ds-published-too-late", PRODUCTS, f"{PUBLISH_DS}{DS_FULL}", f"{DS_FULL} {PUBLISH_DS}", schedules=4),
    Fault("ds-not-transposed", SMALL, "stmatrix_x4_trans(first + i / 4", "stmatrix_x4(first + i / 4"),
    # P and dS from one warpgroup to both
    Fault("wait-for-its-dq-allows-one", PASSING, "wgmma_wait_0();\n        wgmma_touch(acc_dq);", "wgmma_wait_1();"),
    Fault("no-wait-for-dq-of-the-other", PASSING, "wgmma_wait_1();\n        wgmma_touch(acc_dq);", ""),
    Fault("no-fence-before-dp", PASSING, "wgmma_fence();\n        gemm_s(acc_dp", "gemm_s(acc_dp"),
    Fault("no-wait-for-ds-of-either", PASSING, "mbarrier_wait(barriers.ds_full(), parity);", "", count=2),
    Fault("no-wait-for-p", PASSING, "mbarrier_wait(barriers.p_full(), parity);", "", schedules=8, count=2),
    Fault("p-not-published", PASSING, f"{PUBLISH_SCORES}{P_FULL}", f"sync_warp();\n        {P_FULL}"),
    Fault(
        "p-full-count-of-both-warpgroups",
        PASSING,
        "mbarrier_init(p_full(), kNumMmaWarps / 2);",
        "mbarrier_init(p_full(), kNumMmaWarps);",
    ),
    Fault("second-panel-of-dq", PASSING, "k_tile + 1 * (kKvPanelBytes", "k_tile + 0 * (kKvPanelBytes"),
    Fault("sums-of-the-second-panel", PASSING, "dq_acc + 1 * kDqPanelFloats", "dq_acc + 0 * kDqPanelFloats"),
    Fault("last-columns-of-dq", PASSING, "kDqPanelFloats, 52);", "kDqPanelFloats, 48);"),
    Fault("both-over-k-and-v-in-use", PASSING, f"{SYNC}\n#pragma unroll", "#pragma unroll", schedules=4),
    Fault(
        "stored-before-the-warpgroup-is-done",
        PASSING,
        "named_barrier_sync(barrier, kNumMmaThreads / 2);",
        "",
        schedules=8,
    ),
    Fault("dv-not-transposed", PASSING, "stmatrix_x4_trans(first + i / 8", "stmatrix_x4(first + i / 8"),
    Fault("panels-of-dv", PASSING, "tile + panel * kKvPanelBytes, factor", "tile, factor"),
    Fault("step-of-scores", PASSING, "kDescLoScores + step * 16", "kDescLoScores + step * 8"),
    Fault("panels-of-scores", PASSING, "scores + kDescLoScores", "scores + kDescLoScores / 2"),
    Fault("swizzle-of-scores", PASSING, "(chunk ^ row / 2 % 4)", "(chunk ^ row % 4)"),
    Fault("dpsum-of-the-other-row", PASSING, "- dpsum[i % 2]), p[1]", "- dpsum[1 - i % 2]), p[1]"),
    # dQ
    Fault("dq-added-before-it-is-there", STAGED, "mbarrier_wait(barriers.dq_full(), phase);", ""),
    Fault("dq-overwritten", SMALL, "mbarrier_wait(empty, phase ^ 1);", "", schedules=8),
    Fault(
        "dq-given-back-early",
        SMALL,
        TAKE_DQ,
        "mbarrier_arrive(barriers.dq_empty()); tma_store_wait_read();",
        schedules=8,
    ),
    Fault("dq-place-never-given-back", STAGED, TAKE_DQ, "tma_store_wait_read();"),
    Fault("dq-not-committed", SMALL, f"tma_store_commit();\n        {TAKE_DQ}", TAKE_DQ),
    Fault(
        "dq-full-count-too-small", STAGED, "mbarrier_init(dq_full(), 8);", "mbarrier_init(dq_full(), 7);", schedules=4
    ),
    Fault("dq-not-published", STAGED, PUBLISH_DQ, PUBLISH_DQ.replace("fence_proxy_async();\n", "")),
    Fault("one-lane-publishes-dq", STAGED, PUBLISH_DQ, f"if (lane_id() == 0) {PUBLISH_DQ}"),
    Fault("dq-full-before-the-warp-is-done", STAGED, PUBLISH_DQ, PUBLISH_DQ.replace("sync_warp();\n", ""), schedules=4),
    Fault(
        "dq-slice", STAGED, "int const slice = 4 * warpgroup + warp;", "int const slice = 4 * (1 - warpgroup) + warp;"
    ),
    Fault(
        "dq-of-another-block",
        STAGED,
        "p.dq_acc + static_cast<int64_t>(walk.query_block)",
        "p.dq_acc + static_cast<int64_t>(0)",
    ),
    Fault("dq-not-cleared", PANEL, "store_global_float4(dq_acc + i, 0.0f, 0.0f, 0.0f, 0.0f);", ""),
    # The first to come stores
    Fault(
        "the-first-adds",
        STAGED,
        "bulk_store(destination, source, bytes);",
        "bulk_reduce_add(destination, source, bytes);",
    ),
    Fault("all-are-first", STAGED, "bool const is_first = found == kNoSums;", "bool const is_first = true;"),
    Fault(
        "told-before-it-is-stored",
        STAGED,
        "tma_store_wait();\n            store_global_release(sums",
        "store_global_release(sums",
    ),
    Fault("added-before-it-is-stored", STAGED, "if (p.stores_first) {", "if (false) {"),
    # By seed 0, which lets a thread run on: others ask again and again, and the time limit must come between.
    Fault("stored-is-not-told", SMALL, "store_global_release(sums, kAreSums);", "", time_limit=1.0),
    Fault("nothing-stored-is-no-zeros", LAGGING, "r[i] = sums == kAreSums ? r[i] : 0.0f;", ""),
    Fault(
        "rest-of-dq-slice", PANEL, "(kNumMmaWarps - 4 * warpgroup) * kDqSliceFloats", "kNumMmaWarps * kDqSliceFloats"
    ),
    Fault("rest-of-dq-queries", PANEL, "ds_rows + warpgroup * (kTileM / 2", "ds_rows + (1 - warpgroup) * (kTileM / 2"),
    Fault("rest-of-dq-past-the-head-dim", PANEL, "if (warp < kNumDqSlices - kNumMmaWarps) {", "if (true) {"),
    Fault("rest-of-dq-panel", PRODUCTS, "k_tile + 2 * (kKvPanelBytes", "k_tile + 1 * (kKvPanelBytes"),
    Fault(
        "next-head-begins-elsewhere",
        PANEL,
        "dq_acc += static_cast<int64_t>(walk.next(p, blocks)) * kDqBlockFloats;",
        "walk.next(p, blocks); dq_acc += kDqBlockFloats;",
    ),
    # dK and dV
    Fault("dk-over-k-in-use", STAGED, f"{SYNC}  // all warps are done with K and V", "", schedules=4),
    Fault("dv-over-v-in-use", PRODUCTS, f"{SYNC}\n    uint32_t const rows", "uint32_t const rows"),
    Fault("dk-and-dv-not-published", STAGED, PUBLISH_ROWS, PUBLISH_ROWS.replace("fence_proxy_async();\n", "")),
    Fault("stored-before-the-warp-is-done", STAGED, PUBLISH_ROWS, "fence_proxy_async();\n    if (lane_id() == 0) {"),
    Fault("dv-stored-as-dk", STAGED, "finish(map_dk, acc_dk, smem + kSmemK", "finish(map_dk, acc_dv, smem + kSmemK"),
    Fault(
        "second-warpgroup-has-the-firsts-keys",
        STAGED,
        "kSmemV + 64 * warpgroup * kPanelRowBytes",
        "kSmemV + 0 * warpgroup * kPanelRowBytes",
    ),
    # Descriptors
    Fault(
        "step-inside-panel",
        STAGED,
        "uint32_t const within = step % kStepsPerPanel * 32;",
        "uint32_t const within = step % kStepsPerPanel * 16;",
    ),
    Fault("step-of-queries", PRODUCTS, "kDescLoQ + step * 16", "kDescLoQ + step * 8"),
    Fault("panels-of-queries", STAGED, "q_tile + kDescLoQ +", "q_tile + kDescLoQ / 2 +"),
    Fault("step-of-ds", STAGED, "(step / kStepsPerPanel * kDsPanelBytes", "(step / kStepsPerPanel * kDsPanelBytes / 2"),
    # Masks, coordinates, numbers
    Fault("diagonal-one-up", STAGED, "max(key + s.q - s.k, 0)", "max(key + s.q - s.k - 1, 0)"),
    Fault(
        "first-query-block",
        PANEL,
        "query_begin(p, s, first_key) / kTileM;",
        "(query_begin(p, s, first_key) + kTileM - 1) / kTileM;",
    ),
    Fault(
        "first-unmasked-block",
        PANEL,
        "(query_begin(p, s, last_key) + kTileM - 1) / kTileM",
        "query_begin(p, s, last_key) / kTileM",
    ),
    Fault("lse-of-missing-rows", SMALL, "float lse_log2 = kInfinity;", "float lse_log2 = -kInfinity;"),
    Fault(
        "no-statistics-of-missing-rows",
        SMALL,
        "if (chunk == 0 && row_of_block < kTileM) {",
        "if (chunk == 0 && exists) {",
    ),
    Fault("lse-of-rows-without-keys", STAGED, "sees_keys ? lse * kLog2E : 0.0f", "lse * kLog2E"),
    Fault("dpsum-without-dlse", SMALL, "sum -= load_global_float", "load_global_float"),
    Fault(
        "statistics-of-another-block",
        STAGED,
        "statistics + static_cast<int64_t>(walk.query_block) * kTileM,",
        "statistics,",
    ),
    Fault("lse-of-the-first-stage", STAGED, "kSmemLse + q_state.stage * kStatisticsBytes", "kSmemLse"),
    Fault(
        "dk-without-scale",
        STAGED,
        "finish(map_dk, acc_dk, smem + kSmemK, p.softmax_scale,",
        "finish(map_dk, acc_dk, smem + kSmemK, 1.0f,",
    ),
    Fault("dq-without-scale", SMALL, "kQPanelBytes, p.softmax_scale);", "kQPanelBytes, 1.0f);"),
    Fault(
        "one-head-of-the-group",
        SMALL,
        "(blocks.end - blocks.begin) * p.num_heads_per_kv}",
        "(blocks.end - blocks.begin)}",
    ),
    Fault(
        "heads-of-another-group",
        STAGED,
        "int const bidh = block.head_kv * p.num_heads_per_kv;",
        "int const bidh = block.head_kv;",
    ),
    Fault("blocks-of-a-head", STAGED, "return {within / width,", "return {within % p.num_n_blocks,"),
    # Postprocess
    Fault("dq-not-published-to-tma", STAGED, "fence_proxy_async();\n    sync_block();", "sync_block();"),
    Fault(
        "dq-stored-before-it-is-there",
        STAGED,
        "fence_proxy_async();\n    sync_block();",
        "fence_proxy_async();",
        schedules=4,
    ),
    Fault("dq-panels", STAGED, "smem + warp / 4 * kQPanelBytes", "smem + (1 - warp / 4) * kQPanelBytes"),
    Fault("dq-registers-swapped", STAGED, "pair(low, 0), pair(low, 2)", "pair(low, 2), pair(low, 0)"),
    Fault(
        "dq-rows",
        SMALL,
        "smem + warp * 16 * kPanelRowBytes, kQPanelBytes",
        "smem + (warp ^ 1) * 16 * kPanelRowBytes, kQPanelBytes",
    ),
)

HARMLESS = (
    Fault("waits-for-everything", STAGED, "machine::wgmma_wait(1, line);", "machine::wgmma_wait(0, line);"),
    # The load of dO waits behind that of Q for dK, which comes after dV.
    Fault("dout-released-early", STAGED, "wgmma_wait_1();\n        release_dout();", "release_dout(); wgmma_wait_1();"),
    # Rows of zeros: P = 1 multiplies dO = 0 and dP - dPsum = 0.
    Fault("lse-of-missing-rows-finite", STAGED, "float lse_log2 = kInfinity;", "float lse_log2 = 0.0f;"),
    # The last reduction has been read, and the next kernel starts when this one is complete.
    Fault("sums-not-waited-for", STAGED, "    }\n    tma_store_wait();\n}\n\n// Consumer", "    }\n}\n\n// Consumer"),
    Fault(
        "one-block-of-queries-more",
        PANEL,
        "query_begin(p, s, first_key) / kTileM;",
        "max(query_begin(p, s, first_key) / kTileM - 1, 0);",
    ),
    Fault(
        "ds-released-later",
        PRODUCTS,
        f"{DS_EMPTY}\n        {ADD_REST}",
        f"{ADD_REST} {DS_EMPTY}",
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_seen(fault):
    seen = (symptom(run, fault, SHAPES, seed, with_dlse=True) for seed in range(fault.schedules))
    assert any(seen), f"not seen on {fault.schedules} schedules"


@pytest.mark.parametrize("change", HARMLESS, ids=str)
def test_harmless_change_passes(change):
    assert symptom(run, change, SHAPES, 1, with_dlse=True) == ""


def test_there_are_enough():
    ids = [str(fault) for fault in FAULTS]
    assert len(ids) == len(set(ids)) >= 80
    assert {fault.kernel for fault in FAULTS} == {
        SMALL,
        STAGED,
        LAGGING,
        TURNS,
        HOLDING,
        SHARED,
        PANEL,
        PRODUCTS,
        PASSING,
    }

"""Seeded faults: the mistakes that kernel authors make, one at a time, in kernels that are right. All must be seen.

A fault is a replacement in the rendered source; a run sees it by a KernelFault (a race, a deadlock, foreign memory) or
by a wrong result. Schedules are tried from seed 0 on; `schedules` is how many it may take. Harmless changes are in the
second table: they must pass.
"""

from __future__ import annotations

import pytest

from tests.cpu.faults import Fault, symptom

SM90 = "fa2_fwd_sm90_bf16_d128_causal_m128_n64_s2_w8"
RAGGED = "fa2_fwd_sm90_bf16_d72_m64_n64_s2_w4"  # 16 columns of its second panel are loaded
ONE_Q = "fa2_fwd_sm90_bf16_d128_causal_m192_n64_s3_w12_r1"  # the next tile's Q waits for this one's
ALIAS = "fa2_fwd_sm90_bf16_d256_causal_m128_n64_s2_w8"  # O takes the place of Q
SINGLE = "fa2_fwd_sm80_bf16_d128_causal_m64_n64_s1_w4"
RING = "fa2_fwd_sm80_bf16_d128_causal_m64_n64_s3_w4"
PAIRS = "fa2_fwd_sm80_bf16_d192_causal_m64_n32_s1_w4_r1"  # two warps have the same rows

# Ragged, two batches, GQA, several tiles for each block; then rows that see no key.
SHAPES = ((2, 300, 395, 2, 1), (1, 500, 90, 2, 1))

FAULTS = (
    # SM90: waiting for wgmma
    Fault("no-wait-for-s", SM90, "wgmma_wait_1();\n", "\n"),
    Fault("no-wait-for-first-s", SM90, "wgmma_wait_0();\n            wgmma_touch(acc_s);", "wgmma_touch(acc_s);"),
    Fault("no-wait-for-pv", SM90, "wgmma_wait_0();\n                wgmma_touch(acc_o);", "wgmma_touch(acc_o);"),
    Fault("no-wait-for-last-pv", SM90, "wgmma_wait_0();\n            wgmma_touch(acc_o);", "wgmma_touch(acc_o);"),
    Fault("wait-for-pv-allows-one", SM90, "wgmma_wait_0();\n                wgmma_touch(acc_o);", "wgmma_wait_1();"),
    Fault(
        "s-not-committed",
        SM90,
        "wgmma_commit();\n                mbarrier_wait(barriers.v_full",
        "mbarrier_wait(barriers.v_full",
    ),
    Fault(
        "p-repacked-before-pv-is-done",
        SM90,
        "wgmma_wait_0();\n                wgmma_touch(acc_o);",
        "pack_p(p_tile, acc_s); wgmma_wait_0();",
    ),
    Fault(
        "o-rescaled-before-pv-is-done",
        SM90,
        "wgmma_wait_0();\n                wgmma_touch(acc_o);",
        "rescale_o(acc_o, correction); wgmma_wait_0();",
    ),
    # SM90: wgmma.fence
    Fault("no-fence-after-softmax", SM90, "wgmma_fence();\n                gemm_qk", "gemm_qk"),
    Fault("no-fence-before-first-s", SM90, "wgmma_fence();\n            gemm_qk", "gemm_qk"),
    Fault("no-fence-before-last-pv", SM90, "wgmma_fence();\n            gemm_pv", "gemm_pv"),
    Fault(
        "p-written-behind-the-fence",
        SM90,
        "wgmma_fence();\n            gemm_pv",
        "wgmma_fence(); p_tile[3] ^= 0x10001u;\n            gemm_pv",
    ),
    # SM90: full and empty barriers
    Fault(
        "no-wait-for-k",
        SM90,
        "mbarrier_wait(barriers.k_full(k_state.stage), k_state.phase);\n                wgmma_fence",
        "wgmma_fence",
    ),
    Fault(
        "no-wait-for-first-k",
        SM90,
        "mbarrier_wait(barriers.k_full(k_state.stage), k_state.phase);\n            wgmma_fence",
        "wgmma_fence",
        schedules=8,
    ),
    Fault(
        "no-wait-for-v",
        SM90,
        "mbarrier_wait(barriers.v_full(v_state.stage), v_state.phase);\n                wgmma_fence",
        "wgmma_fence",
    ),
    Fault(
        "no-wait-for-last-v",
        SM90,
        "mbarrier_wait(barriers.v_full(v_state.stage), v_state.phase);\n            wgmma_fence",
        "wgmma_fence",
    ),
    Fault("no-wait-for-q", SM90, "mbarrier_wait(barriers.q_full(q_state.stage), q_state.phase);", ""),
    Fault("q-overwritten-early", SM90, "mbarrier_wait(barriers.q_empty(state.stage), state.phase ^ 1);", ""),
    Fault(
        "q-released-before-the-last-block",
        ONE_Q,
        "release_q_after(n_block == blocks.begin);\n            };",
        "release_q_after(true);\n            };",
    ),
    Fault("kv-overwritten-early", SM90, "mbarrier_wait(empty, state.phase ^ 1);", ""),
    Fault("producer-parity", SM90, "mbarrier_wait(empty, state.phase ^ 1);", "mbarrier_wait(empty, state.phase);"),
    Fault(
        "q-parity",
        SM90,
        "state.phase ^ 1);\n    if (elect_one()) {\n        store_shared_int4",
        "state.phase);\n    if (elect_one()) {\n        store_shared_int4",
    ),
    Fault("parity-never-flips", SM90, "phase ^= 1;", "phase ^= 0;"),
    Fault("ring-too-long", SM90, "if (stage == num_stages) {", "if (stage == num_stages + 1) {"),
    Fault(
        "k-released-before-product",
        SM90,
        "wgmma_wait_0();\n            wgmma_touch(acc_s);\n            release_k(leader);",
        "release_k(leader); wgmma_wait_0();",
        schedules=8,
    ),
    Fault(
        "v-released-before-product",
        SM90,
        "wgmma_wait_0();\n                wgmma_touch(acc_o);\n                wgmma_touch_a(p_tile);\n"
        "                release_v();",
        "release_v(); wgmma_wait_0();",
        schedules=8,
    ),
    Fault("v-never-released", SM90, "mbarrier_arrive_if(barriers.v_empty(v_state.stage), leader);", ""),
    Fault(
        "every-lane-releases",
        SM90,
        "mbarrier_arrive_if(barriers.v_empty(v_state.stage), leader);",
        "mbarrier_arrive_if(barriers.v_empty(v_state.stage), true);",
    ),
    Fault(
        "skipped-block-not-held-together",
        SM90,
        "sync_warp();\n                release_k(leader);",
        "release_k(leader);",
        schedules=8,
    ),
    Fault(
        "k-empty-count-too-small",
        SM90,
        "mbarrier_init(k_empty(stage), kNumMmaWarps);",
        "mbarrier_init(k_empty(stage), kNumMmaWarps - 1);",
    ),
    Fault(
        "q-empty-count-too-large",
        SM90,
        "mbarrier_init(q_empty(stage), kNumMmaWarps);",
        "mbarrier_init(q_empty(stage), kNumMmaWarps + 1);",
    ),
    Fault(
        "expects-too-few-bytes",
        SM90,
        "mbarrier_arrive_expect_tx(full, kKvReadBytes);",
        "mbarrier_arrive_expect_tx(full, kKvReadBytes / 2);",
    ),
    Fault("last-panel-by-the-map-of-the-others", RAGGED, "maps.panel : maps.last_panel", "maps.panel : maps.panel"),
    Fault("last-panel-of-another-tensor", RAGGED, "{map_v, map_v_last}", "{map_v, map_k_last}"),
    Fault(
        "expects-too-many-bytes",
        SM90,
        "mbarrier_arrive_expect_tx(full, kQBytes);",
        "mbarrier_arrive_expect_tx(full, kQBytes + 16);",
    ),
    Fault("barriers-not-published-to-tma", SM90, "fence_mbarrier_init();\n    }", "}"),
    Fault("barriers-used-before-init", SM90, "sync_block();\n\n    if (warp < 4)", "if (warp < 4)", schedules=8),
    # SM90: proxies and stores
    Fault("no-proxy-fence", SM90, "fence_proxy_async();\n    sync_warp();", "sync_warp();"),
    Fault(
        "one-lane-fences",
        SM90,
        "fence_proxy_async();\n    sync_warp();",
        "if (elect_one()) {\n        fence_proxy_async();\n    }\n    sync_warp();",
    ),
    Fault(
        "store-before-warp-is-ready",
        SM90,
        "fence_proxy_async();\n    sync_warp();\n    if (elect_one()) {",
        "fence_proxy_async();\n    if (lane_id() == 0) {",
        schedules=8,
    ),
    Fault("store-still-reads-o", SM90, "tma_store_wait_read();\n        sync_warp();\n        stage_o", "stage_o"),
    Fault("store-not-committed", SM90, "        tma_store_commit();\n", ""),
    Fault("exit-before-store", SM90, "    tma_store_wait();\n", ""),
    Fault("counter-not-reset", SM90, "if (fetched == tiles - 1) {", "if (fetched == tiles) {"),
    # SM90: descriptors and addresses
    Fault("descriptor-stride", SM90, "kDescHi = 0x40000040u", "kDescHi = 0x40000080u"),
    Fault("descriptor-swizzle", SM90, "kDescHi = 0x40000040u", "kDescHi = 0x80000040u"),
    Fault("v-leading-offset", SM90, "kDescLoV = 0x02000000u", "kDescLoV = 0x01000000u"),
    Fault("k-step-inside-panel", SM90, "step % kStepsPerPanel * 32;", "step % kStepsPerPanel * 16;"),
    Fault(
        "k-step-across-panels",
        SM90,
        "uint32_t const panel = step / kStepsPerPanel;",
        "uint32_t const panel = 0 * step;",
    ),
    Fault("v-step", SM90, "step * 16 * kPanelRowBytes", "step * 8 * kPanelRowBytes"),
    Fault("s-not-cleared", SM90, "step != 0);", "1);"),
    Fault("o-not-swizzled", SM90, "(chunk ^ row_swizzle)", "(chunk ^ 0 * row_swizzle)"),
    Fault(
        "o-panels-swapped",
        SM90,
        "store_box(map_o, o_rows + panel * kOPanelBytes",
        "store_box(map_o, o_rows + (1 - panel) * kOPanelBytes",
    ),
    # SM90: coordinates, masks, numbers
    Fault("key-row-coordinate", SM90, "return {row, bidb};", "return {row + 1, bidb};", count=2),
    Fault("panel-coordinate", SM90, "panel * kPanelColumns, box, head", "0 * panel * kPanelColumns, box, head"),
    Fault(
        "query-batch-coordinate",
        SM90,
        "query_box(s, tile.m_block * kTileM, tile.bidb)",
        "query_box(s, tile.m_block * kTileM, 0)",
    ),
    Fault("kv-head", SM90, "tile.bidh / p.num_heads_per_kv;", "tile.bidh;"),
    Fault("o-row-coordinate", SM90, "query_box(s, row, tile.bidb)", "query_box(s, row + 1, tile.bidb)"),
    Fault("diagonal-off-by-one", SM90, "row + 1 + (s.k", "row + (s.k"),
    Fault("diagonal-off-by-one-up", SM90, "row + 1 + (s.k", "row + 2 + (s.k"),
    Fault("unmasked-blocks-off-by-one", SM90, "{0, 0, of_first / kTileN,", "{0, 0, of_first / kTileN + 1,"),
    Fault("mask-column", SM90, "min(columns % 8, 2);", "min(columns % 8, 1);"),
    Fault("no-guard-for-empty-rows", SM90, "new_max == -kInfinity ? 0.0f : new_max", "new_max"),
    Fault("no-rescale", SM90, "rescale_o(acc_o, correction);", ""),
    Fault("lse-predicate", SM90, "if (first + 8 < s.q) {", "if (first + 8 <= s.q) {"),
    Fault("registers-overcommitted", SM90, "machine::set_max_registers(240,", "machine::set_max_registers(248,"),
    # SM90, O in the place of Q
    Fault(
        "barrier-thread-count",
        ALIAS,
        "named_barrier_sync(kFirstMmaWarpgroup + warpgroup, 128);",
        "named_barrier_sync(kFirstMmaWarpgroup + warpgroup, 256);",
    ),
    Fault("q-loaded-over-o", ALIAS, "tma_store_wait_read();\n        release_q();", "release_q();"),
    Fault("q-never-released", ALIAS, "tma_store_wait_read();\n        release_q();", "tma_store_wait_read();"),
    # SM80: waiting for cp.async
    Fault(
        "no-wait-for-k",
        SINGLE,
        "cp_async_wait_0();\n        sync_block();\n        load_tile(v_tile",
        "sync_block();\n        load_tile(v_tile",
    ),
    Fault(
        "no-wait-for-v",
        SINGLE,
        "cp_async_wait_0();\n        sync_block();\n        if (more > 0)",
        "sync_block();\n        if (more > 0)",
    ),
    Fault(
        "no-barrier-for-k",
        SINGLE,
        "cp_async_wait_0();\n        sync_block();\n        load_tile(v_tile",
        "cp_async_wait_0();\n        load_tile(v_tile",
    ),
    Fault(
        "no-barrier-for-v",
        SINGLE,
        "cp_async_wait_0();\n        sync_block();\n        if (more > 0)",
        "cp_async_wait_0();\n        if (more > 0)",
    ),
    Fault(
        "v-not-committed",
        SINGLE,
        "kKvPanelBytes, v, lane, num_keys);\n        cp_async_commit();",
        "kKvPanelBytes, v, lane, num_keys);",
    ),
    Fault("wait-allows-one-more", RING, "machine::cp_async_wait(1, line);", "machine::cp_async_wait(2, line);"),
    Fault(
        "no-barrier",
        RING,
        "cp_async_wait_1();\n        sync_block();\n        if (more",
        "cp_async_wait_1();\n        if (more",
    ),
    Fault(
        "barrier-before-wait",
        RING,
        "cp_async_wait_1();\n        sync_block();\n        if (more",
        "sync_block();\n        cp_async_wait_1();\n        if (more",
        schedules=8,
    ),
    Fault("ring-too-short", RING, "(kNumStages - 1) * kStageBytes ? 0", "(kNumStages - 2) * kStageBytes ? 0"),
    Fault("ring-too-long", RING, "(kNumStages - 1) * kStageBytes ? 0", "kNumStages * kStageBytes ? 0"),
    Fault("last-block-not-loaded", RING, "if (more >= kNumStages - 1) {", "if (more >= kNumStages) {"),
    Fault(
        "empty-group-not-committed",
        RING,
        "        }\n        cp_async_commit();\n        return stages + read;",
        "            cp_async_commit();\n        }\n        return stages + read;",
    ),
    # SM80: addresses, predicates, numbers
    Fault("copy-not-swizzled", SINGLE, "((chunk ^ row_swizzle(row)) << 4))};", "(chunk << 4))};"),
    Fault("b-fragment-rows", SINGLE, "lane % 8 + lane / 16 * 8;", "lane % 8 + lane / 8 % 2 * 8;"),
    Fault("v-not-transposed", SINGLE, "ldmatrix_x4_trans(v, ", "ldmatrix_x4(v, "),
    Fault("k-step-inside-panel", SINGLE, "step % kStepsPerPanel * 32)", "step % kStepsPerPanel * 16)"),
    Fault(
        "k-step-across-panels", SINGLE, "step / kStepsPerPanel * panel_bytes", "step / kStepsPerPanel * panel_bytes / 2"
    ),
    Fault("v-step", SINGLE, "v_lane + step * 16 * kPanelRowBytes", "v_lane + step * 8 * kPanelRowBytes"),
    Fault("b-registers-swapped", SINGLE, "keys[0], keys[1]);", "keys[0], keys[2]);"),
    Fault("no-row-predicate", SINGLE, "< num_rows ? 16 : 0;", "< num_rows ? 16 : 16;"),
    Fault("stale-rows-not-finite", SINGLE, "cp_async_16(to + panel", "if (bytes != 0) cp_async_16(to + panel"),
    Fault("next-block-of-keys", SINGLE, "k.next -= kTileN * k.row_bytes;", ""),
    Fault("query-row-stride", SINGLE, "first_row + copy.row, bidh,", "first_row + copy.row + 1, bidh,"),
    Fault("kv-head", SINGLE, "bidh / p.num_heads_per_kv;", "bidh;"),
    Fault("no-store-predicate", SINGLE, "if (first_row + row < s.q) {", "if (true) {"),
    Fault("o-not-swizzled", SINGLE, "((lane_chunk ^ row_swizzle(row)) << 4)", "(lane_chunk << 4)"),
    Fault("store-before-warp-is-ready", SINGLE, "sync_warp();\n    store_o(", "store_o(", schedules=8),
    Fault("diagonal-off-by-one", SINGLE, "row + 1 + (s.k", "row + (s.k"),
    Fault("no-guard-for-empty-rows", SINGLE, "no_key = row_max[tile][row] == -kInfinity;", "no_key = false;"),
    Fault("no-rescale", SINGLE, "rescale_o(acc_o[i], correction[i]);", ""),
    # SM80: pairs of warps
    Fault(
        "pair-not-met", PAIRS, "    sync_pair(thread);\n    load_shared_float4", "    load_shared_float4", schedules=8
    ),
    Fault("pair-of-another-row", PAIRS, "1 + thread / kPairThreads, kPairThreads", "1, kPairThreads", schedules=8),
    Fault("own-maxima-twice", PAIRS, "places + (thread ^ 32) * 16", "places + thread * 16"),
    Fault("sums-of-one-warp", PAIRS, "row_sum[i / 2][i % 2] += others[i];", ""),
    Fault("p-not-left", PAIRS, "            leave_p(p_tile, recompute(thread));\n", ""),
    Fault("own-p-twice", PAIRS, "place_of_p(thread ^ 32)", "place_of_p(thread)"),
    Fault("keys-of-the-other-warp", PAIRS, "(thread / 32 % 2 ^ 1) * kWarpKeys", "thread / 32 % 2 * kWarpKeys"),
    Fault("s-of-the-first-keys", PAIRS, " + column_warp * kWarpKeys * kPanelRowBytes", ""),
    Fault("mask-of-the-first-keys", PAIRS, "n_block * kTileN + column_warp * kWarpKeys", "n_block * kTileN"),
    Fault(
        "columns-of-the-first-warp",
        PAIRS,
        "column_step(lane_offset_row_major(lane), column_warp, ",
        "column_step(lane_offset_row_major(lane), 0, ",
    ),
    Fault(
        "o-staged-by-the-first-warp", PAIRS, "lane % 4 * 4, column_warp, kQPanelBytes", "lane % 4 * 4, 0, kQPanelBytes"
    ),
    Fault(
        "store-before-pair-is-ready",
        PAIRS,
        "    sync_pair(thread);\n    int const stored",
        "    int const stored",
        schedules=8,
    ),
)

HARMLESS = (
    Fault("last-wait-is-for-reads", SM90, "    tma_store_wait();\n", "    tma_store_wait_read();\n"),
    Fault("waits-for-everything", SM90, "machine::wgmma_wait(1, line);", "machine::wgmma_wait(0, line);"),
    Fault("no-prefetch", SM90, "        tma_prefetch_map(map_v);\n", ""),
    Fault(
        "one-more-fence",
        SM90,
        "fence_proxy_async();\n    sync_warp();",
        "fence_proxy_async();\n    fence_proxy_async();\n    sync_warp();",
    ),
    Fault(
        "one-more-warp-barrier",
        SM90,
        "        Tile const tile = load_tile_slot",
        "        sync_warp();\n        Tile const tile = load_tile_slot",
    ),
    Fault("waits-for-everything", RING, "machine::cp_async_wait(1, line);", "machine::cp_async_wait(0, line);"),
    Fault(
        "one-more-barrier",
        SINGLE,
        "cp_async_wait_0();\n        sync_block();\n        load_tile(v_tile",
        "cp_async_wait_0();\n        sync_block();\n        sync_block();\n        load_tile(v_tile",
    ),
    Fault("no-swizzle", SINGLE, "constexpr int kSwizzleMask = 7;", "constexpr int kSwizzleMask = 0;"),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_seen(machine, fault):
    seen = (symptom(machine.run, fault, SHAPES, seed) for seed in range(fault.schedules))
    assert any(seen), f"not seen on {fault.schedules} schedules"


@pytest.mark.parametrize("change", HARMLESS, ids=str)
def test_harmless_change_passes(machine, change):
    for seed in range(2):
        assert symptom(machine.run, change, SHAPES, seed) == ""


def test_there_are_enough():
    ids = [str(fault) for fault in FAULTS]
    assert len(ids) == len(set(ids)) >= 40
    assert {fault.kernel for fault in FAULTS} == {SM90, RAGGED, ONE_Q, ALIAS, SINGLE, RING, PAIRS}

"""Deterministic gradients: the same bits whatever the schedule, and every mistake in keeping the order is seen."""

from __future__ import annotations

import itertools

import pytest
import torch

from fa2gen.cpu import KernelFault
from fa2gen.select import default_tiling
from fa2gen.spec import KernelSpec, Problem
from tests.cpu.faults import Fault, seeded
from tests.cpu.test_backward import MANY_BLOCKS, NO_KEYS, ONE, ONE_BLOCK, RAGGED, run

STAGED = "fa2_bwd_sm90_fp16_d64_det_m64_n64_s2_w4"  # dQ through shared memory, added by one thread
LAGGING = "fa2_bwd_sm90_bf16_d64_causal_det_m128_n128_s2_w8_l1"  # the same of each warpgroup's share, a step later
DIRECT = "fa2_bwd_sm90_fp16_d136_causal_det_m64_n64_s2_w8"  # dQ from registers, one thread gives the word

PASSING = "fa2_bwd_sm90_fp16_d168_causal_det_m64_n96_s2_w8"  # dQ from registers of both warpgroups
SM80 = "fa2_bwd_sm80_fp16_d72_det_m64_n64_s1_w4_z64"  # dQ from registers, by all threads between two barriers

# Six blocks of keys and more: enough orders of addition for one of them to round differently in fp16.
LONG = (1, 200, 400, 2, 1)


def defaults():
    turns = itertools.cycle((("bf16", "full"), ("fp16", "causal"), ("fp16", "full"), ("bf16", "causal")))
    for head_dim, (dtype, mask) in zip((8, 64, 80, 136, 256), turns, strict=False):
        problem = Problem(direction="bwd", head_dim=head_dim, dtype=dtype, mask=mask, deterministic=True)
        yield KernelSpec(problem=problem, tiling=default_tiling(problem, "sm90")).name


KERNELS = (
    STAGED,
    DIRECT,
    "fa2_bwd_sm90_fp16_d104_det_m80_n128_s2_w8",  # a warpgroup with warps that hold no dQ
    LAGGING,
    SM80,
    "fa2_bwd_sm80_bf16_d64_causal_det_m64_n128_s2_w8",
    *defaults(),
)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel(name):
    for sizes, seed in ((RAGGED, 0), (NO_KEYS, 1), (ONE, 0), (ONE_BLOCK, 2)):
        verdict, _ = run(name, sizes, seed=seed, with_dlse=sizes == RAGGED)
        assert verdict.ok, f"{sizes}, seed {seed}: {verdict}"


@pytest.mark.parametrize("name", KERNELS[:6])
def test_no_schedule_changes_a_bit(name):
    verdict, first = run(name, MANY_BLOCKS)
    assert verdict.ok, verdict
    for seed in range(1, 5):
        _, again = run(name, MANY_BLOCKS, seed=seed)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True)), f"seed {seed}"


def test_sanitizers_are_silent():
    verdict, _ = run(STAGED, RAGGED, sanitize=True)
    assert verdict.ok, verdict


# Seeded faults -------------------------------------------------------------------------------------------------------

ADD, FIRST = "bulk_store(destination, source, bytes);", "block.n_block == key_begin(p, s, walk.m_block * kTileM)"
WAIT, PASS = "wait_for_turn(turn, block.n_block);", "pass_turn(turn, block.n_block);"
FAULTS = (
    *(Fault(f"no-wait-for-the-turn-{i}", kernel, WAIT, "") for i, kernel in enumerate((STAGED, DIRECT))),
    Fault("turn-not-passed", STAGED, PASS, "", message="deadlock of 2 blocks"),
    Fault("turn-not-passed", DIRECT, PASS, "", message="deadlock of 2 blocks"),
    Fault(
        "passes-to-the-next-but-one",
        STAGED,
        "release(turn, n_block + 1);",
        "release(turn, n_block + 2);",
        message="deadlock",
    ),
    Fault(
        "waits-for-itself", STAGED, "wait_global(turn, n_block);", "wait_global(turn, n_block + 1);", message="deadlock"
    ),
    Fault(
        "waits-for-blocks-that-start-later",
        STAGED,
        WAIT,
        "wait_for_turn(turn, p.num_n_blocks - 1 - block.n_block);",
        message="deadlock of 2 blocks, of which no other starts before one ends",
    ),
    Fault(
        "turns-not-initialised",
        STAGED,
        "store_global_int(p.dq_turns + block.index, key_begin(p, s, m_block * kTileM) / kTileN);",
        "",
        message="deadlock",
    ),
    Fault(
        "turn-of-another-block",
        DIRECT,
        "p.dq_turns + walk.query_block;",
        "p.dq_turns;",
        message="deadlock",
    ),
    Fault("the-first-adds-to-what-was-there", STAGED, ADD, ADD.replace("store", "reduce_add")),
    Fault("the-second-stores", STAGED, f"if ({FIRST} / kTileN)", "if (block.n_block == 1)"),
    Fault("nothing-stored-is-no-zeros", LAGGING, "r[i] = are_sums ? r[i] : 0.0f;", ""),
    Fault("dq-of-another-round", LAGGING, "step / 3 & 1;", "step & 1;"),
    Fault("another-step-of-a-share", LAGGING, "3 * warpgroup + step % 3", "3 * warpgroup + 0", message="deadlock"),
    Fault("turn-of-the-other-share", LAGGING, "2 * walk.query_block + warpgroup;", "2 * walk.query_block;"),
    Fault(
        "passed-on-before-the-sums-are-complete",
        STAGED,
        "tma_store_wait();\n        pass_turn",
        "pass_turn",
        message="bulk copy of kernel.cc:",
    ),
    Fault(
        "no-proxy-fence",
        STAGED,
        "fence_proxy_async_global();\n        float",
        "float",
        message="fence.proxy.async.global",
    ),
    Fault(
        "dq-not-published",
        STAGED,
        "    }\n    fence_proxy_async();\n    sync_warp();\n    mbarrier_arrive_if(full",
        "    }\n    sync_warp();\n    mbarrier_arrive_if(full",
        message="has no fence.proxy.async behind it",
    ),
    Fault("dq-added-before-it-is-there", STAGED, "mbarrier_wait(barriers.dq_full(), phase);", ""),
    Fault("dq-overwritten", STAGED, "mbarrier_wait(empty, phase ^ 1);", ""),
    Fault("place-given-back-before-it-is-read", STAGED, "tma_store_wait_read();\n        mbarrier", "mbarrier"),
    Fault("place-never-given-back", STAGED, "mbarrier_arrive(barriers.dq_empty());", "", message="deadlock"),
    Fault("added-before-the-turn", DIRECT, "mbarrier_wait(barriers.dq_turn(), dq_phase);", ""),
    Fault("passed-on-before-it-is-added", DIRECT, "mbarrier_wait(barriers.dq_added(), phase);", ""),
    Fault("added-before-the-turn", PASSING, "mbarrier_wait(barriers.dq_turn(), parity);", "", count=2),
    Fault("additions-not-told", DIRECT, "mbarrier_arrive_if(barriers.dq_added(), leader);", "", message="deadlock"),
    Fault(
        "next-head-begins-elsewhere",
        DIRECT,
        "skipped = p.num_m_blocks + (blocks.end - blocks.begin);",
        "skipped = blocks.end - blocks.begin;",
    ),
    Fault("no-wait-for-the-turn", SM80, "wait_for_turn(p.dq_turns + query_block, n_block);", ""),
    Fault(
        "turn-not-passed",
        SM80,
        "pass_turn(p.dq_turns + recompute(query_block), recompute(n_block));",
        "",
        message="deadlock of 2 blocks",
    ),
    Fault("turn-of-another-block", SM80, "wait_for_turn(p.dq_turns + query_block, ", "wait_for_turn(p.dq_turns + 1, "),
    Fault("others-add-before-the-turn", SM80, "    sync_block();\n    add_dq(", "    add_dq("),
    Fault("passed-on-before-others-have-added", SM80, "column_warp);\n    sync_block();", "column_warp);"),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_seen(fault):
    wrong = seeded(fault)
    sizes = NO_KEYS if fault.kernel == LAGGING else LONG
    dq = None
    for seed in range(1, 25):
        try:
            verdict, (again, *_) = run(fault.kernel, sizes, rendered=wrong, seed=seed, time_limit=20.0)
        except KernelFault as error:
            assert fault.message in str(error)
            return
        dq = again if dq is None else dq
        if not (verdict.ok and torch.equal(again, dq)):
            assert not fault.message, f"seen by its result, not by {fault.message!r}"
            return
    pytest.fail("not seen on 24 schedules")

"""Programmatic dependent launch: a kernel that may start early waits before it uses what the one before wrote."""

from __future__ import annotations

import re

import pytest

from fa2gen.cpu import KernelFault
from fa2gen.plan import make_plan
from fa2gen.render import render
from fa2gen.spec import KernelSpec
from tests.cpu.faults import Fault, seeded
from tests.cpu.test_backward import RAGGED, run

STAGED = "fa2_bwd_sm90_bf16_d64_m64_n64_s2_w4"  # one thread adds dQ
TURNS = "fa2_bwd_sm90_fp16_d64_det_m64_n64_s2_w4"  # and waits for its turn first
DIRECT = "fa2_bwd_sm90_fp16_d136_causal_m64_n64_s2_w8"  # the mma warps add dQ

WAIT = "griddepcontrol_wait();"
PRODUCER = f"{WAIT}  // the preprocess kernel"
WRITER = f"{WAIT}\n            write_dq"
CONSUMER = f"{WAIT}  // here in every block"

FAULTS = (
    Fault("producer", STAGED, PRODUCER, "//", message="loads lse_log2, which the grid before writes"),
    Fault("writer", STAGED, WRITER, "write_dq", message="reads dq_sums, which the grid before writes"),
    Fault("turns", TURNS, WRITER, "write_dq", message="reads dq_turns, which the grid before writes"),
    Fault("mma-warps", DIRECT, CONSUMER, "//", message="writes dq_acc, which the grid before writes"),
    Fault(
        "one-lane",
        DIRECT,
        CONSUMER,
        f"if (elect_one()) {WAIT}  //",
        message="writes dq_acc, which the grid before writes",
    ),
    Fault(
        "postprocess",
        STAGED,
        f"lane_id() * 4;\n    {WAIT}",
        "lane_id() * 4;",
        message="reads dq_sums, which the grid before",
    ),
    Fault(
        "no-thread",
        STAGED,
        "if (warp < 4) {",
        "if (blockIdx.x == 1) return;\n    if (warp < 4) {",
        message="ends with no",
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_missing_wait_is_seen(fault):
    with pytest.raises(KernelFault, match=fault.message):
        run(fault.kernel, RAGGED, rendered=seeded(fault))


def test_a_main_kernel_that_finds_its_blocks_early_starts_behind_their_list():
    """It does not wait for the kernel that lists them: the one between has, in each thread that lets it start."""
    plan = make_plan(KernelSpec.from_name("fa2_bwd_sm90_bf16_d128_causal_varlen_m64_n128_s2_w8_l1"))
    text = render(plan).source
    statistics = text[text.index("start_main_kernel() {") : text.index(f" {plan.name}(")]
    before = re.findall(r"(.*)\n *griddepcontrol_launch_dependents\(\)", statistics)
    assert plan.finds_block_early and before == [f"    {WAIT}"]


def test_plain_launches_need_no_wait(monkeypatch):
    monkeypatch.setattr("fa2gen.plan.sm90_bwd.STARTS_EARLY", False)
    verdict, _ = run(STAGED, RAGGED, rendered=seeded(FAULTS[0]))
    assert verdict.ok, verdict

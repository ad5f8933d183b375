"""Shared memory as plans declare it: offsets without gaps, the C++ constants of those, and how it reads."""

from __future__ import annotations

import itertools
import re

import pytest

from fa2gen.errors import InfeasibleSpec
from fa2gen.plan import make_plan
from fa2gen.plan.memory import Region, SharedMemory, Stages
from fa2gen.render import render
from fa2gen.select import default_tiling
from fa2gen.spec import KernelSpec, Problem

STAGED = SharedMemory(
    (
        Region("k", 100, label="K"),
        Region("o", 40, label="O", in_place_of="k"),
        Region("q", 50, stages=2, label="Q"),
        Stages(3, (Region("dout", 10, label="dO"), Region("lse", 4, label="LSE"))),
        Region("tile_slots", 16),
    )
)


def test_regions_follow_each_other():
    assert STAGED.offsets == {
        "k": 0,
        "o": 0,
        "q": 100,
        "stages": 200,
        "dout": 200,
        "lse": 210,
        "tile_slots": 242,
    }
    assert STAGED.in_stage == {"dout": 0, "lse": 10} and STAGED.bytes == 258


def test_how_it_reads():
    assert STAGED.text == "K 100 + 2 x Q 50 + 3 stages x (dO 10 + LSE 4) + tile slots 16"
    assert STAGED.spans == (
        ("K, then O", 0, 100),
        ("2 stages of Q", 100, 100),
        ("3 stages of dO, LSE", 200, 42),
        ("tile slots", 242, 16),
    )


def test_its_constants():
    constants = list(STAGED.constants)
    assert "constexpr uint32_t kSmemTileSlots = 242;" in constants
    assert "constexpr uint32_t kSmemO = 0;  // takes the place of K" in constants
    assert "constexpr uint32_t kStageLse = 10;" in constants and "constexpr uint32_t kSmemStages = 200;" in constants


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_plans_map_all_their_memory(arch, direction):
    for head_dim in (8, 40, 64, 80, 128, 144, 256):
        problem = Problem(direction=direction, head_dim=head_dim)
        plan = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, arch)))
        spans = plan.memory.spans
        ends = itertools.accumulate((span.bytes for span in spans), initial=0)
        assert [span.offset for span in spans] == list(ends)[:-1] and all(span.bytes > 0 for span in spans)
        assert sum(span.bytes for span in spans) == plan.shared_memory_bytes
        # A kernel has the constants that it uses, each as the plan says.
        found = dict(
            re.findall(r"^constexpr uint32_t (kSmem\w+|kStage(?!Bytes)\w+) = (\d+);", render(plan).source, re.M)
        )
        said = dict(re.findall(r"uint32_t (\w+) = (\d+);", "\n".join(plan.memory.constants)))
        assert found and found.items() <= said.items()


def test_a_refusal_says_all_of_it():
    """What it adds up to is what is needed."""
    spec = KernelSpec.from_name("fa2_bwd_sm80_bf16_d256_m128_n128_s2_w8")
    with pytest.raises(InfeasibleSpec) as caught:
        make_plan(spec)
    found = re.search(r"shared memory +([\d,]+) B needed \((.*)\), [\d,]+ B available", str(caught.value))
    assert found
    needed, parts = found.groups()
    total = eval(re.sub(r"\bx\b", "*", re.sub(r"stages|[A-Za-z]{2,}|\b[A-Z]\b|,", "", parts)))
    assert total == int(needed.replace(",", ""))

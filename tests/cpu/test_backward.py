"""Every backward kernel computes the gradients, by the project's rule, whatever the schedule."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from fa2gen.cli import app
from fa2gen.cpu import RunOptions, build_library, run_kernel
from fa2gen.features import examples_of
from fa2gen.plan import make_plan
from fa2gen.plan.sm90_bwd import FIRST_ROWS
from fa2gen.reference import attention_reference, check_gradients
from fa2gen.select import default_tiling
from fa2gen.spec import KernelSpec, Problem
from tests.cpu.guard import DTYPES, NAN, amid_nan, assert_guard_is_intact

# (batch, seqlen_q, seqlen_k, heads, heads_kv)
RAGGED = (2, 113, 203, 2, 1)
NO_KEYS = (1, 203, 60, 4, 2)  # causal: the first 143 rows see no key
ONE_BLOCK = (1, 60, 300, 2, 2)  # one ragged block of queries, and ragged keys
ONE = (1, 1, 1, 1, 1)
MANY_BLOCKS = (2, 200, 330, 2, 1)
SOME_BLOCKS = (1, 140, 200, 2, 1)  # of two heads; the CPU takes ten times as long for an SM80 kernel

# Splits, stages and warps that no default may use.
TILINGS = (
    "fa2_bwd_sm90_bf16_d128_m80_n128_s2_w8",
    "fa2_bwd_sm90_bf16_d128_causal_m80_n128_s2_w8",
    "fa2_bwd_sm90_fp16_d128_causal_m64_n128_s3_w8",
    "fa2_bwd_sm90_bf16_d64_causal_m128_n128_s2_w8_l1",
    "fa2_bwd_sm90_fp16_d128_m64_n128_s2_w8_l1",
    "fa2_bwd_sm90_fp16_d64_causal_m64_n64_s4_w4",
    "fa2_bwd_sm90_bf16_d64_m64_n64_s2_w8",
    "fa2_bwd_sm90_bf16_d40_causal_m80_n128_s2_w8",
    "fa2_bwd_sm90_bf16_d72_causal_m64_n64_s3_w8",
    "fa2_bwd_sm90_fp16_d104_m80_n128_s2_w8",
    "fa2_bwd_sm90_bf16_d144_causal_m64_n64_s2_w8",
    "fa2_bwd_sm90_bf16_d168_m64_n64_s2_w8",
    "fa2_bwd_sm90_bf16_d168_m64_n96_s2_w8",
    "fa2_bwd_sm90_fp16_d248_causal_m64_n80_s2_w8",
    "fa2_bwd_sm90_bf16_d96_causal_m64_n128_s2_w8_l1_t1",
    "fa2_bwd_sm90_fp16_d64_causal_m128_n128_s2_w8_l1_t1",
)
ONE_STAGE = ("fa2_bwd_sm90_fp16_d80_causal_m112_n128_s1_w8", "fa2_bwd_sm90_bf16_d136_causal_m64_n64_s1_w8")
# One stage and two, 16 and 32 keys a warp, one to eight peers, 16 and 32 rows of dQ a warp, all widths of panels, and
# columns that the warps share unevenly.
SM80_TILINGS = (
    "fa2_bwd_sm80_bf16_d128_causal_m64_n128_s2_w8",
    "fa2_bwd_sm80_bf16_d64_m128_n128_s2_w8",
    "fa2_bwd_sm80_fp16_d256_causal_m64_n64_s1_w8",
    "fa2_bwd_sm80_fp16_d72_causal_m64_n128_s1_w8_z64",
    "fa2_bwd_sm80_bf16_d40_m128_n64_s2_w4",
    "fa2_bwd_sm80_bf16_d32_causal_m64_n128_s2_w4_z64",
    "fa2_bwd_sm80_fp16_d8_m128_n32_s2_w8_z32",
    "fa2_bwd_sm80_bf16_d200_m32_n64_s1_w8_z64",
    "fa2_bwd_sm80_bf16_d248_causal_m32_n32_s1_w4",
    "fa2_bwd_sm80_bf16_d64_m32_n128_s2_w4",
    "fa2_bwd_sm80_fp16_d128_m64_n128_s2_w8",
)
ALL_TILINGS = (*TILINGS, *SM80_TILINGS)


def every_default():
    """Of every head dim, with one of the masks each; of the other mask on the other architecture."""
    for arch, first in (("sm90", 1), ("sm80", 0)):
        for number, head_dim in enumerate(range(8, 257, 8), first):
            mask, dtype = ("causal", "full")[number % 2], ("bf16", "bf16", "fp16", "fp16")[number % 4]
            problem = Problem(direction="bwd", head_dim=head_dim, dtype=dtype, mask=mask)
            yield KernelSpec(problem=problem, tiling=default_tiling(problem, arch)).name


def run(name, sizes, *, with_dlse=False, gain=1.0, options=None, rendered=None, change=None, **how):
    """(verdict, gradients); `options` default to the first of the problem's examples, others are RunOptions's.

    change  what to do with the tensors, by name, before the kernel has them; the verdict is of what they were.
    """
    plan = make_plan(KernelSpec.from_name(name))
    batch, seqlen_q, seqlen_k, heads, heads_kv = sizes
    generator = torch.Generator().manual_seed(plan.head_dim)

    def random(seqlen, heads):
        values = torch.randn(batch, seqlen, heads, plan.head_dim, generator=generator)
        return amid_nan((gain * values).to(DTYPES[plan.dtype]))

    q, k, v = random(seqlen_q, heads), random(seqlen_k, heads_kv), random(seqlen_k, heads_kv)
    dout = random(seqlen_q, heads)
    dlse = torch.randn(batch, heads, seqlen_q, generator=generator) if with_dlse else None
    options = options or examples_of(plan.problem)[0]
    said = options._asdict()
    out, lse = attention_reference(q, k, v, **said)
    gradients = tuple(amid_nan(torch.full_like(x, NAN)) for x in (q, k, v))
    tensors = {"q": q, "k": k, "v": v, "o": amid_nan(out), "dout": dout, "lse": lse.contiguous(), "dlse": dlse}
    tensors |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    if change is not None:
        tensors |= {name: tensors[name].clone() for name in ("q", "k", "v", "o", "dout")}
        change(tensors)
    run_kernel(plan, tensors, options, run_options=RunOptions(**how), rendered=rendered)
    for x in gradients:
        assert_guard_is_intact(x)
    verdict = check_gradients(gradients, dout, q, k, v, dlse=dlse, **said)
    return verdict, gradients


def kernels():
    """The tilings above, and the defaults; most of those are marked slow: together they take two minutes."""
    quick = [
        name
        for name in every_default()
        if name.split("_")[4] in ("d8", "d64", "d72", "d128", "d136", "d160", "d200", "d256")
    ]
    # Of each other head dim one family's, in turns of two, as masks go by ones.
    rest = [name for number, name in enumerate(every_default()) if number // 2 % 2 == number // 32]
    rest = [name for name in rest if name not in {*quick, *ALL_TILINGS}]
    return [
        *dict.fromkeys((*ALL_TILINGS, *ONE_STAGE, *quick)),
        *(pytest.param(name, marks=pytest.mark.slow) for name in rest),
    ]


@pytest.mark.parametrize("name", kernels())
def test_every_kernel(name):
    """With one batch entry where other tests of SM80 have two, and with rows without keys where a mask can hide all.

    Of one key, whose weight is 1 and has no slope, dQ and dK are 0 but for roundings of fp32.
    """
    ragged = (1, *RAGGED[1:]) if "sm80" in name and name not in SM80_TILINGS else RAGGED
    for sizes, seed in ((ragged, 0), *(((NO_KEYS, 1),) if "causal" in name else ()), (ONE, 0)):
        verdict, (dq, dk, _) = run(name, sizes, seed=seed, with_dlse=sizes == ragged)
        assert verdict.ok, f"{sizes}, seed {seed}: {verdict}"
    assert max(dq.abs().max(), dk.abs().max()) < 1e-4


@pytest.mark.parametrize("rows", [FIRST_ROWS, FIRST_ROWS + 1])
def test_sums_of_dq_begin_with_what_is_stored_or_with_zeros(rows):
    """By how many rows there are. Two blocks of keys at a time: either comes first."""
    verdict, _ = run("fa2_bwd_sm90_bf16_d64_m64_n64_s2_w4", (1, rows, 130, 1, 1), seed=1)
    assert verdict.ok, verdict


@pytest.mark.parametrize("name", ALL_TILINGS)
def test_other_shapes(name):
    """dLSE of rows that see no key too, whose LSE says so and adds nothing."""
    large = SOME_BLOCKS if name in SM80_TILINGS else MANY_BLOCKS
    for sizes in (large, ONE_BLOCK, (1, 1, 300, 3, 1), (1, 300, 1, 2, 1)):
        verdict, _ = run(name, sizes, with_dlse=sizes[1] == 300, num_sms=2)  # which take one block after the other
        assert verdict.ok, f"{sizes}: {verdict}"


@pytest.mark.parametrize("name", (*TILINGS[:6], SM80_TILINGS[1]))
def test_scales_and_magnitudes(name):
    """Scores of hundreds: without its mask a key that does not exist would get an infinite probability."""
    for gain, scale in ((8.0, None), (1.0, 0.5), (1.0, 1e-3)):
        options = examples_of(KernelSpec.from_name(name).problem)[0]._replace(softmax_scale=scale)
        verdict, _ = run(name, RAGGED, gain=gain, options=options)
        assert verdict.ok, f"gain {gain}, scale {scale}: {verdict}"


@pytest.mark.parametrize("name", (*TILINGS[1::2], SM80_TILINGS[0], SM80_TILINGS[5]))
def test_no_schedule_changes_dk_and_dv(name):
    """Bit for bit; dQ is a sum over blocks of keys in the order in which they come, so it may differ by a rounding."""
    verdict, (_, dk, dv) = run(name, SOME_BLOCKS)
    assert verdict.ok, verdict
    for seed in range(1, 5):
        verdict, (_, dk_again, dv_again) = run(name, SOME_BLOCKS, seed=seed)
        assert verdict.ok, f"seed {seed}: {verdict}"
        assert torch.equal(dk_again, dk) and torch.equal(dv_again, dv), f"seed {seed}"


@pytest.mark.parametrize("name", (TILINGS[3], SM80_TILINGS[6]))  # others with a window: test_window_backward
def test_sanitizers_are_silent(name):
    for sizes in (SOME_BLOCKS,) if name in SM80_TILINGS else (RAGGED, NO_KEYS):
        verdict, _ = run(name, sizes, sanitize=True)
        assert verdict.ok, verdict


def test_verify_counts_what_moves():
    """The command, with a kernel of each pass: the five products read more than the two do."""
    moved = {}
    for direction in ("fwd", "bwd"):
        name = f"fa2_{direction}_sm90_bf16_d64_m128_n128_s2_w8"
        done = CliRunner().invoke(app, ["verify", name, "--on", "cpu", "--stats", "--json"])
        assert done.exit_code == 0, done.output
        moved[direction] = [row["counts"]["wgmma"]["bytes"] for row in json.loads(done.stdout)]
        table = CliRunner().invoke(app, ["verify", name, "--on", "cpu", "--stats"]).stdout
        assert f"{name}, 1 x 113 x 203, heads 2:1" in table and "wavefronts" in table
    assert all(b > 1.5 * f for f, b in zip(moved["fwd"], moved["bwd"], strict=True))


@pytest.mark.parametrize("name", ALL_TILINGS)
def test_compiles_without_a_warning(name):
    warnings = build_library(make_plan(KernelSpec.from_name(name))).path.with_name("warnings.txt")
    assert warnings.read_text() == ""

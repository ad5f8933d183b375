"""Every forward kernel computes attention, by the project's rule, whatever the schedule."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch

from fa2gen.catalog import catalogue
from fa2gen.cpu import KernelFault, build, build_library
from fa2gen.features import examples_of
from fa2gen.plan import make_plan
from fa2gen.render import Rendered, render
from fa2gen.select import default_tiling
from fa2gen.spec import KernelSpec, Problem
from fa2gen.testing import run_on_cpu

ARCHES = ("sm80", "sm90")
HEAD_DIMS = range(8, 257, 8)

# (batch, seqlen_q, seqlen_k, heads, heads_kv)
RAGGED = (2, 113, 203, 2, 1)
NO_KEYS = (1, 203, 60, 4, 2)  # causal: the first 143 rows see no key, and with 128-row tiles the first tile sees none
ONE = (1, 1, 1, 1, 1)
MANY_TILES = (2, 260, 390, 2, 1)

# Swizzles, panels, stages and warps that no default may use.
TILINGS = (
    "fa2_fwd_sm80_bf16_d128_causal_m64_n64_s1_w4",
    "fa2_fwd_sm80_fp16_d64_m128_n48_s2_w4_z64",
    "fa2_fwd_sm80_bf16_d48_causal_m64_n32_s3_w4_z32",
    "fa2_fwd_sm80_bf16_d64_causal_m128_n64_s4_w8",
    "fa2_fwd_sm90_bf16_d128_causal_m128_n128_s2_w8",
    "fa2_fwd_sm90_fp16_d64_m192_n128_s3_w12",
    "fa2_fwd_sm90_bf16_d64_causal_m64_n176_s2_w4",
    "fa2_fwd_sm90_bf16_d96_causal_m128_n80_s2_w8_z64",
    "fa2_fwd_sm90_fp16_d40_m128_n96_s3_w8_z32",
    "fa2_fwd_sm90_bf16_d256_causal_m128_n64_s2_w8",
)


def kernels():
    """Each family and head dim with the tilings that specs/ names for it; of other head dims one family's default, in
    turns. Where full and causal masks share a tiling, they take turns from one head dim to the next, as dtypes do."""
    written = collections.defaultdict(dict)
    for spec in (spec for spec in catalogue() if spec.problem.direction == "fwd"):
        if not spec.problem.varlen and spec.problem.mask != "window":
            of_head_dim = written[spec.tiling.arch, spec.problem.head_dim]
            of_head_dim.setdefault(spec.tiling, {})[spec.problem.mask] = None
    dtypes = itertools.cycle(("bf16", "fp16", "fp16", "bf16"))
    names = dict.fromkeys(TILINGS)
    for arch, (turn, head_dim) in itertools.product(ARCHES, enumerate(HEAD_DIMS)):
        both = dict.fromkeys(("full", "causal"))
        tilings = written[arch, head_dim]
        if not tilings and (arch == "sm80") == (turn // 2 % 2 == 0):  # by twos, as masks go by ones
            tilings = {default_tiling(Problem(head_dim=head_dim), arch): both}
        for tiling, masks in tilings.items():
            problem = Problem(head_dim=head_dim, dtype=next(dtypes), mask=[*masks][turn % len(masks)])
            names[KernelSpec(problem=problem, tiling=tiling).name] = None
    return tuple(names)


@pytest.mark.parametrize("name", kernels())
def test_every_kernel(machine, name):
    for sizes, seed in ((RAGGED, 0), (NO_KEYS, 1), (ONE, 0)):
        verdict, *_ = machine.run(name, sizes, seed=seed)
        assert verdict.ok, f"{sizes}, seed {seed}: {verdict}"


@pytest.mark.parametrize("name", TILINGS)
def test_no_schedule_changes_the_result(machine, name):
    """Bit for bit: neither the order of warps nor that of copies is in the arithmetic."""
    verdict, _, out, lse = machine.run(name, MANY_TILES)
    assert verdict.ok, verdict
    for seed in range(1, 6):
        _, _, again, lse_again = machine.run(name, MANY_TILES, seed=seed, num_sms=2 + seed % 4)
        assert torch.equal(again, out) and torch.equal(lse_again, lse), f"seed {seed}"


@pytest.mark.parametrize("name", (TILINGS[0], TILINGS[4], TILINGS[7]))
def test_sanitizers_are_silent(machine, name):
    for sizes in (RAGGED, NO_KEYS):
        verdict, *_ = machine.run(name, sizes, sanitize=True)
        assert verdict.ok, verdict


def test_a_sanitizer_names_the_template_line(machine):
    """One register too many is cleared: nothing that the machine could see, since registers are the compiler's."""
    name = TILINGS[4]
    rendered = render(make_plan(KernelSpec.from_name(name)), target="cpu")
    wrong = Rendered(rendered.source.replace("i < kNumAccO; ++i", "i <= kNumAccO; ++i"), rendered.origins)
    assert wrong.source != rendered.source
    with pytest.raises(
        KernelFault, match=r"(?s)(AddressSanitizer|runtime error).*kernel\.cc:\d+ \[sm90/fwd\.cu\.j2:\d+\]"
    ):
        machine.run(name, ONE, rendered=wrong, sanitize=True)


def test_fibers_without_a_switch_of_their_own(machine, monkeypatch):
    """The way of other processors than x86-64: slower, and the same bits."""
    _, _, out, lse = machine.run(TILINGS[4], RAGGED)
    monkeypatch.setattr(build, "_FAST", (*build._FAST, "-DFA2GEN_UCONTEXT"))
    _, _, again, lse_again = machine.run(TILINGS[4], RAGGED)
    assert torch.equal(again, out) and torch.equal(lse_again, lse)


@pytest.mark.parametrize("name", TILINGS)
def test_compiles_without_a_warning(name):
    warnings = build_library(make_plan(KernelSpec.from_name(name))).path.with_name("warnings.txt")
    assert warnings.read_text() == ""


@pytest.mark.parametrize("name", (TILINGS[0], TILINGS[4]))
def test_a_long_head(machine, name):
    """1024 x 1024, causal, head dim 128: more tiles and blocks than stages, many times over."""
    verdict, *_ = machine.run(name, (1, 1024, 1024, 1, 1))
    assert verdict.ok


def test_numpy_memory(machine):
    """The bits of bf16 in numpy's uint16, with the same result as torch's tensors."""
    name = TILINGS[0]
    _, _, out, lse = machine.run(name, ONE)
    generator = torch.Generator().manual_seed(128)
    q, k, v = (torch.randn(1, 1, 1, 128, generator=generator).bfloat16() for _ in range(3))
    arrays = (x.view(torch.int16).numpy().view("uint16") for x in (q, k, v))
    spec = KernelSpec.from_name(name)
    out_array, lse_array, _ = run_on_cpu(spec, *arrays, examples_of(spec.problem)[0])
    assert torch.equal(torch.from_numpy(out_array.view("int16")), out.view(torch.int16))
    assert torch.equal(torch.from_numpy(lse_array), lse)


@pytest.mark.parametrize(
    "name", ["fa2_fwd_sm80_bf16_d16_m128_n64_s2_w4_z32", "fa2_fwd_sm90_bf16_d16_m128_n128_s2_w8_z32"]
)
def test_lse_of_a_long_row(machine, name):
    """An error made in each block, always the same way, shows in a long row: a correction of 1 + 1e-7 once did."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, seqlen, 1, 16).bfloat16() for seqlen in (16, 32768, 32768))
    _, lse, _ = run_on_cpu(KernelSpec.from_name(name), q, k, v)
    scores = q[0, :, 0].double() @ k[0, :, 0].double().T * 16**-0.5
    assert (lse[0, 0].double() - scores.logsumexp(-1)).abs().max() < 1e-5

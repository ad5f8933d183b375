"""Windows and chunks, forward: every limit by its definition, at edges of blocks, and what hidden keys can not do."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from fa2gen.features import key_range
from fa2gen.options import Options
from fa2gen.select import best_spec
from fa2gen.spec import KernelSpec, Problem
from fa2gen.testing import run_on_cpu
from tests.cpu.faults import Fault, symptom
from tests.cpu.guard import DTYPES

ARCHES = ("sm80", "sm90")

# (batch, seqlen_q, seqlen_k, heads, heads_kv): the last two have shared heads; rows without keys, and keys without rows
SIZES = ((1, 1, 1, 1, 1), (1, 1, 203, 2, 1), (2, 113, 203, 2, 1), (1, 203, 113, 4, 2))
MANY_BLOCKS = (1, 300, 640, 2, 2)
WINDOWS = ((0, 0), (-1, 0), (16, 0), (128, 0), (64, 32), (0, 17), (-1, 5), (1000, 3), (1000, 1000))
CHUNKS = (0, 48, 128)


def kernel(arch: str, head_dim: int, dtype: str = "bf16", mask: str = "window") -> KernelSpec:
    return best_spec(Problem(head_dim=head_dim, dtype=dtype, mask=mask), arch)


def each_option() -> list[Options]:
    """Every window with every chunk; those without an end on the right are causal too."""
    found = [Options(window_left=a, window_right=b, chunk=c) for (a, b), c in itertools.product(WINDOWS, CHUNKS)]
    return [*found, *(Options(causal=True, window_left=a, chunk=c) for a in (-1, 0, 63, 64, 65) for c in CHUNKS)]


@pytest.mark.parametrize(
    ("options", "arch"),
    [*zip(each_option(), itertools.cycle(ARCHES), strict=False)],  # the intervals are one text for both
    ids=lambda x: x if isinstance(x, str) else f"{x.window_left},{x.window_right},{x.causal:d},{x.chunk}",
)
def test_every_limit(machine, options, arch):
    """Also those that other kernels serve: what the window kernel computes does not depend on who asks."""
    for sizes in (*SIZES, MANY_BLOCKS):
        verdict, *_ = machine.run(kernel(arch, 64).name, sizes, options)
        assert verdict.ok, f"{sizes}: {verdict}"


@pytest.mark.parametrize(
    "name", [kernel(a, d, t).name for a in ARCHES for d in (64, 80, 128, 192, 256) for t in DTYPES]
)
def test_every_kernel(machine, name):
    for seed, options in enumerate((Options(window_left=100, window_right=40), Options(causal=True, window_left=64))):
        verdict, *_ = machine.run(name, SIZES[2 + seed], options, seed=seed)
        assert verdict.ok, verdict


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("options", [Options(), Options(causal=True)], ids=["full", "causal"])
def test_a_window_that_hides_nothing_gives_the_bits_of_the_plain_kernel(machine, arch, options):
    plain = kernel(arch, 128, mask=options.mask)
    window = KernelSpec(problem=plain.problem.model_copy(update={"mask": "window"}), tiling=plain.tiling)
    for sizes in (*SIZES, MANY_BLOCKS):
        _, _, out, lse = machine.run(plain.name, sizes, options)
        _, _, again, lse_again = machine.run(window.name, sizes, options)
        assert torch.equal(again, out) and torch.equal(lse_again, lse), sizes


@pytest.mark.parametrize("arch", ARCHES)
def test_no_schedule_changes_the_result(machine, arch):
    options = Options(window_left=100, window_right=70)
    _, _, out, lse = machine.run(kernel(arch, 64).name, MANY_BLOCKS, options)
    for seed in range(1, 5):
        verdict, _, again, lse_again = machine.run(
            kernel(arch, 64).name, MANY_BLOCKS, options, seed=seed, num_sms=2 + seed
        )
        assert verdict.ok and torch.equal(again, out) and torch.equal(lse_again, lse), f"seed {seed}"


@pytest.mark.parametrize("options", [Options(window_left=16, window_right=0), Options(causal=True, chunk=128)], ids=str)
def test_sanitizers_are_silent(machine, options):
    for sizes in (SIZES[3], MANY_BLOCKS):
        verdict, *_ = machine.run(kernel("sm90", 128).name, sizes, options, sanitize=True)
        assert verdict.ok, verdict


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    "options",
    [Options(causal=True, window_left=60), Options(window_left=30, window_right=0), Options(chunk=256)],
    ids=str,
)
def test_nan_behind_the_window_does_not_leak(arch, options):
    """A hidden K may be anything. So may a hidden V in blocks of keys that no row of a tile sees: they are never read.
    In a block that some row sees, V must be finite, as under a causal mask: a P of 0 times NaN is NaN."""
    spec = kernel(arch, 64)
    step, seqlen_q, seqlen_k = spec.tiling.tile_n, 40, 6 * spec.tiling.tile_n
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 64).bfloat16() for n in (seqlen_q, seqlen_k, seqlen_k))
    out, lse, _ = run_on_cpu(spec, q, k, v, options)
    ranges = [key_range(options, seqlen_q, seqlen_k, row) for row in range(seqlen_q)]
    first, end = min(r[0] for r in ranges), max(r[1] for r in ranges)
    assert first >= step, "some blocks are hidden"
    k[:, :first] = v[:, : first // step * step] = torch.nan
    k[:, end:] = v[:, -(-end // step) * step :] = torch.nan
    again, lse_again, _ = run_on_cpu(spec, q, k, v, options)
    assert torch.equal(again, out) and torch.equal(lse_again, lse)


# Seeded faults --------------------------------------------------------------------------------------------------------

SM90 = "fa2_fwd_sm90_bf16_d128_window_m128_n64_s2_w8"
SINGLE = "fa2_fwd_sm80_bf16_d128_window_m64_n64_s1_w4"

SKIP_LEFT = "        skip(blocks.begin - in_tile.begin);\n"
FAULTS = (
    Fault("left-edge-off-by-one", SM90, "max(d - p.window_left, 0);", "max(d - p.window_left + 1, 0);"),
    Fault("right-edge-off-by-one", SM90, "min(d, s.k - 1 - p.window_right) + 1", "min(d, s.k - 1 - p.window_right)"),
    Fault("left-blocks-not-masked", SM90, "max(begin_full, begin), max(end", "begin, max(end"),
    Fault("right-blocks-not-masked", SM90, "max(end_full, begin), end};", "end, end};"),
    Fault("first-block-masked-at-the-right-alone", SM90, " || n_block < blocks.begin_full) {", ") {"),
    Fault(
        "last-blocks-left-out",
        SM90,
        "for (; n_block >= blocks.begin; --n_block)",
        "for (; n_block > blocks.begin; --n_block)",
    ),
    Fault("nothing-skipped-at-the-left", SM90, SKIP_LEFT, "", message="deadlock"),
    Fault("skipped-in-the-wrong-place", SM90, SKIP_LEFT, SKIP_LEFT.replace("begin", "end")),
    Fault(
        "producer-goes-on-to-key-0",
        SM90,
        "n_block >= blocks.begin; --n_block) {\n            load_k",
        "n_block >= 0; --n_block) {\n            load_k",
    ),
    Fault("last-v-is-that-of-key-0", SM90, "load_v(blocks.begin);", "load_v(0);"),
    Fault("bits-of-the-left-edge", SM90, "shift_left(0xffffffffu, max(begin - word, 0)) &", "0xffffffffu &"),
    Fault("rows-without-keys-in-a-masked-block", SM90, "new_max == -kInfinity ? 0.0f : new_max", "new_max"),
    Fault("left-edge-off-by-one", SINGLE, "max(d - p.window_left, 0);", "max(d - p.window_left + 1, 0);"),
    Fault("left-blocks-not-masked", SINGLE, " || n_block < blocks.begin_full) {", ") {"),
)
FAULT_CALLS = (
    (Options(window_left=90, window_right=20), ((2, 300, 395, 2, 1), (1, 500, 90, 2, 1))),
    (Options(window_left=10), ((1, 300, 384, 2, 1),)),  # the last block is whole: it has a left edge alone
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_seen(machine, fault):
    runs = ((functools.partial(machine.run, options=options), sizes) for options, sizes in FAULT_CALLS)
    assert any(symptom(run, fault, sizes, seed=0) for run, sizes in runs)

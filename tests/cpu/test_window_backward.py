"""Windows and chunks, backward: every limit by its definition, turns that begin late, what hidden rows can not do."""

from __future__ import annotations

import itertools

import pytest
import torch

from fa2gen.cpu import KernelFault
from fa2gen.features import key_range
from fa2gen.options import Options
from fa2gen.select import best_spec
from fa2gen.spec import KernelSpec, Problem
from tests.cpu.faults import Fault, seeded
from tests.cpu.test_backward import run

ARCHES = ("sm80", "sm90")

# (batch, seqlen_q, seqlen_k, heads, heads_kv): keys that no query sees; then queries that see no key; both share heads
RAGGED, NO_KEYS = (2, 113, 203, 2, 1), (1, 203, 113, 4, 2)
MANY_BLOCKS = (1, 300, 450, 2, 1)

WINDOWS = [
    Options(window_left=left, window_right=right)
    for left, right in ((0, 0), (-1, 0), (16, 0), (128, 0), (64, 32), (0, 17), (-1, 5), (1000, 3), (1000, 1000))
]
CHUNKS = [
    Options(chunk=48),
    Options(chunk=1),
    Options(causal=True, chunk=64),
    Options(window_left=100, window_right=20, chunk=128),
    Options(window_left=3, window_right=1000, chunk=48),
]


def kernel(arch: str, head_dim: int, dtype: str = "bf16", mask: str = "window", deterministic: bool = False) -> str:
    problem = Problem(direction="bwd", head_dim=head_dim, dtype=dtype, mask=mask, deterministic=deterministic)
    return best_spec(problem, arch).name


def described(options: Options) -> str:
    return f"{options.window_left},{options.window_right},{options.causal:d},{options.chunk}"


@pytest.mark.parametrize(
    ("options", "arch"),
    [*zip([*WINDOWS, *CHUNKS], itertools.cycle(ARCHES), strict=False)],  # the intervals are one text for both
    ids=lambda x: x if isinstance(x, str) else described(x),
)
def test_every_limit(options, arch):
    """Also those that other kernels serve: what the window kernel computes does not depend on who asks."""
    for sizes in (RAGGED, NO_KEYS, (1, 1, 1, 1, 1)):
        verdict, _ = run(kernel(arch, 64), sizes, options=options)
        assert verdict.ok, f"{sizes}: {verdict}"


@pytest.mark.parametrize("tiles", ("d64_window_m128", "d96_window_m64"))
def test_blocks_of_keys_that_no_query_sees_in_turn(tiles):
    """They have no steps, and come between blocks that have, whose last dQ waits."""
    name = f"fa2_bwd_sm90_bf16_{tiles}_n128_s2_w8_l1_t1"
    for seed, options in enumerate((Options(window_left=30, window_right=0), Options(window_left=5, window_right=5))):
        verdict, _ = run(name, (1, 60, 700, 2, 2), options=options, seed=seed, num_sms=2)
        assert verdict.ok, f"{described(options)}: {verdict}"


@pytest.mark.parametrize(
    "name",
    [
        kernel(arch, head_dim, dtype, deterministic=deterministic)
        for arch, head_dim in itertools.product(ARCHES, (64, 80, 128, 192, 256))
        for dtype, deterministic in (("bf16", False), ("fp16", True))
    ],
)
def test_every_kernel(name):
    for seed, options in enumerate((Options(window_left=100, window_right=40), Options(causal=True, window_left=64))):
        verdict, _ = run(name, (NO_KEYS, RAGGED)[seed], options=options, seed=seed, with_dlse=True)
        assert verdict.ok, verdict


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("options", [Options(), Options(causal=True)], ids=["full", "causal"])
def test_a_window_that_hides_nothing_gives_the_bits_of_the_plain_kernel(arch, options):
    plain = KernelSpec.from_name(kernel(arch, 128, mask=options.mask, deterministic=True))
    window = KernelSpec(problem=plain.problem.model_copy(update={"mask": "window"}), tiling=plain.tiling)
    for sizes in (RAGGED, NO_KEYS, MANY_BLOCKS):
        _, gradients = run(plain.name, sizes, options=options)
        _, again = run(window.name, sizes, options=options)
        assert all(torch.equal(x, y) for x, y in zip(again, gradients, strict=True)), sizes


# dQ through shared memory, from registers split by products, and by all threads of an SM80 kernel
STAGED = "fa2_bwd_sm90_fp16_d64_window_det_m64_n64_s2_w4"
DIRECT = "fa2_bwd_sm90_fp16_d136_window_det_m64_n64_s2_w8"
SM80 = "fa2_bwd_sm80_fp16_d72_window_det_m64_n64_s1_w4_z64"


@pytest.mark.parametrize("name", [STAGED, DIRECT, SM80])
@pytest.mark.parametrize(
    "options", [Options(window_left=150, window_right=60), Options(causal=True, chunk=100)], ids=str
)
def test_no_schedule_changes_a_bit(name, options):
    verdict, first = run(name, MANY_BLOCKS, options=options)
    assert verdict.ok, verdict
    for seed in range(1, 5):
        _, again = run(name, MANY_BLOCKS, options=options, seed=seed)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True)), f"seed {seed}"


@pytest.mark.parametrize("name", [STAGED, DIRECT, SM80])
def test_sanitizers_are_silent(name):
    verdict, _ = run(name, RAGGED, options=Options(window_left=16, window_right=0), sanitize=True)
    assert verdict.ok, verdict


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("options", [Options(causal=True, window_left=30), Options(window_left=20, chunk=64)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 40, 600, 2, 1), (1, 600, 40, 2, 1)], ids=str)
def test_nan_behind_the_window_does_not_leak(arch, options, sizes):
    """Blocks of keys that no query sees, and of queries that see no key, are never read; their gradients are 0. In a
    block of which some row is seen, hidden rows must be finite, as under a causal mask: 0 times NaN is NaN."""
    name = kernel(arch, 64)
    tiling = KernelSpec.from_name(name).tiling
    _, plain = run(name, sizes, options=options)
    _, seqlen_q, seqlen_k, *_ = sizes
    ranges = [range(*key_range(options, seqlen_q, seqlen_k, row)) for row in range(seqlen_q)]
    keys = [j for j in range(seqlen_k) if not any(j in seen for seen in ranges)]
    rows = [i for i, seen in enumerate(ranges) if not seen]
    hidden_keys = [j for j in keys if set(keys) >= set(_block(j, tiling.tile_n, seqlen_k))]
    hidden_rows = [i for i in rows if set(rows) >= set(_block(i, tiling.tile_m, seqlen_q))]
    assert hidden_keys or hidden_rows

    def spoil(tensors):
        for x in "kv":
            tensors[x][:, hidden_keys] = torch.nan
        for x in ("q", "dout", "o"):
            tensors[x][:, hidden_rows] = torch.nan

    _, (dq, dk, dv) = run(name, sizes, options=options, change=spoil)
    assert not dk[:, keys].any() and not dv[:, keys].any() and not dq[:, rows].any()
    assert all(torch.equal(x, y) for x, y in zip((dk, dv), plain[1:], strict=True))
    assert not dq.isnan().any()


def _block(index: int, step: int, length: int) -> range:
    return range(index // step * step, min((index // step + 1) * step, length))


# Seeded faults -------------------------------------------------------------------------------------------------------

KEYS = "fa2_bwd_sm90_bf16_d128_window_m64_n128_s2_w8"
PRODUCTS = "fa2_bwd_sm90_bf16_d168_window_m64_n64_s2_w8"
PASSING = "fa2_bwd_sm90_bf16_d168_window_m64_n96_s2_w8"
PLAIN_SM80 = "fa2_bwd_sm80_bf16_d64_window_m64_n64_s2_w4"

TURN = "key_begin(p, s, m_block * kTileM) / kTileN"
STEP = "skipped = p.num_m_blocks - (blocks.end - blocks.begin);"
FAULTS = (
    *(
        fault
        for kernel in (KEYS, PLAIN_SM80)
        for fault in (
            Fault(
                "begin-too-late",
                kernel,
                "max(key - s.k + s.q - p.window_right, 0)",
                "max(key - s.k + s.q - p.window_right + 1, 0)",
            ),
            Fault(
                "begin-too-early",
                kernel,
                "max(key - s.k + s.q - p.window_right, 0)",
                "max(key - s.k + s.q - p.window_right - 1, 0)",
            ),
            Fault(
                "end-too-early", kernel, "min(key + 1 - s.k + p.window_left, 0)", "min(key - s.k + p.window_left, 0)"
            ),
            Fault(
                "end-too-late", kernel, "min(key + 1 - s.k + p.window_left, 0)", "min(key + 2 - s.k + p.window_left, 0)"
            ),
            Fault(
                "chunk-begins-late", kernel, "chunk_begin(p, key) - s.k + s.q)", "chunk_begin(p, key) + 1 - s.k + s.q)"
            ),
            Fault(
                "chunk-ends-late",
                kernel,
                "chunk_begin(p, key) - s.k + p.chunk)",
                "chunk_begin(p, key) + 1 - s.k + p.chunk)",
            ),
            Fault("first-blocks-not-masked", kernel, "return {begin, begin_full,", "return {begin, begin,"),
            Fault("last-blocks-not-masked", kernel, " || m_block >= blocks.end_full", ""),
            Fault(
                "last-block-left-out",
                kernel,
                "(max(query_end(p, s, last_key), 0) + kTileM - 1) / kTileM;",
                "max(query_end(p, s, last_key), 0) / kTileM;",
            ),
            Fault("next-head-as-if-nothing-were-hidden-behind", kernel, STEP, "skipped = blocks.begin;"),
            Fault(
                "on-to-the-last-block-of-queries",
                kernel,
                "if (m_block == blocks.end) {",
                "if (m_block == p.num_m_blocks) {",
            ),
        )
    ),
    Fault(
        "both-ends-of-the-other-key",
        PRODUCTS,
        "{query_end(p, s, key), query_end(p, s, key + 8)}",
        "{query_end(p, s, key + 8), query_end(p, s, key)}",
    ),
    Fault(
        "bits-of-the-end",
        PRODUCTS,
        " &\n                                 ~shift_left(0xffffffffu, registers_before(ends[key] - first_query));",
        ";",
    ),
    Fault(
        "ends-of-the-other-query",
        PASSING,
        "{key_end(p, work.s, query), key_end(p, work.s, query + 8)}",
        "{key_end(p, work.s, query + 8), key_end(p, work.s, query)}",
    ),
    Fault("bits-of-the-begin", PASSING, "shift_left(0xffffffffu, max(begin - word, 0)) & ", ""),
    *(
        fault
        for kernel in (STAGED, DIRECT, SM80)
        for fault in (
            Fault("turns-begin-at-0", kernel, TURN, "0", message="deadlock"),
            Fault("turn-of-the-last-row", kernel, TURN, "key_begin(p, s, m_block * kTileM + kTileM - 1) / kTileN", 8),
        )
    ),
)
CALLS = (
    (Options(window_left=90, window_right=20), (1, 300, 395, 2, 1)),
    (Options(window_left=50, window_right=100), (1, 500, 130, 2, 1)),
    (Options(chunk=100), (1, 300, 384, 2, 1)),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_seen(fault):
    wrong = seeded(fault)
    for seed, (options, sizes) in itertools.product(range(1, 1 + fault.schedules), CALLS):
        try:
            verdict, _ = run(fault.kernel, sizes, options=options, rendered=wrong, seed=seed, time_limit=20.0)
        except (KernelFault, AssertionError) as error:
            assert fault.message in str(error)
            return
        if not verdict.ok:
            assert not fault.message, f"seen by its result, not by {fault.message!r}"
            return
    pytest.fail(f"not seen on {fault.schedules} schedules")

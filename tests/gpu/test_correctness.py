"""The project's rule on a GPU: every head dim, dtype, mask and family, over shapes, layouts, scales and magnitudes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

ARCHES = ("sm80", "sm90")
DTYPES = ("fp16", "bf16")
MASKS = ("full", "causal")

# (batch, seqlen_q, seqlen_k, heads, heads_kv)
SHAPES = (
    (2, 1, 1, 2, 2),
    (2, 1, 1024, 4, 2),
    (2, 113, 203, 6, 1),
    (1, 203, 113, 6, 6),  # causal: the first 90 rows see no key
    (2, 128, 217, 8, 2),
    (1, 1023, 1024, 2, 2),
    (1, 2048, 2048, 3, 1),
    (1, 4096, 4096, 1, 1),
    (2, 0, 64, 2, 2),
    (2, 64, 0, 2, 1),
    (0, 64, 64, 2, 1),
)
LAYOUTS = ("gaps", "dense", "bhsd")


def families(head_dims, arches=ARCHES, dtypes=DTYPES, masks=MASKS):
    """The parameter `family`: a tuple here, a Family in the test, and what conftest builds beforehand."""
    values = list(itertools.product(arches, dtypes, head_dims, masks))
    return pytest.mark.parametrize("family", values, indirect=True, ids=lambda f: f"{f[0]}_{f[1]}_d{f[2]}_{f[3]}")


@families(range(8, 257, 8))
def test_every_kernel(harness, family):
    for seed, (sizes, layout) in enumerate(zip(SHAPES, itertools.cycle(LAYOUTS), strict=False)):
        harness.assert_right(family, *harness.inputs(family, harness.Sizes(*sizes), layout, seed))


# Every remainder of rows and keys by a tile: one seqlen_q and seqlen_k at a time around tile edges, and small primes.
LENGTHS = (
    1,
    2,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    63,
    64,
    65,
    79,
    80,
    81,
    95,
    97,
    127,
    128,
    129,
    175,
    176,
    177,
    191,
    192,
    193,
    255,
    257,
    385,
)


@families((64, 80, 128, 256), dtypes=("bf16",))
def test_lengths_around_tile_edges(harness, family):
    for length in LENGTHS:
        for sizes in ((1, length, 200, 2, 1), (1, 200, length, 2, 2), (1, length, length, 2, 1)):
            harness.assert_right(family, *harness.inputs(family, harness.Sizes(*sizes), "gaps", length))


@families((64, 128), dtypes=("bf16",))
def test_more_tiles_than_a_persistent_grid(harness, family):
    """Several waves, with head counts that do not divide anything."""
    for sizes in ((3, 700, 900, 14, 7), (7, 300, 300, 12, 4), (65, 130, 70, 3, 1)):
        harness.assert_right(family, *harness.inputs(family, harness.Sizes(*sizes)))


@families((40, 64, 128, 256))
def test_softmax_scale(harness, family):
    q, k, v = harness.inputs(family, harness.Sizes(2, 150, 300, 4, 2))
    for scale in (1e-3, 0.05, 0.5, 1.0, 3.0):
        harness.assert_right(family, q, k, v, scale)


@families((64, 128, 192))
def test_large_magnitudes(harness, family):
    """Scores in the thousands: the softmax is almost one-hot, and a maximum that lags would overflow."""
    q, k, v = harness.inputs(family, harness.Sizes(2, 200, 333, 4, 2), gain=30.0)
    harness.assert_right(family, q, k, v)
    ramp = torch.linspace(0.1, 3, 333, device="cuda").view(1, -1, 1, 1)  # the maximum moves in every block of keys
    harness.assert_right(family, q, harness.amid_nan((k * ramp).to(k.dtype)), v)
    harness.assert_right(family, q, harness.amid_nan((k * ramp.flip(1)).to(k.dtype)), v)


@families((64, 128), dtypes=("bf16",))
def test_equal_scores_and_constant_values(harness, family):
    """All weights equal: out is the mean of the visible values, and lse the logarithm of their number."""
    q, k, v = (torch.zeros(1, n, 2, family.head_dim, dtype=torch.bfloat16, device="cuda") for n in (300, 500, 500))
    out, lse = harness.run(family, q, k, v + 1)
    assert (out == 1).all()
    keys = torch.arange(201, 501, device="cuda") if family.mask == "causal" else torch.full((300,), 500, device="cuda")
    torch.testing.assert_close(lse, keys.float().log().expand(1, 2, 300), rtol=0, atol=1e-5)


# Layouts ----------------------------------------------------------------------------------------------------------


@families((64, 96, 128))
def test_packed_qkv(harness, family):
    """The three slices of (batch, seqlen, 3, heads, head_dim), which neighbour each other."""
    values = harness.inputs(family, harness.Sizes(2, 333, 333, 4, 4), "dense")
    q, k, v = torch.stack(values, dim=2).unbind(2)
    harness.assert_right(family, q, k, v)


@families((64, 128), dtypes=("bf16",))
def test_expanded_keys_and_values(harness, family):
    """Strides of 0: one key and value for all batches, and one head for all heads."""
    q, k, v = harness.inputs(family, harness.Sizes(1, 300, 200, 4, 1), "dense")
    q2 = torch.cat([q, q.flip(1), q.flip(2)])
    harness.assert_right(family, q2, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1))
    harness.assert_right(family, q, k.expand(-1, -1, 4, -1), v.expand(-1, -1, 4, -1))
    harness.assert_right(family, q.expand(3, -1, -1, -1), k.expand(3, -1, 2, -1), v.expand(3, -1, 2, -1))


@families((64, 128), dtypes=("fp16",))
def test_overlapping_windows(harness, family):
    """Batches that overlap in memory, as torch.Tensor.unfold makes them."""
    q, k, v = harness.inputs(family, harness.Sizes(1, 400, 400, 2, 1), "dense")
    windows = [x[0].unfold(0, 256, 48).permute(0, 3, 1, 2) for x in (q, k, v)]
    harness.assert_right(family, *windows)


@families((64, 128), dtypes=("bf16",))
def test_misaligned_tensors(harness, family):
    """Addresses and strides that TMA and cp.async cannot take are copied."""
    sizes = harness.Sizes(2, 130, 100, 2, 1)
    q, k, v = harness.inputs(family, sizes, "dense")

    def off_by_one(x):
        buffer = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype, device="cuda")
        return buffer[1:].view(x.shape).copy_(x)

    def odd_rows(x):
        flat = torch.full((*x.shape[:2], x.shape[2] * x.shape[3] + 3), float("nan"), dtype=x.dtype, device="cuda")
        return flat[..., :-3].unflatten(2, x.shape[2:]).copy_(x)

    for change in (off_by_one, odd_rows):
        expected = harness.run(family, q, k, v)
        for changed in ((change(q), k, v), (q, change(k), v), (q, k, change(v)), tuple(map(change, (q, k, v)))):
            torch.testing.assert_close(harness.run(family, *changed), expected, rtol=0, atol=0)


# More than 2^31 elements ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("long", ["queries", "keys", "batches"])
@families((128,), dtypes=("bf16",), masks=("full",))
def test_more_than_2_to_the_31_elements(harness, family, long):
    """Offsets beyond 32 bits, in elements: the last rows, heads and batches are right, and nothing is left out."""
    sizes = {
        "queries": (1, 2**18 + 77, 130, 64, 2),
        "keys": (1, 130, 2**18 + 77, 64, 64),
        "batches": (1031, 129, 260, 128, 64),
    }
    sizes = harness.Sizes(*sizes[long])
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")

    def random(seqlen, heads):
        return torch.randn(
            sizes.batch, seqlen, heads, 128, dtype=torch.bfloat16, device="cuda", generator=harness.generator
        )

    harness.generator.manual_seed(1)
    q, k, v = (random(s, h) for s, h in ((sizes[1], sizes[3]), (sizes[2], sizes[4]), (sizes[2], sizes[4])))
    assert max(q.numel(), k.numel()) > 2**31
    out, lse = harness.run(family, q, k, v)
    assert not out.isnan().any() and not lse.isnan().any()
    group = sizes.heads // sizes.heads_kv
    for b in {0, sizes.batch - 1}:
        for kv in {0, sizes.heads_kv - 1}:
            heads = slice(kv * group, kv * group + min(group, 2))
            for rows in (slice(0, 128), slice(-128, None)):
                part = SimpleNamespace(
                    q=q[b : b + 1, rows, heads], k=k[b : b + 1, :, kv : kv + 1], v=v[b : b + 1, :, kv : kv + 1]
                )
                verdict = harness.judge(
                    family, out[b : b + 1, rows, heads], lse[b : b + 1, heads, rows], part.q, part.k, part.v
                )
                assert verdict.ok, f"{long}, batch {b}, key head {kv}, rows {rows}: {verdict}"
    del q, k, v, out, lse
    torch.cuda.empty_cache()

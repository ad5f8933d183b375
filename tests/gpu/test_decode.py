"""Queries over caches on a GPU: every kind of kernel, `flash_attn_with_kvcache` against the reference, graphs, bits."""

from __future__ import annotations

import math

import pytest
import torch

import fa2gen
from fa2gen import cases
from fa2gen.features import examples_of
from fa2gen.ops.call import calls_for_decoding
from fa2gen.ops.kvcache import cached_cuda
from fa2gen.ops.kvcache_reference import cached_reference
from fa2gen.ops.validate_cache import Cached
from fa2gen.options import Options, Shape
from fa2gen.select import best_spec
from fa2gen.spec import Problem
from fa2gen.testing import problems

SHAPES = (Shape(2, 1, 300, 4, 1), Shape(3, 5, 2030, 6, 2), Shape(16, 1, 1500, 32, 8), Shape(1, 9, 5000, 71, 1))


EXPRESSIONS = (
    {"score": "cap * tanh(s / cap)", "paged": True},
    {"score": "s - slope[b, h] * abs(i + seqlen_k - seqlen_q - j)", "mask": "causal"},
    {"score": "cap[h] * tanh(s / cap[h])", "allow": "(i + seqlen_k - seqlen_q - j) % 3 != 1", "sink": True},
)
EIGHT_BITS = (
    {"cache_dtype": "e4m3", "mask": "causal"},
    {"cache_dtype": "int8", "paged": True, "dtype": "fp16"},
    {"cache_dtype": "e4m3", "paged": True, "mask": "window", "sink": True, "score": "cap * tanh(s / cap)"},
)
KINDS = [
    *problems(head_dim=[8, 64, 72, 128, 192, 256], direction="decode", sink=False, cache_dtype="same"),
    *(Problem(direction="decode", head_dim=d, mask="window", sink=True, paged=True) for d in (64, 128, 256)),
    *(Problem(direction="decode", head_dim=d, **fields) for fields in EXPRESSIONS for d in (64, 128, 256)),
    *(Problem(direction="decode", head_dim=d, **fields) for fields in EIGHT_BITS for d in (16, 64, 80, 128, 256)),
]


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("problem", KINDS, ids=lambda problem: problem.text)
def test_every_kind(problem, arch):
    if problem.cache_dtype == "e4m3" and arch == "sm80":
        pytest.skip("refused: sm80 has no instruction that converts e4m3")
    if problem.cache_dtype == "int8" and problem.paged and problem.head_dim > 240 and arch == "sm80":
        pytest.skip("refused: registers do not suffice")
    for number, shape in enumerate(SHAPES):
        options = examples_of(problem)
        case = cases.make(best_spec(problem, arch), shape, options[number % len(options)], device="cuda")
        cases.run(case, "gpu")
        assert cases.written_outside(case) is None
        assert (verdict := cases.verdict(case)).ok, verdict


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cuda").bfloat16()


@pytest.mark.parametrize("new", [0, 1, 3])
@pytest.mark.parametrize("page", [0, 1, 16, 48])
@pytest.mark.parametrize(
    ("options", "interleaved"),
    [(Options(), True), (Options(causal=True), False), (Options(causal=True, window_left=100), True)],
    ids=["full", "causal", "window"],
)
def test_calls_against_the_reference(page, new, options, interleaved):
    """Lengths of 0, beyond the cache, and such that an append is dropped."""
    batch, heads, heads_kv, head_dim, rows, seqlen_q = 4, 8, 2, 128, 960, max(new, 2)
    lengths = torch.tensor([958, 0, 2000, 17], dtype=torch.int32, device="cuda")
    entries = batch * (rows // page if page else 1)
    caches = [random(entries, page or rows, heads_kv, head_dim) for _ in range(2)]
    more = {}
    if new:
        angles = torch.rand(rows, 32, generator=torch.Generator("cuda").manual_seed(1), device="cuda") * 6
        more = {name: random(batch, new, heads_kv, head_dim) for name in ("k", "v")}
        more |= {"rotary_cos": angles.cos().bfloat16(), "rotary_sin": angles.sin().bfloat16()}
    if page:
        more["block_table"] = torch.randperm(entries, device="cuda").view(batch, -1).int()
    q = random(batch, seqlen_q, heads, head_dim)
    ours, theirs = (Cached(q, *(x.clone() for x in caches), cache_seqlens=lengths, **more) for _ in range(2))
    (out, lse), (expected, expected_lse) = (
        f(x, options, interleaved) for f, x in ((cached_cuda, ours), (cached_reference, theirs))
    )
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ours.k_cache, theirs.k_cache, atol=0.02, rtol=0.01)
    assert torch.equal(ours.v_cache, theirs.v_cache)


@pytest.mark.parametrize("seqlen_q, rows", [(200, 960), (20, 4096)])  # of few the keys are in parts
@pytest.mark.parametrize("new", [0, 3])
@pytest.mark.parametrize("page", [0, 1, 16])
@pytest.mark.parametrize(
    "said",
    [
        {"causal": True},
        {"window_size": (100, 7)},
        {"causal": True, "softcap": 20.0, "s_aux": torch.linspace(-3, 3, 8)},
        {"causal": True, "num_splits": 3},
    ],
    ids=str,
)
def test_many_queries(page, new, said, seqlen_q, rows):
    """More than decoding kernels are quick at. Lengths of 0, beyond the cache, and such that an append is dropped."""
    batch, heads, heads_kv, head_dim = 4, 8, 2, 64
    device = torch.cuda.current_device()
    is_prefill = not calls_for_decoding(device, batch, seqlen_q, heads, heads_kv, head_dim, may_pack=False)
    assert is_prefill or seqlen_q < 200
    said = said | {
        "cache_seqlens": torch.tensor([rows - 2, 0, 2 * rows, 170], dtype=torch.int32),
        "return_softmax_lse": True,
    }
    entries = batch * (rows // page if page else 1)
    caches = [random(entries, page or rows, heads_kv, head_dim) for _ in range(2)]
    if new:
        said |= {name: random(batch, new, heads_kv, head_dim) for name in ("k", "v")}
    order = torch.randperm(entries, generator=torch.Generator().manual_seed(page)).int()
    said |= {"block_table": order.view(batch, -1)} if page else {"cache_batch_idx": order}
    q = random(batch, seqlen_q, heads, head_dim)
    results = []
    for device in ("cuda", "cpu"):
        there = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in said.items()}
        own = [x.to(device, copy=True) for x in caches]
        results.append((*fa2gen.flash_attn_with_kvcache(q.to(device), *own, **there), *own))
    (out, lse, *cached), (expected, expected_lse, *expected_caches) = results
    torch.testing.assert_close(out.cpu(), expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse.cpu(), expected_lse, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(cached, expected_caches, strict=True))


def decoding(batch=16, rows=4096, queries=1, **more):
    q, k, v = random(batch, queries, 32, 128), random(batch, rows, 8, 128), random(batch, rows, 8, 128)
    lengths = torch.full((batch,), rows, dtype=torch.int32, device="cuda")
    return lengths, lambda: fa2gen.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **more)


@pytest.mark.parametrize("num_splits, queries", [(0, 1), (8, 1), (0, 24)])
def test_a_graph_is_replayed_with_other_lengths(num_splits, queries):
    lengths, call = decoding(8, queries=queries, causal=True, num_splits=num_splits)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        lengths.copy_(torch.randint(0, 4097, lengths.shape, generator=generator))
        graph.replay()
        assert torch.equal(captured, call())


def test_the_same_bits_in_every_run_and_on_every_stream():
    _, call = decoding(batch=3, rows=30_000)
    first = call()
    streams = [torch.cuda.Stream() for _ in range(4)]
    for number in range(100):
        streams[number % 4].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(streams[number % 4]):
            again = call()
        torch.cuda.synchronize()
        assert torch.equal(first, again)


def test_fixed_parts_do_not_depend_on_the_batch():
    """200 batches: a sequence among others, and alone."""
    q, k, v = random(32, 1, 32, 128), random(32, 2048, 8, 128), random(32, 2048, 8, 128)
    lengths = torch.randint(0, 2049, (32,), generator=torch.Generator().manual_seed(0)).int().cuda()
    alone = [
        fa2gen.flash_attn_with_kvcache(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], cache_seqlens=lengths[b : b + 1], num_splits=8
        )
        for b in range(32)
    ]
    for seed in range(200):
        chosen = torch.randperm(32, generator=torch.Generator().manual_seed(seed))[: 1 + seed % 32]
        at = chosen.cuda()
        said = {"cache_seqlens": lengths[at], "cache_batch_idx": at.int(), "num_splits": 8}
        out = fa2gen.flash_attn_with_kvcache(q[at], k, v, **said)
        assert all(torch.equal(out[i], alone[b][0]) for i, b in enumerate(chosen.tolist()))


def test_a_growing_cache_is_one_signature():
    """What is prepared for a call serves all lengths, on the device or as a number."""
    from fa2gen.ops import call as calls

    q, k, v = random(2, 1, 8, 64), random(2, 512, 2, 64), random(2, 512, 2, 64)
    for _ in range(2):  # a signature is remembered when it comes again
        fa2gen.flash_attn_with_kvcache(q, k, v, cache_seqlens=1)
    known = len(calls._calls)
    for length in range(2, 40):
        fa2gen.flash_attn_with_kvcache(q, k, v, cache_seqlens=length)
    assert len(calls._calls) == known


def test_a_cache_beyond_2_to_the_31_elements():
    k = torch.empty(260, 8192, 8, 128, dtype=torch.bfloat16, device="cuda")
    k[-1].copy_(random(8192, 8, 128))
    q, at = random(1, 1, 32, 128), torch.tensor([259], dtype=torch.int32, device="cuda")
    out = fa2gen.flash_attn_with_kvcache(q, k, k, cache_batch_idx=at)
    expected = fa2gen.flash_attn_func(q, k[-1:], k[-1:])
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)


def test_slots_and_merged_states():
    k, v = random(40, 16, 8, 128), random(40, 16, 8, 128)
    new = [random(100, 8, 128) for _ in range(2)]
    slots = torch.randperm(640, device="cuda")[:100]
    slots[::7] = -1
    wanted = [x.clone().flatten(0, 1) for x in (k, v)]
    for cache, rows in zip(wanted, new, strict=True):
        cache[slots[slots >= 0]] = rows[slots >= 0]
    fa2gen.reshape_and_cache(*new, k, v, slots)
    assert all(torch.equal(x.flatten(0, 1), y) for x, y in zip((k, v), wanted, strict=True))
    q, keys = random(1, 4, 8, 128), random(1, 300, 8, 128)
    parts = [fa2gen.attention(q, x, x) for x in keys.split((100, 200), 1)]
    out, lse = fa2gen.merge_states(*parts[0], *parts[1])
    whole, whole_lse = fa2gen.attention(q, keys, keys)
    torch.testing.assert_close(out, whole, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse, whole_lse, atol=1e-3, rtol=1e-3)
    assert math.isfinite(float(lse.sum()))

"""`flash_attn_with_kvcache` and what stands beside it, as CPU tensors run them, also under torch.compile."""

from __future__ import annotations

import math

import pytest
import torch

import fa2gen
from fa2gen.reference import attention_reference

BATCH, ROWS, HEADS, HEADS_KV, HEAD_DIM = 3, 48, 6, 2, 64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def caches(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return random(BATCH, ROWS, HEADS_KV, HEAD_DIM, seed=seed), random(BATCH, ROWS, HEADS_KV, HEAD_DIM, seed=seed + 1)


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def expected(q, k, v, lengths, first=(0, 0, 0), **options):
    """(out, lse) of each sequence's keys alone."""
    parts = [
        attention_reference(q[b : b + 1], k[b : b + 1, first[b] : n], v[b : b + 1, first[b] : n], **options)
        for b, n in enumerate(lengths)
    ]
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_left": 7}], ids=str)
def test_lengths_and_padding(options):
    q, (k, v) = random(BATCH, 4, HEADS, HEAD_DIM), caches()
    given = {"causal": options.get("causal", False), "window_size": (options.get("window_left", -1), -1)}
    padded = fa2gen.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=ints(5, 30, 48), cache_leftpad=ints(1, 0, 20), return_softmax_lse=True, **given
    )
    for found, wanted in zip(padded, expected(q, k, v, (5, 30, 48), (1, 0, 20), **options), strict=True):
        torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.02)
    assert torch.equal(
        fa2gen.flash_attn_with_kvcache(q, k, v, cache_seqlens=30, **given),
        fa2gen.flash_attn_with_kvcache(q, k, v, cache_seqlens=ints(30, 30, 30), **given),
    )


def test_lengths_beyond_the_cache_are_its_own_and_below_0_none():
    q, (k, v) = random(BATCH, 1, HEADS, HEAD_DIM), caches()
    out, lse = fa2gen.flash_attn_with_kvcache(q, k, v, cache_seqlens=ints(10_000, -3, 0), return_softmax_lse=True)
    assert torch.equal(out[0], fa2gen.flash_attn_with_kvcache(q, k, v)[0])
    assert not out[1:].any() and (lse[1:] == -math.inf).all()


def test_steps_of_decoding_are_what_one_pass_gives():
    """Each step appends a token with rotary embeddings; a causal pass over all of them at once sees the same."""
    steps = 9
    angles = torch.rand(ROWS, 16, generator=torch.Generator().manual_seed(1)) * 6
    rotary = {"rotary_cos": angles.cos().bfloat16(), "rotary_sin": angles.sin().bfloat16(), "causal": True}
    q, new = random(BATCH, steps, HEADS, HEAD_DIM), (random(BATCH, steps, HEADS_KV, HEAD_DIM, seed=s) for s in (3, 4))
    k, v = new
    whole, parts = [x.clone() for x in caches()], [x.clone() for x in caches()]
    together = fa2gen.flash_attn_with_kvcache(q, *whole, k, v, cache_seqlens=ints(2, 0, 11), **rotary)
    for i in range(steps):
        one = [x[:, i : i + 1] for x in (q, k, v)]
        out = fa2gen.flash_attn_with_kvcache(one[0], *parts, *one[1:], cache_seqlens=ints(2 + i, i, 11 + i), **rotary)
        torch.testing.assert_close(out, together[:, i : i + 1], atol=0.02, rtol=0.02)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_an_append_behind_a_full_cache_is_dropped():
    q, (k, v) = random(BATCH, 1, HEADS, HEAD_DIM), caches()
    before, new = k.clone(), random(BATCH, 3, HEADS_KV, HEAD_DIM)
    fa2gen.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=ints(ROWS, ROWS - 1, 5))
    assert torch.equal(k[0], before[0]) and torch.equal(k[1, :-1], before[1, :-1])
    assert torch.equal(k[1, -1], new[1, 0]) and torch.equal(k[2, 5:8], new[2])


@pytest.mark.parametrize("size", [1, 3, 16])
def test_pages_are_the_cache_in_pieces(size):
    """In any order, with NaN in what is not used, and numbers that are none where no page is needed."""
    q, (k, v) = random(BATCH, 2, HEADS, HEAD_DIM), caches()
    lengths, pages = (48, 5, 0), ROWS // size
    order = torch.randperm(BATCH * pages, generator=torch.Generator().manual_seed(2)).view(BATCH, pages)
    table = order.to(torch.int32)
    paged = [torch.full((BATCH * pages, size, HEADS_KV, HEAD_DIM), math.nan).bfloat16() for _ in range(2)]
    for b, length in enumerate(lengths):
        for cache, dense in zip(paged, (k, v), strict=True):
            for row in range(length):
                cache[order[b, row // size], row % size] = dense[b, row]
        table[b, -(-length // size) :] = 2**30
    said = {"cache_seqlens": ints(*lengths), "causal": True, "return_softmax_lse": True}
    found = fa2gen.flash_attn_with_kvcache(q, *paged, block_table=table, **said)
    for a, b in zip(found, fa2gen.flash_attn_with_kvcache(q, k, v, **said), strict=True):
        assert torch.equal(a, b)


def test_compiled_as_one_graph():
    """Also with a length that grows, and caches that are written: what eager does, and no graph break."""
    q, new = random(BATCH, 1, HEADS, HEAD_DIM), random(BATCH, 1, HEADS_KV, HEAD_DIM)

    def step(k, v, length):
        return fa2gen.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=length) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager_caches, compiled_caches = caches(), caches()
    for length in (3, 4, ints(5, 0, 47)):
        assert torch.equal(step(*eager_caches, length), compiled(*compiled_caches, length))
        assert all(torch.equal(a, b) for a, b in zip(eager_caches, compiled_caches, strict=True))


def test_a_length_that_grows_compiles_once():
    """And so does max_seqlen_q of the doors: numbers are no constants of a graph."""
    q, (k, v), graphs = random(BATCH, 1, HEADS, HEAD_DIM), caches(), []

    def counted(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(lambda n: fa2gen.flash_attn_with_kvcache(q, k, v, cache_seqlens=n), backend=counted)
    for length in range(2, 12):
        assert torch.equal(step(length), fa2gen.flash_attn_with_kvcache(q, k, v, cache_seqlens=length))
    assert len(graphs) <= 2  # one of the first number, one of all others


def test_operators_are_as_they_declare_themselves():
    q, new = random(BATCH, 1, HEADS, HEAD_DIM), random(BATCH, 1, HEADS_KV, HEAD_DIM)
    lengths = ints(3, 0, 47)
    torch.library.opcheck(torch.ops.fa2gen.decode.default, (q, *caches(), lengths, None, None, None, 0.125))
    arguments = (q, *caches(), new, new, None, None, lengths, None, None, None, 0.125)
    torch.library.opcheck(torch.ops.fa2gen.decode_append.default, arguments)
    narrow = [torch.ones(3, 16, HEADS_KV, HEAD_DIM, dtype=torch.int8)] * 2
    of_call = (*narrow, ints(16, 16), ints(2, 0, 1, 1).view(2, 2), None, torch.ones(2, HEADS_KV), 16, torch.bfloat16)
    torch.library.opcheck(torch.ops.fa2gen.widen.default, of_call)


# Beside it -----------------------------------------------------------------------------------------------------------


def test_slots_are_written_and_no_others():
    k, v = (random(5, 4, HEADS_KV, HEAD_DIM, seed=s) for s in (0, 1))
    new = [random(6, HEADS_KV, HEAD_DIM, seed=s) for s in (2, 3)]
    slots = torch.tensor([0, -1, 19, 20, 7, 1 << 40])
    wanted = [x.clone() for x in (k, v)]
    for cache, rows in zip(wanted, new, strict=True):
        for i, slot in enumerate(slots.tolist()):
            if 0 <= slot < 20:
                cache[slot // 4, slot % 4] = rows[i]
    fa2gen.reshape_and_cache(*new, k, v, slots)
    assert torch.equal(k, wanted[0]) and torch.equal(v, wanted[1])


def test_merged_states_are_attention_over_all_keys():
    q, k, v = random(2, 5, 4, 64), random(2, 40, 4, 64), random(2, 40, 4, 64, seed=1)
    parts = [attention_reference(q, x, y) for x, y in zip(k.split((13, 27), 1), v.split((13, 27), 1), strict=True)]
    out, lse = fa2gen.merge_states(*parts[0], *parts[1])
    whole, whole_lse = attention_reference(q, k, v)
    torch.testing.assert_close(out, whole, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse, whole_lse)
    packed, packed_lse = fa2gen.merge_states(*(x[0] for x in parts[0]), *(x[0] for x in parts[1]))
    assert torch.equal(packed, out[0]) and torch.equal(packed_lse, lse[0])


def test_gradients_of_a_part_without_keys_are_0():
    """Whatever its rows hold; and where neither part has keys."""
    out = [torch.randn(1, 3, 2, 8), torch.full((1, 3, 2, 8), float("nan"))]
    lse = [torch.randn(1, 2, 3), torch.full((1, 2, 3), float("-inf"))]
    lse[0][..., 0] = float("-inf")
    leaves = [x.requires_grad_() for x in (out[0], lse[0], out[1], lse[1])]
    found, of_all = fa2gen.merge_states(*leaves)
    (found.sum() + of_all.masked_fill(of_all.isneginf(), 0).sum()).backward()
    assert all(x.grad.isfinite().all() for x in leaves) and not leaves[2].grad.any() and not leaves[3].grad.any()


@pytest.mark.parametrize("empty", [-math.inf, math.inf])
def test_a_part_without_keys_changes_no_bit(empty):
    out, lse = random(1, 3, 2, 64), torch.randn(1, 2, 3)
    nothing, none = torch.full_like(out, math.nan), torch.full_like(lse, empty)
    for found in (fa2gen.merge_states(out, lse, nothing, none), fa2gen.merge_states(nothing, none, out, lse)):
        assert torch.equal(found[0], out) and torch.equal(found[1], lse)
    both = fa2gen.merge_states(nothing, none, nothing, none)
    assert not both[0].any() and (both[1] == -math.inf).all()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_sinks_a_cap_and_slopes(compiled):
    """As the reference has them over each sequence's own keys; a sequence without any gives its sinks."""
    q, (k, v) = random(BATCH, 4, HEADS, HEAD_DIM), caches()
    s_aux, slopes = torch.linspace(-1, 1, HEADS), torch.rand(BATCH, HEADS, generator=torch.Generator().manual_seed(2))
    said = {"causal": True, "softcap": 2.0, "return_softmax_lse": True}

    def call(lengths):
        return fa2gen.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, alibi_slopes=slopes, s_aux=s_aux.bfloat16(), **said
        )

    call = torch.compile(call, fullgraph=True, backend="eager") if compiled else call
    out, lse = call(ints(5, 0, 48))
    assert torch.equal(lse[1], s_aux.bfloat16().float()[:, None].expand(HEADS, 4)) and not out[1].any()
    for b, length in ((0, 5), (2, 48)):
        own = [x[b : b + 1] for x in (q, k[:, :length], v[:, :length])]
        dense = fa2gen.attention(
            *own,
            causal=True,
            s_aux=s_aux.bfloat16(),
            score="cap * tanh(s / cap) - slope[b, h] * abs(i + seqlen_k - seqlen_q - j)",
            inputs={"cap": 2.0, "slope": slopes[b : b + 1]},
        )
        torch.testing.assert_close(out[b : b + 1], dense[0], atol=0.02, rtol=0.02)
        torch.testing.assert_close(lse[b : b + 1], dense[1], atol=0.01, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_8_bit_caches_are_filled_by_slots_and_read(dtype):
    """What is read is what was written, to half a step of an 8-bit number; what is beyond becomes the greatest."""
    heads, head_dim, tokens = 2, 64, 20
    k, v = (random(tokens, heads, head_dim, seed=s) for s in (1, 2))
    caches = [torch.zeros(3, 8, heads, head_dim, dtype=torch.float32).to(dtype) for _ in range(2)]
    scales = torch.tensor([0.04, 0.03]), torch.tensor(0.05)
    fa2gen.reshape_and_cache(k, v, *caches, torch.arange(tokens) + 2, *scales)
    step = 0.5 if dtype == torch.int8 else 0.0
    for cache, x, scale in zip(caches, (k, v), scales, strict=True):
        found = cache.float().flatten(0, 1)[2 : tokens + 2] * scale.expand(heads).view(1, heads, 1)
        torch.testing.assert_close(found, x.float(), atol=step * 0.05 + 1e-3, rtol=2**-4)
    said = {"cache_seqlens": ints(tokens + 2), "cache_leftpad": ints(2), "block_table": ints(0, 1, 2).view(1, 3)}
    descales = {"k_descale": scales[0].view(1, heads), "v_descale": scales[1].expand(1, heads)}
    q = random(1, 2, 6, head_dim)
    out = fa2gen.flash_attn_with_kvcache(q, *caches, **said, **descales)
    torch.testing.assert_close(out, fa2gen.flash_attn_func(q, k[None], v[None]), atol=0.05, rtol=0.05)
    fa2gen.reshape_and_cache(k * 1000, v, *caches, torch.arange(tokens), *scales)
    assert caches[0].float().abs().max() == (448 if dtype == torch.float8_e4m3fn else 128)

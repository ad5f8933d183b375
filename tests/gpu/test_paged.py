"""Ragged batches over pages on a GPU: every kind of kernel, pages of any size and place, replayed graphs."""

from __future__ import annotations

import itertools

import pytest
import torch

import fa2gen
from fa2gen import cases, launch
from fa2gen.features import examples_of
from fa2gen.ops.call import forget
from fa2gen.options import Shape
from fa2gen.select import best_spec
from fa2gen.serving import pages as serving
from fa2gen.serving import vllm
from fa2gen.testing import problems

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

LENGTHS = ((300, 300), (1, 2048), (0, 40), (129, 700), (77, 77))
"""Queries and keys of each sequence."""


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize(
    "problem",
    problems(head_dim=[24, 64, 80, 128, 256], dtype="bf16", direction="fwd", varlen=True, dropout=False, paged=True),
    ids=lambda problem: problem.text,
)
def test_every_kind(problem, arch):
    options = examples_of(problem)
    for number, shape in enumerate((Shape(2, 300, 700, 4, 1), Shape(3, 200, 1001, 6, 2), Shape(1, 129, 2002, 8, 8))):
        case = cases.make(best_spec(problem, arch), shape, options[number % len(options)], device="cuda")
        cases.run(case, "gpu")
        assert cases.written_outside(case) is None
        assert (verdict := cases.verdict(case)).ok, verdict


@pytest.fixture(params=["sm80", "sm90"])
def named_arch(request, monkeypatch):
    monkeypatch.setenv("FA2GEN_ARCH", request.param)
    forget()
    yield request.param
    forget()


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cuda").bfloat16()


def ints(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def batch(page: int, head_dim: int = 128, heads: int = 8, heads_kv: int = 2, hnd: bool = False):
    """(q, k and v in pages, cu_seqlens_q, seqused_k, table, k and v packed, cu_seqlens_k); NaN where no key is."""
    queries, keys = zip(*LENGTHS, strict=True)
    pages = -(-max(keys) // page)
    count = pages * len(keys) + 1
    order = torch.randperm(count - 1, generator=torch.Generator().manual_seed(page)).to("cuda")
    table = order.view(len(keys), pages).int()
    q, packed = random(sum(queries), heads, head_dim), [random(sum(keys), heads_kv, head_dim) + i for i in range(2)]
    both = torch.full((count, 2, heads_kv, page, head_dim), float("nan"), device="cuda").bfloat16()
    if not hnd:
        both = both.transpose(2, 3).contiguous().transpose(2, 3)
    k, v = (x.transpose(1, 2) for x in both.unbind(1))
    starts = [0, *torch.tensor(keys).cumsum(0).tolist()]
    for b, n in enumerate(keys):
        rows = torch.arange(n, device="cuda")
        for cache, x in zip((k, v), packed, strict=True):
            cache[table[b, rows // page].long(), rows % page] = x[starts[b] : starts[b] + n]
        table[b, -(-n // page) :] = 2**30
    bounds = ints([0, *torch.tensor(queries).cumsum(0).tolist()])
    return q, k, v, bounds, ints(keys), table, *packed, ints(starts)


@pytest.mark.parametrize("page", [1, 3, 8, 16, 48, 64, 256, 528])
def test_pages_give_what_rows_give(page, named_arch):
    """The same bits, however keys are found: in boxes of TMA, or row by row where a page is too small for those."""
    for hnd, head_dim in ((False, 128), (True, 64)):
        q, k, v, bounds, used, table, *dense, starts = batch(page, head_dim, hnd=hnd)
        said = {"causal": True, "return_attn_probs": True, "max_seqlen_k": 2048}
        found = fa2gen.flash_attn_varlen_func(q, k, v, bounds, None, seqused_k=used, block_table=table, **said)
        wanted = fa2gen.flash_attn_varlen_func(q, *dense, bounds, starts, **said)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("group", [2, 4, 8, 16])
@pytest.mark.parametrize("options", [{"causal": True}, {}, {"causal": True, "window_size": (100, 0)}], ids=str)
def test_heads_of_a_group_are_rows_of_a_tile(group, options, monkeypatch):
    """With pages of each kind; the rows that no sequence has are 0."""
    monkeypatch.setattr(launch, "PACKED_ROUNDS", 16)  # whatever it takes
    forget()
    for page, head_dim in ((16, 128), (1, 64), (64, 256)):
        q, k, v, bounds, used, table, *dense, starts = batch(page, head_dim, heads=4 * group, heads_kv=4)
        q = torch.cat([q, q[:50]])
        said = {"return_attn_probs": True, "max_seqlen_k": 2048, **options}
        found = fa2gen.flash_attn_varlen_func(q, k, v, bounds, None, seqused_k=used, block_table=table, **said)
        wanted = fa2gen.flash_attn_varlen_func(q, *dense, bounds, starts, **said)
        torch.testing.assert_close(found[0], wanted[0], atol=0.02, rtol=0.02)
        torch.testing.assert_close(found[1], wanted[1], atol=1e-3, rtol=1e-3)
        assert not found[0][-50:].any()
    forget()


def test_a_graph_is_replayed_with_other_lengths_and_tables():
    q, k, v, bounds, used, table, *_ = batch(16)
    given = [x.clone() for x in (bounds, used, table)]

    def run(bounds, used, table):
        return fa2gen.flash_attn_varlen_func(q, k, v, bounds, None, seqused_k=used, block_table=table, causal=True)

    run(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*given)
    for seed in range(5):
        order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(seed)).to("cuda")
        lengths = torch.cat([bounds.new_zeros(1), bounds.diff()[order].cumsum(0).int()])
        for x, now in zip(given, (lengths, used[order] - seed, table[order]), strict=True):
            x.copy_(now)
        graph.replay()
        assert torch.equal(out, run(*given))


@pytest.mark.parametrize("most", [1, 3])
def test_a_step_of_an_engine_runs_decoding_kernels_into_its_buffer(most):
    """As vLLM captures it: scales expanded, sequences without queries or keys behind the others."""
    _, k, v, _, used, table, *_ = batch(16)
    count = len(LENGTHS)
    q, buffer = random(count * most, 8, 128), torch.full((count * most + 8, 8, 128), 7.0, device="cuda").bfloat16()
    bounds = ints([0, *[most * min(i + 1, count - 1) for i in range(count)]])
    used = torch.cat([used[:-1], used.new_zeros(1)])
    scale = torch.ones((), device="cuda").expand(count, 2)
    given = {"cu_seqlens_q": bounds, "seqused_k": used, "max_seqlen_q": most, "max_seqlen_k": 2048, "causal": True}
    given |= {"block_table": table, "k_descale": scale, "v_descale": scale, "window_size": [-1, -1], "fa_version": 3}

    def run():
        return vllm.flash_attn_varlen_func(q, k, v, out=buffer[: len(q)], return_softmax_lse=True, **given)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run()
    buffer.fill_(7.0)
    graph.replay()
    wanted = fa2gen.flash_attn_varlen_func(
        q, k, v, bounds, None, seqused_k=used, block_table=table, causal=True, return_attn_probs=True
    )
    torch.testing.assert_close(out, wanted[0], atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse, wanted[1], atol=1e-3, rtol=1e-3)
    assert out.data_ptr() == buffer.data_ptr() and (buffer[len(q) :] == 7).all()


@pytest.mark.parametrize(
    ("options", "room"),
    [
        ({"causal": True}, serving.WIDE_BYTES),
        ({}, 7 << 20),  # one head after the other
        ({"causal": True, "window_size": [100, 0]}, 0),  # groups of queries
        ({"window_size": [100, 20]}, serving.WIDE_BYTES),
    ],
    ids=["all heads", "head by head", "groups", "not causal"],
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_prefill_over_pages_of_8_bits(dtype, options, room, monkeypatch):
    """Against 16-bit pages of the same numbers, in a graph that is replayed with other lengths."""
    monkeypatch.setattr(serving, "WIDE_BYTES", room)
    q, k, v, bounds, used, table, *_ = batch(16)
    count, step = len(LENGTHS), {torch.float8_e4m3fn: 0.5, torch.int8: 1 / 32}[dtype]
    eight = [(x / step).round().clamp(-128, 127).to(dtype) for x in (k, v)]
    scale = torch.tensor(step, device="cuda").expand(count, 2)
    given = {"max_seqlen_q": 2048, "max_seqlen_k": 2048, "block_table": table, "return_softmax_lse": True, **options}

    def run(k, v, **scales):
        return vllm.flash_attn_varlen_func(q, k, v, cu_seqlens_q=bounds, seqused_k=used, **given, **scales)

    def eighth():
        return run(*eight, k_descale=scale, v_descale=scale)

    eighth()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = eighth()
    for order in (list(range(count)), list(range(count))[::-1]):
        for x, now in ((used, used[order]), (table, table[order])):
            x.copy_(now.clone())
        graph.replay()
        wanted = run(*(x.float().mul(step).bfloat16() for x in eight))
        torch.testing.assert_close(out, wanted[0], atol=0.02, rtol=0.02)
        torch.testing.assert_close(lse, wanted[1], atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"num_splits": 4},
        {"num_splits": 4, "window_size": [200, 0], "softcap": 20.0},
        {"num_splits": 64, "window_size": [1100, 0]},  # more parts than are put together at once
    ],
    ids=["plain", "window", "parts"],
)
def test_fixed_parts_do_not_depend_on_the_batch(dtype, options):
    """60 batches of steps, of guessed tokens and of prompts: a sequence among others, and alone."""
    queries = (1, 1, 1, 1, 3, 4, 5, 40, 300)
    keys = [1, 77, 1933, 2048, 2000, 4, 1500, 40, 1999]  # of 1933 a window begins where a part does
    starts, page, pages = [0, *torch.tensor(queries).cumsum(0).tolist()], 16, 128
    q = random(sum(queries), 16, 128)
    k, v = (random(len(keys) * pages, page, 4, 128).add(i).to(dtype) for i in range(2))
    table = torch.arange(len(keys) * pages, dtype=torch.int32, device="cuda").view(-1, pages)

    def call(chosen):
        most = max(queries[b] for b in chosen)
        bounds = ints([0, *torch.tensor([queries[b] for b in chosen]).cumsum(0).tolist()])
        out, lse = vllm.flash_attn_varlen_func(
            torch.cat([q[starts[b] : starts[b] + queries[b]] for b in chosen]), k, v, most, bounds,
            max(keys[b] for b in chosen), seqused_k=ints([keys[b] for b in chosen]), block_table=table[chosen],
            causal=True, return_softmax_lse=True, **options,
        )  # fmt: skip
        return [(out[a:b], lse[:, a:b]) for a, b in itertools.pairwise(bounds.tolist())]

    alone = [call([b])[0] for b in range(len(keys))]
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        known = (4, 6, len(keys))[seed % 3]
        chosen = torch.randperm(known, generator=generator)[: 2 + seed % (known - 1)].tolist()
        for b, found in zip(chosen, call(chosen), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(found, alone[b], strict=True)), (chosen, b)


def test_rows_of_pages_that_TMA_can_not_step_over_are_copied_one_by_one():
    """Pages a third of a row further apart than their rows say, as of a cache beside other state."""
    q, k, v, bounds, used, table, *dense, starts = batch(16)
    apart = torch.empty((k.shape[0], 16 * 256 + 40), device="cuda", dtype=torch.bfloat16)
    k, v = (apart.clone()[:, : 16 * 256].view(k.shape).copy_(x) for x in (k, v))
    said = {"max_seqlen_k": 2048}
    found = fa2gen.flash_attn_varlen_func(q, k, v, bounds, None, seqused_k=used, block_table=table, **said)
    wanted = fa2gen.flash_attn_varlen_func(q, *dense, bounds, starts, **said)
    assert torch.equal(found, wanted)

"""`flash_attn_varlen_func` over pages, as CPU tensors run it, also under torch.compile."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fa2gen
from fa2gen.launch import for_few_queries, suits_decoding, with_packed_heads
from fa2gen.options import CacheShape
from fa2gen.plan import KernelPlan, make_plan
from fa2gen.select import best_spec
from fa2gen.spec import Problem

PAGE, HEADS, HEADS_KV, HEAD_DIM = 16, 4, 2, 64
QUERIES, KEYS = (5, 1, 20), (37, 100, 20)
PAGES = 7


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


BOUNDS, USED, STARTS = ints(0, 5, 6, 26), ints(*KEYS), ints(0, 37, 137, 157)


def batch():
    """(q, k and v in pages, table, k and v packed); NaN where no key is, and no page where none is needed."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    table = torch.randperm(3 * PAGES, generator=generator).view(3, PAGES).int()
    packed = [random(sum(KEYS), HEADS_KV, HEAD_DIM) for _ in range(2)]
    pages = [torch.full((3 * PAGES, PAGE, HEADS_KV, HEAD_DIM), math.nan).bfloat16() for _ in range(2)]
    for b, n in enumerate(KEYS):
        rows = torch.arange(n)
        for cache, x in zip(pages, packed, strict=True):
            cache[table[b, rows // PAGE].long(), rows % PAGE] = x[STARTS[b] : STARTS[b] + n]
        table[b, -(-n // PAGE) :] = 1 << 30
    return random(sum(QUERIES), HEADS, HEAD_DIM), *pages, table, *packed


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "window_size": (8, 0), "softcap": 20.0},
        {"s_aux": torch.arange(HEADS) / 2, "softmax_scale": 0.3},
        {"alibi_slopes": torch.arange(HEADS) / 10},
    ],
    ids=lambda options: ", ".join(options),
)
def test_pages_give_what_rows_give(options):
    q, k, v, table, *packed = batch()
    wanted = fa2gen.flash_attn_varlen_func(q, *packed, BOUNDS, STARTS, return_attn_probs=True, **options)
    for bounds_k, used_k in ((None, USED), (STARTS, None), (ints(0, 50, 150, 250), USED)):
        found = fa2gen.flash_attn_varlen_func(
            *(q, k, v, BOUNDS, bounds_k), seqused_k=used_k, block_table=table, return_attn_probs=True, **options
        )
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1]) and found[2] is None


def test_lengths_beyond_the_pages_are_theirs_and_below_0_none():
    q, k, v, table, *_ = batch()
    k, v, table = k.nan_to_num(), v.nan_to_num(), table.clamp(max=0)
    out, lse, _ = fa2gen.flash_attn_varlen_func(
        q, k, v, BOUNDS, None, seqused_k=ints(10_000, -3, 0), block_table=table, return_attn_probs=True
    )
    whole = fa2gen.flash_attn_varlen_func(q, k, v, BOUNDS, None, seqused_k=ints(*[112] * 3), block_table=table)
    assert torch.equal(out[:5], whole[:5]) and not out[5:].any() and (lse[:, 5:] == -math.inf).all()


def test_heads_of_a_group_share_tiles_where_queries_are_few():
    """On average, which shapes say: a tile has 192 rows here."""
    problem = Problem(head_dim=128, mask="causal", varlen=True, paged=True)
    sm80, sm90 = (make_plan(best_spec(problem, arch)) for arch in ("sm80", "sm90"))
    sinks = make_plan(best_spec(problem.model_copy(update={"sink": True}), "sm90"))
    assert sm90.tile_m == 192

    def shares(batch: int, queries: int, heads: int, heads_kv: int, plan: KernelPlan = sm90) -> bool:
        shape = CacheShape(batch, batch * queries, 4096, heads, heads_kv, entries=1, page_size=4096)
        return with_packed_heads(plan, shape, 16).packs_heads

    assert shares(32, 64, 32, 8) and shares(4, 256, 64, 4) and shares(4, 90, 8, 4)
    assert not shares(1, 8192, 32, 8) and not shares(8, 190, 32, 8)  # full tiles as they are
    assert not shares(1, 90, 16, 4)  # a tile for each of 16 multiprocessors as they are
    assert not shares(32, 64, 8, 8) and not shares(32, 64, 24, 8) and not shares(32, 64, 64, 2)  # groups of 1, 3 and 32
    assert not shares(32, 64, 32, 8, sm80) and not shares(32, 64, 32, 8, sinks)


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_few_queries_or_few_sequences_suit_decoding(arch):
    """One token never gets a kernel that does not split keys, and prompts that fill the device never one that reads the
    keys for each 32 rows anew."""
    sizes = (32, 8, 128, 132)
    assert all(suits_decoding(arch, batch, 1, *sizes) for batch in (1, 16, 1000))
    assert suits_decoding(arch, 1, 8, *sizes) and suits_decoding(arch, 16, 8, *sizes)
    assert not suits_decoding(arch, 1, 8192, *sizes) and not suits_decoding(arch, 16, 512, *sizes)
    # Where heads of a group have tiles of their own, and keys are in parts, a few dozen queries are prefill's.
    for batch, queries in ((1, 64), (4, 16), (2, 48), (16, 16)):
        assert suits_decoding(arch, batch, queries, *sizes) == (arch == "sm80")
        assert suits_decoding(arch, batch, queries, *sizes, may_pack=False)
    assert suits_decoding(arch, 16, 16, 28, 4, 128, 132)


def test_queries_are_laid_out_anew_only_where_prefill_does_not_split_keys():
    """It takes a dozen small kernels, longer than prefill's reading in parts. SM80's prefill has no such reading, and
    heads that can not be packed fill the device several times over."""
    heads = (32, 8, 128, 132)

    def pays(batch: int, keys: int, arch: str = "sm90", **more: bool) -> bool:
        return suits_decoding(arch, batch, 2, *heads, laid_out_keys=keys, **more)

    assert not pays(1, 32768) and not pays(64, 4096)
    assert pays(16, 4096, may_pack=False) and pays(16, 4096, arch="sm80") and not pays(1, 4096, may_pack=False)
    assert not suits_decoding("sm90", 4, 64, *heads, laid_out_keys=32768)  # many rows are prefill's as they are


def test_few_queries_of_each_have_tiles_that_they_fill():
    """As they are timed: one of 64 rows where that leaves no warpgroup idle, one of 128 where 192 would leave a second
    one of a sequence with few; none where reading keys takes as long, nor for long or other queries."""
    problem = Problem(head_dim=128, mask="causal", varlen=True, paged=True)
    plan = make_plan(best_spec(problem, "sm90"))

    def tile(batch: int, queries: int, heads: int = 32, heads_kv: int = 8, plan: KernelPlan = plan) -> tuple[int, bool]:
        shape = CacheShape(batch, batch * queries, 8192, heads, heads_kv, entries=1, page_size=8192)
        chosen, sized = for_few_queries(plan, shape, 132, keys=200)  # too few to have parts
        assert sized == shape and not chosen.has_key_parts
        return chosen.tile_m, chosen.packs_heads

    assert tile(2, 64) == tile(1, 128) == tile(2, 128) == (64, False)
    assert tile(4, 32, 64) == (64, True)
    assert tile(8, 64) == tile(16, 64) == tile(32, 64) == (128, True)
    assert tile(8, 32) == tile(8, 96) == (192, True) and tile(4, 128) == tile(8, 128) == tile(1, 1024) == (192, False)
    sinks = make_plan(best_spec(problem.model_copy(update={"sink": True}), "sm90"))
    assert tile(2, 64, 28, 4) == tile(2, 64, plan=sinks) == (64, False)  # groups of 7, and heads that can not be packed
    sizes = {d: make_plan(best_spec(problem.model_copy(update={"head_dim": d}), "sm90")) for d in (64, 192, 256)}
    assert tile(2, 128, plan=sizes[64]) == tile(2, 64, 16, 4, sizes[256]) == (64, False)
    assert tile(16, 48, 16, 4, sizes[256])[0] == 128 and tile(8, 48) == (192, True)  # in pairs not in step
    assert tile(2, 64, plan=sizes[192]) == (128, False)  # not timed
    capped = problem.model_copy(update={"score": "cap * tanh(s / cap)", "inputs": "cap: float"})
    assert tile(2, 64, plan=make_plan(best_spec(capped, "sm90")))[0] != 64


def test_of_few_sequences_keys_are_in_parts_that_fill_the_device():
    """So many blocks of threads that few multiprocessors are idle in the last round; none of many sequences, of few
    keys, or where an expression hides blocks."""
    problem = Problem(head_dim=128, mask="causal", varlen=True, paged=True)

    def work(batch: int, queries: int, keys: int, heads: int = 32, heads_kv: int = 8, arch: str = "sm90", **of: Any):
        plan = make_plan(best_spec(problem.model_copy(update=of), arch))
        shape = CacheShape(batch, batch * queries, keys, heads, heads_kv, entries=batch, page_size=keys)
        chosen, sized = for_few_queries(plan, shape, 132)
        assert chosen.has_key_parts == (sized.key_parts > 1)
        rows, heads = (queries * heads // heads_kv, heads_kv) if chosen.packs_heads else (queries, heads)
        return batch * heads * -(-rows // chosen.tile_m) * sized.key_parts, sized.key_parts

    calls = [(2, 48, 32768), (1, 128, 8192), (1, 32, 65536), (4, 24, 16384), (1, 17, 8192), (1, 256, 32768)]
    for call in [*calls, (1, 64, 8192, 28, 4)]:
        blocks, parts = work(*call)
        assert parts > 1 and blocks / 132 > 0.7 * -(-blocks // 132), call
    assert work(2, 48, 32768, head_dim=80)[1] > 1 and work(2, 48, 32768, sink=True)[1] > 1
    for call in ((16, 64, 8192), (8, 64, 8192), (1, 64, 256), (1, 8192, 8192)):
        assert work(*call)[1] == 1, call
    capped = {"score": "cap * tanh(s / cap)", "inputs": "cap: float"}
    assert work(2, 48, 32768, arch="sm80")[1] == 1 == work(2, 48, 32768, **capped)[1]


def test_it_is_one_operator_under_compile():
    q, k, v, table, *_ = batch()

    def attend(q, used, table):
        said = {"seqused_k": used, "block_table": table, "causal": True, "softcap": 3.0}
        return fa2gen.flash_attn_varlen_func(q, k, v, BOUNDS, None, max_seqlen_k=112, **said)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, USED, table), attend(q, USED, table))


def test_opcheck():
    """All of torch's checks, with an expression and without."""
    q, k, v, table, *_ = batch()
    given = (q, k.nan_to_num(), v.nan_to_num(), table.clamp(max=3 * PAGES - 1), BOUNDS, None, None, USED, None)
    slopes = ([torch.rand(HEADS)], 0.25, True, -1, -1, 0, "s - input_0[h] * j", "", "input_0: float")
    for rest in (([], 0.25, True, 8), slopes):
        found = torch.library.opcheck(torch.ops.fa2gen.fwd_paged.default, (*given, *rest))
        assert set(found.values()) == {"SUCCESS"}


def test_inputs_may_require_a_gradient_that_is_not_asked_for():
    """As in flash_attn: generation outside torch.no_grad() runs, and going backward says what there is not."""
    q, k, v, table, *_ = batch()

    def attend(q):
        return fa2gen.flash_attn_varlen_func(q, k, v, BOUNDS, None, seqused_k=USED, block_table=table)

    out = attend(q.detach().requires_grad_())
    assert torch.equal(out, attend(q))
    with pytest.raises(fa2gen.UnsupportedProblem, match="no gradient"):
        out.sum().backward()
    with pytest.raises(fa2gen.UnsupportedProblem, match="no gradient"):
        torch.func.grad(lambda q: attend(q).sum())(q)


def test_what_is_refused_is_refused_by_name():
    q, k, v, table, *_ = batch()
    refused = fa2gen.UnsupportedProblem
    with pytest.raises(refused, match="dropout over pages"):
        fa2gen.flash_attn_varlen_func(q, k, v, BOUNDS, None, dropout_p=0.1, seqused_k=USED, block_table=table)
    with pytest.raises(refused, match="vmap over pages"):
        torch.func.vmap(lambda q: torch.ops.fa2gen.fwd_paged(q, k, v, table, BOUNDS, None, None, USED, None, [], 0.1))(
            q.detach()[None]
        )

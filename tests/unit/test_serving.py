"""`fa2gen.serving` by calls as vLLM's and SGLang's attention backends make them: their keywords, shapes and layouts."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import fa2gen
from fa2gen.arch import ARCHES
from fa2gen.plan import make_plan, tiling_for_rows
from fa2gen.render import render
from fa2gen.select import best_spec
from fa2gen.serving import pages, sglang, vllm
from fa2gen.spec import Problem

HEADS, HEADS_KV, HEAD_DIM, PAGE, PAGES = 4, 2, 64, 16, 8


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


class Batch:
    """Sequences of so many queries and keys each, over pages of a cache that both tensors share."""

    def __init__(self, queries: tuple[int, ...], keys: tuple[int, ...], page: int = PAGE) -> None:
        batch = len(keys)
        cache = random(2, batch * PAGES, HEADS_KV, page, HEAD_DIM)  # heads before rows, as vLLM may keep them
        self.k, self.v = (x.transpose(1, 2) for x in cache.unbind(0))
        self.table = torch.randperm(batch * PAGES, generator=torch.Generator().manual_seed(1)).view(batch, PAGES).int()
        self.q = random(sum(queries), HEADS, HEAD_DIM)
        self.bounds = ints(0, *torch.tensor(queries).cumsum(0).tolist())
        self.keys, self.most = ints(*keys), max(queries)

    def expected(self, **options):
        """(out, lse) of packed keys."""
        parts = [
            [x[self.table[b].long()].flatten(0, 1)[:n] for b, n in enumerate(self.keys.tolist())]
            for x in (self.k, self.v)
        ]
        starts = ints(0, *self.keys.cumsum(0).tolist())
        k, v = (torch.cat(part) for part in parts)
        return fa2gen.flash_attn_varlen_func(self.q, k, v, self.bounds, starts, return_attn_probs=True, **options)[:2]


PREFILL, STEP, SPECULATIVE = ((30, 1, 17), (100, 70, 17)), ((1,) * 3, (100, 1, 57)), ((4,) * 3, (100, 4, 57))
cases = pytest.mark.parametrize("sizes", [PREFILL, STEP, SPECULATIVE], ids=["prefill", "step", "speculative"])


@pytest.fixture
def kinds(monkeypatch):
    """Which kernels calls took, in their order."""
    taken = []
    for name in ("run_cached", "over_pages"):
        function = getattr(pages, name)
        monkeypatch.setattr(
            pages, name, lambda *given, name=name, of=function, **said: (taken.append(name), of(*given, **said))[1]
        )
    return taken


def close(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], atol=0.02, rtol=0.02)
    torch.testing.assert_close(found[1], wanted[1], atol=1e-3, rtol=1e-3)
    assert found[1].shape == wanted[1].shape


def test_rows_are_whose_cu_seqlens_say(kinds):
    """Sequences of 4, 0, 1 and 3 queries, and padding, that look like two queries each; also into the caller's out."""
    batch = Batch((4, 0, 1, 3), (100, 9, 4, 57))
    batch.q = random(16, HEADS, HEAD_DIM)
    given = {"seqused_k": batch.keys, "block_table": batch.table, "cu_seqlens_q": batch.bounds, "max_seqlen_q": 4}
    given |= {"max_seqlen_k": 128, "causal": True, "return_softmax_lse": True}
    expected = batch.expected(causal=True)
    for out in (None, torch.empty(16, HEADS, HEAD_DIM).bfloat16()):
        found = vllm.flash_attn_varlen_func(batch.q, batch.k, batch.v, out=out, **given)
        close(found, expected)
        assert not found[0][8:].any() and found[1][:, 8:].isneginf().all()
    assert kinds == ["run_cached"] * 2


@cases
@pytest.mark.parametrize(
    "options",
    [{}, {"window_size": [7, 0]}, {"softcap": 20.0, "s_aux": torch.arange(4).bfloat16()}],
    ids=["plain", "window", "softcap and sinks"],
)
def test_the_decoder_of_vllm(kinds, sizes, options):
    """FlashAttentionImpl.forward: into a slice of a buffer, with scales that are expanded, and metadata."""
    batch = Batch(*sizes)
    count = len(batch.keys)
    metadata = vllm.get_scheduler_metadata(
        batch_size=count, max_seqlen_q=batch.most, max_seqlen_k=128, cache_seqlens=batch.keys, num_heads_q=HEADS,
        num_heads_kv=HEADS_KV, headdim=HEAD_DIM, page_size=PAGE, cu_seqlens_q=batch.bounds, causal=True,
        window_size=(-1, -1), num_splits=0, qkv_dtype=torch.bfloat16,
    )  # fmt: skip
    assert metadata.dtype == torch.int32 and metadata.shape == (4 * 4 + 1,)
    buffer = torch.full((len(batch.q) + 3, HEADS, HEAD_DIM), 7.0).bfloat16()
    scale = torch.tensor(1.0).expand(count, HEADS_KV)
    given = {
        "q": batch.q, "k": batch.k, "v": batch.v, "out": buffer[: len(batch.q)], "cu_seqlens_q": batch.bounds,
        "max_seqlen_q": batch.most, "seqused_k": batch.keys, "max_seqlen_k": 128, "softmax_scale": HEAD_DIM**-0.5,
        "causal": True, "alibi_slopes": None, "window_size": [-1, -1], "block_table": batch.table, "softcap": 0,
        "scheduler_metadata": metadata, "fa_version": 3, "q_descale": scale, "k_descale": scale, "v_descale": scale,
        "num_splits": 0, "s_aux": None,
    }  # fmt: skip
    out = vllm.flash_attn_varlen_func(**{**given, **options})
    assert out.data_ptr() == buffer.data_ptr() and (buffer[len(batch.q) :] == 7).all()
    close((out, torch.zeros(1)), (batch.expected(causal=True, **options)[0], torch.zeros(1)))
    assert kinds == ["over_pages" if sizes is PREFILL else "run_cached"]


def test_padding_of_a_captured_batch(kinds):
    """Sequences without queries or keys behind the others: their rows become 0."""
    batch = Batch((1, 1, 0, 0), (100, 3, 0, 0))
    batch.q = torch.cat([batch.q, torch.full((2, HEADS, HEAD_DIM), 3.0).bfloat16()])
    found = vllm.flash_attn_varlen_func(
        batch.q, batch.k, batch.v, 1, batch.bounds, 128, seqused_k=batch.keys, block_table=batch.table, causal=True,
        return_softmax_lse=True,
    )  # fmt: skip
    wanted = batch.expected(causal=True)
    close([found[0][:2], found[1][:, :2]], [wanted[0][:2], wanted[1][:, :2]])
    assert kinds == ["run_cached"] and not found[0][2:].any() and found[1][:, 2:].isneginf().all()


MIXED = ((30, 1, 0, 17, 8), (100, 70, 9, 17, 8))


@pytest.mark.parametrize(
    ("sizes", "most", "taken"),
    [
        (STEP, 1, ["run_cached"]),
        (((8, 0, 3), (100, 9, 57)), 8, ["run_cached"]),
        (MIXED, 30, ["run_cached", "over_pages"]),
        (MIXED, None, ["run_cached", "over_pages"]),
    ],
    ids=["step", "speculative", "mixed", "nobody says"],
)
@pytest.mark.parametrize("options", [{}, {"window_size": [7, 0], "softcap": 20.0}], ids=["plain", "window"])
def test_fixed_parts(kinds, sizes, most, taken, options):
    """Each sequence by kernels for its own queries, whatever the others': into the caller's buffer, and padding 0."""
    batch = Batch(*sizes)
    rows = len(batch.q)
    spare = 0 if sizes is STEP else 3
    q = torch.cat([batch.q, random(spare, HEADS, HEAD_DIM)])
    buffer = torch.full(q.shape, 7.0).bfloat16()
    out, lse = vllm.flash_attn_varlen_func(
        q, batch.k, batch.v, most, batch.bounds, 128, seqused_k=batch.keys, block_table=batch.table, causal=True,
        return_softmax_lse=True, out=buffer, num_splits=4, **options,
    )  # fmt: skip
    close((out[:rows], lse[:, :rows]), batch.expected(causal=True, **options))
    assert out is buffer and kinds == taken and not out[rows:].any() and lse[:, rows:].isneginf().all()


class EightBits(Batch):
    """Over caches of e4m3, of which these are the scales; `k` and `v` are what they stand for."""

    def __init__(self, queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
        super().__init__(queries, keys)
        of_tensors = (torch.linspace(0.25, 1.0, len(keys)), torch.full((len(keys),), 2.0))
        scales = [scale[:, None].expand(-1, HEADS_KV) for scale in of_tensors]
        eight = [x.div(2.0).to(torch.float8_e4m3fn) for x in (self.k, self.v)]
        self.given = {"k": eight[0], "v": eight[1], "k_descale": scales[0], "v_descale": scales[1], "q": self.q}
        self.given |= {"seqused_k": self.keys, "block_table": self.table, "cu_seqlens_q": self.bounds}
        self.given |= {"max_seqlen_q": self.most, "max_seqlen_k": 128, "fa_version": 3, "return_softmax_lse": True}
        for name, x, scale in zip("kv", eight, of_tensors, strict=True):
            values = x.float()
            for b, row in enumerate(self.table.long()):
                values[row] *= scale[b]
            setattr(self, name, values.bfloat16())


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (STEP, {"causal": True}),
        (((70, 1, 0, 33, 5), (100, 70, 9, 120, 3)), {"causal": True}),  # more queries than a group, than keys, and none
        (((70, 1, 0, 33, 5), (100, 70, 9, 120, 3)), {"causal": True, "window_size": [9, 0], "softcap": 20.0}),
        (((40, 2), (128, 17)), {}),
    ],
    ids=["step", "prefill", "window", "full"],
)
def test_caches_of_8_bits(kinds, sizes, options, monkeypatch):
    """By scales of each sequence, into the caller's buffer, in which rows are left that no sequence has. Where there is
    no room for wider keys, queries are in groups."""
    monkeypatch.setattr(pages, "WIDE_BYTES", 0)
    batch = EightBits(*sizes)
    rows = sum(sizes[0])
    spare = 0 if sizes is STEP else 3
    q = torch.cat([batch.q, random(spare, HEADS, HEAD_DIM)])
    buffer = torch.full((rows + spare, HEADS, HEAD_DIM), 7.0).bfloat16()
    out, lse = vllm.flash_attn_varlen_func(**{**batch.given, "q": q, "out": buffer}, **options)
    wanted = batch.expected(**options)
    assert kinds == ["run_cached"] and out.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(out[:rows], wanted[0], atol=0.05, rtol=0.05)
    torch.testing.assert_close(lse[:, :rows], wanted[1], atol=0.01, rtol=0.01)
    assert not out[rows:].any() and lse[:, rows:].isneginf().all()


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_what_fixed_parts_know_of_kernels_of_decoding(arch, head_dim):
    """One query and as many as a group of slots has are rows of one tiling; so many parts are put together at once."""
    spec = best_spec(Problem(head_dim=head_dim, dtype="bf16", direction="decode", mask="causal", paged=True), arch)
    assert spec.tiling.tile_m == pages._ROWS_OF_A_TILE
    room = ARCHES[arch].shared_memory_per_block
    for fewest, most in ((1, pages._ROWS_OF_A_TILE), (pages._ROWS_OF_A_TILE + 1, pages.SHORT_ROWS)):
        assert len({tiling_for_rows(spec.problem, spec.tiling, rows, room) for rows in range(fewest, most + 1)}) == 1
    at_once = re.findall(r"constexpr int kParts = (\w+);", render(make_plan(spec)).source)
    assert at_once == [str(pages._PARTS_AT_ONCE), "kFewParts"]


def test_fixed_parts_of_8_bits(kinds):
    """Steps, and prompts in groups."""
    batch = EightBits(MIXED[0], MIXED[1])
    out, lse = vllm.flash_attn_varlen_func(**batch.given, causal=True, num_splits=4)
    wanted = batch.expected(causal=True)
    torch.testing.assert_close(out, wanted[0], atol=0.05, rtol=0.05)
    torch.testing.assert_close(lse, wanted[1], atol=0.01, rtol=0.01)
    assert kinds == ["run_cached"] * 2


LONG = ((70, 1, 0, 33, 5), (100, 70, 9, 120, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window_size": [9, 3], "softcap": 20.0},
        {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.0, 1.0, 2.0]), "s_aux": torch.arange(4.0)},
    ],
    ids=["causal", "window", "slopes"],
)
def test_many_queries_over_8_bits(kinds, options, monkeypatch):
    """Keys are widened once, of all heads or, where that takes too much memory, of one after the other."""
    batch = EightBits(*LONG)
    wanted = batch.expected(**options)
    for parts in (1, HEADS_KV):
        monkeypatch.setattr(pages, "WIDE_BYTES", 2 * 2 * len(LONG[0]) * 640 * HEAD_DIM * HEADS_KV // parts)
        buffer = torch.full_like(batch.q, 7.0)
        out, lse = vllm.flash_attn_varlen_func(**{**batch.given, "out": buffer}, **options)
        assert out.data_ptr() == buffer.data_ptr()
        torch.testing.assert_close(out, wanted[0], atol=0.05, rtol=0.05)
        torch.testing.assert_close(lse, wanted[1], atol=0.01, rtol=0.01)
    assert kinds == ["over_pages"] * (1 + HEADS_KV)


@pytest.mark.parametrize(("kib", "num_splits"), [(1 << 20, 0), (0, 0), (1 << 20, 2)])
def test_lengths_beyond_8_bit_pages_are_what_these_hold(kib, num_splits, monkeypatch):
    """Widened, where one head's keys are too much for that, and in fixed parts."""
    monkeypatch.setattr(pages, "WIDE_BYTES", kib << 10)
    batch = EightBits((100, 3), (96, 50))
    capacity = batch.table.shape[1] * batch.given["k"].shape[1]
    call = vllm.flash_attn_varlen_func
    given = [{**batch.given, "seqused_k": ints(n, 50), "num_splits": num_splits} for n in (capacity, capacity + 24)]
    found = [call(**x, causal=True)[0] for x in given]
    assert torch.equal(*found) and found[0].isfinite().all()


def test_more_keys_than_8_bits_are_widened_of_show(monkeypatch):
    """max_seqlen_k says how much room there is; a sequence that has more gives NaN, no wrong number."""
    monkeypatch.setattr(pages, "_WIDE_ROWS", 32)
    batch = EightBits((90, 90), (100, 60))
    out, _ = vllm.flash_attn_varlen_func(**{**batch.given, "max_seqlen_k": 64}, causal=True)
    assert out[:90].isnan().all()
    torch.testing.assert_close(out[90:], batch.expected(causal=True)[0][90:], atol=0.05, rtol=0.05)


def test_what_prefill_over_8_bits_refuses(monkeypatch):
    batch = EightBits((70, 1), (100, 70))
    call = vllm.flash_attn_varlen_func
    with pytest.raises(fa2gen.UnsupportedProblem, match="num_splits=0"):
        call(**batch.given, causal=True, alibi_slopes=torch.ones(HEADS), num_splits=2)
    monkeypatch.setattr(pages, "WIDE_BYTES", 1 << 16)
    for options in ({"window_size": [9, 3]}, {"causal": True, "alibi_slopes": torch.ones(HEADS)}):
        with pytest.raises(fa2gen.UnsupportedProblem, match="max_seqlen_k"):
            call(**{**batch.given, **options})
    monkeypatch.undo()
    for name, wrong in (
        ("k_descale", torch.ones(1, HEADS_KV)),
        ("block_table", batch.table[:1]),
        ("block_table", batch.table[0]),
        ("seqused_k", ints(3)),
        ("cu_seqlens_q", ints(0, 70, 71).float()),
    ):
        with pytest.raises(fa2gen.InvalidInput, match=name):
            call(**{**batch.given, name: wrong})
    none = {"q": batch.q[:0], "cu_seqlens_q": ints(0, 0, 0)}
    assert [x.shape for x in call(**{**batch.given, **none})] == [(0, HEADS, HEAD_DIM), (HEADS, 0)]


def test_a_cascade_of_vllm():
    """A prefix that all share as one sequence, each one's own keys, and their results merged."""
    batch = Batch((1, 1, 1), (64, 50, 81))
    batch.table[:, :2] = batch.table[0, :2]
    common = 2 * PAGE
    prefix, prefix_lse = vllm.flash_attn_varlen_func(
        q=batch.q, k=batch.k, v=batch.v, cu_seqlens_q=ints(0, 3), seqused_k=ints(common), max_seqlen_q=3,
        max_seqlen_k=common, softmax_scale=HEAD_DIM**-0.5, causal=False, window_size=[-1, -1],
        block_table=batch.table[:1], softcap=0, return_softmax_lse=True, scheduler_metadata=None, fa_version=3,
        q_descale=None, k_descale=None, v_descale=None, s_aux=None, num_splits=1,
    )  # fmt: skip
    suffix, suffix_lse = vllm.flash_attn_varlen_func(
        q=batch.q, k=batch.k, v=batch.v, cu_seqlens_q=batch.bounds, seqused_k=batch.keys - common, max_seqlen_q=1,
        max_seqlen_k=128, softmax_scale=HEAD_DIM**-0.5, causal=True, window_size=[-1, -1],
        block_table=batch.table[:, 2:], softcap=0, return_softmax_lse=True, scheduler_metadata=None, fa_version=3,
        q_descale=None, k_descale=None, v_descale=None, num_splits=1,
    )  # fmt: skip
    states = [(prefix, prefix_lse.t()), (suffix, suffix_lse.t())]
    weights = torch.stack([lse for _, lse in states]).softmax(0).unsqueeze(-1)
    merged = sum(w * o.float() for w, (o, _) in zip(weights, states, strict=True))
    torch.testing.assert_close(merged.bfloat16(), batch.expected(causal=True)[0], atol=0.02, rtol=0.02)


def test_an_encoder_of_vllm():
    """Packed keys, without pages."""
    q, k, v = random(40, HEADS, HEAD_DIM), *(random(40, HEADS_KV, HEAD_DIM, seed=i) for i in range(2))
    bounds, out = ints(0, 25, 40), torch.empty_like(q)
    found = vllm.flash_attn_varlen_func(
        q=q, k=k, v=v, out=out, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=25, max_seqlen_k=25,
        softmax_scale=0.1, causal=False, alibi_slopes=None, window_size=None, softcap=0, fa_version=2,
        q_descale=None, k_descale=None, v_descale=None, num_splits=0,
    )  # fmt: skip
    assert found is out
    assert torch.equal(out, fa2gen.flash_attn_varlen_func(q, k, v, bounds, bounds, softmax_scale=0.1))


@cases
@pytest.mark.parametrize("page", [1, PAGE])
def test_sglang(kinds, sizes, page):
    """Extending and decoding: pages of one token, lengths on the device, LSE among the results."""
    batch = Batch(sizes[0], tuple(min(n, PAGES * page) for n in sizes[1]) if sizes is not PREFILL else (8, 7, 3), page)
    found = sglang.flash_attn_with_kvcache(
        q=batch.q, k_cache=batch.k, v_cache=batch.v, page_table=batch.table, cache_seqlens=batch.keys,
        cu_seqlens_q=batch.bounds, cu_seqlens_k_new=ints(0, 1, 2, 3), max_seqlen_q=batch.most,
        softmax_scale=HEAD_DIM**-0.5, causal=True, window_size=(-1, -1), softcap=0.0, k_descale=None, v_descale=None,
        return_softmax_lse=True, num_splits=0, sinks=torch.ones(HEADS),
    )  # fmt: skip
    close(found, batch.expected(causal=True, s_aux=torch.ones(HEADS)))
    assert kinds == ["over_pages" if sizes is PREFILL else "run_cached"]


def test_entries_of_a_cache_are_pages_of_packed_queries():
    batch = Batch((30, 2), (100, 90))
    k, v = (x[batch.table.long()].flatten(1, 2) for x in (batch.k, batch.v))
    found = sglang.flash_attn_with_kvcache(
        batch.q, k, v, cache_seqlens=batch.keys, cu_seqlens_q=batch.bounds, causal=True, return_softmax_lse=True
    )
    close(found, batch.expected(causal=True))
    with pytest.raises(fa2gen.InvalidInput, match="entries for 1"):
        sglang.flash_attn_with_kvcache(batch.q, k[:1], v[:1], cache_seqlens=batch.keys, cu_seqlens_q=batch.bounds)


def test_dense_queries_of_sglang_are_those_of_flash_attn():
    q, (k, v) = random(2, 3, HEADS, HEAD_DIM), (random(2, 50, HEADS_KV, HEAD_DIM, seed=i) for i in range(2))
    given = {"cache_seqlens": ints(20, 50), "causal": True}
    assert torch.equal(
        sglang.flash_attn_with_kvcache(q, k, v, **given), fa2gen.flash_attn_with_kvcache(q, k, v, **given)
    )
    new = {name: random(2, 3, HEADS_KV, HEAD_DIM, seed=i) for i, name in enumerate("kv")}
    new |= {f"rotary_{name}": random(60, 16, seed=i) for i, name in enumerate(("cos", "sin"))}
    caches = [[k.clone(), v.clone()] for _ in range(2)]
    found = sglang.flash_attn_with_kvcache(q, *caches[0], **new, **given, rotary_seqlens=given["cache_seqlens"])
    assert torch.equal(found, fa2gen.flash_attn_with_kvcache(q, *caches[1], **new, **given))
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


def test_ragged_prefill_of_sglang_is_that_of_flash_attn():
    q, k, v = random(40, HEADS, HEAD_DIM), *(random(40, HEADS_KV, HEAD_DIM, seed=i) for i in range(2))
    bounds = ints(0, 25, 40)
    found = sglang.flash_attn_varlen_func(
        q=q, k=k, v=v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=25, max_seqlen_k=25, softmax_scale=0.1,
        causal=True, return_softmax_lse=True,
    )  # fmt: skip
    wanted = fa2gen.flash_attn_varlen_func(
        q, k, v, bounds, bounds, softmax_scale=0.1, causal=True, return_attn_probs=True
    )
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"q_v": 1}, "q_v"),
        ({"dropout_p": 0.1}, "dropout_p"),
        ({"cp_world_size": 2}, "cp_world_size.*merge_states"),
        ({"return_attn_probs": True}, "return_softmax_lse"),
        ({"cu_seqlens_k": ints(0, 3)}, "one of cu_seqlens_k"),
        ({"seqused_k": None}, "one of cu_seqlens_k"),
        ({"seqused_k": None, "cu_seqlens_k": ints(0, 3)}, "block_table needs seqused_k"),
        ({"max_seqlen_q": 1.5}, "max_seqlen_q"),
        ({"out": torch.zeros(3)}, "out is"),
        ({"cu_seqlens_q": torch.tensor([0, 1])}, "cu_seqlens_q is torch.int64"),
        ({"cu_seqlens_q": torch.tensor(0).int()}, r"cu_seqlens_q has shape \(\)"),
        ({"num_splits": 1.5}, "num_splits must be"),
        ({"num_splits": 300}, "num_splits is 300"),
        ({"k_descale": 1.0}, "k_descale must be"),
    ],
    ids=str,
)
def test_what_vllm_may_not_ask_is_refused(options, words):
    batch = Batch((1,), (9,))
    given = {"seqused_k": batch.keys, "block_table": batch.table, "max_seqlen_q": 1, "cu_seqlens_q": batch.bounds}
    with pytest.raises(fa2gen.Fa2GenError, match=words):
        vllm.flash_attn_varlen_func(batch.q, batch.k, batch.v, **{**given, "max_seqlen_k": 9, **options})


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"attention_chunk": 8},
            {"qv": 1},
            {"rotary_seqlens": 1, "rotary_cos": 1},
            {"k": 1},
            {"rotary_cos": 1},
            {"cache_leftpad": 1},
        ),
        *(
            {"cache_batch_idx": torch.zeros(1)},
            {"cache_batch_idx": [0]},
            {"cache_seqlens": 7.9},
            {"cache_seqlens": True},
            {"cu_seqlens_q": ints()},
            {"page_table": [[0]]},
        ),
    ],
    ids=str,
)
def test_what_sglang_may_not_ask_is_refused(options):
    batch = Batch((1,), (9,))
    given = {"page_table": batch.table, "cache_seqlens": batch.keys, "cu_seqlens_q": batch.bounds, "max_seqlen_q": 1}
    with pytest.raises(fa2gen.Fa2GenError, match=next(iter(options))):
        sglang.flash_attn_with_kvcache(batch.q, batch.k, batch.v, **{**given, **options})


def test_the_order_of_arguments_is_that_of_the_fork():
    """The longest come before the bounds."""
    names = [*inspect.signature(vllm.flash_attn_varlen_func).parameters]
    assert names[:7] == ["q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k", "cu_seqlens_k"]

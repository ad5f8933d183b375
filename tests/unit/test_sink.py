"""Attention sinks in PyTorch, without a GPU: against softmax over one more logit in fp64, in every way of calling."""

from __future__ import annotations

import math

import pytest
import torch

from fa2gen import UnsupportedProblem
from fa2gen.ops import (
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

FWD, BWD = torch.ops.fa2gen.fwd_general.default, torch.ops.fa2gen.bwd_general.default
NO_LENGTHS = (None,) * 4
HEADS, HEADS_KV, HEAD_DIM = 4, 2, 16
SINKS = (-math.inf, 0.0, 10.0, 1e4)


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    torch.compiler.reset()


def inputs(seqlen_q=5, seqlen_k=9, heads_kv=HEADS_KV, sinks=SINKS, dtype=torch.float32):
    """q, k, v and the logits, leaves that require gradients."""
    generator = torch.Generator().manual_seed(seqlen_k)
    sizes = ((seqlen_q, HEADS), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    q, k, v = (torch.randn(2, s, h, HEAD_DIM, generator=generator).bfloat16() for s, h in sizes)
    return [x.requires_grad_() for x in (q, k, v, torch.tensor(sinks, dtype=dtype))]


def definition(q, k, v, s_aux, causal):
    """(out, lse) in fp64; a row that sees nothing, not even a sink, is to be left out."""
    q, k, v, s_aux = (x.double() for x in (q, k, v, s_aux))
    k, v = (x.repeat_interleave(HEADS // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        scores = scores.masked_fill(~seen, -math.inf)
    scores = torch.cat([s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1), scores], dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1)[..., 1:], v), scores.logsumexp(-1)


def gradients(results, leaves):
    """Of numbers that differ in every row."""
    ways = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in results]
    return torch.autograd.grad(results, leaves, ways)


def call(*leaves, **options):
    return flash_attn_func(*leaves[:3], s_aux=leaves[3], return_attn_probs=True, **options)[:2]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_k", [9, 3, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_definition(causal, seqlen_k, dtype):
    """Also in rows without keys, whose LSE is the sink."""
    sees_nothing = seqlen_k == 0 or (causal and seqlen_k < 5)
    leaves = inputs(seqlen_k=seqlen_k, sinks=(-2.0, *SINKS[1:]) if sees_nothing else SINKS, dtype=dtype)
    found, right = call(*leaves, causal=causal), definition(*leaves, causal)
    torch.testing.assert_close(found[0].double(), right[0], rtol=0.01, atol=0.01)
    torch.testing.assert_close(found[1].double(), right[1], rtol=1e-6, atol=1e-5)
    for x, y in zip(gradients(found, leaves), gradients(right, leaves), strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=0.02, atol=0.03)


@pytest.mark.parametrize("causal", [False, True])
def test_no_sink_gives_the_bits_of_a_plain_call(causal):
    *leaves, s_aux = inputs(seqlen_k=3, sinks=(-math.inf,) * HEADS)
    plain = flash_attn_func(*leaves, causal=causal, return_attn_probs=True)[:2]
    found = call(*leaves, s_aux, causal=causal)
    assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))
    *of_tensors, of_sink = gradients(found, [*leaves, s_aux])
    assert all(torch.equal(x, y) for x, y in zip(of_tensors, gradients(plain, leaves), strict=True))
    assert not of_sink.any()


def test_packed_and_ragged_functions():
    """Every function takes s_aux; two sequences of equal lengths are as a dense batch of two."""
    q, k, v, s_aux = inputs(seqlen_k=5, heads_kv=HEADS)
    right = flash_attn_func(q, k, v, s_aux=s_aux)
    qkv, kv = torch.stack([q, k, v], 2), torch.stack([k, v], 2)
    bounds = torch.tensor([0, 5, 10], dtype=torch.int32)
    rows = [x.flatten(0, 1) for x in (q, k, v, kv, qkv)]
    offsets = bounds.long()
    nested = [torch.nested.nested_tensor_from_jagged(x, offsets) for x in rows[:3]]
    for found in (
        flash_attn_qkvpacked_func(qkv, s_aux=s_aux),
        flash_attn_kvpacked_func(q, kv, s_aux=s_aux),
        flash_attn_varlen_func(*rows[:3], bounds, bounds, s_aux=s_aux),
        flash_attn_varlen_kvpacked_func(rows[0], rows[3], bounds, bounds, s_aux=s_aux),
        flash_attn_varlen_qkvpacked_func(rows[4], bounds, s_aux=s_aux),
        attention(q, k, v, s_aux=s_aux)[0],
        attention(*nested, s_aux=s_aux)[0].values(),
    ):
        assert torch.equal(found.view(right.shape), right)


def test_ragged_gradients_with_padding_and_sequences_without_keys():
    q, k, v, s_aux = inputs(seqlen_q=8, seqlen_k=6, sinks=(-3.0, 0.0, 1.0, 5.0))
    leaves = [x[0].detach().requires_grad_() for x in (q, k, v)]
    bounds_q, bounds_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 5, 6], [0, 4, 4, 6]))
    out, lse, _ = flash_attn_varlen_func(*leaves, bounds_q, bounds_k, s_aux=s_aux, return_attn_probs=True)
    assert torch.isneginf(lse[:, 6:]).all() and not out[6:].any(), "padding sees nothing, no sink either"
    assert torch.equal(lse[:, 3:5], s_aux.detach()[:, None].expand(-1, 2))
    (dout, dlse) = (torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in (out, lse))
    dout[6:], dlse[:, 6:] = math.nan, math.nan
    found = torch.autograd.grad((out, lse), [*leaves, s_aux], (dout, dlse))
    total = torch.zeros(HEADS)
    for rows, keys in ((slice(0, 3), slice(0, 4)), (slice(3, 5), slice(4, 4)), (slice(5, 6), slice(4, 6))):
        one = [x[part].unsqueeze(0) for x, part in zip(leaves, (rows, keys, keys), strict=True)]
        results = call(*one, s_aux)
        total += torch.autograd.grad(results, s_aux, (dout[rows].unsqueeze(0), dlse[:, rows].unsqueeze(0)))[0]
    torch.testing.assert_close(found[3], total, rtol=1e-5, atol=1e-5)
    assert not any(x[6:].any() for x in found[:1]) and not any(x.isnan().any() for x in found)


def test_operators_pass_torchs_checks():
    q, k, v, s_aux = inputs(sinks=(-3.0, 0.0, 1.0, 5.0))
    assert set(torch.library.opcheck(FWD, (q, k, v, *NO_LENGTHS, s_aux, None, [], 0.25, True)).values()) == {"SUCCESS"}
    q, k, v, s_aux = (x.detach() for x in (q, k, v, s_aux))
    out, lse = FWD(q, k, v, *NO_LENGTHS, s_aux, None, [], 0.25, True)
    given = (torch.randn_like(out), q, k, v, out, lse, torch.randn_like(lse), *NO_LENGTHS)
    for sinks in (s_aux, None):
        assert set(torch.library.opcheck(BWD, (*given, sinks, None, [], 0.25, True)).values()) == {"SUCCESS"}


def test_compiled_exported_and_transformed():
    leaves = inputs(sinks=(-3.0, 0.0, 1.0, 5.0))
    right = gradients(call(*leaves, causal=True), leaves)

    def attend(*leaves):
        return call(*leaves, causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(x, y) for x, y in zip(gradients(compiled(*leaves), leaves), right, strict=True))

    class Module(torch.nn.Module):
        def forward(self, *leaves):
            return attend(*leaves)

    exported = torch.export.export(Module(), tuple(leaves)).module()
    assert all(torch.equal(x, y) for x, y in zip(exported(*leaves), attend(*leaves), strict=True))
    out, pull = torch.func.vjp(attend, *(x.detach() for x in leaves))
    ways = tuple(torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in out)
    assert all(torch.equal(x, y) for x, y in zip(pull(ways), right, strict=True))
    with pytest.raises(UnsupportedProblem, match="vmap of attention with sinks"):
        torch.func.vmap(attend, in_dims=(0, 0, 0, None))(*(x.detach().unsqueeze(1) for x in leaves[:3]), leaves[3])


def test_under_autocast():
    q, k, v, s_aux = inputs(sinks=(-3.0, 0.0, 1.0, 5.0))
    leaves = [*(x.detach().float().requires_grad_() for x in (q, k, v)), s_aux]
    with torch.autocast("cpu", torch.bfloat16):
        found = call(*leaves)
    assert torch.equal(found[0], call(q, k, v, s_aux)[0])
    assert [x.dtype for x in gradients(found, leaves)] == [torch.float32] * 4

"""`attention(precise=True)`: gradients where queries give nearly all of their weight to one key."""

from unittest import mock

import pytest
import torch

from fa2gen import attention
from fa2gen.errors import UnsupportedProblem
from fa2gen.ops.precise import PreciseAttention


def self_centred(dtype=torch.bfloat16, rows=48, device="cpu"):
    """q, k, v and the gradient of out; each query gives 0.97 of its weight to its own key."""
    generator = torch.Generator().manual_seed(0)
    k, v, dout = (torch.randn(2, rows, 2, 64, generator=generator) for _ in range(3))
    k = 8 * k / k.norm(dim=-1, keepdim=True)
    return [x.to(device, dtype).requires_grad_() for x in (k, k, v)], dout.to(device, dtype)


def exact(leaves, dout, causal=False):
    """Gradients in fp64, of softmax as it is defined."""
    q, k, v = (x.detach().double().requires_grad_() for x in leaves)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool().to(scores.device), float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return torch.autograd.grad(out, (q, k, v), dout.double())


def errors(found, leaves, dout, **of_mask):
    """Mean error over mean magnitude of dq, dk and dv."""
    pairs = zip(found, exact(leaves, dout, **of_mask), strict=True)
    return [((a.double() - e).abs().mean() / e.abs().mean()).item() for a, e in pairs]


@pytest.mark.parametrize("causal", [False, True])
def test_rounding_of_the_output_leaves_the_gradients(causal):
    leaves, dout = self_centred()
    rounded = torch.autograd.grad(attention(*leaves, causal=causal)[0], leaves, dout)
    out, lse = attention(*leaves, causal=causal, precise=True)
    assert torch.equal(out, attention(*leaves, causal=causal)[0]) and lse.dtype == torch.float32
    precise = torch.autograd.grad(out, leaves, dout)
    assert [x.dtype for x in precise] == [torch.bfloat16] * 3
    dq, dk, dv = errors(precise, leaves, dout, causal=causal)
    was_dq, was_dk, _ = errors(rounded, leaves, dout, causal=causal)
    assert was_dq > 0.02 and was_dk > 0.02, "the case shows nothing"
    assert max(dq, dk, dv) < 0.004  # one rounding of the gradients themselves is 0.0014


def test_ragged_and_nested_batches():
    leaves, dout = self_centred()
    dense = torch.autograd.grad(attention(*leaves, precise=True)[0], leaves, dout)
    bounds = torch.tensor([0, 48, 96], dtype=torch.int32)
    offsets = bounds.long()
    packed = [x.detach().flatten(0, 1).requires_grad_() for x in leaves]
    out, _ = attention(*packed, cu_seqlens_q=bounds, cu_seqlens_k=bounds, precise=True)
    ragged = torch.autograd.grad(out, packed, dout.flatten(0, 1))
    jagged = [torch.nested.nested_tensor_from_jagged(x.detach().flatten(0, 1), offsets) for x in leaves]
    assert torch.equal(attention(*jagged, precise=True)[0].values(), out)
    for a, b in zip(ragged, dense, strict=True):
        assert torch.equal(a, b.flatten(0, 1))


def test_the_gradient_of_lse_is_added():
    leaves, dout = self_centred()
    out, lse = attention(*leaves, precise=True)
    both = torch.autograd.grad((out * dout).sum() + lse.sum(), leaves, retain_graph=True)
    of_lse = torch.autograd.grad(lse.sum(), leaves, retain_graph=True)
    of_out = torch.autograd.grad(out, leaves, dout)
    for a, b, c in zip(both, of_out, of_lse, strict=True):
        torch.testing.assert_close(a.float(), b.float() + c.float(), rtol=0.02, atol=2e-3)


def test_transforms_and_autocast():
    leaves, dout = self_centred()
    wanted = torch.autograd.grad(attention(*leaves, precise=True)[0], leaves, dout)
    detached = [x.detach() for x in leaves]

    def loss(q, k, v):
        return (attention(q, k, v, precise=True)[0] * dout).sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(*detached)
    one_by_one = torch.vmap(
        torch.func.grad(lambda q, g: (attention(q[None], q[None], q[None], precise=True)[0] * g).sum())
    )
    assert one_by_one(detached[0], dout).shape == dout.shape
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    full = [x.float().requires_grad_() for x in detached]
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention(*full, precise=True)
    assert out.dtype == torch.bfloat16
    for a, b in zip(torch.autograd.grad(out, full, dout), wanted, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("s_aux", {"s_aux": torch.zeros(2)}),
        ("score", {"score": "2 * s"}),
        ("dropout_p", {"dropout_p": 0.5}),
        ("arch", {"arch": "sm90"}),
    ],
)
def test_what_is_not_built_is_refused_by_name(name, other):
    leaves, _ = self_centred()
    with pytest.raises(UnsupportedProblem, match=f"beside {name} are not built"):
        attention(*leaves, precise=True, **other)


def test_lengths_beside_nested_tensors_are_refused():
    """They say them already."""
    leaves, _ = self_centred()
    bounds = torch.tensor([0, 48, 96], dtype=torch.int32)
    jagged = [torch.nested.nested_tensor_from_jagged(x.detach().flatten(0, 1), bounds.long()) for x in leaves]
    for precise in (False, True):
        with pytest.raises(UnsupportedProblem, match="q is a nested tensor"):
            attention(*jagged, cu_seqlens_q=bounds, cu_seqlens_k=bounds, precise=precise)


def test_without_gradients_nothing_is_kept():
    """Then the rounded output is asked for at once."""
    leaves, _ = self_centred()
    with torch.no_grad():
        wanted = attention(*leaves)
        with mock.patch.object(PreciseAttention, "apply", side_effect=AssertionError("parts are asked for")):
            found = attention(*leaves, precise=True)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)

"""Gradients of an expression's tensors on a GPU, by the project's rule, and as a user asks for them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fa2gen import attention, flash_attn_func, flash_attn_varlen_func
from fa2gen.errors import UnsupportedProblem
from fa2gen.options import Shape
from fa2gen.spec import Problem
from tests.gpu.test_window import ran, selected

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPES = (Shape(2, 1, 1, 2, 2), Shape(2, 113, 203, 6, 1), Shape(1, 1023, 1024, 4, 2))
SCORES = (
    ("s + bias[b, h, i, j]", "bias"),
    ("s + bias[hk, i, j] - slope[b, h] * abs(i - j)", "bias, slope"),
    ("s + far[h, bucket[abs(i - j)]] + near[i - j]", "far, near"),
    ("cap[0] * tanh((s * row[b, i] + column[h, j]) / cap[0])", "cap, row, column"),
)


@pytest.mark.parametrize(("arch", "head_dim"), list(itertools.product(("sm90", "sm80"), (64, 72, 128, 256))))
def test_tensors_learn(arch, head_dim):
    for (place, shape), (index, (score, learned)) in itertools.product(enumerate(SHAPES), enumerate(SCORES)):
        fields = {"mask": ("full", "causal", "window")[(place + index) % 3], "varlen": (place + index) % 2 == 1}
        problem = Problem(direction="bwd", head_dim=head_dim, score=score, learned=learned, **fields)
        ran(selected(arch, problem, shape.seqlen_k), shape, None)


def fp32(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Causal attention with a bias of (b, h, i, j), as it is defined."""
    k, v = (x.float().repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k) * q.shape[-1] ** -0.5 + bias
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[1] - q.shape[1])
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2), (1, 4), (1, 300), (1, 333))), ids=str)
def test_an_additive_bias(sizes):
    """Whichever of its sizes are 1, fp32 or as q is, eager and compiled."""
    q, k, v = (torch.randn(2, n, h, 64, device="cuda", dtype=torch.bfloat16) for n, h in ((300, 4), (333, 2), (333, 2)))
    dtype = torch.bfloat16 if sizes[0] == 1 else torch.float32
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(sizes, device="cuda", dtype=dtype))]
    dout = torch.randn_like(q)

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, score="s + bias[b, h, i, j]", inputs={"bias": bias})[0]

    truth = torch.autograd.grad(fp32(*leaves), leaves, dout.float())
    # A number that all keys of a row have changes nothing: what rounding O leaves, times the root of 266,400 elements.
    noise = 0.5 if sizes[-1] == 1 else 1e-3
    run = torch.compile(ours, fullgraph=True) if sizes in ((1, 4, 300, 333), (2, 1, 1, 333)) else ours
    for found, right in zip(torch.autograd.grad(run(*leaves), leaves, dout), truth, strict=True):
        assert found.dtype == right.dtype and found.shape == right.shape
        assert (found.float() - right.float()).norm() < 0.02 * right.float().norm() + noise


def test_slopes_learn():
    """alibi_slopes of both flash_attn functions, (heads,) and (batch, heads)."""
    q, k, v = (torch.randn(2, 200, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    dout = torch.randn_like(q)
    apart = (torch.arange(200)[:, None] - torch.arange(200)).abs().to("cuda", torch.float32)
    bounds = torch.tensor([0, 200, 400], dtype=torch.int32, device="cuda")
    for slopes in (torch.rand(4, device="cuda"), torch.rand(2, 4, device="cuda")):
        slopes.requires_grad_()
        (right,) = torch.autograd.grad(fp32(q, k, v, -slopes[..., None, None] * apart), slopes, dout.float())
        out = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)
        packed = (x.flatten(0, 1) for x in (q, k, v))
        ragged = flash_attn_varlen_func(*packed, bounds, bounds, 200, 200, causal=True, alibi_slopes=slopes)
        for found in (out, ragged.view_as(out)):
            (gradient,) = torch.autograd.grad(found, slopes, dout)
            assert (gradient - right).norm() < 0.02 * right.norm()


def test_in_one_order():
    q, k, v = (torch.randn(2, 500, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(2, 4, 500, 500, device="cuda", requires_grad=True)

    def gradient(given: Tensor) -> Tensor:
        said = {"score": "s + bias[b, h, i, j]", "inputs": {"bias": given}, "deterministic": True}
        return torch.autograd.grad(attention(q, k, v, **said)[0].float().square().sum(), given)[0]

    assert torch.equal(gradient(bias), gradient(bias))
    with pytest.raises(UnsupportedProblem, match="expand"):
        gradient(bias[:1].detach().requires_grad_())

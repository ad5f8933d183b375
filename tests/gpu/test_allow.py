"""Masks of expressions on a GPU, both passes, by the project's rule."""

from __future__ import annotations

import itertools

import pytest
import torch

from fa2gen import attention
from fa2gen.options import Shape
from fa2gen.spec import Problem
from tests.gpu.test_window import ran, selected

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPES = (Shape(2, 1, 1, 2, 2), Shape(2, 113, 203, 6, 1), Shape(1, 1023, 1024, 4, 2), Shape(1, 2048, 2048, 4, 1))
MASKS = (
    "i - j < width",
    "j % 7 != 2 or i // 16 == j // 16",
    "(i // 40 + j // 40) % 3 != 1",
    "h % 2 == 0 and j <= i or j < 9",
)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(("arch", "head_dim"), list(itertools.product(("sm90", "sm80"), (64, 72, 128, 256))))
def test_what_an_expression_hides(arch, head_dim, direction):
    for (place, shape), allow in itertools.product(enumerate(SHAPES), MASKS):
        fields = {"mask": ("full", "causal", "window")[(place + len(allow)) % 3], "varlen": place % 2 == 1}
        score = "cap * tanh(s / cap)" if len(allow) % 2 else ""
        problem = Problem(direction=direction, head_dim=head_dim, allow=allow, score=score, **fields)
        ran(selected(arch, problem, shape.seqlen_k), shape, None)


def test_a_call_and_its_gradients():
    """What a user types, against the reference; the window in it runs as one."""
    shape = (2, 700, 4, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    said = {"allow": "j <= i and (i - j < window or j < sinks)", "inputs": {"window": 50, "sinks": 4}}
    out, _ = attention(q, k, v, **said)
    gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    copies = [x.detach().cpu().float().requires_grad_() for x in (q, k, v)]
    i, j = torch.arange(700)[:, None], torch.arange(700)
    hidden = ~((j <= i) & ((i - j < 50) | (j < 4)))
    scores = torch.einsum("bqhd,bkhd->bhqk", copies[0], copies[1]) * 64**-0.5
    truth = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), copies[2])
    assert torch.allclose(out.float().cpu(), truth, atol=2e-2)
    for found, right in zip(gradients, torch.autograd.grad(truth.square().sum(), copies), strict=True):
        assert (found.float().cpu() - right).abs().max() < 3e-2 * right.abs().max()

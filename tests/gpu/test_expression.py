"""Expressions on a GPU: kernels by the project's rule, and the functions that they stand behind, eager and compiled."""

from __future__ import annotations

import itertools

import pytest
import torch

import fa2gen
from fa2gen import cases
from fa2gen.options import Shape
from fa2gen.select import best_spec
from fa2gen.spec import Problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SOFTCAP = "cap * tanh(s / cap)"
OTHERS = ("s + 0.01 * (j - i) * s", "s * sigmoid(s)", "where(j > i, s, 0.5 * s) - abs(i - j) / 64")
ALIBI = "s - slope[b, h] * abs(i + seqlen_k - seqlen_q - j)"
BIAS = "s + bias[b, h, i, j]"
DOCUMENTS = "document[b, i] == document[b, j]"
IMAGES = "j <= i or (image[i, b] == image[j, b] and image[i, b] > 0)"
KERNELS = [
    *(
        (SOFTCAP, *kind)
        for kind in itertools.product(("sm90", "sm80"), ("fwd", "bwd"), (64, 72, 128, 256), ("causal", "full"))
    ),
    *(
        (score, *kind)
        for score in OTHERS
        for kind in itertools.product(("sm90", "sm80"), ("fwd", "bwd"), (128,), ("window",))
    ),
]


def is_here(arch):
    if arch == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize(("score", "arch", "direction", "head_dim", "mask"), KERNELS)
def test_kernels(score, arch, direction, head_dim, mask, varlen):
    is_here(arch)
    problem = Problem(direction=direction, head_dim=head_dim, mask=mask, score=score, varlen=varlen)
    case = cases.make(best_spec(problem, arch), Shape(2, 1000, 1300, 4, 2), device="cuda", with_dlse=True)
    cases.run(case, "gpu")
    assert cases.written_outside(case) is None
    verdict = cases.verdict(case)
    assert verdict.ok, verdict


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("arch", ["sm90", "sm80"])
@pytest.mark.parametrize(
    ("score", "allow", "head_dim", "mask"),
    [
        (ALIBI, "", 128, "causal"),
        (BIAS, "", 64, "full"),
        ("", DOCUMENTS, 128, "full"),
        (SOFTCAP, DOCUMENTS, 256, "causal"),
        ("", IMAGES, 64, "full"),
        (ALIBI, "seen[b, j]", 256, "window"),
    ],
)
def test_kernels_with_tensors(score, allow, head_dim, mask, arch, direction, varlen):
    is_here(arch)
    problem = Problem(direction=direction, head_dim=head_dim, mask=mask, score=score, allow=allow, varlen=varlen)
    case = cases.make(best_spec(problem, arch), Shape(2, 1000, 1300, 4, 2), device="cuda", with_dlse=True)
    cases.run(case, "gpu")
    assert cases.written_outside(case) is None
    verdict = cases.verdict(case)
    assert verdict.ok, verdict


@pytest.mark.parametrize("slopes", [(8,), (2, 8)])
def test_alibi_of_the_function(slopes):
    """The CPU's reference is the definition: gradients too, with a cap, under a graph of its own."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, s, h, 64, generator=generator).bfloat16() for s, h in ((300, 8), (400, 2), (400, 2)))
    slopes = torch.rand(slopes, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
        out = fa2gen.flash_attn_func(*leaves, causal=True, softcap=30.0, alibi_slopes=slopes.to(device))
        results.append([x.float().cpu() for x in (out, *torch.autograd.grad(out.float().sin().sum(), leaves))])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2 * y.abs().max().item())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_row_with_one_key_has_no_gradient_under_a_cap(head_dim):
    """Its out is its value: what is left of dP - D are fp32 sums, not how P or out are rounded (0.5 and more)."""
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v, dout = (
        torch.randn(2, 300, 4, head_dim, generator=generator, device="cuda").mul_(4).bfloat16() for _ in range(4)
    )
    out = fa2gen.flash_attn_func(q.requires_grad_(), k, v, causal=True, softcap=15.0)
    assert torch.equal(out[:, 0], v[:, 0])
    (dq,) = torch.autograd.grad(out, q, dout)
    assert dq[:, 0].abs().max() < 0.01


@pytest.mark.parametrize("causal", [False, True])
def test_softcap_of_the_function(causal):
    """Against autograd of the formula in fp32; compiled, with the same bits."""
    generator = torch.Generator("cuda").manual_seed(1)
    sizes = ((500, 8), (700, 2), (700, 2))
    q, k, v = (
        torch.randn(2, s, h, 128, generator=generator, device="cuda").bfloat16().requires_grad_() for s, h in sizes
    )
    dout = torch.randn(2, 500, 8, 128, generator=generator, device="cuda").bfloat16()

    def expected():
        keys, values = (x.float().repeat_interleave(4, 2) for x in (k, v))
        scores = 20 * torch.tanh(torch.einsum("bqhd,bkhd->bhqk", q.float(), keys) * 128**-0.5 * 5 / 20)
        if causal:
            scores = scores.masked_fill(~torch.ones(500, 700, dtype=torch.bool, device="cuda").tril(200), -torch.inf)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)

    def found(q, k, v):
        return fa2gen.flash_attn_func(q, k, v, causal=causal, softcap=20.0, softmax_scale=5 * 128**-0.5)

    def with_gradients(out):
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))

    ours = with_gradients(found(q, k, v))
    for x, y in zip(ours, with_gradients(expected()), strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=2e-2, atol=2e-2 * y.float().abs().max().item())
    compiled = with_gradients(torch.compile(found, fullgraph=True)(q, k, v))
    assert torch.equal(ours[0], compiled[0]) and all(map(torch.equal, ours[2:], compiled[2:]))

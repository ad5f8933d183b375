"""Dropout on a GPU: kernels by the project's rule under the mask that the reference draws, functions, graphs."""

from __future__ import annotations

import itertools

import pytest
import torch

from fa2gen import cases, flash_attn_func, flash_attn_varlen_func
from fa2gen.options import Shape
from fa2gen.select import best_spec
from fa2gen.spec import Problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

KERNELS = list(itertools.product(("sm90", "sm80"), ("fwd", "bwd"), (64, 128, 192), ("full", "causal", "window")))


MORE = {"dense": {}, "ragged with sinks": {"varlen": True, "sink": True}, "capped": {"score": "cap * tanh(s / cap)"}}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
@pytest.mark.parametrize(("arch", "direction", "head_dim", "mask"), KERNELS)
def test_kernels(arch, direction, head_dim, mask, more):
    if arch == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    spec = best_spec(Problem(direction=direction, head_dim=head_dim, mask=mask, dropout=True, **more), arch)
    for shape in (Shape(2, 1000, 1300, 4, 2), Shape(1, 700, 300, 6, 1)):
        case = cases.make(spec, shape, device="cuda", with_dlse=True)
        cases.run(case, "gpu")
        assert cases.written_outside(case) is None
        verdict = cases.verdict(case)
        assert verdict.ok, verdict


def inputs(seqlen=600):
    generator = torch.Generator("cuda").manual_seed(seqlen)
    made = (torch.randn(2, seqlen, h, 64, generator=generator, device="cuda").bfloat16() for h in (4, 2, 2))
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize("p", [0.01, 0.17, 0.8])
def test_functions_by_the_mask(p):
    """As much is dropped as is asked for; out and gradients are those of fp64 under the mask."""
    leaves = inputs()
    out, _, mask = flash_attn_func(*leaves, p, causal=True, return_attn_probs=True)
    assert abs((mask < 0).float().mean().item() - p) < 0.01
    q, k, v = (x.double().repeat_interleave(4 // x.shape[2], 2) for x in leaves)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8
    hidden = ~torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").tril()
    probs = scores.masked_fill(hidden, -torch.inf).softmax(-1) * (mask > 0) / (1 - p)
    right = torch.einsum("bhqk,bkhd->bqhd", probs, v)
    scale = 1 / (1 - p)
    torch.testing.assert_close(out.double(), right, rtol=0.01, atol=0.01 * scale)
    way = torch.randn_like(out)
    found, expected = torch.autograd.grad(out, leaves, way), torch.autograd.grad(right, leaves, way.double())
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.03 * scale)


def test_the_generator_decides():
    leaves = inputs()
    torch.manual_seed(0)
    first, second = (flash_attn_func(*leaves, 0.2) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(flash_attn_func(*leaves, 0.2), first) and not torch.equal(first, second)
    bounds = torch.tensor([0, 600, 1200], dtype=torch.int32, device="cuda")
    torch.manual_seed(0)
    ragged = flash_attn_varlen_func(*(x.flatten(0, 1) for x in leaves), bounds, bounds, dropout_p=0.2)
    torch.testing.assert_close(ragged.view_as(first), first, rtol=0.01, atol=0.01)
    compiled = torch.compile(lambda *x: flash_attn_func(*x, 0.5), fullgraph=True)
    assert not torch.equal(compiled(*leaves), compiled(*leaves))


def test_a_graph_draws_anew():
    q, k, v = (x.detach() for x in inputs())
    flash_attn_func(q, k, v, 0.3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v, 0.3)
    found = []
    for _ in range(2):
        graph.replay()
        found.append(out.clone())
    assert not torch.equal(*found) and all(x.isfinite().all() for x in found)

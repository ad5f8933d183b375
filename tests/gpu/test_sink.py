"""Attention sinks on a GPU: kernels by the project's rule, functions against fp64, graphs, calls without keys."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fa2gen import cases, flash_attn_func, flash_attn_varlen_func
from fa2gen.options import Shape
from fa2gen.select import best_spec
from fa2gen.spec import Problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SINKS = (-math.inf, 0.0, 10.0, 1e4)
KERNELS = list(itertools.product(("sm90", "sm80"), ("fwd", "bwd"), (64, 128, 256), ("full", "causal", "window")))


def is_here(arch):
    if arch == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize(("arch", "direction", "head_dim", "mask"), KERNELS)
def test_kernels(arch, direction, head_dim, mask, varlen):
    is_here(arch)
    spec = best_spec(Problem(direction=direction, head_dim=head_dim, mask=mask, sink=True, varlen=varlen), arch)
    for shape in (Shape(2, 1000, 1300, 4, 2), Shape(1, 700, 300, 6, 1)):
        case = cases.make(spec, shape, device="cuda", with_dlse=True)
        cases.run(case, "gpu")
        assert cases.written_outside(case) is None
        verdict = cases.verdict(case)
        assert verdict.ok, verdict


def definition(q, k, v, s_aux, causal):
    q, k, v, s_aux = (x.double() for x in (q, k, v, s_aux))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(~seen.tril(scores.shape[-1] - scores.shape[-2]), -math.inf)
    scores = torch.cat([s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1), scores], dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1)[..., 1:], v), scores.logsumexp(-1)


def inputs(seqlen_q, seqlen_k, sinks=SINKS):
    generator = torch.Generator("cuda").manual_seed(seqlen_k)
    sizes = ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2))
    q, k, v = (torch.randn(2, s, h, 64, generator=generator, device="cuda").bfloat16() for s, h in sizes)
    return [x.requires_grad_() for x in (q, k, v, torch.tensor(sinks, device="cuda"))]


def gradients(results, leaves):
    ways = [torch.linspace(-1, 1, x.numel(), device="cuda").view(x.shape).to(x.dtype) for x in results]
    return torch.autograd.grad(results, leaves, ways)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_k", [600, 100, 0])
def test_functions_against_fp64(causal, seqlen_k):
    """Dense, and the same as a ragged batch of two; also rows and whole calls without keys."""
    leaves = inputs(300, seqlen_k, SINKS if seqlen_k == 600 else (-2.0, *SINKS[1:]))
    right = definition(*leaves, causal)
    right_gradients = gradients(right, leaves)

    def dense(q, k, v, s_aux):
        return flash_attn_func(q, k, v, causal=causal, s_aux=s_aux, return_attn_probs=True)[:2]

    def ragged(q, k, v, s_aux):
        bounds = [torch.tensor([0, n, 2 * n], dtype=torch.int32, device="cuda") for n in (300, seqlen_k)]
        rows = (x.flatten(0, 1) for x in (q, k, v))
        out, lse, _ = flash_attn_varlen_func(*rows, *bounds, causal=causal, s_aux=s_aux, return_attn_probs=True)
        return out.unflatten(0, (2, 300)), lse.unflatten(1, (2, 300)).transpose(0, 1)

    for way in (dense, ragged, torch.compile(dense, fullgraph=True)):
        found = way(*leaves)
        torch.testing.assert_close(found[0].double(), right[0], rtol=0.01, atol=0.01)
        torch.testing.assert_close(found[1].double(), right[1], rtol=1e-6, atol=1e-4)
        for x, y in zip(gradients(found, leaves), right_gradients, strict=True):
            most = y.abs().max().item() if y.numel() else 0.0
            torch.testing.assert_close(x.double(), y.double(), rtol=0.02, atol=0.02 * max(1.0, most))


def test_a_graph_replays_with_other_sinks():
    q, k, v, s_aux = (x.detach() for x in inputs(300, 600, (0.0, 1.0, 2.0, 3.0)))
    flash_attn_func(q, k, v, s_aux=s_aux)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v, s_aux=s_aux)
    s_aux.copy_(torch.tensor([3.0, -math.inf, 5.0, 100.0], device="cuda"))
    for _ in range(2):
        graph.replay()
        assert torch.equal(out, flash_attn_func(q, k, v, s_aux=s_aux))

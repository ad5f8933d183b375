"""Values of a head dim of their own on a GPU, both passes, by the project's rule."""

from __future__ import annotations

import itertools

import pytest
import torch

from fa2gen import cases
from fa2gen.gpus import current_device
from fa2gen.ops import flash_attn_func, flash_attn_varlen_func
from fa2gen.options import Options, Shape
from fa2gen.reference import check, check_gradients
from fa2gen.select import select
from fa2gen.spec import KernelSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# DeepSeek's, those of differential attention, panels of both widths, one panel beside several, odd multiples of 8.
PAIRS = ((192, 128), (96, 64), (64, 128), (64, 256), (256, 64), (72, 40), (8, 200), (200, 8))
SHAPES = (
    Shape(2, 1, 1, 2, 2),
    Shape(2, 113, 203, 6, 1),
    Shape(1, 203, 113, 6, 6),
    Shape(1, 1023, 1024, 4, 2),
    Shape(1, 2048, 2048, 4, 1),
)
OPTIONS = (Options(), Options(causal=True), Options(causal=True, varlen=True))
FURTHER = (Options(window_left=100, window_right=30), Options(causal=True, deterministic=True, varlen=True))


def name_of(value):
    """A test's parameter in its name."""
    return value if isinstance(value, str) else f"d{value[0]}_v{value[1]}"


KERNELS = list(itertools.product(("sm90", "sm80"), ("bf16", "fp16"), PAIRS))


def selected(arch, pair, dtype, direction, options, seqlen_k) -> KernelSpec:
    if arch == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"sm90 kernels do not run on {torch.cuda.get_device_name()}")
    problem = options.problem(direction, pair[0], dtype, pair[1])
    return select(problem, current_device(), arch, seqlen_k).plan.spec


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(("arch", "dtype", "pair"), KERNELS, ids=name_of)
def test_every_pair(arch, dtype, pair, direction):
    for options in (*OPTIONS, *(FURTHER if pair == PAIRS[0] else ())):
        if options.deterministic and direction == "fwd":
            continue
        for shape in SHAPES:
            spec = selected(arch, pair, dtype, direction, options, shape.seqlen_k)
            case = cases.make(spec, shape, options, device="cuda", with_dlse=direction == "bwd")
            cases.run(case, "gpu")
            verdict = cases.verdict(case)
            assert verdict.ok, f"{spec.name}, {shape}: {verdict}"
            assert cases.written_outside(case) is None


@pytest.mark.parametrize("pair", (*PAIRS[:4], (59, 59), (111, 111), (250, 7)), ids=name_of)
def test_what_users_call(pair):
    """Tensors that are slices of wider ones, whose rows lie apart; gradients of all three; packed sequences. Head dims
    that are no multiple of 8 are padded."""
    d, dv = pair
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 300, 4, n + 16, device="cuda").bfloat16()[..., :n].requires_grad_() for n in (d, d, dv))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert out.shape == (2, 300, 4, dv) and out.is_contiguous()
    assert check(out, lse, q, k, v, causal=True).ok
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]
    assert check_gradients(gradients, dout, q, k, v, causal=True).ok
    bounds = torch.arange(0, 900, 300, dtype=torch.int32, device="cuda")
    packed = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), bounds, bounds, causal=True)
    torch.testing.assert_close(packed, out.flatten(0, 1), rtol=0.02, atol=0.01)
    of_packed = torch.autograd.grad(packed, (q, k, v), dout.flatten(0, 1))
    assert check_gradients(of_packed, dout, q, k, v, causal=True).ok

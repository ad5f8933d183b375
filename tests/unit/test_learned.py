"""Gradients of what an expression names, as users ask for them: by autograd, torch.compile and torch.func."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fa2gen import attention, flash_attn_func, flash_attn_varlen_func
from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops.arguments import expression_of
from fa2gen.reference import Place, attention_backward_tiled, attention_tiled
from fa2gen.spec import KernelSpec, Problem

SCORE = "cap * tanh((s + bias[b, h, i, j]) / cap)"
LENGTH = 40


def tensors() -> list[Tensor]:
    """q, k, v, dout of grouped heads."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, LENGTH, heads, 16) for heads in (4, 2, 2, 4)]
    return [torch.randn(size, generator=generator).half() for size in sizes]


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A bias of all batch entries, and a cap."""
    bias = torch.randn(1, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))
    return [bias.to(dtype).requires_grad_(), torch.tensor(3.0, requires_grad=True)]


def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cap: Tensor) -> Tensor:
    return attention(q, k, v, causal=True, score=SCORE, inputs={"bias": bias, "cap": cap})[0]


def as_defined(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cap: Tensor) -> Tensor:
    k, v = (x.float().repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k) * q.shape[-1] ** -0.5
    scores = cap * torch.tanh((scores + bias) / cap)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def assert_close(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    for x, y in zip(found, truth, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert (x.float() - y.float()).norm() < 3e-3 * y.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_and_a_cap_learn(dtype):
    """In their own dtypes; beside q, k and v, and where these have no gradient."""
    *qkv, dout = tensors()
    given = inputs(dtype)
    leaves = [x.requires_grad_() for x in qkv]
    truth = torch.autograd.grad(as_defined(*leaves, *given), (*leaves, *given), dout.float())
    assert_close(torch.autograd.grad(ours(*leaves, *given), (*leaves, *given), dout), truth)
    alone = torch.autograd.grad(ours(*(x.detach() for x in leaves), *given), given, dout)
    assert_close(alone, truth[3:])
    (of_bias,) = torch.autograd.grad(ours(*qkv, given[0], given[1].detach()), given[:1], dout)
    assert_close((of_bias,), truth[3:4])


@pytest.mark.parametrize(
    ("score", "allow"),
    [
        ("s / sqrt(1 + i - j)", "j <= i"),
        ("s + gain[h] * log(1 + i - j)", "j <= i"),
        ("s + where(gain[h] > 0, sqrt(gain[h]), 0) + where(s > 0, sqrt(s), 0)", ""),
    ],
)
def test_what_is_hidden_or_not_taken_has_no_derivative(score, allow):
    """Roots and logarithms of what is not looked at have none: 0 times that is 0, not NaN."""
    *qkv, dout = tensors()
    leaves = [x.requires_grad_() for x in qkv]
    gain = torch.tensor([1.0, -1.0, 2.0, -2.0], requires_grad=True)
    of = [*leaves, gain] if "gain" in score else leaves
    out, _ = attention(*leaves, score=score, allow=allow, inputs={"gain": gain} if "gain" in score else {})
    assert all(x.isfinite().all() and x.any() for x in torch.autograd.grad(out, of, dout))


@pytest.mark.parametrize("score", ["max(s, 0)", "min(s, -s)"])
def test_of_equal_ones_the_first_has_the_gradient(score):
    """As in kernels, where autograd's own operators give each a half."""
    q, k, v, dout = (x.float() for x in tensors())
    place, options = Place(), {"expression": expression_of(score)[0]}
    out, lse = attention_tiled(torch.zeros_like(q), k, v, place=place, **options)
    dq, *_ = attention_backward_tiled(dout, torch.zeros_like(q), k, v, out, lse, place=place, **options)
    plain, *_ = attention_backward_tiled(dout, torch.zeros_like(q), k, v, out, lse)
    assert torch.allclose(dq, plain, atol=1e-6)


def test_a_second_derivative_by_a_tensor_is_refused():
    *qkv, _ = tensors()
    given = inputs()
    gradients = torch.autograd.grad(ours(*qkv, *given).float().sum(), given, create_graph=True)
    with pytest.raises(UnsupportedProblem, match="second derivative"):
        sum(x.sum() for x in gradients).backward()


def test_dropout_goes_with_tensors_that_have_no_gradient():
    *qkv, _ = tensors()
    kind = torch.rand(LENGTH, requires_grad=True)
    assert attention(*qkv, allow="kind[j] > 0.5", inputs={"kind": kind}, dropout_p=0.1)[0].isfinite().all()
    with pytest.raises(UnsupportedProblem, match="dropout"):
        attention(*qkv, score="s + kind[j]", inputs={"kind": kind}, dropout_p=0.1)


def test_compiled_and_transformed():
    *qkv, dout = tensors()
    given = inputs()
    expected = torch.autograd.grad(ours(*qkv, *given), given, dout)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(*qkv, *given), given, dout), expected)

    def loss(bias: Tensor, cap: Tensor) -> Tensor:
        return (ours(*qkv, bias, cap).float() * dout).sum()

    detached = [x.detach() for x in given]
    assert_close(torch.func.grad(loss, argnums=(0, 1))(*detached), expected)


def test_slopes_learn_dense_and_ragged():
    q, k, v, dout = tensors()
    slopes = torch.tensor([0.1, 0.2, 0.4, 0.8], requires_grad=True)
    dense = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)
    bounds = torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32)
    packed = (x.flatten(0, 1) for x in (q, k, v))
    ragged = flash_attn_varlen_func(*packed, bounds, bounds, LENGTH, LENGTH, causal=True, alibi_slopes=slopes)
    apart = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
    truth = as_defined(q, k, v, -slopes[:, None, None] * apart, torch.tensor(1e4))
    expected = torch.autograd.grad(truth, slopes, dout.float())
    for out in (dense, ragged.view_as(dense)):
        assert_close(torch.autograd.grad(out, slopes, dout), expected)


def test_what_learns_is_part_of_a_kernels_name():
    """A call whose tensors do not learn has the kernel that there was; names of tensors do not matter."""
    plain = Problem(direction="bwd", head_dim=64, score="s + a[i, j] + b_[h]")
    one, other = (plain.model_copy(update={"learned": name}) for name in ("input_0", "input_1"))
    renamed = Problem(direction="bwd", head_dim=64, score="s + x[i, j] + y[h]", learned=" x ")
    assert renamed == one and len({plain.words, one.words, other.words}) == 3
    tiling = {"arch": "sm80", "tile_m": 64, "tile_n": 64, "num_stages": 1, "num_mma_warps": 8}
    spec = KernelSpec(problem=renamed, tiling=tiling)
    assert KernelSpec.from_name(spec.name) == spec
    with pytest.raises(InvalidInput, match="forward kernels"):
        Problem(head_dim=64, score="s + x[i, j]", learned="x")


def test_an_operator_takes_tensors_of_any_strides():
    """Inductor pads the rows of what it hands over: torch.compile of a bias in bf16 was refused on a GPU."""
    q, k, v, _ = tensors()
    bias = inputs()[0].detach()
    padded = torch.empty(1, 4, LENGTH, LENGTH + 8)[..., :LENGTH].copy_(bias)
    said = {"score": "s + input_0[b, h, i, j]", "inputs": "input_0: float"}
    (out, lse), (expected, _) = (
        torch.ops.fa2gen.fwd_general(q, k, v, *[None] * 6, [x], 0.25, False, **said) for x in (padded, bias)
    )
    assert torch.equal(out, expected)
    given = (torch.ones_like(out), q, k, v, out, lse, None, *[None] * 6)
    found, right = (
        torch.ops.fa2gen.bwd_general(*given, [x], 0.25, False, **said, learned="input_0")[-1][0] for x in (padded, bias)
    )
    assert found.is_contiguous() and torch.equal(found, right)

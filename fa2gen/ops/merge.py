"""Parts of attention over different keys, put together: cascades of shared prefixes, trees of speculative tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput
from fa2gen.ops.validate import describe, refuse_non_tensors, refuse_tensor_kinds

__all__ = ["merge_states"]


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over the keys of both parts, which have none in common.

    out_a, out_b  (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim).
    lse_a, lse_b  (batch, heads, seqlen), or packed (heads, total), fp32: natural logarithms of the softmax sums.

    A part without keys has lse -inf (or +inf, as flash_attn 2 says it), and nothing of its out is looked at: the
    result is the other part's, bit for bit; of two such parts it is 0 and -inf. Sums are in fp32, out is in out_a's
    dtype. Differentiable, on any device. Raises InvalidInput for shapes that do not fit.
    """
    parts = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    refuse_non_tensors(**parts)
    refuse_tensor_kinds(parts, parts.values())
    if out_a.dim() not in (3, 4) or not out_a.is_floating_point():
        raise InvalidInput(
            f"out_a is {describe(out_a)}; it must be (batch, seqlen, heads, head_dim), or (total, heads, head_dim), "
            "floating-point"
        )
    rows = tuple(out_a.shape[:-1])
    of_lse = (*rows[:-2], rows[-1], rows[-2])
    for name, x, shape in (("out_b", out_b, tuple(out_a.shape)), ("lse_a", lse_a, of_lse), ("lse_b", lse_b, of_lse)):
        if tuple(x.shape) != shape or x.device != out_a.device or not x.is_floating_point():
            raise InvalidInput(f"{name} is {describe(x)}; it must be {shape} on {out_a.device}, floating-point")
    a, b = (lse.float().masked_fill(lse == math.inf, -math.inf) for lse in (lse_a, lse_b))
    greatest = torch.maximum(a, b)
    base = greatest.masked_fill(greatest == -math.inf, 0.0)  # (-inf) - (-inf) would be NaN
    weight_a, weight_b = torch.exp(a - base), torch.exp(b - base)
    total = weight_a + weight_b
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = (base + torch.log(total)).masked_fill(nothing, -math.inf)
    share_a, share_b = ((w / total).transpose(-1, -2).unsqueeze(-1) for w in (weight_a, weight_b))
    # A part that weighs nothing may hold anything.
    out = _weighed(out_a, share_a) + _weighed(out_b, share_b)
    return out.to(out_a.dtype), lse


def _weighed(out: Tensor, share: Tensor) -> Tensor:
    return torch.where(share == 0, 0.0, out.float()) * share

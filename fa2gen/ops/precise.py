"""Gradients of an output that was rounded, as if it were not.

The gradient of a score is P (dP - D), with D the sum of dO * O over a row (FlashAttention-2, algorithm 2). Kernels read
O in 16 bits. Where a query gives nearly all of its weight to one key, dP and D are nearly equal, and the rounding of O
is a part of their difference: for a weight of 0.95 up to a fifth of dQ. A forward kernel of a partial problem gives O
in fp32; here what rounding it loses is kept, in 16 bits too, and its sum is taken off D by way of LSE's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fa2gen.ops.autograd import by_operator

__all__ = ["PreciseAttention"]


class PreciseAttention(torch.autograd.Function):
    """(out, lse, what out lost when it was rounded) of q, k and v by `run`, of a ragged batch with its four lengths."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        run: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *lengths, options = rest
        exact, lse = run(q, k, v, *([tuple(lengths)] if lengths else []), options._replace(partial=True))
        out = exact.to(q.dtype)
        return out, lse, exact.sub_(out).to(q.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, q, k, v, *lengths, ctx.options = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(q, k, v, *output, *lengths)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, lost, *lengths = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        if dout is None:
            dout = torch.zeros_like(out)
        of_lost = (dout.float() * lost).sum(-1).movedim(-1, -2)  # heads before rows, as in lse
        dlse = -of_lost if dlse is None else dlse - of_lost
        dq, dk, dv = by_operator(dout, q, k, v, out, lse, dlse, *lengths, ctx.options)
        return None, dq, dk, dv, *(None,) * len(lengths), None

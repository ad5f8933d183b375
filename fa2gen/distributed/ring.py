"""K and V go from process to process; each adds its part to the results of its own queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from fa2gen.distributed.exchange import Pending, hop
from fa2gen.distributed.partial import Sums, forward_of, gradients_of, with_sinks
from fa2gen.distributed.plan import Split
from fa2gen.options import Options
from fa2gen.reference import sink_gradient

__all__ = ["Ring"]


class Ring(torch.autograd.Function):
    """(out, lse) of this process's rows; one message for each step of the split, and of gradients two.

    Gradients of K and V travel as fp32 sums one step behind them, and home from the last process that adds to them.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, s_aux: Any, options: Options, split: Split, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        sums = Sums(q, v)
        keys = [k, v]
        # What is not merged need not be in fp32: the kernel rounds it as it is rounded here.
        parts = [call.queries for rank in range(split.world) for call in split.of_keys_from(rank)]
        of_part = options._replace(partial=s_aux is not None or parts != [(0, q.shape[1])])
        for step, distance in _steps(split):
            coming = hop(keys, distance, group) if distance else None
            for call in split.of_keys_from((split.rank - step) % split.world):
                sums.add(call.queries, *forward_of(call, q, keys[0], keys[1], of_part))
            keys = coming.wait() if coming else keys
        out, lse = with_sinks(*sums.result(), s_aux, q.dtype)
        ctx.save_for_backward(q, k, v, s_aux, out, lse)
        ctx.set_materialize_grads(False)
        ctx.said = options._replace(partial=True), split, group
        return out, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, s_aux, out, lse = ctx.saved_tensors
        options, split, group = ctx.said
        dout = torch.zeros_like(out) if dout is None else dout.to(out.dtype)
        dq: Tensor | None = None
        keys = [k, v]
        arriving: Pending[list[Tensor]] | None = None
        for step, distance in _steps(split):
            coming = hop(keys, distance, group) if distance else None
            dk: Tensor | None = None
            dv: Tensor | None = None
            for call in split.of_keys_from((split.rank - step) % split.world):
                of_call = gradients_of(call, dout, q, keys[0], keys[1], out, lse, dlse, options)
                dq = _plus(dq, q, call.queries, of_call[0])
                dk, dv = _plus(dk, k, call.keys, of_call[1]), _plus(dv, v, call.keys, of_call[2])
            dkeys = [_plus(x, like, (0, 0), like[:, :0]) for x, like in ((dk, k), (dv, v))]
            if arriving:
                dkeys = [x.add_(before) for x, before in zip(dkeys, arriving.wait(), strict=True)]
            onwards = distance or -step % split.world
            arriving = hop(dkeys, onwards, group) if onwards else Pending(dkeys, ())
            keys = coming.wait() if coming else keys
        assert arriving is not None
        dk, dv = arriving.wait()
        dq = _plus(dq, q, (0, 0), q[:, :0])
        ds_aux = sink_gradient(dout, out, lse, dlse, s_aux) if ctx.needs_input_grad[3] else None
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), ds_aux, None, None, None


def _plus(total: Tensor | None, like: Tensor, rows: tuple[int, int], part: Tensor) -> Tensor:
    """A sum in fp32, shaped as `like`, with a part of it more."""
    if total is None:
        if rows == (0, like.shape[1]):
            return part.float()
        total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    total[:, rows[0] : rows[1]] += part
    return total


def _steps(split: Split) -> list[tuple[int, int]]:
    """(how many ranks before this one the keys at hand come from, how far they go on: 0 after the last)."""
    ends = (*split.steps[1:], split.steps[-1])
    return [(step, end - step) for step, end in zip(split.steps, ends, strict=True)]

"""K and V of the whole sequence, some heads at a time, for this process's queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from fa2gen.distributed.exchange import Pending, all_gather, all_to_all
from fa2gen.distributed.partial import forward_of, gradients_of, with_sinks
from fa2gen.distributed.plan import Split
from fa2gen.ops.validate import out_dtype
from fa2gen.options import Options
from fa2gen.reference import sink_gradient

__all__ = ["AllGather"]


class AllGather(torch.autograd.Function):
    """(out, lse) of this process's rows. Keys of the next `stride` heads travel while these are computed, and so do
    sums of their gradients; each process adds up, in the order of ranks, what all have for its rows."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        s_aux: Tensor | None,
        options: Options,
        split: Split,
        group: ProcessGroup,
        stride: int,
    ) -> tuple[Tensor, Tensor]:
        options = options._replace(partial=s_aux is not None)
        batch, rows, heads, _ = q.shape
        seen = sum(end - first for first, end in (call.queries for call in split.of_all_keys))
        make = torch.empty if seen == rows else torch.zeros
        out = make((batch, rows, heads, v.shape[3]), dtype=out_dtype(q, options), device=q.device)
        lse = q.new_full((batch, heads, rows), float("-inf"), dtype=torch.float32)
        coming = _keys_of_heads(k, v, 0, stride, group)
        for first in range(0, k.shape[2], stride):
            keys = [in_order(x.wait(), split) for x in coming]
            coming = _keys_of_heads(k, v, first + stride, stride, group)
            mine = of_heads(q, k, first, stride)
            for call in split.of_all_keys:
                found, found_lse = forward_of(call, q[:, :, mine], keys[0], keys[1], options)
                out[:, slice(*call.queries), mine] = found
                lse[:, mine, slice(*call.queries)] = found_lse
        out, lse = with_sinks(out, lse, s_aux, q.dtype)
        ctx.save_for_backward(q, k, v, s_aux, out, lse)
        ctx.set_materialize_grads(False)
        ctx.said = options._replace(partial=True), split, group, stride
        return out, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, s_aux, out, lse = ctx.saved_tensors
        options, split, group, stride = ctx.said
        dout = torch.zeros_like(out) if dout is None else dout.to(out.dtype)
        dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        coming = _keys_of_heads(k, v, 0, stride, group)
        travelling: list[tuple[int, list[Pending[Tensor]]]] = []
        for first in range(0, k.shape[2], stride):
            keys = [in_order(x.wait(), split) for x in coming]
            coming = _keys_of_heads(k, v, first + stride, stride, group)
            mine = of_heads(q, k, first, stride)
            of_rows = (out[:, :, mine], lse[:, mine], None if dlse is None else dlse[:, mine])
            parts = [x.new_zeros((split.world, *k.shape[:2], *x.shape[2:]), dtype=torch.float32) for x in keys]
            for call in split.of_all_keys:
                of_call = gradients_of(call, dout[:, :, mine], q[:, :, mine], keys[0], keys[1], *of_rows, options)
                dq[:, slice(*call.queries), mine] = of_call[0]
                _add_by_owner(parts, of_call[1:], call.keys, split)
            travelling.append((first, [all_to_all(x, group) for x in parts]))
            if len(travelling) > 1:  # those of the heads before travelled meanwhile
                _store(dk, dv, *travelling.pop(0), stride)
        for arrived in travelling:
            _store(dk, dv, *arrived, stride)
        ds_aux = sink_gradient(dout, out, lse, dlse, s_aux) if ctx.needs_input_grad[3] else None
        return dq, dk, dv, ds_aux, None, None, None, None


def of_heads(q: Tensor, k: Tensor, first: int, stride: int) -> slice:
    """The heads of q that read key heads [first, first + stride)."""
    group = q.shape[2] // k.shape[2]
    return slice(first * group, min(first + stride, k.shape[2]) * group)


def in_order(gathered: Tensor, split: Split) -> Tensor:
    """(batch, seqlen, heads, head_dim), of the rows that each process has, (W, batch, seqlen / W, heads, head_dim)."""
    if split.layout == "contiguous" and gathered.shape[1] == 1:  # they lie so already
        return gathered.flatten(0, 2)[None]
    return torch.cat([gathered[rank, :, p.at : p.at + p.end - p.start] for rank, p in split.in_order], dim=1)


def _keys_of_heads(k: Tensor, v: Tensor, first: int, stride: int, group: ProcessGroup) -> list[Pending[Tensor]]:
    if first >= k.shape[2]:
        return []
    return [all_gather(x[:, :, first : first + stride], group) for x in (k, v)]


def _add_by_owner(parts: list[Tensor], dkeys: tuple[Tensor, ...], keys: tuple[int, int], split: Split) -> None:
    """Add gradients of keys [first, end) of the sequence to their owners' parts (W, batch, seqlen / W, ...)."""
    first, end = keys
    for rank, piece in split.in_order:
        start, stop = max(first, piece.start), min(end, piece.end)
        if start < stop:
            at = piece.at + start - piece.start
            for part, gradient in zip(parts, dkeys, strict=True):
                part[rank, :, at : at + stop - start] += gradient[:, start - first : stop - first]


def _store(dk: Tensor, dv: Tensor, first: int, arriving: list[Pending[Tensor]], stride: int) -> None:
    for whole, part in zip((dk, dv), arriving, strict=True):
        whole[:, :, first : first + stride] = part.wait().sum(dim=0)

"""All rows of some heads instead of some rows of all heads: an exchange before one plain call, and one behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from fa2gen.distributed.exchange import Pending, all_to_all
from fa2gen.distributed.gather import in_order
from fa2gen.distributed.partial import forward_of, gradients_of
from fa2gen.distributed.plan import Split
from fa2gen.options import Options

__all__ = ["Ulysses"]


class Ulysses(torch.autograd.Function):
    """(out, lse) of this process's rows. The rank-th process computes the rank-th part of the heads, `stride` key heads
    of it at a time: the next ones travel there, and the results before them back, while these are computed."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options, split: Split, group: ProcessGroup, stride: int
    ) -> tuple[Tensor, Tensor]:
        parts = _Parts(split, group, k.shape[2], stride)
        batch, rows, heads, _ = q.shape
        out = q.new_empty((batch, rows, heads, v.shape[3]))
        lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
        kept: list[Tensor] = []
        back: list[tuple[int, list[Pending[Tensor]]]] = []
        coming = parts.send((q, k, v), 0)
        for first in parts.starts:
            all_q, all_k, all_v = (parts.arrived(x) for x in coming)
            coming = parts.send((q, k, v), first + stride)
            results = forward_of(split.whole, all_q, all_k, all_v, options)
            back.append((first, parts.send_back(results)))
            kept += (all_q, all_k, all_v, *results)
            if len(back) > 1:  # of the heads before
                parts.store((out, lse), *back.pop(0))
        parts.store((out, lse), *back.pop())
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.said = options, split, group, stride, q.shape, k.shape, v.shape
        return out, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        options, split, group, stride, *shapes = ctx.said
        kept = list(ctx.saved_tensors)
        parts = _Parts(split, group, shapes[1][2], stride)
        dq, dk, dv = (kept[0].new_empty(shape) for shape in shapes)
        dout = dq.new_zeros((*dq.shape[:3], dv.shape[3])) if dout is None else dout
        if dlse is None:  # in other processes it may be none
            dlse = dq.new_zeros((shapes[0][0], shapes[0][2], shapes[0][1]), dtype=torch.float32)
        given = (dout, dlse)
        back: list[tuple[int, list[Pending[Tensor]]]] = []
        coming = parts.send(given, 0)
        for first in parts.starts:
            all_dout, all_dlse = (parts.arrived(x) for x in coming)
            coming = parts.send(given, first + stride)
            all_q, all_k, all_v, all_out, all_lse, *kept = kept
            of_call = gradients_of(split.whole, all_dout, all_q, all_k, all_v, all_out, all_lse, all_dlse, options)
            back.append((first, parts.send_back(of_call)))
            if len(back) > 1:
                parts.store((dq, dk, dv), *back.pop(0))
        parts.store((dq, dk, dv), *back.pop())
        return dq, dk, dv, None, None, None, None


class _Parts:
    """Exchanges of tensors (batch, rows, heads, head_dim), and of rows (batch, heads, rows), whichever a tensor is.

    Each process has as many heads as the others: its part. Of a part some travel at a time: key heads
    [first, first + stride), and those of other tensors that go with them.
    """

    def __init__(self, split: Split, group: ProcessGroup, num_heads_kv: int, stride: int) -> None:
        self._split, self._group, self._num_heads_kv, self._stride = split, group, num_heads_kv, stride
        self.starts = range(0, num_heads_kv // split.world, stride)

    def send(self, tensors: tuple[Tensor, ...], first: int) -> list[Pending[Tensor]]:
        """Heads from `first` on of each process's part, to it; nothing behind the last."""
        return [all_to_all(self._parts_of(x, first), self._group) for x in tensors] if first in self.starts else []

    def arrived(self, x: Pending[Tensor]) -> Tensor:
        """All rows, in order, of the heads that were sent here."""
        found = x.wait()
        if found.dim() == 5:
            return in_order(found, self._split)
        return in_order(found.movedim(-1, 2).unsqueeze(-1), self._split).squeeze(-1).movedim(1, -1)

    def send_back(self, tensors: tuple[Tensor, ...]) -> list[Pending[Tensor]]:
        """To each process its rows."""
        return [all_to_all(self._rows_of_each(x), self._group) for x in tensors]

    def store(self, wholes: tuple[Tensor, ...], first: int, returned: list[Pending[Tensor]]) -> None:
        """What came back, at its heads."""
        for whole, x in zip(wholes, returned, strict=True):
            self._parts_of(whole, first).copy_(x.wait())

    def _parts_of(self, x: Tensor, first: int) -> Tensor:
        """(W, ...), a view: heads from `first` on of each process's part of x."""
        at, world = 2 if x.dim() == 4 else 1, self._split.world
        of_each = self._num_heads_kv // world
        count = min(self._stride, of_each - first)
        group = x.shape[at] // self._num_heads_kv
        parts = x.unflatten(at, (world, of_each * group))
        return parts.narrow(at + 1, first * group, count * group).movedim(at, 0)

    def _rows_of_each(self, x: Tensor) -> Tensor:
        """(W, ...): the rows of each process, of all rows."""
        at = 1 if x.dim() == 4 else 2
        world, shape = self._split.world, list(x.shape)
        shape[at] //= world
        found = x.new_empty((world, *shape))
        for rank, p in self._split.in_order:
            rows = p.end - p.start
            found[rank].narrow(at, p.at, rows).copy_(x.narrow(at, p.start, rows))
        return found

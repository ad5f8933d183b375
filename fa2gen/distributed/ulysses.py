"""All rows of some heads instead of some rows of all heads: an exchange before one plain call, and one behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from fa2gen.distributed.exchange import Pending, swap
from fa2gen.distributed.partial import forward_of, gradients_of, with_sinks
from fa2gen.distributed.plan import Split
from fa2gen.layout import CHUNK_BYTES, align_up
from fa2gen.options import Options
from fa2gen.reference import sink_gradient

__all__ = ["Ulysses"]


class Ulysses(torch.autograd.Function):
    """(out, lse) of this process's rows. The rank-th process computes the rank-th part of the heads, `stride` key heads
    of it at a time: the next ones travel there, and the results before them back, while these are computed."""

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
        parts = _Parts(split, group, k.shape[2], stride)
        batch, rows, heads, _ = q.shape
        out = q.new_empty((batch, rows, heads, v.shape[3]), dtype=q.dtype)
        lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
        kept: list[Tensor] = []
        back: list[tuple[int, list[_Arriving]]] = []
        coming = parts.send((q, k, v), 0)
        for first in parts.starts:
            arriving, coming = coming, parts.send((q, k, v), first + stride)
            all_q, all_k, all_v = arriving.wait()
            sinks = None if s_aux is None else s_aux[parts.heads(heads, first)]
            unrounded = options._replace(partial=sinks is not None)
            results = with_sinks(*forward_of(split.whole, all_q, all_k, all_v, unrounded), sinks, q.dtype)
            back.append((first, parts.send_back(results)))
            kept += (all_q, all_k, all_v, *results)
            if len(back) > 1:  # of the heads before
                parts.store((out, lse), *back.pop(0))
        parts.store((out, lse), *back.pop())
        ctx.save_for_backward(s_aux, *kept)
        ctx.set_materialize_grads(False)
        ctx.said = options, split, group, stride, q.shape, k.shape, v.shape
        return out, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        options, split, group, stride, *shapes = ctx.said
        s_aux, *kept = ctx.saved_tensors
        parts = _Parts(split, group, shapes[1][2], stride)
        dq, dk, dv = (kept[0].new_empty(shape) for shape in shapes)
        dout = dq.new_zeros((*dq.shape[:3], dv.shape[3])) if dout is None else dout.to(dq.dtype)
        if dlse is None:  # in other processes it may be none
            dlse = dq.new_zeros((shapes[0][0], shapes[0][2], shapes[0][1]), dtype=torch.float32)
        # Of all rows, for the heads of this process's part.
        ds_aux = torch.zeros_like(s_aux) if ctx.needs_input_grad[3] else None
        back: list[tuple[int, list[_Arriving]]] = []
        coming = parts.send((dout, dlse), 0)
        for first in parts.starts:
            arriving, coming = coming, parts.send((dout, dlse), first + stride)
            all_dout, all_dlse = arriving.wait()
            all_q, all_k, all_v, all_out, all_lse, *kept = kept
            of_call = gradients_of(split.whole, all_dout, all_q, all_k, all_v, all_out, all_lse, all_dlse, options)
            back.append((first, parts.send_back(of_call)))
            if ds_aux is not None:
                mine = parts.heads(len(ds_aux), first)
                ds_aux[mine] = sink_gradient(all_dout, all_out, all_lse, all_dlse, s_aux[mine])
            if len(back) > 1:
                parts.store((dq, dk, dv), *back.pop(0))
        parts.store((dq, dk, dv), *back.pop())
        return dq, dk, dv, ds_aux, None, None, None, None


class _Arriving(NamedTuple):
    """Tensors of which the first piece of each process's rows comes first."""

    tensors: list[Tensor]
    works: list[Pending[Sequence[Tensor]]]

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.tensors


class _Parts:
    """Exchanges of tensors (batch, rows, heads, head_dim), and of rows (batch, heads, rows), whichever a tensor is.

    Each process has as many heads as the others: its part. Of a part some travel at a time: key heads [first, first +
    stride), and those of other tensors that go with them. Tensors that are sent together travel side by side, each
    piece of rows in an exchange of its own, so that one is packed while another travels. Rows come to where
    they stand in the sequence; nothing is copied but what is packed before an exchange, and stored behind one.
    """

    def __init__(self, split: Split, group: ProcessGroup, num_heads_kv: int, stride: int) -> None:
        self._split, self._group, self._num_heads_kv, self._stride = split, group, num_heads_kv, stride
        self.starts = range(0, num_heads_kv // split.world, stride)
        rows, count = split.rows // split.world, len(split.equal_pieces[0])
        self._pieces = [slice(at, at + rows // count) for at in range(0, rows, rows // count)]

    def send(self, tensors: Sequence[Tensor], first: int) -> _Arriving:
        """Heads from `first` on of each process's part, to it: what comes is all rows of those of this one's. Nothing
        behind the last."""
        if first not in self.starts:
            return _Arriving([], [])
        split, parts = self._split, [self._parts_of(x, first) for x in tensors]
        world, rows, batch = parts[0].shape[:3]
        bounds = list(accumulate((align_up(x[0, 0, 0].nbytes, CHUNK_BYTES) for x in parts), initial=0))
        packed = parts[0].new_empty((world, rows, batch, bounds[-1]), dtype=torch.uint8)
        found = packed.new_empty((split.rows, batch, bounds[-1]))
        pairs = list(zip(parts, _columns(packed, parts, bounds), strict=True))
        works = []
        for at, to_each, from_each in zip(self._pieces, self._for_each(packed), self._of_each(found), strict=True):
            for x, place in pairs:
                _copy(place[:, at], x[:, at])
            works.append(swap(to_each, from_each, self._group))
        return _Arriving([_rows_within(x) for x in _columns(found, parts, bounds)], works)

    def send_back(self, tensors: Sequence[Tensor]) -> list[_Arriving]:
        """To each process its rows: (W, rows, ...) of all heads comes."""
        return [self._send_back(_rows_first(x).contiguous()) for x in tensors]

    def _send_back(self, x: Tensor) -> _Arriving:
        found = x.new_empty((self._split.world, self._split.rows // self._split.world, *x.shape[1:]))
        sides = zip(self._of_each(x), self._for_each(found), strict=True)
        return _Arriving([found], [swap(to_each, from_each, self._group) for to_each, from_each in sides])

    def store(self, wholes: Sequence[Tensor], first: int, returned: Sequence[_Arriving]) -> None:
        """What came back, at its heads."""
        for whole, arriving in zip(wholes, returned, strict=True):
            (found,) = arriving.wait()
            _copy(self._parts_of(whole, first), found)

    def _of_each(self, x: Tensor) -> Iterator[list[Tensor]]:
        """Of a tensor of all rows, as they stand in the sequence: the first pieces of all processes, the second ones
        and so on."""
        order = self._split.equal_pieces
        pieces = x.chunk(len(order) * len(self._pieces))
        return ([pieces[number] for number in numbers] for numbers in zip(*order, strict=True))

    def _for_each(self, x: Tensor) -> Iterator[list[Tensor]]:
        """Of a tensor (W, rows, ...), which has a part with this process's rows for each: likewise."""
        return ([part[at] for part in x] for at in self._pieces)

    def heads(self, num_heads: int, first: int) -> slice:
        """Of so many heads those that this process computes, from key head `first` of its part on."""
        of_each, group = self._num_heads_kv // self._split.world, num_heads // self._num_heads_kv
        before = self._split.rank * of_each
        return slice((before + first) * group, (before + min(first + self._stride, of_each)) * group)

    def _parts_of(self, x: Tensor, first: int) -> Tensor:
        """(W, rows, batch, heads, ...), a view: heads from `first` on of each process's part of x."""
        x = _rows_first(x)
        of_each = self._num_heads_kv // self._split.world
        count = min(self._stride, of_each - first)
        group = x.shape[2] // self._num_heads_kv
        parts = x.unflatten(2, (self._split.world, of_each * group))
        return parts.narrow(3, first * group, count * group).movedim(2, 0)


def _rows_first(x: Tensor) -> Tensor:
    """(rows, batch, heads, ...), a view, so that rows in a row are one piece of memory."""
    return x.transpose(0, 1) if x.dim() == 4 else x.movedim(-1, 0)


def _rows_within(x: Tensor) -> Tensor:
    """The inverse of `_rows_first`."""
    return x.transpose(0, 1) if x.dim() == 4 else x.movedim(0, -1)


def _columns(packed: Tensor, like: list[Tensor], bounds: list[int]) -> list[Tensor]:
    """What lies side by side in rows of bytes: views (..., heads, head_dim) with the sizes and dtypes of these."""
    sizes = [(x.dtype, x.shape[3:], x[0, 0, 0].nbytes) for x in like]
    places = (packed[..., first : first + size[2]] for first, size in zip(bounds, sizes, strict=False))
    return [x.view(dtype).unflatten(-1, shape) for x, (dtype, shape, _) in zip(places, sizes, strict=True)]


def _copy(into: Tensor, x: Tensor) -> None:
    """8 bytes an element, where rows are made of such: of 2 bytes each a strided copy takes longer."""
    step = 8 // x.element_size()
    numbers = (n for one in (into, x) for n in (one.shape[-1], one.storage_offset(), *one.stride()[:-1]))
    if into.stride(-1) == x.stride(-1) == 1 and not any(n % step for n in numbers):
        into, x = into.view(torch.int64), x.view(torch.int64)
    into.copy_(x)

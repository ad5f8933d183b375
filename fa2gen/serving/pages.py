"""A ragged batch over pages, by the kernels that suit how many queries its sequences have."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops.arguments import Modified, whole
from fa2gen.ops.flash_kvcache import run_cached
from fa2gen.ops.flash_varlen import over_pages
from fa2gen.ops.validate import describe
from fa2gen.ops.validate_cache import CACHE_DTYPES, Cached, Paged
from fa2gen.options import Options

__all__ = ["SHORT_ROWS", "attend", "refuse"]

SHORT_ROWS = 64
"""Queries of a sequence times heads of a group, up to which kernels of decoding read the cache: they split its keys
over the device, where a block of prefill's 128 to 256 rows would be mostly empty."""


def attend(
    given: Paged,
    options: Options,
    expression: Modified,
    most_queries: Any,
    most_keys: Any = None,
    num_splits: int = 0,
    out: Tensor | None = None,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """(out, lse): out (total_q, heads, head_dim), the caller's if it is given; lse (heads, total_q) fp32.

    most_queries  of a sequence. Where the rows of q are just so many for each, kernels of decoding may run. Of one
                  query each, row b is then taken to be sequence b's, as engines lay them out, with sequences that have
                  none, which pad a batch, behind the others; of more, cu_seqlens_q says whose each row is.
    scales        of k and v, where they are of 8 bits: (batch, heads_kv) fp32, of any strides.
    """
    most = _number("max_seqlen_q", most_queries)
    if out is not None:
        _validate_out(out, given)
    place = out if out is not None and out.is_contiguous() and not (out.is_cuda and out.data_ptr() & 15) else None
    if most and _is_short(given, most):
        found, lse = _decoded(given, options, expression, most, num_splits, scales, place)
    elif given.k.dtype in CACHE_DTYPES:
        raise UnsupportedProblem(
            f"pages of {given.k.dtype} are read by kernels of decoding alone, for at most {SHORT_ROWS} rows (queries "
            "of a sequence times heads of a group), and as many queries of each; nearest: prefill from 16-bit keys"
        )
    else:
        rows, heads = given.q.shape[0], given.q.shape[-2]
        into = None if place is None else (place, place.new_empty((heads, rows), dtype=torch.float32))
        found, lse = over_pages(given, options, expression, most_keys, into)
    return (found if out is None or place is not None else out.copy_(found)), lse


def refuse(**named: Any) -> None:
    """Raise UnsupportedProblem, by name, for what is not built: each with whether it is asked for, and the nearest."""
    for name, (asked, nearest) in named.items():
        if asked:
            raise UnsupportedProblem(f"{name} is not built; nearest: {nearest}")


def _is_short(given: Paged, most: int) -> bool:
    q, k, v = given[:3]
    if q.dim() != 3 or k.dim() != 4 or v.shape != k.shape or given.cu_seqlens_q is None or given.seqused_k is None:
        return False
    rows = most * (q.shape[1] // max(k.shape[2], 1))  # of a head of K and V
    return bool(rows <= SHORT_ROWS and q.shape[0] == most * (given.cu_seqlens_q.shape[0] - 1))


def _decoded(
    given: Paged,
    options: Options,
    expression: Modified,
    most: int,
    num_splits: int,
    scales: tuple[Tensor | None, Tensor | None],
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    found, tensors = expression
    whose = None
    if most > 1:
        assert given.cu_seqlens_q is not None
        whose = _Rows(given.cu_seqlens_q, most, given.q.shape[0])
    q = given.q[whose.of_slots] if whose else given.q.unflatten(0, (-1, most))
    cached = Cached(
        *(q, given.k, given.v),
        cache_seqlens=given.seqused_k,
        block_table=given.block_table,
        s_aux=given.s_aux,
        k_descale=scales[0],
        v_descale=scales[1],
        tensors=tensors,
    )
    into = None if out is None or whose else out.view(q.shape)
    o, lse = run_cached(cached, options._replace(varlen=False, expression=found), True, num_splits, into)
    o, lse = o.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    if whose:
        o = o[whose.slots].masked_fill_(whose.unused[:, None, None], 0)
        lse = lse[:, whose.slots].masked_fill_(whose.unused, -math.inf)
        return (o if out is None else out.copy_(o)), lse
    return (o if out is None else out), lse


class _Rows:
    """Where the rows of a ragged batch are among `most` slots for each sequence, whose queries end at its last slot.

    of_slots  (batch, most): the row in each slot; of a slot that no query has, any row.
    slots     (rows,): the slot of each row.
    unused    (rows,): whether no sequence has it.
    """

    def __init__(self, cu_seqlens_q: Tensor, most: int, rows: int) -> None:
        ends = cu_seqlens_q[1:].long()
        firsts = ends - most  # of the rows that a sequence's slots would be, if it filled them
        slots = torch.arange(most, device=ends.device)
        self.of_slots = (firsts[:, None] + slots).clamp_(0, rows - 1)
        row = torch.arange(rows, device=ends.device)
        sequence = torch.searchsorted(ends, row, right=True).clamp_(max=len(ends) - 1)
        self.slots = (sequence * most + row - firsts[sequence]).clamp_(0, rows - 1)
        self.unused = row >= ends[-1]


def _validate_out(out: Tensor, given: Paged) -> None:
    wanted = (*given.q.shape[:-1], given.v.shape[-1])
    if not isinstance(out, Tensor) or out.shape != wanted or out.dtype != given.q.dtype or out.device != given.q.device:
        raise InvalidInput(f"out is {describe(out)}; it must be {wanted} {given.q.dtype} on {given.q.device}")


def _number(name: str, given: Any) -> int:
    if given is None:
        return 0
    number = whole(given)
    if number is None:
        raise InvalidInput(f"{name} must be a whole number, not {describe(given)}")
    return number

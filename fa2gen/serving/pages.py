"""A ragged batch over pages, by the kernels that suit how many queries its sequences have."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops.arguments import Modified
from fa2gen.ops.flash_kvcache import run_cached
from fa2gen.ops.flash_varlen import over_pages
from fa2gen.ops.validate import describe
from fa2gen.ops.validate_cache import Cached, Paged, validate_paged
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
) -> tuple[Tensor, Tensor]:
    """(out, lse): out (total_q, heads, head_dim), the caller's if it is given; lse (heads, total_q) fp32.

    most_queries  of a sequence. Where the rows of q are just so many for each, they are taken to be each sequence's, as
                  engines lay them out: sequences that have fewer, which pad a batch, stand behind the others.
    """
    most = _number("max_seqlen_q", most_queries)
    if out is not None:
        _validate_out(out, given)
    if most and _is_short(given, most):
        found, lse = _decoded(given, options, expression, most, num_splits)
    elif out is not None and out.is_contiguous():
        into = (out, out.new_empty((given.q.shape[-2], given.q.shape[0]), dtype=torch.float32))
        return over_pages(given, options, expression, most_keys, into)
    else:
        found, lse = over_pages(given, options, expression, most_keys)
    return (found if out is None else out.copy_(found)), lse


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


def _decoded(given: Paged, options: Options, expression: Modified, most: int, num_splits: int) -> tuple[Tensor, Tensor]:
    batch = validate_paged(given)
    q = given.q
    found, tensors = expression
    cached = Cached(
        q.unflatten(0, (batch, most)),
        *(given.k, given.v),
        cache_seqlens=given.seqused_k,
        block_table=given.block_table,
        s_aux=given.s_aux,
        tensors=tensors,
    )
    out, lse = run_cached(cached, options._replace(varlen=False, expression=found), True, num_splits)
    return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)


def _validate_out(out: Tensor, given: Paged) -> None:
    wanted = (*given.q.shape[:-1], given.v.shape[-1])
    if not isinstance(out, Tensor) or out.shape != wanted or out.dtype != given.q.dtype or out.device != given.q.device:
        raise InvalidInput(f"out is {describe(out)}; it must be {wanted} {given.q.dtype} on {given.q.device}")


def _number(name: str, given: Any) -> int:
    if given is None:
        return 0
    try:
        return -1 if isinstance(given, bool) else index(given)
    except TypeError:
        raise InvalidInput(f"{name} must be a whole number, not {describe(given)}") from None

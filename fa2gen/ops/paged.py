"""Ragged batches whose keys lie in pages, on CUDA and in plain PyTorch: prefill, and chunks of it, over a cache.

Lengths and the table of pages are read by the kernels, as those of `fa2gen.ops.kvcache` are: a CUDA graph may be
replayed with others. Pages are never copied.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput
from fa2gen.launch import MAX_SEQLEN
from fa2gen.ops.call import (
    Call,
    address_of,
    aligned,
    are_aligned,
    contiguous,
    dense,
    kernel_for_pages,
    launch_with_scratch,
    prepared,
    signature_of,
)
from fa2gen.ops.validate import DTYPES, out_shape, validate_expression, validate_options
from fa2gen.ops.validate_cache import Paged, validate_paged
from fa2gen.options import CacheShape, Options, Queries
from fa2gen.reference import attention_ragged

__all__ = ["checked_paged", "paged_cuda", "paged_reference"]


def paged_cuda(
    given: Paged,
    tensors: Sequence[Tensor],
    options: Options,
    max_keys: int | None = None,
    into: tuple[Tensor, Tensor] | None = None,
    queries: Queries = "uneven",
) -> tuple[Tensor, Tensor]:
    """(out, lse) by a generated kernel, on the current stream of q's device; `into` are the buffers to use.

    tensors   that the expression of the options names, in the order of its inputs.
    max_keys  of the longest sequence, if that is known: it decides which kernel is the quickest, nothing else.
    queries   the same; they are "even" where no cu_seqlens_q are given, but for "any".

    out like q, with v's head dim; lse (heads, total_q) fp32; both contiguous. Raises as
    `fa2gen.ops.call.forward_cuda` does.
    """
    keys = None if max_keys is None else 1 << max(max_keys - 1, 0).bit_length()  # few kinds
    key = ("paged", *map(signature_of, (*given, *tensors)), options, keys, queries)
    call = prepared(key, _prepare, given, tensors, options, keys, queries)
    q = given.q
    out, lse = into or call.new_results(q)
    if call.launch is None and not call.misaligned:  # no query
        out.zero_()
        lse.fill_(-math.inf)
        return out, lse
    if call.launch is None or q.data_ptr() & 15 or out.data_ptr() & 15:
        room = call.new_out(q)
        paged_cuda(given._replace(q=aligned(q)), tensors, options, max_keys, (room, lse), queries)
        out.copy_(room)
        return out, lse
    operands = {name: address_of(x) for name, x in given._asdict().items()}
    if (operands["k"] | operands["v"]) & 15:
        raise InvalidInput(
            "pages lie on an address that is no multiple of 16 bytes, and are never copied: begin a slice of a cache "
            "on a multiple of 8 elements"
        )
    operands |= {"o": out.data_ptr(), "lse": lse.data_ptr()}
    launch_with_scratch(call, q, (*(operands[name] for name in call.operands), *(x.data_ptr() for x in tensors)))
    return out, lse


def paged_reference(given: Paged, tensors: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) of `paged_cuda`, on any device; lengths are read."""
    checked_paged(given, tensors, options)
    counts = [given.capacity] * given.block_table.shape[0]
    if given.cu_seqlens_k is not None:
        counts = [end - first for first, end in itertools.pairwise(given.cu_seqlens_k.tolist())]
    if given.seqused_k is not None:
        counts = [min(count, used) for count, used in zip(counts, given.seqused_k.tolist(), strict=False)]
    counts = [min(max(count, 0), given.capacity) for count in counts]
    size = given.k.shape[1]
    pages = [row[: -(-count // size)].long() for row, count in zip(given.block_table, counts, strict=False)]
    k, v = (
        torch.cat(
            [x[:0, 0], *(x[p.clamp(0, len(x) - 1)].flatten(0, 1)[:n] for p, n in zip(pages, counts, strict=False))]
        )
        for x in (given.k, given.v)
    )
    bounds = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    lengths = (given.cu_seqlens_q, bounds, given.seqused_q, None)
    with torch.autocast(given.q.device.type, enabled=False):
        return attention_ragged(given.q, k, v, *lengths, tensors, s_aux=given.s_aux, **options._asdict())


def checked_paged(given: Paged, tensors: Sequence[Tensor], options: Options) -> int:
    """`validate_paged` of a call, and of its options and the tensors of their expression."""
    sequences = validate_paged(given)
    validate_options(options)
    validate_expression(given.q, given.k.flatten(0, 1), sequences, tensors, options)
    return sequences


def _prepare(given: Paged, tensors: Sequence[Tensor], options: Options, keys: int | None, queries: Queries) -> Call:
    """Validate a signature; choose, load and pack its kernel."""
    sequences = checked_paged(given, tensors, options)
    q, k, v, table = given[:4]
    rows = (q if q.dim() == 3 else q.flatten(0, 1)).unsqueeze(0)
    _, total_q, num_heads, _ = rows.shape
    shape = CacheShape(
        batch=sequences,
        seqlen_q=total_q,
        seqlen_k=given.capacity,
        num_heads=num_heads,
        num_heads_kv=k.shape[2],
        entries=k.shape[0],
        page_size=k.shape[1],
        table_rows=table.shape[0],
        table_stride=table.stride(0),
    )
    most_queries = MAX_SEQLEN if queries == "any" else total_q
    options = options._replace(varlen=True, sink=given.s_aux is not None).reduced(most_queries, given.capacity)
    problem = options.problem("fwd", q.shape[-1], DTYPES[q.dtype], v.shape[-1], paged=True)
    caches = {"k": k.stride()[:3], "v": v.stride()[:3]}
    longest = given.capacity if keys is None else min(keys, given.capacity)
    if queries == "uneven" and given.cu_seqlens_q is None:
        queries = "even"
    kernel, shape = kernel_for_pages(problem, q.get_device(), longest, shape, caches, queries)
    empty = 0 in (sequences, total_q, num_heads)
    launch = None
    if not empty and are_aligned(rows.shape, rows.stride()):
        of_out = dense(total_q, num_heads, v.shape[-1])
        launch = kernel.prepare(shape, {**caches, "q": rows.stride()[:3], "o": of_out}, options)
    return Call(
        device=q.get_device(),
        out=contiguous(out_shape(q, v)),
        lse=contiguous((num_heads, total_q)),
        num_rows=0,
        launch=launch,
        misaligned=launch is None and not empty,
        operands=tuple(operand.name for operand in kernel.plan.operands if not operand.is_input),
    )

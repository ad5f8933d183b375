"""Queries over a cache of keys and values on CUDA: from tensors to launches, without a look at what lengths are.

As in `fa2gen.ops.call`: what a call's signature decides is prepared once. Lengths, tables of pages and how many keys
the caches hold now are read by the kernels, so that a cache that grows has one signature, and a CUDA graph may be
replayed with other lengths. They must not change while a call's kernels run.

New keys and values are written by a small kernel of the same source that runs before. Where so many queries are to see
the keys that splitting those does not pay, the queries are left to kernels of prefill (`suits_decoding`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import cast

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput
from fa2gen.ops.call import (
    AnyOptions,
    Call,
    aligned,
    are_aligned,
    calls_for_decoding,
    contiguous,
    dense,
    kernel_for_rows,
    launch_with_scratch,
    prepared,
    remembered,
    room_of_stream,
    signature_of,
)
from fa2gen.ops.paged import paged_cuda
from fa2gen.ops.validate import DTYPES, validate_options
from fa2gen.ops.validate_cache import Cached, Paged, cache_dtype_of, capacity_of, validate_cached
from fa2gen.options import CacheShape, Options, split_shift
from fa2gen.spec import SAME

__all__ = ["cached_cuda", "read_out"]

_INPUTS = ("q", "k", "v", "rotary_cos", "rotary_sin")  # what is copied where a kernel cannot read it as it lies


def cached_cuda(
    given: Cached, options: AnyOptions, interleaved: bool = True, num_splits: int = 0, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) by generated kernels, on the current stream of q's device; new keys are in the caches then.

    out like q, contiguous; lse (batch, heads, seqlen_q) fp32.
    into  a buffer for out, contiguous, on a multiple of 16 bytes.

    Raises as `fa2gen.ops.call.forward_cuda` does.
    """
    q, tensors = given.q, given.tensors
    kinds = [None if x is None else signature_of(x) for x in (*given[:-1], *tensors)]
    key = (*kinds, options, interleaved, num_splits)
    call = cast(_CachedCall, prepared(key, _prepare, _PLACES, given, options, interleaved, num_splits))
    out = call.new_out(q) if into is None else into
    if call.over_pages:
        lse = _over_pages(given, Options(*options), interleaved, out)
        return out, lse.unflatten(1, (q.shape[0], q.shape[1])).transpose(0, 1).contiguous()
    launch = call.launch
    if launch is None and not call.misaligned:  # no query, or no place for a key
        out.zero_()
        lse = call.new_lse(q).fill_(-math.inf)
        if given.s_aux is not None:
            lse.copy_(given.s_aux[:, None].expand_as(lse))
        return out, lse
    at = [0 if x is None else x.data_ptr() for x in given[:-1]]
    if launch is None or (at[0] | at[3] | at[4] | at[5] | at[6]) & 15:  # _INPUTS
        copies = {name: aligned(x) for name in _INPUTS if (x := getattr(given, name)) is not None}
        return cached_cuda(given._replace(**copies), options, interleaved, num_splits, out)
    if (at[1] | at[2]) & 15:
        raise InvalidInput(
            "a cache lies on an address that is no multiple of 16 bytes, and is never copied: begin a slice of one on "
            "a multiple of 8 elements"
        )
    turned = None if given.rotary_cos is None else call.new_out(q)
    lse = call.new_lse(q)
    at += (0, out.data_ptr(), lse.data_ptr(), 0 if turned is None else turned.data_ptr())
    operands = call.pick(at + [x.data_ptr() for x in tensors])
    stream, scratch, counters = room_of_stream(call, launch.scratch_bytes)
    if scratch:
        launch(operands, scratch, stream, counters)
    else:
        launch_with_scratch(call, q, operands, q.new_empty(launch.scratch_bytes, dtype=torch.uint8))
    return out, lse


def read_out(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens: Tensor | None,
    batch_idx: Tensor | None,
    leftpad: Tensor | None,
    table: Tensor | None,
    options: AnyOptions,
    interleaved: bool,
    num_splits: int,
) -> Tensor:
    """`out` of `cached_cuda` where nothing else is given, for who does not ask for lse: that lies behind the scratch
    of the stream then."""
    key = (
        q.shape, k_cache.shape, v_cache.shape, q.stride(), k_cache.stride(), v_cache.stride(),
        q.dtype, k_cache.dtype, v_cache.dtype, q.get_device(), k_cache.get_device(), v_cache.get_device(),
        None if seqlens is None else signature_of(seqlens), None if table is None else signature_of(table),
        None if batch_idx is None else signature_of(batch_idx), None if leftpad is None else signature_of(leftpad),
        options, interleaved, num_splits,
    )  # fmt: skip
    if (call := remembered(key)) is None:
        given = Cached(q, k_cache, v_cache, None, None, None, None, seqlens, batch_idx, leftpad, table)
        call = prepared(key, _prepare, _READ, given, options, interleaved, num_splits)
    q_at, k_at, v_at = q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
    if (launch := call.launch) is not None and not (q_at | k_at | v_at) & 15:
        needed = launch.scratch_bytes
        stream, scratch, counters = room_of_stream(call, needed + 4 * call.num_rows)
        if scratch:
            out = call.new_out(q)
            at = (
                q_at, k_at, v_at,
                0 if seqlens is None else seqlens.data_ptr(), 0 if batch_idx is None else batch_idx.data_ptr(),
                0 if leftpad is None else leftpad.data_ptr(), 0 if table is None else table.data_ptr(),
                0, out.data_ptr(), scratch + needed,
            )  # fmt: skip
            launch(call.pick(at), scratch, stream, counters)  # type: ignore[attr-defined]
            return out
    given = Cached(q, k_cache, v_cache, None, None, None, None, seqlens, batch_idx, leftpad, table)
    if call.over_pages:  # type: ignore[attr-defined]
        out = call.new_out(q)
        _over_pages(given, Options(*options), interleaved, out)
        return out
    return cached_cuda(given, options, interleaved, num_splits)[0]


def _over_pages(given: Cached, options: Options, interleaved: bool, out: Tensor) -> Tensor:
    """`cached_cuda` by a kernel of prefill, for which a cache without a table has a page for each entry: lse (heads,
    batch * seqlen_q)."""
    q, keys, table = given.q, given.cache_seqlens, given.block_table
    batch, seqlen_q, num_heads, _ = q.shape
    if given.k is not None and keys is not None:
        cached_cuda(given._replace(q=q[:, :0]), options, interleaved)
        keys = keys.clamp(0, capacity_of(given)) + given.k.shape[1]
    if table is None:
        entries = given.cache_batch_idx
        table = torch.arange(batch, dtype=torch.int32, device=q.device) if entries is None else entries
        table = table.unsqueeze(1)
    lse = q.new_empty((num_heads, batch * seqlen_q), dtype=torch.float32)
    pages = Paged(q, given.k_cache, given.v_cache, table, seqused_k=keys, s_aux=given.s_aux)
    paged_cuda(pages, (), options, into=(out, lse))
    return lse


@dataclass(slots=True)
class _CachedCall(Call):
    """`pick` takes addresses, of an expression's tensors last, in the order of a launch's operands; `over_pages` is
    whether a kernel of prefill serves it."""

    pick: Callable[[Sequence[int]], tuple[int, ...]] = tuple
    over_pages: bool = False


# Where `cached_cuda` and `read_out` have the addresses of a plan's operands; those of Cached go by its names but for a
# few.
_PLACES = (*Cached._fields[:-1], "nothing", "o", "lse", "turned")
_READ = (*Cached._fields[:3], *Cached._fields[7:11], "nothing", "o", "lse")
_NAMES = {"k": "k_cache", "v": "v_cache", "k_new": "k", "v_new": "v"}


def _picked(
    places: tuple[str, ...], operands: tuple[str, ...], given: Cached
) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """Where there are rotary embeddings, queries are turned from where they are given to a place of their own."""
    names = {**_NAMES, "q_given": "nothing"} if given.rotary_cos is None else {**_NAMES, "q": "turned", "q_given": "q"}
    named = len(operands) - len(given.tensors)  # those of an expression come last, in their order
    found = [names.get(name, name) for name in operands[:named]]
    found = [name if name in places else "nothing" for name in found]
    return itemgetter(*map(places.index, found), *range(len(places), len(places) + len(given.tensors)))


def _plain_options(options: Options, seqlen_q: int, capacity: int) -> Options:
    """The options of the plainest kernel that serves caches of so many keys: a single query is the last key's."""
    if seqlen_q == 1:
        options = options._replace(causal=False, window_right=-1)
    return options.reduced(seqlen_q, capacity)


def _scale_steps(given: Cached) -> dict[str, int]:
    """Where scales of 8-bit caches are, as CacheShape has it."""
    scales = (("k_scale", given.k_descale), ("v_scale", given.v_descale))
    return {
        f"{name}_{step}": x.stride(dim)
        for name, x in scales
        if x is not None and cache_dtype_of(given) != SAME
        for dim, step in enumerate(("batch", "head"))
    }


# Once for each signature ------------------------------------------------------------------------------------------


def _may_be_prefill(given: Cached, num_splits: int) -> bool:
    """Whether kernels of prefill have all that a call asks for. With fixed parts a row's bits are those of any batch,
    so that nothing may be chosen by it."""
    return (
        num_splits == 0
        and given.rotary_cos is None
        and given.cache_leftpad is None
        and (given.block_table is None or given.cache_batch_idx is None)
        and not given.tensors
        and cache_dtype_of(given) == SAME
        and 0 not in given.k_cache.shape
    )


def _prepare(
    places: tuple[str, ...], given: Cached, said: AnyOptions, interleaved: bool, num_splits: int
) -> _CachedCall:
    """Validate a signature; choose, load and pack its kernel. Calls have addresses at these places."""
    options = Options(*said)
    validate_options(options)
    validate_cached(given, num_splits, options)
    q, k_cache, table = given.q, given.k_cache, given.block_table
    batch, seqlen_q, num_heads, head_dim = q.shape
    capacity = capacity_of(given)
    reduced = _plain_options(options, seqlen_q, capacity)._replace(sink=given.s_aux is not None)
    if reduced.expression:
        shapes = tuple(tuple(x.shape) for x in given.tensors)
        reduced = reduced._replace(expression=reduced.expression._replace(shapes=shapes))
    shape = CacheShape(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=capacity,
        num_heads=num_heads,
        num_heads_kv=k_cache.shape[2],
        seqlen_new=0 if given.k is None else given.k.shape[1],
        entries=k_cache.shape[0],
        page_size=0 if table is None else k_cache.shape[1],
        table_rows=0 if table is None else table.shape[0],
        table_stride=0 if table is None else table.stride(0),
        split_shift=split_shift(num_splits, capacity),
        rotary_dim=0 if given.rotary_cos is None else 2 * given.rotary_cos.shape[1],
        rotary_rows=0 if given.rotary_cos is None else given.rotary_cos.shape[0],
        interleaved=interleaved,
        rotary_steps=options.causal or options.window_left >= 0 or options.window_right >= 0,
        **_scale_steps(given),
    )
    cache_dtype = cache_dtype_of(given)
    problem = reduced.problem("decode", head_dim, DTYPES[q.dtype], paged=table is not None, cache_dtype=cache_dtype)
    rows = seqlen_q * (num_heads // max(k_cache.shape[2], 1))
    of_call = {"device": q.get_device(), "out": contiguous(q.shape), "lse": contiguous((batch, num_heads, seqlen_q))}
    sizes = (q.get_device(), batch, seqlen_q, num_heads, k_cache.shape[2], head_dim)
    is_plain = given.s_aux is None and not reduced.expression
    if _may_be_prefill(given, num_splits) and not calls_for_decoding(*sizes, may_pack=is_plain):
        return _CachedCall(**of_call, num_rows=0, launch=None, misaligned=False, over_pages=True)
    kernel = kernel_for_rows(problem, q.get_device(), capacity, rows)
    inputs = {name: x for name in _INPUTS if (x := getattr(given, name)) is not None}
    empty = 0 in (batch, capacity, shape.entries) or (0 in (seqlen_q, num_heads) and not shape.seqlen_new)
    launch = None
    if not empty and all(are_aligned(x.shape, x.stride()) for x in inputs.values()):
        strides = {name: x.stride()[:3] for name, x in (("q", q), ("k", k_cache), ("v", given.v_cache))}
        strides["o"] = of_query = dense(seqlen_q, num_heads, head_dim)
        strides |= {f"{name}_new": inputs[name].stride()[:3] for name in ("k", "v") if name in inputs}
        if shape.rotary_dim:
            strides |= {"q": of_query, "q_given": q.stride()[:3]}
        launch = kernel.prepare(shape, strides, reduced)
    return _CachedCall(
        **of_call,
        num_rows=batch * num_heads * seqlen_q,
        launch=launch,
        misaligned=launch is None and not empty,
        pick=_picked(places, tuple(operand.name for operand in kernel.plan.operands), given),
    )

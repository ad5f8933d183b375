"""Queries over a cache of keys and values on CUDA: from tensors to launches, without a look at what lengths are.

As in `fa2gen.ops.call`: what a call's signature decides is prepared once. Lengths, tables of pages and how many keys
the caches hold now are read by the kernels, so that a cache that grows has one signature, and a CUDA graph may be
replayed with other lengths. They must not change while a call's kernels run.

New keys and values are written by a small kernel of the same source that runs before.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput
from fa2gen.ops.call import Call, aligned, are_aligned, dense, kernel_for_rows, launch_with_scratch, prepared
from fa2gen.ops.validate import DTYPES, validate_options
from fa2gen.ops.validate_cache import Cached, cache_dtype_of, capacity_of, validate_cached
from fa2gen.options import CacheShape, Options, split_shift
from fa2gen.spec import SAME

__all__ = ["cached_cuda"]

_INPUTS = ("q", "k", "v", "rotary_cos", "rotary_sin")  # what is copied where a kernel cannot read it as it lies


def cached_cuda(
    given: Cached, options: Options, interleaved: bool = True, num_splits: int = 0, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) by generated kernels, on the current stream of q's device; new keys are in the caches then.

    out like q, contiguous; lse (batch, heads, seqlen_q) fp32.
    into  a buffer for out, contiguous, on a multiple of 16 bytes.

    Raises as `fa2gen.ops.call.forward_cuda` does.
    """
    key = (*map(_kind, given.all), options, interleaved, num_splits)
    call = prepared(key, _prepare, given, options, interleaved, num_splits)
    q = given.q
    out = q.new_empty(call.out_shape) if into is None else into
    lse = q.new_empty(call.lse_shape, dtype=torch.float32)
    if call.launch is None and not call.misaligned:  # no query, or no place for a key
        out.zero_()
        lse.fill_(-math.inf) if given.s_aux is None else lse.copy_(given.s_aux[:, None].expand_as(lse))
        return out, lse
    if call.launch is None or any(x is not None and x.data_ptr() & 15 for x in (getattr(given, n) for n in _INPUTS)):
        copies = {name: aligned(x) for name in _INPUTS if (x := getattr(given, name)) is not None}
        return cached_cuda(given._replace(**copies), options, interleaved, num_splits, out)
    turned = None if given.rotary_cos is None else torch.empty_like(q, memory_format=torch.contiguous_format)
    at = {name: 0 if x is None else x.data_ptr() for name, x in zip(Cached._fields, given[:-1], strict=False)}
    if (at["k_cache"] | at["v_cache"]) & 15:
        raise InvalidInput(
            "a cache lies on an address that is no multiple of 16 bytes, and is never copied: begin a slice of one on "
            "a multiple of 8 elements"
        )
    operands = {
        "q": at["q"] if turned is None else turned.data_ptr(),
        "k": at["k_cache"],
        "v": at["v_cache"],
        "o": out.data_ptr(),
        "lse": lse.data_ptr(),
        "k_new": at["k"],
        "v_new": at["v"],
        "q_given": 0 if turned is None else at["q"],
    }
    named = len(call.operands) - len(given.tensors)  # those of an expression come last, in their order
    addresses = [operands[n] if n in operands else at[n] for n in call.operands[:named]]
    launch_with_scratch(call, q, (*addresses, *(x.data_ptr() for x in given.tensors)))
    return out, lse


def _plain_options(options: Options, seqlen_q: int, capacity: int) -> Options:
    """The options of the plainest kernel that serves caches of so many keys: a single query is the last key's."""
    if seqlen_q == 1:
        options = options._replace(causal=False, window_right=-1)
    return options.reduced(seqlen_q, capacity)


def _kind(x: Tensor | None) -> Any:
    """What of a tensor is part of a call's signature."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.get_device())


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


def _prepare(given: Cached, options: Options, interleaved: bool, num_splits: int) -> Call:
    """Validate a signature; choose, load and pack its kernel."""
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
    return Call(
        device=q.get_device(),
        out_shape=tuple(q.shape),
        lse_shape=(batch, num_heads, seqlen_q),
        num_rows=batch * num_heads * seqlen_q,
        out_is_like_q=False,
        launch=launch,
        misaligned=launch is None and not empty,
        operands=tuple(operand.name for operand in kernel.plan.operands),
    )

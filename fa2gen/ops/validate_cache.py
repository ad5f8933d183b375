"""What a call over a cache of keys and values must obey; see `fa2gen.ops.validate`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops.validate import (
    describe,
    refuse_tensor_kinds,
    validate_expression,
    validate_head_dim,
    validate_heads,
    validate_kind,
    validate_sinks,
)
from fa2gen.options import Options
from fa2gen.spec import HEAD_DIM_STEP

__all__ = ["Cached", "capacity_of", "validate_cached"]

MAX_SPLITS = 256


class Cached(NamedTuple):
    """The tensors of a call over a cache, as `fa2gen.ops.kvcache` has them.

    q               (batch, seqlen_q, heads, head_dim)
    k_cache         (entries, rows, heads_kv, head_dim), and v_cache: an entry is a sequence's place, or a page.
    k, v            (batch, seqlen_new, heads_kv, head_dim): appended behind each sequence's keys, if given.
    rotary_cos      (positions, rotary_dim / 2), and rotary_sin, in q's dtype.
    cache_seqlens   (batch,) int32: the keys in each sequence's cache; None: all rows.
    cache_batch_idx (batch,) int32: the entry, or the table's row, of each sequence; None: its own number.
    cache_leftpad   (batch,) int32: rows before a sequence's first key.
    block_table     (batch, pages) int32: the numbers of each sequence's pages.
    s_aux           (heads,) fp32: the logit of each head's sink.
    tensors         that the expression of the options names, in the order of its inputs.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    cache_seqlens: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    block_table: Tensor | None = None
    s_aux: Tensor | None = None
    tensors: tuple[Tensor, ...] = ()

    @property
    def all(self) -> tuple[Tensor | None, ...]:
        """Each tensor by itself."""
        *alone, tensors = self
        return (*alone, *tensors)


def capacity_of(given: Cached) -> int:
    """The most keys that a sequence's cache can hold."""
    rows: int = given.k_cache.shape[1]
    return rows if given.block_table is None else rows * given.block_table.shape[1]


def validate_cached(given: Cached, num_splits: int = 0, options: Options | None = None) -> None:
    """Raise InvalidInput or UnsupportedProblem unless these can be computed with. Values are not looked at.

    options  with the expression that the tensors are of; None: they are not looked at.

    For any device, and for fake tensors with symbolic sizes.
    """
    q, k_cache, v_cache = given.q, given.k_cache, given.v_cache
    refuse_tensor_kinds((*Cached._fields[:-1], *("a tensor of the expression" for _ in given.tensors)), given.all)
    for name, x, what in (
        ("q", q, "(batch, seqlen_q, heads, head_dim)"),
        ("k_cache", k_cache, "(batch, rows, heads_kv, head_dim), or with block_table (pages, page_size, ...)"),
        ("v_cache", v_cache, "(batch, rows, heads_kv, head_dim), or with block_table (pages, page_size, ...)"),
    ):
        if x.dim() != 4:
            raise InvalidInput(f"{name} has {x.dim()} dimensions, {tuple(x.shape)}; it must have 4, {what}")
    validate_kind(q, k_cache, v_cache, ("q", "k_cache", "v_cache"))
    if tuple(k_cache.shape) != tuple(v_cache.shape):
        raise InvalidInput(
            f"k_cache has shape {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}; they must be equal"
        )
    if q.shape[-1] != k_cache.shape[-1]:
        raise UnsupportedProblem(
            f"q has head_dim {q.shape[-1]}, the caches have {k_cache.shape[-1]}; they must be equal: make the "
            "caches with q's head_dim"
        )
    validate_head_dim("head_dim", q.shape[-1])
    if q.shape[-1] % HEAD_DIM_STEP:
        padded = -(-q.shape[-1] // HEAD_DIM_STEP) * HEAD_DIM_STEP
        raise UnsupportedProblem(
            f"head_dim is {q.shape[-1]}; over a cache, which is never copied, it must be a multiple of "
            f"{HEAD_DIM_STEP}: make the caches of head_dim {padded}, zeros behind {q.shape[-1]}, pad q, k and v "
            f"likewise, pass softmax_scale={q.shape[-1]}**-0.5, and take out[..., :{q.shape[-1]}]"
        )
    validate_heads(q.shape[2], k_cache.shape[2])
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        steps = [step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
        if x.numel() > 0 and (x.stride(-1) != 1 or any(step % 8 for step in steps)):
            raise InvalidInput(
                f"{name} has strides {tuple(x.stride())}; a cache is never copied, so its last must be 1 and the "
                "others multiples of 8 elements: allocate it so"
            )
    _validate_place(given)
    _validate_new(given)
    if given.s_aux is not None:
        validate_sinks(given.s_aux, q)
    if options is not None:
        keys = torch.empty((q.shape[0], capacity_of(given), *k_cache.shape[2:]), device="meta")  # as positions count
        validate_expression(q, keys, None, given.tensors, options)
    if not 0 <= num_splits <= MAX_SPLITS:
        raise InvalidInput(f"num_splits is {num_splits}; it must be from 0, as suits the device, to {MAX_SPLITS}")


def _validate_place(given: Cached) -> None:
    """Where the sequences' keys are."""
    q, k_cache, table = given.q, given.k_cache, given.block_table
    batch = q.shape[0]
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table"):
        x = getattr(given, name)
        if x is None:
            continue
        if x.dtype != torch.int32:
            raise InvalidInput(f"{name} is {x.dtype}; kernels take torch.int32: {name}.to(torch.int32)")
        if x.device != q.device:
            raise InvalidInput(f"q is on {q.device}, {name} on {x.device}; use one device: {name}.to(q.device)")
        if name == "block_table":
            if x.dim() != 2 or x.shape[1] == 0:
                raise InvalidInput(f"block_table has shape {tuple(x.shape)}; it must be (batch, pages of a sequence)")
            if x.stride(1) != 1 and x.shape[1] > 1:
                raise InvalidInput(f"block_table has strides {tuple(x.stride())}; the last must be 1: .contiguous()")
        elif tuple(x.shape) != (batch,):
            raise InvalidInput(
                f"{name} has shape {tuple(x.shape)}; it must be ({batch},), a number for each sequence of q"
            )
        elif x.stride(0) != 1 and batch > 1:
            raise InvalidInput(f"{name} has a stride of {x.stride(0)}; it must be contiguous: pass {name}.contiguous()")
    if table is not None and k_cache.shape[1] == 0:
        raise InvalidInput(f"k_cache has shape {tuple(k_cache.shape)}: pages of no rows")
    rows, what = (k_cache.shape[0], "k_cache has entries for") if table is None else (table.shape[0], "block_table has")
    if given.cache_batch_idx is None and rows < batch:
        raise InvalidInput(
            f"q has {batch} sequences, {what} {rows}: give cache_batch_idx, which sequence each is, or slice q"
        )


def _validate_new(given: Cached) -> None:
    """What is to be appended, and the angles of rotary embeddings."""
    q, k_cache, k, v, cos, sin = given.q, given.k_cache, given.k, given.v, given.rotary_cos, given.rotary_sin
    if (k is None) != (v is None):
        missing = "v" if v is None else "k"
        raise InvalidInput(f"{missing} is missing: new keys and new values are given together, or neither")
    if k is not None and given.cache_seqlens is None:
        raise InvalidInput("k and v are appended behind each sequence's keys: give cache_seqlens, how many those are")
    wanted = (q.shape[0], None, k_cache.shape[2], q.shape[3])
    for name, x in (("k", k), ("v", v)):
        if x is None:
            continue
        found = tuple(x.shape)
        if len(found) != 4 or (found[0], None, *found[2:]) != wanted:
            raise InvalidInput(
                f"{name} has shape {found}; it must be ({wanted[0]}, seqlen_new, {wanted[2]}, {wanted[3]}), as "
                "the caches"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise InvalidInput(f"{name} is {describe(x)}; it must be {q.dtype} on {q.device}")
    if k is not None and v is not None and k.shape != v.shape:
        raise InvalidInput(f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}; they must be equal")
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise InvalidInput("rotary_cos and rotary_sin are given together, or neither")
    if k is None:
        raise InvalidInput("rotary embeddings are of new keys and of q: give k and v, or turn q before the call")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if x.dtype != q.dtype or x.device != q.device:
            raise InvalidInput(f"{name} is {describe(x)}; it must be {q.dtype} on {q.device}")
        if x.dim() != 2 or x.shape != cos.shape:
            raise InvalidInput(f"{name} has shape {tuple(x.shape)}; both must be (positions, rotary_dim / 2)")
        if not x.is_contiguous():
            raise InvalidInput(f"{name} has strides {tuple(x.stride())}; it must be contiguous: {name}.contiguous()")
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim == 0 or rotary_dim % 16 or rotary_dim > q.shape[3]:
        raise InvalidInput(
            f"rotary_cos has {cos.shape[1]} columns, for {rotary_dim} of the head dim; those must be a multiple of "
            f"16, of at most {q.shape[3]}"
        )
    if cos.shape[0] < capacity_of(given):
        raise InvalidInput(
            f"rotary_cos has {cos.shape[0]} positions; the caches hold {capacity_of(given)}: give as many"
        )

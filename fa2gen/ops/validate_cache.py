"""What a call over a cache of keys and values, or over pages, must obey; see `fa2gen.ops.validate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.layout import align_up
from fa2gen.ops.validate import (
    Lengths,
    describe,
    refuse_tensor_kinds,
    validate_expression,
    validate_head_dim,
    validate_heads,
    validate_kind,
    validate_lengths,
    validate_sinks,
)
from fa2gen.options import Options
from fa2gen.spec import HEAD_DIM_STEP, SAME, CacheDType

__all__ = [
    "CACHE_DTYPES",
    "Cached",
    "Paged",
    "cache_dtype_of",
    "capacity_of",
    "validate_cached",
    "validate_paged",
    "validate_splits",
    "validate_table",
]

MAX_SPLITS = 256
CACHE_DTYPES: dict[Any, CacheDType] = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8"}
"""Of 8-bit caches."""


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
    k_descale       (batch, heads_kv) fp32, of any strides: what numbers of k_cache are to be multiplied with, where it
                    holds 8-bit numbers; None: 1. Those of 16 bits have no scale, and it is not looked at. v_descale
                    likewise.
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
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    tensors: tuple[Tensor, ...] = ()

    @property
    def all(self) -> tuple[Tensor | None, ...]:
        """Each tensor by itself."""
        *alone, tensors = self
        return (*alone, *tensors)


def validate_splits(num_splits: int) -> None:
    """Raise InvalidInput for a number of parts that keys are not split into."""
    if not 0 <= num_splits <= MAX_SPLITS:
        raise InvalidInput(f"num_splits is {num_splits}; it must be from 0, as suits the device, to {MAX_SPLITS}")


def cache_dtype_of(given: Cached) -> CacheDType:
    """As a problem calls it."""
    return CACHE_DTYPES.get(given.k_cache.dtype, SAME)


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
    _validate_kinds(given)
    if tuple(k_cache.shape) != tuple(v_cache.shape):
        raise InvalidInput(
            f"k_cache has shape {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}; they must be equal"
        )
    if q.shape[-1] != k_cache.shape[-1]:
        raise UnsupportedProblem(
            f"q has head_dim {q.shape[-1]}, the caches have {k_cache.shape[-1]}; they must be equal: make the "
            "caches with q's head_dim"
        )
    _validate_rows(q, {"k_cache": k_cache, "v_cache": v_cache})
    _validate_place(given)
    _validate_new(given)
    if given.s_aux is not None:
        validate_sinks(given.s_aux, q)
    if options is not None:
        keys = torch.empty((q.shape[0], capacity_of(given), *k_cache.shape[2:]), device="meta")  # as positions count
        validate_expression(q, keys, None, given.tensors, options)
    validate_splits(num_splits)


def _validate_kinds(given: Cached) -> None:
    """Devices, dtypes, and the scales of 8-bit caches."""
    q, k_cache, v_cache = given.q, given.k_cache, given.v_cache
    if k_cache.dtype not in CACHE_DTYPES and v_cache.dtype not in CACHE_DTYPES:
        validate_kind(q, k_cache, v_cache, ("q", "k_cache", "v_cache"))
        return
    validate_kind(q, q, q, ("q", "q", "q"))
    if k_cache.dtype != v_cache.dtype:
        raise InvalidInput(f"k_cache is {k_cache.dtype}, v_cache is {v_cache.dtype}; use one dtype for both")
    if q.shape[-1] % 16:
        padded = align_up(q.shape[-1], 16)
        raise UnsupportedProblem(
            f"head_dim is {q.shape[-1]}; over caches of 8-bit numbers it must be a multiple of 16: make them of "
            f"head_dim {padded}, zeros behind {q.shape[-1]}, and pad q, or use caches of {q.dtype}"
        )
    wanted = (q.shape[0], k_cache.shape[2])
    for name in ("k_cache", "v_cache", "k_descale", "v_descale"):
        x = getattr(given, name)
        if x is None:
            continue
        if x.device != q.device:
            raise InvalidInput(f"q is on {q.device}, {name} on {x.device}; use one device: {name}.to(q.device)")
        if "descale" in name and (x.dtype != torch.float32 or tuple(x.shape) != wanted):
            raise InvalidInput(
                f"{name} is {describe(x)}; it must be {wanted}, one number a sequence and head, torch.float32: one for "
                f"all is {name}.expand{wanted}"
            )


def _validate_rows(q: Tensor, caches: Mapping[str, Tensor]) -> None:
    """Head dims, heads and strides of caches, which kernels read where they lie."""
    for name, x in (("q", q), *caches.items()):
        head_dim = x.shape[-1]
        validate_head_dim("head_dim" if x.shape[-1] == q.shape[-1] else f"{name}'s head_dim", head_dim)
        if head_dim % HEAD_DIM_STEP:
            padded = align_up(head_dim, HEAD_DIM_STEP)
            raise UnsupportedProblem(
                f"head_dim is {head_dim}; over a cache, which is never copied, it must be a multiple of "
                f"{HEAD_DIM_STEP}: make the caches of head_dim {padded}, zeros behind {head_dim}, pad q, k and v "
                f"likewise, pass softmax_scale={head_dim}**-0.5, and take out[..., :{head_dim}]"
            )
    for name, x in caches.items():
        validate_heads(q.shape[-2], x.shape[2])
        steps = [step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
        unit = 16 // x.element_size()
        if x.numel() > 0 and (x.stride(-1) != 1 or any(step % unit for step in steps)):
            raise InvalidInput(
                f"{name} has strides {tuple(x.stride())}; a cache is never copied, so its last must be 1 and the "
                f"others multiples of {unit} elements: allocate it so"
            )


class Paged(NamedTuple):
    """The tensors of a ragged batch whose keys lie in pages, as `fa2gen.ops.paged` has them.

    q             (total_q, heads, head_dim) with cu_seqlens_q, (batch + 1,), else (batch, seqlen_q, heads, head_dim).
    k             (pages, page_size, heads_kv, head_dim), and v, which may have a head dim of its own.
    block_table   (batch, pages of a sequence) int32, of each sequence; there may be more rows.
    cu_seqlens_k  (batch + 1,) int32: the keys of a sequence are as many as its bounds are apart, or where seqused_k,
                  (batch,) int32, is given too, at most that; without either, all that its pages hold.
    s_aux         (heads,) fp32: logits of sinks.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block_table: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    s_aux: Tensor | None = None

    @property
    def lengths(self) -> Lengths:
        return self[4:8]

    @property
    def capacity(self) -> int:
        """The most keys that a sequence's pages can hold."""
        rows: int = self.k.shape[1] * self.block_table.shape[1]
        return rows


def validate_paged(given: Paged) -> int:
    """The number of sequences. Raises InvalidInput or UnsupportedProblem unless these can be computed with."""
    q, k, v, table, of_query, *_ = given
    refuse_tensor_kinds(Paged._fields, given)
    for name, x, rank, what in (
        (
            "q",
            q,
            4 if of_query is None else 3,
            "(total_q, heads, head_dim), without cu_seqlens_q (batch, seqlen_q, ...)",
        ),
        ("k", k, 4, "with block_table (pages, page_size, heads_kv, head_dim)"),
        ("v", v, 4, "with block_table (pages, page_size, heads_kv, head_dim)"),
    ):
        if x.dim() != rank:
            raise InvalidInput(f"{name} has {x.dim()} dimensions, {tuple(x.shape)}; it must have {rank}, {what}")
    validate_kind(q, k, v)
    batch = validate_lengths(q, given.lengths, {"q": (q, of_query)})
    if tuple(k.shape[:3]) != tuple(v.shape[:3]):
        raise InvalidInput(f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}; all but the head dim must be equal")
    if 0 in k.shape[:2]:
        raise InvalidInput(f"k has shape {tuple(k.shape)}; there must be a page, and a row in it")
    if q.shape[-1] != k.shape[-1]:
        raise UnsupportedProblem(
            f"q has head_dim {q.shape[-1]}, k has {k.shape[-1]}; they must be equal: make the pages with q's head_dim"
        )
    _validate_rows(q, {"k": k, "v": v})
    if q.stride(-1) != 1 and q.numel() > 0:
        raise InvalidInput(f"q has strides {tuple(q.stride())}; the last must be 1: pass q.contiguous()")
    validate_table(table, q, batch)
    if given.s_aux is not None:
        validate_sinks(given.s_aux, q)
    return batch


def validate_table(table: Tensor, q: Tensor, sequences: int = 0) -> None:
    """Raise InvalidInput unless a table of pages can be of a call with these queries.

    sequences  that have the first rows, one each.
    """
    if table.dtype != torch.int32:
        raise InvalidInput(f"block_table is {table.dtype}; kernels take torch.int32: block_table.to(torch.int32)")
    if table.device != q.device:
        raise InvalidInput(f"q is on {q.device}, block_table on {table.device}; use one device")
    if table.dim() != 2 or table.shape[1] == 0:
        raise InvalidInput(f"block_table has shape {tuple(table.shape)}; it must be (batch, pages of a sequence)")
    if table.stride(1) != 1 and table.shape[1] > 1:
        raise InvalidInput(f"block_table has strides {tuple(table.stride())}; the last must be 1: .contiguous()")
    if table.shape[0] < sequences:
        raise InvalidInput(f"block_table has {table.shape[0]} rows, and there are {sequences} sequences: one for each")


def _validate_place(given: Cached) -> None:
    """Where the sequences' keys are."""
    q, k_cache, table = given.q, given.k_cache, given.block_table
    batch = q.shape[0]
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table"):
        x = getattr(given, name)
        if x is None:
            continue
        if name == "block_table":
            validate_table(x, q)
            continue
        if x.dtype != torch.int32:
            raise InvalidInput(f"{name} is {x.dtype}; kernels take torch.int32: {name}.to(torch.int32)")
        if x.device != q.device:
            raise InvalidInput(f"q is on {q.device}, {name} on {x.device}; use one device: {name}.to(q.device)")
        if tuple(x.shape) != (batch,):
            raise InvalidInput(
                f"{name} has shape {tuple(x.shape)}; it must be ({batch},), a number for each sequence of q"
            )
        if x.stride(0) != 1 and batch > 1:
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

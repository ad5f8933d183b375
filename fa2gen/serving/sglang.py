"""The functions of SGLang's kernels, `sgl_kernel.flash_attn`, as its FlashAttention backend calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput
from fa2gen.ops import flash_kvcache, flash_varlen
from fa2gen.ops.arguments import NO_WINDOW, Window, flag, modified, options_of, whole, window_sides
from fa2gen.ops.validate import describe, refuse_non_tensors
from fa2gen.ops.validate_cache import validate_table
from fa2gen.serving.pages import attend, refuse

__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache"]

_WHOLE = "q and k with all of the head dim"


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    attention_chunk: int | None = None,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: Any = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    ver: int = 3,
    max_seqlen_k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a cache; out, or with return_softmax_lse (out, lse).

    With cu_seqlens_q, (batch + 1,), q is packed, (total_q, heads, head_dim), and lse (heads, total_q); else q is
    (batch, seqlen_q, heads, head_dim), lse (batch, heads, seqlen_q), and all that `fa2gen.flash_attn_with_kvcache` says
    holds, of new keys and rotary embeddings too. page_table is its block_table, of pages of any size, 1 too; sinks are
    its s_aux.

    cu_seqlens_k_new  is not looked at without k, as in FlashAttention-3.
    rotary_seqlens    may be cache_seqlens itself, and is not looked at without rotary_cos.
    max_seqlen_q      with cu_seqlens_q, as in `fa2gen.serving.vllm`, also of whose row b is where it is 1; and likewise
                      max_seqlen_k. They are not looked at otherwise.
    num_splits        as in `fa2gen.flash_attn_with_kvcache`, with cu_seqlens_q as in `fa2gen.serving.vllm`.
    descales          of 8-bit tensors; they are not looked at otherwise.
    scheduler_metadata, pack_gqa, sm_margin and ver are taken, and change nothing.

    Raises InvalidInput, or UnsupportedProblem for qv, rotary_seqlens, attention_chunk, and what packed queries do not
    go with.
    """
    turns_elsewhere = rotary_cos is not None and rotary_seqlens is not None and rotary_seqlens is not cache_seqlens
    refuse(
        qv=(qv is not None, _WHOLE),
        rotary_seqlens=(turns_elsewhere, "cache_seqlens, behind which positions begin"),
        attention_chunk=(bool(attention_chunk), "window_size"),
    )
    if cu_seqlens_q is None:
        return flash_kvcache.flash_attn_with_kvcache(
            *(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad),
            *(page_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, None, num_splits),
            return_softmax_lse=return_softmax_lse,
            s_aux=sinks,
            k_descale=k_descale,
            v_descale=v_descale,
        )
    refuse(
        k=(k is not None or v is not None, "new keys are written before, by fa2gen.reshape_and_cache"),
        rotary_cos=(rotary_cos is not None, "q is turned before the call"),
        cache_leftpad=(cache_leftpad is not None, "pages that begin with a sequence's first key"),
    )
    refuse_non_tensors(q=q, k_cache=k_cache, cu_seqlens_q=cu_seqlens_q)
    if q.dim() != 3 or k_cache.dim() != 4 or cu_seqlens_q.dim() != 1 or not cu_seqlens_q.numel():
        raise InvalidInput(
            f"q is {describe(q)}, k_cache {describe(k_cache)}, cu_seqlens_q {describe(cu_seqlens_q)}; they must be "
            "(total_q, heads, head_dim), (pages, page_size, heads_kv, head_dim) and (batch + 1,)"
        )
    batch = cu_seqlens_q.numel() - 1
    page_table = _table(q, k_cache, batch, page_table, cache_batch_idx)
    if not isinstance(cache_seqlens, Tensor):
        if cache_seqlens is None:
            raise InvalidInput("cu_seqlens_q needs cache_seqlens, (batch,) int32: the keys of each sequence")
        number = whole(cache_seqlens)
        if number is None:
            raise InvalidInput(f"cache_seqlens must be a whole number or (batch,) int32, not {describe(cache_seqlens)}")
        cache_seqlens = flash_kvcache.same_lengths(q, batch, number)
    q = q if q.stride(-1) == 1 else q.contiguous()
    given = flash_varlen.paged(q, k_cache, v_cache, page_table, cu_seqlens_q, None, None, cache_seqlens, sinks)
    said = options_of(q, softmax_scale, causal, window_sides(window_size), varlen=True)
    scales = (k_descale, v_descale)
    out, lse = attend(given, said, modified(softcap, None), max_seqlen_q, max_seqlen_k, num_splits, scales=scales)
    return (out, lse) if flag("return_softmax_lse", return_softmax_lse) else out


def _table(q: Tensor, k_cache: Tensor, batch: int, page_table: Tensor | None, cache_batch_idx: Tensor | None) -> Tensor:
    """The pages of each sequence, (batch, pages): rows of the table by number, or entries of a cache without one, each
    the only page of its sequence. Numbers beyond it are the nearest that there are."""
    if page_table is not None:
        refuse_non_tensors(page_table=page_table)
        if cache_batch_idx is None:
            return page_table
        validate_table(page_table, q, min(batch, 1))
    entries = (k_cache if page_table is None else page_table).shape[0]
    if cache_batch_idx is None:
        if entries < batch:
            raise InvalidInput(f"q has {batch} sequences, k_cache entries for {entries}: give cache_batch_idx")
        return torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
    refuse_non_tensors(cache_batch_idx=cache_batch_idx)
    if cache_batch_idx.dtype != torch.int32 or tuple(cache_batch_idx.shape) != (batch,):
        raise InvalidInput(f"cache_batch_idx is {describe(cache_batch_idx)}; it must be ({batch},) torch.int32")
    rows = cache_batch_idx.clamp(0, max(entries - 1, 0))
    return rows[:, None] if page_table is None else page_table[rows.long()]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = NO_WINDOW,
    attention_chunk: int | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Any = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    ver: int = 3,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fa2gen.flash_attn_varlen_func` of packed keys, or of those of page_table, its block_table.

    Gives out, or with return_softmax_lse (out, lse (heads, total_q)).

    descales, num_splits, pack_gqa, sm_margin and ver are taken, and change nothing. Raises InvalidInput, or
    UnsupportedProblem for qv.
    """
    refuse(qv=(qv is not None, _WHOLE))
    out, lse, _ = flash_varlen.flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        softmax_scale=softmax_scale,
        causal=causal,
        block_table=page_table,
        window_size=window_size,
        attention_chunk=attention_chunk or 0,
        softcap=softcap,
        return_attn_probs=True,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        s_aux=sinks,
    )
    return (out, lse) if flag("return_softmax_lse", return_softmax_lse) else out

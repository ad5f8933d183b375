"""The functions of vLLM's fork of flash-attention, `vllm.vllm_flash_attn`, as its attention backend calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput
from fa2gen.ops import flash_varlen
from fa2gen.ops.arguments import flag, modified, options_of, window_sides
from fa2gen.serving.pages import attend, refuse, validate_out

__all__ = ["flash_attn_varlen_func", "get_scheduler_metadata"]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    q_v: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    num_splits: int = 0,
    fa_version: int = 2,
    s_aux: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a ragged batch over pages or packed keys; out, or with return_softmax_lse (out, lse (heads, total_q)
    fp32).

    q (total_q, heads, head_dim). With block_table k and v are (pages, page_size, heads_kv, head_dim) of any page_size
    and strides, and seqused_k says how many keys each sequence has; else they are (total_k, heads_kv, head_dim) with
    cu_seqlens_k. Masks are aligned to the bottom right. Where a window begins within a block of keys, those before it
    are multiplied with 0: pages that were let go must hold finite numbers, or table entries of pages that do.

    max_seqlen_q     says whether queries are few, which kernels of decoding are for; a tensor is not read.
    max_seqlen_k     of pages of 8-bit numbers, how much room there is for 16-bit ones of each sequence: what has more
                     keys gives NaN. Else it helps to choose the quickest kernel. A tensor is not read.
    out              a buffer for the result, (total_q, heads, head_dim). Rows that no sequence has become 0. Where
                     max_seqlen_q is 1 and there are as many rows as sequences, row b is sequence b's: those without a
                     query come last, with a seqused_k of 0, and their rows become 0.
    s_aux            (heads,): logits of attention sinks, which LSE has in it.
    num_splits       over pages, the most parts that a sequence's keys are split into, where kernels of decoding read
                     them; 0: as suits the device. With a number a row's bits do not depend on its batch, but on how
                     many keys a row of block_table can hold: sequences of up to 16 rows, queries times heads of a group
                     (64 where a group has more than 16), are decoded, others are not, whatever is beside them.
    descales         of 8-bit tensors; they are not looked at otherwise.
    scheduler_metadata, fa_version, deterministic, cp_rank and cp_tot_seqused_k (with a cp_world_size of 1) are taken,
                     and change nothing: kernels make their schedule on the device, and are always deterministic.

    Raises InvalidInput, or UnsupportedProblem for q_v, dropout, probabilities and context parallel decoding.
    """
    refuse(
        q_v=(q_v is not None, "q and k with all of the head dim"),
        dropout_p=(bool(dropout_p), "0.0, as inference has it"),
        return_attn_probs=(bool(return_attn_probs), "return_softmax_lse"),
        cp_world_size=(cp_world_size != 1, "each rank's own keys with causal=False, joined by fa2gen.merge_states"),
    )
    if (cu_seqlens_k is None) == (seqused_k is None):
        raise InvalidInput("give one of cu_seqlens_k, for packed keys, and seqused_k, which block_table needs")
    sides = window_sides(window_size)
    if block_table is None:
        found, lse, _ = flash_varlen.flash_attn_varlen_func(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=sides,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            return_attn_probs=True,
            seqused_k=seqused_k,
            s_aux=s_aux,
        )
        if out is not None:
            validate_out(out, q, v)
            found = out.copy_(found)
    else:
        if seqused_k is None:
            raise InvalidInput("block_table needs seqused_k, (batch,) int32: the keys of each sequence in its pages")
        given = flash_varlen.paged(q, k, v, block_table, cu_seqlens_q, None, None, seqused_k, s_aux)
        said = options_of(q, softmax_scale, causal, sides, varlen=True)
        expression = modified(softcap, alibi_slopes)
        scales = (k_descale, v_descale)
        found, lse = attend(given, said, expression, max_seqlen_q, max_seqlen_k, num_splits, out, scales)
    return (found, lse) if flag("return_softmax_lse", return_softmax_lse) else found


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: Any = None,
    sm_margin: int = 0,
) -> Tensor:
    """Zeros of the size that vLLM keeps for it, int32 on cache_seqlens' device: kernels make their own schedule from
    the lengths, when they run."""
    return cache_seqlens.new_zeros(4 * (-(-batch_size // 4) * 4) + 1, dtype=torch.int32)

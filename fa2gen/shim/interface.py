"""Private functions of flash_attn.flash_attn_interface that context parallel and others call: one pass each.

Signatures, argument names and results are flash_attn 2.8's: who calls them looks at these. LSE of a row that sees no
key is -inf, where flash_attn has +inf: merging partial results, which is what they are called for, wants that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fa2gen.errors import UnsupportedProblem
from fa2gen.ops import flash_attn_func, flash_attn_varlen_func
from fa2gen.ops.autograd import gradients_of

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "maybe_contiguous",
]


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """A tensor, copied where its last dimension is not contiguous."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Raises UnsupportedProblem: there are no scores in memory whose blocks it would tell of."""
    raise UnsupportedProblem(
        "blocks of keys are those of flash_attn's kernels, whose scores under dropout (S_dmask) tests look at; fa2gen "
        "has no scores in memory. fa2gen.explain_call says what a call runs"
    )


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, Tensor]:
    """(out, lse, None, rng_state) of q, k and v (batch, seqlen, heads, head_dim)."""
    _refuse(dropout_p=dropout_p)
    window = (window_size_left, window_size_right)
    with torch.no_grad():
        out, lse, _ = flash_attn_func(
            q, k, v, 0.0, softmax_scale, causal, window, softcap, alibi_slopes, return_attn_probs=True
        )
    return out, lse, None, _no_dropout(q)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, None, Tensor]:
    """(out, lse, None, rng_state) of packed q, k and v (total, heads, head_dim); lse (heads, total_q).

    num_splits has come to flash_attn after 2.8.3; more than one is refused, here and there.
    """
    _refuse(dropout_p=dropout_p, leftpad_k=leftpad_k, num_splits=num_splits > 1)
    window = (window_size_left, window_size_right)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (0.0, softmax_scale, causal, window, softcap, alibi_slopes)
    with torch.no_grad():
        out, lse, _ = flash_attn_varlen_func(
            *(q, k, v, *lengths, *options), return_attn_probs=True, block_table=block_table, seqused_k=seqused_k
        )
    return out, lse, None, _no_dropout(q)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk and dv; returns the rows' sums of dout * out, (batch, heads, seqlen_q) fp32.

    out and softmax_lse are of the whole row, of whose keys k and v may be a part.
    """
    _refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes)
    window = (window_size_left, window_size_right)
    found = gradients_of((dout, q, k, v, out, softmax_lse), (), softmax_scale, causal, window, deterministic)
    _write((dq, dk, dv), found)
    return _dot(dout, out).transpose(1, 2)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """`_flash_attn_backward` of packed tensors; returns sums (heads, total_q)."""
    _refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes)
    window, lengths = (window_size_left, window_size_right), (cu_seqlens_q, cu_seqlens_k, None, None)
    found = gradients_of((dout, q, k, v, out, softmax_lse), lengths, softmax_scale, causal, window, deterministic)
    _write((dq, dk, dv), found)
    return _dot(dout, out).transpose(0, 1)


def _write(targets: tuple[Tensor | None, ...], found: tuple[Tensor, ...]) -> None:
    for target, x in zip(targets, found, strict=True):
        if target is not None:
            target.copy_(x)


def _dot(dout: Tensor, out: Tensor) -> Tensor:
    return torch.linalg.vecdot(dout.float(), out.float())


def _no_dropout(q: Tensor) -> Tensor:
    return torch.zeros(2, dtype=torch.int64, device=q.device)


def _refuse(**options: Any) -> None:
    """Raise UnsupportedProblem for options that these passes do not have."""
    for name, x in options.items():
        if isinstance(x, Tensor) or x:
            raise UnsupportedProblem(
                f"{name} is not built in flash_attn's private functions; flash_attn_func and flash_attn_varlen_func "
                "say what they take"
            )

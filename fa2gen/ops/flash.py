"""The functions of flash_attn 2.8: same names, argument order, defaults and shapes.

Options that flash_attn does not have are keyword-only, behind its own.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput
from fa2gen.ops.arguments import NO_WINDOW, Window, flag, modified, new_rng_state, probability, window_sides
from fa2gen.ops.autograd import attend, attend_for_out, is_plain, wants_gradient
from fa2gen.ops.call import forward_cuda, forward_out
from fa2gen.ops.operator import run_any
from fa2gen.ops.validate import refuse_non_tensors, refuse_tensor_kinds
from fa2gen.reference import dropout_mask

__all__ = [
    "Result",
    "WithLse",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "unpacked",
]

WithLse: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
Result: TypeAlias = Tensor | WithLse


@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: Literal[False] = False,
    *,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
) -> Tensor: ...


@overload
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *args: Any, return_attn_probs: Literal[True], **options: Any
) -> WithLse: ...


@overload
def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *args: Any, return_attn_probs: bool, **options: Any) -> Result: ...


def flash_attn_func(  # type: ignore[misc]  # the later overloads leave out what the first says
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
) -> Result:
    """softmax(q k^T * softmax_scale) v, exactly, and its gradients.

    q (batch, seqlen_q, heads, head_dim); k, v (batch, seqlen_k, heads_kv, head_dim); fp16 or bf16. v may have a head
    dim of its own, which out has then. Where one is no multiple of 8, tensors are copied in both passes, with zeros up
    to the next, and out and gradients copied back. Nested tensors of layout jagged, with a jagged seqlen, run as
    `flash_attn_varlen_func`; out is one like q then.

    dropout_p          an element of the softmax is dropped with this probability, in steps of 2^-12; the others count
                       1 / (1 - dropout_p) times. From torch's generator of q's device come 128 random bits for a call,
                       in a CUDA graph anew for each replay; gradients keep these, not the mask.
    softmax_scale      default head_dim ** -0.5, of q's head dim.
    causal             query i sees no key after d = i + seqlen_k - seqlen_q.
    window_size        (left, right): query i sees keys d - left to d + right; -1 or None is no limit on that side, and
                       causal makes right 0. A sequence, an array or a tensor of two.
    deterministic      gradients that are the same bits in every run, at some cost in speed; so they are also under
                       torch.use_deterministic_algorithms(True). The forward pass always is.
    return_attn_probs  return (out, lse, None) rather than out; lse (batch, heads, seqlen_q) fp32, differentiable. With
                       dropout, (out, lse, mask): mask (batch, heads, seqlen_q, seqlen_k) in q's dtype is -1 where an
                       element of the softmax was dropped, else 1. It is for tests: computed by itself, on the host's
                       time, and as large as it says.
    softcap            scores are softcap * tanh(s / softcap), before any mask; 0.0: as they are.
    alibi_slopes       (heads,) or (batch, heads): scores are less by slope * |i + seqlen_k - seqlen_q - j|, after any
                       cap. Differentiable, but not with dropout, nor deterministically. LSE is that of these
                       scores.
    attention_chunk    query i sees keys of its own chunk alone: those j with j // chunk == d // chunk. 0: no chunks.
    s_aux              attention sinks: (heads,) fp32, fp16 or bf16, one more logit in each row's softmax, neither
                       scaled nor masked, which no value stands for. Differentiable. LSE includes it, so that of a row
                       that sees no key it is the sink; -inf: no sink.

    CPU tensors run the reference. Raises InvalidInput, or UnsupportedProblem for what is not built yet: head dims
    over 256, dtypes but fp16 and bf16.
    """
    if dropout_p.__class__ is not float or dropout_p:
        dropout_p = probability(dropout_p)
    expression, tensors = None, ()
    if softcap.__class__ is not float or softcap or alibi_slopes is not None:
        expression, tensors = modified(softcap, alibi_slopes)
    left, right = window_size if window_size is NO_WINDOW else window_sides(window_size)
    if (
        (softmax_scale is None or softmax_scale.__class__ is float)
        and (causal is True or causal is False)
        and (deterministic is False or deterministic is True)
        and (return_attn_probs is False or return_attn_probs is True)
        and attention_chunk.__class__ is int
        and s_aux is None
        and not tensors
        and not dropout_p
        and is_plain(q, k, v)
    ):
        first = (softmax_scale, causal, left, right, attention_chunk, deterministic)
        options = (*first, False, False, expression, 0.0, False)
        learns = torch.is_grad_enabled() and wants_gradient(q, k, v)
        if not return_attn_probs:
            return attend_for_out(q, k, v, options) if learns else forward_out(q, k, v, options)
        out, lse = attend(forward_cuda, q, k, v, options, None) if learns else forward_cuda(q, k, v, options)
    else:
        return_attn_probs = flag("return_attn_probs", return_attn_probs)
        said = (softmax_scale, causal, (left, right), attention_chunk, deterministic)
        if dropout_p and return_attn_probs:
            refuse_tensor_kinds("qkv", (q, k, v))
            rng_state = new_rng_state(q)
            out, lse = run_any(q, k, v, said, (expression, tensors), s_aux, dropout_p, rng_state)
            sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            return out, lse, dropout_mask(rng_state, dropout_p, *sizes, q.dtype)
        out, lse = run_any(q, k, v, said, (expression, tensors), s_aux, dropout_p)
    return (out, lse, None) if return_attn_probs else out


@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: Literal[False] = False,
    *,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
) -> Tensor: ...


@overload
def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, return_attn_probs: Literal[True], **options: Any) -> WithLse: ...


@overload
def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, return_attn_probs: bool, **options: Any) -> Result: ...


def flash_attn_qkvpacked_func(  # type: ignore[misc]  # the later overloads leave out what the first says
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
) -> Result:
    """`flash_attn_func` of the three slices of qkv (batch, seqlen, 3, heads, head_dim), which are not copied.

    Raises as that does, and InvalidInput for another shape.
    """
    q, k, v = unpacked("qkv", qkv, 3)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(  # type: ignore[call-overload]
        q, k, v, *options, attention_chunk=attention_chunk, s_aux=s_aux
    )


@overload
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: Literal[False] = False,
    *,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
) -> Tensor: ...


@overload
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, *args: Any, return_attn_probs: Literal[True], **options: Any
) -> WithLse: ...


@overload
def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, return_attn_probs: bool, **options: Any) -> Result: ...


def flash_attn_kvpacked_func(  # type: ignore[misc]  # the later overloads leave out what the first says
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
) -> Result:
    """`flash_attn_func` of q and the slices of kv (batch, seqlen_k, 2, heads_kv, head_dim), which are not copied.

    Raises as that does, and InvalidInput for another shape.
    """
    k, v = unpacked("kv", kv, 2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(  # type: ignore[call-overload]
        q, k, v, *options, attention_chunk=attention_chunk, s_aux=s_aux
    )


def unpacked(name: str, packed: Tensor, count: int, before: str = "batch, seqlen") -> tuple[Tensor, ...]:
    """The slices of a tensor (..., count, heads, head_dim), whose dimensions `before` are the first."""
    refuse_non_tensors(**{name: packed})
    refuse_tensor_kinds([name], [packed])
    rank = len(before.split()) + 3
    if packed.dim() != rank or packed.shape[-3] != count:
        raise InvalidInput(
            f"{name} has shape {tuple(packed.shape)}; it must be ({before}, {count}, heads, head_dim): "
            f"torch.stack([...], dim={rank - 3}) of {count} tensors"
        )
    return tuple(packed.unbind(-3))

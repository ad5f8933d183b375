"""The functions of flash_attn 2.8: same names, argument order, defaults and shapes.

Options that flash_attn does not have are keyword-only, behind its own.
"""

from __future__ import annotations

from typing import Any, Literal, NoReturn, TypeAlias, overload

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops.arguments import NO_WINDOW, Window, flag, refuse_unbuilt, window_sides
from fa2gen.ops.autograd import Attention, is_plain, wants_gradient
from fa2gen.ops.call import forward_cuda, forward_out
from fa2gen.ops.operator import attention
from fa2gen.ops.validate import refuse_non_tensors, refuse_tensor_kinds

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

WithLse: TypeAlias = tuple[Tensor, Tensor, None]
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
) -> Result:
    """softmax(q k^T * softmax_scale) v, exactly, and its gradients.

    q (batch, seqlen_q, heads, head_dim); k, v (batch, seqlen_k, heads_kv, head_dim); fp16 or bf16.

    softmax_scale      default head_dim ** -0.5.
    causal             query i sees no key after d = i + seqlen_k - seqlen_q.
    window_size        (left, right): query i sees keys d - left to d + right; -1 or None is no limit on that side, and
                       causal makes right 0. A sequence, an array or a tensor of two.
    deterministic      gradients that are the same bits in every run, at some cost in speed; so they are also under
                       torch.use_deterministic_algorithms(True). The forward pass always is.
    return_attn_probs  return (out, lse, None) rather than out; lse (batch, heads, seqlen_q) fp32, differentiable.
    attention_chunk    query i sees keys of its own chunk alone: those j with j // chunk == d // chunk. 0: no chunks.

    CPU tensors run the reference. Raises InvalidInput, or UnsupportedProblem for what is not built yet: dropout,
    softcap and ALiBi.
    """
    if (
        dropout_p.__class__ is not float
        or dropout_p
        or softcap.__class__ is not float
        or softcap
        or alibi_slopes is not None
    ):
        refuse_unbuilt(dropout_p, softcap, alibi_slopes)
    left, right = window_sides(window_size)
    if (
        (softmax_scale is None or softmax_scale.__class__ is float)
        and (causal is True or causal is False)
        and (deterministic is False or deterministic is True)
        and (return_attn_probs is False or return_attn_probs is True)
        and attention_chunk.__class__ is int
        and is_plain(q, k, v)
    ):
        options = (softmax_scale, causal, left, right, attention_chunk, deterministic)
        if torch.is_grad_enabled() and wants_gradient(q, k, v):
            out, lse = Attention.apply(forward_cuda, q, k, v, options)
        elif return_attn_probs:
            out, lse = forward_cuda(q, k, v, options)
        else:
            return forward_out(q, k, v, options)
    else:
        return_attn_probs = flag("return_attn_probs", return_attn_probs)
        out, lse = attention(
            *(q, k, v),
            causal=causal,
            softmax_scale=softmax_scale,
            window_size=(left, right),
            attention_chunk=attention_chunk,
            deterministic=deterministic,
        )
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
) -> Result:
    """`flash_attn_func` of the three slices of qkv (batch, seqlen, 3, heads, head_dim), which are not copied."""
    q, k, v = _unpacked("qkv", qkv, 3)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options, attention_chunk=attention_chunk)  # type: ignore[call-overload]


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
) -> Result:
    """`flash_attn_func` of q and the slices of kv (batch, seqlen_k, 2, heads_kv, head_dim), which are not copied."""
    k, v = _unpacked("kv", kv, 2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options, attention_chunk=attention_chunk)  # type: ignore[call-overload]


def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> NoReturn:
    """Not built yet: raises UnsupportedProblem."""
    _refuse_function("flash_attn_varlen_func", "flash_attn_func, once for each sequence")


def flash_attn_varlen_qkvpacked_func(*args: Any, **kwargs: Any) -> NoReturn:
    """Not built yet: raises UnsupportedProblem."""
    _refuse_function("flash_attn_varlen_qkvpacked_func", "flash_attn_qkvpacked_func, once for each sequence")


def flash_attn_varlen_kvpacked_func(*args: Any, **kwargs: Any) -> NoReturn:
    """Not built yet: raises UnsupportedProblem."""
    _refuse_function("flash_attn_varlen_kvpacked_func", "flash_attn_kvpacked_func, once for each sequence")


def flash_attn_with_kvcache(*args: Any, **kwargs: Any) -> NoReturn:
    """Not built yet: raises UnsupportedProblem."""
    _refuse_function(
        "flash_attn_with_kvcache", "write the new keys yourself, then flash_attn_func on the cache's used part"
    )


def _refuse_function(name: str, nearest: str) -> NoReturn:
    raise UnsupportedProblem(f"{name} is not built yet; nearest: {nearest}")


def _unpacked(name: str, packed: Tensor, count: int) -> tuple[Tensor, ...]:
    refuse_non_tensors(**{name: packed})
    refuse_tensor_kinds([name], [packed])
    if packed.dim() != 5 or packed.shape[2] != count:
        raise InvalidInput(
            f"{name} has shape {tuple(packed.shape)}; it must be (batch, seqlen, {count}, heads, head_dim): "
            f"torch.stack([...], dim=2) of {count} tensors"
        )
    return tuple(packed.unbind(2))

"""The functions of flash_attn 2.8: same names, argument order, defaults and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops.dispatch import forward_out
from fa2gen.ops.operator import attention, is_plain_call
from fa2gen.ops.validate import refuse_non_tensors

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = Sequence[int | None] | None
Result: TypeAlias = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """softmax(q k^T * softmax_scale) v, exactly, and its gradients.

    q (batch, seqlen_q, heads, head_dim); k, v (batch, seqlen_k, heads_kv, head_dim); fp16 or bf16.

    softmax_scale      default head_dim ** -0.5.
    causal             query i sees key j iff j <= i + seqlen_k - seqlen_q.
    window_size        (-1, -1), or a window that hides nothing, or one that means causal, such as (-1, 0).
    deterministic      gradients that are the same bits in every run, at some cost in speed. The forward pass always is.
    return_attn_probs  return (out, lse, None) rather than out; lse (batch, heads, seqlen_q) fp32, differentiable.

    CPU tensors run the reference. Raises InvalidInput, or UnsupportedProblem for what is not built yet: dropout,
    windows, softcap and ALiBi.
    """
    if dropout_p or softcap or alibi_slopes is not None:
        _refuse_options(dropout_p, softcap, alibi_slopes)
    if window_size != (-1, -1):
        causal = _window_is_causal(window_size, q, k, causal)
    if not return_attn_probs and is_plain_call(q, k, v, softmax_scale, causal):
        return forward_out(q, k, v, softmax_scale, causal)
    out, lse = attention(q, k, v, causal=causal, softmax_scale=softmax_scale, deterministic=deterministic)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of the three slices of qkv (batch, seqlen, 3, heads, head_dim), which are not copied."""
    q, k, v = _unpacked("qkv", qkv, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q and the slices of kv (batch, seqlen_k, 2, heads_kv, head_dim), which are not copied."""
    k, v = _unpacked("kv", kv, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


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


def _refuse_options(dropout_p: float, softcap: float, alibi_slopes: Tensor | None) -> None:
    if dropout_p:
        raise UnsupportedProblem(
            f"dropout is not built yet (dropout_p={dropout_p!r}); pass 0.0, which is what evaluation wants. "
            "If this is a scale: the fourth positional argument is dropout_p, as in flash_attn 2; name softmax_scale"
        )
    if softcap:
        raise UnsupportedProblem(f"softcap is not built yet (softcap={softcap!r}); pass 0.0: no cap")
    if alibi_slopes is not None:
        raise UnsupportedProblem("ALiBi is not built yet (alibi_slopes was given); pass None: no bias")


def _window_is_causal(window: Window, q: Tensor, k: Tensor, causal: bool) -> bool:
    """The mask that a window amounts to: causal (True) or none. Raises where it is neither.

    A window shows key j to query i iff i + sk - sq - left <= j <= i + sk - sq + right; -1 or None is no limit on that
    side, and `causal` makes `right` 0.
    """
    refuse_non_tensors(q=q, k=k)
    if window is None:
        return causal
    sides = tuple(-1 if side is None else side for side in window) if isinstance(window, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side >= -1 for side in sides):
        raise InvalidInput(f"window_size is {window!r}; it must be (left, right), each from 0, or -1 for no limit")
    left, right = sides
    if q.dim() == k.dim() == 4:  # any other rank is refused later
        if left >= k.shape[1] - 1:
            left = -1
        if right > 0 and right >= q.shape[1] - 1:
            right = -1
    if left == -1 and (causal or right <= 0):
        return causal or right == 0
    raise UnsupportedProblem(
        f"sliding windows are not built yet (window_size={sides}); nearest: (-1, -1), or causal=True for (-1, 0)"
    )


def _unpacked(name: str, packed: Tensor, count: int) -> tuple[Tensor, ...]:
    refuse_non_tensors(**{name: packed})
    if packed.dim() != 5 or packed.shape[2] != count:
        raise InvalidInput(
            f"{name} has shape {tuple(packed.shape)}; it must be (batch, seqlen, {count}, heads, head_dim): "
            f"torch.stack([...], dim=2) of {count} tensors"
        )
    return tuple(packed.unbind(2))

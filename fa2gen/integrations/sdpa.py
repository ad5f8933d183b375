"""torch's own attention on fa2gen: F.scaled_dot_product_attention, varlen_attn, context_parallel, and who calls these.

torch keeps a registry of flash attention's makers. fa2gen stands there as "fa2gen" once both are imported, and is made
the one by `fa2gen.enable_sdpa()`, or by torch.nn.attention.activate_flash_attention_impl("fa2gen").

From then on aten's flash operators on CUDA are fa2gen's, in both passes. Layouts are torch's: (batch, heads, seqlen,
head_dim) with a causal mask aligned to the top left, or (batch, seqlen, heads, head_dim) and (total, heads, head_dim)
with one aligned to the bottom right. Results have the strides that torch.empty_like gives of what they belong to, as
torch's compiler expects. What fa2gen refuses is an error, as torch has chosen by then.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

from fa2gen.errors import UnsupportedProblem
from fa2gen.ops import flash_attn_func, flash_attn_varlen_func
from fa2gen.ops.autograd import gradients_of

__all__ = ["Enabled", "Overrides", "enable_sdpa"]

_WAY_OUT = "torch.nn.attention.restore_flash_attention_impl() gives torch its own back"


class Enabled:
    """What `enable_sdpa` did; `disable()`, or the end of a with statement, undoes it, once no other is left.

    `disable()` again does nothing; a with statement enables it again.
    """

    _live: ClassVar[set[Enabled]] = set()
    _before: ClassVar[tuple[str | None, bool]]  # the first of them: torch's maker, and whether cuDNN's was enabled

    def __init__(self) -> None:
        self._enable()

    def _enable(self) -> None:
        before = current_flash_attention_impl(), torch.backends.cuda.cudnn_sdp_enabled()
        if before[0] != "fa2gen":
            activate_flash_attention_impl("fa2gen")
        torch.backends.cuda.enable_cudnn_sdp(False)
        if not self._live:
            Enabled._before = before
        self._live.add(self)

    def disable(self) -> None:
        if self not in self._live:
            return
        self._live.remove(self)
        if self._live:
            return
        made_by, cudnn = self._before
        if current_flash_attention_impl() == "fa2gen" != made_by:
            restore_flash_attention_impl()
            if made_by is not None:
                activate_flash_attention_impl(made_by)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)

    def __enter__(self) -> Enabled:
        if self not in self._live:
            self._enable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def enable_sdpa() -> Enabled:
    """Have torch's flash attention be fa2gen's, and preferred to cuDNN's, until the result's `disable()` or the end of
    a with statement.

        fa2gen.enable_sdpa()
        with fa2gen.enable_sdpa(): ...

    F.scaled_dot_product_attention comes here with head dims up to 256, without attn_mask, in fp16 and bf16; causal
    with as many queries as keys; torch's other backends do the rest.
    """
    return Enabled()


class Overrides:
    """aten's flash operators for one dispatch key, while this is alive and not removed."""

    def __init__(self, key: str = "CUDA") -> None:
        library = Library("aten", "IMPL", key)
        for name, function in (
            ("_scaled_dot_product_flash_attention", _sdpa_forward),
            ("_scaled_dot_product_flash_attention_backward", _sdpa_backward),
            ("_flash_attention_forward", _forward),
            ("_flash_attention_forward_no_dropout_inplace", _forward_into),  # torch 2.13 and later
            ("_flash_attention_backward", _backward),
        ):
            if hasattr(torch.ops.aten, name):
                library.impl(name, function, key)
        self._library: Library | None = library

    def remove(self) -> None:
        self._library = None


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    **later: Any,
) -> tuple[Any, ...]:
    key, value, mask = _aligned_top_left(query, key, value, is_causal)
    _refuse(dropout_p, return_debug_mask, later)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    with torch.no_grad():
        out, lse, _ = flash_attn_func(q, k, v, softmax_scale=scale, return_attn_probs=True, **mask)
    out = _like(query, out.transpose(1, 2))
    return (out, lse, None, None, query.shape[2], key.shape[2], *_no_dropout(query))


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
    **later: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse(dropout_p, False, later)
    seen_key, seen_value, mask = _aligned_top_left(query, key, value, is_causal)
    dout, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, seen_key, seen_value, out))
    dq, dk, dv = gradients_of((dout, q, k, v, o, logsumexp), (), scale, **mask)
    unseen = (0, 0, 0, key.shape[2] - seen_key.shape[2])
    dk, dv = (torch.nn.functional.pad(x.transpose(1, 2), unseen) if unseen[3] else x.transpose(1, 2) for x in (dk, dv))
    return _like(query, dq.transpose(1, 2)), _like(key, dk), _like(value, dv)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    # Which of several ways. fa2gen's has the same bits whatever the batch, but over pages: heads that share K and V may
    # share tiles there, as the batch's mean length has it.
    num_splits: int | None = None,
    **later: Any,
) -> tuple[Tensor, ...]:
    _refuse(dropout_p, return_debug_mask, later)
    _refuse_gradients((query, key, value), alibi_slopes=alibi_slopes, seqused_k=seqused_k, block_table=block_table)
    said = {"softmax_scale": scale, "causal": is_causal, "window_size": (window_size_left, window_size_right)}
    with torch.no_grad():
        if cum_seq_q is None and seqused_k is None and block_table is None:
            out, lse, _ = flash_attn_func(query, key, value, alibi_slopes=alibi_slopes, return_attn_probs=True, **said)
        else:
            out, lse, _ = flash_attn_varlen_func(
                *(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k),
                alibi_slopes=alibi_slopes,
                return_attn_probs=True,
                block_table=block_table,
                seqused_k=seqused_k,
                **said,
            )
    return _like(query, out), lse, *_no_dropout(query)


def _forward_into(out: Tensor, *arguments: Any, **options: Any) -> Tensor:
    result, lse, *_ = _forward(*arguments, **options)
    out.copy_(result)
    return lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **later: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse(dropout_p, False, later)
    left, right = (-1 if side is None else side for side in (window_size_left, window_size_right))
    lengths = () if cum_seq_q is None else (cum_seq_q, cum_seq_k, None, None)
    dq, dk, dv = gradients_of((grad_out, query, key, value, out, logsumexp), lengths, scale, is_causal, (left, right))
    return _like(query, dq), _like(key, dk), _like(value, dv)


def _aligned_top_left(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(key, value, mask) of tensors (batch, heads, seqlen, head_dim): query i sees keys to i, where causal.

    fa2gen's query i is at key i + keys - queries: keys that nobody sees are left out, or else the window is wider.
    """
    beyond = query.shape[2] - key.shape[2]
    if not is_causal:
        return key, value, {"causal": False, "window_size": (-1, -1)}
    if beyond > 0:
        return key, value, {"causal": False, "window_size": (-1, beyond)}
    seen = query.shape[2]
    return key[:, :, :seen], value[:, :, :seen], {"causal": True, "window_size": (-1, -1)}


def _like(given: Tensor, result: Tensor) -> Tensor:
    """The result with the strides of torch.empty_like(given), which have the same sizes but for the last."""
    if result.stride() == given.stride():
        return result
    if result.shape != given.shape:  # of a v that is narrower than q
        return result
    like = torch.empty_like(given)
    return result if result.stride() == like.stride() else like.copy_(result)


def _no_dropout(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rng_state, unused, debug_attn_mask), which nobody needs."""
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return state, torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)


def _refuse(dropout_p: float, return_debug_mask: bool, later: dict[str, Any]) -> None:
    if dropout_p:
        raise UnsupportedProblem(f"dropout_p={dropout_p} is not built behind torch's attention: {_WAY_OUT}")
    if return_debug_mask:
        raise UnsupportedProblem(f"return_debug_mask is not built: {_WAY_OUT}")
    if given := [name for name, x in later.items() if x is not None]:
        raise UnsupportedProblem(f"{', '.join(given)} of a newer torch is not known here: {_WAY_OUT}")


def _refuse_gradients(tensors: tuple[Tensor, ...], **options: Tensor | None) -> None:
    """Raise UnsupportedProblem where a gradient may be asked for: torch's backward operator hears of none of these."""
    given = [name for name, x in options.items() if x is not None]
    if given and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise UnsupportedProblem(
            f"{given[0]} has no gradient behind torch's attention, and an input requires one: call "
            "fa2gen.flash_attn_varlen_func, or this under torch.no_grad()"
        )

"""Rotary embeddings with the signatures of flash_attn.layers.rotary, on torch alone: computed in fp32, differentiable.

x is (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim) with cu_seqlens; cos and sin (positions,
rotary_dim / 2). The first rotary_dim of the head dim are turned: neighbouring columns where interleaved, else columns
rotary_dim / 2 apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput

__all__ = [
    "RotaryEmbedding",
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Each pair (a, b) of columns as (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x, turned; its place in a sequence is counted from seqlen_offsets, one number or (batch,). inplace: x itself."""
    if inplace:
        return _in_place(x, "x", (cos, sin), None, interleaved, seqlen_offsets, cu_seqlens)
    return _turned(x, cos, sin, interleaved, seqlen_offsets, cu_seqlens)


def _turned(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise InvalidInput(f"cos has {cos.shape[-1]} columns, for {2 * cos.shape[-1]} of a head dim of {x.shape[-1]}")
    places = _places(x, seqlen_offsets, cu_seqlens)
    if places.dim() == 1 and cu_seqlens is None and isinstance(seqlen_offsets, int):
        cos, sin = (t[seqlen_offsets : seqlen_offsets + x.shape[1]] for t in (cos, sin))
    else:
        cos, sin = cos[places], sin[places]
    return apply_rotary_emb_torch(x, cos, sin, interleaved)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x (..., seqlen, heads, head_dim), turned by cos and sin (..., seqlen, rotary_dim / 2)."""
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = (
        (t.repeat_interleave(2, dim=-1) if interleaved else torch.cat((t, t), dim=-1)).float().unsqueeze(-2)
        for t in (cos, sin)
    )
    part = x[..., :rotary_dim].float()
    turned = (part * cos + rotate_half(part, interleaved) * sin).to(x.dtype)
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """`apply_rotary_emb`, back again where conjugate."""
    return apply_rotary_emb(x, cos, -sin if conjugate else sin, interleaved, inplace, seqlen_offsets, cu_seqlens)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """qkv itself, with q and k turned: (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, heads, head_dim) of
    num_heads_q heads of q, then as many of k as of v."""
    if qkv.dim() != 5 and num_heads_q is None:
        raise InvalidInput(f"qkv has {qkv.dim()} dimensions, and num_heads_q is None: it says which heads are q's")
    of_key = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    layout = "qkv" if num_heads_q is None or qkv.dim() == 5 else num_heads_q
    return _in_place(qkv, layout, (cos, sin), of_key, interleaved, seqlen_offsets, None)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """kv (batch, seqlen, 2, heads, head_dim) itself, with k turned."""
    return _in_place(kv, "kv", (cos, sin), None, interleaved, seqlen_offsets, None)


# In place ---------------------------------------------------------------------------------------------------------

Layout: TypeAlias = str | int  # of what is turned in a tensor: "x" all, "kv", "qkv", or how many heads are q's


def _in_place(
    x: Tensor,
    layout: Layout,
    tables: tuple[Tensor, Tensor],
    of_key: tuple[Tensor, Tensor] | None,
    interleaved: bool,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """x, of which these parts are turned: also where x is a leaf of autograd's, or a view that it lets nobody write."""
    tables = (*tables, *(of_key or ()))
    if torch.is_grad_enabled() and x.requires_grad:
        turned: Tensor = _InPlace.apply(x, layout, interleaved, seqlen_offsets, cu_seqlens, *tables)
        return turned
    _turn(x, tables, layout, interleaved, seqlen_offsets, cu_seqlens)
    return x


class _InPlace(torch.autograd.Function):
    """`_turn`, whose gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *said: Any) -> Tensor:
        ctx.said = said[:4]
        ctx.save_for_backward(*said[4:])
        _turn(x, said[4:], *said[:4])
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        back = [-table if at % 2 else table for at, table in enumerate(ctx.saved_tensors)]
        dx = dx.clone()
        _turn(dx, back, *ctx.said)
        return dx, None, None, None, None, *[None] * len(back)


def _turn(
    x: Tensor,
    tables: Sequence[Tensor],
    layout: Layout,
    interleaved: bool,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
) -> None:
    """Write to the parts of x; tables are cos and sin, and behind them those of k."""
    if isinstance(layout, int):
        parts = [x[:, :, :layout], x[:, :, layout : (x.shape[2] + layout) // 2]]
    else:
        parts = {"x": [x], "kv": [x[:, :, 0]], "qkv": [x[:, :, 0], x[:, :, 1]]}[layout]
    for at, part in enumerate(parts):
        cos, sin = tables[2 * at : 2 * at + 2]
        part.copy_(_turned(part, cos, sin, interleaved, seqlen_offsets, cu_seqlens))


class RotaryEmbedding(torch.nn.Module):
    """Turns q and k by their places: of pair i of `dim` columns by base ** (-2 i / dim) a place.

    scale_base         of xPos: q grows and k shrinks with the place, about the middle; None: neither.
    pos_idx_in_fp32    whether places are exact; else they are rounded to the dtype of the frequencies.

    The private names are flash_attn's, for subclasses that override methods and callers that read tables.
    """

    inv_freq: Tensor
    scale: Tensor | None
    _cos_cached: Tensor | None
    _sin_cached: Tensor | None
    _cos_k_cached: Tensor | None
    _sin_k_cached: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        pos_idx_in_fp32: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        self.scale_base, self.pos_idx_in_fp32 = scale_base, pos_idx_in_fp32
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached = self._sin_cached = self._cos_k_cached = self._sin_k_cached = None

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """qkv as in `apply_rotary_emb_qkv_`, turned in place; or q (batch, seqlen, heads, head_dim) and kv (batch,
        seqlen, 2, heads, head_dim), both of them. max_seqlen: where the last place is, if offsets are a tensor."""
        places = qkv.shape[1] if max_seqlen is None else max_seqlen
        if max_seqlen is None:
            places += seqlen_offset if isinstance(seqlen_offset, int) else int(seqlen_offset.max())
        self._update_cos_sin_cache(places, device=qkv.device, dtype=qkv.dtype)
        cos, sin, cos_k, sin_k = self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached
        assert cos is not None and sin is not None
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        of_key = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
        return q, apply_rotary_emb_kv_(kv, *of_key, self.interleaved, seqlen_offset)

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        return 1.0 / self.base ** (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Have cos and sin of so many places, and those of k where they differ."""
        known = self._cos_cached
        if (
            known is not None
            and seqlen <= self._seq_len_cached
            and (known.device, known.dtype) == (device, dtype)
            and (not known.is_inference() or torch.is_inference_mode_enabled())  # else autograd could not keep them
        ):
            return
        self._seq_len_cached = seqlen
        exact = self.pos_idx_in_fp32 and self.inv_freq.dtype != torch.float32
        frequencies = self._compute_inv_freq(device) if exact else self.inv_freq.to(device)
        at = torch.arange(seqlen, device=device, dtype=frequencies.dtype)
        angles = torch.outer(at, frequencies)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (at - seqlen // 2) / self.scale_base
        scale = self.scale.to(device) ** power.unsqueeze(-1)
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)


def _places(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Of each row in its sequence: (seqlen,), (batch, seqlen), or (total,) of a packed batch."""
    if cu_seqlens is None:
        at = torch.arange(x.shape[1], device=x.device)
        return at if isinstance(offsets, int) else at + offsets.unsqueeze(-1)
    at = torch.arange(x.shape[0], device=x.device)
    ids = torch.bucketize(at, cu_seqlens[1:-1].long(), right=True)
    at = at - cu_seqlens[ids]
    return at + (offsets if isinstance(offsets, int) else offsets[ids])

"""What a call must obey before a kernel sees it. Each error names the rule, the numbers and what works instead."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.options import Options
from fa2gen.spec import HEAD_DIM_STEP, MAX_HEAD_DIM, DType

__all__ = [
    "DTYPES",
    "describe",
    "refuse_non_tensors",
    "refuse_tensor_kinds",
    "validate",
    "validate_backward",
    "validate_options",
]

DTYPES: dict[Any, DType] = {torch.float16: "fp16", torch.bfloat16: "bf16"}

# Kernels hold the scale, and log2(e) times it, in fp32; products of q and k up to 1e8 times the greatest stay finite.
_MIN_SCALE: float = torch.finfo(torch.float32).tiny
_MAX_SCALE = 1e30
_OTHER = "torch.nn.functional.scaled_dot_product_attention"


def validate(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise InvalidInput or UnsupportedProblem unless q (B, Sq, H, D) and k, v (B, Sk, Hk, D) can be computed with.

    For any device, and for fake tensors with symbolic sizes.
    """
    _validate_kind(q, k, v)
    batch, _, num_heads, head_dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != batch:
            raise InvalidInput(f"q has batch {batch}, {name} has batch {x.shape[0]}: expand or slice one of them")
        if x.shape[3] != head_dim:
            raise UnsupportedProblem(
                f"q has head_dim {head_dim}, {name} has {x.shape[3]}; they must be equal: pad the shorter one "
                "with zeros (torch.nn.functional.pad) and give softmax_scale"
            )
    for i, what in ((1, "seqlen"), (2, "heads")):
        if k.shape[i] != v.shape[i]:
            raise InvalidInput(f"k has {what} {k.shape[i]}, v has {what} {v.shape[i]}; they must be equal: slice one")
    _validate_head_dim(head_dim)
    _validate_heads(num_heads, k.shape[2])
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 and x.numel() > 0:
            raise InvalidInput(
                f"{name}.stride(-1) is {x.stride(3)} (strides {tuple(x.stride())}); the last dimension must be "
                f"contiguous, stride 1: pass {name}.contiguous()"
            )


def validate_options(options: Options) -> None:
    """Raise InvalidInput or UnsupportedProblem unless a call can have these numbers.

    Symbolic ones, under torch.compile, are checked when they have a value.
    """
    scale, _, left, right, chunk, _ = options
    if isinstance(scale, float | int) and not _MIN_SCALE <= scale <= _MAX_SCALE:  # NaN fails every comparison
        _refuse_scale(scale)
    for name, number, least in (("window_left", left, -1), ("window_right", right, -1), ("chunk", chunk, 0)):
        if isinstance(number, int) and number < least:
            raise InvalidInput(f"{name} is {number}; it must be at least {least}, which means no limit")


def validate_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
) -> None:
    """Raise InvalidInput or UnsupportedProblem unless gradients can be computed from these. Also for fake tensors."""
    validate(q, k, v)
    batch, seqlen_q, num_heads, _ = q.shape
    rows = (batch, num_heads, seqlen_q)
    for name, x, shape, dtype in (
        ("dout", dout, q.shape, q.dtype),
        ("out", out, q.shape, q.dtype),
        ("lse", lse, rows, torch.float32),
        ("dlse", dlse, rows, torch.float32),
    ):
        if x is not None and (tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != q.device):
            raise InvalidInput(f"{name} is {describe(x)}; it must be {tuple(shape)} {dtype} on {q.device}")


def refuse_non_tensors(**named: object) -> None:
    """Raise InvalidInput, by name, for the first argument that is no tensor."""
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise InvalidInput(f"{name} must be a torch.Tensor, not {describe(x)}: torch.as_tensor({name}) makes one")


def refuse_tensor_kinds(names: Iterable[str], tensors: Iterable[Tensor | None]) -> None:
    """Raise UnsupportedProblem, by name, for nested tensors, of which not even the sizes can be asked for, and for
    others that are not dense."""
    for name, x in zip(names, tensors, strict=True):
        if x is None:
            continue
        if x.is_nested:
            raise UnsupportedProblem(
                f"{name} is a nested tensor, whose sequences have lengths of their own; kernels for them are not built "
                "yet. Nearest: one call for each sequence, with a batch of one: flash_attn_func(q.unsqueeze(0), ...) "
                "for q, k, v in zip(q.unbind(), k.unbind(), v.unbind())"
            )
        if x.layout != torch.strided:
            raise UnsupportedProblem(f"{name} has layout {x.layout}; kernels take dense tensors: {name}.to_dense()")


def describe(x: object) -> str:
    """How an error speaks of an argument."""
    if isinstance(x, Tensor) and x.is_nested:
        return f"a nested tensor, {x.dtype} on {x.device}"
    if isinstance(x, Tensor):
        return f"a tensor {tuple(x.shape)} {x.dtype} on {x.device}"
    return f"{x!r} ({type(x).__name__})" if isinstance(x, bool | int | float | complex | str) else type(x).__name__


def _validate_kind(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Rank, layout, device and dtype."""
    refuse_tensor_kinds("qkv", (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.device.type not in ("cuda", "cpu", "meta"):
            raise UnsupportedProblem(
                f"{name} is on {x.device}; fa2gen runs on cuda (NVIDIA), and a reference on the CPU"
            )
        if x.dim() != 4:
            raise InvalidInput(
                f"{name} has {x.dim()} dimensions, {tuple(x.shape)}; it must have 4, (batch, seqlen, heads, head_dim)"
                + (f": for a batch of one, {name}.unsqueeze(0)" if x.dim() == 3 else "")
            )
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            raise InvalidInput(f"q is on {q.device}, {name} on {x.device}; use one device: {name}.to(q.device)")
        if x.dtype != q.dtype:
            raise InvalidInput(f"q is {q.dtype}, {name} is {x.dtype}; use one dtype: {name}.to(q.dtype)")
    if q.dtype not in DTYPES:
        raise UnsupportedProblem(
            f"q, k and v are {q.dtype}; kernels take torch.float16 and torch.bfloat16: cast with .to(torch.bfloat16)"
        )


def _validate_head_dim(head_dim: int) -> None:
    if head_dim == 0:
        raise InvalidInput(
            f"head_dim is 0; it must be a multiple of {HEAD_DIM_STEP} from {HEAD_DIM_STEP} to {MAX_HEAD_DIM}"
        )
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedProblem(f"head_dim is {head_dim}; the largest is {MAX_HEAD_DIM}. Nearest: {_OTHER}")
    if head_dim % HEAD_DIM_STEP:
        padded = -(-head_dim // HEAD_DIM_STEP) * HEAD_DIM_STEP
        raise UnsupportedProblem(
            f"head_dim is {head_dim}; it must be a multiple of {HEAD_DIM_STEP}: pad q, k and v to {padded} with "
            f"torch.nn.functional.pad(x, (0, {padded - head_dim})), pass softmax_scale={head_dim}**-0.5, "
            f"and take out[..., :{head_dim}]"
        )


def _validate_heads(num_heads: int, num_heads_kv: int) -> None:
    if num_heads == 0 and num_heads_kv == 0:
        return
    if num_heads_kv == 0 or num_heads % num_heads_kv:
        divisors = [n for n in range(1, int(num_heads) + 1) if num_heads % n == 0]
        nearest = min(divisors, key=lambda n: (abs(n - num_heads_kv), n), default=1)
        raise InvalidInput(
            f"q has {num_heads} heads, k and v have {num_heads_kv}; q's must be a multiple of theirs "
            f"(nearest for k and v: {nearest})"
        )


def _refuse_scale(scale: float) -> NoReturn:
    if not math.isfinite(scale):
        raise InvalidInput(f"softmax_scale is {scale}; it must be finite and above 0. None means head_dim ** -0.5")
    if scale < 0:
        nearest = f"pass -q and softmax_scale={-scale:g}, which gives the same scores"
    elif scale == 0:
        nearest = "all visible keys weigh the same then: take the mean of v over them"
    else:
        nearest = f"scale q instead ({_MIN_SCALE:.3g} to {_MAX_SCALE:.3g} is taken)"
    raise UnsupportedProblem(f"softmax_scale is {scale:g}; kernels take a normal fp32 number above 0: {nearest}")

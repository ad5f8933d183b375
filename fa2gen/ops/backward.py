"""The gradients of CUDA tensors: as fa2gen.ops.dispatch, for the three backward kernels and their scratch memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput
from fa2gen.gpus import device_at
from fa2gen.ops.dispatch import _also_forgotten, _choose, _kernel, _strides, aligned
from fa2gen.ops.validate import DTYPES, describe, validate
from fa2gen.options import Options, Shape
from fa2gen.spec import Tiling

if TYPE_CHECKING:
    from fa2gen.kernel import PreparedLaunch

__all__ = ["backward_cuda", "validate_backward"]


@dataclass(frozen=True, slots=True)
class _Call:
    """What all calls with one signature share; `launch` is None where there is no query or no key: gradients are 0."""

    device: int
    launch: PreparedLaunch | None


_REMEMBERED_CALLS = 1024
_calls: dict[tuple[Any, ...], _Call] = {}
_also_forgotten.append(_calls.clear)

Gradients = tuple[Tensor, Tensor, Tensor]


def backward_cuda(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    tiling: Tiling | None = None,
    into: Gradients | None = None,
) -> Gradients:
    """(dq, dk, dv) by generated kernels, contiguous, on the current stream of q's device.

    dout, out      shaped as q, of any strides; lse, dlse (batch, heads, seqlen_q) fp32.
    deterministic  the same bits in every run: dq is summed in one order. dk and dv always are.
    into           contiguous buffers to use.

    Raises InvalidInput, UnsupportedProblem, InfeasibleSpec (for a tiling of the caller's), or what building a kernel
    raises.
    """
    # TMA, cp.async and 16-byte loads need 16-byte alignment, the row statistics dense rows.
    q, k, v, dout, out = (aligned(x) for x in (q, k, v, dout, out))
    lse = lse.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    shapes = tuple((x.shape, x.stride(), x.dtype, x.get_device()) for x in (q, k, v, dout, out))
    rows = tuple(None if x is None else (x.shape, x.dtype, x.get_device()) for x in (lse, dlse))
    key = (*shapes, *rows, softmax_scale, causal, deterministic, tiling)
    call = _calls.get(key)
    if call is None:
        call = _prepare(dout, q, k, v, out, lse, dlse, softmax_scale, causal, deterministic, tiling)
        if len(_calls) >= _REMEMBERED_CALLS:
            _calls.clear()
        _calls[key] = call
    dq, dk, dv = into or (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    launch = call.launch
    if launch is None:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return dq, dk, dv
    with torch.cuda.device(call.device):
        # Freed for the allocator at return, when no later kernel of this stream can have started.
        scratch = q.new_empty(launch.scratch_bytes, dtype=torch.uint8)
        tensors = (q, k, v, out, dout, dq, dk, dv, lse)
        addresses = (*[x.data_ptr() for x in tensors], 0 if dlse is None else dlse.data_ptr())
        launch(addresses, scratch.data_ptr(), torch._C._cuda_getCurrentRawStream(call.device))
    return dq, dk, dv


def validate_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, softmax_scale: float
) -> None:
    """Raise InvalidInput or UnsupportedProblem unless gradients can be computed from these. Also for fake tensors."""
    validate(q, k, v, softmax_scale)
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


def _prepare(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    tiling: Tiling | None,
) -> _Call:
    """Validate a signature; choose, load and pack its kernels."""
    validate_backward(dout, q, k, v, out, lse, dlse, softmax_scale)
    batch, seqlen_q, num_heads, head_dim = q.shape
    seqlen_k, num_heads_kv = k.shape[1:3]
    device = q.get_device()
    options = Options(softmax_scale, causal, deterministic=deterministic)
    problem = options.problem("bwd", head_dim, DTYPES[q.dtype])
    plan, target = _choose(problem, device_at(device), None, tiling, seqlen_k)
    if not (q.numel() and k.numel()):
        return _Call(device, None)

    def dense(seqlen: int, heads: int) -> tuple[int, int, int]:
        return seqlen * heads * head_dim, heads * head_dim, head_dim

    of_query, of_key = dense(seqlen_q, num_heads), dense(seqlen_k, num_heads_kv)
    strides = {name: _strides(x) for name, x in (("q", q), ("k", k), ("v", v), ("o", out), ("dout", dout))}
    launch = _kernel(plan, target, device).prepare(
        Shape(batch, seqlen_q, seqlen_k, num_heads, num_heads_kv),
        strides | {"dq": of_query, "dk": of_key, "dv": of_key},
        options,
    )
    return _Call(device, launch)

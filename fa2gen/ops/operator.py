"""The `torch.library` operator `fa2gen::fwd`, and `attention`, which calls it.

fwd(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal) -> (Tensor out, Tensor lse): CUDA tensors run a
generated kernel, CPU tensors the reference, fake tensors its shapes. `Library.define` and `impl` rather than
`custom_op`: 4 microseconds a call instead of 11.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops.dispatch import forward_cuda
from fa2gen.ops.validate import default_scale, describe, refuse_non_tensors, validate
from fa2gen.reference import attention_tiled
from fa2gen.spec import Tiling

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    arch: str | None = None,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as (out, lse); shapes as in `fa2gen.ops`.

    softmax_scale  default head_dim ** -0.5.
    arch           "sm80" or "sm90": the kernel family, for CUDA tensors; by default the best that the device runs.
    tiling         one exact tiling, instead of the selected one.

    With `arch` or `tiling` the kernel is called directly, not through the operator: torch.compile cannot see into that.
    Raises InvalidInput, UnsupportedProblem, or InfeasibleSpec for a tiling that does not fit.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        refuse_non_tensors(q=q, k=k, v=v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise UnsupportedProblem(
            "gradients are not built yet, and an input requires one: call under torch.no_grad(), or detach the inputs"
        )
    if type(softmax_scale) is not float:
        softmax_scale = _scale(softmax_scale, q)
    if not isinstance(causal, bool | int):
        raise InvalidInput(f"causal must be True or False, not {describe(causal)}")
    if arch is None and tiling is None:
        try:
            out, lse = _OPERATOR(q, k, v, softmax_scale, bool(causal))
            return out, lse
        except NotImplementedError:  # ours, or torch's two pages about a backend that has no kernel
            validate(q, k, v, softmax_scale)
            raise
    if not q.is_cuda:
        raise InvalidInput(f"arch and tiling choose a CUDA kernel, but q is on {q.device}: leave them out")
    return forward_cuda(q, k, v, softmax_scale, bool(causal), arch, tiling)


def _scale(softmax_scale: Any, q: Tensor) -> Any:
    """A number for the operator. Raises InvalidInput."""
    if softmax_scale is None:
        return default_scale(q)
    if isinstance(softmax_scale, torch.SymFloat | torch.SymInt):  # under torch.compile
        return softmax_scale
    if isinstance(softmax_scale, bool):  # a number to Python, a misplaced argument to us
        hint = "; did you mean causal, which comes after it?"
    elif isinstance(softmax_scale, Real):
        return float(softmax_scale)
    else:
        hint = ""
    raise InvalidInput(f"softmax_scale must be a number or None, not {describe(softmax_scale)}{hint}")


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    validate(q, k, v, softmax_scale)
    return attention_tiled(q, k, v, causal=causal, softmax_scale=softmax_scale)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    validate(q, k, v, softmax_scale)
    batch, seqlen_q, num_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, num_heads, seqlen_q), dtype=torch.float32)


_LIBRARY = torch.library.Library("fa2gen", "DEF")
_LIBRARY.define(
    "fwd(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)
_LIBRARY.impl("fwd", _forward_cpu, "CPU")
_LIBRARY.impl("fwd", forward_cuda, "CUDA")
torch.library.register_fake("fa2gen::fwd", _forward_fake, lib=_LIBRARY)
_OPERATOR = torch.ops.fa2gen.fwd.default

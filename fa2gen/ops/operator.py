"""The `torch.library` operators `fa2gen::fwd` and `fa2gen::bwd`, and `attention`, which calls them.

fwd(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal) -> (Tensor out, Tensor lse)
bwd(Tensor dout, q, k, v, out, lse, Tensor? dlse, float softmax_scale, bool causal, bool deterministic) -> (dq, dk, dv)

CUDA tensors run generated kernels, CPU tensors the reference, fake tensors its shapes. `Library.define` and `impl`
rather than `custom_op`: 4 microseconds a call instead of 11; autograd is a Function around the operators for the same
reason.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops.backward import backward_cuda, validate_backward
from fa2gen.ops.dispatch import forward_cuda
from fa2gen.ops.validate import DTYPES, default_scale, describe, refuse_non_tensors, validate
from fa2gen.reference import attention_backward_tiled, attention_tiled
from fa2gen.spec import Tiling

__all__ = ["attention", "is_plain_call"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    arch: str | None = None,
    tiling: Tiling | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention as (out, lse), both differentiable, once; shapes as in `fa2gen.ops`.

    softmax_scale  default head_dim ** -0.5.
    arch           "sm80" or "sm90": the kernel family, for CUDA tensors; by default the best that the device runs.
    tiling         one exact tiling, instead of the selected one.
    deterministic  gradients that are the same bits in every run, at some cost in speed; the forward pass always is.

    Under torch.autocast q, k and v are cast to its dtype, as torch's scaled_dot_product_attention casts them; gradients
    come back in the dtypes of the inputs.
    With `arch` or `tiling` the kernel is called directly, not through the operator: torch.compile cannot see into that.
    Raises InvalidInput, UnsupportedProblem, or InfeasibleSpec for a tiling that does not fit.
    """
    if is_plain_call(q, k, v, softmax_scale, causal):
        return forward_cuda(q, k, v, softmax_scale, causal, arch, tiling)
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        refuse_non_tensors(q=q, k=k, v=v)
    if (q.is_cuda or q.is_cpu) and torch.is_autocast_enabled(q.device.type):
        q, k, v = _autocast(q, k, v)
    if forward_ad._current_level >= 0:
        _refuse_tangents(q, k, v)
    if type(softmax_scale) is not float:
        softmax_scale = _scale(softmax_scale, q)
    if not isinstance(causal, bool | int):
        raise InvalidInput(f"causal must be True or False, not {describe(causal)}")
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if needs_grad and (arch is not None or tiling is not None):
        raise UnsupportedProblem(
            "arch and tiling choose a forward kernel, and an input requires a gradient: leave them out, or detach it"
        )
    if arch is None and tiling is None:
        try:
            if needs_grad:
                transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
                function = _TransformedAttention if transformed else _Attention
                out, lse = function.apply(q, k, v, softmax_scale, bool(causal), bool(deterministic))
                return out, lse
            out, lse = _OPERATOR(q, k, v, softmax_scale, bool(causal))
            return out, lse
        except NotImplementedError:  # ours, or torch's two pages about a backend that has no kernel
            validate(q, k, v, softmax_scale)
            raise
    if not q.is_cuda:
        raise InvalidInput(f"arch and tiling choose a CUDA kernel, but q is on {q.device}: leave them out")
    return forward_cuda(q, k, v, softmax_scale, bool(causal), arch, tiling)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype of the autocast region, by torch's rule: all but fp64 and integers, which validation refuses."""
    dtype = torch.get_autocast_dtype(q.device.type)
    if dtype not in DTYPES:
        return q, k, v
    eligible = (torch.float32, *DTYPES)
    q, k, v = (x.to(dtype) if x.dtype in eligible else x for x in (q, k, v))
    return q, k, v


def _refuse_tangents(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise UnsupportedProblem for forward-mode derivatives: a kernel would drop them without a word."""
    if any(forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)):
        raise UnsupportedProblem(
            "a forward-mode derivative (torch.func.jvp, dual tensors) was asked for, and attention has reverse mode "
            "alone: take torch.func.vjp or backward(), or torch.nn.functional.scaled_dot_product_attention with its "
            "math backend"
        )


# Bound here, as a lookup through torch's modules costs a third of what these do.
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_tracing = torch._C._is_tracing


def is_plain_call(q: Tensor, k: Tensor, v: Tensor, softmax_scale: object, causal: object) -> bool:
    """Whether nothing but a kernel would see this call, whose options need no conversion: the operator's dispatch (4
    microseconds) is then left out.

    Others that may look: torch.compile, tensor subclasses (fake, distributed), autograd in both modes, dispatch modes
    (tracing, flop counting), function transforms (vmap), autocast and torch.jit.trace. Whatever `attention` refuses is
    no plain call either, but for what the tensors' own signature decides.
    """
    return (
        not torch.compiler.is_compiling()
        and type(q) is Tensor
        and type(k) is Tensor
        and type(v) is Tensor
        and q.is_cuda
        and (softmax_scale is None or type(softmax_scale) is float)
        and (causal is True or causal is False)
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        and not _is_any_autocast_enabled()
        and not _num_dispatch_modes()
        and _innermost_transform() is None
        and forward_ad._current_level < 0
        and not _is_tracing()
    )


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
    with torch.autocast("cpu", enabled=False):  # which would round the fp32 products
        return attention_tiled(q, k, v, causal=causal, softmax_scale=softmax_scale)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    validate(q, k, v, softmax_scale)
    batch, seqlen_q, num_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, num_heads, seqlen_q), dtype=torch.float32)


def _backward_cpu(
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
) -> tuple[Tensor, Tensor, Tensor]:
    validate_backward(dout, q, k, v, out, lse, dlse, softmax_scale)
    with torch.autocast("cpu", enabled=False):
        return attention_backward_tiled(dout, q, k, v, out, lse, dlse, causal=causal, softmax_scale=softmax_scale)


def _backward_fake(
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
) -> tuple[Tensor, Tensor, Tensor]:
    validate_backward(dout, q, k, v, out, lse, dlse, softmax_scale)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    """(out, lse) of (q, k, v), with the operators' gradients."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse = _OPERATOR(q, k, v, softmax_scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        ctx.options = softmax_scale, causal, deterministic
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 6
        if dout is None:
            dout = torch.zeros_like(out)
        # With grad mode (create_graph=True) the gradients must remember what they came from, if only to refuse.
        run = _Gradients.apply if torch.is_grad_enabled() else _BACKWARD
        dq, dk, dv = run(dout, q, k, v, out, lse, dlse, *ctx.options)
        return dq, dk, dv, None, None, None


class _TransformedAttention(_Attention):
    """The same in the form that torch.func asks for, whose calls cost 40 microseconds more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse = _OPERATOR(q, k, v, softmax_scale, causal)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.set_materialize_grads(False)
        ctx.options = inputs[3:]


class _Gradients(torch.autograd.Function):
    """The operator, with a refusal in the place of its own gradients: torch would take them for zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _BACKWARD(*arguments)
        return dq, dk, dv

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to keep: there is no gradient."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise UnsupportedProblem(
            "a second derivative of attention was asked for (double backward, gradgradcheck, hessian), and it can be "
            "differentiated once: its gradients have none themselves. For second derivatives take "
            "torch.nn.functional.scaled_dot_product_attention with its math backend"
        )


_LIBRARY = torch.library.Library("fa2gen", "DEF")
_LIBRARY.define(
    "fwd(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)
_LIBRARY.impl("fwd", _forward_cpu, "CPU")
_LIBRARY.impl("fwd", forward_cuda, "CUDA")
torch.library.register_fake("fa2gen::fwd", _forward_fake, lib=_LIBRARY)
_LIBRARY.define(
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, float softmax_scale, "
    "bool causal, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)
_LIBRARY.impl("bwd", _backward_cpu, "CPU")
_LIBRARY.impl("bwd", backward_cuda, "CUDA")
torch.library.register_fake("fa2gen::bwd", _backward_fake, lib=_LIBRARY)
_OPERATOR = torch.ops.fa2gen.fwd.default
_BACKWARD = torch.ops.fa2gen.bwd.default

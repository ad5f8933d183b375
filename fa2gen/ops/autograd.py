"""The gradients of attention, for every way in which PyTorch asks for them.

`Attention` is the autograd function, of dense and of ragged batches, `GeneralAttention` that of calls with further
tensors, `Output` and `RaggedOutput` those of plain calls which do not ask for lse. The operators `fa2gen::fwd`,
`fwd_varlen` and `fwd_general` apply the first two in their Autograd kernels (see `fa2gen.ops.library`), so that whoever
calls an operator gets gradients: exported programs, graphs of make_fx, torch.compile. A plain eager call applies them
around the CUDA kernels themselves, without the operator's dispatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from fa2gen.errors import UnsupportedProblem
from fa2gen.ops.arguments import named
from fa2gen.ops.call import AnyOptions, backward_cuda, forward_cuda
from fa2gen.ops.general import AllGradients, backward_general
from fa2gen.ops.ragged import backward_ragged, forward_ragged
from fa2gen.options import Expression, Options
from fa2gen.spec import program_of

__all__ = [
    "Attention",
    "GeneralAttention",
    "Gradients",
    "Output",
    "RaggedOutput",
    "apply",
    "attend",
    "attend_for_out",
    "attend_for_ragged_out",
    "attend_generally",
    "by_operator",
    "gradients_of",
    "is_plain",
    "learning_of",
    "refuse_tangents",
    "wants_gradient",
]

# Bound here, as a lookup through torch's modules costs a third of what these do.
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_tracing = torch._C._is_tracing
wants_gradient: Callable[..., bool] = torch._C._any_requires_grad


def is_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether nothing but a kernel and autograd's reverse mode would see a call of these CUDA tensors: the operator's
    dispatch (4 microseconds) is then left out.

    Others that may look: torch.compile, tensor subclasses (fake, distributed), forward-mode autograd, dispatch modes
    (tracing, flop counting), function transforms (vmap), autocast and torch.jit.trace.
    """
    return (
        not torch.compiler.is_compiling()
        and type(q) is Tensor
        and type(k) is Tensor
        and type(v) is Tensor
        and q.is_cuda
        and not _is_any_autocast_enabled()
        and not _num_dispatch_modes()
        and _innermost_transform() is None
        and forward_ad._current_level < 0
        and not _is_tracing()
    )


def apply(function: type[torch.autograd.Function], run: Callable[..., Any], *arguments: Any) -> Any:
    """`function.apply(run, ...)`, inside of an operator's Autograd kernel.

    There each transform of torch.func calls that kernel by itself, level by level, so that a Function is one level's
    alone: that is what torch's own `custom_function_call` makes of one.
    """
    if not torch._C._are_functorch_transforms_active():
        return function.apply(run, *arguments)

    def run_below(*given: Any) -> Any:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # which apply takes from the levels below
            return run(*given)

    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(run_below, *arguments)


class Attention(torch.autograd.Function):
    """(out, lse) of q, k, v by `run`, and their gradients; of a ragged batch with its four lengths."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        """rest, behind q, k and v what `run` takes too: further tensors, options, and the keys of the longest sequence,
        None where they are not known or all have the same."""
        out, lse = run(q, k, v, *rest)
        *others, ctx.options, ctx.max_keys = rest
        ctx.save_for_backward(q, k, v, out, lse, *others)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        q, k, v, out, lse, *lengths = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        run: Callable[..., Any] = by_operator
        if _is_plain_backward(dout, q, k, v, dlse):
            run = partial(backward_ragged, max_keys=ctx.max_keys) if lengths else backward_cuda
        dq, dk, dv = run(dout, q, k, v, out, lse, dlse, *lengths, ctx.options)
        return None, dq, dk, dv, *(None,) * len(lengths), None, None


class GeneralAttention(Attention):
    """`Attention` of a call with further tensors: four lengths if the batch is ragged, sinks' logits if there are
    sinks, the random bits of dropout, which say what was dropped in place of a mask, and the tensors of an expression,
    of which those that require one have a gradient."""

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        q, k, v, out, lse, *others = ctx.saved_tensors
        lengths, (s_aux, rng_state), tensors = others[:4], others[4:6], others[6:]
        if dout is None:
            dout = torch.zeros_like(out)
        run: Callable[..., Any] = by_general_operator
        if _is_plain_backward(dout, q, k, v, dlse) and all(x is None or type(x) is Tensor for x in (s_aux, *tensors)):
            run = partial(backward_general, max_keys=ctx.max_keys)
        options, learns = learning_of(ctx.options, ctx.needs_input_grad[10 : 10 + len(tensors)])
        *gradients, dtensors = run(dout, q, k, v, out, lse, dlse, *lengths, s_aux, rng_state, tensors, options)
        dq, dk, dv, ds_aux = gradients
        found = iter(dtensors)
        of_tensors = (next(found) if learns_ else None for learns_ in learns)
        return None, dq, dk, dv, *(None,) * 4, None if s_aux is None else ds_aux, None, *of_tensors, None, None


class Output(torch.autograd.Function):
    """out of q, k and v, CUDA tensors, and its gradients: a step takes 2 us less than with `Attention`, of 35."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: AnyOptions) -> Tensor:
        out, lse = forward_cuda(q, k, v, options)
        ctx.options = options
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return None, None, None, None
        q, k, v, out, lse = ctx.saved_tensors
        plain = type(dout) is Tensor and not torch.is_grad_enabled() and is_plain(q, k, v)
        run: Callable[..., Any] = backward_cuda if plain else by_operator
        dq, dk, dv = run(dout, q, k, v, out, lse, None, ctx.options)
        return dq, dk, dv, None


class RaggedOutput(torch.autograd.Function):
    """`Output` of a ragged batch, with its four lengths and the keys of the longest sequence, if they are known."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, of_query: Any, of_key: Any, used_q: Any, used_k: Any, *rest: Any
    ) -> Tensor:
        """rest: options, keys."""
        out, lse = forward_ragged(q, k, v, of_query, of_key, used_q, used_k, *rest)
        ctx.rest = rest
        ctx.save_for_backward(q, k, v, out, lse, of_query, of_key, used_q, used_k)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 9
        q, k, v, out, lse, of_query, of_key, used_q, used_k = ctx.saved_tensors
        options, max_keys = ctx.rest
        given = (dout, q, k, v, out, lse, None, of_query, of_key, used_q, used_k, options)
        if type(dout) is Tensor and not torch.is_grad_enabled() and is_plain(q, k, v):
            dq, dk, dv = backward_ragged(*given, max_keys)
        else:
            dq, dk, dv = by_operator(*given)
        return dq, dk, dv, None, None, None, None, None, None


# What a plain call applies: Function.apply without its Python, which sees to transforms and takes 1.5 us of 6.
attend = super(torch.autograd.Function, Attention).apply
attend_for_out = super(torch.autograd.Function, Output).apply
attend_for_ragged_out = super(torch.autograd.Function, RaggedOutput).apply
attend_generally = super(torch.autograd.Function, GeneralAttention).apply


def learning_of(options: Any, wanted: Sequence[bool]) -> tuple[Options, list[bool]]:
    """The options of a backward call in which these tensors of the expression learn, as far as the score depends on
    them; and which do."""
    said = Options(*options)
    if said.expression is None or not any(wanted):
        return said, [False] * len(wanted)
    expression = Expression(*said.expression)
    program = program_of(*expression[:3])
    differentiable = {access.token for access in program.accesses}
    tokens = [x.token for x in program.inputs if x.is_tensor]
    learns = [wants and token in differentiable for wants, token in zip(wanted, tokens, strict=True)]
    learned = ", ".join(itertools.compress(tokens, learns))
    return said._replace(expression=expression._replace(learned=learned)), learns


def _is_plain_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, dlse: Tensor | None) -> bool:
    """`is_plain` of gradients. With grad mode (create_graph=True) they must remember what they came from, if only to
    refuse."""
    plain = type(dout) is Tensor and (dlse is None or type(dlse) is Tensor)
    return plain and is_plain(q, k, v) and not torch.is_grad_enabled()


def by_operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by `fa2gen::bwd`, or `bwd_varlen` of a ragged batch; the last argument are options."""
    *tensors, options = arguments
    said = Options(*options)
    if said.softmax_scale is None:
        said = said._replace(softmax_scale=tensors[1].shape[-1] ** -0.5)
    if said.expression:
        lengths = [] if said.varlen else [None] * 4
        dq, dk, dv, *_ = torch.ops.fa2gen.bwd_general.default(*tensors, *lengths, None, None, [], **named(said))
        return dq, dk, dv
    operator = torch.ops.fa2gen.bwd_varlen.default if said.varlen else torch.ops.fa2gen.bwd.default
    gradients: tuple[Tensor, Tensor, Tensor] = operator(*tensors, **named(said))
    return gradients


def gradients_of(
    tensors: tuple[Tensor, ...],
    lengths: tuple[Tensor | None, ...],
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of (dout, q, k, v, out, lse), for private functions of others: out and lse are the whole row's, of
    which k and v may be a part. Of a ragged batch there are four lengths, else none."""
    left, right = window_size
    options = Options(softmax_scale, causal, left, right, deterministic=deterministic, varlen=bool(lengths))
    with torch.no_grad():
        return by_operator(*tensors, None, *lengths, options)


def by_general_operator(*arguments: Any) -> AllGradients:
    """What `backward_general` gives, by `fa2gen::bwd_general`; the last argument are options, with a scale."""
    *tensors, options = arguments
    gradients: AllGradients = torch.ops.fa2gen.bwd_general.default(*tensors, **named(Options(*options)))
    return gradients


class Gradients(torch.autograd.Function):
    """(dq, dk, dv) by `run`, with a refusal in the place of their own gradients: torch would take them for zero."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], *tensors: Tensor | None) -> Any:
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise UnsupportedProblem(
            "a second derivative of attention was asked for (double backward, gradgradcheck, hessian), and it can be "
            "differentiated once: its gradients have none themselves. For second derivatives take "
            "torch.nn.functional.scaled_dot_product_attention with its math backend"
        )


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise UnsupportedProblem for forward-mode derivatives: a kernel would drop them without a word."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise UnsupportedProblem(
            "a forward-mode derivative (torch.func.jvp, jacfwd, hessian, dual tensors) was asked for, and attention "
            "has reverse mode alone: take torch.func.vjp, jacrev or backward(), or "
            "torch.nn.functional.scaled_dot_product_attention with its math backend"
        )

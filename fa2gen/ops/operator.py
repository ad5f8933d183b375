"""One call of the operators, or past them: `attention`, `run_ragged` of ragged batches, `run_general` of all else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.features.expression import refuse_dropout
from fa2gen.ops import library  # noqa: F401  (registers the operators)
from fa2gen.ops.arguments import (
    NO_WINDOW,
    Modified,
    Window,
    default_scale,
    expression_of,
    flag,
    named,
    new_rng_state,
    options_of,
    probability,
    sinks,
    window_sides,
)
from fa2gen.ops.autograd import attend, attend_generally, is_plain, learning_of, wants_gradient
from fa2gen.ops.call import AnyOptions, forward_cuda
from fa2gen.ops.general import forward_general
from fa2gen.ops.nested import jagged_like, packed_jagged
from fa2gen.ops.precise import PreciseAttention
from fa2gen.ops.ragged import are_plain, forward_ragged
from fa2gen.ops.validate import (
    DTYPES,
    NO_LENGTHS,
    Lengths,
    describe,
    out_shape,
    refuse_non_lengths,
    refuse_non_tensors,
    refuse_tensor_kinds,
    validate,
    validate_general,
    validate_ragged,
)
from fa2gen.options import Expression, Options
from fa2gen.spec import Tiling

__all__ = ["attention", "forward_into", "run", "run_any", "run_general", "run_ragged"]

_OPERATOR = torch.ops.fa2gen.fwd.default
_RAGGED_OPERATOR = torch.ops.fa2gen.fwd_varlen.default
_GENERAL_OPERATOR = torch.ops.fa2gen.fwd_general.default


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: Window = NO_WINDOW,
    attention_chunk: int = 0,
    arch: str | None = None,
    tiling: Tiling | None = None,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
    score: str = "",
    allow: str = "",
    inputs: Mapping[str, Any] | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    precise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention as (out, lse), both differentiable, once; shapes as in `fa2gen.ops`.

    softmax_scale    default head_dim ** -0.5.
    window_size      as in `flash_attn_func`, attention_chunk too.
    arch             "sm80" or "sm90": the kernel family, for CUDA tensors; by default the best that the device runs.
    tiling           one exact tiling, instead of the selected one.
    deterministic    gradients that are the same bits in every run, at some cost in speed; so they are also under
                     torch.use_deterministic_algorithms(True). The forward pass always is.
    s_aux            as in `flash_attn_func`, dropout_p too.
    score            what becomes of the scaled score s of query i and key j, an expression: "cap * tanh(s / cap)".
    inputs           the numbers and tensors that it names: {"cap": 50.0}. A tensor has a dimension for each index that
                     it is looked up by, bias[h, i, j]; one of size 1 serves all, and indices beyond the others are
                     those of their ends. Kernels read fp32 and int32: others are copied. Tensors of the score have
                     gradients, those of no dimension, which stand for a number, too.
    cu_seqlens_q, _k of a ragged batch, as in `flash_attn_varlen_func`, seqused_q and seqused_k too: with any of them, q
                     is (total_q, heads, head_dim), lse (heads, total_q), and i and j count from a sequence's first row.
    precise          gradients do not see that out is rounded (`fa2gen.ops.precise`), which matters where queries give
                     nearly all of their weight to one key.

    q, k and v may be nested tensors of layout jagged, (batch, jagged, heads, head_dim): out is one like q then, and lse
    is packed, (heads, total_q).
    Under torch.autocast q, k and v are cast to its dtype, as torch's scaled_dot_product_attention casts them; gradients
    come back in the dtypes of the inputs.
    With `arch` or `tiling` the kernel is called directly, not through the operator: torch.compile cannot see into that.
    Raises InvalidInput, UnsupportedProblem, or InfeasibleSpec for a tiling that does not fit.
    """
    dropout_p = probability(dropout_p)
    expression, tensors = expression_of(score, allow, inputs)
    said = (softmax_scale, causal, window_sides(window_size), attention_chunk, deterministic)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    refuse_non_lengths(lengths)
    if flag("precise", precise):
        given = {"arch": arch, "tiling": tiling, "s_aux": s_aux}
        beside = [name for name, value in given.items() if value is not None]
        asked = {"score": score, "allow": allow, "dropout_p": dropout_p}
        beside += [name for name, value in asked.items() if value]
        if beside:
            raise UnsupportedProblem(
                f"precise gradients beside {' and '.join(beside)} are not built; there are those of causal masks, "
                "windows, grouped heads and ragged batches: leave out one or the other"
            )
        return run_any(q, k, v, said, (None, ()), lengths=lengths, precise=True)
    if arch is None and tiling is None:
        return run_any(q, k, v, said, (expression, tensors), s_aux, dropout_p, lengths=lengths)
    refuse_non_tensors(q=q, k=k, v=v)
    refuse_tensor_kinds("qkv", (q, k, v))
    options = options_of(q, *said)._replace(expression=expression)
    if torch.is_grad_enabled() and wants_gradient(q, k, v, s_aux, *tensors):
        raise UnsupportedProblem(
            "arch and tiling choose a forward kernel, and an input requires a gradient: leave them out, or detach it"
        )
    if not q.is_cuda:
        raise InvalidInput(f"arch and tiling choose a CUDA kernel, but q is on {q.device}: leave them out")
    ragged = any(x is not None for x in lengths)
    if ragged or s_aux is not None or tensors or dropout_p:
        expression = _with_shapes(expression, tensors)
        sink = s_aux is not None
        said_by_tensors = options._replace(varlen=ragged, sink=sink, expression=expression, dropout_p=dropout_p)
        rng_state = new_rng_state(q) if dropout_p else None
        further = (*autocasted(q, k, v), *lengths, sinks(s_aux), rng_state, tensors)
        return forward_general(*further, said_by_tensors, None, arch, tiling)
    return forward_cuda(*autocasted(q, k, v), options, arch, tiling)


def _run_precisely(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, options: Options) -> tuple[Tensor, Tensor]:
    """`run`, or `run_ragged`, within `PreciseAttention`, where a gradient may be asked for."""
    ragged = options.varlen
    q, k, v = autocasted(q, k, v)
    if not (torch.is_grad_enabled() and wants_gradient(q, k, v)):
        return run_ragged(q, k, v, lengths, options) if ragged else run(q, k, v, options)
    out, lse, _ = PreciseAttention.apply(run_ragged if ragged else run, q, k, v, *(lengths if ragged else ()), options)
    return out, lse


def run_any(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    said: tuple[Any, ...],
    given: Modified,
    s_aux: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    lengths: Lengths = NO_LENGTHS,
    precise: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of dense or nested tensors, or with lengths of packed ones; `said` are the arguments of `options_of`,
    of which none is checked yet. Precise ones have neither an expression nor s_aux nor dropout."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        refuse_non_tensors(q=q, k=k, v=v)
    expression, tensors = given
    ragged = any(x is not None for x in lengths)
    if not ragged and (q.is_nested or k.is_nested or v.is_nested):
        packed, lengths = packed_jagged(q, k, v)
        out, lse = run_any(*packed, said, given, s_aux, dropout_p, None, lengths, precise)
        return jagged_like(q, out), lse
    if ragged or precise:
        refuse_tensor_kinds("qkv", (q, k, v))
    options = options_of(q, *said)._replace(varlen=ragged, expression=expression)
    if precise:
        return _run_precisely(q, k, v, lengths, options)
    if ragged:
        return run_ragged(q, k, v, lengths, options, None, s_aux, tensors, dropout_p)
    if s_aux is not None or tensors or dropout_p:
        return run_general(q, k, v, NO_LENGTHS, options, None, s_aux, dropout_p, rng_state, tensors)
    return run(q, k, v, options)


def run(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) of options with a scale, by the operator where others look at the call."""
    if is_plain(q, k, v):
        if torch.is_grad_enabled() and wants_gradient(q, k, v):
            out, lse = attend(forward_cuda, q, k, v, options, None)
            return out, lse
        return forward_cuda(q, k, v, options)
    if options.expression:
        return run_general(q, k, v, NO_LENGTHS, options)
    q, k, v = autocasted(q, k, v)
    try:
        out, lse = _OPERATOR(q, k, v, **named(options))
        return out, lse
    except NotImplementedError:  # ours, or torch's two pages about a backend that has no kernel
        validate(q, k, v)
        raise


def run_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    options: AnyOptions,
    max_keys: int | None = None,
    s_aux: Tensor | None = None,
    tensors: Sequence[Tensor] = (),
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`run` of a ragged batch; max_keys as in `forward_ragged`, s_aux and dropout_p as in `flash_attn_func`, tensors of
    an expression."""
    if s_aux is not None or tensors or dropout_p:
        return run_general(q, k, v, lengths, options, max_keys, s_aux, dropout_p, None, tensors)
    if is_plain(q, k, v) and are_plain(lengths):
        if torch.is_grad_enabled() and wants_gradient(q, k, v):
            out, lse = attend(forward_ragged, q, k, v, *lengths, options, max_keys)
            return out, lse
        return forward_ragged(q, k, v, *lengths, options, max_keys)
    said = Options(*options)
    if said.softmax_scale is None:
        said = said._replace(softmax_scale=default_scale(q))
    if said.expression:
        return run_general(q, k, v, lengths, said, max_keys)
    q, k, v = autocasted(q, k, v)
    try:
        out, lse = _RAGGED_OPERATOR(q, k, v, *lengths, **named(said))
        return out, lse
    except NotImplementedError:
        validate_ragged(q, k, v, lengths)
        raise


def run_general(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    options: AnyOptions,
    max_keys: int | None = None,
    s_aux: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    tensors: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """`run` of a call with further tensors, ragged where there are lengths; rng_state is drawn where none is given, and
    `tensors` are those of an expression."""
    given = options if isinstance(options, Options) else Options(*options)
    if dropout_p:
        if torch.is_grad_enabled() and any(learning_of(given, [x.requires_grad for x in tensors])[1]):
            refuse_dropout()  # here, and not in the backward pass
        dropout_p = probability(dropout_p)
        rng_state = new_rng_state(q) if rng_state is None else rng_state
    said = given._replace(  # once, as it takes 1 us
        softmax_scale=default_scale(q) if given.softmax_scale is None else given.softmax_scale,
        varlen=lengths is not NO_LENGTHS and any(x is not None for x in lengths),
        sink=s_aux is not None,
        expression=_with_shapes(given.expression, tensors),
        dropout_p=dropout_p,
    )
    others = (*lengths, sinks(s_aux), rng_state)
    if is_plain(q, k, v) and all(x is None or type(x) is Tensor for x in (*others, *tensors)):
        if torch.is_grad_enabled() and wants_gradient(q, k, v, *others, *tensors):
            out, lse = attend_generally(_forward_flat, q, k, v, *others, *tensors, said, max_keys)
            return out, lse
        return forward_general(q, k, v, *others, tensors, said, max_keys)
    q, k, v = autocasted(q, k, v)
    try:
        out, lse = _GENERAL_OPERATOR(q, k, v, *others, [*tensors], **named(said))
        return out, lse
    except NotImplementedError:
        validate_general(q, k, v, lengths, *others[-2:], said)
        raise


def _with_shapes(expression: Expression | None, tensors: Sequence[Tensor]) -> Expression | None:
    """The expression, which knows how large its tensors are."""
    if expression is None or not tensors:
        return expression
    return expression._replace(shapes=tuple([tuple(x.shape) for x in tensors]))


def _forward_flat(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`forward_general` of the tensors of an expression one by one, as autograd knows them."""
    *given, options, max_keys = arguments
    return forward_general(*[*given[:9], given[9:], options, max_keys])


def autocasted(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype of the autocast region, by torch's rule: all but fp64 and integers, which validation refuses."""
    if not (q.is_cuda or q.is_cpu) or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    if dtype not in DTYPES:
        return q, k, v
    eligible = (torch.float32, *DTYPES)
    q, k, v = (x.to(dtype) if x.dtype in eligible else x for x in (q, k, v))
    return q, k, v


def forward_into(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: Window = NO_WINDOW,
    attention_chunk: int = 0,
    arch: str | None = None,
    tiling: Tiling | None = None,
) -> None:
    """`attention` of CUDA tensors into the caller's buffers, of which every element is written.

    out (batch, seqlen_q, heads, v's head dim) in q's dtype; lse (batch, heads, seqlen_q) fp32; both contiguous, on a
    multiple of 16 bytes. Raises as `attention` does.
    """
    refuse_non_tensors(out=out, lse=lse, q=q, k=k, v=v)
    validate(q, k, v)
    options = options_of(q, softmax_scale, causal, window_sides(window_size), attention_chunk)
    if not q.is_cuda:
        raise InvalidInput(f"forward_into runs CUDA kernels, but q is on {q.device}: call fa2gen.attention")
    batch, seqlen_q, num_heads, _ = q.shape
    buffers: tuple[tuple[str, Tensor, tuple[int, ...], Any], ...] = (
        ("out", out, out_shape(q, v), q.dtype),
        ("lse", lse, (batch, num_heads, seqlen_q), torch.float32),
    )
    for name, x, shape, dtype in buffers:
        if x.shape != shape or x.dtype != dtype or x.device != q.device:
            raise InvalidInput(f"{name} is {describe(x)}; it must be {shape} {dtype} on {q.device}")
        if not x.is_contiguous() or x.data_ptr() % 16:
            raise InvalidInput(
                f"{name} has strides {tuple(x.stride())} and lies at {x.data_ptr():#x}; "
                "it must be contiguous and lie on a multiple of 16 bytes: use a fresh tensor"
            )
    forward_cuda(q, k, v, options, arch, tiling, (out, lse))

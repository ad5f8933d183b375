"""The `torch.library` operators `fa2gen::fwd` and `fa2gen::bwd`, those of ragged batches, and general ones.

fwd(Tensor q, k, v, float softmax_scale, bool causal, ...) -> (Tensor out, Tensor lse)
bwd(Tensor dout, q, k, v, out, lse, Tensor? dlse, float softmax_scale, bool causal, ...) -> (Tensor dq, dk, dv)

`fwd_varlen` and `bwd_varlen` take `Tensor? cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k` behind these tensors; what
each is says `fa2gen.ops.validate.validate_ragged`. `fwd_general` and `bwd_general` take all that a call may have:
behind the lengths, which of a dense batch are all None, `Tensor? s_aux`, (heads,) fp32, `Tensor? rng_state`, (2,)
int64, the random bits of dropout, and `Tensor[] tensors`, those that an expression names; `bwd_general` has a fourth
result, ds_aux, which is empty where there is no s_aux, and a fifth, gradients of the tensors that learn. They alone
take expressions: `score`, `allow` and `inputs` as `fa2gen.spec.Problem` has them, `bwd_general` with `learned`, and the
values of their `numbers`. Those of calls over a cache are `fa2gen.ops.kvcache_operator`'s, that of a ragged batch over
pages is `fa2gen.ops.paged_operator`'s, and what makes 16-bit keys of 8-bit pages for it `fa2gen.ops.widen`'s.

The first four take `partial` last: out is fp32 then, to be merged with results of other keys, or dq, dk and dv are, to
be added to those of other calls.

... are the other fields of `fa2gen.options.Options`, each with its default: programs that were exported before a
field was added go on to load. (They are not keyword-only: AOTInductor of torch 2.11 forgets the defaults of those.)
CUDA tensors run generated kernels, CPU tensors the reference, fake tensors its shapes.
All that belongs to an operator is here, whoever calls it: autograd, a vmap rule, flop counts, and sharding rules for
DTensors (`fa2gen.ops.sharding`).

`Library.define` and `impl` rather than `custom_op`: 4 microseconds a call instead of 11.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from fa2gen._when_imported import when_imported
from fa2gen.errors import UnsupportedProblem
from fa2gen.ops.arguments import OF_SOME_OPERATORS
from fa2gen.ops.autograd import (
    Attention,
    GeneralAttention,
    Gradients,
    apply,
    refuse_tangents,
    wants_gradient,
)
from fa2gen.ops.call import backward_cuda, forward_cuda
from fa2gen.ops.general import AllGradients, backward_general, forward_general, learning
from fa2gen.ops.kvcache_operator import CACHE_SCHEMAS, cache_kernels
from fa2gen.ops.paged_operator import PAGED_SCHEMAS, paged_kernels
from fa2gen.ops.ragged import backward_ragged, forward_ragged
from fa2gen.ops.validate import (
    LENGTHS,
    out_dtype,
    out_shape,
    refuse_tensor_kinds,
    validate,
    validate_backward,
    validate_expression,
    validate_general,
    validate_general_backward,
    validate_options,
    validate_ragged,
    validate_ragged_backward,
)
from fa2gen.ops.widen import WIDEN_SCHEMAS, widen_kernels
from fa2gen.options import Expression, Options, expression_said
from fa2gen.reference import (
    Place,
    attention_backward_ragged,
    attention_backward_tiled,
    attention_ragged,
    attention_tiled,
    ragged_rows,
    sink_gradient,
)
from fa2gen.spec import Direction

__all__ = ["OPTION_SCHEMA"]

_TYPES = {bool: "bool", int: "SymInt", float | None: "float"}  # a scale has a value here
_POSITIONAL = ("softmax_scale", "causal")  # these came first, without a default
_OPTIONS = (*_POSITIONAL, *(name for name in Options._fields if name not in (*_POSITIONAL, *OF_SOME_OPERATORS)))


def _option_schema() -> str:
    types = typing.get_type_hints(Options)
    defaults = {name: "" if name in _POSITIONAL else f"={Options._field_defaults[name]}" for name in _OPTIONS}
    return ", ".join(f"{_TYPES[types[name]]} {name}{default}" for name, default in defaults.items())


OPTION_SCHEMA = _option_schema()
_FORWARD = "Tensor q, Tensor k, Tensor v"
_BACKWARD = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse"
_RAGGED = ", ".join(f"Tensor? {name}" for name in LENGTHS)
_GENERAL = f"{_RAGGED}, Tensor? s_aux, Tensor? rng_state, Tensor[] tensors"
_PLAIN_SCHEMA = f"{OPTION_SCHEMA}, bool partial=False"
_GENERAL_SCHEMA = f'{OPTION_SCHEMA}, str score="", str allow="", str inputs="", float[] numbers=[], float dropout_p=0.0'
_SCHEMAS = {
    "fwd": f"({_FORWARD}, {_PLAIN_SCHEMA}) -> (Tensor out, Tensor lse)",
    "bwd": f"({_BACKWARD}, {_PLAIN_SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv)",
    "fwd_varlen": f"({_FORWARD}, {_RAGGED}, {_PLAIN_SCHEMA}) -> (Tensor out, Tensor lse)",
    "bwd_varlen": f"({_BACKWARD}, {_RAGGED}, {_PLAIN_SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv)",
    "fwd_general": f"({_FORWARD}, {_GENERAL}, {_GENERAL_SCHEMA}) -> (Tensor out, Tensor lse)",
    "bwd_general": f'({_BACKWARD}, {_GENERAL}, {_GENERAL_SCHEMA}, str learned="") -> (Tensor dq, Tensor dk, Tensor dv, '
    "Tensor ds_aux, Tensor[] dtensors)",
    **CACHE_SCHEMAS,
    **PAGED_SCHEMAS,
    **WIDEN_SCHEMAS,
}
_NUM_TENSORS = {name: schema.partition("->")[0].count("Tensor") for name, schema in _SCHEMAS.items()}
_RAGGED_NAMES = ("fwd_varlen", "bwd_varlen")
_GENERAL_NAMES = ("fwd_general", "bwd_general")
_NUM_GRADIENTS = 4  # of bwd_general before the list: dq, dk, dv, ds_aux
_OF_GENERAL = ("score", "allow", "inputs", "numbers", "dropout_p", "learned")  # options behind those that all take


def _options(name: str, tensors: tuple[Any, ...], others: tuple[Any, ...], named: dict[str, Any]) -> Options:
    """What an operator was called with, where others are its arguments behind the tensors."""
    further = _OF_GENERAL if name in _GENERAL_NAMES else ("partial",)
    given = {**named, **dict(zip((*_OPTIONS, *further), others, strict=False))}
    if name not in _GENERAL_NAMES:
        return Options(**{**given, "varlen": name in _RAGGED_NAMES})
    *_, of_query, of_key, used_q, used_k, s_aux, _, inputs = tensors
    ragged = not of_query is of_key is used_q is used_k is None
    expression = expression_said(given, inputs)
    given = {name: value for name, value in given.items() if name not in Expression._fields}
    given |= {"varlen": ragged, "sink": s_aux is not None, "expression": expression}
    return Options(**given)


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    validate(q, k, v)
    validate_options(options)
    with torch.autocast("cpu", enabled=False):  # which would round the fp32 products
        return attention_tiled(q, k, v, **options._asdict())


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    validate(q, k, v)
    validate_options(options)
    batch, seqlen_q, num_heads, _ = q.shape
    out = q.new_empty(out_shape(q, v), dtype=out_dtype(q, options))
    return out, q.new_empty((batch, num_heads, seqlen_q), dtype=torch.float32)


def _backward_cpu(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    validate_backward(dout, q, k, v, out, lse, dlse)
    validate_options(options)
    with torch.autocast("cpu", enabled=False):
        return attention_backward_tiled(dout, q, k, v, out, lse, dlse, **options._asdict())


def _like_gradients(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    dtype = out_dtype(q, options)
    return q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype), v.new_empty(v.shape, dtype=dtype)


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    validate_backward(dout, q, k, v, out, lse, dlse)
    validate_options(options)
    return _like_gradients(q, k, v, options)


def _forward_ragged_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v, *lengths, options = arguments
    validate_ragged(q, k, v, tuple(lengths))
    validate_options(options)
    with torch.autocast("cpu", enabled=False):
        return attention_ragged(q, k, v, *lengths, **options._asdict())


def _forward_ragged_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v, *lengths, options = arguments
    validate_ragged(q, k, v, tuple(lengths))
    validate_options(options)
    rows = q.shape[0] if q.dim() == 3 else q.shape[0] * q.shape[1]
    out = q.new_empty(out_shape(q, v), dtype=out_dtype(q, options))
    return out, q.new_empty((q.shape[-2], rows), dtype=torch.float32)


def _backward_ragged_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out, lse, dlse, *lengths, options = arguments
    validate_ragged_backward(dout, q, k, v, out, lse, dlse, tuple(lengths))
    validate_options(options)
    with torch.autocast("cpu", enabled=False):
        return attention_backward_ragged(*arguments[:-1], **options._asdict())


def _backward_ragged_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out, lse, dlse, *lengths, options = arguments
    validate_ragged_backward(dout, q, k, v, out, lse, dlse, tuple(lengths))
    validate_options(options)
    return _like_gradients(q, k, v, options)


def _forward_general_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v, *lengths, s_aux, rng_state, tensors, options = arguments
    sequences = validate_general(q, k, v, tuple(lengths), s_aux, rng_state, options)
    validate_expression(q, k, sequences, [x.contiguous() for x in tensors], options)
    with torch.autocast("cpu", enabled=False):
        if sequences is None:
            return attention_tiled(q, k, v, s_aux=s_aux, place=Place(tensors, 0, rng_state), **options._asdict())
        return attention_ragged(*[q, k, v, *lengths, tensors, rng_state], s_aux=s_aux, **options._asdict())


def _forward_general_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v, *lengths, s_aux, rng_state, tensors, options = arguments
    sequences = validate_general(q, k, v, tuple(lengths), s_aux, rng_state, options)
    validate_expression(q, k, sequences, [x.contiguous() for x in tensors], options)
    if sequences is None:
        return _forward_fake(q, k, v, options)
    return _forward_ragged_fake(q, k, v, *lengths, options)


def _backward_general_cpu(*arguments: Any) -> AllGradients:
    dout, q, k, v, out, lse, dlse, *lengths, s_aux, rng_state, tensors, options = arguments
    given = (dout, q, k, v, out, lse, dlse)
    sequences = validate_general_backward(*given, tuple(lengths), s_aux, rng_state, options)
    validate_expression(q, k, sequences, [x.contiguous() for x in tensors], options)
    dtensors = [x.new_zeros(x.shape) for x in learning(tensors, options)]
    with torch.autocast("cpu", enabled=False):
        if sequences is None:
            place = Place(tensors, 0, rng_state, dtensors)
            gradients = attention_backward_tiled(*given, place=place, **options._asdict())
        else:
            more = (*lengths, tensors, rng_state, dtensors)
            gradients = attention_backward_ragged(*[*given, *more], **options._asdict())
            dout, out = ((x if x.dim() == 3 else x.flatten(0, 1)).unsqueeze(0) for x in (dout, out))
            lse, dlse = (None if x is None else x.unsqueeze(0) for x in (lse, dlse))
        if s_aux is None:
            return *gradients, q.new_empty(0, dtype=torch.float32), dtensors
        return *gradients, sink_gradient(dout, out, lse, dlse, s_aux), dtensors


def _backward_general_fake(*arguments: Any) -> AllGradients:
    dout, q, k, v, out, lse, dlse, *lengths, s_aux, rng_state, tensors, options = arguments
    sequences = validate_general_backward(dout, q, k, v, out, lse, dlse, tuple(lengths), s_aux, rng_state, options)
    validate_expression(q, k, sequences, [x.contiguous() for x in tensors], options)
    ds_aux = q.new_empty(0 if s_aux is None else s_aux.shape, dtype=torch.float32)
    dtensors = [x.new_empty(x.shape) for x in learning(tensors, options)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), ds_aux, dtensors


def _flops_of_pair(direction: Direction, head_dim: int, head_dim_v: int) -> int:
    """Of one query and one key, in one head. Forward two products; backward five: scores anew, dQ and dK have the head
    dim of q and k, dP and dV that of v."""
    return 2 * (head_dim + head_dim_v if direction == "fwd" else 3 * head_dim + 2 * head_dim_v)


def _forward_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Of shapes, as torch counts its scaled_dot_product_attention: over all pairs, whatever the mask."""
    batch, seqlen_q, num_heads, head_dim = q
    return int(batch * num_heads * seqlen_q * k[1] * _flops_of_pair("fwd", head_dim, v[-1]))


def _backward_flops(dout: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    batch, seqlen_q, num_heads, head_dim = q
    return int(batch * num_heads * seqlen_q * k[1] * _flops_of_pair("bwd", head_dim, v[-1]))


def _ragged_flops(name: str) -> Callable[..., int]:
    """Of tensors: over the pairs of each sequence, whose lengths are read for it, as torch reads those of its own
    attention; fake tensors count as sequences of equal lengths."""

    def flops(*arguments: Any, **_: Any) -> int:
        forward = name.startswith("fwd")
        (q, k, v), lengths = (arguments[:3], arguments[3:7]) if forward else (arguments[1:4], arguments[7:11])
        if isinstance(q, FakeTensor) or q.is_meta:
            rows_q, rows_k = (x.shape[:-2].numel() for x in (q, k))
            dense = all(x is None for x in lengths)
            pairs = rows_q * rows_k // max(q.shape[0] if dense else validate_ragged(q, k, v, lengths), 1)
        else:
            pairs = sum((q1 - q0) * (k1 - k0) for q0, q1, k0, k1 in ragged_rows(q, k, *lengths))
        direction: Direction = "fwd" if forward else "bwd"
        return int(q.shape[-2] * pairs * _flops_of_pair(direction, q.shape[-1], v.shape[-1]))

    return flops


def _autograd(name: str, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The operator's Autograd kernel: what is below autograd runs the operator, within `function` where a gradient may
    be asked for."""
    operator = getattr(torch.ops.fa2gen, name).default
    names = [argument.name for argument in operator._schema.arguments][: _NUM_TENSORS[name]]

    general = name in _GENERAL_NAMES
    ends_in_list = str(operator._schema.returns[-1].type) == "List[Tensor]"
    alone = len(names) - general  # tensors that are no list

    def kernel(keyset: Any, *arguments: Any, **named: Any) -> Any:
        given, others = arguments[: len(names)], arguments[len(names) :]
        tensors = (*given[:alone], *given[-1]) if general else given
        refuse_tensor_kinds([*names[:alone], *(f"input {i}" for i in range(len(tensors) - alone))], tensors)
        if forward_ad._current_level >= 0:
            refuse_tangents(*tensors)
        below = keyset & torch._C._after_autograd_keyset

        def run(*flat: Any) -> Any:
            as_list = [list(flat[alone : len(tensors)])] if general else []
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(below, *flat[:alone], *as_list, *others, **named)

        if torch.is_grad_enabled() and wants_gradient(*tensors):
            options = _options(name, given, others, named)
            if options.partial and function is not Gradients:
                raise UnsupportedProblem(
                    "partial results, which are not rounded, have no gradient by themselves, and an input requires "
                    "one: detach it, and give out and lse of all keys, out in q's dtype, to torch.ops.fa2gen.bwd"
                )
            if ends_in_list:
                found = apply(function, lambda *flat: _flat(*run(*flat)), *tensors, options, None)
                return (*found[:_NUM_GRADIENTS], [*found[_NUM_GRADIENTS:]])
            return apply(function, run, *tensors, options, None)  # it is not known how many keys there are at most
        return run(*tensors)

    return kernel


def _flat(*results: Any) -> tuple[Tensor, ...]:
    """Gradients without the list that those of an expression's tensors are in, which autograd does not look into."""
    *alone, of_tensors = results
    return (*alone, *of_tensors)


def _vmap(name: str) -> Callable[..., Any]:
    """The operator's rule for torch.func.vmap: what is mapped over becomes part of the batch."""
    operator = getattr(torch.ops.fa2gen, name).default

    def rule(info: Any, in_dims: Any, *arguments: Any, **named: Any) -> Any:
        size = info.batch_size
        folded = [
            _folded(x, in_dim, size) if isinstance(x, Tensor) else x
            for x, in_dim in zip(arguments, in_dims, strict=True)
        ]
        results = operator(*folded, **named)
        return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in results), (0,) * len(results)

    return rule


def _folded(x: Tensor, in_dim: int | None, size: int) -> Tensor:
    """(size, batch, ...) as (size * batch, ...)."""
    mapped = x.unsqueeze(0).expand(size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
    return mapped.flatten(0, 1) if mapped.dim() > 1 else mapped  # of no rank that is taken: refused by it


def _refuse_vmap(name: str, *_: Any) -> NoReturn:
    if name in _GENERAL_NAMES:
        raise UnsupportedProblem(
            "torch.func.vmap of attention with sinks, dropout or an expression (a softcap) is not built; make what is "
            "mapped over part of the batch: q.flatten(0, 1) of (mapped, batch, seqlen, heads, head_dim)"
        )
    raise UnsupportedProblem(
        "torch.func.vmap of a ragged batch is not built; it is a longer one: put the tensors one behind the other, and "
        "join their cu_seqlens, each with the totals before it added"
    )


def _with_options(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation whose last argument is an Options, as the dispatcher calls it."""
    count = _NUM_TENSORS[name]

    def implemented(*arguments: Any, **others: Any) -> Any:
        tensors = arguments[:count]
        return implementation(*tensors, _options(name, tensors, arguments[count:], others))

    return implemented


def _kernels(name: str) -> dict[str, Callable[..., Any]]:
    """Dispatch key, or kind of rule -> what an operator has for it."""
    if name in CACHE_SCHEMAS:
        return dict(cache_kernels(name))
    if name in PAGED_SCHEMAS:
        return dict(paged_kernels())
    if name in WIDEN_SCHEMAS:
        return dict(widen_kernels())
    kernels: dict[str, dict[str, Callable[..., Any]]] = {
        "fwd": {"CPU": _forward_cpu, "CUDA": forward_cuda, "fake": _forward_fake},
        "bwd": {"CPU": _backward_cpu, "CUDA": backward_cuda, "fake": _backward_fake},
        "fwd_varlen": {"CPU": _forward_ragged_cpu, "CUDA": forward_ragged, "fake": _forward_ragged_fake},
        "bwd_varlen": {"CPU": _backward_ragged_cpu, "CUDA": backward_ragged, "fake": _backward_ragged_fake},
        "fwd_general": {"CPU": _forward_general_cpu, "CUDA": forward_general, "fake": _forward_general_fake},
        "bwd_general": {"CPU": _backward_general_cpu, "CUDA": backward_general, "fake": _backward_general_fake},
    }
    functions: dict[str, type[torch.autograd.Function]] = {
        "fwd": Attention,
        "fwd_varlen": Attention,
        "fwd_general": GeneralAttention,
    }
    plain = name in ("fwd", "bwd")
    return {
        **{key: _with_options(name, implementation) for key, implementation in kernels[name].items()},
        "Autograd": _autograd(name, functions.get(name, Gradients)),
        "vmap": _vmap(name) if plain else partial(_refuse_vmap, name),
        "flops": (_forward_flops if name == "fwd" else _backward_flops) if plain else _ragged_flops(name),
    }


class _Held:
    """What the process registered, kept at torch.ops.fa2gen: torch takes an operator's definition once only.

    A second import of this module (importlib.reload, a purged sys.modules) puts its functions in the first one's place.
    """

    def __init__(self) -> None:
        self.schemas = _SCHEMAS
        self.kernels: dict[tuple[str, str], Callable[..., Any]] = {}
        self.library = torch.library.Library("fa2gen", "DEF")
        tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
        for name, schema in _SCHEMAS.items():
            self.library.define(name + schema, tags=tags)
        for name in _SCHEMAS:
            self._register(name)

    def _register(self, name: str) -> None:
        for key in ("CPU", "CUDA", "Autograd"):
            self.library.impl(name, self._latest(name, key), key, with_keyset=key == "Autograd")
        torch.library.register_fake(f"fa2gen::{name}", self._latest(name, "fake"), lib=self.library)
        torch.library.register_vmap(f"fa2gen::{name}", self._latest(name, "vmap"), lib=self.library)
        raw = name not in ("fwd", "bwd")  # tensors rather than shapes
        register_flop_formula(getattr(torch.ops.fa2gen, name), get_raw=raw)(self._latest(name, "flops"))

    def _latest(self, name: str, key: str) -> Callable[..., Any]:
        return lambda *arguments, **named: self.kernels[name, key](*arguments, **named)


def _register_sharding() -> None:
    from fa2gen.ops.sharding import register

    register()


def _register() -> None:
    """Register the operators, or take over those of an earlier import. Raises ImportError where another version's are
    there."""
    held: _Held | None = vars(torch.ops.fa2gen).get("_held")
    if held is None:
        held = torch.ops.fa2gen._held = _Held()
        when_imported("torch.distributed.tensor", _register_sharding)
    elif held.schemas != _SCHEMAS:
        raise ImportError("another version of fa2gen has registered its operators in this process: start a new one")
    for name in _SCHEMAS:
        held.kernels |= {(name, key): function for key, function in _kernels(name).items()}


_register()

"""What a caller may write for an option, and the `Options` that it means. Each error names what works instead."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from operator import index
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.expression import parse
from fa2gen.ops.validate import DTYPES, FP32_MAX, describe, validate_number
from fa2gen.options import SAID_BY_TENSORS, UNLIMITED, Expression, Options
from fa2gen.spec import anonymous, text_of

__all__ = [
    "NO_WINDOW",
    "OF_SOME_OPERATORS",
    "Modified",
    "Window",
    "default_scale",
    "expression_of",
    "flag",
    "modified",
    "named",
    "new_rng_state",
    "options_of",
    "probability",
    "sinks",
    "whole",
    "window_sides",
]

Window: TypeAlias = Sequence[int | None] | Tensor | None
NO_WINDOW = (UNLIMITED, UNLIMITED)
_MOST = (1 << 63) - 1  # that operators take for a whole number
_SYMBOLIC = (torch.SymInt, torch.SymFloat)  # numbers under torch.compile and torch.export


def options_of(
    q: Tensor,
    softmax_scale: Any = None,
    causal: Any = False,
    window: tuple[int, int] = NO_WINDOW,
    attention_chunk: Any = 0,
    deterministic: Any = False,
    varlen: bool = False,
    expression: Expression | None = None,
) -> Options:
    """What these arguments of a call mean; a scale of None is q's head_dim ** -0.5. Raises InvalidInput."""
    return Options(
        softmax_scale=_scale(softmax_scale, q),
        causal=flag("causal", causal),
        window_left=window[0],
        window_right=window[1],
        chunk=_chunk(attention_chunk),
        deterministic=flag("deterministic", deterministic),
        varlen=varlen,
        expression=expression,
    )


SOFTCAP = "cap * tanh(s / cap)"
ALIBI = "slope[{}] * abs(i + seqlen_k - seqlen_q - j)"

Modified: TypeAlias = tuple[Expression | None, tuple[Tensor, ...]]
"""What an expression means: that of the kernel, and the tensors that it names."""
_UNMODIFIED: Modified = (None, ())


def _parsed(
    score: str, allow: str, types: tuple[tuple[str, str], ...], single: tuple[str, ...]
) -> tuple[str, str, str, tuple[tuple[str, int, str], ...]]:
    """`score`, `allow` and `inputs` as kernels have them; and of each input its name, the number of its indices (0: it
    is a number) and its type. Numbers that are `single`, tensors of no dimension, are looked up: `cap` is `cap[0]`."""
    return _parse(score, allow, types, single)


# torch.compile takes its result for a constant, as it is one. What torch.compiler.assume_constant_result does, but that
# imports torch._dynamo, which takes longer than all of fa2gen.
_parsed._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def _parse(
    score: str, allow: str, types: tuple[tuple[str, str], ...], single: tuple[str, ...]
) -> tuple[str, str, str, tuple[tuple[str, int, str], ...]]:
    program = parse(score, allow, dict(types))  # type: ignore[arg-type]
    numbers = {x.name for x in program.inputs if not x.is_tensor}.intersection(single)
    if numbers:
        word = re.compile(rf"\b({'|'.join(numbers)})\b")
        looked_up = [word.sub(r"\1[0]", text) for text in (program.score, program.allow)]
        program = parse(looked_up[0], looked_up[1], dict(program.types))
    plain = anonymous(program)
    kinds = tuple((x.name, x.rank if x.is_tensor else 0, str(x.type)) for x in program.inputs)
    return plain.score, plain.allow, text_of(plain.types), kinds


def expression_of(score: Any = "", allow: Any = "", inputs: Mapping[str, Any] | None = None) -> Modified:
    """What these arguments of a call mean. Raises InvalidInput."""
    given = {} if inputs is None else inputs
    for name, text in (("score", score), ("allow", allow)):
        if not isinstance(text, str):
            raise InvalidInput(f'{name} must be an expression in text, "cap * tanh(s / cap)", not {describe(text)}')
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise InvalidInput(f'inputs must be a mapping of names, {{"cap": 50.0}}, not {describe(given)}')
    if not score and not allow and not given:
        return _UNMODIFIED
    single = tuple(name for name, x in given.items() if isinstance(x, Tensor) and x.dim() == 0)
    score, allow, texts, kinds = _parsed(score, allow, tuple(_types(given)), single)
    names = [name for name, *_ in kinds]
    if missing := [name for name in names if name not in given]:
        raise InvalidInput(f"the expression names {missing[0]}, which inputs has not: give {{{missing[0]!r}: ...}}")
    if unknown := [name for name in given if name not in names]:
        raise InvalidInput(
            f"inputs has {unknown[0]!r}, which no expression names ({', '.join(names) or 'they name none'})"
        )
    if not score and not allow:
        return _UNMODIFIED
    numbers = tuple(_number(name, given[name], kind) for name, rank, kind in kinds if not rank)
    tensors = tuple(_tensor(name, given[name], rank, kind) for name, rank, kind in kinds if rank)
    return Expression(score, allow, texts, numbers), tensors


def _types(inputs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of what is given, where it has one: a number that is whole may be either, which the expression says."""
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            yield name, "float" if x.is_floating_point() else "bool" if x.dtype == torch.bool else "int"
        elif isinstance(x, Real) and not isinstance(x, Integral):
            yield name, "float"


def modified(softcap: Any, alibi_slopes: Any) -> Modified:
    """What these of flash_attn mean: scores are cap * tanh(s / cap), then less slope * |i + seqlen_k - seqlen_q - j|,
    with slopes of a head or of a batch entry's head. Raises InvalidInput."""
    if isinstance(softcap, bool) or not isinstance(softcap, Real | torch.SymFloat):
        raise InvalidInput(f"softcap must be a number, not {describe(softcap)}: pass 0.0, which is no cap")
    cap = _float(softcap)
    if not 0 <= cap <= FP32_MAX:
        raise InvalidInput(f"softcap is {softcap}; it must be above 0 and finite in fp32, or 0.0 for no cap")
    capped, inputs = (SOFTCAP, {"cap": cap}) if cap else ("s", {})
    if alibi_slopes is None:
        return expression_of(capped, inputs=inputs) if cap else _UNMODIFIED
    if not isinstance(alibi_slopes, Tensor) or alibi_slopes.dim() not in (1, 2) or not alibi_slopes.is_floating_point():
        raise InvalidInput(f"alibi_slopes must be (heads,) or (batch, heads), fp32, not {describe(alibi_slopes)}")
    bias = ALIBI.format("h" if alibi_slopes.dim() == 1 else "b, h")
    return expression_of(f"{capped} - {bias}", inputs={**inputs, "slope": alibi_slopes})


def _number(name: str, value: Any, kind: str) -> float:
    if isinstance(value, bool | Real):
        number = _float(value)
        validate_number(name, number, kind)
        return number
    hint = f": look it up, {name}[h]" if isinstance(value, Tensor) else ""
    raise InvalidInput(f"{name} must be a number, as the expression has it, not {describe(value)}{hint}")


def _tensor(name: str, value: Any, rank: int, kind: str) -> Tensor:
    """As kernels read it: fp32 or int32, dense."""
    if isinstance(value, Tensor) and value.dim() == 0 and rank == 1:
        value = value.reshape(1)
    if not isinstance(value, Tensor) or value.dim() != rank:
        raise InvalidInput(f"{name} must be a tensor of {rank} dimensions, not {describe(value)}")
    if value.is_complex() or value.layout != torch.strided:
        raise InvalidInput(f"{name} must be a dense tensor of real numbers, not {describe(value)}, {value.layout}")
    if value.dtype in (torch.uint16, torch.uint32, torch.uint64):
        raise InvalidInput(f"{name} is {value.dtype}; whole numbers are of 32 bits with a sign: {name}.to(torch.int32)")
    if kind == "int" and value.dtype == torch.int64 and _exceeds_32_bits(value):
        raise InvalidInput(f"{name} holds whole numbers beyond 32 bits, of which kernels know no more")
    return value.to(torch.float32 if kind == "float" else torch.int32).contiguous()


def _exceeds_32_bits(value: Tensor) -> bool:
    """Of numbers on the CPU that are there; a GPU's are not asked for, as that would wait for it."""
    is_traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if not value.is_cpu or type(value) is not Tensor or is_traced or torch._C._functorch.peek_interpreter_stack():
        return False
    least, greatest = value.aminmax()
    return bool(least < -(2**31)) or bool(greatest >= 2**31)


OF_SOME_OPERATORS = (*SAID_BY_TENSORS, "expression", "dropout_p", "partial")
"""Options that some operators have no argument for."""


def named(options: Options) -> dict[str, Any]:
    """Options as an operator takes them, by name; only a general one takes an expression, and dropout, and only a
    plain one is partial."""
    said = {name: value for name, value in options._asdict().items() if name not in OF_SOME_OPERATORS}
    if options.expression:
        said |= options.expression._asdict()
        said["numbers"] = list(options.expression.numbers)
        del said["shapes"]  # which the tensors say
        if not options.expression.learned:  # of a backward call alone
            del said["learned"]
    if options.dropout_p:
        said["dropout_p"] = options.dropout_p
    if options.partial:
        said["partial"] = True
    return said


def default_scale(q: Tensor) -> float:
    """head_dim ** -0.5. Where q has no head dim, which `validate` refuses, any number."""
    scale: float = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0
    return scale


def flag(name: str, value: Any) -> bool:
    """A switch: True, False, 1, 0, or numpy's. Raises InvalidInput for all else, whatever its truth would be."""
    if value is True or value is False:
        return value is True
    if isinstance(value, torch.SymBool):
        return bool(value)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    hint = f": take {name}.item(), which waits for the device" if isinstance(value, Tensor) else ""
    raise InvalidInput(f"{name} must be True or False, not {describe(value)}{hint}")


def sinks(s_aux: Any) -> Tensor | None:
    """The logits of sinks as operators take them: in fp32, of which a gradient comes back in the tensor's own type.

    Raises InvalidInput for what is no tensor of floating-point numbers, or None.
    """
    if s_aux is None:
        return None
    if not isinstance(s_aux, Tensor) or s_aux.dtype not in (torch.float32, *DTYPES):
        hint = "s_aux.float() makes one" if isinstance(s_aux, Tensor) else "torch.as_tensor(s_aux) makes one"
        raise InvalidInput(f"s_aux must be a tensor of fp32, fp16 or bf16, or None, not {describe(s_aux)}: {hint}")
    return s_aux.to(torch.float32)


def window_sides(window: Any) -> tuple[int, int]:
    """(left, right) of a window_size: two numbers from 0, or -1 or None for no limit, in a sequence, an array or a
    tensor. None: no window. Raises InvalidInput."""
    if type(window) is tuple and len(window) == 2:
        left, right = window
        if type(left) is int and type(right) is int and UNLIMITED <= left <= _MOST and UNLIMITED <= right <= _MOST:
            return left, right
    if window is None:
        return NO_WINDOW
    try:
        given = window.tolist() if hasattr(window, "tolist") else window
    except (RuntimeError, ValueError):  # of tensors without storage, or values
        given = None
    sides = [_side(side) for side in given] if isinstance(given, Sequence) and not isinstance(given, str) else []
    if len(sides) == 2 and None not in sides:
        return sides[0], sides[1]  # type: ignore[return-value]
    raise InvalidInput(
        f"window_size is {describe(window) if isinstance(window, Tensor) else repr(window)}; it must be (left, right), "
        "each a whole number from 0, or -1 for no limit"
    )


def _side(side: Any) -> int | None:
    """A side of a window as a number, symbolic ones as they are; None for what is no side."""
    if side is None:
        return UNLIMITED
    if isinstance(side, torch.SymInt):
        return side  # type: ignore[no-any-return]
    number = whole(side)
    return number if number is not None and number >= UNLIMITED else None


def whole(value: Any) -> int | None:
    """A whole number of 64 bits, as operators have them, whatever holds it; None for all else, also for a switch."""
    if torch.compiler.is_compiling() and isinstance(value, int) and not isinstance(value, bool):
        return value  # which may be symbolic: index() would make a constant of it, and a graph for each
    try:
        number = None if isinstance(value, bool) else index(value)
    except (TypeError, ValueError, RuntimeError):  # also of tensors of floats, of more than one element, without values
        return None
    return number if number is not None and ~_MOST <= number <= _MOST else None


def _float(number: Any) -> float:
    """Infinite where it is beyond all floats, which every option refuses with its own words."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _chunk(chunk: Any) -> int:
    if isinstance(chunk, torch.SymInt):
        return chunk  # type: ignore[no-any-return]
    number = whole(chunk)
    if number is None or number < 0:
        raise InvalidInput(f"attention_chunk must be a whole number of keys, or 0 for no chunks, not {describe(chunk)}")
    return number


def _scale(softmax_scale: Any, q: Tensor) -> float:
    if softmax_scale is None:
        return default_scale(q)
    if isinstance(softmax_scale, _SYMBOLIC):
        return softmax_scale  # type: ignore[no-any-return]
    if isinstance(softmax_scale, bool):  # a number to Python, a misplaced argument to us
        hint = "; did you mean causal, which comes after it?"
    elif isinstance(softmax_scale, Real):
        return _float(softmax_scale)
    else:
        hint = ": take .item() of it, which waits for the device" if isinstance(softmax_scale, Tensor) else ""
    raise InvalidInput(f"softmax_scale must be a number or None, not {describe(softmax_scale)}{hint}")


def probability(dropout_p: Any) -> float:
    """Of dropping an element. Raises InvalidInput unless 0 <= dropout_p < 1."""
    if isinstance(dropout_p, _SYMBOLIC):
        return dropout_p  # type: ignore[no-any-return]
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real):
        hint = ": take .item() of it, which waits for the device" if isinstance(dropout_p, Tensor) else ""
        raise InvalidInput(f"dropout_p must be a number, not {describe(dropout_p)}{hint}")
    number = _float(dropout_p)
    if not 0 <= number < 1:
        raise InvalidInput(
            f"dropout_p is {dropout_p!r}; it must be from 0, no dropout, to less than 1. If this is a scale: the "
            "fourth positional argument is dropout_p, as in flash_attn 2; name softmax_scale"
        )
    return number


def new_rng_state(q: Tensor) -> Tensor:
    """128 random bits on q's device, by its generator: (2,) int64. A captured graph draws new ones at each replay.

    Raises UnsupportedProblem for a DTensor, as other devices would draw other bits.
    """
    if hasattr(q, "device_mesh"):
        raise UnsupportedProblem(
            "dropout of DTensors is not built: each device would drop other elements; nearest: dropout_p=0.0, or the "
            "local tensors, to_local()"
        )
    return torch.randint(-(1 << 63), (1 << 63) - 1, (2,), device=q.device)

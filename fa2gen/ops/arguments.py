"""What a caller may write for an option, and the `Options` that it means. Each error names what works instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from operator import index
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops.validate import DTYPES, describe
from fa2gen.options import SAID_BY_TENSORS, UNLIMITED, Options

__all__ = [
    "NO_WINDOW",
    "Window",
    "default_scale",
    "flag",
    "named",
    "options_of",
    "refuse_unbuilt",
    "sinks",
    "window_sides",
]

Window: TypeAlias = Sequence[int | None] | Tensor | None
NO_WINDOW = (UNLIMITED, UNLIMITED)
_SYMBOLIC = (torch.SymInt, torch.SymFloat)  # numbers under torch.compile and torch.export


def options_of(
    q: Tensor,
    softmax_scale: Any = None,
    causal: Any = False,
    window: tuple[int, int] = NO_WINDOW,
    attention_chunk: Any = 0,
    deterministic: Any = False,
    varlen: bool = False,
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
    )


def named(options: Options) -> dict[str, Any]:
    """Options as an operator takes them, by name."""
    return {name: value for name, value in options._asdict().items() if name not in SAID_BY_TENSORS}


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
        if type(left) is int and type(right) is int and left >= UNLIMITED and right >= UNLIMITED:
            return left, right
    if window is None:
        return NO_WINDOW
    given = window.tolist() if hasattr(window, "tolist") else window
    sides = [_side(side) for side in given] if isinstance(given, Sequence) and not isinstance(given, str) else []
    if len(sides) == 2 and None not in sides:
        return sides[0], sides[1]  # type: ignore[return-value]
    raise InvalidInput(
        f"window_size is {window!r}; it must be (left, right), each a whole number from 0, or -1 for no limit"
    )


def _side(side: Any) -> int | None:
    """A side of a window as a number, symbolic ones as they are; None for what is no side."""
    if side is None:
        return UNLIMITED
    if isinstance(side, torch.SymInt):
        return side  # type: ignore[no-any-return]
    try:
        number = None if isinstance(side, bool) else index(side)
    except TypeError:  # also of tensors of floats, or of more than one element
        return None
    return number if number is not None and number >= UNLIMITED else None


def _chunk(chunk: Any) -> int:
    if isinstance(chunk, torch.SymInt):
        return chunk  # type: ignore[no-any-return]
    try:
        number = -1 if isinstance(chunk, bool) else index(chunk)
    except TypeError:
        number = -1
    if number < 0:
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
        try:
            return float(softmax_scale)
        except OverflowError:
            return math.inf
    else:
        hint = ": take .item() of it, which waits for the device" if isinstance(softmax_scale, Tensor) else ""
    raise InvalidInput(f"softmax_scale must be a number or None, not {describe(softmax_scale)}{hint}")


def refuse_unbuilt(dropout_p: Any, softcap: Any, alibi_slopes: Any) -> None:
    """Raise UnsupportedProblem for features of flash_attn that are not built yet, InvalidInput for what is none."""
    if alibi_slopes is not None:
        raise UnsupportedProblem("ALiBi is not built yet (alibi_slopes was given); pass None: no bias")
    for name, value in (("dropout_p", dropout_p), ("softcap", softcap)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise InvalidInput(f"{name} must be a number, not {describe(value)}: pass 0.0")
    if dropout_p:
        raise UnsupportedProblem(
            f"dropout is not built yet (dropout_p={dropout_p!r}); pass 0.0, which is what evaluation wants. "
            "If this is a scale: the fourth positional argument is dropout_p, as in flash_attn 2; name softmax_scale"
        )
    if softcap:
        raise UnsupportedProblem(f"softcap is not built yet (softcap={softcap!r}); pass 0.0: no cap")

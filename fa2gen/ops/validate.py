"""What a call must obey before a kernel sees it. Each error names the rule, the numbers and what works instead."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.expression import Input, Program
from fa2gen.features.expression import named_values, refuse_dropout, refuse_order
from fa2gen.options import Expression, Options
from fa2gen.spec import MAX_HEAD_DIM, DType, program_of

__all__ = [
    "DTYPES",
    "FP32_MAX",
    "LENGTHS",
    "NO_LENGTHS",
    "Lengths",
    "describe",
    "out_dtype",
    "out_shape",
    "refuse_non_lengths",
    "refuse_non_tensors",
    "refuse_tensor_kinds",
    "validate",
    "validate_backward",
    "validate_expression",
    "validate_general",
    "validate_general_backward",
    "validate_head_dim",
    "validate_heads",
    "validate_kind",
    "validate_lengths",
    "validate_options",
    "validate_ragged",
    "validate_ragged_backward",
    "validate_sinks",
]

DTYPES: dict[Any, DType] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
Lengths: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of the sequences of a ragged batch, as LENGTHS names them."""
NO_LENGTHS: Lengths = (None, None, None, None)
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")

# Kernels hold the scale, and log2(e) times it, in fp32; products of q and k up to 1e8 times the greatest stay finite.
_MIN_SCALE: float = torch.finfo(torch.float32).tiny
_MAX_SCALE = 1e30
FP32_MAX = torch.finfo(torch.float32).max
_OTHER = "torch.nn.functional.scaled_dot_product_attention"


def validate(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise InvalidInput or UnsupportedProblem unless q (B, Sq, H, D), k (B, Sk, Hk, D) and v (B, Sk, Hk, Dv) can be
    computed with.

    For any device, and for fake tensors with symbolic sizes.
    """
    refuse_tensor_kinds("qkv", (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise InvalidInput(
                f"{name} has {x.dim()} dimensions, {tuple(x.shape)}; it must have 4, (batch, seqlen, heads, head_dim)"
                + (f": for a batch of one, {name}.unsqueeze(0)" if x.dim() == 3 else "")
            )
    validate_kind(q, k, v)
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != q.shape[0]:
            raise InvalidInput(f"q has batch {q.shape[0]}, {name} has batch {x.shape[0]}: expand or slice one of them")
    _validate_sizes(q, k, v)


def validate_ragged(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> int:
    """The number of sequences of a ragged batch. Raises InvalidInput or UnsupportedProblem as `validate` does.

    q (total_q, heads, head_dim) with cu_seqlens_q (batch + 1,), else (batch, seqlen_q, heads, head_dim); k and v
    likewise; seqused (batch,). Lengths are contiguous int32 tensors on q's device; their values are not looked at.
    """
    of_query, of_key, *_ = lengths
    refuse_tensor_kinds(("q", "k", "v", *LENGTHS), (q, k, v, *lengths))
    if all(x is None for x in lengths):
        raise InvalidInput(
            "a ragged batch needs lengths, and cu_seqlens and seqused are all None: give cu_seqlens_q and "
            "cu_seqlens_k, or call flash_attn_func for sequences of equal lengths"
        )
    for name, x, bounds, side in (("q", q, of_query, "q"), ("k", k, of_key, "k"), ("v", v, of_key, "k")):
        if x.dim() != (4 if bounds is None else 3):
            given, rank, what = "without", 4, f"(batch, seqlen_{side}, heads, head_dim)"
            hint = f"give cu_seqlens_{side}, (batch + 1,) int32, for sequences that are packed"
            if bounds is not None:
                given, rank, what = "with", 3, f"(total_{side}, heads, head_dim)"
                hint = f"{name}.flatten(0, 1) packs sequences of equal lengths"
            raise InvalidInput(
                f"{name} has {x.dim()} dimensions, {tuple(x.shape)}; {given} cu_seqlens_{side} it must have {rank}, "
                f"{what}: {hint}"
            )
    validate_kind(q, k, v)
    batch = validate_lengths(q, lengths, {"q": (q, of_query), "k": (k, of_key), "v": (v, of_key)})
    _validate_sizes(q, k, v)
    return batch


def validate_lengths(q: Tensor, lengths: Lengths, sides: Mapping[str, tuple[Tensor, Tensor | None]]) -> int:
    """How many sequences there are, by these lengths and by tensors, each with its cu_seqlens, that have none."""
    counts = []  # (name, of how many sequences it is)
    for name, x in zip(LENGTHS, lengths, strict=True):
        if x is not None:
            _validate_lengths(name, x, q)
            counts.append((name, x.shape[0] - 1 if name in LENGTHS[:2] else x.shape[0]))
    for name, (x, bounds) in sides.items():
        if bounds is None:
            counts.append((name, x.shape[0]))
            _validate_even(name, x)
    first = counts[0][0]
    batch: int = counts[0][1]
    for name, count in counts:
        if count != batch:
            raise InvalidInput(
                f"{first} is of {batch} sequences, {name} of {count}; they must be of as many: cu_seqlens has one "
                "number more than there are sequences, seqused one for each"
            )
    return batch


def validate_options(options: Options) -> None:
    """Raise InvalidInput or UnsupportedProblem unless a call can have these numbers.

    Symbolic ones, under torch.compile, are checked when they have a value.
    """
    scale, left, right, chunk = options.softmax_scale, options.window_left, options.window_right, options.chunk
    if isinstance(scale, float | int) and not _MIN_SCALE <= scale <= _MAX_SCALE:  # NaN fails every comparison
        _refuse_scale(scale)
    if isinstance(options.dropout_p, float | int) and not 0 <= options.dropout_p < 1:
        raise InvalidInput(f"dropout_p is {options.dropout_p}; it must be from 0, no dropout, to less than 1")
    for name, number, least in (("window_left", left, -1), ("window_right", right, -1), ("chunk", chunk, 0)):
        if isinstance(number, int) and number < least:
            raise InvalidInput(f"{name} is {number}; it must be at least {least}, which means no limit")
    if options.expression:
        _validate_numbers(options.expression)


def validate_expression(
    q: Tensor, k: Tensor, sequences: int | None, tensors: Sequence[Tensor], options: Options
) -> None:
    """Raise InvalidInput or UnsupportedProblem unless the expression of a call of these can have these tensors; how
    many sequences a ragged batch has, whose lengths are not known."""
    if options.expression is None:
        if tensors:
            raise InvalidInput(f"{len(tensors)} tensors of an expression were given, and there is none")
        return
    program = program_of(*options.expression[:3])
    inputs = [x for x in program.inputs if x.is_tensor]
    if len(inputs) != len(tensors):
        raise InvalidInput(f"the expression names {len(inputs)} tensors, and {len(tensors)} were given")
    sizes = {"b": q.shape[0] if sequences is None else sequences, "h": q.shape[-2], "hk": k.shape[-2]}
    if sequences is None:
        sizes |= {"i": q.shape[1], "j": k.shape[1]}
    for given, x in zip(inputs, tensors, strict=True):
        dtype = torch.float32 if given.type == "float" else torch.int32
        if x.dim() != given.rank or x.dtype != dtype or x.device != q.device or not x.is_contiguous():
            raise InvalidInput(
                f"{_named(given, program)} is {describe(x)}; it must have {given.rank} dimensions, be {dtype}, "
                f"contiguous, and on {q.device}"
            )
        if (rows := math.prod(x.shape[:-1])) >= 2**31:  # numel() would be a constant of a graph
            raise InvalidInput(f"{_named(given, program)} has {rows:,} rows; kernels count 2^31")
        for axis, size in zip(given.axes, x.shape, strict=True):
            if size not in (1, sizes.get(axis, size)) or (size == 0 and 0 not in (q.numel(), k.numel())):
                raise InvalidInput(
                    f"{_named(given, program)} has shape {tuple(x.shape)}, indices [{', '.join(given.axes)}]; "
                    f"that of {axis} must be {sizes[axis]}, or 1 for all"
                )
    if options.deterministic and options.expression.learned:
        refuse_order(program, options.expression, None if sequences is not None else sizes)
    positions = (q.shape[0] if sequences is None else sequences, q.shape[-2], q.shape[-3], k.shape[-3])
    if all(isinstance(size, int) for size in positions):
        _check_numbers(options.expression._replace(shapes=()), *positions)


def _named(given: Input, program: Program) -> str:
    """An input as operators know it, with the text that has it: what its caller called it is not known any more."""
    text = next(text for text in (program.score, program.allow) if re.search(rf"\b{given.name}\b", text))
    return f"{given.name} of {text!r}"


@functools.lru_cache(maxsize=1024)
def _check_numbers(expression: Expression, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
    """Raise InvalidInput where positions of these lengths, or the call's numbers, are beyond what kernels compute with.
    Of a ragged batch the lengths are the rows of all sequences, which none exceeds."""
    program = program_of(*expression[:3])
    program.check(seqlen_q, seqlen_k, named_values(program, expression.numbers), batch, heads)


def validate_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
) -> None:
    """Raise InvalidInput or UnsupportedProblem unless gradients can be computed from these. Also for fake tensors."""
    validate(q, k, v)
    batch, seqlen_q, num_heads, _ = q.shape
    _validate_results(dout, q, v, out, lse, dlse, (batch, num_heads, seqlen_q))


def validate_ragged_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, lengths: Lengths
) -> int:
    """`validate_ragged` of gradients: dout and out are shaped as `out_shape` says, lse and dlse (heads, total_q)."""
    batch = validate_ragged(q, k, v, lengths)
    rows = q.shape[0] if q.dim() == 3 else q.shape[0] * q.shape[1]
    _validate_results(dout, q, v, out, lse, dlse, (q.shape[-2], rows))
    return batch


def validate_general(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    s_aux: Tensor | None,
    rng_state: Tensor | None,
    options: Options,
) -> int | None:
    """`validate`, or `validate_ragged` where there are lengths: the number of sequences then, else None; and of what
    else a call may take: s_aux (heads,) fp32; rng_state (2,) int64, with dropout alone; options."""
    sequences = None
    if all(x is None for x in lengths):
        validate(q, k, v)
    else:
        sequences = validate_ragged(q, k, v, lengths)
    if s_aux is not None:
        validate_sinks(s_aux, q)
    validate_options(options)
    if options.dropout_p and options.expression and options.expression.learned:
        refuse_dropout()
    if (rng_state is None) == (options.dropout_p > 0):
        what = "needs rng_state" if rng_state is None else "takes no rng_state"
        raise InvalidInput(f"dropout_p {options.dropout_p} {what}, (2,) int64: the random bits that dropout draws from")
    if rng_state is not None:
        refuse_tensor_kinds(["rng_state"], [rng_state])
        if rng_state.dtype != torch.int64 or tuple(rng_state.shape) != (2,) or rng_state.device != q.device:
            raise InvalidInput(f"rng_state is {describe(rng_state)}; it must be (2,) torch.int64 on {q.device}")
    return sequences


def validate_general_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    lengths: Lengths,
    s_aux: Tensor | None,
    rng_state: Tensor | None,
    options: Options,
) -> int | None:
    """`validate_general` of gradients."""
    sequences = validate_general(q, k, v, lengths, s_aux, rng_state, options)
    rows: tuple[int, ...] = (q.shape[0], q.shape[-2], q.shape[1])
    if sequences is not None:
        rows = (q.shape[-2], q.shape[0] if q.dim() == 3 else q.shape[0] * q.shape[1])
    _validate_results(dout, q, v, out, lse, dlse, rows)
    return sequences


def out_shape(q: Tensor, v: Tensor) -> tuple[int, ...]:
    """Of the output, and of its gradient: rows and heads of q, the head dim of v."""
    return (*q.shape[:-1], v.shape[-1])


def out_dtype(q: Tensor, options: Options) -> torch.dtype:
    """Of the output, or of gradients: q's, but of partial results fp32."""
    return torch.float32 if options.partial else q.dtype


def _validate_numbers(expression: Expression) -> None:
    known = [x for x in program_of(*expression[:3]).inputs if not x.is_tensor]
    if len(expression.numbers) != len(known):
        raise InvalidInput(f"the expression has {len(known)} numbers, and {len(expression.numbers)} were given")
    for x, number in zip(known, expression.numbers, strict=True):
        if isinstance(number, float | int):
            validate_number(x.name, number, x.type)


def validate_number(name: str, number: float, kind: str) -> None:
    """Raise InvalidInput unless a number of an expression, "float" or "int", is one to kernels: of 32 bits."""
    if not abs(number) <= FP32_MAX:
        raise InvalidInput(f"{name} of the expression is {number}; it must be finite in fp32")
    if kind == "int" and abs(number) >= 2**31:
        raise InvalidInput(f"{name} of the expression is {number:.0f}; whole numbers are of 32 bits")


def _validate_results(
    dout: Tensor, q: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, rows: tuple[int, ...]
) -> None:
    for name, x, shape, dtype in (
        ("dout", dout, out_shape(q, v), q.dtype),
        ("out", out, out_shape(q, v), q.dtype),
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


def refuse_non_lengths(lengths: tuple[object, ...]) -> None:
    """Raise InvalidInput for the first of the four LENGTHS that is neither a tensor nor None."""
    for name, x in zip(LENGTHS, lengths, strict=True):
        if not isinstance(x, Tensor | None):
            raise InvalidInput(
                f"{name} must be a torch.Tensor or None, not {describe(x)}: torch.tensor({name}, dtype=torch.int32, "
                "device=q.device)"
            )


def refuse_tensor_kinds(names: Iterable[str], tensors: Iterable[Tensor | None]) -> None:
    """Raise UnsupportedProblem, by name, for nested tensors, of which not even the sizes can be asked for, and for
    others that are not dense."""
    for name, x in zip(names, tensors, strict=True):
        if x is None:
            continue
        if x.is_nested:
            raise UnsupportedProblem(
                f"{name} is a nested tensor. flash_attn_func and attention take q, k and v that are nested, all three, "
                "of layout jagged, (batch, jagged, heads, head_dim); flash_attn_varlen_func takes their values, "
                f"{name}.values(), with {name}.offsets().int() as cu_seqlens. Of layout strided, first "
                f"torch.nested.as_nested_tensor({name}.unbind(), layout=torch.jagged)"
            )
        if x.layout != torch.strided:
            raise UnsupportedProblem(f"{name} has layout {x.layout}; kernels take dense tensors: {name}.to_dense()")


def describe(x: object) -> str:
    """How an error speaks of an argument."""
    if isinstance(x, Tensor) and torch.nn.parameter.is_lazy(x):
        return "an uninitialized parameter"
    if isinstance(x, Tensor) and x.is_nested:
        return f"a nested tensor, {x.dtype} on {x.device}"
    if isinstance(x, Tensor):
        return f"a tensor {tuple(x.shape)} {x.dtype} on {x.device}"
    return f"{x!r} ({type(x).__name__})" if isinstance(x, bool | int | float | complex | str) else type(x).__name__


def validate_kind(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str] = ("q", "k", "v")) -> None:
    """Device and dtype of a query's tensor and of two of keys."""
    keys = tuple(zip(names[1:], (k, v), strict=True))
    for name, x in ((names[0], q), *keys):
        if x.device.type not in ("cuda", "cpu", "meta"):
            raise UnsupportedProblem(
                f"{name} is on {x.device}; fa2gen runs on cuda (NVIDIA), and a reference on the CPU"
            )
    for name, x in keys:
        if x.device != q.device:
            raise InvalidInput(f"q is on {q.device}, {name} on {x.device}; use one device: {name}.to(q.device)")
        if x.dtype in (torch.uint8, torch.float8_e5m2):
            raise InvalidInput(
                f"{name} is {x.dtype}; of 8 bits there are caches of torch.float8_e4m3fn and torch.int8: if it holds "
                f"such numbers, {name}.view(torch.float8_e4m3fn)"
            )
        if x.dtype != q.dtype:
            raise InvalidInput(f"q is {q.dtype}, {name} is {x.dtype}; use one dtype: {name}.to(q.dtype)")
    if q.dtype not in DTYPES:
        raise UnsupportedProblem(
            f"q, k and v are {q.dtype}; kernels take torch.float16 and torch.bfloat16: cast with .to(torch.bfloat16)"
        )


def _validate_lengths(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != torch.int32:
        raise InvalidInput(f"{name} is {x.dtype}; kernels take torch.int32: {name}.to(torch.int32), of whole numbers")
    if x.device != q.device:
        raise InvalidInput(f"q is on {q.device}, {name} on {x.device}; use one device: {name}.to(q.device)")
    bounds = name in LENGTHS[:2]
    if x.dim() != 1 or (bounds and x.shape[0] == 0):
        what = "(batch + 1,): 0, and where each sequence ends" if bounds else "(batch,): the rows of each that count"
        raise InvalidInput(f"{name} has shape {tuple(x.shape)}; it must be {what}")
    if x.shape[0] > 1 and x.stride(0) != 1:
        raise InvalidInput(f"{name} has a stride of {x.stride(0)}; it must be contiguous: pass {name}.contiguous()")


def validate_sinks(s_aux: Tensor, q: Tensor) -> None:
    refuse_tensor_kinds(["s_aux"], [s_aux])
    if s_aux.dtype != torch.float32 or s_aux.shape != (q.shape[-2],) or s_aux.device != q.device:
        raise InvalidInput(
            f"s_aux is {describe(s_aux)}; it must be ({q.shape[-2]},), one logit a query head, torch.float32 "
            f"(functions take 16-bit types too), on {q.device}"
        )
    if s_aux.shape[0] > 1 and s_aux.stride(0) != 1:
        raise InvalidInput(f"s_aux has a stride of {s_aux.stride(0)}; it must be contiguous: pass s_aux.contiguous()")


def _validate_even(name: str, x: Tensor) -> None:
    """Sequences of a side without cu_seqlens: one behind the other."""
    batch, seqlen, *_ = x.shape
    if batch > 1 and seqlen > 1 and x.stride(0) != seqlen * x.stride(1) and x.numel() > 0:
        raise InvalidInput(
            f"{name} has batches {x.stride(0)} elements apart, of {seqlen} rows {x.stride(1)} apart; beside a ragged "
            f"batch its rows must be evenly spaced, also from one batch to the next: pass {name}.contiguous()"
        )


def _validate_sizes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Head dims, rows and heads; the last dimension's stride."""
    if q.shape[-1] != k.shape[-1]:
        raise UnsupportedProblem(
            f"q has head_dim {q.shape[-1]}, k has {k.shape[-1]}; they must be equal: pad the shorter one with zeros "
            "(torch.nn.functional.pad) and give softmax_scale"
        )
    for i, what in ((-3, "seqlen" if k.dim() == 4 else "rows"), (-2, "heads")):
        if k.shape[i] != v.shape[i]:
            raise InvalidInput(f"k has {what} {k.shape[i]}, v has {what} {v.shape[i]}; they must be equal: slice one")
    validate_head_dim("head_dim", q.shape[-1])
    validate_head_dim("v's head_dim", v.shape[-1])
    validate_heads(q.shape[-2], k.shape[-2])
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and x.numel() > 0:
            raise InvalidInput(
                f"{name}.stride(-1) is {x.stride(-1)} (strides {tuple(x.stride())}); the last dimension must be "
                f"contiguous, stride 1: pass {name}.contiguous()"
            )


def validate_head_dim(name: str, head_dim: int) -> None:
    if head_dim == 0:
        raise InvalidInput(f"{name} is 0; it must be from 1 to {MAX_HEAD_DIM}")
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedProblem(f"{name} is {head_dim}; the largest is {MAX_HEAD_DIM}. Nearest: {_OTHER}")


def validate_heads(num_heads: int, num_heads_kv: int) -> None:
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

"""Expressions: what becomes of scores, and which keys are seen beside the mask, as the spec writes it.

`fa2gen.expression` parses, differentiates and prints; here is what a kernel takes of it. Named numbers are fields of
Params, named tensors operands, whose axes are the indices that the expression looks them up by.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fa2gen.errors import UnsupportedProblem
from fa2gen.expression import Code, Input, Program, emit
from fa2gen.expression.hoist import LEVELS
from fa2gen.features.attention import Operand
from fa2gen.features.base import Feature, Param
from fa2gen.options import AnyShape, Expression, Options
from fa2gen.spec import Direction, Problem

__all__ = [
    "AllowCode",
    "ScoreCode",
    "allow_code",
    "expression_of",
    "loads_of",
    "named_values",
    "refuse_dropout",
    "score_code",
]

_EXAMPLE_NUMBER = 3.0


def expression_of(problem: Problem) -> Feature:
    """The feature of a problem's expressions."""
    program = problem.program
    if problem.dropout:
        refuse_dropout()
    numbers = [x.token for x in program.inputs if not x.is_tensor]
    tensors = [x for x in program.inputs if x.is_tensor]

    def values(options: Options, _: AnyShape) -> Mapping[str, int | float]:
        given = options.expression or Expression()
        sizes = (size - 1 for shape in given.shapes for size in shape)
        lasts = (name for x in tensors for name in _lasts(x))
        return named_values(program, given.numbers) | dict(zip(lasts, sizes, strict=True))

    example = Expression(problem.score, problem.allow, problem.inputs, (_EXAMPLE_NUMBER,) * len(numbers))
    return Feature(
        "expression",
        operands=tuple(Operand(x.token, "floats" if x.type == "float" else "ints") for x in tensors),
        params=(
            *(Param(x.token, "int" if x.type == "int" else "float") for x in program.inputs if not x.is_tensor),
            *(Param(name, "int") for x in tensors for name in _lasts(x)),
        ),
        values=values,
        formulas={name: name for name in (*numbers, *(name for x in tensors for name in _lasts(x)))},
        examples=({"expression": example},),
    )


def refuse_dropout() -> NoReturn:
    """Raise UnsupportedProblem: kernels that modify scores pack P before it is known what is dropped."""
    raise UnsupportedProblem(
        "dropout with an expression (a softcap) is not built yet; nearest: dropout_p 0.0, or scores as they are"
    )


def named_values(program: Program, numbers: Sequence[float], tensors: Sequence[Any] = ()) -> dict[str, Any]:
    """The inputs of a program by their tokens, of a call that gives numbers and tensors in their order."""
    found = {program.tokens[name]: value for name, value in program.numbers(numbers).items()}
    return found | dict(zip((x.token for x in program.inputs if x.is_tensor), tensors, strict=False))


def _lasts(x: Input) -> tuple[str, ...]:
    """The fields of Params that say a tensor's last index along each axis: its sizes, less one."""
    return tuple(f"{x.token}_last_{axis}" for axis in range(x.rank))


def _load(x: Input) -> tuple[str, ...]:
    """The function that reads a tensor. Indices beyond it are those of its end: so an axis of one serves all, and what
    rows and keys that do not exist read is there."""
    kind = "float" if x.type == "float" else "int"
    indices = ", ".join(f"int index_{axis}" for axis in range(x.rank))
    last = [f"p.{name}" for name in _lasts(x)]
    steps = [f"at = at * ({last[axis]} + 1) + min(max(index_{axis}, 0), {last[axis]});" for axis in range(x.rank)]
    return (
        f"__device__ __forceinline__ {kind} load_{x.token}(Params const& p, {indices}) {{",
        "    int64_t at = 0;",
        *(f"    {step}" for step in steps),
        f"    return load_constant_{kind}(p.{x.token} + at);",
        "}",
    )


def loads_of(program: Program) -> tuple[tuple[str, ...], ...]:
    """The functions that read a program's tensors, in lines."""
    return tuple(_load(x) for x in program.inputs if x.is_tensor)


@dataclass(frozen=True)
class ScoreCode:
    """Lines of C++ for the functions of templates/common/score.cuh.j2.

    factor   what scores are multiplied with to be exponents of 2; `factor_lines` come before it.
    forward  of a function that gives the score of an element; backward of one that gives its derivative too.
    formulas in words: what it is, and its derivative.
    head     (type, name, value) of what is the same for all of a head and read from memory: made once, before any loop.
    finite   whether scores are finite wherever products of Q and K are.
    looks_up whether tensors are read for each element.
    """

    formulas: tuple[str, ...]
    factor: tuple[str, ...]
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    head: tuple[tuple[str, str, str], ...]
    finite: bool
    looks_up: bool


def score_code(program: Program, direction: Direction) -> ScoreCode:
    """The code of a program's score in one pass's kernels."""
    score = emit(program, "score of rows" if direction == "decode" else "score")
    slope = emit(program, "gradient") if direction == "bwd" else None
    head = _head(slope or score)
    return ScoreCode(
        formulas=_comment(program, "score", "d score / d s"),
        factor=_function(score, "factor"),
        forward=_function(score, "score", head=head),
        backward=_function(slope, "score", "weight", head=head) if slope else (),
        head=head,
        finite=score.is_finite,
        looks_up="load_" in " ".join([*score.levels["element"], score.results["score"]]),
    )


@dataclass(frozen=True)
class AllowCode:
    """Lines of C++ for the functions of templates/common/allow.cuh.j2.

    formula  what it is, in words; lines of a comment.
    element  of a function that says whether a query sees a key; tile of one that says whether some query of a tile
             sees some of its keys, and whether all see all.
    """

    formula: tuple[str, ...]
    element: tuple[str, ...]
    tile: tuple[str, ...]


def allow_code(program: Program) -> AllowCode:
    """The code of a program's mask."""
    return AllowCode(
        formula=_comment(program, "allow"),
        element=_function(emit(program, "allow"), "allow"),
        tile=_function(emit(program, "positions"), "any", "all"),
    )


def _comment(program: Program, *names: str) -> tuple[str, ...]:
    """Formulas of a program, in lines of a comment."""
    formulas = dict(program.formulas)
    texts = (f"{name} = {formulas[name]}" for name in names)
    return tuple(line for text in texts for line in textwrap.wrap(text, 118, subsequent_indent="    "))


def _head(code: Code) -> tuple[tuple[str, str, str], ...]:
    """The values of a head, where one of them is read from memory: a load in a loop is waited for each time."""
    if not any("load_" in statement for statement in code.levels["head"]):
        return ()
    split = (statement.removesuffix(";").partition(" = ") for statement in code.levels["head"])
    return tuple((left.split()[0], left.split()[-1], value) for left, _, value in split)


def _function(code: Code, *results: str, head: tuple[tuple[str, str, str], ...] = ()) -> tuple[str, ...]:
    """The statements that these results need, and their return."""
    statements = [statement for level in LEVELS for statement in code.levels[level]]
    if head:
        statements[: len(head)] = [f"{kind} const {name} = at.{name};" for kind, name, _ in head]
    values = [code.results[name] for name in results]
    wanted = _words(*values)
    kept = []
    for statement in reversed(statements):
        name, _, value = statement.partition(" = ")
        if name.split()[-1] in wanted:
            wanted |= _words(value)
            kept.append(statement)
    returned = f"{{{', '.join(values)}}}" if len(values) > 1 else values[0]
    return (*reversed(kept), f"return {returned};")


def _words(*texts: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", " ".join(texts)))

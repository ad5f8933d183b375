"""Expressions: what becomes of scores, and which keys are seen beside the mask, as the spec writes it.

`fa2gen.expression` parses, differentiates and prints; here is what a kernel takes of it. Named numbers are fields of
Params, named tensors operands, whose axes are the indices that the expression looks them up by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fa2gen.errors import UnsupportedProblem
from fa2gen.expression import Code, Program, emit
from fa2gen.expression.hoist import LEVELS
from fa2gen.features.base import Feature, Param
from fa2gen.options import AnyShape, Expression, Options
from fa2gen.spec import Problem

__all__ = ["ScoreCode", "expression_of", "named_values", "refuse_unbuilt_expression", "score_code"]

_EXAMPLE_NUMBER = 3.0


def expression_of(problem: Problem) -> Feature:
    """The feature of a problem's expressions."""
    program = problem.program
    refuse_unbuilt_expression(program)
    if problem.direction == "decode":
        raise UnsupportedProblem("expressions over caches are not built yet; nearest: direction fwd, or no expression")
    numbers = [x.token for x in program.inputs if not x.is_tensor]

    def values(options: Options, _: AnyShape) -> Mapping[str, int | float]:
        given = options.expression or Expression()
        return dict(zip(numbers, given.numbers, strict=True))

    example = Expression(problem.score, problem.allow, problem.inputs, (_EXAMPLE_NUMBER,) * len(numbers))
    return Feature(
        "expression",
        params=tuple(Param(x.token, "int" if x.type == "int" else "float") for x in program.inputs if not x.is_tensor),
        values=values,
        formulas={name: name for name in numbers},
        examples=({"expression": example},),
    )


def refuse_unbuilt_expression(program: Program) -> None:
    """Raise UnsupportedProblem for what the grammar has and kernels do not have yet."""
    if program.allow:
        raise UnsupportedProblem(
            f"masks of expressions are not built yet (allow {program.allow!r}); nearest: causal, window_size or "
            "attention_chunk, and sequences of their own as a ragged batch"
        )
    if tensor := next((x for x in program.inputs if x.is_tensor), None):
        raise UnsupportedProblem(f"expressions of tensors are not built yet ({tensor.name}); nearest: numbers")


def named_values(program: Program, numbers: Sequence[float], tensors: Sequence[Any]) -> dict[str, Any]:
    """The inputs of a program by their tokens, of a call that gives numbers and tensors in their order."""
    of_each = {True: iter(tensors), False: iter(numbers)}
    found = {x.token: next(of_each[x.is_tensor]) for x in program.inputs}
    whole = {x.token for x in program.inputs if not x.is_tensor and x.type == "int"}
    return {token: int(value) if token in whole else value for token, value in found.items()}


@dataclass(frozen=True)
class ScoreCode:
    """Lines of C++ for the functions of templates/common/score.cuh.j2.

    factor   what scores are multiplied with to be exponents of 2; `factor_lines` come before it.
    forward  of a function that gives the score of an element; backward of one that gives its derivative too.
    formulas in words: what it is, and its derivative.
    finite   whether scores are finite wherever products of Q and K are.
    """

    formulas: tuple[str, ...]
    factor: tuple[str, ...]
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    finite: bool


def score_code(program: Program, gradient: bool) -> ScoreCode:
    """The code of a program's score."""
    score = emit(program, "score")
    slope = emit(program, "gradient") if gradient else None
    return ScoreCode(
        formulas=tuple(
            f"{name} = {text}" for name, text in program.formulas if name.startswith(("score", "d score / d s"))
        ),
        factor=_function(score, "factor"),
        forward=_function(score, "score"),
        backward=_function(slope, "score", "weight") if slope else (),
        finite=score.is_finite,
    )


def _function(code: Code, *results: str) -> tuple[str, ...]:
    """The statements that these results need, and their return."""
    statements = [statement for level in LEVELS for statement in code.levels[level]]
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

"""Expressions: what becomes of scores, and which keys are seen beside the mask, as the spec writes it.

`fa2gen.expression` parses, differentiates and prints; here is what a kernel takes of it. Named numbers are fields of
Params, named tensors operands, whose axes are the indices that the expression looks them up by. Those that learn have a
gradient each, an operand of its shape in fp32, to which the elements of dS add.
"""

from __future__ import annotations

import functools
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from fa2gen.errors import UnsupportedProblem
from fa2gen.expression import Code, Input, Program, TileBound, emit
from fa2gen.expression.hoist import LEVELS
from fa2gen.expression.tree import walk
from fa2gen.features.attention import Operand
from fa2gen.features.base import Feature, Param, Scratch
from fa2gen.options import Expression, Options, Shape
from fa2gen.spec import Direction, Problem, names_of

__all__ = [
    "EXAMPLE_NUMBER",
    "AllowCode",
    "InputGradientCode",
    "ScoreCode",
    "TileTable",
    "allow_code",
    "expression_of",
    "gradient_codes",
    "input_sizes",
    "is_capped",
    "loads_of",
    "named_values",
    "refuse_dropout",
    "refuse_order",
    "scattered",
    "score_code",
    "shapes_of",
    "tile_tables",
]

EXAMPLE_NUMBER = 3.0
"""Of what an expression names, in calls that nobody makes but tests and measurements."""
_ROW_AND_HEAD = re.compile(r"float const (row_\d+) = head_\d+ \+ float_i;")
_COLUMNS = 112  # of what a function returns, beside its indentation


def expression_of(problem: Problem) -> Feature:
    """The feature of a problem's expressions."""
    program = problem.program
    if problem.dropout and problem.learned:
        refuse_dropout()
    numbers = [x.token for x in program.inputs if not x.is_tensor]
    tensors = [x for x in program.inputs if x.is_tensor]

    def given(options: Options) -> Mapping[str, int | float]:
        expression = options.expression or Expression()
        sizes = (size - 1 for shape in expression.shapes for size in shape)
        lasts = (name for x in tensors for name in _lasts(x))
        return named_values(program, expression.numbers) | dict(zip(lasts, sizes, strict=True))

    texts = (problem.score, problem.allow, problem.inputs)
    example = Expression(*texts, (EXAMPLE_NUMBER,) * len(numbers), learned=problem.learned)
    return Feature(
        "expression",
        operands=(
            *(Operand(x.token, "floats" if x.type == "float" else "ints") for x in tensors),
            *(Operand(f"d{token}", "floats", out=True) for token in names_of(problem.learned)),
        ),
        params=(
            *(Param(x.token, "int" if x.type == "int" else "float") for x in program.inputs if not x.is_tensor),
            *(Param(name, "int") for x in tensors for name in _lasts(x)),
        ),
        formulas={name: name for name in (*numbers, *(name for x in tensors for name in _lasts(x)))},
        given=given,
        # Queries over caches visit every tile.
        scratch=(Scratch("tile_bounds", "int*"),) if program.tile_bounds and problem.direction != "decode" else (),
        uneven=bool(problem.allow) and problem.direction == "fwd",
        examples=({"expression": example},),
    )


def refuse_dropout() -> NoReturn:
    """Raise UnsupportedProblem: sums for tensors are of all of P."""
    raise UnsupportedProblem(
        "dropout with a tensor of an expression that has a gradient is not built yet; nearest: dropout_p 0.0, or the "
        "tensor's detach()"
    )


def named_values(program: Program, numbers: Sequence[float], tensors: Sequence[Any] = ()) -> dict[str, Any]:
    """The inputs of a program by their tokens, of a call that gives numbers and tensors in their order."""
    found = {program.tokens[name]: value for name, value in program.numbers(numbers).items()}
    return found | dict(zip((x.token for x in program.inputs if x.is_tensor), tensors, strict=False))


def shapes_of(program: Program, longest: Shape) -> tuple[tuple[int, ...], ...]:
    """Of the tensors that a program names, sizes that hold all that a call of this shape looks up by b, h, hk, i and j;
    of a ragged batch, whose longest sequence the shape has."""
    sizes = {"b": longest.batch, "h": longest.num_heads, "hk": longest.num_heads_kv, "i": longest.seqlen_q}
    sizes |= {"j": longest.seqlen_k, "": max(longest.seqlen_q, longest.seqlen_k)}
    return tuple(tuple(sizes[axis] for axis in x.axes) for x in program.inputs if x.is_tensor)


def _lasts(x: Input) -> tuple[str, ...]:
    """The fields of Params that say a tensor's last index along each axis: its sizes, less one."""
    return tuple(f"{x.token}_last_{axis}" for axis in range(x.rank))


def _place(x: Input) -> tuple[str, ...]:
    """The function that counts the numbers of a tensor before one."""
    return (
        f"__device__ __forceinline__ int64_t place_in_{x.token}({_indices(x)}) {{",
        *_row_and_column(x),
        f"    return {'before + ' if x.rank > 1 else ''}column;",
        "}",
    )


def _load(x: Input) -> tuple[str, ...]:
    """The function that reads a tensor."""
    kind = "float" if x.type == "float" else "int"
    return (
        f"__device__ __forceinline__ {kind} load_{x.token}({_indices(x)}) {{",
        *_row_and_column(x),
        f"    return load_constant_{kind}_of(p.{x.token}{' + before' if x.rank > 1 else ''}, column);",
        "}",
    )


def _indices(x: Input) -> str:
    return ", ".join(["Params const& p", *(f"int index_{axis}" for axis in range(x.rank))])


def _row_and_column(x: Input) -> Iterator[str]:
    """Statements that make how many numbers are before the row of some indices, and the column. Indices beyond it are
    those of its end: so an axis of one serves all, and what rows and keys that do not exist read is there. Rows are
    counted in 32 bits."""
    *rows, column = (
        f"min({index if known else f'max({index}, 0)'}, p.{last})"
        for index, known, last in zip(
            (f"index_{axis}" for axis in range(x.rank)), x.never_negative, _lasts(x), strict=True
        )
    )
    if rows:
        yield f"    int row = {rows[0]};"
        for last, at in zip(_lasts(x)[1:-1], rows[1:], strict=True):
            yield f"    row = row * (p.{last} + 1) + {at};"
        # Of unsigned factors: ptxas makes one instruction of their product, of signed ones four.
        size = f"static_cast<uint32_t>(p.{_lasts(x)[-1]} + 1)"
        yield f"    int64_t const before = static_cast<int64_t>(static_cast<uint32_t>(row)) * {size};"
    yield f"    int const column = {column};"


def loads_of(program: Program) -> tuple[tuple[str, ...], ...]:
    """The functions that read a program's tensors, in lines."""
    return tuple(function(x) for x in program.inputs if x.is_tensor for function in (_place, _load))


@dataclass(frozen=True)
class ScoreCode:
    """Lines of C++ for the functions of templates/common/score.cuh.j2.

    factor   what scores are multiplied with to be exponents of 2; `factor_lines` come before it.
    forward  of a function that gives the score of an element; backward of one that gives its derivative too.
    of_row   of one that gives what the element's lacks, the same for all keys of a row; () where it lacks nothing.
    formulas in words: what it is, and its derivative.
    head     (type, name, value) of what is the same for all of a head and read from memory: made once, before any loop.
    finite   whether scores are finite wherever products of Q and K are.
    looks_up the tensors that are read for each element.
    of_distance  whether positions, as floats, count by their difference alone.
    is_sum   whether a score is its product and what does not depend on it, so that its derivative by the product is 1.
    rise     of a function that gives what scores rise by from one query to the next, and fall by from one key to the
             next; () where that is not one number for all of a head, or positions change them in another way, too.
    bound    how far from 0 scores may be, in C++, where that is known.
    slope    of a function that gives c where the score is tanh(c * product); () where it is anything else.
    """

    formulas: tuple[str, ...]
    factor: tuple[str, ...]
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    of_row: tuple[str, ...]
    head: tuple[tuple[str, str, str], ...]
    finite: bool
    looks_up: tuple[Input, ...]
    of_distance: bool
    is_sum: bool
    rise: tuple[str, ...]
    bound: str
    slope: tuple[str, ...]


def is_capped(problem: Problem) -> bool:
    """Whether a softmax can do without maxima: scores are never far from 0, and bf16 has the exponents of fp32. Not of
    tensors that elements are looked up in: 20 registers spill at 128."""
    of_score = bool(problem.score) and not problem.allow and problem.dtype == "bf16"
    looks_up = any({*x.axes} - {"b", "h", "hk"} for x in problem.program.inputs if x.is_tensor)
    return of_score and not looks_up and math.isfinite(problem.program.bound)


def scattered(problem: Problem) -> Literal["pairs", "places", ""]:
    """Which numbers elements of a score look up that lie apart: one for each pair of a query and a key, or else those
    at a place that another tensor says. What neighbours have by distance alone lies together: ""."""
    looked_up = score_code(problem.program, "fwd").looks_up if problem.score else ()
    if any({"i", "j"} <= {*x.axes} for x in looked_up):
        return "pairs"
    of_places = any(node.op == "tensor" for x in looked_up for places in x.indices for node in walk(*places))
    return "places" if of_places else ""


@functools.lru_cache(maxsize=256)  # plans of all tilings of a problem ask for the same
def score_code(
    program: Program,
    direction: Direction,
    learned: tuple[str, ...] = (),
    *,
    causal: bool = False,
    by_rows: bool = False,
) -> ScoreCode:
    """The code of a program's score in one pass's kernels; of a gradient, with what it needs for those of the tensors
    `learned`.

    causal   whether only keys matter that a causal mask shows.
    by_rows  whether the softmax takes what is the same for all keys of a row for itself.
    """
    score = emit(program, "score of rows" if direction == "decode" else "score", causal=causal)
    of_distance = _is_of_distance(score)
    # Else positions may be large, and two terms of them where there was a small difference.
    parts = emit(program, "score by rows", causal=causal) if by_rows and of_distance else score
    has_row = parts.results.get("of_row", "0.0f") != "0.0f"
    slope = emit(program, "gradient", learned, causal=causal) if direction == "bwd" else None
    cap = emit(program, "cap")
    rise = emit(program, "rise", causal=causal)
    head = _head(slope or parts)
    of_element = _words(*score.levels["element"], score.results["score"])
    of_tensors = (f"by_{n}" for n, found in enumerate(program.gradients(learned)) if not found.of_s)
    return ScoreCode(
        formulas=_comment(program, "score", "d score / d s"),
        factor=_function(score, "factor"),
        forward=_function(slope or parts, "score", head=head),
        backward=_function(slope, "score", "weight", *of_tensors, head=head) if slope else (),
        of_row=_function(parts, "of_row", head=head) if has_row else (),
        head=head,
        finite=score.is_finite,
        looks_up=tuple(x for x in program.inputs if f"load_{x.token}" in of_element),
        of_distance=_is_of_distance(slope) if slope else of_distance,
        is_sum=slope is not None and slope.is_one,
        rise=_function(rise, "rise") if rise.results else (),
        bound=f"{program.bound!r}f" if math.isfinite(program.bound) else "",
        slope=_function(cap, "slope") if cap.results else (),
    )


def _is_of_distance(code: Code) -> bool:
    """Whether positions, as floats, are in its texts by their difference, to which the head may add, and by no more."""
    texts = [*(line for level in LEVELS for line in code.levels[level]), *code.results.values()]
    rows = {line: found[1] for line in texts if (found := _ROW_AND_HEAD.fullmatch(line))}
    of_query = ("float_i", *rows.values())
    query = "|".join(of_query)
    distance = re.compile(rf"\((({query}) - float_j|float_j - ({query}))\)")  # all of a sum
    rest = _words(*(distance.sub("", line) for line in texts if line not in rows))
    return any(map(distance.search, texts)) and not {*of_query, "float_j"} & rest


@dataclass(frozen=True)
class InputGradientCode:
    """Lines of C++ for the functions of templates/common/input_gradients.cuh.j2, of one tensor at one place.

    number   of the gradient, counted over all of the kernel.
    token    the tensor.
    formula  in words: the score's derivative by the place; lines of a comment.
    way      how an element finds its number: "head", "row", "column" where the place depends on no more; "apart" where
             each adds for itself, as elements of a tile have numbers of their own, by i and by j; "element" where all
             of a tile may have one.
    place    of a function that gives the place of an element's number.
    factor   of one that gives what the gradient of s is multiplied with; () where that is nothing.
    stored   which of the derivatives that are kept with P it takes in its place, times P (dP - dPsum); -1: none.
    """

    number: int
    token: str
    formula: tuple[str, ...]
    way: Literal["head", "row", "column", "apart", "element"]
    place: tuple[str, ...]
    factor: tuple[str, ...]
    stored: int


def gradient_codes(program: Program, learned: tuple[str, ...]) -> tuple[InputGradientCode, ...]:
    """The code of the gradients of these tensors."""
    code = emit(program, "inputs", learned)
    found: list[InputGradientCode] = []
    for n, gradient in enumerate(program.gradients(learned)):
        access = gradient.access
        indices = [f"index_{n}_{axis}" for axis in range(len(access.leaf.args))]
        (*lines, returned) = _function(code, *indices)
        is_apart = access.level == "element" and not gradient.of_s
        values = returned.removeprefix("return ").removesuffix(";").strip("{}")
        found.append(
            InputGradientCode(
                number=n,
                token=access.token,
                formula=_comment(program, f"d score / d {program.written(access.leaf)}"),
                way="apart" if {"i", "j"} <= set(access.axes) or is_apart else access.level,
                place=(*lines, f"return place_in_{access.token}(p, {values});"),
                factor=_function(code, f"by_{n}") if gradient.of_s and gradient.factor.number != 1 else (),
                stored=-1 if gradient.of_s else sum(one.stored >= 0 for one in found),
            )
        )
    return tuple(found)


def input_sizes(program: Program, tokens: tuple[str, ...]) -> dict[str, str]:
    """How many numbers these tensors have, in C++: as many as there are before the last, and it."""
    return {
        x.token: f"place_in_{x.token}({', '.join(['p', *(f'p.{name}' for name in _lasts(x))])}) + 1"
        for x in program.inputs
        if x.token in tokens
    }


def refuse_order(program: Program, expression: Expression, sizes: Mapping[str, int] | None) -> None:
    """Raise UnsupportedProblem unless gradients of the tensors that learn are the same bits in every run: where each of
    their numbers is one element's.

    sizes  of b, h, i and j, and maybe hk; None: of a ragged batch.
    """
    shapes = dict(zip((x.token for x in program.inputs if x.is_tensor), expression.shapes, strict=True))
    gradients = program.gradients(names_of(expression.learned))
    for gradient in gradients:
        token, axes = gradient.access.token, gradient.access.axes
        given = dict(zip(axes, shapes[token], strict=True))
        once = sum(other.access.token == token for other in gradients) == 1
        if not (once and sizes and all(sizes[axis] in (1, given.get(axis)) for axis in "bhij")):
            raise UnsupportedProblem(
                f"deterministic gradients of {token}, {shapes[token]}, of which several elements have one number, are "
                "not built, as blocks add in any order; nearest: in a dense batch, expand it to one number an element, "
                "looked up by [b, h, i, j], whose gradients torch sums in one order, or deterministic=False"
            )


@dataclass(frozen=True)
class AllowCode:
    """Lines of C++ for the functions of templates/common/allow.cuh.j2.

    formula  what it is, in words; lines of a comment.
    element  of a function that says whether a query sees a key; tile of one that says whether some query of a tile
             sees some of its keys, and whether all see all; and, if `alike`, whether each query sees all or none, and
             whether all queries see the same.
    """

    formula: tuple[str, ...]
    element: tuple[str, ...]
    tile: tuple[str, ...]
    alike: bool


@functools.lru_cache(maxsize=256)
def allow_code(program: Program, asks_alike: bool = False) -> AllowCode:
    """The code of a program's mask.

    asks_alike  whether a kernel has use for blocks whose keys are alike.
    """
    of_tile = emit(program, "blocks")
    sides = ("keys_alike", "queries_alike")
    alike = asks_alike and any(of_tile.results[side] != "false" for side in sides)
    return AllowCode(
        formula=_comment(program, "allow"),
        element=_function(emit(program, "allow"), "allow"),
        tile=_function(of_tile, "any", "all", *(sides if alike else ())),
        alike=alike,
    )


_PASSES = {"above": ">", "below": "<", "not": "!="}


@dataclass(frozen=True)
class TileTable:
    """The least and the greatest number of a tensor for each block of positions: a kernel before the others finds them.

    Pairs of int32, one for each block of `tile` positions and each place of the other axes, in their order.

    tile   positions of a block: the kernel's queries or keys.
    rank   axes of the tensor.
    """

    bound: TileBound
    tile: int
    rank: int

    @property
    def name(self) -> str:
        return self.bound.name

    @property
    def token(self) -> str:
        return self.bound.token

    @property
    def _lasts(self) -> tuple[str, ...]:
        return tuple(f"{self.bound.token}_last_{axis}" for axis in range(self.rank))

    @property
    def count(self) -> str:
        """A formula of how many pairs there are, over the fields of Params that say the tensor's sizes."""
        blocks = f"({self._lasts[self.bound.axis]} / {self.tile} + 1)"
        others = (f"({name} + 1)" for axis, name in enumerate(self._lasts) if axis != self.bound.axis)
        return " * ".join([*others, blocks])

    @property
    def condition(self) -> str:
        """Whether a number x counts, in C++; of all that do, nothing."""
        return " && ".join(f"x {_PASSES[word]} {number}" for word, number in self.bound.filters)

    @property
    def counted(self) -> str:
        """`count` in C++."""
        return re.sub(r"input_\w+", lambda word: f"p.{word[0]}", self.count)

    @property
    def arguments(self) -> str:
        """Parameters of the functions that read it, after Params: the first position, and the other axes' indices."""
        others = (f"int index_{axis}" for axis in range(self.rank) if axis != self.bound.axis)
        return ", ".join([f"int {self.bound.side}0", *others])

    @property
    def passed(self) -> str:
        """Those as arguments."""
        return self.arguments.replace("int ", "")

    @property
    def steps(self) -> tuple[str, ...]:
        """Statements from no place, `at`, to that of the pair."""
        others = (axis for axis in range(self.rank) if axis != self.bound.axis)
        last = f"p.{self._lasts[self.bound.axis]}"
        return (
            *(
                f"at = at * (p.{self._lasts[axis]} + 1) + min(max(index_{axis}, 0), p.{self._lasts[axis]});"
                for axis in others
            ),
            f"at = at * ({last} / {self.tile} + 1) + min({self.bound.side}0, {last}) / {self.tile};",
        )

    @property
    def last(self) -> str:
        """The last index along the axis of positions."""
        return f"p.{self._lasts[self.bound.axis]}"

    @property
    def inner(self) -> str:
        """How many numbers lie between neighbours along that axis."""
        behind = (f"(p.{name} + 1)" for name in self._lasts[self.bound.axis + 1 :])
        return " * ".join(behind) or "1"


def tile_tables(program: Program, tile_m: int, tile_n: int) -> tuple[TileTable, ...]:
    """What kernels of these tiles ask of a program's tensors."""
    ranks = {x.token: x.rank for x in program.inputs}
    tiles = {"i": tile_m, "j": tile_n}
    return tuple(TileTable(bound, tiles[bound.side], ranks[bound.token]) for bound in program.tile_bounds)


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
    if len(returned) > _COLUMNS:
        kinds = ("bool" if name in ("any", "all", "keys_alike", "queries_alike") else "float" for name in results)
        of_results = (f"{kind} const {name} = {x};" for kind, name, x in zip(kinds, results, values, strict=True))
        return (*reversed(kept), *of_results, f"return {{{', '.join(results)}}};")
    return (*reversed(kept), f"return {returned};")


def _words(*texts: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", " ".join(texts)))

"""A score and a mask as a call says them: read, checked, named and turned into C++."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fa2gen.errors import InvalidInput
from fa2gen.expression.cuda import Statements, bound_name, statements
from fa2gen.expression.derive import derivative
from fa2gen.expression.evaluate import evaluate_on_numbers, evaluate_tree
from fa2gen.expression.grammar import FUNCTIONS, NAMES, TYPES
from fa2gen.expression.hoist import (
    KEY,
    QUERY,
    SCALE,
    Level,
    factored,
    level_of,
    lowered,
    lowered_by_rows,
    rise_of,
    without_signs,
)
from fa2gen.expression.infer import infer
from fa2gen.expression.intervals import Filter, alike, any_and_all, bounds, sides
from fa2gen.expression.ranges import range_of
from fa2gen.expression.read import Text, parsed, read
from fa2gen.expression.simplify import ACC, TRUE, multiply, simplify
from fa2gen.expression.tree import Node, Type, const, name, substitute, walk
from fa2gen.expression.write import as_fp32, write

__all__ = ["Access", "Code", "Input", "InputGradient", "Program", "TileBound", "emit", "evaluate", "parse"]

_S = name("s", "float")
_PLACES = frozenset({"b", "h", "hk", "i", "j"})
_FLOAT_EXACT = 2**24  # whole numbers up to here are floats


@dataclass(frozen=True)
class Input:
    """A number or a tensor of a call that expressions name.

    token    what code calls it: number_0, input_1, counted over all inputs of the program.
    indices  the different indices that it is read at; none of a number.
    axes     of a tensor, of each axis: the name that alone stands there, "b", "h", "hk", "i" or "j"; "" where it is
             computed, or differs from one use to the next.
    """

    name: str
    type: Type
    token: str
    indices: tuple[tuple[Node, ...], ...] = ()

    @property
    def is_tensor(self) -> bool:
        return bool(self.indices)

    @property
    def rank(self) -> int:
        return len(self.indices[0]) if self.indices else 0

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(
            str(places[0].value) if len(set(places)) == 1 and places[0].op == "name" else ""
            for places in zip(*self.indices, strict=True)
        )

    @property
    def never_negative(self) -> tuple[bool, ...]:
        """Of a tensor, of each axis: whether all that stands there are positions, or numbers of heads and entries."""
        return tuple(
            all(place.op == "name" and place.value in _PLACES for place in places)
            for places in zip(*self.indices, strict=True)
        )


@dataclass(frozen=True)
class Program:
    """What `parse` makes of texts; equal where texts and types are.

    score, allow  the texts in one spelling; "" where it changes nothing. `parse` of them and `types` is this again.
    types         (name, type) of all inputs, by name.
    inputs        in the order in which they are first used, in the score first.
    """

    score: str
    allow: str
    types: tuple[tuple[str, Type], ...]
    inputs: tuple[Input, ...] = field(compare=False)
    score_tree: Node | None = field(compare=False, repr=False)
    allow_tree: Node | None = field(compare=False, repr=False)

    @property
    def tokens(self) -> dict[str, str]:
        return {given.name: given.token for given in self.inputs}

    def numbers(self, values: Sequence[float]) -> dict[str, int | float]:
        """The numbers of a call by name, from their values in the order of the inputs."""
        numbers = [given for given in self.inputs if not given.is_tensor]
        return {x.name: int(value) if x.type == "int" else value for x, value in zip(numbers, values, strict=True)}

    @functools.cached_property
    def formulas(self) -> tuple[tuple[str, str], ...]:
        """(what, formula) in tokens: the score, its derivative by s and by each float input, and allow."""
        found = []
        if self.score_tree is not None:
            found = [("score", self.written(self.score_tree)), ("d score / d s", self.written(self.slope))]
            for access in self.accesses:
                found.append((f"d score / d {self.written(access.leaf)}", self.written(access.derivative)))
        if self.allow_tree is not None:
            found.append(("allow", self.written(self.allow_tree)))
        return tuple(found)

    @functools.cached_property
    def slope(self) -> Node:
        """The derivative of the score by s."""
        return const(1.0) if self.score_tree is None else derivative(self.score_tree, _S)

    @functools.cached_property
    def bound(self) -> float:
        """How far from 0 "score" of `emit` may be, whatever s is; infinite: nobody knows, or beyond fp32."""
        least, greatest = range_of(lowered(_results(self, "score", ())["score"]))
        return as_fp32(max(abs(least), abs(greatest)))

    @functools.cached_property
    def accesses(self) -> tuple[Access, ...]:
        """Each place of a float input that the score reads, with the score's derivative by it."""
        if self.score_tree is None:
            return ()
        tree = simplify(self.score_tree)
        leaves = [node for node in walk(tree) if node.op in ("number", "tensor") and node.type == "float"]
        found = [Access(self.tokens[leaf.value], leaf, derivative(tree, leaf)) for leaf in leaves]
        return tuple(access for access in found if access.derivative.number != 0)

    def gradients(self, tokens: Collection[str]) -> tuple[InputGradient, ...]:
        """Of these tensors, one a place."""
        found = []
        for access in self.accesses:
            if access.token in tokens:
                factor = _quotient(access.derivative, self.slope)
                found.append(InputGradient(access, access.derivative if factor is None else factor, factor is not None))
        return tuple(found)

    @functools.cached_property
    def tile_bounds(self) -> tuple[TileBound, ...]:
        """What the code of "blocks" asks of tensors, each once."""
        nodes = [node for node in walk(*_results(self, "blocks", ()).values()) if node.op in ("lowest", "highest")]
        return tuple(dict.fromkeys(TileBound(self.tokens[node.value[0]], *node.value[1:]) for node in nodes))

    @functools.cached_property
    def key(self) -> str:
        """Eight hexadecimal digits that tell programs apart; names of inputs do not matter."""
        texts = [self.written(tree) if tree else "" for tree in (self.score_tree, self.allow_tree)]
        said = "\n".join([*texts, *(f"{given.token} {given.type}" for given in self.inputs)])
        return hashlib.sha256(said.encode()).hexdigest()[:8]

    def written(self, tree: Node) -> str:
        """A formula in tokens."""
        return write(tree, self.tokens.__getitem__)

    def check(self, seqlen_q: int, seqlen_k: int, numbers: Mapping[str, Any], batch: int = 1, heads: int = 1) -> None:
        """InvalidInput where positions of these lengths and these numbers exceed 32 bits, or a divisor is not positive.

        numbers  the values of the program's numbers, by name.
        """
        ends = {"i0": 0, "i1": max(seqlen_q - 1, 0), "j0": 0, "j1": max(seqlen_k - 1, 0)}
        values = {**ends, **numbers, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
        corners = [values | {"b": b, "h": h, "hk": h} for b in {0, batch - 1} for h in {0, heads - 1}]
        for node, number, limit in self._limits:
            for values in corners:
                found = evaluate_on_numbers(number, values)
                if limit is None and found <= 0:
                    raise InvalidInput(f"{write(node)} divides by {found}; it must be positive")
                if limit is not None and abs(found) > limit:
                    what = "compares" if node.type == "bool" else "reaches"
                    raise InvalidInput(f"{write(node)} {what} {found} at these lengths, beyond {limit}")

    @functools.cached_property
    def _limits(self) -> tuple[tuple[Node, Node, int | None], ...]:
        """(node, number, limit): which numbers `check` looks at. Each divisor, which has no limit but must be positive,
        and both ends of each whole number, and of what comparisons compare."""
        found: list[tuple[Node, Node, int | None]] = []
        for tree in (simplify(tree) for tree in (self.score_tree, self.allow_tree) if tree is not None):
            known = bounds(tree)
            for node in walk(tree):
                if node.op in ("//", "%"):
                    found.append((node, node.args[1], None))
                if node.op in ("<", "<=", "==", "!=") and (apart := sides(node)):
                    ends = (end for side in apart for end in bounds(side)[side])
                    found += [(node, end, 2**31 - 1) for end in ends if end is not None]
                if node.type != "int" or node.op in ("const", "name", "number", "tensor"):
                    continue
                exact = any(user.op == "float" and node in user.args for user in walk(tree))
                for end in known[node]:
                    if end is not None and not any(part.op in ("tensor", "lowest", "highest") for part in walk(end)):
                        found.append((node, end, _FLOAT_EXACT if exact else 2**31 - 1))
        return tuple(found)


@dataclass(frozen=True)
class TileBound:
    """A tensor whose least and greatest numbers over a tile's positions decide which tiles are visited.

    side     whose positions: "i", the queries' or "j", the keys'.
    axis     which of its axes they are; the code's indices are those of the others.
    filters  which of its numbers count: ("above", 0) says those above 0. Of none the least is 2^31 - 1 and the greatest
             -2^31.
    """

    token: str
    side: str
    axis: int
    filters: tuple[Filter, ...]

    @property
    def name(self) -> str:
        """What the functions that read them end in: `lowest_input_0_i_above_0`."""
        return bound_name(self.token, self.side, self.filters)


@dataclass(frozen=True)
class Access:
    """One number, or one tensor at one place, and the score's derivative by it; `level` is that of the place."""

    token: str
    leaf: Node
    derivative: Node

    @property
    def level(self) -> Level:
        return level_of(self.leaf)

    @property
    def axes(self) -> tuple[str, ...]:
        """Of the place, as `Input.axes`."""
        return tuple(str(index.value) if index.op == "name" else "" for index in self.leaf.args)


@dataclass(frozen=True)
class InputGradient:
    """What each element adds to a tensor's gradient at one place: `factor` times a gradient that it has anyway.

    of_s  whether that is the gradient of s, which the score's derivative is in already, so that the factor does not
          depend on s; else that of the score, and the factor is the derivative by the place.
    """

    access: Access
    factor: Node
    of_s: bool


@dataclass(frozen=True)
class Code(Statements):
    """C++ of a program: see `emit`.

    is_one     whether the weight is 1, so that it need not be multiplied with.
    is_finite  whether results are finite for finite scores, where the numbers of the call are.
    """

    is_one: bool
    is_finite: bool


def parse(score: str = "", allow: str = "", types: Mapping[str, Type] | None = None) -> Program:
    """The program of a score and of a condition which keys are seen; of "" neither changes anything.

    types  of named numbers and tensors, "float", "int" or "bool"; others are inferred: see fa2gen.expression.infer.
    Raises InvalidInput, with the column, for what is not in the language.
    """
    types = {} if types is None else dict(types)
    for word, type in types.items():
        if not isinstance(word, str) or type not in TYPES:
            raise InvalidInput(f"types of inputs are {', '.join(TYPES)}, not {type!r}, of {word!r}")
    if not isinstance(score, str) or not isinstance(allow, str):
        raise InvalidInput("score and allow must be strings")
    return _parse(score, allow, tuple(sorted(types.items())))


@functools.lru_cache(maxsize=1024)
def _parse(score: str, allow: str, types: tuple[tuple[str, Type], ...]) -> Program:
    texts = Text("score", score), Text("allow", allow)
    syntax = [parsed(text) if text.text else None for text in texts]
    inferred = infer(dict(types), *syntax)
    ranks: dict[str, int] = {}
    trees = [
        None if tree is None else read(text, tree, inferred, ranks) for text, tree in zip(texts, syntax, strict=True)
    ]
    for word, _ in types:
        if word not in ranks:
            taken = "a word of the language" if word in NAMES or word in FUNCTIONS else "not in score or allow"
            raise InvalidInput(f"the input {word!r} is {taken}; they name {', '.join(ranks) or 'no inputs'}")
    if trees[0] is not None:
        simple = simplify(trees[0])
        if not any(node is _S for node in walk(simple)):
            texts[0].refuse(0, f"this is {write(simple)}, whatever s, the score of q and k, is")
        trees[0] = None if simple is _S else trees[0]
    if trees[1] is not None and simplify(trees[1]) is TRUE:
        trees[1] = None
    inputs = _inputs([tree for tree in trees if tree is not None])
    return Program(
        score="" if trees[0] is None else write(trees[0]),
        allow="" if trees[1] is None else write(trees[1]),
        types=tuple(sorted((given.name, given.type) for given in inputs)),
        inputs=inputs,
        score_tree=trees[0],
        allow_tree=trees[1],
    )


def _inputs(trees: Iterable[Node]) -> tuple[Input, ...]:
    found: dict[str, list[Node]] = {}
    for node in walk(*trees):
        if node.op in ("number", "tensor"):
            found.setdefault(node.value, []).append(node)
    return tuple(
        Input(
            word,
            nodes[0].type,
            f"{'input' if nodes[0].args else 'number'}_{place}",
            tuple(node.args for node in nodes if node.args),
        )
        for place, (word, nodes) in enumerate(found.items())
    )


def evaluate(program: Program, what: Literal["score", "allow"], torch: Any, values: Mapping[str, Any]) -> Any:
    """The score or the mask on tensors, differentiable by torch's autograd.

    values  s (float), i, j, b, h, hk (whole numbers), which broadcast against each other; seqlen_q, seqlen_k; and the
            inputs by name. Only what the text names is needed.
    torch   the library, which this package does not import.
    """
    tree = program.score_tree if what == "score" else program.allow_tree
    if tree is None:
        return values["s"] if what == "score" else torch.tensor(True)
    return evaluate_tree(tree, values, torch)


def emit(
    program: Program,
    what: Literal["score", "score by rows", "score of rows", "cap", "rise", "gradient", "allow", "blocks", "inputs"],
    tokens: Collection[str] = (),
    causal: bool = False,
) -> Code:
    """C++ of a program: statements by level, and results that use them. Free names: see the package's README.

    score     "score" and "factor": the softmax's argument is factor * score, with a positive factor of the head.
    score by rows  the same, and "of_row", the term of the score that all keys of a query share.
    score of rows  the same, with a factor that is the same for all heads, as rows of several are in a tile.
    cap       "slope" where the score is tanh(slope * acc), with a slope of the head; else nothing.
    rise      "rise" where the score rises by the same from one query to the next and falls so from one key to the next,
              for all of a head, and changes by no more: by how much; else nothing.
    gradient  these two, "weight", the derivative of the score by s, and of `Program.gradients` of the tokens "by_0" and
              so on, the factors of those that may depend on s.
    allow     "allow": whether a key is seen.
    blocks    "any" and "all": whether some and whether all keys of a tile may be seen, i0..i1 and j0..j1 inclusive; of
              tensors by the functions `Program.tile_bounds` names, of the tile that begins at their first argument.
              "keys_alike": whether a query that sees one of them sees all; "queries_alike": whether a key that one sees
              is seen by all.
    inputs    of the same gradients "by_0" and so on, the other factors, and "index_0_0" and so on, their places.

    causal    whether only keys matter that a causal mask shows.
    """
    trees = _results(program, what, tokens, causal)
    results = {key: lowered(tree) for key, tree in trees.items()}
    if what == "score by rows":
        results["score"], results["of_row"] = lowered_by_rows(trees["score"])
    made = statements(results, program.tokens)
    return Code(
        levels=made.levels,
        results=made.results,
        helpers=made.helpers,
        most_alive=made.most_alive,
        instructions=made.instructions,
        is_one="weight" in results and results["weight"].number == 1,
        is_finite=all(map(_is_finite, walk(*results.values()))),
    )


def _quotient(derivative: Node, slope: Node) -> Node | None:
    """What the slope is multiplied with to be the derivative, where that does not depend on s; else None.

    Every factor of the slope must be one of the derivative's: where it is 0, so is the derivative.
    """
    times, rest = 1.0, list(_factors(derivative))
    for factor in _factors(slope):
        if factor.number == 0:
            return None
        if factor.number is not None:
            times /= factor.number
        elif factor in rest:
            rest.remove(factor)
        else:
            return None
    if any(node is _S for node in walk(*rest)):
        return None
    return multiply((const(times), *rest))


def _factors(node: Node) -> tuple[Node, ...]:
    return node.args if node.op == "*" else (node,)


def _results(program: Program, what: str, tokens: Collection[str], causal: bool = False) -> dict[str, Node]:
    if what in ("allow", "blocks"):
        tree = TRUE if program.allow_tree is None else simplify(program.allow_tree)
        if what == "allow":
            return {"allow": tree}
        some, every = any_and_all(tree)
        asked = {node for node in walk(some, every) if node.op in ("lowest", "highest")}
        sides = {"keys_alike": alike(tree, asked, KEY), "queries_alike": alike(tree, asked, QUERY)}
        return {"any": some, "all": every, **sides}
    of_acc = multiply((ACC, SCALE))
    gradients = program.gradients(tokens)
    if what == "inputs":
        found = {f"by_{n}": gradient.factor for n, gradient in enumerate(gradients) if gradient.of_s}
        for n, gradient in enumerate(gradients):
            found |= {f"index_{n}_{axis}": simplify(x) for axis, x in enumerate(gradient.access.leaf.args)}
        return found
    score = of_acc if program.score_tree is None else simplify(substitute(program.score_tree, {_S: of_acc}))
    score = without_signs(score) if causal else score
    factor, rest, shared = factored(score, of_all_heads=what == "score of rows")
    if what == "rise":
        rise = rise_of(rest)
        return {} if rise is None else {"rise": rise}
    if what == "cap":
        slope = _slope_of_tanh(rest)
        return {} if slope is None else {"slope": slope}
    found = {"score": rest, "factor": multiply((factor, const(1.4426950408889634)))}
    if what == "gradient":
        derivatives = {"weight": program.slope}
        derivatives |= {f"by_{n}": gradient.factor for n, gradient in enumerate(gradients) if not gradient.of_s}
        for key, formula in derivatives.items():
            found[key] = simplify(substitute(simplify(substitute(formula, {_S: of_acc})), shared))
    return found


def _slope_of_tanh(score: Node) -> Node | None:
    """What the head multiplies products with in a score that is tanh of them, and nothing else."""
    if score.op != "tanh":
        return None
    factors = _factors(score.args[0])
    others = [factor for factor in factors if factor is not ACC]
    of_head = len(others) == len(factors) - 1 and all(level_of(factor) == "head" for factor in others)
    return multiply((const(1.0), *others)) if of_head else None


def _is_of_head(node: Node) -> bool:
    """Whether floats of a tensor make it what it is, the same for all of a head."""
    return level_of(node) == "head" and any(x.op == "tensor" and x.type == "float" for x in walk(node))


def _is_finite(node: Node) -> bool:
    """Whether an operation keeps finite numbers finite: not of tensors, which may hold -inf, but for those of a head
    where they are a factor alone, as slopes are."""
    if node.op in ("/", "recip") and level_of(node) != "head":
        return (
            node.op == "recip"
            and node.args[0].op == "+"
            and node.args[0].args[0].number == 1.0
            and (node.args[0].args[1].op == "exp2")
        )
    if node.op == "tensor" and node.type == "float":
        return level_of(node) == "head"
    if node.op != "*" and level_of(node) != "head" and any(map(_is_of_head, node.args)):
        return False
    return node.op not in ("exp2", "log2", "sqrt")

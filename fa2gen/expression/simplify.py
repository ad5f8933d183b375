"""Trees in a normal form: sums and products flat, with their constants folded and equal parts taken together.

Whole numbers wrap at 32 bits, so every law of a ring holds for them. Floats are taken for real numbers, as a compiler
does with -ffast-math, with one exception: what a comparison compares, where it does not depend on the accumulator, is
left as written, since a rounding there would move a mask's edge.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable

from fa2gen.expression.tree import Node, Type, const, make, name, rebuilt, walk

__all__ = [
    "ACC",
    "FALSE",
    "TRUE",
    "add",
    "compared",
    "difference",
    "multiply",
    "negate",
    "reciprocal",
    "simplify",
    "where",
]

ACC = name("acc", "float")
"""The product of q and k, which a score is made from."""
TRUE, FALSE = const(True), const(False)

_FP32_MAX = 3.4028234e38

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
_FOLDED: dict[str, Callable[[float], float]] = {
    "exp": math.exp,
    "log": math.log,
    "tanh": math.tanh,
    "sqrt": math.sqrt,
    "exp2": lambda x: 2.0**x,
    "log2": math.log2,
    "sigmoid": lambda x: 1.0 / (1.0 + math.exp(-x)),
}


def simplify(root: Node) -> Node:
    """An equal tree in normal form."""
    made: dict[Node, Node] = {}
    exact = compared(root)
    for node in walk(root):
        args = tuple(made[arg] for arg in node.args)
        as_it_is = node in exact and node.type == "float"
        made[node] = rebuilt(node, args) if as_it_is else _simplified(node, args)
    return made[root]


def _depends_on_score(root: Node) -> bool:
    return any(node.op == "name" and node.value in ("s", "acc") for node in walk(root))


def compared(root: Node) -> set[Node]:
    """Floats that comparisons compare, and what they are made from, but for those of the score: left as written."""
    sides = [side for node in walk(root) if node.op in _COMPARE for side in node.args if side.type == "float"]
    return {node for side in sides if not _depends_on_score(side) for node in walk(side)}


def _simplified(node: Node, args: tuple[Node, ...]) -> Node:
    match node.op:
        case "+":
            return add(args)
        case "*":
            return multiply(args)
        case "neg":
            return negate(args[0])
        case "/":
            return multiply((args[0], reciprocal(args[1])))
        case "recip":
            return reciprocal(args[0])
        case "//" | "%":
            return _whole_division(node.op, *args)
        case "<" | "<=" | "==" | "!=":
            return _compare(node.op, *args)
        case "and" | "or":
            return _junction(node.op, args)
        case "not":
            return _not(args[0])
        case "where":
            return where(*args)
        case "min" | "max":
            return _extreme(node.op, args)
        case "abs" | "sign":
            return _abs_or_sign(node.op, args[0])
        case "float" if args[0].number is not None:
            return const(float(args[0].number))
    if node.op in _FOLDED and args[0].number is not None:
        folded = _fold(_FOLDED[node.op], args[0].number)
        if folded is not None:
            return folded
    return rebuilt(node, args)


def _fold(function: Callable[[float], float], value: float) -> Node | None:
    """The value as a constant; None where it has none in fp32."""
    try:
        found = function(value)
    except (ValueError, OverflowError, ZeroDivisionError):
        return None
    return const(float(found)) if abs(found) < _FP32_MAX else None


def _number(value: int | float, type: Type) -> Node:
    """A constant; of whole numbers what is left of it in 32 bits, of floats what fp32 holds."""
    if type == "int":
        return const((int(value) + 2**31) % 2**32 - 2**31)
    return const(min(max(float(value), -_FP32_MAX), _FP32_MAX))


# Sums and products ---------------------------------------------------------------------------------------------------


def _split(node: Node) -> tuple[int | float, Node | None]:
    """A term as its constant factor and the rest; None if there is no rest."""
    if node.number is not None:
        return node.number, None
    if node.op == "*" and node.args[0].number is not None:
        rest = node.args[1:]
        return node.args[0].number, rest[0] if len(rest) == 1 else make("*", *rest, type=node.type)
    return 1, node


def _flat(op: str, nodes: Iterable[Node]) -> Iterable[Node]:
    for node in nodes:
        yield from node.args if node.op == op else (node,)


def add(nodes: Iterable[Node]) -> Node:
    """The sum of terms of one type, at least one."""
    nodes = tuple(nodes)
    type = nodes[0].type
    constant: int | float = 0
    times: dict[Node, int | float] = {}
    places: list[Node | None] = []  # where the constant stood first, so that formulas read as written
    for term in _flat("+", nodes):
        factor, rest = _split(term)
        if rest not in places:
            places.append(rest)
        if rest is None:
            constant += factor
        else:
            times[rest] = times.get(rest, 0) + factor
    terms = []
    for place in places:
        if place is None:
            terms += [_number(constant, type)] if constant else []
        elif times[place]:
            terms.append(_scaled(place, times[place]))
    if not terms:
        return _number(0, type)
    return terms[0] if len(terms) == 1 else make("+", *terms, type=type)


def _scaled(rest: Node, factor: int | float) -> Node:
    if factor == 1:
        return rest
    factors = rest.args if rest.op == "*" else (rest,)
    return make("*", _number(factor, rest.type), *factors, type=rest.type)


def negate(node: Node) -> Node:
    return multiply((_number(-1, node.type), node))


def difference(left: Node, right: Node) -> Node | None:
    """left - right of whole numbers; None where their constants are further apart than 32 bits tell."""
    constants = (sum(term.number or 0 for term in _flat("+", (side,))) for side in (left, right))
    return None if abs(next(constants) - next(constants)) >= 2**31 else add((left, negate(right)))


def reciprocal(node: Node) -> Node:
    """1 / node, of each factor for itself."""
    if node.number:
        return _number(1.0 / node.number, "float")
    if node.op == "*":
        return multiply(tuple(map(reciprocal, node.args)))
    if node.op == "recip":
        return node.args[0]
    if node.op == "exp":
        return make("exp", negate(node.args[0]), type="float")
    return make("recip", node, type="float")


def multiply(nodes: Iterable[Node]) -> Node:
    """The product of factors of one type, at least one."""
    nodes = tuple(nodes)
    type = nodes[0].type
    constant: int | float = 1
    powers: dict[Node, int] = {}
    for factor in _flat("*", nodes):
        if factor.number is not None:
            constant *= factor.number
        elif factor.op == "recip":
            powers[factor.args[0]] = powers.get(factor.args[0], 0) - 1
        else:
            powers[factor] = powers.get(factor, 0) + 1
    if not constant:
        return _number(0, type)
    factors: list[Node] = []
    for base, power in powers.items():
        if base.op == "sign":  # its square is 1 but for 0, where what it signs is 0 itself
            power %= 2
        factors += [base] * power if power > 0 else [make("recip", base, type=type)] * -power
    constant = _number(constant, type).value
    if len(factors) == 1 and factors[0].op == "+" and (type == "int" or constant == -1):
        return add(multiply((_number(constant, type), term)) for term in factors[0].args)
    if constant != 1 or not factors:
        factors.insert(0, _number(constant, type))
    return factors[0] if len(factors) == 1 else make("*", *factors, type=type)


def _whole_division(op: str, left: Node, right: Node) -> Node:
    a, b = left.number, right.number
    if a is not None and b is not None:
        return _number(a // b if op == "//" else a % b, "int")
    if b == 1:
        return left if op == "//" else const(0)
    return make(op, left, right, type="int")


# Conditions ----------------------------------------------------------------------------------------------------------


def _compare(op: str, left: Node, right: Node) -> Node:
    if left.op == right.op == "const":
        return const(_COMPARE[op](left.value, right.value))
    if left is right and left.type != "float":
        return const(op in ("<=", "=="))
    return make(op, left, right, type="bool")


def _junction(op: str, args: Iterable[Node]) -> Node:
    """Of `and` True says nothing and False all; of `or` the other way round."""
    nothing, everything = (TRUE, FALSE) if op == "and" else (FALSE, TRUE)
    parts = [part for part in dict.fromkeys(_flat(op, args)) if part is not nothing]
    if everything in parts:
        return everything
    if not parts:
        return nothing
    return parts[0] if len(parts) == 1 else make(op, *parts, type="bool")


def _not(node: Node) -> Node:
    if node.op == "const":
        return const(not node.value)
    if node.op == "not":
        return node.args[0]
    if node.op in ("==", "!="):
        return make("!=" if node.op == "==" else "==", *node.args, type="bool")
    if node.op in ("<", "<=") and node.args[0].type == "int":  # of floats a NaN is on neither side
        return make("<=" if node.op == "<" else "<", node.args[1], node.args[0], type="bool")
    return make("not", node, type="bool")


def where(condition: Node, left: Node, right: Node) -> Node:
    if condition.op == "const":
        return left if condition.value else right
    if left is right:
        return left
    if condition.op == "not":
        return where(condition.args[0], right, left)
    if left.type == "bool":
        if left.op == "const":
            return _junction("or" if left.value else "and", (condition if left.value else _not(condition), right))
        if right.op == "const":
            return _junction("or" if right.value else "and", (_not(condition) if right.value else condition, left))
    return make("where", condition, left, right, type=left.type)


def _extreme(op: str, args: Iterable[Node]) -> Node:
    parts = list(dict.fromkeys(_flat(op, args)))
    numbers = [part.number for part in parts if part.number is not None]
    if len(numbers) > 1:
        best = _number(min(numbers) if op == "min" else max(numbers), parts[0].type)
        parts = [part for part in parts if part.number is None] + [best]
    return parts[0] if len(parts) == 1 else make(op, *parts, type=parts[0].type)


def _abs_or_sign(op: str, node: Node) -> Node:
    factor, rest = _split(node)
    if rest is None:
        return _number(abs(factor) if op == "abs" else (factor > 0) - (factor < 0), node.type)
    if op == "abs":
        if node.op in ("abs", "exp"):
            return node
        if factor < 0 and node.type == "float":
            return multiply((_number(-factor, node.type), _abs_or_sign(op, rest)))
    return make(op, node, type=node.type)

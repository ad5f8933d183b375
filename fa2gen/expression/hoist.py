"""What depends on what: trees made so that as little as possible is left to each element of a tile.

Levels: "head" depends on the batch entry, the head and the call alone; "row" on the query's position too, "column" on
the key's; "element" on both, or on the score. Sums, products and conditions are regrouped so that their parts of one
level stand together, and whole numbers become floats where positions do, since converting one an element is slow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

from fa2gen.expression.simplify import ACC, add, compared, multiply, negate, reciprocal, simplify
from fa2gen.expression.tree import Node, const, make, name, rebuilt, walk

__all__ = [
    "KEY",
    "LEVELS",
    "QUERY",
    "SCALE",
    "Level",
    "factored",
    "level_of",
    "lowered",
    "lowered_by_rows",
    "rise_of",
    "without_signs",
]

Level = Literal["head", "row", "column", "element"]
LEVELS: tuple[Level, ...] = ("head", "row", "column", "element")

SCALE = name("softmax_scale", "float")
"""What scores are multiplied with; positive."""
QUERY, KEY = name("i"), name("j")
"""Positions."""
_FLOAT_QUERY, _FLOAT_KEY = name("float_i", "float"), name("float_j", "float")
_HEADS = (name("b"), name("h"), name("hk"))

_DISTANCE = add((QUERY, name("seqlen_k"), negate(name("seqlen_q")), negate(KEY)))
"""From the key to the last that a causal mask shows the query."""
_AT_ONCE = 6
_LOG2E, _LN2 = const(1.4426950408889634), const(0.6931471805599453)
_BY_ROW, _BY_COLUMN = {QUERY, _FLOAT_QUERY}, {KEY, _FLOAT_KEY}


@functools.lru_cache(maxsize=4096)
def level_of(root: Node) -> Level:
    row = column = False
    for node in walk(root):
        row |= node in _BY_ROW or node is ACC
        column |= node in _BY_COLUMN or node is ACC
    return "element" if row and column else "row" if row else "column" if column else "head"


def factored(score: Node, of_all_heads: bool = False) -> tuple[Node, Node, dict[Node, Node]]:
    """A score as factor * rest, with a positive factor of the head: what the softmax multiplies with anyway.

    scale * acc + ... gives (scale, acc + ... / scale); c * tanh(u) gives (|c|, tanh(u) with c's sign). Others (1, all).
    The third are parts of the score by those of the rest, where they share some. `of_all_heads` is whether the factor
    must be the same for all of them, as where rows of several heads are in one tile.
    """
    terms = score.args if score.op == "+" else (score,)
    for term in terms:
        factors = term.args if term.op == "*" else (term,)
        others = [factor for factor in factors if factor is not ACC and factor is not SCALE]
        if len(factors) - len(others) == 2 and all((factor.number or 0) > 0 for factor in others):
            coefficient = multiply((SCALE, *others))
            return coefficient, add(multiply((part, reciprocal(coefficient))) for part in terms), {}
    factors = score.args if score.op == "*" else (score,)
    others = [factor for factor in factors if level_of(factor) == "head"]
    (of_score, *more) = [factor for factor in factors if level_of(factor) != "head"]
    is_of_all = not any(node.op == "tensor" or node in _HEADS for node in walk(*others))
    if of_score.op == "tanh" and not more and (is_of_all or not of_all_heads):
        coefficient = multiply((const(1.0), *others))
        sign = simplify(make("sign", coefficient, type="float"))
        rest = simplify(make("tanh", multiply((sign, of_score.args[0])), type="float"))
        return multiply((sign, coefficient)), rest, {of_score: multiply((sign, rest))}
    return const(1.0), score, {}


# Into what kernels compute -------------------------------------------------------------------------------------------


def lowered(root: Node) -> Node:
    """A simplified tree in operations that kernels have, with what is of one level together."""
    return _regrouped(_operations(root))


def lowered_by_rows(root: Node) -> tuple[Node, Node]:
    """A score as two terms, each as `lowered` makes it: what an element needs, and what all keys of a query share, 0
    where that is nothing: a softmax adds it to its maxima alone."""
    terms = [part for term in _terms(_operations(root)) for part in _distributed(term)]
    of_row = [term for term in terms if level_of(term) in ("head", "row")]
    if not any(level_of(term) == "row" for term in of_row):
        return lowered(root), const(0.0)
    return _regrouped(add(term for term in terms if term not in of_row)), _regrouped(add(of_row))


def _distributed(term: Node) -> tuple[Node, ...]:
    """Of a factor of the head times a sum of what rows and what columns decide, both parts; others as they are."""
    factors = term.args if term.op == "*" else (term,)
    sums = [factor for factor in factors if factor.op == "+" and level_of(factor) == "element"]
    others = [factor for factor in factors if level_of(factor) == "head"]
    if len(sums) != 1 or len(factors) > 1 + len(others) or any(level_of(part) == "element" for part in sums[0].args):
        return (term,)
    of_columns = [part for part in sums[0].args if level_of(part) == "column"]
    of_rows = [part for part in sums[0].args if part not in of_columns]
    return multiply((*others, add(of_rows))), multiply((*others, add(of_columns)))


def rise_of(score: Node) -> Node | None:
    """What a score rises by from one query to the next, and falls by from one key to the next, where it is a product
    and such a term of positions: a number of the head. Else None."""
    terms = _terms(_operations(score))
    of_places = [_by_places(term) for term in terms if term is not ACC]
    if not of_places or len(of_places) != len(terms) - 1 or any(term is None for term in of_places):
        return None
    by_query, by_key = (add(found) for found in zip(*(term for term in of_places if term), strict=True))
    return by_query if add((by_query, by_key)).number == 0 and by_query.number != 0 else None


def _by_places(term: Node) -> tuple[Node, Node] | None:
    """A term's derivatives by the query's position and the key's where they are numbers of the head."""
    if level_of(term) == "head":
        return const(0.0), const(0.0)
    if term in (_FLOAT_QUERY, _FLOAT_KEY):
        return const(float(term is _FLOAT_QUERY)), const(float(term is _FLOAT_KEY))
    if term.op not in ("+", "*"):
        return None
    others = [part for part in term.args if level_of(part) == "head"]
    parts = [_by_places(part) for part in term.args if level_of(part) != "head"]
    if any(part is None for part in parts) or (term.op == "*" and len(parts) != 1):
        return None
    by_query, by_key = (list(found) for found in zip(*(part for part in parts if part), strict=True))
    if term.op == "+":
        return add(by_query), add(by_key)
    return multiply((*others, *by_query)), multiply((*others, *by_key))


def without_signs(root: Node) -> Node:
    """A simplified tree for the keys that a causal mask shows, which lie before the query: |.| of how far, and farther,
    is that itself."""
    made: dict[Node, Node] = {}
    for node in walk(root):
        args = tuple(made[arg] for arg in node.args)
        beyond = add((args[0], negate(_DISTANCE))).number if node.op == "abs" and node.type == "int" else None
        made[node] = args[0] if beyond is not None and beyond >= 0 else rebuilt(node, args)
    return simplify(made[root])


def _operations(root: Node) -> Node:
    made: dict[Node, Node] = {}
    exact = compared(root)
    for node in walk(root):
        made[node] = _lowered(node, tuple(made[arg] for arg in node.args), node in exact)
    return made[root]


def _lowered(node: Node, args: tuple[Node, ...], exact: bool) -> Node:
    match node.op:
        case "float":
            return _as_float(args[0])
        case "exp":
            return make("exp2", _product((_LOG2E, args[0]), exact), type="float")
        case "log":
            return _product((_LN2, make("log2", args[0], type="float")), exact)
        case "sigmoid":
            power = make("exp2", _product((const(-1.0), _LOG2E, args[0]), exact), type="float")
            return make("recip", make("+", const(1.0), power, type="float"), type="float")
        case "+" if not exact:
            return add(args)
        case "*" if not exact:
            return multiply(args)
    return rebuilt(node, args)


def _product(factors: tuple[Node, ...], exact: bool) -> Node:
    return make("*", *factors, type="float") if exact else multiply(factors)


def _as_float(node: Node) -> Node:
    """The float of a whole number, made of float_i and float_j where it is of positions: exact to 2^24."""
    if not _is_of_positions(node):
        return make("float", node, type="float") if node.number is None else const(float(node.number))
    if node in (QUERY, KEY):
        return _FLOAT_QUERY if node is QUERY else _FLOAT_KEY
    if node.op == "where":
        return make("where", node.args[0], *map(_as_float, node.args[1:]), type="float")
    if node.op == "+":
        rest = [term for term in node.args if level_of(term) == "head"]
        parts = [_as_float(term) for term in node.args if level_of(term) != "head"]
        return add([*parts, *([_as_float(add(rest))] if rest else [])])
    if node.op == "*":
        return multiply(map(_as_float, node.args))
    return make(node.op, *map(_as_float, node.args), type="float")


def _is_of_positions(node: Node) -> bool:
    """Whether it is a sum of positions and what the head decides, or the least, the greatest or |.| of such."""
    if node in (QUERY, KEY):
        return True
    if node.op == "*":
        return len(node.args) == 2 and abs(node.args[0].number or math.inf) <= 64 and node.args[1] in (QUERY, KEY)
    if node.op in ("+", "abs", "min", "max", "where"):
        parts = node.args[1:] if node.op == "where" else node.args
        fits = [_is_of_positions(part) or level_of(part) == "head" for part in parts]
        return all(fits) and level_of(node) != "head"
    return False


# Regrouping ----------------------------------------------------------------------------------------------------------


def _regrouped(root: Node) -> Node:
    made: dict[Node, Node] = {}
    for node in walk(root):
        args = tuple(made[arg] for arg in node.args)
        if node.op in ("+", "*", "and", "or", "min", "max"):
            made[node] = _grouped(node, args)
        elif node.op in ("<", "<=", "==", "!=") and args[0].type == "int":
            made[node] = _sided(node.op, *args)
        else:
            made[node] = rebuilt(node, args)
    return made[root]


def _grouped(node: Node, args: Sequence[Node]) -> Node:
    """An associative operation on parts of one level each; those of a lower level are made into one first."""
    groups: dict[Level, list[Node]] = {level: [] for level in LEVELS}
    for arg in args:
        groups[level_of(arg)].append(arg)
    of_head = _joined(node, groups.pop("head"))
    lowest = next((level for level in groups if groups[level]), None)
    if lowest is None:
        return of_head[0]
    groups[lowest] = of_head + groups[lowest]
    if not groups["element"] and not (groups["row"] and groups["column"]):
        return _joined(node, groups[lowest])[0]
    parts = [*_joined(node, groups["row"]), *_joined(node, groups["column"]), *groups["element"]]
    return _joined(node, sorted(parts, key=lambda part: args.index(part) if part in args else -1))[0]


def _joined(node: Node, parts: Sequence[Node]) -> list[Node]:
    """The operation on these parts, as one or none; on a few at a time, so that a line holds them."""
    if len(parts) < 2:
        return list(parts)
    if len(parts) > _AT_ONCE:
        parts = [part for at in range(0, len(parts), _AT_ONCE) for part in _joined(node, parts[at : at + _AT_ONCE])]
        return _joined(node, parts)
    return [make(node.op, *parts, type=node.type)]


def _sided(op: str, left: Node, right: Node) -> Node:
    """A comparison of whole numbers with what the row decides on one side and the column on the other.

    No sum of positions exceeds 32 bits, nor does their difference (`Program.check`); tensors' may, so that terms with
    tensors move only where wrapping does not matter.
    """
    terms = _terms(add((left, negate(right))))
    levels = [level_of(term) for term in terms]
    tensors = any(node.op == "tensor" for node in walk(left, right))
    if set(levels) >= {"row", "column"} and "element" not in levels and not (tensors and op in ("<", "<=")):
        of_column = add(term for term, level in zip(terms, levels, strict=True) if level == "column")
        of_row = add(term for term, level in zip(terms, levels, strict=True) if level != "column")
        if (_terms(of_column)[0].args or (of_column,))[0].number in (None, 1):
            left, right = of_column, negate(of_row)
        else:
            left, right = of_row, negate(of_column)
    return make(op, _regrouped(left), _regrouped(right), type="bool")


def _terms(node: Node) -> tuple[Node, ...]:
    return node.args if node.op == "+" else (node,)

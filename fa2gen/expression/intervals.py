"""Which keys a tile of queries sees, from the ends of its positions: none, all of them or some.

`bounds` gives trees for the least and the greatest value of a tree over a tile of positions i0 to i1 and j0 to j1, both
inclusive; of a condition, whether it must and whether it may hold. They are sound: what must hold holds everywhere, and
what may not holds nowhere. None stands for a bound that is not known: of sums with tensors, whose numbers nobody knows
beforehand, and of floats that are rounded on the way, since a kernel need not round as often as this would.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set

from fa2gen.expression.hoist import KEY, QUERY, level_of
from fa2gen.expression.simplify import FALSE, TRUE, add, difference, multiply, negate, simplify
from fa2gen.expression.tree import Node, const, make, name, walk

__all__ = ["TILE", "Bounds", "Filter", "alike", "any_and_all", "bounds", "position_axis", "sides"]

Bounds = tuple[Node | None, Node | None]
Filter = tuple[str, int]
"""Which of a tensor's numbers count: ("above", 0), ("below", 5) or ("not", 3)."""

TILE: Mapping[Node, Bounds] = {QUERY: (name("i0"), name("i1")), KEY: (name("j0"), name("j1"))}
"""The first and the last position of a tile."""


def any_and_all(condition: Node) -> tuple[Node, Node]:
    """Whether a simplified condition may hold somewhere in a tile, and whether it holds everywhere.

    Tensors of whole numbers and conditions are asked for their least and greatest number of the tile, where one axis is
    a position; of a tensor that has them on several, and of floats, which may be no numbers, nothing is known.
    """
    axes: dict[str, set[int | None]] = {}
    floats = set()
    for node in walk(condition):
        if node.op == "tensor":
            axes.setdefault(node.value, set()).add(position_axis(node))
            floats |= {node.value} if node.type == "float" else set()
    several = {word for word, found in axes.items() if len(found - {None}) > 1}
    must, may = bounds(condition, several | floats)[condition]
    return simplify(may or TRUE), simplify(must or FALSE)


def alike(condition: Node, asked: Set[Node], position: Node) -> Node:
    """Whether a query sees all keys of a tile if it sees one, or a key is seen by all queries: where the condition
    tells those positions apart by tensors alone, and each has one number in the tile. False where that is not known.

    asked     the least and greatest numbers that there are.
    position  KEY or QUERY.
    """
    found: list[Node] = []
    for node in walk(condition):
        if position not in node.args:
            continue
        ends = _numbers(node) if position_axis(node) is not None else ()
        if not ends or not asked >= set(ends):
            return FALSE
        found.append(make("==", *ends, type="bool"))
    return simplify(make("and", *found, type="bool")) if len(found) > 1 else (found or [FALSE])[0]


def bounds(root: Node, unknown: Collection[str] = ()) -> dict[Node, Bounds]:
    """(least, greatest) of every whole number and exact float of a simplified tree; of conditions (must, may).

    unknown  tensors that no bounds are kept of.
    """
    found: dict[Node, Bounds] = {}
    for node in walk(root):
        if level_of(node) == "head":
            found[node] = node, node
        elif node.op == "tensor" and node.value in unknown:
            found[node] = None, None
        else:
            found[node] = _bounds(node, found)
    return found


def _bounds(node: Node, found: dict[Node, Bounds]) -> Bounds:
    of = [found[arg] for arg in node.args]
    match node.op:
        case "name":
            return TILE.get(node, (None, None))
        case "tensor":
            return _of_tensor(node)
        case "+" if node.type == "int":
            return _sum(of)
        case "*" if node.type == "int":
            return _product(of)
        case "//":
            return _monotone(node, of[0])
        case "%":
            return _remainder(node, of[0])
        case "min" | "max":
            return _extreme(node, of)
        case "abs":
            return _abs(node, *of[0])
        case "float":
            return _monotone(node, of[0])
        case "neg":
            return tuple(None if end is None else negate(end) for end in of[0][::-1])  # type: ignore[return-value]
        case "where":
            return _where(node, *of)
        case "and" | "or":
            if node.op == "and":
                of = [_among(part, node.args, found) for part in node.args]
            default = (FALSE, TRUE)  # of a bound that is not known
            ends = [[end or default[side] for end in ends] for side, ends in enumerate(zip(*of, strict=True))]
            return tuple(simplify(make(node.op, *end, type="bool")) for end in ends)  # type: ignore[return-value]
        case "not":
            return tuple(  # type: ignore[return-value]
                None if end is None else simplify(make("not", end, type="bool")) for end in of[0][::-1]
            )
        case "<" | "<=" | "==" | "!=":
            return _compare(node, found)
    return None, None


def position_axis(node: Node) -> int | None:
    """Of a tensor at a place: which index is a position, where the others are the head's. None of all else."""
    if node.op != "tensor":
        return None
    positions = [axis for axis, index in enumerate(node.args) if level_of(index) != "head"]
    return positions[0] if len(positions) == 1 and node.args[positions[0]] in (QUERY, KEY) else None


def _among(node: Node, conditions: Iterable[Node], found: dict[Node, Bounds]) -> Bounds:
    """Bounds of one of several conditions that all must hold.

    `image[i] == image[j]` beside `image[i] > 0` may hold in a tile if it may of the numbers above 0: the 0 of the text
    between images is in most tiles.
    """
    if node.op != "==" or node.args[0].type != "int":
        return found[node]
    filters = tuple(sorted({one for x in conditions if x is not node for one in _filters(x, node.args)}))
    if not filters:
        return found[node]
    sides = {
        side: _of_tensor(side, filters) if position_axis(side) is not None and None not in found[side] else found[side]
        for side in node.args
    }
    return found[node][0], _compare(node, {**found, **sides})[1]


def _filters(condition: Node, of: Collection[Node]) -> Iterable[Filter]:
    """What a condition says of one of these tensors, if it compares it with a constant."""
    if condition.op not in ("<", "<=", "!="):
        return
    left, right = condition.args
    if left in of and isinstance(right.number, int):
        yield ("not", right.number) if condition.op == "!=" else ("below", right.number + (condition.op == "<="))
    elif right in of and isinstance(left.number, int):
        yield ("not", left.number) if condition.op == "!=" else ("above", left.number - (condition.op == "<="))


def _of_tensor(node: Node, filters: tuple[Filter, ...] = ()) -> Bounds:
    """From the numbers of a tile, those that the filters let through, where one index is a position and the others are
    the head's."""
    axis = position_axis(node)
    if axis is None:
        return None, None
    least, greatest = _numbers(node, filters)
    if node.type == "bool":
        return tuple(make("!=", end, const(0), type="bool") for end in (least, greatest))  # type: ignore[return-value]
    return least, greatest


def _numbers(node: Node, filters: tuple[Filter, ...] = ()) -> tuple[Node, Node]:
    """The least and the greatest number of a tensor that has one position; of conditions 0 or 1."""
    axis = position_axis(node)
    side = next(str(index.value) for place, index in enumerate(node.args) if place == axis)
    rest = [index for place, index in enumerate(node.args) if place != axis]
    type = "int" if node.type == "bool" else node.type
    least, greatest = (
        make(op, *rest, type=type, value=(node.value, side, axis, filters)) for op in ("lowest", "highest")
    )
    return least, greatest


def _has_tensor(node: Node) -> bool:
    return any(part.op == "tensor" for part in walk(node))


def _sum(of: list[Bounds]) -> Bounds:
    if any(end is None or _is_of_tensor(end) for ends in of for end in ends):
        return None, None
    return tuple(  # type: ignore[return-value]
        add(end for end in ends if end is not None) for ends in zip(*of, strict=True)
    )


def _is_of_tensor(node: Node) -> bool:
    """Whether arithmetic with it could exceed 32 bits without a call's knowing."""
    return any(part.op in ("tensor", "lowest", "highest") for part in walk(node))


def _product(of: list[Bounds]) -> Bounds:
    least, greatest = of[0]
    for low, high in of[1:]:
        ends = (least, greatest, low, high)
        if any(end is None or _is_of_tensor(end) for end in ends):
            return None, None
        if least is greatest and least is not None and least.number is not None and low and high:
            both = multiply((least, low)), multiply((least, high))
            least, greatest = both if least.number >= 0 else both[::-1]
            continue
        corners = [multiply((a, b)) for a in (least, greatest) for b in (low, high) if a and b]
        least, greatest = (simplify(make(op, *corners, type="int")) for op in ("min", "max"))
    return least, greatest


def _monotone(node: Node, ends: Bounds) -> Bounds:
    """Of what never falls with its first argument."""
    return tuple(  # type: ignore[return-value]
        None if end is None else simplify(make(node.op, end, *node.args[1:], type=node.type)) for end in ends
    )


def _remainder(node: Node, ends: Bounds) -> Bounds:
    low, high = ends
    by = node.args[1]
    last = add((by, const(-1)))
    if low is None or high is None:
        return const(0), last
    quotients = [make("//", end, by, type="int") for end in (low, high)]
    same = make("==", *quotients, type="bool")
    inner = [make("%", end, by, type="int") for end in (low, high)]
    return (
        simplify(make("where", same, inner[0], const(0), type="int")),
        simplify(make("where", same, inner[1], last, type="int")),
    )


def _extreme(node: Node, of: list[Bounds]) -> Bounds:
    """The least of some is known from above where one is known from above; from below where all are."""
    found: list[Node | None] = []
    for side, ends in enumerate(zip(*of, strict=True)):
        known = [end for end in ends if end is not None]
        enough = known if side == (node.op == "min") else known if len(known) == len(ends) else []
        found.append(simplify(make(node.op, *enough, type=node.type)) if len(enough) > 1 else (enough or [None])[0])
    return found[0], found[1]


def _abs(node: Node, low: Node | None, high: Node | None) -> Bounds:
    zero = const(0 if node.type == "int" else 0.0)
    if low is None or high is None or _is_of_tensor(low) or _is_of_tensor(high):
        return zero, None
    return (
        simplify(make("max", zero, low, negate(high), type=node.type)),
        simplify(make("max", high, negate(low), type=node.type)),
    )


def _where(node: Node, condition: Bounds, left: Bounds, right: Bounds) -> Bounds:
    must, may = condition[0] or FALSE, condition[1] or TRUE
    if node.type == "bool":
        left, right = ((ends[0] or FALSE, ends[1] or TRUE) for ends in (left, right))
    found: list[Node | None] = []
    for op, a, b in zip(("and", "or") if node.type == "bool" else ("min", "max"), left, right, strict=True):
        if a is None or b is None:
            found.append(None)
            continue
        either = make("where", may, make(op, a, b, type=node.type), b, type=node.type)
        found.append(simplify(make("where", must, a, either, type=node.type)))
    return found[0], found[1]


def sides(comparison: Node) -> tuple[Node, Node] | None:
    """Of whole numbers without tensors what depends on positions, and what that is compared with.

    i - j < i has one i less than its own sides. A call's numbers stand alone: `i - j < window` holds for each window of
    32 bits, where `i - j - window < 0` would exceed them. None of other comparisons, which stay as they are.
    """
    left, right = comparison.args
    if left.type != "int" or _has_tensor(left) or _has_tensor(right):
        return None
    apart = difference(left, right)
    if apart is None:
        return None
    terms = apart.args if apart.op == "+" else (apart,)
    placed = [term for term in terms if level_of(term) != "head"]
    rest = [term for term in terms if level_of(term) == "head"]
    zero = const(0)
    return add([*placed, zero]), negate(add([*rest, zero]))


def _compare(node: Node, found: dict[Node, Bounds]) -> Bounds:
    left, right = node.args
    if left.type == "bool":
        return None, None
    a, b = found[left], found[right]
    if apart := sides(node):
        a, b = (bounds(side)[side] for side in apart)
    (a0, a1), (b0, b1) = a, b

    def holds(op: str, x: Node | None, y: Node | None) -> Node | None:
        return None if x is None or y is None else simplify(make(op, x, y, type="bool"))

    def both(x: Node | None, y: Node | None) -> Node | None:
        return None if x is None or y is None else simplify(make("and", x, y, type="bool"))

    if node.op in ("<", "<="):
        return holds(node.op, a1, b0), holds(node.op, a0, b1)
    equal = both(holds("<=", a1, b0), holds("<=", b1, a0)), both(holds("<=", a0, b1), holds("<=", b0, a1))
    if node.op == "==":
        return equal
    return tuple(  # type: ignore[return-value]
        None if end is None else simplify(make("not", end, type="bool")) for end in equal[::-1]
    )

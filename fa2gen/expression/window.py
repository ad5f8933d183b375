"""The part of a mask that is a window: what kernels of intervals show without asking each key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fa2gen.expression.evaluate import evaluate_on_numbers
from fa2gen.expression.hoist import KEY, QUERY
from fa2gen.expression.program import Program, parse
from fa2gen.expression.simplify import add, difference, negate, simplify
from fa2gen.expression.tree import Node, const, name, walk
from fa2gen.expression.write import write

__all__ = ["Window", "split_window"]

_NO_LIMIT = -1
_AHEAD = add((name("seqlen_k"), negate(name("seqlen_q"))))  # of the first query's own key

_RIGHT, _LEFT = {KEY, negate(QUERY)}, {QUERY, negate(KEY)}  # j - i + ... and i - j + ..., which must not be positive


class Window(NamedTuple):
    """Query i sees keys from d - left to d + right, d = i + seqlen_k - seqlen_q, where the rest's allow holds too.

    left, right  -1: no limit, as in `fa2gen.options.Options`.
    rest         the program without what the window says; its score is the same.
    """

    left: int
    right: int
    rest: Program


def split_window(program: Program, numbers: Mapping[str, Any], lengths: tuple[int, int] | None) -> Window:
    """The window that a program's allow holds, and the rest: of `j <= i and document[i] == document[j]`, the first.

    numbers  the values of the program's numbers, by name.
    lengths  (seqlen_q, seqlen_k) of the call; None where sequences have different ones: then `j <= i` is no window, as
             it begins elsewhere in each, and `j <= i + seqlen_k - seqlen_q` is one.
    """
    if program.allow_tree is None:
        return Window(_NO_LIMIT, _NO_LIMIT, program)
    limits: dict[str, int] = {}
    rest = []
    for condition in _conjuncts(program.allow_tree):
        found = _limits(condition, numbers, lengths)
        if found is None:
            rest.append(condition)
        for side, limit in (found or {}).items():
            limits[side] = min(limits.get(side, limit), limit)
    if not limits:
        return Window(_NO_LIMIT, _NO_LIMIT, program)
    allow = " and ".join(f"({write(condition)})" for condition in rest)
    left = {node.value for node in walk(*rest, *filter(None, [program.score_tree]))}
    types = {word: type for word, type in program.types if word in left}
    return Window(limits.get("left", _NO_LIMIT), limits.get("right", _NO_LIMIT), parse(program.score, allow, types))


def _conjuncts(condition: Node) -> Iterable[Node]:
    if condition.op == "and":
        for part in condition.args:
            yield from _conjuncts(part)
    else:
        yield condition


def _limits(condition: Node, numbers: Mapping[str, Any], lengths: tuple[int, int] | None) -> dict[str, int] | None:
    """{"left": ...}, {"right": ...} or both, of a condition that says no more; None of others."""
    condition = simplify(condition)
    if condition.op not in ("<", "<=") or condition.args[0].type != "int":
        return None
    less, more = condition.args
    found: dict[str, int] = {}
    for inner in (less.args[0], negate(less.args[0])) if less.op == "abs" else (less,):
        apart = difference(inner, more)
        limit = None if apart is None else _limit(apart, numbers, lengths)
        if limit is None:
            return None
        side, most = limit
        found[side] = most - (condition.op == "<")
    # A limit before the query's own place is no window of options.
    return found if min(found.values()) >= 0 else None


def _limit(apart: Node, numbers: Mapping[str, Any], lengths: tuple[int, int] | None) -> tuple[str, int] | None:
    """Of a difference that must not be positive: the side that it limits, and to what."""
    terms = set(apart.args if apart.op == "+" else (apart,))
    rest = add([*sorted(terms - _RIGHT - _LEFT, key=write), const(0)])
    if terms >= _RIGHT:
        side, limit = "right", negate(add((rest, _AHEAD)))
    elif terms >= _LEFT:
        side, limit = "left", add((negate(rest), _AHEAD))
    else:
        return None
    values = dict(numbers)
    if lengths is not None:
        values |= dict(zip(("seqlen_q", "seqlen_k"), lengths, strict=True))
    leaves = [node for node in walk(limit) if node.op in ("name", "number", "tensor")]
    if any(leaf.op == "tensor" or leaf.value not in values for leaf in leaves):
        return None
    return side, int(evaluate_on_numbers(limit, values))

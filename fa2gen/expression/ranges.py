"""Between which numbers a float lies, whatever the call: of a cap it is known, of s it is not."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fa2gen.expression.tree import Node, walk

__all__ = ["range_of"]

Range = tuple[float, float]
"""The least and the greatest that a number may be; infinite where that is not known. NaN is in none."""

_UNKNOWN = (-math.inf, math.inf)
_KNOWN: dict[str, Range] = {"tanh": (-1.0, 1.0), "sign": (-1.0, 1.0), "exp2": (0.0, math.inf), "sqrt": (0.0, math.inf)}


def range_of(root: Node) -> Range:
    """Of a lowered tree (`fa2gen.expression.hoist.lowered`)."""
    found: dict[Node, Range] = {}
    for node in walk(root):
        found[node] = _range(node, [found[arg] for arg in node.args])
    return found[root]


def _range(node: Node, of: list[Range]) -> Range:
    if node.number is not None:
        return float(node.number), float(node.number)
    match node.op:
        case "+":
            return sum(low for low, _ in of), sum(high for _, high in of)
        case "*":
            found = of[0]
            for other in of[1:]:
                found = _spanned(a * b for a in found for b in other)
            return found
        case "recip" if of[0][0] > 0:
            return 1 / of[0][1], 1 / of[0][0]
        case "neg":
            return -of[0][1], -of[0][0]
        case "abs":
            low, high = of[0]
            return max(low, -high, 0.0), max(-low, high)
        case "min" | "max":
            of_ends = min if node.op == "min" else max
            return of_ends(low for low, _ in of), of_ends(high for _, high in of)
        case "where":
            return min(of[1][0], of[2][0]), max(of[1][1], of[2][1])
    return _KNOWN.get(node.op, _UNKNOWN)


def _spanned(corners: Iterable[float]) -> Range:
    """The range of some numbers; 0 times infinity may be anything."""
    values = list(corners)
    return _UNKNOWN if any(map(math.isnan, values)) else (min(values), max(values))

"""Derivatives of trees by symbols."""

from __future__ import annotations

from fa2gen.expression.simplify import add, multiply, negate, reciprocal, simplify, where
from fa2gen.expression.tree import Node, const, make, walk

__all__ = ["derivative"]

_ZERO, _ONE = const(0.0), const(1.0)


def derivative(root: Node, by: Node) -> Node:
    """d root / d by, simplified; `by` is any float node of the tree: the score, a number, one access of a tensor.

    Whole numbers and conditions have none, so that it is that of each side. Where two sides meet it is that of one of
    them; of abs at 0 it is 0.
    """
    if root.type != "float" or by.type != "float":
        return _ZERO
    root, by = simplify(root), simplify(by)
    found: dict[Node, Node] = {}
    for node in walk(root):
        if node is by:
            found[node] = _ONE
        elif node.type == "float":
            found[node] = _rule(node, [found.get(arg, _ZERO) for arg in node.args])
    return simplify(found[root])


def _rule(node: Node, d: list[Node]) -> Node:
    """The derivative of one operation from those of its arguments."""
    if all(part is _ZERO for part in d):
        return _ZERO
    args = node.args
    match node.op:
        case "+":
            return add(d)
        case "neg":
            return negate(d[0])
        case "*":
            return add(multiply((*args[:i], part, *args[i + 1 :])) for i, part in enumerate(d))
        case "/":
            over = multiply((d[0], reciprocal(args[1])))
            return add((over, negate(multiply((args[0], d[1], reciprocal(args[1]), reciprocal(args[1]))))))
        case "recip":
            return multiply((const(-1.0), d[0], node, node))
        case "where":
            return where(args[0], d[1], d[2])
        case "min" | "max":
            return _extreme(node, d)
        case "abs":
            return multiply((make("sign", args[0], type="float"), d[0]))
        case "exp":
            return multiply((node, d[0]))
        case "log":
            return multiply((reciprocal(args[0]), d[0]))
        case "tanh":
            return multiply((add((_ONE, negate(multiply((node, node))))), d[0]))
        case "sigmoid":
            return multiply((node, add((_ONE, negate(node))), d[0]))
        case "sqrt":
            return multiply((const(0.5), reciprocal(node), d[0]))
    return _ZERO


def _extreme(node: Node, d: list[Node]) -> Node:
    """Of the argument that is the least or the greatest, the first of equal ones."""
    best, found = node.args[0], d[0]
    for other, its in zip(node.args[1:], d[1:], strict=True):
        sides = (best, other) if node.op == "min" else (other, best)
        found = where(make("<=", *sides, type="bool"), found, its)
        best = make(node.op, best, other, type="float")
    return found

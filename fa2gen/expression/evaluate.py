"""Trees on tensors, or on numbers: the definition that kernels are held to.

The operations are those of the library that is passed in, torch, so that autograd differentiates what is computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from fa2gen.expression.tree import Node, walk

__all__ = ["evaluate_on_numbers", "evaluate_tree"]


def evaluate_tree(root: Node, values: Mapping[str, Any], torch: Any) -> Any:
    """The value of a tree.

    values  of names, numbers and tensors; what is a torch tensor broadcasts. Whole numbers are int32 and wrap, as in
            kernels; floats are those of `s`, but fp32 at least where a position becomes one.
    torch   the library.
    Indices beyond a tensor's ends are taken at its ends.
    """
    score = values.get("s")
    wide = torch.float64 if score is not None and score.dtype == torch.float64 else torch.float32
    found: dict[Node, Any] = {}
    for node in walk(root):
        args = [found[arg] for arg in node.args]
        if node.type == "float" and node.op != "where" and any(arg.requires_grad for arg in args):
            operate = functools.partial(_operated, node, values, torch, wide)
            found[node] = _asked_alone(torch).apply(operate, *torch.broadcast_tensors(*args))
        else:
            found[node] = _on_tensors(node, args, values, torch, wide)
    return found[root]


def _operated(node: Node, values: Mapping[str, Any], torch: Any, wide: Any, *args: Any) -> Any:
    return _on_tensors(node, [*args], values, torch, wide)


@functools.cache
def _asked_alone(torch: Any) -> Any:
    """The autograd Function of an operation, whose gradient is 0 where that of its result is.

    Where a mask hides a key, or `where` takes the other side, nobody asks for one, and 0 times a derivative that is
    infinite, as sqrt's at 0, would be NaN.
    """

    class AskedAlone(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
        @staticmethod
        def forward(ctx: Any, operate: Any, *args: Any) -> Any:
            ctx.operate = operate
            ctx.save_for_backward(*args)
            return operate(*args)

        @staticmethod
        def backward(ctx: Any, asked: Any) -> Any:
            wanted = ctx.needs_input_grad[1:]
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_(w) for x, w in zip(ctx.saved_tensors, wanted, strict=True)]
                result = ctx.operate(*leaves)
            asked_of = [x for x, w in zip(leaves, wanted, strict=True) if w]
            slopes = iter(torch.autograd.grad(result, asked_of, torch.ones_like(result), materialize_grads=True))
            given = (torch.where(asked == 0, 0.0, asked * next(slopes)) if w else None for w in wanted)
            return None, *given

    return AskedAlone


def _on_tensors(node: Node, args: list[Any], values: Mapping[str, Any], torch: Any, wide: Any) -> Any:
    match node.op:
        case "const":
            return _tensor(node.value, node.type, values, torch, wide)
        case "name" | "number":
            return _tensor(values[node.value], node.type, values, torch, wide)
        case "tensor":
            table = values[node.value]
            inside = [index.clamp(0, size - 1).long() for index, size in zip(args, table.shape, strict=True)]
            found = table[tuple(inside)]
            return found if node.type == "float" else found.to(torch.bool if node.type == "bool" else torch.int32)
        case "float":
            return args[0].to(wide)
        case "not":
            return ~args[0]
        case "where":
            return torch.where(*args)
        case "recip":
            return 1.0 / args[0]
        case "neg" | "abs" | "sign" | "exp" | "log" | "tanh" | "sigmoid" | "sqrt" | "exp2" | "log2":
            return getattr(torch, node.op)(args[0])
    found = args[0]
    for arg in args[1:]:
        found = _pair(node.op, found, arg, torch)
    return found


def _tensor(value: Any, type: str, values: Mapping[str, Any], torch: Any, wide: Any) -> Any:
    """A number or a tensor as a tensor, whole numbers as int32."""
    dtype = {"int": torch.int32, "bool": torch.bool}.get(type)
    if isinstance(value, torch.Tensor):
        return value if dtype is None else value.to(dtype)
    device = next((other.device for other in values.values() if isinstance(other, torch.Tensor)), None)
    return torch.tensor(value, dtype=dtype or wide, device=device)


def _pair(op: str, a: Any, b: Any, torch: Any) -> Any:
    match op:
        case "+":
            return a + b
        case "*":
            return a * b
        case "/":
            return a / b
        case "//":
            return torch.div(a, b, rounding_mode="floor")
        case "%":
            return torch.remainder(a, b)
        case "<":
            return a < b
        case "<=":
            return a <= b
        case "==":
            return a == b
        case "!=":
            return a != b
        case "and":
            return a & b
        case "or":
            return a | b
    # As kernels: of equal ones the first, which has the whole gradient; NaN if one is.
    first = a <= b if op == "min" else b <= a
    return torch.where(first | a.isnan(), a, b)


def evaluate_on_numbers(root: Node, values: Mapping[str, Any]) -> Any:
    """The value of a tree without tensors on Python's numbers, where whole ones do not wrap."""
    found: dict[Node, Any] = {}
    for node in _in_order(root):
        found[node] = _on_numbers(node, [found[arg] for arg in node.args], values)
    return found[root]


@functools.lru_cache(maxsize=1024)  # a walk takes longer than the rest
def _in_order(root: Node) -> tuple[Node, ...]:
    return tuple(walk(root))


_ON_NUMBERS: dict[str, Any] = {
    "+": lambda *args: sum(args),
    "*": lambda *args: math.prod(args),
    "/": lambda a, b: a / b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "and": lambda *args: all(args),
    "or": lambda *args: any(args),
    "not": lambda a: not a,
    "neg": lambda a: -a,
    "where": lambda condition, a, b: a if condition else b,
    "min": min,
    "max": max,
    "abs": abs,
    "float": float,
}


def _on_numbers(node: Node, args: list[Any], values: Mapping[str, Any]) -> Any:
    if node.op == "const":
        return node.value
    if node.op in ("name", "number"):
        return values[node.value]
    return _ON_NUMBERS[node.op](*args)

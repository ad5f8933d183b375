"""Trees to text: what `parse` reads again as the same tree."""

from __future__ import annotations

import struct
from collections.abc import Callable

from fa2gen.expression.tree import Node

__all__ = ["as_fp32", "write"]

_OR, _AND, _NOT, _COMPARE, _SUM, _PRODUCT, _SIGN, _POWER, _ATOM = range(9)
_PRECEDENCE = {
    "or": _OR,
    "and": _AND,
    "not": _NOT,
    **dict.fromkeys(("<", "<=", "==", "!="), _COMPARE),
    "+": _SUM,
    **dict.fromkeys(("*", "/", "//", "%", "recip"), _PRODUCT),
    "neg": _SIGN,
}


def write(root: Node, named: Callable[[str], str] = str) -> str:
    """The text of a tree; `named` gives the names of the call's numbers and tensors."""
    written: dict[Node, str] = {}  # of shared parts once: a derivative's tree may be far smaller than its text

    def of(node: Node, at_least: int) -> str:
        while node.op == "float":  # which reading adds by itself
            node = node.args[0]
        if node not in written:
            written[node] = _text(node, of, named)
        text = written[node]
        negative = node.number is not None and node.number < 0
        own = _SIGN if negative else _PRECEDENCE.get(node.op, _ATOM)
        return text if own >= at_least else f"({text})"

    return of(root, _OR)


def _text(node: Node, of: Callable[[Node, int], str], named: Callable[[str], str]) -> str:
    match node.op:
        case "const":
            return _number(node)
        case "name":
            return str(node.value)
        case "number":
            return named(node.value)
        case "tensor":
            return f"{named(node.value)}[{', '.join(of(arg, _OR) for arg in node.args)}]"
        case "+":
            return _sum(node, of)
        case "*":
            return _product(node, of)
        case "recip":
            return f"1 / {of(node.args[0], _SIGN)}"
        case "neg":
            return f"-{of(node.args[0], _SIGN)}"
        case "not":
            return f"not {of(node.args[0], _NOT)}"
        case "/" | "//" | "%":
            return f"{of(node.args[0], _PRODUCT)} {node.op} {of(node.args[1], _SIGN)}"
        case "<" | "<=" | "==" | "!=":
            return f" {node.op} ".join(of(arg, _SUM) for arg in node.args)
        case "and" | "or":
            own = _PRECEDENCE[node.op]
            return f" {node.op} ".join(of(arg, own + (place > 0)) for place, arg in enumerate(node.args))
    return f"{node.op}({', '.join(of(arg, _OR) for arg in node.args)})"


def _sum(node: Node, of: Callable[[Node, int], str]) -> str:
    text = of(node.args[0], _SUM)
    for arg in node.args[1:]:
        if arg.op == "neg":
            text += f" - {of(arg.args[0], _PRODUCT)}"
        else:
            part = of(arg, _PRODUCT)
            text += f" - {part[1:]}" if part.startswith("-") else f" + {part}"
    return text


def _product(node: Node, of: Callable[[Node, int], str]) -> str:
    """With -1 as a sign, what it is divided by behind, and powers as powers."""
    sign, over, under = "", [], []
    for factor in dict.fromkeys(node.args):
        times = node.args.count(factor)
        if factor.number == -1:
            sign = "-"
        elif factor.op == "recip":
            under.append(_power(factor.args[0], times, of))
        else:
            over.append(_power(factor, times, of))
    text = " * ".join(over) if over else "1"
    return sign + text + "".join(f" / {part}" for part in under)


def _power(base: Node, times: int, of: Callable[[Node, int], str]) -> str:
    return of(base, _SIGN) if times == 1 else f"{of(base, _ATOM)} ** {times}"


def _number(node: Node) -> str:
    if node.type == "float":
        return repr(as_fp32(node.value))
    return str(node.value)


def as_fp32(value: float) -> float:
    """The fp32 number nearest to it, by its shortest decimal."""
    exact = struct.unpack("f", struct.pack("f", value))[0]
    for digits in range(1, 10):
        short = float(f"{exact:.{digits}g}")
        if struct.pack("f", short) == struct.pack("f", exact):
            return short
    return float(exact)

"""Trees as C++: statements by what they depend on, and the expressions of the results.

All words of the text are made here: names of the language, of this module, and numbered tokens for what the user named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fa2gen.expression.hoist import LEVELS, Level, level_of
from fa2gen.expression.tree import Node, walk
from fa2gen.expression.write import as_fp32

__all__ = ["Statements", "bound_name", "statements"]

_CONDITIONAL, _OR, _AND, _EQUAL, _LESS, _SHIFT, _SUM, _PRODUCT, _UNARY, _ATOM = range(10)
_CTYPES = {"float": "float", "int": "int", "bool": "bool"}
_PREFIXES: dict[Level, str] = {"head": "head", "row": "row", "column": "column", "element": "value"}
_FUNCTIONS = {
    "tanh": "tanh_approx",
    "exp2": "exp2_approx",
    "log2": "log2_approx",
    "sqrt": "sqrt_approx",
    ("abs", "float"): "fabsf",
    ("abs", "int"): "abs",
    ("min", "float"): "min_or_nan",
    ("max", "float"): "max_or_nan",
    ("min", "int"): "min",
    ("max", "int"): "max",
}
_COLUMNS = 84  # of an expression, above which its parts become statements
_COSTS = {"tanh": 1, "exp2": 1, "log2": 1, "sqrt": 1, "recip": 1, "where": 1, "tensor": 2, "/": 9, "//": 4, "%": 5}
"""Instructions of an operation, where it is not one for each argument beyond the first."""
_FREE = ("const", "name", "number", "neg", "abs", "not")


@dataclass(frozen=True)
class Statements:
    """`float const head_0 = ...;` and the like, by level, and the expressions that use them.

    helpers       which of floor_divide and floor_modulo they call.
    most_alive    values of the element's level that are alive at once, results among them.
    instructions  of an element, about.
    """

    levels: Mapping[Level, tuple[str, ...]]
    results: Mapping[str, str]
    helpers: tuple[str, ...]
    most_alive: int
    instructions: int


def statements(results: Mapping[str, Node], tokens: Mapping[str, str]) -> Statements:
    """The C++ of lowered trees; `tokens` are the names of the call's numbers and tensors."""
    printer = _Printer(results, tokens)
    texts = {key: printer.result(root) for key, root in results.items()}
    return Statements(
        levels={level: tuple(printer.lines[level]) for level in LEVELS},
        results=texts,
        helpers=tuple(sorted(printer.helpers)),
        most_alive=_most_alive(results, printer.named),
        instructions=sum(map(_cost, (node for node in walk(*results.values()) if level_of(node) == "element"))),
    )


def bound_name(token: str, side: str, filters: Iterable[tuple[str, int]]) -> str:
    """What functions of a tensor's least and greatest number of a tile end in."""
    words = (f"{word}_{'minus_' * (number < 0)}{abs(number)}" for word, number in filters)
    return "_".join([token, side, *words])


class _Printer:
    """Turns nodes into text once, and those into statements that are used twice, or by a higher level."""

    def __init__(self, results: Mapping[str, Node], tokens: Mapping[str, str]) -> None:
        self.tokens = tokens
        self.lines: dict[Level, list[str]] = {level: [] for level in LEVELS}
        self.helpers: set[str] = set()
        self.named: dict[Node, str] = {}
        self._texts: dict[Node, tuple[str, int]] = {}
        roots = list(results.values())
        users: dict[Node, list[Node | None]] = {root: [None] * roots.count(root) for root in roots}
        nodes = list(walk(*roots))
        for node in nodes:
            for arg in node.args:
                users.setdefault(arg, []).extend([node] * (2 if node.op == "sign" else 1))
        for node in nodes:
            text, precedence = self._make(node)
            while len(text) > _COLUMNS and (longest := self._longest_part(node)):
                self._texts[longest] = self._statement(longest, self._texts[longest][0]), _ATOM
                text, precedence = self._make(node)
            shared = len(users[node]) > 1 or any(
                user is not None and level_of(user) != level_of(node) for user in users[node]
            )
            if shared and not _is_leaf(node):
                text, precedence = self._statement(node, text), _ATOM
            self._texts[node] = text, precedence

    def text(self, node: Node, at_least: int) -> str:
        text, precedence = self._texts[node]
        return text if precedence >= at_least else f"({text})"

    def result(self, root: Node) -> str:
        """Of a root; & and | of bools are whole numbers to C++, which must not narrow in braces."""
        text = self.text(root, _OR)
        return f"static_cast<bool>({text})" if root.op in ("and", "or") and root not in self.named else text

    def _longest_part(self, node: Node) -> Node | None:
        """The argument with the longest text that is no statement yet."""
        parts = [arg for arg in node.args if arg not in self.named and not _is_leaf(arg)]
        return max(parts, key=lambda arg: len(self._texts[arg][0]), default=None)

    def _statement(self, node: Node, text: str) -> str:
        level = level_of(node)
        found = f"{_PREFIXES[level]}_{len(self.lines[level])}"
        self.lines[level].append(f"{_CTYPES[node.type]} const {found} = {text};")
        self.named[node] = found
        return found

    def _make(self, node: Node) -> tuple[str, int]:
        args, of = node.args, self.text
        match node.op:
            case "const":
                return _constant(node)
            case "name":
                return ("p.softmax_scale" if node.value == "softmax_scale" else node.value), _ATOM
            case "number":
                return self._truth(node, f"p.{self.tokens[node.value]}")
            case "tensor":
                indices = ", ".join(["p", *(of(arg, _CONDITIONAL) for arg in args)])
                return self._truth(node, f"load_{self.tokens[node.value]}({indices})")
            case "lowest" | "highest":
                named, side, _, filters = node.value
                indices = ", ".join(["p", f"{side}0", *(of(arg, _CONDITIONAL) for arg in args)])
                return f"{node.op}_{bound_name(self.tokens[named], side, filters)}({indices})", _ATOM
            case "+":
                return self._sum(node), _SUM
            case "*":
                return self._product(node)
            case "/":
                return f"{of(args[0], _PRODUCT)} / {of(args[1], _UNARY)}", _PRODUCT
            case "//" | "%":
                return self._whole_division(node)
            case "neg":
                return f"-{of(args[0], _ATOM)}", _UNARY
            case "recip":
                return f"reciprocal_approx({of(args[0], _CONDITIONAL)})", _ATOM
            case "<" | "<=" | "==" | "!=":
                own = _LESS if node.op in ("<", "<=") else _EQUAL
                return f"{of(args[0], _SHIFT)} {node.op} {of(args[1], _SHIFT)}", own
            case "and" | "or":
                sign = " & " if node.op == "and" else " | "  # not && and ||: no branches
                return sign.join(of(arg, _SHIFT) for arg in args), _AND if node.op == "and" else _OR
            case "not":
                return f"!{of(args[0], _ATOM)}", _UNARY
            case "where":
                return f"{of(args[0], _OR)} ? {of(args[1], _OR)} : {of(args[2], _OR)}", _CONDITIONAL
            case "sign":
                x = of(args[0], _SHIFT)
                return f"{x} > 0.0f ? 1.0f : ({x} < 0.0f ? -1.0f : 0.0f)", _CONDITIONAL
            case "float":
                return f"static_cast<float>({of(args[0], _CONDITIONAL)})", _ATOM
            case "min" | "max":
                found = of(args[0], _CONDITIONAL)
                for arg in args[1:]:
                    found = f"{_FUNCTIONS[node.op, node.type]}({found}, {of(arg, _CONDITIONAL)})"
                return found, _ATOM
        function = _FUNCTIONS.get(node.op) or _FUNCTIONS[node.op, node.type]
        return f"{function}({of(args[0], _CONDITIONAL)})", _ATOM

    def _truth(self, node: Node, text: str) -> tuple[str, int]:
        return (f"{text} != 0", _EQUAL) if node.type == "bool" else (text, _ATOM)

    def _sum(self, node: Node) -> str:
        found = self.text(node.args[0], _SUM)
        for arg in node.args[1:]:
            part = self.text(arg, _PRODUCT)
            if part.startswith("-"):
                found += f" - {part[1:]}"
            else:
                found += f" + {part}"
        return found

    def _product(self, node: Node) -> tuple[str, int]:
        sign = "-" if node.args[0].number == -1 else ""
        # No quotients: IEEE's would be called, a function of its own.
        factors = [self.text(factor, _UNARY) for factor in (node.args[1:] if sign else node.args)]
        if sign and factors and factors[0].startswith("-"):  # no decrement
            factors[0] = f"({factors[0]})"
        return sign + (" * ".join(factors) or ("1.0f" if node.type == "float" else "1")), _PRODUCT

    def _whole_division(self, node: Node) -> tuple[str, int]:
        left, right = node.args
        by = right.number
        if isinstance(by, int) and by & (by - 1) == 0:
            if node.op == "//":
                return f"{self.text(left, _SUM)} >> {by.bit_length() - 1}", _SHIFT
            return f"{self.text(left, _SHIFT)} & {by - 1}", _AND
        if _is_natural(left):
            sign = "/" if node.op == "//" else "%"
            return f"{self.text(left, _PRODUCT)} {sign} {self.text(right, _UNARY)}", _PRODUCT
        helper = "floor_divide" if node.op == "//" else "floor_modulo"
        self.helpers.add(helper)
        return f"{helper}({self.text(left, _CONDITIONAL)}, {self.text(right, _CONDITIONAL)})", _ATOM


def _constant(node: Node) -> tuple[str, int]:
    if node.type == "bool":
        return str(node.value).lower(), _ATOM
    text = str(node.value) if node.type == "int" else f"{as_fp32(node.value)!r}f"
    if node.value == -(2**31) and node.type == "int":
        return "-2147483647 - 1", _SUM
    return text, _UNARY if text.startswith("-") else _ATOM


def _is_leaf(node: Node) -> bool:
    """Whether it costs nothing to write it again, also with a sign."""
    if node.op == "*" and len(node.args) == 2 and node.args[0].number == -1:
        return _is_leaf(node.args[1])
    return node.op in ("const", "name") or (node.op == "number" and node.type != "bool")


def _is_natural(node: Node) -> bool:
    """Whether a whole number is never negative, whatever the call."""
    if node.op == "name":
        return True
    if node.number is not None:
        return node.number >= 0
    return node.op in ("+", "*", "//", "%", "min", "max") and all(map(_is_natural, node.args))


def _cost(node: Node) -> int:
    if node.op in _FREE:
        return 0
    if node.op in ("+", "*"):
        # A product in a sum is one fused multiply-add, but for the sum's first.
        fused = sum(arg.op == "*" for arg in node.args[1:]) if node.op == "+" else 0
        return len(node.args) - 1 - (fused if node.type == "float" else 0) - (node.args[0].number == -1)
    return _COSTS.get(node.op, max(len(node.args) - 1, 1))


def _most_alive(results: Mapping[str, Node], named: Mapping[Node, str]) -> int:
    """Of the element's statements and results, in their order."""
    order = [node for node in named if level_of(node) == "element"]
    last_use: dict[Node, int] = {}
    for place, root in enumerate([*order, *results.values()]):
        inner = list(root.args)
        while inner:
            node = inner.pop()
            last_use[node] = place
            inner += [] if node in named else node.args
    return len(results) + max(
        (sum(last_use.get(node, -1) > place for node in order[: place + 1]) for place in range(len(order))), default=0
    )

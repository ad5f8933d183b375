"""Text to trees: Python's syntax, read by `ast` and let through by a list of what is allowed. Nothing is evaluated.

Every error is an `InvalidInput` that shows the text, points at the column and says what works instead.
"""

from __future__ import annotations

import ast
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from fa2gen.errors import InvalidInput
from fa2gen.expression.grammar import CHARACTERS, FUNCTIONS, LIMITS, MAX_FACTORS, MAX_POWER, NAMES
from fa2gen.expression.tree import Node, Type, const, make, name, walk
from fa2gen.expression.write import as_fp32

__all__ = ["Text", "parsed", "read"]

_INT_MAX = 2**31 - 1
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_NUMBER_AND_LETTER = re.compile(r"(?<![\w.])((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?+)([A-Za-z_])")
_HINTS = {
    "&": "write 'and'",
    "|": "write 'or'",
    "~": "write 'not'",
    "^": "write '!='",
    "'": "there are no strings",
    '"': "there are no strings",
    ":": "there are no slices",
    "#": "there are no comments",
}
_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_SAYS: dict[type[ast.AST], str] = {
    ast.Attribute: "a dot after a name: there are no attributes or methods",
    ast.Lambda: "'lambda'",
    ast.NamedExpr: "':='",
    ast.Starred: "'*' before an argument",
    ast.List: "a list",
    ast.Tuple: "a tuple outside of [...]",
    ast.ListComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.Await: "'await'",
}


@dataclass(frozen=True)
class Text:
    """What somebody wrote, and which of the expressions it is: "score" or "allow"."""

    what: str
    text: str

    def refuse(self, where: ast.AST | int, why: str) -> NoReturn:
        """Raise InvalidInput with the column of a node, or so many characters from the begin."""
        column = where if isinstance(where, int) else getattr(where, "col_offset", 0)
        shown = re.sub(r"\s", " ", self.text)
        shown = re.sub(r"[^ -~]", "?", shown)
        begin = max(0, column - 80)
        line, mark = shown[begin : begin + 110], " " * (column - begin) + "^"
        raise InvalidInput(f"{self.what}, column {column + 1}: {why}\n    {line}\n    {mark}")


def parsed(text: Text) -> ast.expr:
    """The syntax of a text whose characters and length are allowed."""
    if not isinstance(text.text, str):
        raise InvalidInput(f"{text.what} must be a string, not {type(text.text).__name__}")
    if len(text.text) > LIMITS.characters:
        text.refuse(LIMITS.characters, f"{len(text.text)} characters are more than {LIMITS.characters}")
    for column, character in enumerate(text.text):
        if character not in CHARACTERS:
            text.refuse(column, f"the character {character!a} is not allowed{_hint(character)}")
    plain = re.sub(r"\s", " ", text.text)
    if found := _NUMBER_AND_LETTER.search(plain):
        text.refuse(found.start(), f"a letter follows a number; write '{found[1]} * {found[2]}' for a product")
    lead = len(plain) - len(plain.lstrip())
    if not plain.strip():
        text.refuse(0, "nothing is written")
    try:
        # In parentheses, so that it may begin with a space.
        syntax = ast.parse(f"({plain[lead:]})", mode="eval").body
    except SyntaxError as error:
        text.refuse(min(max((error.offset or 2) - 2 + lead, 0), len(plain) - 1), f"this is no expression: {error.msg}")
    except (ValueError, RecursionError, MemoryError):
        text.refuse(0, "this is no expression, or nested too deeply")
    level: list[ast.AST] = [syntax]
    depth = 0
    while level:
        for node in level:
            if hasattr(node, "col_offset"):
                node.col_offset += lead - 1
        depth += 1
        if depth > LIMITS.depth:
            deepest = next((node for node in level if hasattr(node, "col_offset")), syntax)
            text.refuse(deepest, f"this is nested more than {LIMITS.depth} deep")
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return syntax


def _hint(character: str) -> str:
    return f": {_HINTS[character]}" if character in _HINTS else ""


@dataclass
class _Reader:
    """Reads one text; `types` are those of all inputs, `ranks` how many indices each has been seen with."""

    text: Text
    types: Mapping[str, Type]
    ranks: dict[str, int]
    nodes: int = 0
    _rules: dict[type[ast.AST], Callable[..., Node]] = field(init=False)

    def __post_init__(self) -> None:
        self._rules = {
            ast.Constant: self._constant,
            ast.Name: self._name,
            ast.Subscript: self._subscript,
            ast.BinOp: self._binary,
            ast.UnaryOp: self._unary,
            ast.Compare: self._compare,
            ast.BoolOp: self._bool,
            ast.IfExp: self._if,
            ast.Call: self._call,
        }

    def read(self, syntax: ast.expr) -> Node:
        self.nodes += 1
        if self.nodes > LIMITS.nodes:
            self.text.refuse(syntax, f"this is more than {LIMITS.nodes} operations; let a tensor hold a part of it")
        rule = self._rules.get(type(syntax))
        if rule is None:
            says = _SAYS.get(type(syntax), f"this ({type(syntax).__name__})")
            self.text.refuse(syntax, f"{says} is not part of the language")
        return rule(syntax)

    # Leaves ----------------------------------------------------------------------------------------------------------

    def _constant(self, syntax: ast.Constant) -> Node:
        value = syntax.value
        if not isinstance(value, bool | int | float):
            self.text.refuse(syntax, f"{value!r} is no number")
        if isinstance(value, int) and value > _INT_MAX:
            self.text.refuse(syntax, f"whole numbers end at {_INT_MAX}; write it with a point for a float")
        if isinstance(value, float):
            if not _fits_fp32(value):
                self.text.refuse(syntax, "this is beyond fp32; hide keys by 'allow', not by infinite scores")
            value = as_fp32(value)
        return const(value)

    def _name(self, syntax: ast.Name) -> Node:
        word = syntax.id
        if word in NAMES:
            if word == "s" and self.text.what == "allow":
                self.text.refuse(syntax, "which keys are seen can not depend on s, the score")
            return name(word, NAMES[word])
        self._check_input(syntax, word, 0)
        return make("number", type=self.types[word], value=word)

    def _subscript(self, syntax: ast.Subscript) -> Node:
        if not isinstance(syntax.value, ast.Name):
            self.text.refuse(syntax, "only a named tensor has indices")
        word = syntax.value.id
        if word in NAMES:
            self.text.refuse(syntax, f"{word} is a number, and has no indices")
        inner = syntax.slice.elts if isinstance(syntax.slice, ast.Tuple) else [syntax.slice]
        if not 1 <= len(inner) <= LIMITS.rank:
            self.text.refuse(syntax, f"a tensor has 1 to {LIMITS.rank} indices, not {len(inner)}")
        self._check_input(syntax, word, len(inner))
        indices = []
        for part in inner:
            index = self.read(part)
            if index.type != "int":
                self.text.refuse(part, f"an index must be a whole number, not {_a(index)}")
            if any(node.value == "s" for node in walk(index)):
                self.text.refuse(part, "an index can not depend on s, the score")
            indices.append(index)
        return make("tensor", *indices, type=self.types[word], value=word)

    def _check_input(self, syntax: ast.AST, word: str, rank: int) -> None:
        if word in FUNCTIONS:
            self.text.refuse(syntax, f"{word} is a function: write {word}(...)")
        if not _NAME.fullmatch(word) or len(word) > LIMITS.name:
            self.text.refuse(syntax, f"a name begins with a letter and has at most {LIMITS.name} characters")
        before = self.ranks.setdefault(word, rank)
        if len(self.ranks) > LIMITS.inputs:
            self.text.refuse(syntax, f"more than {LIMITS.inputs} numbers and tensors; stack some in one tensor")
        if before != rank:
            self.text.refuse(syntax, f"{word} has {_indices(rank)} here and {_indices(before)} before")

    # Operations ------------------------------------------------------------------------------------------------------

    def _binary(self, syntax: ast.BinOp) -> Node:
        op = _OPERATORS.get(type(syntax.op))
        if op is None:
            self.text.refuse(syntax, "the operators are + - * / // % and ** with a small whole number")
        left = self._number(syntax.left, f"the left side of {op}")
        if op == "**":
            return self._power(syntax, left)
        right = self._number(syntax.right, f"the right side of {op}")
        if op == "/":
            return make("/", _float(left), _float(right), type="float")
        if op in ("//", "%"):
            return self._whole_division(syntax, op, left, right)
        left, right = _alike(left, right)
        if op == "-":
            right, op = make("neg", right, type=right.type), "+"
        return make(op, left, right, type=left.type)

    def _power(self, syntax: ast.BinOp, base: Node) -> Node:
        exponent = self.read(syntax.right).number
        if not isinstance(exponent, int) or not 1 <= exponent <= MAX_POWER:
            self.text.refuse(syntax.right, f"an exponent is a whole number from 1 to {MAX_POWER}; or use exp and log")
        if (count := exponent * _num_factors(base)) > MAX_FACTORS:
            self.text.refuse(syntax, f"powers of powers are {count} factors, more than {MAX_FACTORS}")
        return make("*", *[base] * exponent, type=base.type) if exponent > 1 else base

    def _whole_division(self, syntax: ast.BinOp, op: str, left: Node, right: Node) -> Node:
        for side, part in ((left, syntax.left), (right, syntax.right)):
            if side.type != "int":
                self.text.refuse(part, f"{op} is for whole numbers, and this is {_a(side)}; use / for floats")
        if any(node.op == "tensor" or node.value in ("i", "j") for node in walk(right)):
            self.text.refuse(syntax.right, f"what stands right of {op} can not depend on i, j or a tensor")
        if right.number is not None and right.number <= 0:
            self.text.refuse(syntax.right, f"what stands right of {op} must be positive")
        return make(op, left, _at_least_1(right), type="int")

    def _unary(self, syntax: ast.UnaryOp) -> Node:
        if isinstance(syntax.op, ast.Not):
            return make("not", self._condition(syntax.operand, "what is negated"), type="bool")
        inner = self._number(syntax.operand, "what a sign stands before")
        if isinstance(syntax.op, ast.UAdd):
            return inner
        return make("neg", inner, type=inner.type)

    def _compare(self, syntax: ast.Compare) -> Node:
        parts = [syntax.left, *syntax.comparators]
        sides = [self.read(part) for part in parts]
        found = []
        for place, operator in enumerate(syntax.ops):
            op = _OPERATORS.get(type(operator))
            if op is None:
                self.text.refuse(parts[place + 1], "comparisons are < <= > >= == !=")
            left, right = sides[place : place + 2]
            bools = [side.type == "bool" for side in (left, right)]
            if any(bools) and (not all(bools) or op not in ("==", "!=")):
                self.text.refuse(parts[place + bools.index(True)], "this is true or false; compare numbers")
            left, right = _alike(left, right)
            if op in (">", ">="):
                left, right, op = right, left, op.replace(">", "<")
            found.append(make(op, left, right, type="bool"))
        return found[0] if len(found) == 1 else make("and", *found, type="bool")

    def _bool(self, syntax: ast.BoolOp) -> Node:
        op = "and" if isinstance(syntax.op, ast.And) else "or"
        return make(op, *(self._condition(part, f"a side of '{op}'") for part in syntax.values), type="bool")

    def _if(self, syntax: ast.IfExp) -> Node:
        return self._where(syntax.test, syntax.body, syntax.orelse)

    def _call(self, syntax: ast.Call) -> Node:
        if not isinstance(syntax.func, ast.Name) or syntax.func.id not in FUNCTIONS:
            called = f"'{syntax.func.id}'" if isinstance(syntax.func, ast.Name) else "this"
            self.text.refuse(syntax, f"{called} is no function of the language; they are {', '.join(FUNCTIONS)}")
        word = syntax.func.id
        least, most = FUNCTIONS[word]
        if syntax.keywords:
            self.text.refuse(syntax, f"arguments of {word} have no names")
        if not least <= len(syntax.args) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            self.text.refuse(syntax, f"{word} takes {wanted} argument{'s' * (most > 1)}, not {len(syntax.args)}")
        if word == "where":
            return self._where(*syntax.args)
        args = [self._number(part, f"an argument of {word}") for part in syntax.args]
        if word not in ("min", "max", "abs"):
            return make(word, *map(_float, args), type="float")
        args = list(_alike(*args))
        return make(word, *args, type=args[0].type)

    def _where(self, test: ast.expr, body: ast.expr, orelse: ast.expr) -> Node:
        condition = self._condition(test, "the condition")
        left, right = self.read(body), self.read(orelse)
        if (left.type == "bool") != (right.type == "bool"):
            self.text.refuse(orelse, f"one alternative is {_a(left)}, the other {_a(right)}")
        left, right = _alike(left, right)
        return make("where", condition, left, right, type=left.type)

    # Types -----------------------------------------------------------------------------------------------------------

    def _number(self, syntax: ast.expr, what: str) -> Node:
        found = self.read(syntax)
        if found.type == "bool":
            self.text.refuse(syntax, f"{what} must be a number, and this is true or false; write where(..., 1, 0)")
        return found

    def _condition(self, syntax: ast.expr, what: str) -> Node:
        found = self.read(syntax)
        if found.type != "bool":
            self.text.refuse(syntax, f"{what} must be true or false, and this is {_a(found)}; write ... != 0")
        return found


def read(text: Text, syntax: ast.expr, types: Mapping[str, Type], ranks: dict[str, int]) -> Node:
    """The tree of a parsed text: a float of a score, a bool of allow.

    types  of every name that is no word of the language.
    ranks  name -> how many indices it has, 0 for a number, in the order of first use: filled here.
    """
    found = _Reader(text, types, ranks).read(syntax)
    if text.what == "allow":
        if found.type != "bool":
            text.refuse(syntax, f"it says which keys are seen, true or false, and this is {_a(found)}")
        return found
    if found.type == "bool":
        text.refuse(syntax, "a score is a number, and this is true or false; write it as allow")
    if not any(node.value == "s" for node in walk(found)):
        text.refuse(syntax, "this does not depend on s, the score of q and k")
    return _float(found)


def _at_least_1(divisor: Node) -> Node:
    """What an element divides by. A constant is positive, a call's number has to be; what heads and lengths make may be
    0 for some, of a ragged batch too, whose lengths nobody looks at."""
    known = divisor.op in ("const", "number") or (divisor.op == "max" and const(1) in divisor.args)
    return divisor if known else make("max", divisor, const(1), type="int")


def _num_factors(root: Node) -> int:
    """Of a product, with those of its factors; 1 of all else."""
    found: dict[Node, int] = {}
    for node in walk(root):
        found[node] = sum(found[arg] for arg in node.args) if node.op == "*" else 1
    return found[root]


def _float(node: Node) -> Node:
    if node.type != "int":
        return node
    return const(float(node.number)) if node.number is not None else make("float", node, type="float")


def _alike(*nodes: Node) -> tuple[Node, ...]:
    """All as floats if one is; bools as they are."""
    return tuple(map(_float, nodes)) if any(node.type == "float" for node in nodes) else nodes


def _fits_fp32(value: float) -> bool:
    try:
        return math.isfinite(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return False


def _a(node: Node) -> str:
    return {"float": "a float", "int": "a whole number", "bool": "true or false"}[node.type]


def _indices(rank: int) -> str:
    return "no index" if not rank else f"{rank} ind{'ex' if rank == 1 else 'ices'}"

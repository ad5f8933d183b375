"""Types of names that nobody declared, from how they are used.

A name is int where it is only an index, stands beside // or %, or is compared with whole numbers alone; bool where it
is a condition; float everywhere else.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

from fa2gen.expression.grammar import FUNCTIONS, NAMES
from fa2gen.expression.tree import Type

__all__ = ["infer"]

_Uses = Iterable[tuple[ast.AST, Type]]
_SAME = (ast.Add, ast.Sub, ast.Mult)
_FLOAT_FUNCTIONS = FUNCTIONS.keys() - {"where", "min", "max", "abs"}


def infer(declared: Mapping[str, Type], score: ast.expr | None, allow: ast.expr | None) -> dict[str, Type]:
    """Types of all names of both texts, in the order of first use."""
    uses: dict[str, set[Type]] = {}
    roots: list[tuple[ast.AST | None, Type]] = [(score, "float"), (allow, "bool")]
    _visit([(syntax, wanted) for syntax, wanted in roots if syntax is not None], declared, uses)
    return {word: declared.get(word) or _one_of(found) for word, found in uses.items()}


def _one_of(found: set[Type]) -> Type:
    return "float" if "float" in found else "int" if "int" in found else "bool"


def _visit(parts: _Uses, declared: Mapping[str, Type], uses: dict[str, set[Type]]) -> None:
    for syntax, wanted in parts:
        word = _word(syntax)
        if word is not None:
            uses.setdefault(word, set()).add(wanted)
        _visit(_children(syntax, wanted, declared), declared, uses)


def _children(syntax: ast.AST, wanted: Type, declared: Mapping[str, Type]) -> _Uses:
    """The parts of an expression, and the type that each is used as."""
    match syntax:
        case ast.Subscript():
            parts = syntax.slice.elts if isinstance(syntax.slice, ast.Tuple) else [syntax.slice]
            return [(part, "int") for part in parts]
        case ast.BinOp():
            same = isinstance(syntax.op, _SAME)
            whole = isinstance(syntax.op, ast.FloorDiv | ast.Mod)
            wants: Type = "int" if whole else wanted if same and wanted != "bool" else "float"
            return [(syntax.left, wants), (syntax.right, wants)]
        case ast.Compare():
            parts = [syntax.left, *syntax.comparators]
            return [(part, "float" if any(_is_float(p, declared) for p in parts) else "int") for part in parts]
        case ast.BoolOp():
            return [(part, "bool") for part in syntax.values]
        case ast.UnaryOp():
            return [(syntax.operand, "bool" if isinstance(syntax.op, ast.Not) else wanted)]
        case ast.IfExp():
            return [(syntax.test, "bool"), (syntax.body, wanted), (syntax.orelse, wanted)]
        case ast.Call(func=ast.Name(id="where")):
            return [(part, wanted if place else "bool") for place, part in enumerate(syntax.args)]
        case ast.Call(func=ast.Name(id=word)):
            return [(part, "float" if word in _FLOAT_FUNCTIONS else wanted) for part in syntax.args]
    return []


def _is_float(syntax: ast.AST, declared: Mapping[str, Type]) -> bool:
    """Whether it is a float for sure, whatever the undeclared names are."""
    word = _word(syntax)
    if word is not None:
        return declared.get(word) == "float"
    match syntax:
        case ast.Name():
            return NAMES.get(syntax.id) == "float"
        case ast.Constant():
            return isinstance(syntax.value, float)
        case ast.BinOp(op=ast.Div()):
            return True
        case ast.BinOp():
            return _is_float(syntax.left, declared) or _is_float(syntax.right, declared)
        case ast.UnaryOp():
            return _is_float(syntax.operand, declared)
        case ast.Call(func=ast.Name(id="where")):
            return any(_is_float(part, declared) for part in syntax.args[1:])
        case ast.IfExp():
            return _is_float(syntax.body, declared) or _is_float(syntax.orelse, declared)
        case ast.Call(func=ast.Name(id=called)):
            return called in _FLOAT_FUNCTIONS or any(_is_float(part, declared) for part in syntax.args)
    return False


def _word(syntax: ast.AST) -> str | None:
    """The name of a number or a tensor that this is."""
    target = syntax.value if isinstance(syntax, ast.Subscript) else syntax
    return target.id if isinstance(target, ast.Name) and target.id not in NAMES else None

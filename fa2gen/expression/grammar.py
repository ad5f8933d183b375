"""The words of the language, and its limits: everything that a text may hold."""

from __future__ import annotations

from fa2gen.expression.tree import Type

__all__ = ["CHARACTERS", "FUNCTIONS", "LIMITS", "MAX_FACTORS", "MAX_POWER", "NAMES", "TYPES", "Limits"]

from typing import NamedTuple

NAMES: dict[str, Type] = {
    "s": "float",
    "i": "int",
    "j": "int",
    "b": "int",
    "h": "int",
    "hk": "int",
    "seqlen_q": "int",
    "seqlen_k": "int",
}
"""s: the scaled score; i: the query's position, j: the key's, each from the begin of its sequence; b: the batch entry;
h: the query head, hk: the head of its keys; seqlen_q, seqlen_k: the lengths of b's sequences."""

FUNCTIONS: dict[str, tuple[int, int]] = {
    "where": (3, 3),
    "min": (2, 8),
    "max": (2, 8),
    "abs": (1, 1),
    "exp": (1, 1),
    "log": (1, 1),
    "tanh": (1, 1),
    "sigmoid": (1, 1),
    "sqrt": (1, 1),
}
"""With the least and the most arguments that each takes."""

TYPES: tuple[Type, ...] = ("float", "int", "bool")

CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-*/%()[],<>=! \t\r\n")
"""What a text may hold at all: no quote, colon, brace, backslash, semicolon or letter beyond ASCII."""

MAX_POWER = 8
MAX_FACTORS = 64  # of a power of powers


class Limits(NamedTuple):
    """Bounds on a text, far above what attention needs: a kernel's registers end long before."""

    characters: int = 4000
    depth: int = 40
    nodes: int = 400
    inputs: int = 16
    rank: int = 4
    name: int = 40


LIMITS = Limits()

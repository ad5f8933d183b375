"""Scores and masks as text: a small language, its derivatives by symbols, and its C++.

`parse` reads `score = "cap * tanh(s / cap)"` and `allow = "j <= i and document[i] == document[j]"`, `emit` writes the
statements of kernels, `evaluate` is the definition on tensors. The README beside this file describes the language.
Pure Python: a text becomes a tree by a list of what is allowed, nothing is ever evaluated, and no name of a user
reaches C++.
"""

from __future__ import annotations

from fa2gen.expression.program import Access, Code, Input, InputGradient, Program, TileBound, emit, evaluate, parse
from fa2gen.expression.window import Window, split_window

__all__ = [
    "Access",
    "Code",
    "Input",
    "InputGradient",
    "Program",
    "TileBound",
    "Window",
    "emit",
    "evaluate",
    "parse",
    "split_window",
]

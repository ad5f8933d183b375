"""What a feature is: the parts that a kernel's text, its arguments and its launch are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fa2gen.features.attention import Operand
from fa2gen.options import Options

__all__ = ["Feature", "Param", "Scratch"]

_CODES = {
    "void const*": "Q",
    "void*": "Q",
    "float*": "Q",
    "float const*": "Q",
    "int*": "Q",
    "int const*": "Q",
    "int64_t": "q",
    "int": "i",
    "float": "f",
}


@dataclass(frozen=True)
class Param:
    """One field of a kernel's `Params` struct."""

    name: str
    ctype: str

    @property
    def code(self) -> str:
        """The field's code for Python's struct module."""
        return _CODES[self.ctype]

    @property
    def is_address(self) -> bool:
        return self.ctype.endswith("*")


@dataclass(frozen=True)
class Scratch:
    """Device memory of a launch that is no tensor of the caller's.

    cleared  whether it must be all zeros when the launch begins, and is left so.
    """

    name: str
    ctype: str
    cleared: bool = False

    @property
    def param(self) -> Param:
        return Param(self.name, self.ctype)


def _nothing(_: Options) -> Mapping[str, int | float]:
    return {}


@dataclass(frozen=True)
class Feature:
    """What one value of a problem's field brings.

    name       the value, as the field or its word says it.
    rooms      room -> the block of templates/rooms/<room>/ that it puts there.
    operands   tensors of a call that it takes beside q, k and v.
    params     numbers of Params that it adds, 4 bytes each, behind the sizes.
    formulas   their values in C++, over a call's sizes and the numbers of its options; none for what is a size itself:
               see fa2gen/plan/recipe.py.
    given      what formulas may name beside those: more numbers that a call's options hold.
    scratch    memory that it needs.
    prepare    whether an entry point of its own, <kernel>_prepare, runs before the others.
    uneven     whether tiles do different amounts of work, so that the order in which they start matters.
    right_edge whether keys behind those that a query sees may be hidden from it.
    left_edge  whether keys before those that a query sees may be hidden from it.
    general    of a mask: whether it shows, by its numbers, what every other mask does.
    examples   options of calls that need it: what `fa2gen verify`, `tune` and tests try.
    """

    name: str
    rooms: Mapping[str, str] = field(default_factory=dict, hash=False)
    operands: tuple[Operand, ...] = ()
    params: tuple[Param, ...] = ()
    formulas: Mapping[str, str] = field(default_factory=dict, hash=False)
    given: Callable[[Options], Mapping[str, int | float]] = _nothing
    scratch: tuple[Scratch, ...] = ()
    prepare: bool = False
    uneven: bool = False
    right_edge: bool = False
    left_edge: bool = False
    general: bool = False
    examples: tuple[Mapping[str, Any], ...] = field(default=({},), hash=False)

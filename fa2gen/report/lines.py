"""A kernel's source line by line, with what the compiler made of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fa2gen.plan import KernelPlan
from fa2gen.render import render
from fa2gen.report.sass import Instruction, instructions
from fa2gen.store import Entry, Store

__all__ = ["Line", "Listing", "listing_of"]


@dataclass(frozen=True)
class Line:
    """A line of kernel.cu: its number from 1, its text, the template line that it came from ("" if unknown), and its
    instructions in the order of their addresses."""

    number: int
    text: str
    origin: str
    instructions: tuple[Instruction, ...]

    @property
    def live(self) -> int:
        """The most registers that are alive at one of them."""
        return max((instruction.live for instruction in self.instructions), default=0)


@dataclass(frozen=True)
class Listing:
    """A compiled kernel, read.

    lines  all of its source.
    live   kernel (C symbol) -> live registers at each instruction, in the order of their addresses; empty where there
           is no nvdisasm.
    """

    entry: Entry
    lines: tuple[Line, ...]
    live: Mapping[str, tuple[int, ...]]

    def hottest(self, count: int) -> list[Line]:
        """The lines at which the most registers are alive."""
        return sorted((line for line in self.lines if line.instructions), key=lambda line: -line.live)[:count]


def listing_of(plan: KernelPlan, target: str | None = None) -> Listing:
    """The listing of a plan's kernel; `target` as in `Store.get_or_compile`, which it raises like."""
    entry = Store().get_or_compile(plan, target)
    rendered = render(plan)
    # Built ahead of time by another version, its source may be another: then no line has an origin.
    same = rendered.source == entry.source
    texts = entry.source.splitlines()
    origins = rendered.origins if same else ("",) * len(texts)
    found = instructions(entry.cubin)
    of_line: dict[int, list[Instruction]] = {}
    live: dict[str, list[int]] = {}
    for instruction in found:
        of_line.setdefault(instruction.line, []).append(instruction)
        live.setdefault(instruction.symbol, []).append(instruction.live)
    lines = (
        Line(number, text, origin, tuple(of_line.get(number, ())))
        for number, (text, origin) in enumerate(zip(texts, origins, strict=True), start=1)
    )
    return Listing(entry, tuple(lines), {symbol: tuple(counts) for symbol, counts in live.items()})

"""A block's shared memory, declared once as regions in order: offsets, C++ constants, refusals and maps follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

__all__ = ["Region", "SharedMemory", "Span", "Stages"]


@dataclass(frozen=True)
class Region:
    """A run of shared memory for one thing.

    name         "tile_slots"; its offset is kSmemTileSlots in C++.
    bytes        of one of its stages.
    stages       how many of it lie one after the other.
    label        how people write it; its name, if it has none.
    in_place_of  another region, whose bytes it has once that is no longer needed: it takes none of its own.
    """

    name: str
    bytes: int
    stages: int = 1
    label: str = ""
    in_place_of: str | None = None

    @property
    def title(self) -> str:
        return self.label or self.name.replace("_", " ")


@dataclass(frozen=True)
class Stages:
    """Regions that lie side by side in each of `count` stages, which lie one after the other."""

    count: int
    regions: tuple[Region, ...]

    @property
    def stage_bytes(self) -> int:
        """From one stage to the next."""
        return sum(region.bytes for region in self.regions)


class Span(NamedTuple):
    """What lies in `bytes` bytes from `offset` on."""

    what: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class SharedMemory:
    """Regions, and stages of regions, in the order in which they lie."""

    parts: tuple[Region | Stages, ...]

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """All of it in order, without gaps: a region with its stages, or those of several regions together."""
        found: list[Span] = []
        at = 0
        for part in self.parts:
            if isinstance(part, Stages):
                titles = ", ".join(region.title for region in part.regions)
                what = f"{part.count} stages of {titles}" if part.count > 1 else titles
                size = part.count * part.stage_bytes
            elif part.in_place_of:
                continue
            else:
                others = [other.title for other in self._regions() if other.in_place_of == part.name]
                stages = f"{part.stages} stages of " if part.stages > 1 else ""
                what, size = ", then ".join((f"{stages}{part.title}", *others)), part.stages * part.bytes
            found.append(Span(what, at, size))
            at += size
        return tuple(found)

    def _regions(self) -> Iterator[Region]:
        return (part for part in self.parts if isinstance(part, Region))

    @property
    def bytes(self) -> int:
        return sum(span.bytes for span in self.spans)

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """Of each region its first byte, of those in stages that of the first stage; of the stages "stages"."""
        found: dict[str, int] = {}
        at = 0
        for part in self.parts:
            if isinstance(part, Stages):
                found["stages"] = at
                for name, offset in self.in_stage.items():
                    found[name] = at + offset
                at += part.count * part.stage_bytes
            elif part.in_place_of:
                found[part.name] = found[part.in_place_of]
            else:
                found[part.name] = at
                at += part.stages * part.bytes
        return found

    @cached_property
    def in_stage(self) -> Mapping[str, int]:
        """Of each region in stages its first byte from the stage's own."""
        found: dict[str, int] = {}
        for part in self.parts:
            at = 0
            for region in part.regions if isinstance(part, Stages) else ():
                found[region.name] = at
                at += region.bytes
        return found

    @property
    def constants(self) -> Iterator[str]:
        """Definitions in C++: kSmemX of every region; in stages also kStageX, from where a stage begins."""
        titles = {region.name: region.title for region in self._regions()}
        notes = {r.name: f"  // takes the place of {titles[r.in_place_of]}" for r in self._regions() if r.in_place_of}
        for name, offset in self.offsets.items():
            yield f"constexpr uint32_t kSmem{_camel(name)} = {offset};{notes.get(name, '')}"
        for name, offset in self.in_stage.items():
            yield f"constexpr uint32_t kStage{_camel(name)} = {offset};"

    @property
    def text(self) -> str:
        """What it consists of, for a refusal: `Q 65,536 + 2 x K 65,536 + 2 x V 65,536 + barriers 80`."""
        texts = []
        for part in self.parts:
            if isinstance(part, Stages):
                inside = " + ".join(f"{region.title} {region.bytes:,}" for region in part.regions)
                texts.append(f"{part.count} stages x ({inside})")
            elif not part.in_place_of:
                times = f"{part.stages} x " if part.stages > 1 else ""
                texts.append(f"{times}{part.title} {part.bytes:,}")
        return " + ".join(texts)


def _camel(name: str) -> str:
    """`TileSlots` of "tile_slots"."""
    return "".join(word.capitalize() for word in name.split("_"))

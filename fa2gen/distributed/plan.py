"""Which calls make one process's part of attention: integers alone, the same in every process.

A rectangle of queries [a, b) and keys [c, d) of a sequence is a call of its own, whose mask is aligned to the bottom
right: its last query stands b - d keys behind its last key. A window (left, right) of the whole is one of
(left - (b - d), right + (b - d)) of the rectangle, and neither side falls below 0 once queries and keys that nobody
sees are cut off its end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

from fa2gen.options import UNLIMITED

__all__ = ["Call", "Layout", "Piece", "Split", "pieces_of"]

Layout: TypeAlias = Literal["zigzag", "contiguous"]
Span: TypeAlias = tuple[int, int]
Window: TypeAlias = tuple[int, int]


class Piece(NamedTuple):
    """Rows [start, end) of the sequence, which lie from row `at` on in a tensor."""

    start: int
    end: int
    at: int


class Call(NamedTuple):
    """One call of a kernel.

    queries  [first, end) rows of this process's tensors.
    keys     [first, end) rows of the keys at hand.
    lengths  (queries, keys) of each document in them, one behind the other; rows behind the last are padding.
    window   (left, right) sides of each document's mask.
    """

    queries: Span
    keys: Span
    lengths: tuple[tuple[int, int], ...]
    window: Window

    @property
    def is_one(self) -> bool:
        """Whether all of it is one document."""
        return self.lengths == ((self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]),)

    @property
    def is_full(self) -> bool:
        """Whether it is one document that hides nothing."""
        if not self.is_one:
            return False
        ((queries, keys),) = self.lengths
        left, right = self.window
        return (left < 0 or left >= keys - 1) and (right < 0 or right >= queries - 1)


def pieces_of(rank: int, world: int, rows: int, layout: Layout) -> tuple[Piece, ...]:
    """What of a sequence of `rows` the rank-th of `world` processes has, in the order of its tensors."""
    if layout == "contiguous":
        part = rows // world
        return (Piece(rank * part, (rank + 1) * part, 0),)
    part = rows // (2 * world)
    last = 2 * world - 1 - rank
    if last == rank + 1:  # neighbours
        return (Piece(rank * part, (last + 1) * part, 0),)
    return Piece(rank * part, (rank + 1) * part, 0), Piece(last * part, (last + 1) * part, part)


@dataclass(frozen=True)
class Split:
    """A sequence of `rows`, in `documents` [start, end) that do not see each other, over `world` processes.

    window  (left, right) sides, -1 for no limit; right is 0 for a causal mask.
    """

    rank: int
    world: int
    rows: int
    layout: Layout
    documents: tuple[Span, ...]
    window: Window

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        return pieces_of(rank, self.world, self.rows, self.layout)

    @cached_property
    def equal_pieces(self) -> tuple[tuple[int, ...], ...]:
        """Of each process its pieces, of one length and as many as those of the others, by their numbers in the
        sequence, in the order of its tensors."""
        pieces = [self.pieces(rank) for rank in range(self.world)]
        length = self.rows // self.world // max(map(len, pieces))
        return tuple(
            tuple(start // length for piece in of_one for start in range(piece.start, piece.end, length))
            for of_one in pieces
        )

    @cached_property
    def in_order(self) -> tuple[tuple[int, Piece], ...]:
        """(rank, piece) of all processes, as they follow each other in the sequence."""
        every = [(rank, piece) for rank in range(self.world) for piece in self.pieces(rank)]
        return tuple(sorted(every, key=lambda found: found[1].start))

    @cached_property
    def whole(self) -> Call:
        """All queries and all keys."""
        lengths = tuple((end - start, end - start) for start, end in self.documents)
        return Call((0, self.rows), (0, self.rows), lengths, self.window)

    @cached_property
    def of_all_keys(self) -> tuple[Call, ...]:
        """This process's queries and the whole sequence's keys, in order. Each query is in one call at most."""
        return self._calls(self.pieces(self.rank), (Piece(0, self.rows, 0),))

    def of_keys_from(self, rank: int) -> tuple[Call, ...]:
        """This process's queries and another's keys."""
        return self._between[self.rank, rank]

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """How many ranks before its own each process finds the keys that it sees, in rising order; 0 is the first."""
        ranks = range(self.world)
        needed = [s for s in ranks if any(self._between[r, (r - s) % self.world] for r in ranks)]
        return tuple(sorted({0, *needed}))

    @cached_property
    def _between(self) -> dict[Span, tuple[Call, ...]]:
        """(rank of the queries, rank of the keys) -> calls."""
        every = [self.pieces(rank) for rank in range(self.world)]
        return {(r, s): self._calls(every[r], every[s]) for r in range(self.world) for s in range(self.world)}

    def _calls(self, queries: tuple[Piece, ...], keys: tuple[Piece, ...]) -> tuple[Call, ...]:
        left, right = self.window
        if queries == keys and left < 0 and right <= 0:
            # Rows in their order see each other as those of one sequence do, whatever lies between.
            rows = [sum(_overlap(piece, document) for piece in queries) for document in self.documents]
            lengths = tuple((n, n) for n in rows if n)
            return (Call((0, sum(rows)), (0, sum(rows)), lengths, self.window),) if lengths else ()
        found: list[Call] = []
        for of_queries in queries:
            for of_keys in keys:
                found += _grouped(self._rectangles(of_queries, of_keys))
        return tuple(_joined(_joined(found, across_keys=True), across_keys=False))

    def _rectangles(self, of_queries: Piece, of_keys: Piece) -> Iterator[Call]:
        """A call for each document with rows in both, of which some query sees some key."""
        left, right = self.window
        # Documents are in order: those that end behind both beginnings, until one begins behind an end.
        first = bisect_right(self.documents, max(of_queries.start, of_keys.start), key=lambda document: document[1])
        for start, end in self.documents[first:]:
            if start >= min(of_queries.end, of_keys.end):
                break
            a, b = max(start, of_queries.start), min(end, of_queries.end)
            c, d = max(start, of_keys.start), min(end, of_keys.end)
            if left >= 0:
                b, c = min(b, d + left), max(c, a - left)
            if right >= 0:
                d, a = min(d, b + right), max(a, c - right)
            if a >= b or c >= d:
                continue
            window = (UNLIMITED if left < 0 else left + d - b, UNLIMITED if right < 0 else right + b - d)
            at_query, at_key = of_queries.at - of_queries.start, of_keys.at - of_keys.start
            yield Call((a + at_query, b + at_query), (c + at_key, d + at_key), ((b - a, d - c),), window)


def _overlap(piece: Piece, document: Span) -> int:
    return max(0, min(piece.end, document[1]) - max(piece.start, document[0]))


def _grouped(calls: Iterator[Call]) -> list[Call]:
    """Documents that follow each other, with one mask, in one call."""
    found: list[Call] = []
    for call in calls:
        if found and _follow(found[-1], call) and found[-1].window == call.window:
            before = found.pop()
            call = Call(
                (before.queries[0], call.queries[1]),
                (before.keys[0], call.keys[1]),
                before.lengths + call.lengths,
                call.window,
            )
        found.append(call)
    return found


def _follow(before: Call, after: Call) -> bool:
    return before.queries[1] == after.queries[0] and before.keys[1] == after.keys[0]


def _joined(calls: list[Call], across_keys: bool) -> list[Call]:
    """Neighbours in which all is seen as one: of the same queries and keys one behind the other, or the reverse."""
    found: list[Call] = []
    for call in calls:
        before = found[-1] if found else None
        if before and before.is_full and call.is_full:
            same, next_ = (before.queries, before.keys) if across_keys else (before.keys, before.queries)
            other_same, other_next = (call.queries, call.keys) if across_keys else (call.keys, call.queries)
            if same == other_same and next_[1] == other_next[0]:
                span = (next_[0], other_next[1])
                queries, keys = (same, span) if across_keys else (span, same)
                lengths = ((queries[1] - queries[0], keys[1] - keys[0]),)
                found[-1] = Call(queries, keys, lengths, (UNLIMITED, UNLIMITED))
                continue
        found.append(call)
    return found

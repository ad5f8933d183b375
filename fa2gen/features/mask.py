"""Masks: which keys a query sees. All are intervals whose ends do not fall from one query to the next.

`key_range` is the definition, by options; kernels are made for its special cases, one block of templates/rooms/mask/
each.
"""

from __future__ import annotations

from typing import Any

from fa2gen.features.base import Feature
from fa2gen.options import Options

__all__ = ["CAUSAL", "FULL", "key_range"]

FULL = Feature("full", rooms={"mask": "full"})
CAUSAL = Feature("causal", rooms={"mask": "causal"}, uneven=True, right_edge=True, examples=({"causal": True},))


def key_range(options: Options, seqlen_q: int, seqlen_k: int, row: Any) -> tuple[Any, Any]:
    """(first, end) of the keys that query `row` sees, half-open; first >= end where it sees none.

    row  a whole number, or a tensor or an array of them.
    """
    d = row + (seqlen_k - seqlen_q)  # the query's own place among the keys
    first, end = 0 * d, 0 * d + seqlen_k
    right = 0 if options.causal else options.window_right
    if options.window_left >= 0:
        first = _greater(first, d - options.window_left)
    if right >= 0:
        end = _less(end, d + right + 1)
    if options.chunk:
        chunk_begins = d // options.chunk * options.chunk  # Python and torch round down, negative d too
        first = _greater(first, chunk_begins)
        end = _less(end, chunk_begins + options.chunk)
    return first, end


def _greater(a: Any, b: Any) -> Any:
    """max, of whole numbers, tensors and arrays alike."""
    return a + (b - a) * (b > a)


def _less(a: Any, b: Any) -> Any:
    return a + (b - a) * (b < a)

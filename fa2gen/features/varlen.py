"""Ragged batches: sequences packed one behind the other, whose lengths the host never sees.

`<kernel>_prepare` reads the lengths on the device, and writes a table of sequences and a list of their blocks, longest
first; the main kernel takes its work from the list. Forward it lists blocks of queries, and a sequence's rows are
looked up in the table; SM90's forward blocks make the table of a few sequences for themselves, and that kernel is not
launched. For gradients it lists blocks of keys with all that a block needs, which so waits for memory once; blocks of
queries have places that bounds alone decide (`first_block_of`), so that row statistics need not wait for it. Rows that
no sequence covers are entries too, of queries without keys or keys without queries: so padding is defined.
"""

from __future__ import annotations

from fa2gen.features.attention import Operand
from fa2gen.features.base import Feature, Param, Scratch
from fa2gen.spec import Direction

__all__ = ["ENTRY_NUMBERS", "VARLEN"]

ENTRY_NUMBERS = 8  # a sequence's in the table: lengths, first rows, places of its blocks, heads taken together, itself


def _varlen(listed: str) -> Feature:
    """With a list of blocks of queries, "m", or of keys, "n"."""
    tables = ("sequences", "num_blocks", f"{listed}_list")
    return Feature(
        "varlen",
        rooms={"seqlen": "ragged"},
        operands=(
            Operand("cu_seqlens_q", "bounds", optional=True),
            Operand("cu_seqlens_k", "bounds", optional=True),
            Operand("seqused_q", "lengths", optional=True),
            Operand("seqused_k", "lengths", optional=True),
        ),
        params=(Param("num_sequences", "int"),),
        scratch=tuple(Scratch(name, "int*") for name in tables),
        prepare=True,
        uneven=True,
        examples=({"varlen": True},),
    )


VARLEN: dict[Direction, Feature] = {"fwd": _varlen("m"), "bwd": _varlen("n")}

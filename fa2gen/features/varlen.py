"""Ragged batches: sequences packed one behind the other, whose lengths the host never sees.

`<kernel>_prepare` reads the lengths on the device, and writes a table of sequences and lists of them, longest first;
the other kernels take their work from the lists and look a sequence's place up in the table. SM90's forward blocks make
the table of a few sequences for themselves, and that kernel is not launched. Rows that no sequence covers are entries
of the table too, of queries without keys or keys without queries: so padding is defined.
"""

from __future__ import annotations

from fa2gen.features.attention import Operand
from fa2gen.features.base import Feature, Param, Scratch
from fa2gen.spec import Direction

__all__ = ["ENTRY_NUMBERS", "VARLEN"]

ENTRY_NUMBERS = 8  # of the table, a sequence: lengths, first rows, places in the lists, heads taken together, spare


def _varlen(*lists: str) -> Feature:
    """With a list of blocks of queries, "m", and of keys, "n"."""
    tables = ("sequences", "num_blocks", *(f"{of}_list" for of in lists))
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


VARLEN: dict[Direction, Feature] = {"fwd": _varlen("m"), "bwd": _varlen("m", "n")}

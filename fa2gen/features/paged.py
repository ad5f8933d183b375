"""Pages: where a sequence's keys lie is looked up in a table, page by page, on the device."""

from __future__ import annotations

from collections.abc import Mapping

from fa2gen.features.attention import Operand
from fa2gen.features.base import Feature, Param
from fa2gen.spec import Direction

__all__ = ["PAGED"]

_BLOCK_TABLE = Operand("block_table", "table")
_FORMULAS = {
    "page_size": "page_size",
    "page_reciprocal": f"{2**31 - 1} / page_size",
    "table_rows": "table_rows",
    "table_step": "table_stride",
    "num_pages": "entries",
}


def _paged(rooms: Mapping[str, str], *names: str) -> Feature:
    """With these numbers of Params."""

    return Feature(
        "paged",
        rooms=rooms,
        operands=(_BLOCK_TABLE,),
        params=tuple(Param(name, "int") for name in names),
        formulas={name: _FORMULAS[name] for name in names},
    )


PAGED: dict[Direction, Feature] = {
    "decode": _paged({"keys": "paged"}, "page_size", "page_reciprocal", "table_rows", "table_step"),
    "fwd": _paged({}, "page_size", "table_step", "num_pages"),
}

"""Pages: where a sequence's keys lie is looked up in a table, page by page, on the device."""

from __future__ import annotations

from collections.abc import Mapping

from fa2gen.features.attention import Operand
from fa2gen.features.base import Feature, Param
from fa2gen.options import AnyShape, CacheShape, Options

__all__ = ["PAGED"]


def _values(_: Options, shape: AnyShape) -> Mapping[str, int | float]:
    assert isinstance(shape, CacheShape)
    return {"page_size": shape.page_size, "table_rows": shape.table_rows, "table_step": shape.table_stride}


PAGED = Feature(
    "paged",
    rooms={"keys": "paged"},
    operands=(Operand("block_table", "table"),),
    params=(Param("page_size", "int"), Param("table_rows", "int"), Param("table_step", "int")),
    values=_values,
    formulas={"page_size": "page_size", "table_rows": "table_rows", "table_step": "table_stride"},
)

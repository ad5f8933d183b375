"""Where elements live: shared-memory panels, swizzles and matrix-instruction fragments, as pure integer functions.

Shared-memory tiles are stored as *panels*: `panel[rows][columns]` with 128, 64 or 32 bytes a row, panels back to back.
That is the image that TMA writes and wgmma and ldmatrix read without bank conflicts (PTX ISA, "Swizzling modes").
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CHUNK_BYTES",
    "ELEMENT_BYTES",
    "NUMBER_BYTES",
    "Panels",
    "accumulator_position",
    "align_up",
    "ceil_div",
    "swizzle",
]

ELEMENT_BYTES = 2  # fp16 and bf16
CHUNK_BYTES = 16  # of one cp.async, one ldmatrix row, one vector store
NUMBER_BYTES = 4  # of every scratch number: fp32 or int32


def ceil_div(value: int, divisor: int) -> int:
    """`value / divisor`, rounded up; value >= 0."""
    return -(-value // divisor)


def align_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is >= value."""
    return ceil_div(value, multiple) * multiple


def swizzle(byte_address: int, span: int) -> int:
    """The address that holds what an unswizzled tile would hold at `byte_address`; `span` is 128, 64 or 32 bytes.

    Address bits [4, 4+b) are xored with bits [7, 7+b), b = 3, 2, 1: the 16-byte chunk index with the row index, so that
    8 rows of one chunk column fall into 8 different bank groups.
    """
    bits = {128: 3, 64: 2, 32: 1}[span]
    return byte_address ^ (((byte_address >> 7) & ((1 << bits) - 1)) << 4)


def accumulator_position(warp: int, lane: int, register: int) -> tuple[int, int]:
    """(row, column) of fp32 accumulator `register` in a wgmma m64nN tile (PTX ISA, "wgmma D fragment layout").

    mma.sync m16n8k16 has the same layout with warp = 0 and one tile per 4 registers.
    """
    row = 16 * warp + lane // 4 + 8 * ((register >> 1) & 1)
    column = 8 * (register >> 2) + 2 * (lane % 4) + (register & 1)
    return row, column


@dataclass(frozen=True)
class Panels:
    """A tile of `rows` x `head_dim` 16-bit elements in shared memory, as panels of `span` bytes a row."""

    rows: int
    head_dim: int
    span: int

    @property
    def columns(self) -> int:
        """Elements in one panel row."""
        return self.span // ELEMENT_BYTES

    @property
    def count(self) -> int:
        """Panels that hold all head_dim columns; the last may be partly padding (zeros to `last_columns`)."""
        return ceil_div(self.head_dim, self.columns)

    @property
    def panel_bytes(self) -> int:
        return self.rows * self.span

    @property
    def bytes(self) -> int:
        return self.count * self.panel_bytes

    @property
    def last_columns(self) -> int:
        """Columns of the last panel that a product reads: to head_dim, in whole k-steps of 16 elements."""
        return align_up(self.head_dim - (self.count - 1) * self.columns, 16)

    @property
    def read_bytes(self) -> int:
        """Bytes of the tile that a product reads: of the last panel `last_columns` alone."""
        return ((self.count - 1) * self.columns + self.last_columns) * self.rows * ELEMENT_BYTES

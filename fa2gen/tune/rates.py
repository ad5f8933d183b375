"""What one SM does in a cycle, for the cost models of both passes. Measured on an H200 where nothing else is said."""

from __future__ import annotations

__all__ = ["EX2_PER_CYCLE", "L2_BYTES_PER_CYCLE", "LANES_PER_CYCLE", "SMEM_BYTES_PER_CYCLE", "SMS", "mma_sync_cycles"]

SMS = {"sm80": 108, "sm90": 132}

EX2_PER_CYCLE = 16
LANES_PER_CYCLE = 128  # four warps issue an instruction
SMEM_BYTES_PER_CYCLE = 128
L2_BYTES_PER_CYCLE = 36  # by TMA


def mma_sync_cycles(rows: int, columns: int, depth: int) -> float:
    """Of a product on sm80: 2 cycles for each mma.sync m16n8k16 (an A100's peak)."""
    return 2 * (rows / 16) * (columns / 8) * (depth / 16)

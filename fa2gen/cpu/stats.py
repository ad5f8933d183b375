"""What a kernel's primitives moved, as a table for people."""

from __future__ import annotations

from collections.abc import Mapping

from fa2gen.cpu.run import Count

__all__ = ["counts_table"]


def counts_table(counts: Mapping[str, Count]) -> str:
    """One line for each primitive of a run with Options.stats.

    "x2.0" in the last column means twice the trips through shared memory's banks that the bytes would need.
    """
    rows = [("primitive", "instructions", "bytes", "wavefronts", "conflicts")]
    for name, count in counts.items():
        banks = f"x{count.wavefronts / count.ideal_wavefronts:.1f}" if count.ideal_wavefronts else "-"
        rows.append((name, f"{count.instructions:,}", f"{count.bytes:,}", f"{count.wavefronts:,}", banks))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)

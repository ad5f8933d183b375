"""A cubin's machine instructions, with the source line that each came from and the registers that are alive there.

nvdisasm (of the package nvidia-cuda-nvdisasm, or of a CUDA toolkit) tells lines and live registers in two runs, as it
leaves out the one where it is asked for the other; the address joins them.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Instruction", "disassembler", "instructions"]

_SECTION = re.compile(r"\s*\.section\s+\.text\.(\w+)")
_LINE = re.compile(r'\s*//## File ".*", line (\d+)')
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_LIVE = re.compile(r"//\s*\|\s*(\d*)\s*\|")
_SECONDS = 120


@dataclass(frozen=True)
class Instruction:
    """symbol, offset in bytes from it; text; line of the source (0: none); live, general registers that hold a value
    then."""

    symbol: str
    offset: int
    text: str
    line: int
    live: int


@functools.cache
def disassembler() -> str | None:
    """nvdisasm, or None where there is none."""
    try:
        from cuda.pathfinder import find_nvidia_binary_utility
    except ImportError:
        return shutil.which("nvdisasm")
    found: str | None = find_nvidia_binary_utility("nvdisasm")
    return found or shutil.which("nvdisasm")


def instructions(cubin: bytes) -> list[Instruction]:
    """All of them, kernel by kernel. Empty where there is no nvdisasm, or where it cannot read this cubin, as one that
    is older than the compiler may."""
    tool = disassembler()
    if tool is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        try:
            by_line, by_life = (_run(tool, option, path) for option in (["-g"], ["-lrm", "count"]))
        except (OSError, subprocess.SubprocessError):
            return []
    live = {(symbol, offset): count for symbol, offset, _, _, count in _read(by_life)}
    return [
        Instruction(symbol, offset, text, line, live.get((symbol, offset), 0))
        for symbol, offset, text, line, _ in _read(by_line)
    ]


def _run(tool: str, options: list[str], path: Path) -> str:
    command = [tool, "-c", *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout


def _read(text: str) -> Iterator[tuple[str, int, str, int, int]]:
    """(symbol, offset, text, line, live registers) of each instruction, as far as the text tells."""
    symbol, line = "", 0
    for row in text.splitlines():
        if found := _SECTION.match(row):
            symbol, line = found[1], 0
        elif found := _LINE.match(row):
            line = int(found[1])
        elif found := _INSTRUCTION.match(row):
            life = _LIVE.search(row)
            yield symbol, int(found[1], 16), found[2], line, int(life[1] or 0) if life else 0

"""What was measured, as JSON lines: appended and synced one by one, so that a kill loses the line in hand at most.

A line that a kill cut short is dropped when the file is read. Every line carries the key of its circumstances (GPU,
NVRTC, protocol, sources of the kernel and of the default it is compared with): lines of other circumstances are left
alone, and not believed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["Journal", "key_of"]


def key_of(*circumstances: object) -> str:
    """16 hex digits over everything that a measurement depends on."""
    return hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """Measurements by (what, key). Not for several processes at once on one file.

    path  None keeps it in memory. Raises OSError when the file cannot be read or written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lines: dict[tuple[str, str], dict[str, Any]] = {}
        self._counts: dict[tuple[str, str], int] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_with_newline(path)
        for line in _whole_lines(path):
            self._take(line)

    def find(self, what: str, key: str) -> dict[str, Any] | None:
        """The last line of that kind, or None."""
        return self._lines.get((what, key))

    def count(self, what: str, key: str) -> int:
        """How many lines of that kind there are."""
        return self._counts.get((what, key), 0)

    def append(self, what: str, key: str, **facts: Any) -> dict[str, Any]:
        """Adds a line and returns it as it will be found; on the disk when this returns."""
        text = json.dumps({"what": what, "key": key, **facts})
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(text.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        line: dict[str, Any] = json.loads(text)
        self._take(line)
        return line

    def _take(self, line: dict[str, Any]) -> None:
        place = line["what"], line["key"]
        self._lines[place] = line
        self._counts[place] = self._counts.get(place, 0) + 1


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in _lines(path):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("what"), str) and isinstance(line.get("key"), str):
            yield line


def _lines(path: Path) -> Iterable[bytes]:
    return path.read_bytes().splitlines() if path.exists() else ()


def _end_with_newline(path: Path) -> None:
    """So that the next line does not continue one that a kill cut short."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")

"""What figures mean: the ratio of ours to the best peer at each point, and the geometric mean of those."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fa2gen.bench.peers import in_order, is_ours
from fa2gen.errors import InvalidInput
from fa2gen.files import read_file, write_file

__all__ = ["best_peer", "contestants", "geometric_mean", "headlines", "load", "ratio", "save"]

Row = Mapping[str, Any]


def contestants(rows: Iterable[Row]) -> list[str]:
    """Everyone who has a figure, ours first."""
    return in_order(name for row in rows for name in _figures(row))


def best_peer(row: Row) -> tuple[str, float] | None:
    """The peer that is best at a point, and its figure; None where no peer ran."""
    peers = {name: value for name, value in _figures(row).items() if not is_ours(name)}
    if not peers:
        return None
    name = (min if "microseconds" in row else max)(peers, key=peers.__getitem__)
    return name, peers[name]


def ratio(row: Row, ours: str, peer: str | None = None) -> float | None:
    """How many times as fast `ours` is as `peer`, or as the best peer; None where either has no figure."""
    figures = _figures(row)
    best = best_peer(row)
    other = figures.get(peer) if peer else best and best[1]
    mine = figures.get(ours)
    if not mine or not other:
        return None
    return other / mine if "microseconds" in row else mine / other


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def headlines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each of ours: the geometric mean of its ratios to the best peer and to each peer, and over how many points.

    `{"ours", "peer" ("best" or a name), "points", "geometric_mean", "least", "greatest"}`.
    """
    names = contestants(rows)
    found = []
    for ours in filter(is_ours, names):
        for peer in (None, *(name for name in names if not is_ours(name))):
            ratios = [value for row in rows if (value := ratio(row, ours, peer)) is not None]
            if ratios:
                found.append(
                    {
                        "ours": ours,
                        "peer": peer or "best",
                        "points": len(ratios),
                        "geometric_mean": round(geometric_mean(ratios) or 0.0, 3),
                        "least": round(min(ratios), 3),
                        "greatest": round(max(ratios), 3),
                    }
                )
    return found


def load(path: Path) -> dict[str, Any]:
    """A document that `save` wrote. Raises InvalidInput, which names the file, for anything else."""
    try:
        document: dict[str, Any] = json.loads(read_file(path))
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from None
    rows = document.get("rows") if isinstance(document, dict) else None
    needed = {"preset", "direction", "head_dim", "dtype", "causal", "batch", "seqlen", "heads", "heads_kv", "tflops"}
    if not isinstance(rows, list) or not isinstance(document.get("provenance"), dict):
        raise InvalidInput(f'{path} is not a result of `fa2gen bench`: it must hold "provenance" and "rows"')
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not row.keys() >= needed:
            lacking = ", ".join(sorted(needed - row.keys())) if isinstance(row, dict) else "everything"
            raise InvalidInput(f"{path}: row {number} lacks {lacking}")
        if wrong := _wrong_field(row):
            raise InvalidInput(f"{path}: row {number}: {wrong} is {row[wrong]!r}")
    return document


def _wrong_field(row: Row) -> str | None:
    """The first field that is not of its kind: what is drawn and compared must be numbers."""
    for name in ("head_dim", "batch", "seqlen", "heads", "heads_kv"):
        if type(row[name]) is not int:
            return name
    for name in ("tflops", "microseconds"):
        figures = row.get(name) or {}
        if not isinstance(figures, dict) or not all(_is_figure(value) for value in figures.values()):
            return name
    return None


def _is_figure(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def save(document: Mapping[str, Any], path: Path) -> None:
    """Writes a result, one row a line so that it diffs well; whole or not at all. Raises OSError."""
    head = json.dumps(document["provenance"], indent=2)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in document["rows"])
    write_file(path, f'{{\n"provenance": {head},\n"rows": [\n{rows}\n]\n}}\n'.encode())


def _figures(row: Row) -> Mapping[str, float]:
    figures: Mapping[str, float] = row.get("microseconds") or row["tflops"]
    return figures

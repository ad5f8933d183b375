"""The catalogue: what specs/ says. Families of kernels as TOML, and the tuned rows under specs/tuned/."""

from __future__ import annotations

import functools
import itertools
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fa2gen._paths import data_dir
from fa2gen.arch import ArchName
from fa2gen.errors import Fa2GenError, InvalidInput
from fa2gen.spec import KernelSpec, Problem, Tiling

__all__ = ["catalogue", "read_family", "written_tilings"]

SCHEMA = 1


def catalogue(arch: ArchName | None = None) -> list[KernelSpec]:
    """Every kernel that specs/ names, of one architecture or of all; sorted by file, then as written."""
    return [spec for spec in _catalogue() if arch is None or spec.tiling.arch == arch]


@functools.cache
def _catalogue() -> tuple[KernelSpec, ...]:
    root = Path(data_dir("specs"))
    return tuple(spec for path in sorted(root.glob("*.toml")) for spec in read_family(path))


@functools.cache
def written_tilings() -> dict[tuple[Problem, ArchName], Tiling]:
    """The tiling that specs/ gives to each problem on each architecture; the first row that names a problem wins."""
    found: dict[tuple[Problem, ArchName], Tiling] = {}
    for spec in _catalogue():
        found.setdefault((spec.problem, spec.tiling.arch), spec.tiling)
    return found


def read_family(path: Path) -> list[KernelSpec]:
    """The specs of one TOML file.

    `[problem]` fields may be lists, which expand as a product; `[[tiling]]` rows are taken as written. Raises InvalidInput
    naming the file, for syntax, for a key that does not exist and for a value out of range.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput(f"{path.name}: {error}") from None
    unknown = set(table) - {"schema", "problem", "tiling"}
    if unknown:
        raise InvalidInput(f"{path.name}: unknown table {sorted(unknown)[0]!r}; a spec has schema, [problem] and [[tiling]]")
    if table.get("schema") != SCHEMA:
        raise InvalidInput(f"{path.name}: schema {table.get('schema')!r}; this fa2gen reads schema {SCHEMA}")
    problem, tilings = table.get("problem"), table.get("tiling")
    if not isinstance(problem, dict):
        raise InvalidInput(f"{path.name}: no [problem] table")
    if not isinstance(tilings, list) or not tilings or not all(isinstance(row, dict) for row in tilings):
        raise InvalidInput(f"{path.name}: no [[tiling]] row")
    try:
        return [KernelSpec(problem=p, tiling=t) for t in (Tiling(**row) for row in tilings) for p in _problems(problem)]
    except Fa2GenError as error:
        raise type(error)(f"{path.name}: {error}") from None


def _problems(fields: dict[str, Any]) -> Iterator[Problem]:
    choices = [value if isinstance(value, list) else [value] for value in fields.values()]
    for combination in itertools.product(*choices):
        yield Problem(**dict(zip(fields, combination, strict=True)))

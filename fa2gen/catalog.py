"""The catalogue: what specs/ says. Families of kernels as TOML, and the tuned rows under specs/tuned/."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fa2gen import env
from fa2gen._paths import data_dir, in_checkout
from fa2gen.arch import ArchName
from fa2gen.errors import Fa2GenError, InvalidInput
from fa2gen.spec import KernelSpec, Problem, Tiling

__all__ = [
    "SCHEMA",
    "TunedRow",
    "catalogue",
    "read_family",
    "read_tuned",
    "tuned_folders",
    "tuned_rows",
    "written_tilings",
]

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

    `[problem]` fields may be lists, which expand as a product; `[[tiling]]` rows are taken as written. Raises
    InvalidInput naming the file, for syntax, for a key that does not exist and for a value out of range.
    """
    table = _toml(path)
    unknown = set(table) - {"schema", "problem", "tiling"}
    if unknown:
        raise InvalidInput(
            f"{path.name}: unknown table {sorted(unknown)[0]!r}; a spec has schema, [problem] and [[tiling]]"
        )
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


# Tuned rows ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TunedRow:
    """What `fa2gen tune` found for one problem, on one GPU, in one range of key lengths.

    kernel          the winner's name, which says the problem and the tiling.
    seqlen_min      least number of keys it is meant for; seqlen_max the greatest, or None: no limit.
    default         the default tiling's kernel, timed in the same run; runner_up the best of the others.
    seqlens         where the three were timed, in that range.
    tflops          of the winner at each of these; tflops_default and tflops_runner_up likewise.
    num_candidates  kernels that were timed to find it.
    provenance      GPU, compiler, versions, protocol and date.
    """

    kernel: str
    seqlen_min: int
    seqlen_max: int | None
    default: str
    runner_up: str
    seqlens: tuple[int, ...]
    tflops: tuple[float, ...]
    tflops_default: tuple[float, ...]
    tflops_runner_up: tuple[float, ...]
    num_candidates: int
    provenance: Mapping[str, Any] = dataclasses.field(hash=False)

    @functools.cached_property
    def spec(self) -> KernelSpec:
        return KernelSpec.from_name(self.kernel)

    @property
    def gpu(self) -> str:
        return str(self.provenance["gpu"])

    @property
    def range_text(self) -> str:
        """`seqlen 1024 to 4095`."""
        if self.seqlen_max is None:
            return f"seqlen {self.seqlen_min} and more" if self.seqlen_min else "any seqlen"
        return f"seqlen {self.seqlen_min} to {self.seqlen_max}"

    @property
    def over_default(self) -> float:
        """How many times as fast as the default it was: the geometric mean over `seqlens`."""
        return math.prod(a / b for a, b in zip(self.tflops, self.tflops_default, strict=True)) ** (1 / len(self.tflops))

    def covers(self, seqlen: int) -> bool:
        return self.seqlen_min <= seqlen and (self.seqlen_max is None or seqlen <= self.seqlen_max)

    def refusal(self, gpu: str) -> str | None:
        """Why this is no measurement of that GPU, or None: another GPU has another best tiling."""
        return None if gpu == self.gpu else f"measured on {self.gpu}; this is {gpu}"

    def warning(self, compiler: str) -> str | None:
        """What makes the figures doubtful with that NVRTC version, or None: the tiling stays right, and likely good."""
        measured = self.provenance.get("nvrtc")
        return (
            None
            if compiler == measured
            else f"measured with NVRTC {measured}; this is {compiler}: tune again to be sure"
        )


def tuned_folders() -> tuple[Path, ...]:
    """Where tuned rows are, the first folder's before the second's: in a checkout specs/tuned alone, and in an
    installation what its user tuned, then what it came with."""
    shipped = Path(data_dir("specs")) / "tuned"
    return (shipped,) if in_checkout() else (env.cache_dir() / "tuned", shipped)


@functools.cache
def tuned_rows() -> dict[tuple[Problem, ArchName], tuple[TunedRow, ...]]:
    """All tuned rows of each problem on each architecture, in the order of the folders, then of the files.

    Raises InvalidInput naming the file that is not as `fa2gen tune` writes it. Read once: `tuned_rows.cache_clear()`.
    """
    found: dict[tuple[Problem, ArchName], tuple[TunedRow, ...]] = {}
    for path in (path for folder in tuned_folders() for path in sorted(folder.glob("*.toml"))):
        for row in read_tuned(path):
            key = (row.spec.problem, row.spec.tiling.arch)
            found[key] = (*found.get(key, ()), row)
    return found


def read_tuned(path: Path) -> list[TunedRow]:
    """The rows of one file of specs/tuned/. Raises InvalidInput naming the file and what is wrong in it."""
    table = _toml(path)
    if table.get("schema") != SCHEMA:
        raise InvalidInput(f"{path.name}: schema {table.get('schema')!r}; this fa2gen reads schema {SCHEMA}")
    return [_tuned_row(path, fields) for fields in table.get("row", ())]


def _tuned_row(path: Path, fields: dict[str, Any]) -> TunedRow:
    values: dict[str, Any] = {"seqlen_max": None}
    values |= {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    try:
        row = TunedRow(**values)
        lengths = {len(row.seqlens), len(row.tflops), len(row.tflops_default), len(row.tflops_runner_up)}
        if len(lengths) != 1 or not row.seqlens:
            raise InvalidInput("seqlens, tflops, tflops_default and tflops_runner_up must be lists of one length")
        if not all(isinstance(row.provenance.get(name), str) for name in ("gpu", "nvrtc")):
            raise InvalidInput("provenance must name gpu and nvrtc")
        if not isinstance(row.seqlen_min, int) or not isinstance(row.seqlen_max, int | None):
            raise InvalidInput("seqlen_min and seqlen_max must be whole numbers")
        KernelSpec.from_name(row.kernel)
    except (TypeError, AttributeError, Fa2GenError) as error:
        raise InvalidInput(f"{path.name}: row {fields.get('kernel', '?')!r}: {error}") from None
    return row


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput(f"{path.name}: {error}") from None

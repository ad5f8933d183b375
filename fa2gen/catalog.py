"""Specs in TOML: a user's own, the catalogue of specs/ and FA2GEN_SPECS, and the tuned rows under specs/tuned/."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import reprlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from fa2gen import env
from fa2gen._paths import data_dir, in_checkout
from fa2gen.arch import ARCHES, ArchName
from fa2gen.errors import Fa2GenError, InvalidInput
from fa2gen.files import distrust, own, read_file
from fa2gen.log import warn_once
from fa2gen.plan import default_tiling
from fa2gen.spec import NO_EXPRESSION, KernelSpec, Problem, Tiling

__all__ = [
    "SCHEMA",
    "TunedRow",
    "Wanted",
    "catalogue",
    "parse_spec",
    "read_spec",
    "read_tuned",
    "spec_schema",
    "tuned_folders",
    "tuned_refusal",
    "tuned_rows",
    "users_tilings",
    "written_tilings",
]

SCHEMA = 1
MAX_BYTES = 1 << 20  # of a file: the longest one here has 20 KB
MAX_KERNELS = 4096  # of a file: all head dims, dtypes, masks and passes make 384 problems


class Wanted(NamedTuple):
    """What one spec asks for: a problem and the tiling that is written for it, or None where that is left open."""

    problem: Problem
    tiling: Tiling | None


# Families -------------------------------------------------------------------------------------------------------------


def catalogue(arch: ArchName | None = None) -> list[KernelSpec]:
    """Every kernel that FA2GEN_SPECS and specs/ name, of one architecture or of all; sorted by file, then as written.

    A problem without a tiling has, on each architecture, the one that another spec writes for it, else the default.
    Raises InvalidInput for a file that is no spec, with its name and place.
    """
    return [spec for spec in _catalogue() if arch is None or spec.tiling.arch == arch]


@functools.cache
def _catalogue() -> tuple[KernelSpec, ...]:
    specs = (
        KernelSpec(problem=problem, tiling=tiling)
        for problem, written in (*_written(users=True), *_written(users=False))
        for tiling in ([_open_tiling(problem, arch) for arch in ARCHES] if written is None else [written])
    )
    return tuple(dict.fromkeys(specs))


def _open_tiling(problem: Problem, arch: ArchName) -> Tiling:
    """The tiling of a problem whose spec leaves it open."""
    key = problem, arch
    return users_tilings().get(key) or written_tilings().get(key) or default_tiling(problem, arch)


@functools.cache
def _written(users: bool) -> tuple[Wanted, ...]:
    folders = env.specs_dirs() if users else (Path(data_dir("specs")),)
    for folder in folders:
        if not folder.is_dir():
            raise InvalidInput(f"FA2GEN_SPECS names {folder}, which is no folder")
    paths = [path for folder in folders for path in sorted(folder.glob("*.toml"))]
    if strange := [path for path in paths if path.exists() and not path.is_file()]:
        raise InvalidInput(f"{strange[0]}: it is no regular file, and a pipe in a folder of specs would be waited for")
    return tuple(wanted for path in paths for wanted in read_spec(path))


@functools.cache
def written_tilings() -> dict[tuple[Problem, ArchName], Tiling]:
    """The tiling that specs/ gives to each problem on each architecture; the first row that names a problem wins."""
    return _first_tilings(_written(users=False))


@functools.cache
def users_tilings() -> dict[tuple[Problem, ArchName], Tiling]:
    """The same, of the folders in FA2GEN_SPECS."""
    return _first_tilings(_written(users=True))


def _first_tilings(written: Iterable[Wanted]) -> dict[tuple[Problem, ArchName], Tiling]:
    found: dict[tuple[Problem, ArchName], Tiling] = {}
    for problem, tiling in written:
        if tiling is not None:
            found.setdefault((problem, tiling.arch), tiling)
    return found


def read_spec(path: Path) -> list[Wanted]:
    """What one TOML file asks for. Raises InvalidInput as `parse_spec` does, and where the file cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InvalidInput(f"{path}: {error}") from None
    return parse_spec(data, str(path))


def parse_spec(data: bytes, name: str) -> list[Wanted]:
    """What a spec in TOML asks for; `name` says in errors where it came from.

    `[problem]` fields may be lists, which expand as a product; `[[tiling]]` rows are taken as written, and there may be
    none. Raises InvalidInput for syntax, for a key that does not exist, for a value out of range, and for more than
    MAX_KERNELS of them.
    """
    table = _toml(data, name)
    if unknown := sorted(set(table) - {"schema", "problem", "tiling"}):
        raise InvalidInput(f"{name}: {_out_of_place(unknown[0])}; a spec has schema, [problem] and [[tiling]]")
    _check_schema(table, name)
    problem, rows = table.get("problem"), table.get("tiling", [])
    if not isinstance(problem, dict):
        several = "; [[problem]] is a list of them, and a file has one, whose fields may be lists"
        raise InvalidInput(f"{name}: no [problem] table{several if isinstance(problem, list) else ''}")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InvalidInput(f"{name}: tilings are rows: write [[tiling]], once for each, where there is tiling")
    choices = {field: value if isinstance(value, list) else [value] for field, value in problem.items()}
    if empty := [field for field, values in choices.items() if not values]:
        raise InvalidInput(f"{name}: [problem] {_shortened(empty[0])} is an empty list")
    if (count := math.prod(map(len, choices.values())) * max(1, len(rows))) > MAX_KERNELS:
        longest = max(choices, key=lambda field: len(choices[field]))
        raise InvalidInput(
            f"{name}: asks for {count:,} kernels, at most {MAX_KERNELS:,} in one file; its longest list is that of "
            f"{_shortened(longest)}, {len(choices[longest]):,}"
        )
    try:
        tilings: list[Tiling | None] = [Tiling(**row) for row in rows] or [None]
        problems = [
            Problem(**dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())
        ]
    except Fa2GenError as error:
        raise type(error)(f"{name}: {error}") from None
    return [Wanted(problem, tiling) for tiling in tilings for problem in problems]


def _out_of_place(key: str) -> str:
    """What is wrong with a key beside a spec's tables: a field that its table does not hold, or a name unknown."""
    for table, model in (("[problem]", Problem), ("[[tiling]]", Tiling)):
        if key in model.model_fields:
            return f"{key} stands outside of {table}, whose field it is"
    return f"unknown table {_shortened(key)}"


def spec_schema() -> dict[str, Any]:
    """The JSON schema of a spec file, from the fields of `Problem` and `Tiling`: editors complete and check by it."""
    problem, tiling = Problem.model_json_schema(), Tiling.model_json_schema()
    for field, rule in problem["properties"].items():
        about = {key: rule.pop(key) for key in ("description", "default", "title") if key in rule}
        problem["properties"][field] = {**about, "anyOf": [rule, {"type": "array", "items": rule, "minItems": 1}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fa2gen spec",
        "type": "object",
        "properties": {
            "schema": {"const": SCHEMA, "description": "The version of this format."},
            "problem": {**problem, "description": "What is computed; lists expand as a product."},
            "tiling": {
                "type": "array",
                "items": tiling,
                "description": "How; without any, what is tuned or the default.",
            },
        },
        "required": ["schema", "problem"],
        "additionalProperties": False,
    }


# Tuned rows ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(4096)
def _checked_name(name: str) -> str:
    KernelSpec.from_name(name)
    return name


_Name = Annotated[str, AfterValidator(_checked_name)]
_Seqlen = Annotated[int, Field(ge=0, lt=1 << 31)]
_Count = Annotated[int, Field(ge=1, lt=1 << 31)]
_Tflops = Annotated[float, Field(gt=0, lt=1e6, allow_inf_nan=False)]


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
    score, allow, inputs, learned  of an expression, of which the names have but a hash.
    """

    kernel: _Name
    seqlen_min: _Seqlen
    seqlen_max: _Seqlen | None
    default: _Name
    runner_up: _Name
    seqlens: tuple[_Count, ...]
    tflops: tuple[_Tflops, ...]
    tflops_default: tuple[_Tflops, ...]
    tflops_runner_up: tuple[_Tflops, ...]
    num_candidates: _Count
    provenance: Mapping[str, Any] = dataclasses.field(hash=False)
    score: str = ""
    allow: str = ""
    inputs: str = ""
    learned: str = ""

    __pydantic_config__ = ConfigDict(extra="forbid")

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
    """Where tuned rows are, the first folder's before the second's: tuned/ in the folders of FA2GEN_SPECS; then in a
    checkout specs/tuned alone, and in an installation what its user tuned, then what it came with."""
    users = tuple(folder / "tuned" for folder in env.specs_dirs())
    shipped = Path(data_dir("specs")) / "tuned"
    return (*users, shipped) if in_checkout() else (*users, _cached_folder(), shipped)


@functools.cache
def tuned_rows() -> dict[tuple[Problem, ArchName], tuple[TunedRow, ...]]:
    """All tuned rows of each problem on each architecture, in the order of the folders, then of the files.

    A file that is not as this `fa2gen tune` writes it (damaged, or a newer version's) is passed over with one warning,
    and so is what another user could have put into the cache. Read once: `tuned_rows.cache_clear()`.
    """
    found: dict[tuple[Problem, ArchName], tuple[TunedRow, ...]] = {}
    for path in (path for folder in tuned_folders() for path in _tuned_files(folder)):
        try:
            rows = read_tuned(path)
        except InvalidInput as error:
            warn_once(path, f"{error}; its tuned rows are passed over: remove it, or tune again")
            continue
        for row in rows:
            key = (row.spec.problem, row.spec.tiling.arch)
            found[key] = (*found.get(key, ()), row)
    return found


def _cached_folder() -> Path:
    return env.cache_dir() / "tuned"


def tuned_refusal(folder: Path) -> str:
    """Why rows in a folder are passed over: others can write the cache that it is in. "" where they are read."""
    for place in (folder.parent, folder) if folder == _cached_folder() else ():
        if why := distrust(place, own()):
            return f"tuned rows in {folder} are passed over: of {place}, {why}"
    return ""


def _tuned_files(folder: Path) -> list[Path]:
    if why := tuned_refusal(folder):
        warn_once(folder, why)
        return []
    return sorted(folder.glob("*.toml"))


def read_tuned(path: Path) -> list[TunedRow]:
    """The rows of one file of tuned rows. Raises InvalidInput naming the file, the row and its field."""
    try:
        table = _toml(read_file(path, own() if path.parent == _cached_folder() else None), str(path))
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from None
    _check_schema(table, str(path))
    rows = table.get("row", [])
    if not isinstance(rows, list) or not all(isinstance(fields, dict) for fields in rows):
        raise InvalidInput(f"{path}: row must be tables, [[row]]")
    return [_tuned_row(path, fields) for fields in rows]


def _tuned_row(path: Path, fields: dict[str, Any]) -> TunedRow:
    where = f"{path}: row {reprlib.repr(fields.get('kernel', '?'))}"
    expression = {name: fields[name] for name in NO_EXPRESSION if name in fields}
    try:
        if expression:  # its name is known from here on
            expression = Problem(head_dim=64, direction="bwd", **expression).model_dump(include=set(NO_EXPRESSION))
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None
    try:
        # JSON, in which pydantic takes lists and tables for tuples and dataclasses without taking text for numbers.
        row = _rows().validate_json(json.dumps({"seqlen_max": None} | fields, default=str), strict=True)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:4]]
        raise InvalidInput(f"{where}: {'; '.join(faults)}") from None
    except (ValueError, RecursionError) as error:  # a lone surrogate, tables in tables in tables
        raise InvalidInput(f"{where}: {error}") from None
    if row.spec.problem.model_dump(include=set(NO_EXPRESSION)) != NO_EXPRESSION | expression:
        raise InvalidInput(f"{where}: its name is that of another expression")
    lengths = {len(row.seqlens), len(row.tflops), len(row.tflops_default), len(row.tflops_runner_up)}
    if len(lengths) != 1 or not row.seqlens:
        raise InvalidInput(f"{where}: seqlens, tflops, tflops_default and tflops_runner_up must be of one length")
    if not all(isinstance(row.provenance.get(name), str) for name in ("gpu", "nvrtc")):
        raise InvalidInput(f"{where}: provenance must name gpu and nvrtc")
    if row.seqlen_max is not None and row.seqlen_max < row.seqlen_min:
        raise InvalidInput(f"{where}: seqlen_max is {row.seqlen_max}, less than seqlen_min, {row.seqlen_min}")
    return row


@functools.cache
def _rows() -> TypeAdapter[TunedRow]:
    return TypeAdapter(TunedRow)


# Both -----------------------------------------------------------------------------------------------------------------


def _toml(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{name}: more than {MAX_BYTES:,} bytes")
    try:
        return tomllib.loads(data.decode())
    except RecursionError:
        raise InvalidInput(f"{name}: nested too deeply") from None
    except ValueError as error:  # no UTF-8, no TOML, a number of more digits than Python reads
        raise InvalidInput(f"{name}: {error}") from None


def _check_schema(table: Mapping[str, Any], name: str) -> None:
    schema = table.get("schema")
    if schema != SCHEMA or not isinstance(schema, int) or isinstance(schema, bool):
        found = "no schema" if schema is None else f"schema {_shortened(schema)}"
        raise InvalidInput(f"{name}: {found}; this fa2gen reads those that say schema = {SCHEMA}")


def _shortened(value: Any) -> str:
    return reprlib.repr(value)

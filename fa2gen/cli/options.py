"""Which kernels a command is for: spec files, kernels' names or options, said in one way in all commands.

The options are made from the fields of `Problem`: a new field, or a new value of one, needs no word here.
"""

from __future__ import annotations

import glob
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from fa2gen.arch import ArchName
from fa2gen.errors import InvalidInput
from fa2gen.spec import Declared, Direction, KernelSpec, Problem, Tiling, declared

__all__ = ["Asked", "takes_kernels"]

TYPICAL = {"head_dim": 128}  # where a command takes one kernel and nothing is said; other fields have a default
FAMILIES: tuple[ArchName, ...] = declared(Tiling)["arch"].values
TYPICAL_FAMILY: ArchName = "sm90"
LONGEST_NUMBER = 20  # digits; Python reads no number of more than 4300

Base = Literal["catalogue", "typical", "preset", "none"]
"""What a command is for when nothing is said: the catalogue, one typical problem, a preset's points; or it must be."""


@dataclass(frozen=True)
class Chosen:
    """One problem of a request, and its kernel where one is named; else the family that is asked for, if one is."""

    problem: Problem
    spec: KernelSpec | None = None
    arch: ArchName | None = None

    def kernel(self) -> KernelSpec:
        """The kernel, the best one known where none is named."""
        from fa2gen.select import best_spec

        return self.spec or best_spec(self.problem, self.arch or TYPICAL_FAMILY)

    def of_families(self) -> list[Chosen]:
        """Itself, or one of each family where neither a kernel nor a family is named."""
        if self.spec or self.arch:
            return [self]
        return [Chosen(self.problem, arch=arch) for arch in FAMILIES]


@dataclass(frozen=True)
class Asked:
    """A request as it was typed.

    sources   spec files, "-" for standard input, kernels' names.
    fields    field of `Problem` -> the values that were given for it; not those that were not.
    arches    kernel families; () where none was given.
    settings  FIELD=VALUE of a tiling.
    """

    base: Base
    sources: Sequence[str] = ()
    fields: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    arches: Sequence[ArchName] = ()
    settings: Sequence[str] = ()

    def wanted(self) -> list[Chosen]:
        """What a command that looks at each problem by itself is for: of sources all, of options their product."""
        if self.sources:
            return list(self._from_sources())
        if self.base == "none" and not self.fields.get("head_dim"):
            raise typer.BadParameter("say which problems: --head-dim, a spec file or a kernel's name")
        given = {**{name: (value,) for name, value in TYPICAL.items()}, **self.fields}
        problems = _products(given)
        arches: Sequence[ArchName | None] = self.arches or (None,)
        found = [Chosen(problem, arch=arch) for arch in arches for problem in problems]
        if not self.settings:
            return found
        return [Chosen(one.problem, self._set(one.kernel()), one.arch) for one in found]

    def kernels(self) -> list[KernelSpec]:
        """What a command that takes many kernels is for: of sources all, else the catalogue, narrowed.

        Family by family, each direction by itself. Where the catalogue has nothing of what is asked for, kernels are
        made with the best tiling known, for those values of the open fields that the catalogue has at most head dims.
        """
        if self.sources:
            found = [each.kernel() for one in self._from_sources() for each in one.of_families()]
        else:
            found = list(self._from_catalogue())
        return list(dict.fromkeys(self._set(spec) for spec in found))

    def _from_sources(self) -> Iterator[Chosen]:
        given = [declared(Problem)[name].option for name, values in self.fields.items() if values]
        if given or self.settings:
            raise typer.BadParameter(f"give specs and names or options, not both: {', '.join(given or ['--set'])}")
        for source in self.sources:
            specs, named = _read(source)
            if named and self.arches:
                raise typer.BadParameter(f"give a kernel's name or options, not both: {source} and --arch")
            found = False
            for problem, tiling in specs:
                if tiling is not None and (not self.arches or tiling.arch in self.arches):
                    found = True
                    yield Chosen(problem, KernelSpec(problem=problem, tiling=tiling))
                elif tiling is None:
                    found = True
                    yield from (Chosen(problem, arch=arch) for arch in self.arches or (None,))
            if not found:
                raise InvalidInput(f"{source} has no tiling for {' or '.join(self.arches)}")

    def _from_catalogue(self) -> Iterator[KernelSpec]:
        directions: Sequence[Direction] = self.fields.get("direction") or declared(Problem)["direction"].values
        families = self.arches or FAMILIES
        known = {arch: _listed(arch) for arch in families}
        for arch, direction in itertools.product(families, directions):
            listed = [spec for spec in known[arch] if spec.problem.direction == direction]
            asked = {name: list(values) for name, values in self._of(direction, directions).items()}
            for combination in _combinations(asked):
                # As given, or of the default where it is a flag that is not.
                fixed = {**_flags_off(), **combination}
                narrowed = [
                    spec for spec in listed if all(getattr(spec.problem, name) == fixed[name] for name in fixed)
                ]
                if narrowed:
                    yield from narrowed
                    continue
                wanted = dict.fromkeys(Problem(**{**spec.problem.model_dump(), **fixed}) for spec in _usual(listed))
                yield from (Chosen(problem, arch=arch).kernel() for problem in wanted)

    def _of(self, direction: Direction, directions: Sequence[Direction]) -> dict[str, Sequence[Any]]:
        """The given values, without those of fields that another of the directions asked for has alone."""
        return {
            name: values
            for name, values in {**self.fields, "direction": (direction,)}.items()
            if not (only := declared(Problem)[name].only_for)
            or direction in only.directions
            or not set(only.directions) & set(directions)
        }

    def _set(self, spec: KernelSpec) -> KernelSpec:
        """The spec with the fields of its tiling that --set names. Raises InvalidInput for what cannot be."""
        tiling: dict[str, Any] = spec.tiling.model_dump()
        for setting in self.settings:
            name, _, value = setting.partition("=")
            if not value.removeprefix("-").isdecimal() or len(value) > LONGEST_NUMBER:
                raise typer.BadParameter(f"--set takes FIELD=VALUE with a whole number, not {setting[:60]!r}")
            tiling[name] = int(value)
        return KernelSpec(problem=spec.problem, tiling=Tiling(**tiling)) if self.settings else spec


def _read(source: str) -> tuple[list[tuple[Problem, Tiling | None]], bool]:
    """(problem, tiling) of each kernel that a source says, and whether it is a kernel's name."""
    from fa2gen.catalog import MAX_BYTES, catalogue, parse_spec, read_spec

    if source == "-":
        return [*parse_spec(sys.stdin.buffer.read(MAX_BYTES + 1), "standard input")], False
    if source.endswith(".toml") or os.sep in source:
        return [*read_spec(Path(source))], False
    catalogue()  # so that the expressions of its specs are known by their names
    spec = KernelSpec.from_name(source)
    return [(spec.problem, spec.tiling)], True


def _listed(arch: ArchName) -> list[KernelSpec]:
    """The catalogue's kernels of a family, then those that tuned rows lead to."""
    from fa2gen.catalog import catalogue, tuned_rows
    from fa2gen.select import served_by

    rows = [row for (_, family), found in tuned_rows().items() if family == arch for row in found]
    return list(dict.fromkeys([*catalogue(arch), *(spec for row in rows for spec in served_by(row))]))


def _usual(listed: Sequence[KernelSpec]) -> list[KernelSpec]:
    """The kernels whose dtype, mask and so on the catalogue has at half of its head dims or more."""
    head_dims: dict[Problem, set[int]] = {}

    def kind(spec: KernelSpec) -> Problem:
        return spec.problem.model_copy(update=TYPICAL)

    for spec in listed:
        head_dims.setdefault(kind(spec), set()).add(spec.problem.head_dim)
    known = {spec.problem.head_dim for spec in listed}
    return [spec for spec in listed if 2 * len(head_dims[kind(spec)]) >= len(known)]


def _products(given: Mapping[str, Sequence[Any]]) -> list[Problem]:
    return list(dict.fromkeys(Problem(**values) for values in _combinations(given)))


def _combinations(given: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    known = {name: values for name, values in given.items() if values}
    for values in itertools.product(*known.values()):
        yield dict(zip(known, values, strict=True))


def _flags_off() -> dict[str, Any]:
    """Of fields that are either set or not, and of texts."""
    return {name: about.default for name, about in declared(Problem).items() if about.is_flag or about.is_text}


# The options themselves ----------------------------------------------------------------------------------------------


def _open(name: str, base: Base) -> str:
    """What holds where the option is not given, for its help."""
    about = declared(Problem)[name]
    if base in ("catalogue", "preset"):
        return "Default: all." if base == "catalogue" else "Default: the preset's."
    default = TYPICAL.get(name, about.default)
    return "" if default is None or (base == "none" and name in TYPICAL) else f"Default: {default}."


def _option(about: Declared, base: Base) -> inspect.Parameter:
    if about.is_flag:
        kind: Any = bool
        info = typer.Option(about.option, help=about.help)
        default: Any = False
    else:
        kind = list[str] | None
        if not about.is_text:
            kind = list[int] | None if about.range else list[_choices(about)] | None  # type: ignore[misc]
        rule = f" {str(about.range).capitalize()}." if about.range else ""
        text = f"{about.help}{rule} May be repeated. {_open(about.name, base)}".strip()
        info = typer.Option(
            about.option,
            help=text,
            show_default=False,
            metavar="N" if about.range else "TEXT" if about.is_text else None,
        )
        default = None
    return _parameter(about.name, Annotated[kind, info], default)


def _completed(incomplete: str) -> list[str]:
    """What a shell proposes: folders and spec files that begin so, and names of the catalogue's kernels."""
    from fa2gen.catalog import catalogue

    paths = sorted(glob.glob(f"{glob.escape(incomplete)}*"))
    found = (f"{path}/" if os.path.isdir(path) else path for path in paths)
    names = sorted(spec.name for spec in catalogue()) if incomplete.startswith("fa2_") else []
    return [path for path in found if path.endswith((".toml", "/"))] + [n for n in names if n.startswith(incomplete)]


def _choices(about: Declared) -> type[StrEnum]:
    return StrEnum(about.name, {value: value for value in about.values})  # type: ignore[return-value]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameters(base: Base, tilings: bool) -> Iterator[inspect.Parameter]:
    yield _parameter(
        "sources",
        Annotated[
            list[str] | None,
            typer.Argument(
                metavar="SPEC.toml|NAME",
                help="Spec files, - for standard input, kernels' names; or options.",
                show_default=False,
                autocompletion=_completed,
            ),
        ],
        None,
    )
    for about in declared(Problem).values():
        yield _option(about, base)
    families = declared(Tiling)["arch"]
    text = f"{families.help} May be repeated."
    kind: Any = list[_choices(families)] | None  # type: ignore[misc]
    yield _parameter(
        "arch",
        Annotated[kind, typer.Option("--arch", help=text, show_default=False)],
        None,
    )
    if tilings:
        text = "A field of the tiling, e.g. tile_n=64, in place of the best known; may be repeated."
        yield _parameter(
            "settings",
            Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help=text, show_default=False)],
            None,
        )


def takes_kernels(base: Base, *, tilings: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command that takes an `Asked` first the arguments and options that say which kernels.

    base     what it is for when nothing is said.
    tilings  whether --set is among them.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = [item for item in inspect.signature(command).parameters.values() if item.name != "asked"]
        ours = list(_parameters(base, tilings))

        def run(**values: Any) -> None:
            given = {item.name: values.pop(item.name, None) for item in ours}
            command(_asked(base, given), **values)

        rest = [_parameter(item.name, hints[item.name], item.default) for item in own]
        run.__signature__ = inspect.Signature([*ours, *rest])  # type: ignore[attr-defined]
        run.__annotations__ = {item.name: item.annotation for item in (*ours, *rest)}
        run.__name__ = command.__name__
        return run

    return decorate


def _asked(base: Base, given: Mapping[str, Any]) -> Asked:
    def plain(value: Any) -> Any:
        return value.value if isinstance(value, StrEnum) else value

    def values_of(name: str) -> Iterable[Any]:
        about, value = declared(Problem)[name], given[name]
        return ((True,) if value else ()) if about.is_flag else (plain(item) for item in value or ())

    fields = {name: tuple(dict.fromkeys(values_of(name))) for name in declared(Problem)}
    return Asked(
        base=base,
        sources=tuple(given["sources"] or ()),
        fields={name: values for name, values in fields.items() if values},
        arches=tuple(dict.fromkeys(plain(item) for item in given["arch"] or ())),
        settings=tuple(given.get("settings") or ()),
    )

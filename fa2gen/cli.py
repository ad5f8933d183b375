"""The command line: `fa2gen`, `python -m fa2gen`, and `python cli.py` in a checkout.

What a command computes lives in the library; here are its options, its tables and its exit status. Everything heavy is
imported inside the command that needs it, so that `--help` is quick and `build` never imports torch.

With `--json`, standard output holds exactly one JSON document. Progress, notes and errors go to standard error.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum, StrEnum
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args

import typer
from typer.core import TyperGroup

from fa2gen import __version__
from fa2gen.arch import ArchName
from fa2gen.cli_measure import app as measure_app
from fa2gen.errors import Fa2GenError, InfeasibleSpec, InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from fa2gen.options import Shape
    from fa2gen.plan import KernelPlan
    from fa2gen.spec import Direction, DType, KernelSpec, Mask, Problem, Tiling
    from fa2gen.verify import Outcome

__all__ = ["ExitStatus", "app", "main"]


class ExitStatus(IntEnum):
    """What a script can tell from the exit status."""

    DONE = 0
    FAILED = 1
    USAGE = 2  # an option, a spec or a name that cannot be
    NOTHING_TO_RUN_ON = 3


class _Commands(TyperGroup):
    """Turns fa2gen's own errors, and the operating system's, into a message and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `fa2gen render ... | head`: typer ends quietly
        except (InvalidInput, InfeasibleSpec) as error:
            _fail(error, ExitStatus.USAGE)
        except (Fa2GenError, OSError) as error:
            _fail(error, ExitStatus.FAILED)


def _fail(error: Exception, status: ExitStatus) -> NoReturn:
    typer.echo(f"{type(error).__name__}: {error}", err=True)
    raise typer.Exit(status)


def _examples(*lines: str) -> str:
    """The epilog of a command's --help."""
    return "\n".join(("[bold]Examples[/]", *lines))


app = typer.Typer(
    name="fa2gen",
    cls=_Commands,
    help="Generate, build and check exact-attention CUDA kernels.",
    epilog=_examples(
        "fa2gen doctor                   what is here, what will be used",
        "fa2gen build --arch sm90        compile the catalogue; no GPU needed",
        "fa2gen render --head-dim 128    read a kernel",
        "fa2gen COMMAND --help           more of them",
    )
    + "\n\n[bold]Exit status[/]\n0 done, 1 something failed, 2 usage, 3 nothing here to run it on",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(
    help="The kernel cache: see, measure and empty it.",
    epilog=_examples("fa2gen cache list", "fa2gen cache clear"),
    no_args_is_help=True,
)
app.add_typer(cache_app, name="cache")
app.add_typer(measure_app)  # bench, tune, explain


class _ArchChoice(StrEnum):  # typer takes a Literal as one value, not as several
    sm80 = "sm80"
    sm90 = "sm90"


# Options that several commands share.
Arches = Annotated[
    list[_ArchChoice] | None, typer.Option("--arch", help="Kernel family; may be repeated. Default: all.")
]
HeadDims = Annotated[list[int] | None, typer.Option("--head-dim", help="Multiple of 8 up to 256; may be repeated.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Also gradients with the same bits in every run.")]
Directions = Annotated[Literal["fwd", "bwd", "both"], typer.Option("--direction", help="Which pass's kernels.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Name = Annotated[str | None, typer.Argument(help="A kernel's name, instead of options.", show_default=False)]
Arch = Annotated[ArchName | None, typer.Option(help="Kernel family. Default: sm90.")]
DirectionOption = Annotated[
    Literal["fwd", "bwd"] | None, typer.Option("--direction", help="Forward or backward. Default: fwd.")
]
HeadDim = Annotated[int | None, typer.Option(help="Multiple of 8 from 8 to 256. Default: 128.")]
DTypeOption = Annotated[Literal["fp16", "bf16"] | None, typer.Option("--dtype", help="Default: bf16.")]
MaskOption = Annotated[Literal["full", "causal"] | None, typer.Option("--mask", help="Default: full.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="A field of the tiling, e.g. tile_n=64; may be repeated."),
]


def main() -> NoReturn:
    """The console script."""
    app(prog_name="fa2gen")
    raise AssertionError("typer exits by itself")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fa2gen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    from fa2gen import env

    logging.basicConfig(level=env.log_level(), format="fa2gen: %(message)s")


# Printing


def _stdout() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    # Into a file or a pipe nothing is wrapped or cut off, whatever COLUMNS says.
    return console if console.is_terminal else Console(highlight=False, width=240)


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2))


def _print_table(titles: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """A plain table on standard output; a title that begins with ">" has its column to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for title in titles:
        table.add_column(title.removeprefix(">"), justify="right" if title.startswith(">") else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    _stdout().print(table)


def _note(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def _progress(verb: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error, where that is a terminal; the body calls what this yields once a step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda name: bar.update(task, advance=1, description=name)


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count:,} B"


# Which kernels


def _one_spec(
    name: str | None,
    arch: ArchName | None = None,
    direction: Direction | None = None,
    head_dim: int | None = None,
    dtype: DType | None = None,
    mask: Mask | None = None,
    overrides: list[str] | None = None,
) -> KernelSpec:
    """The kernel that a name or the options ask for; what they leave open is as in specs/, or else the default."""
    from fa2gen.spec import KernelSpec, Problem, Tiling

    if name is not None:
        if overrides or any(option is not None for option in (arch, direction, head_dim, dtype, mask)):
            raise typer.BadParameter("give a kernel's name or options, not both")
        return KernelSpec.from_name(name)
    problem = Problem(
        direction=direction or "fwd",
        head_dim=128 if head_dim is None else head_dim,
        dtype=dtype or "bf16",
        mask=mask or "full",
    )
    tiling = _tiling(problem, arch or "sm90").model_dump()
    for override in overrides or ():
        field, _, value = override.partition("=")
        if not value.removeprefix("-").isdecimal():
            raise typer.BadParameter(f"--set takes FIELD=VALUE with a whole number, not {override!r}")
        tiling[field] = int(value)
    return KernelSpec(problem=problem, tiling=Tiling(**tiling))


def _tiling(problem: Problem, arch: ArchName) -> Tiling:
    from fa2gen.catalog import tuned_rows, written_tilings
    from fa2gen.select import default_tiling

    for row in tuned_rows().get((problem, arch), ()):
        return row.spec.tiling
    return written_tilings().get((problem, arch)) or default_tiling(problem, arch)


def _specs(
    arches: list[_ArchChoice] | None,
    head_dims: list[int] | None,
    asked: Literal["fwd", "bwd", "both"],
    deterministic: bool,
) -> list[KernelSpec]:
    """The kernels of specs/, families and tuned rows, narrowed; a head dim that it lacks is taken with its defaults.

    Family by family, each forward first; of deterministic gradients only if asked for. Raises InvalidInput where no
    family that is asked for has that pass.
    """
    from fa2gen.arch import ARCHES
    from fa2gen.catalog import catalogue, tuned_rows
    from fa2gen.plan import directions
    from fa2gen.select import served_by
    from fa2gen.spec import DType, KernelSpec, Mask, Problem

    specs: list[KernelSpec] = []
    families = [arch for arch in ARCHES if not arches or arch in arches]
    chosen = [(arch, way) for arch in families for way in directions(arch) if asked in (way, "both")]
    if not chosen:
        others = " and ".join(arch for arch in ARCHES if asked in directions(arch))
        raise InvalidInput(f"{' and '.join(families)} has no {asked} kernels; {others} has")
    for arch, direction in chosen:
        rows = [row for (_, family), found in tuned_rows().items() if family == arch for row in found]
        tuned = [spec for row in rows for spec in served_by(row)]
        listed = [
            spec
            for spec in dict.fromkeys([*catalogue(arch), *tuned])
            if spec.problem.direction == direction and (deterministic or not spec.problem.deterministic)
        ]
        modes = (False, True) if deterministic and direction == "bwd" else (False,)
        if not head_dims:
            specs += listed
        for head_dim in dict.fromkeys(head_dims or ()):
            specs += [spec for spec in listed if spec.problem.head_dim == head_dim] or [
                KernelSpec(problem=problem, tiling=_tiling(problem, arch))
                for dtype in get_args(DType)
                for mask in get_args(Mask)
                for mode in modes
                for problem in [
                    Problem(direction=direction, head_dim=head_dim, dtype=dtype, mask=mask, deterministic=mode)
                ]
            ]
    return specs


# Looking: render, plan, list


@app.command(
    epilog=_examples(
        "fa2gen render --head-dim 128 --mask causal > kernel.cu",
        "fa2gen render --arch sm80 --head-dim 64 --dtype fp16 --set tile_n=64",
        "fa2gen render --head-dim 128 --direction bwd",
        "fa2gen render fa2_fwd_sm90_bf16_d128_m128_n128_s2_w8 --origins",
        "fa2gen render --head-dim 128 --target cpu    the same, for a C++ compiler",
    )
)
def render(
    name: Name = None,
    arch: Arch = None,
    direction: DirectionOption = None,
    head_dim: HeadDim = None,
    dtype: DTypeOption = None,
    mask: MaskOption = None,
    overrides: Overrides = None,
    target: Annotated[Literal["cuda", "cpu"], typer.Option(help="Which compiler it is for.")] = "cuda",
    origins: Annotated[bool, typer.Option("--origins", help="Show which template line each line came from.")] = False,
) -> None:
    """Print a kernel's source."""
    from fa2gen.plan import make_plan
    from fa2gen.render import render as render_plan

    rendered = render_plan(make_plan(_one_spec(name, arch, direction, head_dim, dtype, mask, overrides)), target)
    lines = rendered.source.splitlines()
    if origins:
        width = max(map(len, rendered.origins))
        lines = [f"{o:<{width}}  {line}".rstrip() for o, line in zip(rendered.origins, lines, strict=True)]
    typer.echo("\n".join(lines))


@app.command(
    epilog=_examples(
        "fa2gen plan --head-dim 256                    what fits; the default is first",
        "fa2gen plan --head-dim 256 --set tile_n=128   why this does not fit",
        "fa2gen plan fa2_fwd_sm90_bf16_d128_m128_n128_s2_w8",
        "fa2gen plan --head-dim 128 --direction bwd",
        "fa2gen plan --arch sm80 --head-dim 64 --json",
    )
)
def plan(
    name: Name = None,
    arch: Arch = None,
    direction: DirectionOption = None,
    head_dim: HeadDim = None,
    dtype: DTypeOption = None,
    mask: MaskOption = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show what fits and why.

    All feasible tilings of a problem; or, for one kernel, its numbers or every rule that it breaks.
    """
    from fa2gen.plan import feasible_tilings, make_plan
    from fa2gen.spec import KernelSpec

    chosen = _one_spec(name, arch, direction, head_dim, dtype, mask, overrides)
    specs = [chosen]
    if name is None and not overrides:
        fits = feasible_tilings(chosen.problem, chosen.tiling.arch)
        specs += [KernelSpec(problem=chosen.problem, tiling=tiling) for tiling in fits if tiling != chosen.tiling]
    rows = [_plan_row(make_plan(spec)) for spec in specs]
    if as_json:
        _print_json(rows)
        return
    _print_table(
        ("kernel", ">threads", ">registers (estimate)", ">shared memory", ">of"),
        (
            (
                row["name"],
                row["num_threads"],
                row["register_estimate"] or "-",
                _bytes(row["shared_memory_bytes"]),
                _bytes(row["shared_memory_limit"]),
            )
            for row in rows
        ),
    )
    if len(rows) > 1:
        _note(f"{len(rows)} tilings fit; the first is the default")


def _plan_row(plan: KernelPlan) -> dict[str, Any]:
    from fa2gen.arch import ARCHES

    return {
        "name": plan.name,
        **plan.problem.model_dump(),
        **plan.tiling.model_dump(),
        "num_threads": plan.num_threads,
        # Of a thread that multiplies; what ptxas makes of it is in `fa2gen build`.
        "register_estimate": getattr(plan, "register_estimate", None),
        "shared_memory_bytes": plan.shared_memory_bytes,
        "shared_memory_limit": ARCHES[plan.tiling.arch].shared_memory_per_block,
    }


@app.command(
    "list",
    epilog=_examples(
        "fa2gen list                             the whole catalogue",
        "fa2gen list --arch sm90 --head-dim 128",
        "fa2gen list --direction bwd",
        "fa2gen list --json | jq -r '.[] | select(.cached | not).name'",
    ),
)
def list_kernels(
    arch: Arches = None,
    direction: Directions = "both",
    deterministic: Deterministic = False,
    head_dim: HeadDims = None,
    as_json: AsJson = False,
) -> None:
    """List the catalogue, and what of it is in the cache."""
    from fa2gen.compile import plan_unit
    from fa2gen.plan import make_plan
    from fa2gen.store import Store, key_of

    store = Store()
    rows = []
    for spec in _specs(arch, head_dim, direction, deterministic):
        entry = store.try_load(key_of(plan_unit(make_plan(spec))))
        rows.append({**_identity(spec), "cached": entry is not None})
    if as_json:
        _print_json(rows)
        return
    _print_table(("kernel", "cached"), ((row["name"], "yes" if row["cached"] else "no") for row in rows))
    _note(f"{len(rows)} kernels, {sum(row['cached'] for row in rows)} of them in {store.root}")


def _identity(spec: KernelSpec) -> dict[str, Any]:
    problem = spec.problem
    return {
        "name": spec.name,
        "arch": spec.tiling.arch,
        "direction": problem.direction,
        "head_dim": problem.head_dim,
        "dtype": problem.dtype,
        "mask": problem.mask,
    }


# Doing: build, verify


@app.command(
    epilog=_examples(
        "fa2gen build --arch sm90                   the catalogue, into the cache",
        "fa2gen build --arch sm90 --direction fwd   without the backward kernels",
        "fa2gen build --head-dim 40                 default tilings, if it has none",
        "fa2gen build --arch sm90 --out kernels     a folder for FA2GEN_AOT_DIR",
        "fa2gen build --json | jq '.[] | select(.spill_bytes > 0)'",
    )
)
def build(
    arch: Arches = None,
    direction: Directions = "both",
    deterministic: Deterministic = False,
    head_dim: HeadDims = None,
    out: Annotated[Path | None, typer.Option(help="Also put the kernels into this folder.", show_default=False)] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Kernels compiled at once. Default: the cores.")] = None,
    target: Annotated[str | None, typer.Option(help="NVRTC target, e.g. sm_90 for sm80 kernels on an H100.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile kernels; no GPU needed.

    The catalogue, or the head dims asked for in every dtype and mask; forward and backward kernels. What is compiled
    already is not compiled again.
    """
    from fa2gen.build import build as build_all

    specs = _specs(arch, head_dim, direction, deterministic)
    started = time.perf_counter()
    with _progress("building", len(specs)) as advance:
        results = build_all(specs, out, jobs, target=target, progress=lambda result: advance(result.name))
    seconds = time.perf_counter() - started
    if as_json:
        _print_json([result.to_json() for result in results])
    else:
        _print_table(
            ("kernel", ">registers", ">spills", ">shared memory", ">seconds", ""),
            (
                (
                    result.name,
                    result.registers,
                    _bytes(result.spill_bytes),
                    _bytes(result.shared_memory_bytes),
                    f"{result.compile_seconds:.2f}",
                    "cached" if result.cached else "",
                )
                for result in results
                if not result.error
            ),
        )
    failed = [result for result in results if result.error]
    for result in results:
        for note in result.notes:
            _note(f"{result.name}: {note}")
    for result in failed:
        _note(f"\n{result.error}")
    cached = sum(result.cached for result in results)
    _note(
        f"{len(results) - len(failed)} kernels in {seconds:.1f} s ({cached} from the cache)"
        + (f", in {out}" if out else "")
        + (f"; {len(failed)} failed" if failed else "")
    )
    if failed:
        raise typer.Exit(ExitStatus.FAILED)


@app.command(
    epilog=_examples(
        "fa2gen verify                          the catalogue, on the GPU",
        "fa2gen verify --arch sm80 --head-dim 64",
        "fa2gen verify fa2_fwd_sm90_bf16_d128_m128_n128_s2_w8",
        "fa2gen verify --direction bwd          gradients only",
        "fa2gen verify --on cpu                the same kernels on the CPU",
        "fa2gen verify --on cpu --head-dim 64 --stats   and what they moved",
        "fa2gen verify --json | jq 'all(.ok)'",
    )
)
def verify(
    name: Name = None,
    arch: Arches = None,
    direction: Directions = "both",
    deterministic: Deterministic = False,
    head_dim: HeadDims = None,
    place: Annotated[Literal["gpu", "cpu"], typer.Option("--on", help="Where to run the kernels.")] = "gpu",
    stats: Annotated[bool, typer.Option("--stats", help="Count what each primitive moves; on the CPU.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run kernels and compare them with attention in fp32, or with its gradients.

    Each at several shapes: max and mean error against PyTorch's own in the same dtype, LSE, and writes out of bounds.
    """
    from fa2gen import verify as verification

    if name and (arch or head_dim or direction != "both"):
        raise typer.BadParameter("give a kernel's name or options, not both")
    if stats and place != "cpu":
        raise typer.BadParameter("--stats counts what kernels do on the CPU: add --on cpu")
    specs = [_one_spec(name)] if name else _specs(arch, head_dim, direction, deterministic)
    why = verification.nothing_to_run_on(place)
    if not why:
        specs = [spec for spec in specs if verification.runnable(spec.tiling.arch, place)]
        why = None if specs else "the device here runs none of these kernels"
    if why:
        if as_json:
            _print_json([])
        _note(f"nothing verified: {why}")
        raise typer.Exit(ExitStatus.NOTHING_TO_RUN_ON)

    outcomes = []
    with _progress("verifying", len(specs) * len(verification.SHAPES[place])) as advance:
        for outcome in verification.verify(specs, place, stats=stats):
            outcomes.append(outcome)
            advance(outcome.name)
    failed = [outcome for outcome in outcomes if not outcome.ok]
    if as_json:
        _print_json([outcome.to_json() for outcome in outcomes])
    else:
        _print_verdicts(outcomes)
        if stats:
            _print_counts(outcomes)
    _note(f"{len(specs)} kernels, {len(outcomes)} checks: " + (f"{len(failed)} WRONG" if failed else "all right"))
    if failed:
        raise typer.Exit(ExitStatus.FAILED)


def _print_verdicts(outcomes: list[Outcome]) -> None:
    """Each kernel's worst shape, by how much of the allowance it takes; every shape of a kernel that fails."""

    def share(outcome: Outcome) -> float:
        if outcome.error or outcome.max_error is None or outcome.mean_error is None:
            return math.inf
        return max(outcome.max_error / (outcome.max_allowed or 1), outcome.mean_error / (outcome.mean_allowed or 1))

    def row(outcome: Outcome) -> tuple[str, ...]:
        sizes = _sizes(outcome.shape)
        if outcome.max_error is None:
            return (outcome.name, sizes, "-", "-", "-", "-", f"WRONG: {outcome.error}")
        errors = (outcome.max_error, outcome.max_allowed, outcome.mean_error, outcome.mean_allowed)
        return (outcome.name, sizes, *(f"{error:.2e}" for error in errors), "ok" if outcome.ok else "WRONG")

    shown = []
    for _, of_kernel in groupby(outcomes, key=lambda outcome: outcome.name):
        group = list(of_kernel)
        shown += [outcome for outcome in group if not outcome.ok] or [max(group, key=share)]
    titles = ("kernel", "worst shape (batch x queries x keys)", ">max", ">allowed", ">mean", ">allowed", "")
    _print_table(titles, map(row, shown))


def _print_counts(outcomes: list[Outcome]) -> None:
    """What each kernel's primitives moved at its largest shape."""
    from fa2gen.cpu import counts_table

    for name, of_kernel in groupby(outcomes, key=lambda outcome: outcome.name):
        largest = max(of_kernel, key=lambda o: o.shape.batch * o.shape.num_heads * o.shape.seqlen_q * o.shape.seqlen_k)
        typer.echo(f"\n{name}, {_sizes(largest.shape)}\n{counts_table(largest.counts)}")


def _sizes(shape: Shape) -> str:
    return f"{shape.batch} x {shape.seqlen_q} x {shape.seqlen_k}, heads {shape.num_heads}:{shape.num_heads_kv}"


# The cache


@cache_app.command("dir", epilog=_examples("ls $(fa2gen cache dir)"))
def cache_dir() -> None:
    """Print the cache's folder."""
    from fa2gen import env

    typer.echo(env.cache_dir())


@cache_app.command("list", epilog=_examples("fa2gen cache list", "fa2gen cache list --json | jq length"))
def cache_list(as_json: AsJson = False) -> None:
    """List the kernels in the cache."""
    from fa2gen.store import Store

    store = Store()
    entries = store.list()
    if as_json:
        _print_json([dict(entry.meta) for entry in entries])
        return
    _print_table(
        ("kernel", "target", "compiler", ">registers", ">spills", ">shared memory"),
        (
            (
                entry.name,
                entry.meta["target"],
                entry.meta["compiler"],
                entry.report.registers,
                _bytes(entry.report.spill_bytes),
                _bytes(entry.report.shared_memory_bytes),
            )
            for entry in entries
        ),
    )
    _note(f"{len(entries)} kernels in {store.root}")


@cache_app.command("size", epilog=_examples("fa2gen cache size", "fa2gen cache size --json"))
def cache_size(as_json: AsJson = False) -> None:
    """Print how much the cache holds."""
    from fa2gen.store import Store

    store = Store()
    kernels, size = len(store.list()), store.size()
    if as_json:
        _print_json({"dir": str(store.root), "kernels": kernels, "bytes": size})
    else:
        typer.echo(f"{kernels} kernels, {_bytes(size)}, in {store.root}")


@cache_app.command("clear", epilog=_examples("fa2gen cache clear"))
def cache_clear() -> None:
    """Remove every kernel from the cache; they are compiled again when needed."""
    from fa2gen.store import Store

    store = Store()
    size = store.size()
    _note(f"{store.clear()} kernels ({_bytes(size)}) removed from {store.root}")


# This machine


@app.command(epilog=_examples("fa2gen doctor", "fa2gen doctor --json > doctor.json     to attach to a report"))
def doctor(as_json: AsJson = False) -> None:
    """Show what is here, and which kernels will be used.

    Driver, NVRTC, torch, GPU, cache, environment. Status 1 when something keeps fa2gen from working.
    """
    from fa2gen.doctor import lines, report

    found = report()
    if as_json:
        _print_json(found)
    else:
        for label, text in lines(found):
            typer.echo(f"{label:<16}  {text}")
    if found["problems"]:
        raise typer.Exit(ExitStatus.FAILED)

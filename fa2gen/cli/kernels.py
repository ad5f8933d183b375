"""The commands that show kernels and make them: `render`, `plan`, `list`, `build`, `verify` and `spec-schema`."""

from __future__ import annotations

import math
import time
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fa2gen.cli.console import (
    AsJson,
    ExitStatus,
    bytes_text,
    count_text,
    examples,
    need_folder,
    note,
    print_json,
    print_table,
    progress,
)
from fa2gen.cli.options import Asked, takes_kernels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fa2gen.plan import KernelPlan
    from fa2gen.spec import KernelSpec
    from fa2gen.verify import Outcome

__all__ = ["app"]

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)

NAME = "fa2_fwd_sm90_bf16_d128_m128_n128_s2_w8"

Target = Annotated[str | None, typer.Option(help="NVRTC target, e.g. sm_90 for sm80 kernels on an H100.")]


# Looking: render, plan, list, spec-schema


@app.command(
    help="Print kernels' sources, one after the other.",
    epilog=examples(
        "fa2gen render --head-dim 128 --mask causal > kernel.cu",
        "fa2gen render --arch sm80 --head-dim 64 --dtype fp16 --set tile_n=64",
        "fa2gen render --head-dim 128 --direction bwd",
        "fa2gen render my.toml",
        f"fa2gen render {NAME} --origins",
        "fa2gen render --head-dim 128 --target cpu    the same, for a C++ compiler",
        "fa2gen render --head-dim 128 --with-host     with a launcher in C++",
    ),
)
@takes_kernels("typical")
def render(
    asked: Asked,
    target: Annotated[Literal["cuda", "cpu"], typer.Option(help="Which compiler it is for.")] = "cuda",
    origins: Annotated[bool, typer.Option("--origins", help="Show which template line each line came from.")] = False,
    with_host: Annotated[bool, typer.Option("--with-host", help="Add a launcher in C++ (driver API).")] = False,
) -> None:
    from fa2gen.plan import make_plan
    from fa2gen.render import render as render_plan
    from fa2gen.render import render_launcher

    if with_host and target == "cpu":
        raise typer.BadParameter("--with-host adds a launcher for a GPU's kernel: leave --target cpu out")
    plans = [make_plan(one.kernel()) for one in asked.wanted()]
    parts = [
        part for plan in plans for part in (render_plan(plan, target), *([render_launcher(plan)] if with_host else []))
    ]
    for rendered in parts:
        lines = rendered.source.splitlines()
        if origins:
            width = max(map(len, rendered.origins))
            lines = [f"{o:<{width}}  {line}".rstrip() for o, line in zip(rendered.origins, lines, strict=True)]
        typer.echo("\n".join(lines))


@app.command(
    help="Show what fits and why.\n\nAll feasible tilings of a problem, the default first; of a kernel that is named "
    "its numbers, or every rule that it breaks.",
    epilog=examples(
        "fa2gen plan --head-dim 256                    what fits; the default is first",
        "fa2gen plan --head-dim 256 --set tile_n=128   why this does not fit",
        f"fa2gen plan {NAME}",
        "fa2gen plan --head-dim 128 --direction bwd",
        "fa2gen plan --arch sm80 --head-dim 64 --json",
        "fa2gen plan --arch sm80 --head-dim 256 --target sm_86",
        "fa2gen plan my.toml",
    ),
)
@takes_kernels("typical")
def plan(asked: Asked, target: Target = None, as_json: AsJson = False) -> None:
    from fa2gen.arch import ARCHES
    from fa2gen.plan import feasible_tilings, make_plan
    from fa2gen.spec import KernelSpec

    wanted = [(one, one.kernel()) for one in asked.wanted()]
    if target is not None:
        _check_target(target, [chosen for _, chosen in wanted])
    rows = []
    for one, chosen in wanted:
        arch = ARCHES[chosen.tiling.arch]
        limit = arch.targets[target or arch.target]
        specs = [chosen]
        if one.spec is None:
            fits = feasible_tilings(chosen.problem, arch.name, limit)
            others = (KernelSpec(problem=chosen.problem, tiling=tiling) for tiling in fits)
            specs = list(dict.fromkeys((chosen, *others)))
            note(f"{chosen.problem.text}: {count_text(len(specs), 'tiling')} fit; the first is the default")
        rows += [_plan_row(make_plan(spec, limit)) for spec in specs]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("kernel", ">threads", ">registers (estimate)", ">shared memory", ">of"),
        [
            (
                row["name"],
                row["num_threads"],
                row["register_estimate"] or "-",
                bytes_text(row["shared_memory_bytes"]),
                bytes_text(row["shared_memory_limit"]),
            )
            for row in rows
        ],
    )


def _plan_row(plan: KernelPlan) -> dict[str, Any]:
    return {
        **plan.spec.row(),
        **plan.tiling.model_dump(),
        "num_threads": plan.num_threads,
        # Of a thread that multiplies; what ptxas makes of it is in `fa2gen build`.
        "register_estimate": getattr(plan, "register_estimate", None),
        "shared_memory_bytes": plan.shared_memory_bytes,
        "shared_memory_limit": plan.shared_memory_available,
    }


@app.command(
    "list",
    help="List the catalogue, or what specs say, and what of it is in the cache.",
    epilog=examples(
        "fa2gen list                             the whole catalogue",
        "fa2gen list --arch sm90 --head-dim 128",
        "fa2gen list --direction bwd --deterministic",
        "fa2gen list my.toml",
        "fa2gen list --json | jq -r '.[] | select(.cached | not).name'",
    ),
)
@takes_kernels("catalogue")
def list_kernels(asked: Asked, as_json: AsJson = False) -> None:
    from fa2gen.compile import plan_unit
    from fa2gen.plan import make_plan
    from fa2gen.store import Store, key_of

    store = Store()
    there = store.names()  # a key needs the rendered source, 50 ms a kernel
    rows = []
    for spec in asked.kernels():
        cached = spec.name in there and store.try_load(key_of(plan_unit(make_plan(spec)))) is not None
        rows.append({**spec.row(), "cached": cached})
    if as_json:
        print_json(rows)
        return
    print_table(("kernel", "cached"), [(row["name"], "yes" if row["cached"] else "no") for row in rows])
    note(f"{count_text(len(rows), 'kernel')}, {sum(row['cached'] for row in rows)} of them in {store.root}")


@app.command(
    "spec-schema",
    help="Print the JSON schema of spec files, by which editors complete and check them.",
    epilog=examples(
        "fa2gen spec-schema > fa2gen.schema.json    then, as a spec's first line:",
        "#:schema ./fa2gen.schema.json",
    ),
)
def spec_schema() -> None:
    from fa2gen.catalog import spec_schema as schema

    print_json(schema())


# Doing: build, verify


@app.command(
    help="Compile kernels; no GPU needed.\n\nThe catalogue, narrowed by options, or what specs say. What is compiled "
    "already is not compiled again.",
    epilog=examples(
        "fa2gen build --arch sm90                   the catalogue, into the cache",
        "fa2gen build --arch sm90 --direction fwd   without the backward kernels",
        "fa2gen build --head-dim 40 --dtype bf16    default tilings, if it has none",
        "fa2gen build my.toml --out kernels         a folder for FA2GEN_AOT_DIR",
        "fa2gen build --json | jq '.[] | select(.spill_bytes > 0)'",
    ),
)
@takes_kernels("catalogue")
def build(
    asked: Asked,
    out: Annotated[Path | None, typer.Option(help="Also put the kernels into this folder.", show_default=False)] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Kernels compiled at once. Default: the cores.")] = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    from fa2gen.build import build as build_all

    specs = asked.kernels()
    if target is not None:
        _check_target(target, specs)
    if out is not None:
        need_folder("--out", out)
    started = time.perf_counter()
    with progress("building", len(specs)) as advance:
        results = build_all(specs, out, jobs, target=target, progress=lambda result: advance(result.name))
    seconds = time.perf_counter() - started
    if as_json:
        print_json([result.to_json() for result in results])
    else:
        print_table(
            ("kernel", ">registers", ">spills", ">shared memory", ">seconds", ""),
            [
                (
                    result.name,
                    result.registers,
                    bytes_text(result.spill_bytes),
                    bytes_text(result.shared_memory_bytes),
                    f"{result.compile_seconds:.2f}",
                    "cached" if result.cached else "",
                )
                for result in results
                if not result.error
            ],
        )
    failed = [result for result in results if result.error]
    for result in results:
        for text in result.notes:
            note(f"{result.name}: {text}")
    for result in failed:
        note(f"\n{result.error}")
    cached = sum(result.cached for result in results)
    lost = sum(not result.kept and not result.error for result in results)
    note(
        f"{count_text(len(results) - len(failed), 'kernel')} in {seconds:.1f} s ({cached} from the cache)"
        + (f", in {out}" if out else "")
        + (f"; {len(failed)} failed" if failed else "")
        + (f"; {lost} could not be kept" if lost else "")
    )
    if failed or lost:
        raise typer.Exit(ExitStatus.FAILED)


def _check_target(target: str, specs: Sequence[KernelSpec]) -> None:
    """Raises BadParameter for a target that a family's cubins cannot be made for, or that no device here would load."""
    from fa2gen.arch import ARCHES

    for arch in dict.fromkeys(spec.tiling.arch for spec in specs):
        if target not in (targets := ARCHES[arch].targets):
            raise typer.BadParameter(f"--target {target} is none of {arch} kernels, which have {', '.join(targets)}")


@app.command(
    help="Run kernels and compare them with attention in fp32, or with its gradients.\n\nEach at several shapes: max "
    "and mean error against PyTorch's own in the same dtype, LSE, and writes out of bounds.",
    epilog=examples(
        "fa2gen verify                          the catalogue, on the GPU",
        "fa2gen verify --arch sm80 --head-dim 64",
        f"fa2gen verify {NAME}",
        "fa2gen verify --direction bwd          gradients only",
        "fa2gen verify my.toml --on cpu         the same kernels on the CPU",
        "fa2gen verify --on cpu --head-dim 64 --stats   and what they moved",
        "fa2gen verify --json | jq 'all(.ok)'",
    ),
)
@takes_kernels("catalogue")
def verify(
    asked: Asked,
    place: Annotated[Literal["gpu", "cpu"], typer.Option("--on", help="Where to run the kernels.")] = "gpu",
    stats: Annotated[bool, typer.Option("--stats", help="Count what each primitive moves; on the CPU.")] = False,
    as_json: AsJson = False,
) -> None:
    from fa2gen import verify as verification

    if stats and place != "cpu":
        raise typer.BadParameter("--stats counts what kernels do on the CPU: add --on cpu")
    specs = asked.kernels()
    why = verification.nothing_to_run_on(place)
    if not why:
        specs = [spec for spec in specs if verification.runnable(spec.tiling.arch, place)]
        why = None if specs else "the device here runs none of these kernels"
    if why:
        if as_json:
            print_json([])
        note(f"nothing verified: {why}")
        raise typer.Exit(ExitStatus.NOTHING_TO_RUN_ON)

    outcomes = []
    with progress("verifying", len(verification.checks(specs, place))) as advance:
        for outcome in verification.verify(specs, place, stats=stats):
            outcomes.append(outcome)
            advance(outcome.name)
    failed = [outcome for outcome in outcomes if not outcome.ok]
    if as_json:
        print_json([outcome.to_json() for outcome in outcomes])
    else:
        _print_verdicts(outcomes)
        if stats:
            _print_counts(outcomes)
    verdict = f"{len(failed)} WRONG" if failed else "all right"
    note(f"{count_text(len(specs), 'kernel')}, {count_text(len(outcomes), 'check')}: {verdict}")
    if failed:
        raise typer.Exit(ExitStatus.FAILED)


def _print_verdicts(outcomes: Sequence[Outcome]) -> None:
    """Each kernel's worst shape, by how much of the allowance it takes; every shape of a kernel that fails."""

    def share(outcome: Outcome) -> float:
        if outcome.error or outcome.max_error is None or outcome.mean_error is None:
            return math.inf
        return max(outcome.max_error / (outcome.max_allowed or 1), outcome.mean_error / (outcome.mean_allowed or 1))

    def row(outcome: Outcome) -> tuple[str, ...]:
        sizes = _sizes(outcome)
        if outcome.max_error is None:
            return (outcome.name, f"WRONG: {outcome.error}", sizes, "-", "-", "-", "-")
        errors = (outcome.max_error, outcome.max_allowed, outcome.mean_error, outcome.mean_allowed)
        return (outcome.name, "ok" if outcome.ok else "WRONG", sizes, *(f"{error:.2e}" for error in errors))

    shown = []
    for _, of_kernel in groupby(outcomes, key=lambda outcome: outcome.name):
        group = list(of_kernel)
        shown += [outcome for outcome in group if not outcome.ok] or [max(group, key=share)]
    titles = ("kernel", "", "worst shape (batch x queries x keys)", ">max", ">allowed", ">mean", ">allowed")
    print_table(titles, [row(outcome) for outcome in shown])


def _print_counts(outcomes: Sequence[Outcome]) -> None:
    """What each kernel's primitives moved at its largest shape."""
    from fa2gen.cpu import counts_table

    for name, of_kernel in groupby(outcomes, key=lambda outcome: outcome.name):
        largest = max(of_kernel, key=lambda o: o.shape.batch * o.shape.num_heads * o.shape.seqlen_q * o.shape.seqlen_k)
        typer.echo(f"\n{name}, {_sizes(largest)}\n{counts_table(largest.counts)}")


def _sizes(outcome: Outcome) -> str:
    """Lengths and heads, and those numbers of the call that the kernel's name leaves open."""
    shape, plain = outcome.shape, type(outcome.options)()
    given = outcome.options._asdict().items() - plain._asdict().items()
    numbers = [f"{name} {value}" for name, value in sorted(given) if not isinstance(value, bool)]
    sizes = f"{shape.batch} x {shape.seqlen_q} x {shape.seqlen_k}, heads {shape.num_heads}:{shape.num_heads_kv}"
    return ", ".join((sizes, *numbers))

"""The commands that measure, and the one that says what measurements decide: `bench`, `tune` and `explain`."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fa2gen.arch import ArchName
from fa2gen.cli.console import (
    SECONDS_BETWEEN_LINES,
    AsJson,
    ExitStatus,
    GpuWords,
    Seqlen,
    Seqlens,
    count_text,
    examples,
    need_folder,
    note,
    print_json,
    print_pairs,
    print_row,
    print_table,
)
from fa2gen.cli.options import TYPICAL_FAMILY, Asked, takes_kernels

if TYPE_CHECKING:
    from fa2gen.bench.points import Point
    from fa2gen.spec import KernelSpec, Problem
    from fa2gen.tune.batch import Outcome
    from fa2gen.tune.search import Progress

__all__ = ["app"]

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)


def _command() -> str:
    """This command as it can be typed elsewhere: no folder of this machine in it."""
    words = [os.path.basename(word) if os.sep in word else word for word in sys.argv[1:]]
    return shlex.join(["fa2gen", *words])


def _need_gpu(what: str) -> None:
    """Ends with status 3 where nothing can be measured."""
    if find_spec("torch") is None:
        why = "torch is not installed"
    else:
        import torch

        if torch.cuda.is_available():
            return
        why = "there is no NVIDIA GPU here"
    note(f"{what}: {why}")
    raise typer.Exit(ExitStatus.NOTHING_TO_RUN_ON)


# bench


@app.command(
    help="Measure fa2gen beside its peers, all in the same run, or draw what was measured.\n\nWith specs or "
    "kernels' names those kernels, at the lengths of the paper.",
    epilog=examples(
        "fa2gen bench                            the paper's grid, beside every peer",
        "fa2gen bench --direction bwd            gradients alone",
        "fa2gen bench --preset odd --peer fa3 --fa3-library fa3.so --save odd.json",
        "fa2gen bench --head-dim 128 --seqlen 4096 --json | jq .rows",
        "fa2gen bench my.toml --peer fa3         what a spec of your own says",
        "fa2gen bench --preset varlen            ragged batches",
        "fa2gen bench --preset decode            queries over caches",
        "fa2gen bench --preset prefill           prompts and chunks of them over pages",
        "fa2gen bench --preset flex              scores and masks of expressions",
        "fa2gen bench --preset host              host time of a call, in microseconds",
        "fa2gen bench --plot odd.json --out .    figures from a result; needs no GPU",
    ),
)
@takes_kernels("preset", tilings=False)
def bench(
    asked: Asked,
    preset: Annotated[
        Literal["paper", "odd", "gqa", "sharded", "window", "varlen", "mla", "decode", "prefill", "flex", "host"],
        typer.Option(help="Which points."),
    ] = "paper",
    seqlen: Seqlens = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer", help="fa3, fa2, cudnn, fa4, math or flex, beside ours; may be repeated. Default: the first four."
        ),
    ] = None,
    fa3_library: Annotated[
        Path | None,
        typer.Option(
            envvar="FA2GEN_FA3_LIBRARY", help="A file with the operators flash_attn_3::*.", show_default=False
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="GPU time spent at one point.")] = 0.5,
    parts: Annotated[
        bool, typer.Option("--parts", help="Also the time of each kernel of ours, by torch's profiler.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Write the result here, point by point.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a saved result; measures nothing.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the figures of --plot. Default: this one.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    from fa2gen.bench import report

    if plot is not None:
        from fa2gen.bench.plot import plot as draw

        document = report.load(plot)
        folder = out or Path()
        need_folder("--out", folder)
        written = draw(document, folder, plot.stem)
        if as_json:
            print_json([str(path) for path in written])
        else:
            _print_result(document)
            for path in written:
                note(f"wrote {path}")
        return

    if out is not None:
        raise typer.BadParameter("--out is where the figures of --plot go: --save is for what is measured")
    from fa2gen.bench import peers

    points, specs = _points(asked, preset, seqlen or ())
    mine = [] if specs else [f"fa2gen-{arch}" for arch in asked.arches] or list(peers.OURS)
    if asked.fields.get("deterministic") and not asked.sources:
        mine += [name + peers.DETERMINISTIC for name in mine]
    if any(point.lengths or point.page_size for point in points) and preset != "host":  # whose calls are users'
        mine.append(peers.DENSE)
    if of_flex := any(point.workload for point in points):
        mine += [peers.PLAIN, peers.VARLEN]
    others = peer or [name for name in (peers.OF_FLEX if of_flex else peers.DEFAULT) if not peers.is_ours(name)]
    peers.check([*mine, *others])
    if save is not None:
        need_folder("--save", save.parent)
    _need_gpu("bench")
    from fa2gen.bench.run import Bench

    contestants, missing = peers.find([*mine, *others], fa3_library, points[0].direction)
    contestants = [*peers.of_specs(specs), *contestants]
    for name, why in missing.items():
        note(f"{name} is missing: {why}")
    run = Bench(contestants, missing, _command(), parts=parts)
    names = [one.name for one in contestants]
    titles = ("point", *names, "ours / best peer")
    print_row(titles, _widths(names), titles, err=as_json, bold=True)
    for row in run.rows(points, seconds):
        print_row(titles, _widths(names), _row_cells(row, names), err=as_json)
        for kernel, took in (pair for of_one in row.get("parts", {}).values() for pair in of_one.items()):
            typer.echo(f"    {kernel:<72}{took:>9.1f} us", err=as_json)
        if save is not None:
            report.save(run.result(), save)
    document = run.result()
    if save is not None:  # once more, with what is known only at the end
        report.save(document, save)
    if as_json:
        print_json(document)
    else:
        _print_headlines(document)
    for name, why in document["provenance"]["missing"].items():
        if name not in missing:
            note(f"{name}: {why}")


def _points(asked: Asked, preset: str, seqlens: Sequence[int]) -> tuple[list[Point], list[KernelSpec]]:
    """What is measured, and the kernels that are named for it: none where the selector's are meant."""
    from fa2gen.bench.points import preset_points, spec_points

    specs: list[KernelSpec] = []
    if asked.sources:
        chosen = asked.wanted()
        specs = [one.spec for one in chosen if one.spec is not None]
        points = spec_points(list(dict.fromkeys(one.problem for one in chosen)), seqlens)
    else:
        given = asked.fields
        points = [
            point
            for direction in given.get("direction", ("fwd",))
            for dtype in given.get("dtype", ("bf16",))
            for point in preset_points(
                preset,
                dtype,
                given.get("head_dim", ()),
                seqlens,
                direction,
                given.get("mask", ()),
                given.get("head_dim_v", ()),
            )
        ]
    if preset != "host" and len({point.direction for point in points}) > 1:  # host has a forward point over a cache
        raise typer.BadParameter("bench measures one direction at a time")
    return points, specs


def _widths(names: Sequence[str]) -> tuple[int, int, int]:
    """Columns of the point, of each contestant, and of the ratio."""
    return 44, max(13, *(len(name) + 2 for name in names)), 20


def _row_cells(row: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    from fa2gen.bench.points import Point
    from fa2gen.bench.report import best_peer, ratio

    figures = row.get("microseconds") or row["tflops"]
    point = Point.of_row(row)
    cells = [f"{figures[name]:.1f}" if name in figures else "-" for name in names]
    ours = next((name for name in figures if name.startswith("fa2gen-")), None)
    over = None if ours is None else ratio(row, ours)
    best = best_peer(row)
    return [str(point), *cells, "-" if over is None or best is None else f"{over:.2f} ({best[0]})"]


def _print_result(document: Mapping[str, Any]) -> None:
    from fa2gen.bench.report import contestants

    names = contestants(document["rows"])
    titles = ("point", *names, "ours / best peer")
    print_row(titles, _widths(names), titles, bold=True)
    for row in document["rows"]:
        print_row(titles, _widths(names), _row_cells(row, names))
    _print_headlines(document)


def _print_headlines(document: Mapping[str, Any]) -> None:
    from fa2gen.bench.report import headlines

    facts = document["provenance"]
    typer.echo("")
    for line in headlines(document["rows"]):
        peer = "the best peer" if line["peer"] == "best" else line["peer"]
        typer.echo(
            f"{line['ours']} / {peer}: geometric mean {line['geometric_mean']:.3f} over {line['points']} points "
            f"({line['least']:.2f} to {line['greatest']:.2f})"
        )
    ceiling = ", ".join(f"{value:.0f}" for value in facts.get("matmul_8192_bf16_tflops", ()))
    typer.echo(
        f"on {facts.get('gpu')}, torch {facts.get('torch')}, NVRTC {facts.get('nvrtc')}; "
        f"8192^3 product {ceiling} TFLOP/s"
    )


# tune


@app.command(
    help="Find the fastest tiling of a problem on this GPU, check it, and record it for the selector.\n\nInterrupt it "
    "at will: the same command goes on where it stopped.",
    epilog=examples(
        "fa2gen tune --head-dim 80 --mask causal    one problem: a minute or two",
        "fa2gen tune --head-dim 128 --direction bwd",
        "fa2gen tune --head-dim 40 --head-dim 72 --dtype fp16 --budget 300",
        "fa2gen tune my.toml                        the problems of a spec",
        "fa2gen tune --head-dim 80 --dry-run        what would be timed; needs no GPU",
        "fa2gen tune --head-dim 80 --dry-run --json | jq -r '.[].kernel'",
    ),
)
@takes_kernels("none", tilings=False)
def tune(
    asked: Asked,
    seqlen: Seqlens = None,
    budget: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds for all problems together. Default: 110 for each.", show_default=False),
    ] = None,
    keep: Annotated[int, typer.Option("--candidates", min=1, help="Tilings timed beside the default.")] = 40,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Kernels compiled at once. Default: the cores but one.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of tuned rows. Default: tuned/ in FA2GEN_SPECS, else in specs/ of a checkout or in the cache.",
            show_default=False,
        ),
    ] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Where measurements are kept. Default: in the cache.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the candidates; measure nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    from fa2gen.tune import batch

    chosen = asked.wanted()
    todo = list(dict.fromkeys((one.problem, one.spec.tiling.arch if one.spec else one.arch) for one in chosen))
    seqlens = tuple(sorted(set(seqlen or batch.SEQLENS)))
    if dry_run:
        _dry_run([(problem, arch or TYPICAL_FAMILY) for problem, arch in todo], seqlens, keep, as_json)
        return
    if out is not None:
        need_folder("--out", out)
    if journal is not None:
        need_folder("--journal", journal.parent)
    _need_gpu("tune")
    from fa2gen.bench.protocol import PROTOCOL
    from fa2gen.bench.provenance import gpu_facts, versions
    from fa2gen.gpus import current_device
    from fa2gen.select import kernel_arch
    from fa2gen.tune.gpu import GpuRunner
    from fa2gen.tune.journal import Journal
    from fa2gen.tune.search import Search

    folder = out or batch.default_folder()
    lines = Journal(journal or batch.default_journal())
    origin = batch.provenance(gpu_facts(), versions(), PROTOCOL, _command())
    seconds = batch.BUDGET_SECONDS * len(todo) if budget is None else budget
    of_family: dict[ArchName, list[Problem]] = {}
    for problem, arch in todo:
        of_family.setdefault(kernel_arch(current_device(), arch)[0], []).append(problem)
    outcomes = []
    for family, problems in of_family.items():
        runner = GpuRunner(family, jobs)
        search = Search(runner, lines, seqlens, keep, _Show())
        share = seconds * len(problems) / len(todo)
        try:
            for outcome in batch.tune(search, problems, family, share, origin, folder):
                outcomes.append(outcome)
                _show_outcome(outcome)
        finally:
            runner.close()
    if as_json:
        print_json([_outcome_json(outcome) for outcome in outcomes])
    failed = sum(outcome.error is not None for outcome in outcomes)
    note(f"{len(outcomes) - failed} of {count_text(len(outcomes), 'problem')} tuned, journal {lines.path}")
    if failed:
        raise typer.Exit(ExitStatus.FAILED)


def _dry_run(todo: Sequence[tuple[Problem, ArchName]], seqlens: Sequence[int], keep: int, as_json: bool) -> None:
    from fa2gen.plan import make_plan
    from fa2gen.tune.cost import cycles
    from fa2gen.tune.search import candidates

    def row(spec: KernelSpec, default: bool) -> dict[str, Any]:
        plan = make_plan(spec)
        return {
            "kernel": spec.name,
            **spec.problem.model_dump(),
            "default": default,
            "shared_memory_bytes": plan.shared_memory_bytes,
            "predicted_cycles": {str(seqlen): round(cycles(plan, seqlen)) for seqlen in seqlens},
        }

    rows = [
        row(spec, number == 0)
        for problem, arch in todo
        for number, spec in enumerate(candidates(problem, arch, seqlens, keep))
    ]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("kernel", ">shared memory", *(f">cycles at {seqlen}" for seqlen in seqlens), ""),
        [
            (
                entry["kernel"],
                f"{entry['shared_memory_bytes']:,} B",
                *(f"{count:,}" for count in entry["predicted_cycles"].values()),
                "the default" if entry["default"] else "",
            )
            for entry in rows
        ],
    )
    problems = "; ".join(problem.text for problem, _ in todo)
    note(
        f"{count_text(len(rows), 'candidate')} of {count_text(len(todo), 'problem')} ({problems}); nothing was measured"
    )


class _Show:
    """Best so far, on standard error: a line that rewrites itself on a terminal, one every few seconds elsewhere."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, step: Progress) -> None:
        now = time.monotonic()
        last_of_stage = step.done == step.total
        if not last_of_stage and now - self._last < (0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES):
            return
        self._last = now
        text = (
            f"{step.problem.text}, {step.stage}: {step.done} of {step.total}, best {step.ratio:.3f}x the default: "
            f"{step.best}"
        )
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if last_of_stage else ""))
            sys.stderr.flush()
        else:
            note(text)


def _show_outcome(outcome: Outcome) -> None:
    head = outcome.problem.text
    if outcome.error is not None:
        note(f"{head}: {outcome.error}")
        return
    assert outcome.found is not None and outcome.path is not None
    for row in outcome.rows:
        figures = ", ".join(
            f"{s}: {a:.0f} ({b:.0f})" for s, a, b in zip(row.seqlens, row.tflops, row.tflops_default, strict=True)
        )
        note(f"{head}, {row.range_text}: {row.kernel}, {row.over_default:.3f}x the default; TFLOP/s {figures}")
    found = outcome.found
    counts = f"{found.num_candidates} timed, {len(found.dropped)} dropped, {outcome.seconds:.1f} s"
    note(f"  {counts}, {outcome.path.name}" + ("" if found.complete else "; the budget ended the search early"))
    for name, why in found.dropped.items():
        if "spill" not in why:  # these are many, and expected
            note(f"  dropped {name}: {why}")


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        **outcome.problem.model_dump(),
        "rows": [asdict(row) for row in outcome.rows],
        "dropped": {} if outcome.found is None else outcome.found.dropped,
        "complete": outcome.found is not None and outcome.found.complete,
        "error": outcome.error,
        "seconds": round(outcome.seconds, 2),
    }


# explain


@app.command(
    help="Say which kernel is used for a problem and why, what else there is, and what it costs.\n\nOf a kernel that "
    "is named, also which the selector takes in its place.",
    epilog=examples(
        "fa2gen explain --head-dim 80 --seqlen 4096 --mask causal",
        "fa2gen explain --head-dim 80 --gpu h100    what another GPU would use",
        "fa2gen explain --head-dim 80 --direction bwd --deterministic",
        "fa2gen explain my.toml",
        "fa2gen explain --head-dim 80 --json | jq '.[].kernel'",
    ),
)
@takes_kernels("typical")
def explain(
    asked: Asked,
    seqlen: Seqlen = None,
    gpu: GpuWords = None,
    as_json: AsJson = False,
) -> None:
    from fa2gen.explain import device_named, lines
    from fa2gen.explain import explain as explained

    found = []
    for one in asked.wanted():
        arch = one.spec.tiling.arch if one.spec else one.arch
        tiling = one.spec.tiling if one.spec else None
        found.append(explained(one.problem, device_named(gpu, arch), arch, seqlen, tiling))
    if as_json:
        print_json([one.to_json() for one in found])
        return
    for number, explanation in enumerate(found):
        if number:
            typer.echo("")
        print_pairs(lines(explanation))

"""The commands that measure, and the one that says what measurements decide: `bench`, `tune` and `explain`.

`fa2gen.cli` adds them to its own. As there: options, tables and exit status only, heavy imports inside the commands,
and with `--json` one JSON document on standard output and everything else on standard error.
"""

from __future__ import annotations

import json
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

if TYPE_CHECKING:
    from rich.console import Console

    from fa2gen.spec import KernelSpec, Problem
    from fa2gen.tune.batch import Outcome
    from fa2gen.tune.search import Progress

__all__ = ["app"]

FAILED, NOTHING_TO_RUN_ON = 1, 3  # as fa2gen.cli.ExitStatus

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Direction = Annotated[Literal["fwd", "bwd"], typer.Option(help="Forward, or gradients alone.")]
DTypes = Annotated[list[str] | None, typer.Option("--dtype", help="fp16 or bf16; may be repeated. Default: bf16.")]
Masks = Annotated[list[str] | None, typer.Option("--mask", help="full or causal; may be repeated. Default: both.")]
Seqlens = Annotated[list[int] | None, typer.Option("--seqlen", min=1, help="May be repeated.", show_default=False)]
HeadDims = Annotated[list[int] | None, typer.Option("--head-dim", help="May be repeated.", show_default=False)]


def _examples(*lines: str) -> str:
    return "\n".join(("[bold]Examples[/]", *lines))  # as in fa2gen.cli


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    console = Console(highlight=False, stderr=stderr)
    return console if console.is_terminal else Console(highlight=False, stderr=stderr, width=240)


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
    _note(f"{what}: {why}")
    raise typer.Exit(NOTHING_TO_RUN_ON)


# bench


@app.command(
    epilog=_examples(
        "fa2gen bench                            the paper's grid, beside every peer",
        "fa2gen bench --direction bwd            gradients alone",
        "fa2gen bench --preset odd --peer fa3 --fa3-library fa3.so --save odd.json",
        "fa2gen bench --head-dim 128 --seqlen 4096 --json | jq .rows",
        "fa2gen bench --preset host              host time of a call, in microseconds",
        "fa2gen bench --plot odd.json --out .    figures from a result; needs no GPU",
    )
)
def bench(
    preset: Annotated[Literal["paper", "odd", "gqa", "host"], typer.Option(help="Which points.")] = "paper",
    direction: Direction = "fwd",
    dtype: Annotated[Literal["fp16", "bf16"], typer.Option(help="Of all tensors.")] = "bf16",
    head_dim: HeadDims = None,
    seqlen: Seqlens = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer", help="fa3, fa2, cudnn, fa4, math or flex, beside ours; may be repeated. Default: the first four."
        ),
    ] = None,
    ours: Annotated[list[str] | None, typer.Option("--arch", help="Our sm90 or sm80 kernels; default: both.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Also ours with gradients of the same bits in every run (bwd).")
    ] = False,
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
    out: Annotated[Path, typer.Option(help="Folder for the figures of --plot.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Measure fa2gen beside its peers, all in the same run, or draw what was measured."""
    from fa2gen.bench import report

    if plot is not None:
        from fa2gen.bench.plot import plot as draw

        document = report.load(plot)
        written = draw(document, out, plot.stem)
        if as_json:
            typer.echo(json.dumps([str(path) for path in written]))
        else:
            _print_result(document)
            for path in written:
                _note(f"wrote {path}")
        return

    from fa2gen.bench import peers
    from fa2gen.bench.points import preset_points

    points = preset_points(preset, dtype, head_dim or (), seqlen or (), direction)
    _need_gpu("bench")
    from fa2gen.bench.run import Bench

    mine = [f"fa2gen-{arch}" for arch in ours] if ours else list(peers.OURS)
    if deterministic:
        mine += [name + peers.DETERMINISTIC for name in mine]
    others = peer or [name for name in peers.DEFAULT if not peers.is_ours(name)]
    contestants, missing = peers.find([*mine, *others], fa3_library, direction)
    for name, why in missing.items():
        _note(f"{name} is missing: {why}")
    run = Bench(contestants, missing, _command(), parts=parts)
    console = _console(stderr=as_json)
    names = [one.name for one in contestants]
    console.print(_cells(("point", *names, "ours / best peer")), style="bold")
    for row in run.rows(points, seconds):
        console.print(_cells(_row_cells(row, names)))
        for kernel, took in (pair for of_one in row.get("parts", {}).values() for pair in of_one.items()):
            console.print(f"    {kernel:<72}{took:>9.1f} us")
        if save is not None:
            report.save(run.result(), save)
    document = run.result()
    if save is not None:  # once more, with what is known only at the end
        report.save(document, save)
    if as_json:
        typer.echo(json.dumps(document, indent=2))
    else:
        _print_headlines(document)
    for name, why in document["provenance"]["missing"].items():
        if name not in missing:
            _note(f"{name}: {why}")


def _row_cells(row: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    from fa2gen.bench.report import best_peer, ratio

    figures = row.get("microseconds") or row["tflops"]
    mask = "causal" if row["causal"] else "full"
    heads = f"{row['heads']}" if row["heads"] == row["heads_kv"] else f"{row['heads']}:{row['heads_kv']}"
    point = f"{row['direction']} d{row['head_dim']} {row['dtype']} {mask} {row['batch']}x{row['seqlen']} h{heads}"
    cells = [f"{figures[name]:.1f}" if name in figures else "-" for name in names]
    ours = next((name for name in figures if name.startswith("fa2gen-")), None)
    over = None if ours is None else ratio(row, ours)
    best = best_peer(row)
    return [point, *cells, "-" if over is None or best is None else f"{over:.2f} ({best[0]})"]


def _cells(cells: Sequence[str]) -> str:
    first, *rest = cells
    return f"{first:<36}" + "".join(f"{cell:>13}" for cell in rest[:-1]) + f"{rest[-1]:>20}"


def _print_result(document: Mapping[str, Any]) -> None:
    from fa2gen.bench.report import contestants

    names = contestants(document["rows"])
    console = _console(stderr=False)
    console.print(_cells(("point", *names, "ours / best peer")), style="bold")
    for row in document["rows"]:
        console.print(_cells(_row_cells(row, names)))
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
    epilog=_examples(
        "fa2gen tune --head-dim 80 --mask causal    one problem: a minute or two",
        "fa2gen tune --head-dim 128 --direction bwd",
        "fa2gen tune --head-dim 40 --head-dim 72 --dtype fp16 --budget 300",
        "fa2gen tune --head-dim 80 --dry-run        what would be timed; needs no GPU",
        "fa2gen tune --head-dim 80 --dry-run --json | jq -r '.[].kernel'",
    )
)
def tune(
    head_dim: Annotated[list[int], typer.Option(help="Multiple of 8 up to 256; may be repeated.")],
    direction: Direction = "fwd",
    dtype: DTypes = None,
    mask: Masks = None,
    arch: Annotated[ArchName | None, typer.Option(help="Kernel family. Default: the device's own.")] = None,
    seqlen: Seqlens = None,
    budget: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds for all problems together. Default: 110 for each.", show_default=False),
    ] = None,
    keep: Annotated[int, typer.Option("--candidates", min=1, help="Tilings timed for each problem.")] = 40,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Kernels compiled at once. Default: the cores but one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of tuned rows. Default: specs/tuned.", show_default=False)
    ] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Where measurements are kept. Default: in the cache.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the candidates; measure nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find the fastest tiling of a problem on this GPU, check it, and record it for the selector.

    Interrupt it at will: the same command goes on where it stopped.
    """
    from fa2gen import env
    from fa2gen.tune import batch

    todo = batch.problems(head_dim, _dtypes(dtype), _masks(mask), direction)
    seqlens = tuple(sorted(set(seqlen or batch.SEQLENS)))
    if dry_run:
        _dry_run(todo, arch or "sm90", seqlens, keep, as_json)
        return
    _need_gpu("tune")
    from fa2gen.bench.protocol import PROTOCOL
    from fa2gen.bench.provenance import gpu_facts, versions
    from fa2gen.gpus import current_device
    from fa2gen.select import kernel_arch
    from fa2gen.tune.gpu import GpuRunner
    from fa2gen.tune.journal import Journal
    from fa2gen.tune.search import Search

    family, _ = kernel_arch(current_device(), arch)
    runner = GpuRunner(family, jobs)
    lines = Journal(journal or env.cache_dir() / "tune" / "journal.jsonl")
    search = Search(runner, lines, seqlens, keep, _Show())
    origin = batch.provenance(gpu_facts(), versions(), PROTOCOL, _command())
    seconds = batch.BUDGET_SECONDS * len(todo) if budget is None else budget
    outcomes = []
    try:
        for outcome in batch.tune(search, todo, family, seconds, origin, out or batch.default_folder()):
            outcomes.append(outcome)
            _show_outcome(outcome)
    finally:
        runner.close()
    if as_json:
        typer.echo(json.dumps([_outcome_json(outcome) for outcome in outcomes], indent=2))
    failed = sum(outcome.error is not None for outcome in outcomes)
    _note(f"{len(outcomes) - failed} of {len(outcomes)} problems tuned, journal {lines.path}")
    if failed:
        raise typer.Exit(FAILED)


def _dtypes(given: list[str] | None) -> list[Any]:
    return _chosen("--dtype", given, ("fp16", "bf16"), ("bf16",))


def _masks(given: list[str] | None) -> list[Any]:
    return _chosen("--mask", given, ("full", "causal"), ("full", "causal"))


def _chosen(option: str, given: list[str] | None, allowed: tuple[str, ...], default: tuple[str, ...]) -> list[str]:
    for value in given or ():
        if value not in allowed:
            raise typer.BadParameter(f"{option} takes {' or '.join(allowed)}, not {value!r}")
    return list(given or default)


def _dry_run(todo: Sequence[Problem], arch: ArchName, seqlens: Sequence[int], keep: int, as_json: bool) -> None:
    from fa2gen.plan import make_plan
    from fa2gen.tune.cost import cycles
    from fa2gen.tune.search import candidates

    def row(spec: KernelSpec, default: bool) -> dict[str, Any]:
        plan = make_plan(spec)
        return {
            "kernel": spec.name,
            "default": default,
            "shared_memory_bytes": plan.shared_memory_bytes,
            "predicted_cycles": {str(seqlen): round(cycles(plan, seqlen)) for seqlen in seqlens},
        }

    rows = [
        row(spec, number == 0)
        for problem in todo
        for number, spec in enumerate(candidates(problem, arch, seqlens, keep))
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for entry in rows:
        predicted = "  ".join(f"{seqlen}: {count:,}" for seqlen, count in entry["predicted_cycles"].items())
        mark = "the default" if entry["default"] else ""
        typer.echo(
            f"{entry['kernel']:<64}{entry['shared_memory_bytes']:>9,} B   cycles at {predicted}   {mark}".rstrip()
        )
    _note(f"{len(rows)} candidates of {len(todo)} problems; nothing was measured")


class _Show:
    """Best so far, on standard error: one line that rewrites itself on a terminal, a line a stage elsewhere."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, step: Progress) -> None:
        now = time.monotonic()
        last_of_stage = step.done == step.total
        if not last_of_stage and (not sys.stderr.isatty() or now - self._last < 0.1):
            return
        self._last = now
        p = step.problem
        text = f"{_head(p)}, {step.stage}: {step.done} of {step.total}, best {step.ratio:.3f}x the default: {step.best}"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if last_of_stage else ""))
            sys.stderr.flush()
        else:
            _note(text)


def _head(problem: Problem) -> str:
    return f"{problem.direction} d{problem.head_dim} {problem.dtype} {problem.mask}"


def _show_outcome(outcome: Outcome) -> None:
    head = _head(outcome.problem)
    if outcome.error is not None:
        _note(f"{head}: {outcome.error}")
        return
    assert outcome.found is not None and outcome.path is not None
    for row in outcome.rows:
        figures = ", ".join(
            f"{s}: {a:.0f} ({b:.0f})" for s, a, b in zip(row.seqlens, row.tflops, row.tflops_default, strict=True)
        )
        _note(f"{head}, {row.range_text}: {row.kernel}, {row.over_default:.3f}x the default; TFLOP/s {figures}")
    found = outcome.found
    counts = f"{found.num_candidates} timed, {len(found.dropped)} dropped, {outcome.seconds:.1f} s"
    _note(f"  {counts}, {outcome.path.name}" + ("" if found.complete else "; the budget ended the search early"))
    for name, why in found.dropped.items():
        if "spill" not in why:  # these are many, and expected
            _note(f"  dropped {name}: {why}")


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
    epilog=_examples(
        "fa2gen explain --head-dim 80 --seqlen 4096 --causal",
        "fa2gen explain --head-dim 80 --gpu h100    what another GPU would use",
        "fa2gen explain --head-dim 80 --direction bwd",
        "fa2gen explain --head-dim 80 --json | jq .kernel",
    )
)
def explain(
    head_dim: Annotated[int, typer.Option(help="Multiple of 8 from 8 to 256.")],
    direction: Direction = "fwd",
    seqlen: Annotated[
        int | None, typer.Option(min=1, help="Number of keys. Default: 4096.", show_default=False)
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="With a causal mask.")] = False,
    dtype: Annotated[Literal["fp16", "bf16"], typer.Option(help="Of all tensors.")] = "bf16",
    arch: Annotated[ArchName | None, typer.Option(help="Kernel family. Default: the device's own.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="A GPU's name or a part of it. Default: the one here, else an H200.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which kernel is used for a problem and why, what else there is, and what the kernel costs."""
    from fa2gen.explain import device_named, lines
    from fa2gen.explain import explain as explained
    from fa2gen.spec import Problem

    problem = Problem(direction=direction, head_dim=head_dim, dtype=dtype, mask="causal" if causal else "full")
    found = explained(problem, device_named(gpu, arch), arch, seqlen)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    for label, text in lines(found):
        typer.echo(f"{label:<14}{text}")

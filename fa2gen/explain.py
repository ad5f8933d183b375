"""Why is this kernel used? The selector's choice, the alternatives, the shared-memory map and the resource report."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fa2gen.arch import ArchName
from fa2gen.compile import compiler_version
from fa2gen.errors import Fa2GenError, InvalidInput
from fa2gen.expression import emit
from fa2gen.plan import KernelPlan, fits, make_plan
from fa2gen.plan.memory import Span
from fa2gen.select import TYPICAL_SEQLEN, Device, Selection, choices, kernel_arch, select
from fa2gen.spec import KernelSpec, Problem, Tiling, names_of
from fa2gen.tune.cost import cycles, prune
from fa2gen.tune.space import tilings

__all__ = ["KNOWN_DEVICES", "Alternative", "Explanation", "device_named", "explain", "lines"]

# What the selector needs to know of GPUs that need not be here: from the CUDA C++ Programming Guide and data sheets.
KNOWN_DEVICES = (
    Device("NVIDIA H200", (9, 0), 232_448, 132),
    Device("NVIDIA H100 80GB HBM3", (9, 0), 232_448, 132),
    Device("NVIDIA A100-SXM4-80GB", (8, 0), 166_912, 108),
    Device("NVIDIA L40S", (8, 9), 101_376, 142),
    Device("NVIDIA GeForce RTX 4090", (8, 9), 101_376, 128),
)
SHOWN_PREDICTIONS = 5


@dataclass(frozen=True)
class Alternative:
    """A kernel that was not taken; `cycles` is the cost model's opinion, relative to the one that was."""

    kernel: str
    source: str
    why_not: str
    cycles: float | None


@dataclass(frozen=True)
class Explanation:
    """Everything that `fa2gen explain` prints; `report_error` in place of `report` where there is no compiler.

    kernels   the entry points of the source, in the order of their launches.
    formulas  of an expression: the score, its derivatives, and which keys are seen, with what each costs an element.
    """

    problem: dict[str, Any]
    seqlen: int
    device: str
    kernel: str
    target: str
    reason: str
    measured: dict[str, Any] | None
    warning: str | None
    alternatives: tuple[Alternative, ...]
    shared_memory: tuple[Span, ...]
    shared_memory_bytes: int
    shared_memory_limit: int
    kernels: tuple[dict[str, Any], ...]
    formulas: dict[str, str]
    report: dict[str, Any] | None
    report_error: str | None

    def to_json(self) -> dict[str, Any]:
        """Every field, as JSON values."""
        spans = [{"name": name, "offset": offset, "bytes": size} for name, offset, size in self.shared_memory]
        return {**asdict(self), "shared_memory": spans}


def device_named(name: str | None, arch: ArchName | None = None) -> Device:
    """The device of that name; None: the GPU that is here, else a common one of the family.

    `name` may be words of a known one ("h100"). Raises InvalidInput for a name that none has, or that several have.
    """
    if name is None:
        here = _gpu_here()
        found = next((device for device in KNOWN_DEVICES if device.name == here), None)
        return found or next(device for device in KNOWN_DEVICES if arch != "sm80" or device.compute_capability[0] == 8)
    wanted = _words(name)
    matching = [device for device in KNOWN_DEVICES if wanted and wanted <= _words(device.name)]
    if len(matching) == 1:
        return matching[0]
    known = ", ".join(device.name for device in matching or KNOWN_DEVICES)
    why = "is the name of several GPUs" if matching else "is no GPU that is known here; known"
    raise InvalidInput(f"{name!r} {why}: {known}")


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z0-9]+", name.lower()))


def explain(
    problem: Problem,
    device: Device,
    arch: ArchName | None = None,
    seqlen: int | None = None,
    tiling: Tiling | None = None,
) -> Explanation:
    """The selector's choice for a problem with `seqlen` keys, or the kernel of a `tiling` that is asked for in its
    place; compiled if there is a compiler.

    Raises UnsupportedProblem where no kernel family serves the device, InfeasibleSpec for a tiling that does not fit.
    """
    length = TYPICAL_SEQLEN if seqlen is None else seqlen
    family, target = kernel_arch(device, arch)
    selection = select(problem, device, arch, length)
    if tiling is not None and tiling != selection.plan.tiling:
        asked = make_plan(KernelSpec(problem=problem, tiling=tiling))
        selection = Selection(asked, target, f"asked for; the selector takes {selection.plan.name}")
    row = selection.row
    report, report_error = _report(selection)
    return Explanation(
        problem=problem.model_dump(),
        seqlen=length,
        device=device.name,
        kernel=selection.plan.name,
        target=selection.target,
        reason=selection.reason,
        measured=None if row is None else {**asdict(row), "over_default": round(row.over_default, 3)},
        warning=None if row is None else row.warning(compiler_version()),
        alternatives=tuple(_alternatives(problem, device, family, length, selection)),
        shared_memory=selection.plan.memory.spans,
        shared_memory_bytes=selection.plan.shared_memory_bytes,
        shared_memory_limit=device.shared_memory_per_block,
        kernels=tuple(_launched(selection.plan)),
        formulas=_formulas(problem),
        report=report,
        report_error=report_error,
    )


def _alternatives(
    problem: Problem, device: Device, arch: ArchName, seqlen: int, selection: Selection
) -> Iterator[Alternative]:
    """What the selector knew and did not take, then what the cost model would have tried."""
    best = cycles(selection.plan, seqlen, device.num_sms)
    seen = {selection.plan.name}

    def alternative(spec: KernelSpec, source: str, why_not: str) -> Alternative:
        seen.add(spec.name)
        return Alternative(spec.name, source, why_not, round(cycles(make_plan(spec), seqlen, device.num_sms) / best, 3))

    for choice in choices(problem, device, arch, seqlen):
        spec = KernelSpec(problem=problem, tiling=choice.tiling)
        if spec.name in seen:
            continue
        try:
            yield alternative(spec, choice.source, choice.refused or "what was taken comes first")
        except Fa2GenError:  # a row of an older version that no longer fits
            yield Alternative(spec.name, choice.source, choice.refused or "does not fit", None)
    if (row := selection.row) and row.runner_up not in seen:
        spec = KernelSpec(problem=problem, tiling=KernelSpec.from_name(row.runner_up).tiling)
        ratio = sum(a / b for a, b in zip(row.tflops_runner_up, row.tflops, strict=True)) / len(row.tflops)
        if fits(spec):  # where the problem is tuned as another
            yield alternative(spec, "runner-up", f"measured: {ratio:.3f} of the speed{_measured_as(row.spec, problem)}")
    for tiling in prune(problem, tilings(problem, arch, device.shared_memory_per_block), [seqlen], SHOWN_PREDICTIONS):
        spec = KernelSpec(problem=problem, tiling=tiling)
        if spec.name not in seen:
            yield alternative(spec, "cost model", "not measured here" if row is None else "not better in `fa2gen tune`")


def _measured_as(spec: KernelSpec, problem: Problem) -> str:
    """What a measured row is of, where that is not the problem itself but one that is tuned as it is."""
    return "" if spec.problem == problem else f", of {spec.problem.text}"


def _formulas(problem: Problem) -> dict[str, str]:
    """Of an expression, what its code computes and about how many instructions that takes."""
    program, learned = problem.program, names_of(problem.learned)
    found = dict(program.formulas)
    if program.score_tree is not None:
        what: Literal["score", "gradient"] = "gradient" if problem.direction == "bwd" else "score"
        also = " and its derivative by s" if what == "gradient" else ""
        found["an element"] = f"about {emit(program, what, learned).instructions} instructions for the score{also}"
    if program.allow_tree is not None:
        hidden = f"about {emit(program, 'allow').instructions} instructions in tiles that are seen in part"
        found["an element"] = ", ".join(filter(None, [found.get("an element"), hidden]))
        if problem.direction != "decode":
            tokens = ", ".join(dict.fromkeys(bound.token for bound in program.tile_bounds))
            found["a tile"] = "passed by, where positions and numbers say that no query sees a key of it"
            if emit(program, "blocks").results["any"] == "true":
                found["a tile"] = "visited whatever it hides: nothing is known of it beforehand"
            elif tokens:
                found["a tile"] += f", or the least and greatest numbers of {tokens} that are found beforehand"
    return found


def _launched(plan: KernelPlan) -> Iterator[dict[str, Any]]:
    for entry in plan.entry_points:
        yield {
            "symbol": entry.symbol,
            "num_threads": entry.num_threads,
            "shared_memory_bytes": entry.shared_memory_bytes,
        }


def _report(selection: Selection) -> tuple[dict[str, Any] | None, str | None]:
    from fa2gen.store import Store

    try:
        return asdict(Store().get_or_compile(selection.plan, selection.target).report), None
    except Fa2GenError as error:
        return None, str(error)


def _gpu_here() -> str | None:
    """The first GPU's name, by nvidia-smi: torch would take two seconds to say the same."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), "").strip() or None


def lines(found: Explanation) -> Iterator[tuple[str, str]]:
    """(label, text), for a person."""
    yield "problem", f"{Problem(**found.problem).text}, seqlen {found.seqlen}, on {found.device}"
    yield "kernel", f"{found.kernel}, for {found.target}"
    yield "because", found.reason
    yield from found.formulas.items()
    if found.measured:
        m = found.measured
        figures = [
            f"{s}: {a:.0f} ({d:.0f}, {r:.0f})"
            for s, a, d, r in zip(m["seqlens"], m["tflops"], m["tflops_default"], m["tflops_runner_up"], strict=True)
        ]
        origin = m["provenance"]
        of = _measured_as(KernelSpec.from_name(m["kernel"]), Problem(**found.problem))
        yield "measured", f"TFLOP/s at seqlen {', '.join(figures)}; in brackets the default and the runner-up{of}"
        yield (
            "",
            f"best of {m['num_candidates']} on {origin['gpu']}, NVRTC {origin['nvrtc']}, {origin.get('measured', '')}",
        )
    if found.warning:
        yield "warning", found.warning
    for number, other in enumerate(found.alternatives):
        model = "" if other.cycles is None else f"; by the model {other.cycles:.2f}x the cycles"
        text = f"{other.kernel}  [{other.source}]  {other.why_not}{model}"
        yield "" if number else "alternatives", text
    for number, (name, offset, size) in enumerate(found.shared_memory):
        yield "" if number else "shared memory", f"{offset:>8,} .. {offset + size:>8,}  {size:>8,} B  {name}"
    yield "", f"{found.shared_memory_bytes:,} B of {found.shared_memory_limit:,} B"
    if found.report is None:
        yield "resources", f"not compiled: {found.report_error}"
        return
    r = found.report
    spills = r["spill_store_bytes"] + r["spill_load_bytes"]
    yield (
        "resources",
        f"{_registers(r, found.kernel)} registers a thread at the launch, {spills} B of spills, "
        f"{r['stack_bytes']} B of stack",
    )
    for entry in found.kernels:
        if entry["symbol"] != found.kernel:
            yield (
                "",
                f"{entry['symbol'].removeprefix(found.kernel + '_')}: {_registers(r, entry['symbol'])} registers a "
                f"thread, {entry['num_threads']} threads, {entry['shared_memory_bytes']:,} B of shared memory",
            )
    for note in r["notes"]:
        yield "", note


def _registers(report: dict[str, Any], kernel: str) -> int:
    """Of one kernel; of them all where an older version compiled them, which kept no more."""
    return int(report["registers_of"].get(kernel, report["registers"]))

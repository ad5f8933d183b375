"""Which kernel computes a problem: the selector. Pure, total over the supported problems, and able to say why.

In this order: what a spec in FA2GEN_SPECS writes, a tuned row for this GPU whose range holds the key length, a tuned
row for the architecture, what specs/ writes, the default. A tiling that does not fit the device, or that the plan's
rules no longer allow, is passed over.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fa2gen.arch import ARCHES, ArchName
from fa2gen.catalog import TunedRow, tuned_rows, users_tilings, written_tilings
from fa2gen.errors import InfeasibleSpec, UnsupportedProblem
from fa2gen.plan import KernelPlan, default_tiling, fits, is_apart, make_plan
from fa2gen.spec import NO_EXPRESSION, KernelSpec, Problem, Tiling

__all__ = [
    "TYPICAL_SEQLEN",
    "Choice",
    "Device",
    "Selection",
    "best_spec",
    "choices",
    "default_tiling",
    "forget",
    "kernel_arch",
    "select",
    "seqlen_bounds",
    "served_by",
]

TYPICAL_SEQLEN = 4096
"""Keys that a caller who does not say how many is taken to have."""

KEYS_OF_DOCUMENTS = 2048
"""So many at most are taken to be a document's, whatever the sequence has: tiles see their own document's alone (8 of
8k, head dim 128: 64 keys a block 1.004 to 1.02 times 80, which 8k without documents has; H100)."""


@dataclass(frozen=True)
class Device:
    """What selection needs to know of a GPU."""

    name: str
    compute_capability: tuple[int, int]
    shared_memory_per_block: int
    """Bytes one block can opt in to."""
    num_sms: int


@dataclass(frozen=True)
class Selection:
    """The chosen kernel, the NVRTC target to build it for, the reason in words, and the tuned row, if there is one."""

    plan: KernelPlan
    target: str
    reason: str
    row: TunedRow | None = None


@dataclass(frozen=True)
class Choice:
    """One tiling that the selector looks at; `refused` says why it cannot be taken, None that it can."""

    source: Literal["FA2GEN_SPECS", "tuned for this GPU", "tuned for the architecture", "specs", "default"]
    tiling: Tiling
    reason: str
    refused: str | None = None
    row: TunedRow | None = None


def kernel_arch(device: Device, arch: ArchName | None = None) -> tuple[ArchName, str]:
    """The kernel family for a device and the NVRTC target that its cubins need; `arch` asks for a family.

    sm80 kernels serve 8.0, 8.6, 8.7 and 8.9 from one sm_80 cubin and, on request, 9.0 from an sm_90 one. Raises
    UnsupportedProblem for other GPUs, and for a family that the GPU can not run.
    """
    major, minor = device.compute_capability
    if (major, minor) == (9, 0):
        return ("sm80", "sm_90") if arch == "sm80" else ("sm90", ARCHES["sm90"].target)
    if major == 8 and arch in (None, "sm80"):
        return "sm80", ARCHES["sm80"].target
    if major == 8:
        raise UnsupportedProblem(
            f"{device.name} has compute capability {major}.{minor}; sm90 kernels use wgmma, which 9.0 alone has. "
            "Nearest: arch sm80"
        )
    raise UnsupportedProblem(
        f"{device.name} has compute capability {major}.{minor}; fa2gen has kernels for 8.0, 8.6, 8.7, 8.9 (sm80) and "
        "9.0 (sm90)"
    )


def select(problem: Problem, device: Device, arch: ArchName | None = None, seqlen: int | None = None) -> Selection:
    """The kernel for a problem with `seqlen` keys (None: a typical number) on a device; `arch` asks for a family.

    Raises UnsupportedProblem where no kernel family serves the device, InfeasibleSpec where it has too little shared
    memory for any tiling.
    """
    bounds = seqlen_bounds(problem, kernel_arch(device, arch)[0])
    seqlen = TYPICAL_SEQLEN if seqlen is None else seqlen
    return _selected(problem, device, arch, max((bound for bound in bounds if bound <= seqlen), default=0))


@functools.lru_cache(maxsize=4096)
def seqlen_bounds(problem: Problem, arch: ArchName) -> tuple[int, ...]:
    """The numbers of keys, rising, from which another kernel may be selected than for one key less."""
    rows = _rows(problem, arch)
    ends = {row.seqlen_min for row in rows} | {row.seqlen_max + 1 for row in rows if row.seqlen_max is not None}
    return tuple(sorted(ends - {0}))


def forget() -> None:
    """Look at the specs and the tuned rows that are known now at the next selection."""
    _selected.cache_clear()
    seqlen_bounds.cache_clear()


@functools.lru_cache(maxsize=4096)
def _selected(problem: Problem, device: Device, arch: ArchName | None, seqlen: int) -> Selection:
    family, target = kernel_arch(device, arch)
    for choice in choices(problem, device, family, seqlen):
        if choice.refused is None:
            plan = make_plan(KernelSpec(problem=problem, tiling=choice.tiling))
            return Selection(plan, target, choice.reason, choice.row)
    raise AssertionError("the default tiling is never refused")


def choices(problem: Problem, device: Device, arch: ArchName, seqlen: int) -> Iterator[Choice]:
    """Every tiling that is known for a problem, in the order of preference; the last is the default.

    What is written or tuned for the problem itself comes before what is for the one that it is tuned as.
    """
    known = _known_as(problem, arch)
    default = default_tiling(problem, arch, device.shared_memory_per_block)
    is_masked = problem.direction == "fwd" and problem.allow  # no other needs its plan here
    if is_masked and make_plan(KernelSpec(problem=problem, tiling=default)).knows_alike:
        seqlen = min(seqlen, KEYS_OF_DOCUMENTS)
    for named in known:
        if (written := users_tilings().get((named, arch))) is not None:
            reason = f"a spec in FA2GEN_SPECS names this tiling for {arch}"
            yield Choice("FA2GEN_SPECS", written, reason, _misfit(problem, written, device))
    rows = _rows(problem, arch)
    own = [row for row in rows if row.refusal(device.name) is None]
    others = [row for row in rows if row.refusal(device.name) is not None]
    for row in own:
        yield _tuned("tuned for this GPU", row, problem, device, seqlen)
    for row in others:
        yield _tuned("tuned for the architecture", row, problem, device, seqlen)
    for named in known:
        if (written := written_tilings().get((named, arch))) is not None:
            yield Choice("specs", written, f"specs/ names this tiling for {arch}", _misfit(problem, written, device))
    yield Choice("default", default, f"default tiling for {problem.head_dims_text} on {arch}")


def _known_as(problem: Problem, arch: ArchName) -> tuple[Problem, ...]:
    """The problem itself, and the one that it is tuned as."""
    return tuple(dict.fromkeys((problem, _as_tuned(problem, arch))))


def _rows(problem: Problem, arch: ArchName) -> list[TunedRow]:
    return [row for named in _known_as(problem, arch) for row in tuned_rows().get((named, arch), ())]


def _as_tuned(problem: Problem, arch: ArchName) -> Problem:
    """The problem whose measured tilings serve this one: what keeps an order of additions, looks up lengths, adds to a
    row's sum at its end, stores it unrounded, is done to every score, or finds a block of keys elsewhere costs every
    tiling alike, but for expressions that have tilings of their own."""
    plain: dict[str, Any] = {"deterministic": False, "varlen": False, "sink": False, "partial": False}
    if not is_apart(problem, arch):
        plain |= NO_EXPRESSION
    if problem.direction != "decode":
        plain["paged"] = False
    return problem.model_copy(update=plain)


def served_by(row: TunedRow) -> Iterator[KernelSpec]:
    """The kernels that `select` takes from a tuned row: its own, and those tuned as it is that fit."""
    yield row.spec
    of = row.spec.problem
    orders = (False, True) if of.direction == "bwd" else (False,)
    for varlen, sink, deterministic in itertools.product((False, True), (False, True), orders):
        problem = of.model_copy(update={"varlen": varlen, "sink": sink, "deterministic": deterministic})
        spec = KernelSpec(problem=problem, tiling=row.spec.tiling)
        if problem != of and _as_tuned(problem, row.spec.tiling.arch) == of and fits(spec):
            yield spec


def _tuned(
    source: Literal["FA2GEN_SPECS", "tuned for this GPU", "tuned for the architecture"],
    row: TunedRow,
    problem: Problem,
    device: Device,
    seqlen: int,
) -> Choice:
    tiling = row.spec.tiling
    where = "" if row.gpu == device.name else ", which has the same architecture"
    reason = f"tuned on {row.gpu}{where}, for {row.range_text}: {row.over_default:.2f}x the default of that run"
    refused = None if row.covers(seqlen) else f"meant for {row.range_text}, not {seqlen}"
    return Choice(source, tiling, reason, refused or _misfit(problem, tiling, device), row)


def _misfit(problem: Problem, tiling: Tiling, device: Device) -> str | None:
    """Why a tiling does not run on a device, or None. A row of an older version may break a rule of today."""
    try:
        needed = make_plan(KernelSpec(problem=problem, tiling=tiling)).shared_memory_bytes
    except InfeasibleSpec as error:
        return str(error)
    limit = device.shared_memory_per_block
    return None if needed <= limit else f"needs {needed:,} B of shared memory; {device.name} has {limit:,} B"


def best_spec(problem: Problem, arch: ArchName) -> KernelSpec:
    """The kernel that `select` takes on a typical device of a family, for whoever names no device."""
    typical = Device(arch, (int(arch[2]), 0), ARCHES[arch].shared_memory_per_block, num_sms=1)
    return select(problem, typical, arch).plan.spec

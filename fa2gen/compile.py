"""Source text to cubin, with NVRTC through cuda.core.

NVRTC needs neither a driver nor a GPU, and releases the GIL: kernels compile anywhere, several at once in threads, in
0.3 to 0.8 s each. `ptxas -v` reports what a kernel costs (registers, spills) and what ptxas could not do (the C75xx
notes: wgmma serialised, setmaxnreg ignored). Both are kept: they are the cheapest performance test there is.

Errors are mapped back to template lines. What ptxas refuses, it names by its line in the PTX, which nobody has seen;
the line table that -lineinfo puts into the PTX leads from there to kernel.cu and on to the template.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import re
import struct
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fa2gen.errors import CompileError

if TYPE_CHECKING:
    from fa2gen.plan import KernelPlan

__all__ = [
    "OPTIONS",
    "Compiled",
    "ResourceReport",
    "Unit",
    "compile_kernel",
    "compile_unit",
    "compiler_version",
    "cubin_is_whole",
    "launch_facts",
    "plan_unit",
]

# Every option beside the target. The store's key is made from this very mapping, so none can be forgotten there.
# NVRTC's own cache is off: a hit in it has an empty log, and with it no registers, no spills and no notes.
OPTIONS: Mapping[str, Any] = {"std": "c++17", "lineinfo": True, "ptxas_options": ["-v"], "no_cache": True}

# cuda.core 1.2 puts itself together at its first import, and a second thread then finds it without `Program`: whoever
# may be the first to import it holds this.
CUDA_CORE_IMPORT = threading.Lock()

_compiling: set[int] = set()  # threads inside compile_unit
_unusable_after_fork = False


def _after_fork() -> None:
    global _unusable_after_fork
    _unusable_after_fork = _unusable_after_fork or bool(_compiling)


os.register_at_fork(after_in_child=_after_fork)

_SHOWN_ERRORS = 8
_EM_CUDA = 190
_SHT_NOBITS = 8
# What Elf64_Ehdr and Elf64_Shdr say of where things are: magic, machine, place, size and count of the program and
# section headers; a section's type, offset and size.
_ELF_HEADER = struct.Struct("<6s12xH12xQQ6x4H2x")
_SECTION_HEADER = struct.Struct("<4xI16x2Q24x")


@dataclass(frozen=True)
class Unit:
    """One translation unit with all that decides its cubin and how it is launched.

    name     the kernel's C symbol.
    source   header-free CUDA C++17.
    target   NVRTC's architecture, e.g. "sm_90a".
    launch   what `launch_facts` says; JSON values only, since it is written to meta.json and part of the store's key.
    origins  template position ("sm90/fwd.cu.j2:23", or "" when unknown) of each line of source; may be empty.
    """

    name: str
    source: str
    target: str
    launch: Mapping[str, Any]
    origins: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The file name that NVRTC is told.

        Absolute on purpose: NVRTC completes a relative one with the current directory, and the line table of an
        otherwise equal cubin would then differ from one directory to the next, and tell its path to whoever gets it.
        """
        return f"/fa2gen/{self.name}/kernel.cu"


@dataclass(frozen=True)
class ResourceReport:
    """What a kernel costs: bytes are per thread, except shared memory, which is the dynamic bytes of one block.

    Of a source with several kernels: the most registers and stack of any, all spills, shared memory of the main one.
    registers_of  by kernel (C symbol).
    """

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_memory_bytes: int
    compile_seconds: float
    notes: tuple[str, ...]
    registers_of: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def spill_bytes(self) -> int:
        return self.spill_store_bytes + self.spill_load_bytes

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ResourceReport:
        """The inverse of `dataclasses.asdict`, out of JSON. Raises TypeError for what that cannot have written."""
        report = cls(**{**fields, "notes": tuple(fields["notes"])})
        numbers = [getattr(report, item.name) for item in dataclass_fields(cls) if item.type in ("int", "float")]
        numbers += report.registers_of.values()
        texts = [*report.notes, *report.registers_of]
        if not all(type(x) in (int, float) for x in numbers) or not all(isinstance(x, str) for x in texts):
            raise TypeError(f"not a resource report: {fields}")
        return report


@dataclass(frozen=True)
class Compiled:
    """A unit's result: `source` is kept because whoever profiles the cubin wants to read it."""

    name: str
    source: str
    cubin: bytes
    report: ResourceReport


def compile_kernel(plan: KernelPlan, target: str | None = None) -> Compiled:
    """Renders and compiles one plan; `target` replaces the plan's own ("sm_90" for an sm80 kernel on a 9.0 device).

    Raises RenderError or CompileError.
    """
    return compile_unit(plan_unit(plan, target))


def plan_unit(plan: KernelPlan, target: str | None = None) -> Unit:
    """The rendered plan, ready to be compiled for `target`."""
    from fa2gen.render import render  # brings Jinja, which whoever loads ahead-of-time kernels may not have

    rendered = render(plan)
    return Unit(plan.name, rendered.source, target or plan.target, launch_facts(plan), tuple(rendered.origins))


def launch_facts(plan: KernelPlan) -> dict[str, Any]:
    """What a launch must know and the source text alone does not say: sizes, and the kernel's arguments in order."""
    facts = {
        "num_threads": plan.num_threads,
        "shared_memory_bytes": plan.shared_memory_bytes,
        "params": [asdict(param) for param in plan.params],
        "tensor_maps": [asdict(tensor_map) for tensor_map in plan.tensor_maps],
    }
    if len(plan.entry_points) > 1:
        # As JSON gives it back: lists, not tuples.
        facts["entry_points"] = [
            asdict(entry) | {"tensor_maps": [asdict(tensor_map) for tensor_map in entry.tensor_maps]}
            for entry in plan.entry_points
        ]
    return facts


def compile_unit(unit: Unit) -> Compiled:
    """Compiles one unit. Needs no GPU.

    Raises CompileError, also in a process that was forked while another thread compiled: NVRTC's own locks are then
    held by threads that are not there, and the call would not come back.
    """
    if _unusable_after_fork:
        raise CompileError(
            f"{unit.name} cannot be compiled in this process: it was forked while another thread compiled a kernel. "
            "Compile before processes are forked (fa2gen build), or start them with the spawn method"
        )
    thread = threading.get_ident()
    _compiling.add(thread)
    try:
        return _compile(unit)
    finally:
        _compiling.discard(thread)


def _compile(unit: Unit) -> Compiled:
    try:
        with CUDA_CORE_IMPORT:
            from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise CompileError(
            f"{unit.name} cannot be compiled here: {error}. pip install cuda-core nvidia-cuda-nvrtc"
        ) from error

    log = io.StringIO()
    started = time.perf_counter()
    try:
        options = ProgramOptions(arch=unit.target, name=unit.file, **OPTIONS)
        cubin = bytes(Program(unit.source, "c++", options).compile("cubin", logs=log).code)
    except Exception as error:  # cuda.core's own error type is private
        raise CompileError(_explain(unit, _text(str(error)))) from error
    seconds = time.perf_counter() - started

    report = _report(unit, _text(log.getvalue()), seconds)
    if not cubin_is_whole(cubin):
        raise CompileError(f"{unit.name}: NVRTC {compiler_version()} returned {len(cubin)} bytes that are no cubin")
    return Compiled(unit.name, unit.source, cubin, report)


@functools.cache
def compiler_version() -> str:
    """The exact version of NVRTC, e.g. "13.0.88"; "none" without one.

    NVRTC itself knows only "13.0", which two compilers with different output may share: so the version of the
    distribution, which is where cuda.pathfinder looks first, is taken when there is one.
    """
    try:
        return metadata.version("nvidia-cuda-nvrtc")
    except metadata.PackageNotFoundError:
        pass
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):
        return "none"
    return f"{major}.{minor}"


def cubin_is_whole(cubin: bytes) -> bool:
    """Whether these bytes are an ELF file for a CUDA device with all its headers and sections inside.

    Takes 10 us. The driver is not as careful: what it does with a truncated cubin is its own affair.
    """
    if len(cubin) < _ELF_HEADER.size:
        return False
    magic, machine, programs, sections, psize, pcount, ssize, scount = _ELF_HEADER.unpack_from(cubin)
    if magic != b"\x7fELF\x02\x01" or machine != _EM_CUDA or not scount or ssize != _SECTION_HEADER.size:
        return False
    if max(programs + psize * pcount, sections + ssize * scount) > len(cubin):
        return False
    headers = _SECTION_HEADER.iter_unpack(cubin[sections : sections + ssize * scount])
    return all(kind == _SHT_NOBITS or offset + size <= len(cubin) for kind, offset, size in headers)


def _text(log: str) -> str:
    """NVRTC's and ptxas's logs are joined with NUL bytes."""
    return log.replace("\0", "\n")


# The report ----------------------------------------------------------------------------------------------------------

_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", re.DOTALL)
_NOTE = re.compile(r"\bC75\d\d\b|^ptxas\s+warning\b|^\S+\(\d+\): warning\b")


def _report(unit: Unit, log: str, seconds: float) -> ResourceReport:
    registers_of = {symbol: int(count) for symbol, count in _REGISTERS.findall(log)}
    if unit.name not in registers_of:
        raise CompileError(f"{unit.name}: the source does not define a kernel of that name. ptxas said:\n{log.strip()}")
    # A device function that was not inlined has a frame of its own: it counts like the kernel's.
    frames = [tuple(map(int, frame)) for frame in _FRAME.findall(log)]
    return ResourceReport(
        registers=max(registers_of.values()),
        spill_store_bytes=sum(stores for _, stores, _ in frames),
        spill_load_bytes=sum(loads for _, _, loads in frames),
        stack_bytes=max((stack for stack, _, _ in frames), default=0),
        shared_memory_bytes=unit.launch["shared_memory_bytes"],
        compile_seconds=round(seconds, 3),
        notes=tuple(_located(unit, line) for line in log.splitlines() if _NOTE.search(line)),
        registers_of=registers_of,
    )


# Errors --------------------------------------------------------------------------------------------------------------

_CUDA_LINE = re.compile(r"^\S*kernel\.cu\((\d+)\): (.*)")
_CUDA_ERROR = re.compile(r"^\S*kernel\.cu\((\d+)\): (?:catastrophic )?error\b")
_PTX_LINE = re.compile(r"^ptxas .*?, line (\d+); (error)\s*: (.*)")
_LOC = re.compile(r"^\s*\.loc\s+\d+ (\d+) \d+")


def _explain(unit: Unit, log: str) -> str:
    """The message of a CompileError: each error with its lines in kernel.cu and in the template, and the text there."""
    shown = list(itertools.islice(_errors(unit, log), _SHOWN_ERRORS))
    head = f"{unit.name} does not compile for {unit.target} (NVRTC {compiler_version()}):"
    return "\n".join([head, *(shown or [log.strip()])])


def _errors(unit: Unit, log: str) -> Iterator[str]:
    ptx_lines: list[tuple[int, int]] | None = None
    for line in log.splitlines():
        if match := _CUDA_ERROR.match(line):
            yield _located(unit, line) + _context(unit, int(match[1]))
        elif match := _PTX_LINE.match(line):
            ptx_lines = _line_table(unit) if ptx_lines is None else ptx_lines
            index = bisect_right(ptx_lines, (int(match[1]), 0)) - 1
            number = ptx_lines[index][1] if index >= 0 else 0
            yield _located(unit, f"kernel.cu({number}): ptxas {match[2]}: {match[3]}") + _context(unit, number)
        elif line.startswith("ptxas error"):
            yield line


def _located(unit: Unit, line: str) -> str:
    """`kernel.cu(36): text` with the template position put in; any other line as it is."""
    match = _CUDA_LINE.match(line)
    if match is None:
        return line
    index = int(match[1]) - 1
    origin = unit.origins[index] if 0 <= index < len(unit.origins) else ""
    return f"kernel.cu({match[1]}){f' [from {origin}]' if origin else ''}: {match[2]}"


def _context(unit: Unit, number: int) -> str:
    """Three lines of kernel.cu around line `number`, which is marked."""
    lines = unit.source.splitlines()
    return "".join(
        f"\n  {'>' if n == number else ' '} {n:4} | {lines[n - 1]}"
        for n in range(number - 1, number + 2)
        if 1 <= n <= len(lines)
    )


def _line_table(unit: Unit) -> list[tuple[int, int]]:
    """(line of the PTX, line of kernel.cu) for each place where the latter changes.

    Compiles once more: cuda.core gives no PTX without a driver, and it is wanted only when ptxas has failed.
    """
    from cuda.bindings import nvrtc

    options = [
        f"--gpu-architecture={unit.target}".encode(),
        f"--std={OPTIONS['std']}".encode(),
        b"--generate-line-info",
    ]
    _, program = nvrtc.nvrtcCreateProgram(unit.source.encode(), unit.file.encode(), 0, None, None)
    nvrtc.nvrtcCompileProgram(program, len(options), options)  # fails again, in ptxas; its input is there all the same
    ptx = bytearray(nvrtc.nvrtcGetPTXSize(program)[1])
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(program)
    lines = enumerate(ptx.decode().splitlines(), start=1)
    return [(number, int(match[1])) for number, line in lines if (match := _LOC.match(line))]

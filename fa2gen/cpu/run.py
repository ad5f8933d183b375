"""Calls a kernel's library: packs what fa2gen/cpu/machine/launch.cc wants, in this process or in a child.

Numbers and addresses only; which arguments a kernel takes is the business of fa2gen.cpu.kernel.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fa2gen import env
from fa2gen.cpu.build import Library, find_compiler, located
from fa2gen.errors import Fa2GenError

__all__ = ["PRIMITIVES", "Argument", "Count", "Job", "KernelFault", "Memory", "run", "run_in_child", "run_library"]

# In the order of the enum in fa2gen/cpu/machine/stats.h.
PRIMITIVES = (
    "ld.shared",
    "st.shared",
    "ldmatrix",
    "stmatrix",
    "cp.async",
    "TMA load",
    "TMA store",
    "wgmma",
    "mma.sync",
    "ld.global",
    "st.global",
)

_MESSAGE_BYTES = 8192
_ALIGNMENT = 64  # of a tensor map


class KernelFault(Fa2GenError):
    """A kernel broke a rule of the machine: a race, a deadlock, foreign memory. The message names the template line."""


@dataclass(frozen=True)
class Count:
    """What one primitive did.

    Instructions are a warp's (a warpgroup's for wgmma, a thread's for cp.async and global memory). A wavefront is one
    trip through the 32 banks of shared memory; `ideal_wavefronts` is how many the bytes would need.
    """

    instructions: int
    bytes: int
    wavefronts: int
    ideal_wavefronts: int


@dataclass(frozen=True)
class Memory:
    """A tensor's memory, from its first byte to its last."""

    name: str
    address: int
    bytes: int


@dataclass(frozen=True)
class Argument:
    """A kernel argument; pointers are (offset in data, index of the memory, byte in that memory)."""

    data: bytes
    pointers: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Job:
    """One launch. seed 0 is the fixed schedule; any other draws one, on one OS thread, so that it can be repeated.

    kernel "" is the one that the library is named for; else the symbol of another one in it.
    awaited names the memories that the launch before writes, where this one may start before that has ended: a thread
    that uses them has executed griddepcontrol.wait, and some thread of each block has.
    """

    grid: tuple[int, int, int]
    num_threads: int
    shared_base: int
    shared_bytes: int
    has_async_proxy: bool
    arguments: tuple[Argument, ...]
    seed: int = 0
    workers: int = 0
    resident: int = 1
    stats: bool = False
    time_limit: float = 60.0
    kernel: str = ""
    awaited: tuple[str, ...] = ()


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("num_threads", ctypes.c_uint32),
        ("shared_base", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("has_async_proxy", ctypes.c_uint32),
        ("count_stats", ctypes.c_uint32),
        ("num_workers", ctypes.c_uint32),
        ("num_resident", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("time_limit", ctypes.c_double),
        ("num_buffers", ctypes.c_uint32),
        ("buffers", ctypes.c_void_p),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        *(("name", ctypes.c_char_p), ("address", ctypes.c_uint64), ("bytes", ctypes.c_uint64)),
        ("awaited", ctypes.c_uint32),
    )


class _Count(ctypes.Structure):
    _fields_ = tuple((field, ctypes.c_uint64) for field in ("instructions", "bytes", "wavefronts", "ideal_wavefronts"))


def run(library: Library, job: Job, memories: Sequence[Memory]) -> dict[str, Count]:
    """Runs a kernel over `memories`. Returns the counts of the primitives it used (empty unless job.stats).

    Raises KernelFault with template positions and, for a random schedule, its seed.
    """
    call = run_in_child if library.sanitized else run_library
    message, counts = call(library.path, job, memories)
    if message:
        replay = f"\nreplay with seed={job.seed}" if job.seed else ""
        raise KernelFault(f"{library.name}: {located(message, library.origins)}{replay}")
    return {name: count for name, count in zip(PRIMITIVES, counts, strict=True) if count.instructions}


def run_library(path: Path, job: Job, memories: Sequence[Memory]) -> tuple[str, list[Count]]:
    """(what went wrong, or "", and the counts in the order of PRIMITIVES); in this process, without the GIL."""
    entry = _entry(path, job.kernel)
    storage, arguments = _pack(job.arguments, memories)
    buffers = (_Buffer * len(memories))(
        *(_Buffer(m.name.encode(), m.address, m.bytes, m.name in job.awaited) for m in memories)
    )
    workers = job.workers or (1 if job.seed else env.jobs())
    launch = _Launch(
        grid=job.grid,
        num_threads=job.num_threads,
        shared_base=job.shared_base,
        shared_bytes=job.shared_bytes,
        has_async_proxy=job.has_async_proxy,
        count_stats=job.stats,
        num_workers=workers,
        num_resident=job.resident,
        seed=job.seed,
        time_limit=job.time_limit,
        num_buffers=len(memories),
        buffers=ctypes.addressof(buffers),
    )
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    counts = (_Count * len(PRIMITIVES))()
    failed = entry(ctypes.byref(launch), arguments, message, ctypes.c_size_t(_MESSAGE_BYTES), ctypes.byref(counts))
    del storage
    text = message.value.decode(errors="replace")
    return (text or "failed" if failed else ""), [
        Count(c.instructions, c.bytes, c.wavefronts, c.ideal_wavefronts) for c in counts
    ]


@functools.lru_cache(maxsize=256)
def _entry(path: Path, kernel: str) -> ctypes._NamedFuncPointer:
    name = f"fa2gen_cpu_launch_{kernel}" if kernel else "fa2gen_cpu_launch"
    entry: ctypes._NamedFuncPointer = getattr(ctypes.CDLL(str(path)), name)
    return entry


def _pack(
    arguments: Sequence[Argument], memories: Sequence[Memory]
) -> tuple[ctypes.Array[ctypes.c_char], ctypes.Array[ctypes.c_void_p]]:
    """The arguments in memory, each at a multiple of 64 bytes, and the array of their addresses."""
    slots = [-(-len(argument.data) // _ALIGNMENT) * _ALIGNMENT for argument in arguments]
    storage = ctypes.create_string_buffer(sum(slots) + _ALIGNMENT)
    address = -(-ctypes.addressof(storage) // _ALIGNMENT) * _ALIGNMENT
    addresses = []
    for argument, slot in zip(arguments, slots, strict=True):
        data = bytearray(argument.data)
        for offset, memory, byte in argument.pointers:
            data[offset : offset + 8] = (memories[memory].address + byte).to_bytes(8, "little")
        ctypes.memmove(address, bytes(data), len(data))
        addresses.append(address)
        address += slot
    return storage, (ctypes.c_void_p * len(addresses))(*addresses)


def run_in_child(path: Path, job: Job, memories: Sequence[Memory]) -> tuple[str, list[Count]]:
    """As run_library, in a process under AddressSanitizer, which must be there before anything else is loaded."""
    contents = [(m.name, ctypes.string_at(m.address, m.bytes)) for m in memories]
    with tempfile.TemporaryDirectory() as scratch:
        request, reply = Path(scratch, "request"), Path(scratch, "reply")
        request.write_bytes(pickle.dumps((path, job, contents)))
        environment = {
            **os.environ,
            "LD_PRELOAD": _asan_library(),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = (sys.executable, "-m", "fa2gen.cpu.child", str(request), str(reply))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"the sanitized run ended with status {done.returncode}:\n{_report(done.stderr)}", []
        message, counts, results = pickle.loads(reply.read_bytes())
    for memory, (_, data) in zip(memories, results, strict=True):
        ctypes.memmove(memory.address, data, memory.bytes)
    return message, counts


def _report(log: str) -> str:
    """The sanitizer's finding and the stack behind it, without the dump of shadow bytes."""
    lines = log.splitlines()
    first = next((i for i, line in enumerate(lines) if "ERROR: AddressSanitizer" in line or "runtime error" in line), 0)
    return "\n".join(lines[first : first + 24])


@functools.cache
def _asan_library() -> str:
    command = (find_compiler(), "-print-file-name=libasan.so")
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():  # a compiler echoes the name of what it does not have
        raise Fa2GenError(f"sanitized runs need g++ and its libasan, which {find_compiler()} does not have")
    return path

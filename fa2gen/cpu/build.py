"""From a CPU render to a shared library, with the system's C++ compiler; cached by everything that decides the result.

The machine (fa2gen/cpu/machine/) is compiled once for each set of options, in about 4 s; a kernel takes 0.3 s.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fa2gen import env
from fa2gen._version import __version__
from fa2gen.errors import CompileError, Fa2GenError
from fa2gen.files import TEMPORARY, UNREADABLE, distrust, lock, own, read_folder, seal, write_folder
from fa2gen.log import warn_once
from fa2gen.plan import KernelPlan
from fa2gen.render import Rendered, render
from fa2gen.store import CPU_FOLDER, SCHEMA, Key

__all__ = ["Library", "build_library", "build_source", "find_compiler", "located"]

_COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall")
# `#pragma unroll` is the device compiler's; the note on passing 64-byte aligned structs is about gcc 4.5.
_KERNEL_WARNINGS = ("-Wno-unknown-pragmas", "-Wno-psabi")
_FAST = ("-march=native",)
_SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
_SHOWN_ERRORS = 20
_LOCK_SECONDS = 60.0
_unusable: set[Path] = set()  # what this process has found it cannot keep libraries in
_LIBRARY, _MACHINE = "kernel.so", "machine.o"


@dataclass(frozen=True)
class Library:
    """A kernel as a shared library; `origins` leads from its lines to template lines (see Rendered).

    Beside it lie meta.json, kernel.cc and warnings.txt, which is empty unless somebody edited a template or has another
    compiler.
    """

    name: str
    path: Path
    origins: tuple[str, ...]
    sanitized: bool


@functools.cache
def find_compiler() -> str:
    """The path of $CXX, g++, clang++ or c++. Raises Fa2GenError when there is none."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise Fa2GenError(
        "running kernels on the CPU needs a C++17 compiler, and neither $CXX, g++, clang++ nor c++ is there: "
        "install g++ (or clang)"
    )


def build_library(plan: KernelPlan, *, sanitize: bool = False, rendered: Rendered | None = None) -> Library:
    """The kernel of a plan, compiled or from the cache.

    sanitize  with AddressSanitizer and UndefinedBehaviorSanitizer: to be loaded by fa2gen.cpu.child only.
    rendered  replaces render(plan, "cpu"): for tests that seed faults.

    Raises RenderError, CompileError, or Fa2GenError when there is no compiler.
    """
    others = tuple(entry.symbol for entry in plan.entry_points if entry.symbol != plan.name)
    return build_source(plan.name, rendered or render(plan, target="cpu"), sanitize=sanitize, others=others)


def build_source(name: str, rendered: Rendered, *, sanitize: bool = False, others: tuple[str, ...] = ()) -> Library:
    """As build_library, for the source of any kernel called `name` that uses the primitives of templates/cpu/.

    others  more kernels in the source: `Job.kernel` says which one runs.
    """
    space = f"fa2gen::{name}"
    entries = [
        f"FA2GEN_CPU_ENTRY({space}::{name})",
        *(f"FA2GEN_CPU_ENTRY_AS(fa2gen_cpu_launch_{x}, {space}::{x})" for x in others),
    ]
    source = "\n".join([rendered.source, *entries, ""])
    # -O2 takes longer to compile than it saves in runs (370 tests of tests/cpu: 313 s, with -O1 272 s).
    optimize = _SANITIZE if sanitize else (*_FAST, "-O1", "-ffp-contract=off")
    library_key = Key(name, _key(source, *optimize, _machine_key(sanitize)))
    options = (*_COMMON, *_KERNEL_WARNINGS, *optimize, f"-I{_machine_dir()}", "-shared")

    def compile_library(scratch: Path) -> dict[str, bytes]:
        (scratch / "kernel.cc").write_text(source, encoding="utf-8")
        # The relative name is what messages and stack traces show.
        arguments = (*options, "kernel.cc", str(_build_machine(sanitize)), "-o", _LIBRARY)
        warnings = _compile(arguments, name, rendered.origins, scratch)
        return {
            "kernel.cc": source.encode(),
            "warnings.txt": warnings.encode(),
            _LIBRARY: (scratch / _LIBRARY).read_bytes(),
        }

    return Library(name, _kept(library_key, compile_library) / _LIBRARY, rendered.origins, sanitize)


def located(text: str, origins: tuple[str, ...]) -> str:
    """Puts template positions behind lines of the kernel: `kernel.cc:36` -> `kernel.cc:36 [sm90/fwd.cu.j2:23]`."""

    def add(match: re.Match[str]) -> str:
        index = int(match[1]) - 1
        origin = origins[index] if 0 <= index < len(origins) else ""
        return f"{match[0]} [{re.sub('^ptx/', 'cpu/', origin)}]" if origin else match[0]

    return re.sub(r"kernel\.cc:(\d+)(?::\d+)?", add, text)


def _build_machine(sanitize: bool) -> Path:
    """The machine as an object file."""

    def compile_machine(scratch: Path) -> dict[str, bytes]:
        target = scratch / _MACHINE
        arguments = (*_COMMON, *_machine_options(sanitize), "-c", "all.cc", "-o", str(target))
        _compile(arguments, "fa2gen/cpu/machine", (), _machine_dir())
        return {_MACHINE: target.read_bytes()}

    return _kept(Key("machine", _machine_key(sanitize)), compile_machine) / _MACHINE


def _kept(key: Key, make: Callable[[Path], dict[str, bytes]]) -> Path:
    """The sealed folder of that key with whole files that nobody else can have written, made now if need be.

    make  compiles in a scratch folder and returns the files.

    In the user's cache, or, where that is not used or cannot be written, in a temporary one of this process.
    """
    root = _cache()
    folder = root / key.folder
    if _is_current(folder, key):
        return folder
    with lock(root / f".{key.folder}.lock", _LOCK_SECONDS):
        if _is_current(folder, key):  # who held the lock before us has compiled it
            return folder
        with tempfile.TemporaryDirectory(prefix=TEMPORARY) as scratch:
            files = make(Path(scratch))
        meta = {"schema": SCHEMA, "fa2gen": __version__, "name": key.name, "key": key.digest, "sha256": seal(files)}
        try:
            write_folder(folder, files, meta, mode=0o700, keeps=lambda: _is_current(folder, key))
        except OSError as error:
            if root == _temporary():
                raise
            _refused(root, f"cannot be written: {error}")
            folder = _temporary() / key.folder
            write_folder(folder, files, meta, mode=0o700)
    return folder


def _is_current(folder: Path, key: Key) -> bool:
    try:
        meta, _ = read_folder(folder, own())
    except UNREADABLE:
        return False
    return (meta.get("schema"), meta.get("key")) == (SCHEMA, key.digest)


def _machine_dir() -> Path:
    return Path(__file__).parent / "machine"


def _machine_options(sanitize: bool) -> tuple[str, ...]:
    return _SANITIZE if sanitize else (*_FAST, "-O3", "-ffp-contract=fast")


def _machine_key(sanitize: bool) -> str:
    files = sorted(_machine_dir().iterdir())
    return _key(*_machine_options(sanitize), *(f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in files))


def _key(*parts: str) -> str:
    """64 hexadecimal digits; different for different compilers, and for processors with other instructions."""
    return hashlib.sha256("\0".join((_compiler_identity(), *parts)).encode()).hexdigest()


@functools.cache
def _compiler_identity() -> str:
    """All macros that the compiler predefines: its version, and the instructions of this processor."""
    command = (find_compiler(), *_FAST, "-dM", "-E", "-x", "c++", os.devnull)
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _cache() -> Path:
    """Where libraries are kept: in the user's cache if that is used, else for as long as this process lives."""
    root = env.cache_dir()
    folder = root / CPU_FOLDER
    if folder in _unusable:
        return _temporary()
    for each in (root, folder):
        if why := distrust(each, own()):
            return _refused(folder, f"is not used: {why}")
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        return _refused(folder, f"cannot be made: {error}")
    return folder


def _refused(folder: Path, why: str) -> Path:
    _unusable.add(folder)
    warn_once(folder, f"{folder} {why}; libraries for the CPU last as long as this process")
    return _temporary()


@functools.cache
def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix=TEMPORARY)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _compile(arguments: tuple[str, ...], what: str, origins: tuple[str, ...], cwd: Path) -> str:
    """Runs the compiler in `cwd` and returns its warnings. Raises CompileError with template positions."""
    done = subprocess.run((find_compiler(), *arguments), cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = "\n".join(done.stderr.splitlines()[:_SHOWN_ERRORS])
        raise CompileError(f"{what} does not compile for the CPU ({find_compiler()}):\n{located(lines, origins)}")
    return located(done.stderr, origins)

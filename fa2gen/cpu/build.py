"""From a CPU render to a shared library, with the system's C++ compiler; cached by everything that decides the result.

The machine (fa2gen/cpu/machine/) is compiled once for each set of options, in about 4 s; a kernel takes 0.4 s.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from fa2gen import env
from fa2gen.errors import CompileError, Fa2GenError
from fa2gen.plan import KernelPlan
from fa2gen.render import Rendered, render

__all__ = ["Library", "build_library", "build_source", "find_compiler", "located"]

_COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall")
# `#pragma unroll` is the device compiler's; the note on passing 64-byte aligned structs is about gcc 4.5.
_KERNEL_WARNINGS = ("-Wno-unknown-pragmas", "-Wno-psabi")
_FAST = ("-march=native",)
_SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
_SHOWN_ERRORS = 20


@dataclass(frozen=True)
class Library:
    """A kernel as a shared library; `origins` leads from its lines to template lines (see Rendered).

    Beside it lie kernel.cc and warnings.txt, which is empty unless somebody edited a template or has another compiler.
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
    optimize = _SANITIZE if sanitize else (*_FAST, "-O2", "-ffp-contract=off")
    folder = _cache() / _key(source, *optimize, _machine_key(sanitize))
    library = Library(name, folder / "kernel.so", rendered.origins, sanitize)
    if not library.path.is_file():
        machine = _build_machine(sanitize)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            kernel = Path(scratch, "kernel.cc")
            kernel.write_text(source, encoding="utf-8")
            options = (*_COMMON, *_KERNEL_WARNINGS, *optimize, f"-I{_machine_dir()}", "-shared")
            # The relative name is what messages and stack traces show.
            warnings = _compile((*options, "kernel.cc", str(machine), "-o", "kernel.so"), library, Path(scratch))
            Path(scratch, "warnings.txt").write_text(warnings, encoding="utf-8")
            for file in (
                "kernel.cc",
                "warnings.txt",
                "kernel.so",
            ):  # the library last: it says that the folder is complete
                os.replace(Path(scratch, file), folder / file)
    return library


def located(text: str, origins: tuple[str, ...]) -> str:
    """Puts template positions behind lines of the kernel: `kernel.cc:36` -> `kernel.cc:36 [sm90/fwd.cu.j2:23]`."""

    def add(match: re.Match[str]) -> str:
        index = int(match[1]) - 1
        origin = origins[index] if 0 <= index < len(origins) else ""
        return f"{match[0]} [{re.sub('^ptx/', 'cpu/', origin)}]" if origin else match[0]

    return re.sub(r"kernel\.cc:(\d+)(?::\d+)?", add, text)


def _build_machine(sanitize: bool) -> Path:
    """The machine as an object file."""
    target = _cache() / f"machine-{_machine_key(sanitize)}.o"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_file():
                part = target.with_suffix(".part")
                _compile((*_COMMON, *_machine_options(sanitize), "-c", "all.cc", "-o", str(part)), None, _machine_dir())
                os.replace(part, target)
    return target


def _machine_dir() -> Path:
    return Path(__file__).parent / "machine"


def _machine_options(sanitize: bool) -> tuple[str, ...]:
    return _SANITIZE if sanitize else (*_FAST, "-O3", "-ffp-contract=fast")


def _machine_key(sanitize: bool) -> str:
    files = sorted(_machine_dir().iterdir())
    return _key(*_machine_options(sanitize), *(f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in files))


def _key(*parts: str) -> str:
    """32 hexadecimal digits; different for different compilers, and for processors with other instructions."""
    return hashlib.sha256("\0".join((_compiler_identity(), *parts)).encode()).hexdigest()[:32]


@functools.cache
def _compiler_identity() -> str:
    """All macros that the compiler predefines: its version, and the instructions of this processor."""
    command = (find_compiler(), *_FAST, "-dM", "-E", "-x", "c++", os.devnull)
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _cache() -> Path:
    return env.cache_dir() / "cpu"


def _compile(arguments: tuple[str, ...], library: Library | None, cwd: Path) -> str:
    """Runs the compiler in `cwd` and returns its warnings. Raises CompileError with template positions."""
    done = subprocess.run((find_compiler(), *arguments), cwd=cwd, capture_output=True, text=True, check=False)
    what, origins = (library.name, library.origins) if library else ("fa2gen/cpu/machine", ())
    if done.returncode != 0:
        lines = "\n".join(done.stderr.splitlines()[:_SHOWN_ERRORS])
        raise CompileError(f"{what} does not compile for the CPU ({find_compiler()}):\n{located(lines, origins)}")
    return located(done.stderr, origins)

"""Compiled kernels on disk: the cache, and the folder built ahead of time.

Both are made of entries. An entry is a sealed folder (`fa2gen.files`) with `kernel.cu`, `kernel.cubin` and `meta.json`
(name, target, compiler, launch facts, ptxas report, digests of the other two), so a person can read what a profiler
shows. That is why this is not cuda.core's FileStreamProgramCache: it keeps bare cubins, gives a truncated one back as
good, and lets every process that misses compile. Here

- an entry appears whole or not at all;
- a damaged entry is a miss, and is replaced by what the miss compiles; what fa2gen did not make stays where it is;
- one process compiles a key, the others wait for it (not for ever: a lock may be held by a process that is stopped);
- a root that cannot be written costs one warning and the saved time, never the kernel;
- a root that others can write is not used: whoever can write a cubin runs code on this GPU, in this process's memory;
- looking makes nothing: the root appears with the first kernel.

The cache's key covers every input of `compile_unit` and the exact compiler, so nothing else can make an entry stale.
An ahead-of-time folder must work with neither Jinja nor NVRTC, hence with no source text to hash: its kernels are found
by name and target. It is good for the fa2gen version that built it, and a kernel in it only while its launch facts
equal the plan's. (Edited templates do not make it stale: build it again, or unset FA2GEN_AOT_DIR while editing.)
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fa2gen import env
from fa2gen._version import __version__
from fa2gen.compile import (
    OPTIONS,
    ResourceReport,
    Unit,
    compile_unit,
    compiler_version,
    cubin_is_whole,
    launch_facts,
    plan_unit,
)
from fa2gen.errors import StoreError
from fa2gen.files import (
    UNREADABLE,
    digest,
    distrust,
    installed,
    is_plain,
    is_sealed,
    lock,
    own,
    read_file,
    read_folder,
    remove_folder,
    seal,
    size_of_folder,
    write_file,
    write_folder,
)
from fa2gen.log import logger, set_level, warn_once

if TYPE_CHECKING:
    from fa2gen.plan import KernelPlan

__all__ = [
    "CPU_FOLDER",
    "SCHEMA",
    "AheadOfTime",
    "Entry",
    "Key",
    "Store",
    "key_of",
    "read_ahead_of_time",
    "read_current",
    "read_entry",
    "refusal",
    "write_entry",
    "write_manifest",
]

SCHEMA = 1
"""Of meta.json and manifest.json. Another number is another format: a miss."""

CPU_FOLDER = "cpu"
"""Where in the cache the libraries of `fa2gen.cpu` are, which `size` and `clear` count too."""

_SOURCE, _CUBIN, _MANIFEST = "kernel.cu", "kernel.cubin", "manifest.json"
_KEY_DIGITS = 16  # of the digest, in the name of an entry's folder
_CACHE_FOLDER = re.compile(rf".+-[0-9a-f]{{{_KEY_DIGITS}}}")
_LOCKS = ".locks"
_LOCK_SECONDS = 60.0


class Key(NamedTuple):
    """What names an entry of the cache: the kernel, and 64 hex digits over everything that decides its cubin."""

    name: str
    digest: str

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.digest[:_KEY_DIGITS]}"


@dataclass(frozen=True)
class Entry:
    """One compiled kernel. `meta` is meta.json; `report` is the part of it that came from ptxas."""

    name: str
    source: str
    cubin: bytes
    meta: Mapping[str, Any]
    report: ResourceReport


def key_of(unit: Unit) -> Key:
    """The key of what `compile_unit(unit)` would return in this installation."""
    inputs = [SCHEMA, unit.name, unit.source, unit.target, unit.launch, OPTIONS, compiler_version()]
    return Key(unit.name, digest(json.dumps(inputs, sort_keys=True).encode()))


class Store:
    """The kernel cache in one root folder, and the ahead-of-time folder of the environment before it.

    root          default: FA2GEN_CACHE_DIR, else fa2gen/ in the user's cache directory. Made when a kernel is kept.
    lock_seconds  how long to wait for another process that compiles the same key before compiling it here too.

    A store may be shared by threads, and survives a fork.
    """

    def __init__(self, root: Path | None = None, lock_seconds: float = _LOCK_SECONDS) -> None:
        set_level(env.log_level())
        self.root = env.cache_dir() if root is None else Path(root)
        self.lock_seconds = lock_seconds
        self._memory: dict[Key, Entry] = {}  # only what the disk would not take
        self._threads: dict[tuple[int, Key], threading.Lock] = {}  # of this process: a fork has no holder of a parent's

    def get_or_compile(self, plan: KernelPlan, target: str | None = None) -> Entry:
        """The kernel of a plan: built ahead of time, or cached, or compiled now.

        target  replaces the plan's own NVRTC target, e.g. "sm_90" for an sm80 kernel on a 9.0 device.

        Raises RenderError, CompileError, or StoreError when it would have to be compiled and may or can not.
        """
        target = target or plan.target
        entry, missing = _ahead_of_time(plan, target)
        if entry:
            return entry
        try:
            unit = plan_unit(plan, target)
        except ImportError as error:
            raise StoreError(f"{_not_built(plan, target, missing)} It cannot be generated here: {error}.") from error
        if not env.disable_jit():
            return self.compile_once(unit)
        if entry := self.try_load(key_of(unit)):
            return entry
        why = self.complaint()
        cache = f"The cache {self.root} is not used: {why}." if why else f"It is not in the cache {self.root} either."
        raise StoreError(f"{_not_built(plan, target, missing)} {cache}")

    def compile_once(self, unit: Unit) -> Entry:
        """The cached entry of a unit, else its compiled one: one compilation for all threads and processes that ask."""
        key = key_of(unit)
        if entry := self.try_load(key):
            return entry
        with self._single_flight(key):
            if entry := self.try_load(key):  # who held the lock before us has compiled it
                return entry
            compiled = compile_unit(unit)
            logger.info("compiled %s for %s in %.2f s", unit.name, unit.target, compiled.report.compile_seconds)
            entry = _make_entry(unit, key, compiled.cubin, compiled.report)
            self.put(key, entry)
            return entry

    def try_load(self, key: Key) -> Entry | None:
        """The entry, or None where there is none or it is damaged. Never raises for what is on the disk."""
        if key in self._memory:
            return self._memory[key]
        return read_current(self.root / key.folder, key) if self._usable() else None

    def put(self, key: Key, entry: Entry) -> bool:
        """Keeps an entry: on disk (True), else in memory for as long as this store lives (False)."""
        try:
            if self._made():
                write_entry(self.root / key.folder, entry, mode=0o700)
                return True
        except OSError as error:
            warn_once(self.root, f"cannot write the kernel cache: {error}; kernels are kept in memory only")
        self._memory[key] = entry
        return False

    def keeps(self, key: Key) -> bool:
        """Whether an entry that was put, or found, is on disk, where other processes will find it."""
        return key not in self._memory

    def clear(self) -> int:
        """Removes every kernel, also the CPU's libraries, and returns how many there were.

        Only folders that carry a meta.json of ours: the root may be someone's home. Raises StoreError where the cache
        is not used, or some of it cannot be removed.
        """
        if why := self.complaint():
            raise StoreError(f"nothing was removed from {self.root}: {why}")
        removed, errors = 0, []
        for folder in [*self._folders(), *self._cpu_folders()]:
            try:
                remove_folder(folder)
                removed += 1
            except UNREADABLE as error:
                errors.append(error)
        if errors:
            count = removed + len(errors)
            raise StoreError(f"{len(errors)} of {count} kernels could not be removed from {self.root}: {errors[0]}")
        return removed

    def size(self) -> int:
        """Bytes in all entries, and in the CPU's libraries."""
        return sum(map(size_of_folder, (*self._folders(), *self._cpu_folders())))

    def list(self) -> tuple[Entry, ...]:
        """All whole entries, by name."""
        return tuple(entry for folder in sorted(self._folders()) if (entry := read_entry(folder, own())))

    def names(self) -> set[str]:
        """Of the kernels that there are entries of, be they damaged, or made by another version."""
        return {folder.name[: -len("-") - _KEY_DIGITS] for folder in self._folders()}

    def complaint(self) -> str:
        """Why the cache is not used; "" where it is, also before it exists."""
        return distrust(self.root, own())

    def _folders(self) -> Iterator[Path]:
        if self._usable():
            yield from _sealed_in(self.root)

    def _cpu_folders(self) -> Iterator[Path]:
        if self._usable() and not distrust(self.root / CPU_FOLDER, own()):
            yield from _sealed_in(self.root / CPU_FOLDER)

    def _usable(self) -> bool:
        complaint = self.complaint()
        if complaint:
            warn_once(self.root, f"kernel cache {self.root} is off, kernels are compiled in memory: {complaint}")
        return not complaint

    def _made(self) -> bool:
        """Whether the root is there and usable, after making it if need be. Raises OSError."""
        if not self._usable():
            return False
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._usable()  # it may be somebody else who has just made it

    @contextlib.contextmanager
    def _single_flight(self, key: Key) -> Iterator[None]:
        """Lets one thread of one process in at a time, as long as locks work here and are not held too long."""
        with self._threads.setdefault((os.getpid(), key), threading.Lock()), contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # `put` will say it
                if self._made():
                    stack.enter_context(lock(self.root / _LOCKS / f"{key.folder}.lock", self.lock_seconds))
            yield


def _sealed_in(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if _CACHE_FOLDER.fullmatch(path.name) and is_sealed(path)]
    except OSError:  # not there
        return []


# Entries -------------------------------------------------------------------------------------------------------------


def _make_entry(unit: Unit, key: Key, cubin: bytes, report: ResourceReport) -> Entry:
    meta = {
        "schema": SCHEMA,
        "fa2gen": __version__,
        "name": unit.name,
        "target": unit.target,
        "compiler": compiler_version(),
        "options": dict(OPTIONS),
        "key": key.digest,
        "launch": dict(unit.launch),
        "report": asdict(report),
        "sha256": seal({_SOURCE: unit.source.encode(), _CUBIN: cubin}),
    }
    # As whoever reads it will find it.
    return Entry(unit.name, unit.source, cubin, json.loads(json.dumps(meta)), report)


def read_entry(folder: Path, owners: Collection[int] | None = None) -> Entry | None:
    """The entry in `folder`, or None where it is missing, damaged, of another format or, with owners, not trusted.

    Never raises.
    """
    try:
        meta, files = read_folder(folder, owners)
        source, cubin = files[_SOURCE], files[_CUBIN]
        if meta["schema"] != SCHEMA or not cubin_is_whole(cubin):
            return None
        if not all(isinstance(meta[fact], str) for fact in ("fa2gen", "name", "target", "compiler", "key")):
            return None
        if not isinstance(meta["launch"], dict):
            return None
        return Entry(meta["name"], source.decode(), cubin, meta, ResourceReport.from_json(meta["report"]))
    except UNREADABLE:
        return None


def read_current(folder: Path, key: Key) -> Entry | None:
    """The entry in `folder` if it is the one that `key` means and nobody else can have put it there. Never raises."""
    entry = read_entry(folder, own())
    return entry if entry and entry.meta["key"] == key.digest else None


def write_entry(folder: Path, entry: Entry, mode: int = 0o755) -> None:
    """Puts a whole entry at `folder`, in place of an older or damaged one. Raises OSError, as `write_folder` does."""
    key = Key(entry.name, entry.meta["key"])
    files = {_SOURCE: entry.source.encode(), _CUBIN: entry.cubin}
    write_folder(folder, files, entry.meta, mode, keeps=lambda: read_current(folder, key) is not None)


# The ahead-of-time folder --------------------------------------------------------------------------------------------


class AheadOfTime(NamedTuple):
    """What is in an ahead-of-time folder: where the kernel of a (name, target) is; or why the folder is not used."""

    kernels: Mapping[tuple[str, str], Path]
    complaint: str = ""


def write_manifest(root: Path) -> None:
    """Writes manifest.json anew, atomically: a row for each whole entry in `root` of this version. Raises OSError.

    It is made from what is there, so builds into one folder, also at the same time, need not know of each other.
    """
    entries = [(folder.name, read_entry(folder)) for folder in sorted(root.iterdir()) if is_plain(folder.name)]
    kernels = [
        {"folder": folder} | {fact: entry.meta[fact] for fact in ("name", "target", "compiler", "key")}
        for folder, entry in entries
        if entry and entry.meta["fa2gen"] == __version__
    ]
    document = {"schema": SCHEMA, "fa2gen": __version__, "kernels": kernels}
    write_file(root / _MANIFEST, (json.dumps(document, indent=2) + "\n").encode())


def refusal(root: Path) -> str:
    """Why no kernels can be built into a folder, as FA2GEN_AOT_DIR would not be used; "" where they can.

    Makes the folder if it is not there.
    """
    try:
        root.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        return str(error)
    if complaint := distrust(root, installed()):
        return complaint
    if not os.access(root, os.W_OK | os.X_OK):
        return "it cannot be written"
    if not os.path.lexists(root / _MANIFEST):
        return ""
    try:
        manifest = json.loads(read_file(root / _MANIFEST))
        foreign = not (isinstance(manifest["fa2gen"], str) and isinstance(manifest["kernels"], list))
    except UNREADABLE:
        foreign = True
    return f"its {_MANIFEST} is not fa2gen's: take a folder of its own" if foreign else ""


@functools.cache
def read_ahead_of_time(root: Path) -> AheadOfTime:
    """The kernels of an ahead-of-time folder, read once per process: it is written before, not during, use."""
    try:
        # Its owner may also be whoever installed it: root in a container image.
        if complaint := distrust(root, installed()):
            return AheadOfTime({}, complaint)
        manifest = json.loads(read_file(root / _MANIFEST, installed()))
        built_by = (manifest["schema"], manifest["fa2gen"])
        if built_by != (SCHEMA, __version__):
            return AheadOfTime(
                {}, f"built by fa2gen {built_by[1]} (schema {built_by[0]}), this is {__version__} ({SCHEMA})"
            )
        kernels = {(row["name"], row["target"]): row["folder"] for row in manifest["kernels"]}
        for folder in kernels.values():
            if not is_plain(folder):
                return AheadOfTime({}, f"{_MANIFEST} names {folder!r}, which is no folder in it")
        return AheadOfTime({kernel: root / folder for kernel, folder in kernels.items()})
    except UNREADABLE as error:
        return AheadOfTime({}, f"{_MANIFEST} cannot be read: {error!r}")


def _ahead_of_time(plan: KernelPlan, target: str) -> tuple[Entry | None, str]:
    """The kernel in the ahead-of-time folder of the environment; or None, and where it is not, with the reason.

    A folder or kernel that is there and unfit is a miss with one warning.
    """
    root = env.aot_dir()
    if root is None:
        return None, "not built ahead of time (FA2GEN_AOT_DIR is not set)"
    found = read_ahead_of_time(root)
    if found.complaint:
        warn_once(root, f"FA2GEN_AOT_DIR={root} is not used: {found.complaint}")
        return None, f"not taken from FA2GEN_AOT_DIR={root}, which is not used: {found.complaint}"
    folder = found.kernels.get((plan.name, target))
    if folder is None:
        return None, f"not in FA2GEN_AOT_DIR={root}"
    meant = {"name": plan.name, "target": target, "launch": launch_facts(plan)}
    why = distrust(folder, installed())
    if not why:
        entry = read_entry(folder, installed())
        if entry and meant.items() <= entry.meta.items():
            return entry, ""
        why = "it is launched differently by this fa2gen" if entry else "it is damaged, or others can write its files"
    warn_once(folder, f"kernel {folder}, built ahead of time, is not used: {why}; build it again")
    return None, f"in {folder}, which is not used: {why}"


def _not_built(plan: KernelPlan, target: str, missing: str) -> str:
    of_v = f" --head-dim-v {plan.head_dim_v}" if plan.head_dim_v != plan.head_dim else ""
    return (
        f"{plan.name} for {target} is {missing}. Build it where NVRTC is installed: fa2gen build --arch {plan.arch} "
        f"--head-dim {plan.head_dim}{of_v} --out DIR, then set FA2GEN_AOT_DIR=DIR."
    )

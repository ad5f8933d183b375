"""Compiled kernels on disk: the cache, and the folder built ahead of time.

Both are made of entries. An entry is a folder with `kernel.cu`, `kernel.cubin` and `meta.json` (name, target, compiler,
launch facts, ptxas report, digests of the other two), so a person can read what a profiler shows. That is why this is
not cuda.core's FileStreamProgramCache: it keeps bare cubins, gives a truncated one back as good, and lets every process
that misses compile. Here

- an entry appears whole or not at all: it is written to a temporary folder, synced, and renamed into place;
- a damaged or foreign entry is a miss, and is replaced by what the miss compiles;
- one process compiles a key, the others wait for it (not for ever: a lock may be held by a process that is stopped);
- a root that cannot be written costs one warning and the saved time, never the kernel;
- a root that others can write is not used: whoever can write a cubin runs code on this GPU, in this process's memory.

The cache's key covers every input of `compile_unit` and the exact compiler, so nothing else can make an entry stale.
An ahead-of-time folder must work with neither Jinja nor NVRTC, hence with no source text to hash: its kernels are found
by name and target. It is good for the fa2gen version that built it, and a kernel in it only while its launch facts
equal the plan's. (Edited templates do not make it stale: build it again, or unset FA2GEN_AOT_DIR while editing.)
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fa2gen import __version__, env
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

if TYPE_CHECKING:
    from fa2gen.plan import KernelPlan

__all__ = ["SCHEMA", "Entry", "Key", "Store", "key_of", "read_current", "read_entry", "write_entry", "write_manifest"]

SCHEMA = 1
"""Of meta.json and manifest.json. Another number is another format: a miss."""

_SOURCE, _CUBIN, _META, _MANIFEST = "kernel.cu", "kernel.cubin", "meta.json", "manifest.json"
_TEMPORARY = ".tmp-"
_STALE_SECONDS = 3600
_LOCKS = ".locks"
_LOCK_SECONDS = 60.0
_CACHE_FOLDER = re.compile(r".+-[0-9a-f]{16}")
_WRITABLE_BY_OTHERS = 0o022
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}  # what rename says of a folder, or of a file, in the place
# What reading a file of ours raises when it is missing, or not ours.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)

_log = logging.getLogger("fa2gen")


class Key(NamedTuple):
    """What names an entry of the cache: the kernel, and 64 hex digits over everything that decides its cubin."""

    name: str
    digest: str

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.digest[:16]}"


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
    return Key(unit.name, _digest(json.dumps(inputs, sort_keys=True).encode()))


class Store:
    """The kernel cache in one root folder, and the ahead-of-time folder of the environment before it.

    root          default: FA2GEN_CACHE_DIR, else fa2gen/ in the user's cache directory. Created when first needed.
    lock_seconds  how long to wait for another process that compiles the same key before compiling it here too.

    A store may be shared by threads.
    """

    def __init__(self, root: Path | None = None, lock_seconds: float = _LOCK_SECONDS) -> None:
        self.root = env.cache_dir() if root is None else Path(root)
        self.lock_seconds = lock_seconds
        self._memory: dict[Key, Entry] = {}  # only what the disk would not take
        self._threads: dict[Key, threading.Lock] = {}

    def get_or_compile(self, plan: KernelPlan, target: str | None = None) -> Entry:
        """The kernel of a plan: built ahead of time, or cached, or compiled now.

        target  replaces the plan's own NVRTC target, e.g. "sm_90" for an sm80 kernel on a 9.0 device.

        Raises RenderError, CompileError, or StoreError when it would have to be compiled and may or can not.
        """
        target = target or plan.target
        if (folder := env.aot_dir()) and (entry := _ahead_of_time(folder, plan, target)):
            return entry
        try:
            unit = plan_unit(plan, target)
        except ImportError as error:
            raise StoreError(f"{_not_built(plan, target, folder)} It cannot be generated here: {error}.") from error
        if not env.disable_jit():
            return self.compile_once(unit)
        if entry := self.try_load(key_of(unit)):
            return entry
        raise StoreError(f"{_not_built(plan, target, folder)} It is not in the cache {self.root} either.")

    def compile_once(self, unit: Unit) -> Entry:
        """The cached entry of a unit, else its compiled one: one compilation for all threads and processes that ask."""
        key = key_of(unit)
        if entry := self.try_load(key):
            return entry
        with self._single_flight(key):
            if entry := self.try_load(key):  # who held the lock before us has compiled it
                return entry
            compiled = compile_unit(unit)
            _log.info("compiled %s for %s in %.2f s", unit.name, unit.target, compiled.report.compile_seconds)
            entry = _make_entry(unit, key, compiled.cubin, compiled.report)
            self.put(key, entry)
            return entry

    def try_load(self, key: Key) -> Entry | None:
        """The entry, or None where there is none or it is damaged. Never raises for what is on the disk."""
        if key in self._memory:
            return self._memory[key]
        return read_current(self.root / key.folder, key) if self._usable else None

    def put(self, key: Key, entry: Entry) -> bool:
        """Keeps an entry: on disk (True), else in memory for as long as this store lives (False)."""
        if self._usable:
            try:
                write_entry(self.root / key.folder, entry, mode=0o700)
                return True
            except OSError as error:
                _warn_once(self.root, f"cannot write the kernel cache: {error}; kernels are kept in memory only")
        self._memory[key] = entry
        return False

    def clear(self) -> int:
        """Removes all entries and returns how many there were. Other files stay: the root may be someone's home."""
        folders = [*self._folders()]
        for folder in folders:
            _remove(folder)
        return len(folders)  # lock files stay: removing one that is held would let two processes hold "the" lock

    def size(self) -> int:
        """Bytes in all entries."""
        return sum(_size(folder / name) for folder in self._folders() for name in (_SOURCE, _CUBIN, _META))

    def list(self) -> tuple[Entry, ...]:
        """All whole entries, by name."""
        return tuple(entry for folder in sorted(self._folders()) if (entry := read_entry(folder)))

    def _folders(self) -> Iterator[Path]:
        if self._usable:
            yield from (path for path in self.root.iterdir() if path.is_dir() and _CACHE_FOLDER.fullmatch(path.name))

    @functools.cached_property
    def _usable(self) -> bool:
        """Whether entries may be read from the root; looked up once, when the store is first used."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            complaint = _distrust(self.root, owners={os.geteuid()})
        except OSError as error:
            complaint = f"it cannot be used: {error}"
        if complaint:
            _warn_once(self.root, f"kernel cache {self.root} is off, kernels are compiled in memory: {complaint}")
        return not complaint

    @contextlib.contextmanager
    def _single_flight(self, key: Key) -> Iterator[None]:
        """Lets one thread of one process in at a time, as long as locks work here and are not held too long."""
        with self._threads.setdefault(key, threading.Lock()), contextlib.ExitStack() as stack:
            if self._usable:
                from filelock import FileLock  # 60 ms that only a miss pays

                try:
                    locks = self.root / _LOCKS
                    locks.mkdir(mode=0o700, exist_ok=True)
                    stack.enter_context(FileLock(locks / f"{key.folder}.lock", timeout=self.lock_seconds))
                except OSError as error:  # filelock.Timeout is one too
                    _log.debug("compiling %s without a lock: %s", key.name, error)
            yield


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
        "sha256": {_SOURCE: _digest(unit.source.encode()), _CUBIN: _digest(cubin)},
    }
    return Entry(unit.name, unit.source, cubin, json.loads(_json(meta)), report)  # as whoever reads it will find it


def read_entry(folder: Path) -> Entry | None:
    """The entry in `folder`, or None where it is missing, damaged or of another format. Never raises."""
    try:
        meta = json.loads((folder / _META).read_bytes())
        source, cubin = (folder / _SOURCE).read_bytes(), (folder / _CUBIN).read_bytes()
        if meta["schema"] != SCHEMA or meta["sha256"] != {_SOURCE: _digest(source), _CUBIN: _digest(cubin)}:
            return None
        if not cubin_is_whole(cubin) or not meta.keys() >= {"fa2gen", "name", "target", "compiler", "key", "launch"}:
            return None
        report = ResourceReport(**{**meta["report"], "notes": tuple(meta["report"]["notes"])})
        return Entry(meta["name"], source.decode(), cubin, meta, report)
    except _UNREADABLE:
        return None


def read_current(folder: Path, key: Key) -> Entry | None:
    """The entry in `folder` if it is the one that `key` means and nobody else can have put it there. Never raises."""
    try:
        if _distrust(folder, owners={os.geteuid()}):  # from a time when others could write the root
            return None
    except OSError:
        return None
    entry = read_entry(folder)
    return entry if entry and entry.meta["key"] == key.digest else None


def write_entry(folder: Path, entry: Entry, mode: int = 0o755) -> None:
    """Puts a whole entry at `folder`, in place of whatever is there. Raises OSError, and then leaves nothing behind."""
    parent = folder.parent
    parent.mkdir(mode=mode, parents=True, exist_ok=True)
    _sweep(parent)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=parent))
    try:
        _write_durably(temporary / _SOURCE, entry.source.encode())
        _write_durably(temporary / _CUBIN, entry.cubin)
        _write_durably(temporary / _META, _json(entry.meta))
        _sync(temporary)
        temporary.chmod(mode)
        _move_into_place(temporary, folder, entry)
    finally:
        _remove(temporary)


def _move_into_place(temporary: Path, folder: Path, entry: Entry) -> None:
    """Renames, which is atomic but refused when the place is taken: then what is there is moved away first."""
    for attempt in range(8):  # more than one only when others write the same entry at this moment
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        if read_current(folder, Key(entry.name, entry.meta["key"])):
            return  # as good as ours, and a reader may be at it
        old = temporary.with_name(f"{temporary.name}-{attempt}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, old)
            _remove(old)
    raise FileExistsError(f"{folder} cannot be replaced: something else keeps writing it")


def _sweep(parent: Path) -> None:
    """Removes temporary folders whose writers were killed: writing one takes well under a second."""
    oldest = time.time() - _STALE_SECONDS
    for path in parent.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime < oldest:
                _remove(path)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # damaged, or removed by another process
        return 0


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# The ahead-of-time folder --------------------------------------------------------------------------------------------


def write_manifest(root: Path) -> None:
    """Writes manifest.json anew, atomically: a row for each whole entry in `root` of this version. Raises OSError.

    It is made from what is there, so builds into one folder, also at the same time, need not know of each other.
    """
    entries = [
        (folder.name, read_entry(folder)) for folder in sorted(root.iterdir()) if not folder.name.startswith(".")
    ]
    kernels = [
        {"folder": folder} | {fact: entry.meta[fact] for fact in ("name", "target", "compiler", "key")}
        for folder, entry in entries
        if entry and entry.meta["fa2gen"] == __version__
    ]
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=root))
    try:
        _write_durably(temporary / _MANIFEST, _json({"schema": SCHEMA, "fa2gen": __version__, "kernels": kernels}))
        os.replace(temporary / _MANIFEST, root / _MANIFEST)
    finally:
        _remove(temporary)


def _ahead_of_time(root: Path, plan: KernelPlan, target: str) -> Entry | None:
    """The kernel in an ahead-of-time folder; a folder or kernel that is there and unfit is a miss with one warning."""
    folder = _aot_kernels(root).get((plan.name, target))
    if folder is None:
        return None
    entry = read_entry(folder)
    meant = {"name": plan.name, "target": target, "launch": launch_facts(plan)}
    if entry and meant.items() <= entry.meta.items():
        return entry
    why = "is launched differently by this fa2gen" if entry else "is damaged"
    _warn_once(folder, f"kernel {folder}, built ahead of time, {why} and is not used; build it again")
    return None


@functools.cache
def _aot_kernels(root: Path) -> dict[tuple[str, str], Path]:
    """The kernels of a usable ahead-of-time folder, read once per process: it is written before, not during, use."""
    try:
        # Its owner may also be whoever installed it: root in a container image.
        complaint = _distrust(root, owners={os.geteuid(), 0})
        manifest = json.loads((root / _MANIFEST).read_bytes())
        built_by = (manifest["schema"], manifest["fa2gen"])
        if not complaint and built_by != (SCHEMA, __version__):
            complaint = f"built by fa2gen {built_by[1]} (schema {built_by[0]}), this is {__version__} ({SCHEMA})"
        kernels = {(row["name"], row["target"]): root / row["folder"] for row in manifest["kernels"]}
    except _UNREADABLE as error:
        complaint = f"{_MANIFEST} cannot be read: {error!r}"
    if complaint:
        _warn_once(root, f"FA2GEN_AOT_DIR={root} is not used: {complaint}")
        return {}
    return kernels


def _not_built(plan: KernelPlan, target: str, folder: Path | None) -> str:
    where = f"not in FA2GEN_AOT_DIR={folder}" if folder else "not built ahead of time (FA2GEN_AOT_DIR is not set)"
    return (
        f"{plan.name} for {target} is {where}. Build it where NVRTC is installed: fa2gen build --arch {plan.arch} "
        f"--head-dim {plan.head_dim} --out DIR, then set FA2GEN_AOT_DIR=DIR."
    )


# Trust ---------------------------------------------------------------------------------------------------------------


def _distrust(root: Path, owners: set[int]) -> str:
    """Why others could have put something into this folder; "" when they could not. Raises OSError."""
    status = root.stat()
    if status.st_uid not in owners:
        return f"it belongs to uid {status.st_uid}, not to uid {os.geteuid()} that runs this"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return f"others can write it (mode {status.st_mode & 0o777:o}); chmod go-w {root}"
    return ""


_warned: set[Path] = set()


def _warn_once(subject: Path, message: str) -> None:
    if subject not in _warned:
        _warned.add(subject)
        _log.warning("%s", message)

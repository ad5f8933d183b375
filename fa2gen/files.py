"""Files that are written whole or not at all, and read only where nobody else can have put them there.

What fa2gen keeps (kernels, libraries for the CPU, tuned rows, results) is written under a temporary name that begins
with `TEMPORARY`, synced, and renamed into place. A *sealed folder* is how a kernel is kept: its files, and a meta.json
that holds their digests, so a damaged one is seen. Nothing that lacks that seal, or that prefix, is ever removed.

Whoever can write a kernel runs code in this process: what is loaded is read with `owners`, the users whose files are
believed, and then neither the folder nor a file in it may be anybody else's or be writable by others.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from fa2gen.log import logger, warn_once

__all__ = [
    "META",
    "TEMPORARY",
    "UNREADABLE",
    "digest",
    "distrust",
    "installed",
    "is_plain",
    "is_sealed",
    "lock",
    "own",
    "read_file",
    "read_folder",
    "remove_folder",
    "seal",
    "size_of_folder",
    "write_file",
    "write_folder",
]

TEMPORARY = ".fa2gen-tmp-"
META = "meta.json"

UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a file of ours raises when it is missing, or not ours."""

_STALE_SECONDS = 3600
_WRITABLE_BY_OTHERS = 0o022
_FILE_NAME = re.compile(r"\w[\w.-]*")
_MAX_META = 1 << 20  # bytes; a kernel's has 4 KB
_MAX_FILE = 1 << 28  # bytes; a kernel's largest, a library for the sanitizer, has 20 MB
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}  # what rename says of a folder, or of a file, in the place
_HELD = {errno.EAGAIN, errno.EACCES}  # what flock says of a lock that somebody holds; the second where NFS emulates it
_PATIENCE_SECONDS = 5.0  # after which waiting for a lock is told


# Trust ---------------------------------------------------------------------------------------------------------------


def own() -> set[int]:
    """Whose cache is believed: that of the user who runs this."""
    return {os.geteuid()}


def installed() -> set[int]:
    """Whose ahead-of-time folder is believed: also that of whoever installed it, root in a container image."""
    return {os.geteuid(), 0}


def distrust(folder: Path, owners: Collection[int]) -> str:
    """Why nothing may be read from this folder or kept in it; "" where it may, also where there is no folder yet."""
    try:
        link, status = folder.lstat(), folder.stat()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"it cannot be used: {error}"
    if not stat.S_ISDIR(status.st_mode):
        return "it is no folder"
    return _foreign(link) if link.st_uid not in owners else _distrust(status, folder, owners)


def _distrust(status: os.stat_result, path: Path, owners: Collection[int]) -> str:
    if status.st_uid not in owners:
        return _foreign(status)
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return f"others can write it (mode {stat.S_IMODE(status.st_mode):o}); chmod go-w {path}"
    return ""


def _foreign(status: os.stat_result) -> str:
    return f"it belongs to uid {status.st_uid}, not to uid {os.geteuid()} that runs this"


# One file ------------------------------------------------------------------------------------------------------------


def read_file(path: Path, owners: Collection[int] | None = None, limit: int = _MAX_FILE) -> bytes:
    """The bytes of a regular file; where owners are given, of one that nobody else can have written.

    Raises OSError, also for a pipe or a device (at once: nothing is waited for) and for more than `limit` bytes.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, {limit:,} at most are read", str(path))
        if owners is not None and (complaint := _distrust(status, path, owners)):
            raise PermissionError(errno.EPERM, complaint, str(path))
        return file.read(limit + 1)


def write_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Puts a whole file at `path`, whose folder is made if need be, or leaves what is there. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        _write(descriptor, data, mode)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _write(descriptor: int, data: bytes, mode: int) -> None:
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)


# A sealed folder -----------------------------------------------------------------------------------------------------


def digest(data: bytes) -> str:
    """SHA-256, as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def seal(files: Mapping[str, bytes]) -> dict[str, str]:
    """What meta.json says under "sha256"."""
    return {name: digest(data) for name, data in files.items()}


def read_folder(folder: Path, owners: Collection[int] | None = None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The meta.json and the files of a sealed folder.

    Raises one of UNREADABLE where it is missing, damaged, not sealed or, with `owners`, not trusted.
    """
    if owners is not None and (complaint := distrust(folder, owners)):
        raise PermissionError(errno.EPERM, complaint, str(folder))
    meta = _read_meta(folder, owners)
    files = {name: read_file(folder / name, owners) for name in meta["sha256"]}
    if meta["sha256"] != seal(files):
        raise ValueError(f"{folder} is damaged: a digest differs")
    return meta, files


def is_sealed(folder: Path) -> bool:
    """Whether fa2gen made this folder, by its meta.json; what lies beside that may be damaged."""
    try:
        meta = _read_meta(folder, None)
        return not folder.is_symlink() and isinstance(meta["fa2gen"], str)
    except UNREADABLE:
        return False


def is_plain(name: str) -> bool:
    """Whether this is the name of a file or folder, without a way out of the folder that it is looked for in."""
    return _FILE_NAME.fullmatch(name) is not None


def size_of_folder(folder: Path) -> int:
    """Bytes of a sealed folder's files; of what is damaged, or removed by another process, as many as are there."""
    size = 0
    with contextlib.suppress(*UNREADABLE):
        for name in (META, *_read_meta(folder, None)["sha256"]):
            size += (folder / name).stat().st_size
    return size


def _read_meta(folder: Path, owners: Collection[int] | None) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads(read_file(folder / META, owners, _MAX_META))
    for name in meta["sha256"]:
        if not is_plain(name):
            raise ValueError(f"{folder / META}: sha256 names {name!r}, which is no file of that folder")
    return meta


def write_folder(
    folder: Path,
    files: Mapping[str, bytes],
    meta: Mapping[str, Any],
    mode: int = 0o755,
    keeps: Callable[[], bool] = lambda: False,
) -> None:
    """Puts a whole sealed folder at `folder`, in the place of a damaged or older one.

    meta   of meta.json; its "sha256" is `seal(files)`.
    keeps  asked when the place is taken: whether what is there now is as good, so that its readers are left in peace.

    Raises OSError, and then leaves nothing behind; FileExistsError where the place holds what fa2gen did not make.
    """
    parent = folder.parent
    parent.mkdir(mode=mode, parents=True, exist_ok=True)
    _sweep(parent)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
    try:
        contents = {**files, META: (json.dumps(meta, indent=2) + "\n").encode()}
        for name, data in contents.items():
            _write(os.open(temporary / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), data, mode & 0o666)
        _sync(temporary)
        temporary.chmod(mode)
        _move_into_place(temporary, folder, contents.keys(), keeps)
    finally:
        _remove(temporary)


def _move_into_place(temporary: Path, folder: Path, names: Collection[str], keeps: Callable[[], bool]) -> None:
    """Renames, which is atomic but refused when the place is taken: then what is there is moved away first."""
    for attempt in range(8):  # more than one only when others write the same folder at this moment
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        if keeps():
            return
        if strangers := _strangers(folder, names):
            raise FileExistsError(
                errno.EEXIST, f"it holds {strangers[0]!r}, which fa2gen did not make; move it away", str(folder)
            )
        old = temporary.with_name(f"{temporary.name}-{attempt}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, old)
            _remove(old)
    raise FileExistsError(errno.EEXIST, "something else keeps writing it", str(folder))


def _strangers(folder: Path, names: Collection[str]) -> list[str]:
    """What is in a place that we want, and is no file of ours by its name: the place itself if it is no folder."""
    try:  # one look: between two another writer may have moved ours away, or put it back
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return [folder.name]
    except FileNotFoundError:
        return []
    with contextlib.suppress(*UNREADABLE):  # damaged, or removed at this moment
        names = {*names, *_read_meta(folder, None)["sha256"]}
    try:
        return sorted(path.name for path in folder.iterdir() if path.name not in names)
    except FileNotFoundError:
        return []


def remove_folder(folder: Path) -> None:
    """Removes a sealed folder: the files that its meta.json names, that, and the folder if nothing else is in it.

    Raises OSError where any of these cannot be removed.
    """
    for name in (*_read_meta(folder, None)["sha256"], META):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / name)
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise


def _sweep(parent: Path) -> None:
    """Removes temporary files whose writers were killed: writing one takes well under a second."""
    oldest = time.time() - _STALE_SECONDS
    for path in parent.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime < oldest:
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Locks ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(path: Path, seconds: float) -> Iterator[None]:
    """Lets one process in at a time, or goes on without: a lock saves work here, and must never cost any.

    Where the file system has no locks, or `path` cannot be made, nothing is waited for; where another process holds the
    lock, at most `seconds`. A process that is forked meanwhile does not go on holding it. The file is removed at the
    end. flock itself rather than filelock, which ends the call, or waits in silence, where flock fails.
    """
    descriptor = None
    try:
        descriptor = _locked(path, seconds)
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                path.unlink()
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # for all copies of the descriptor: a fork may have made some
            os.close(descriptor)


def _locked(path: Path, seconds: float) -> int | None:
    """A descriptor that holds the lock, or None."""
    started = time.monotonic()
    told = False
    while True:
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:  # the cache will say that it cannot be written
            logger.debug("no lock %s: %s", path, error)
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
            os.close(descriptor)  # who held it has removed it: look again
            continue
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _HELD:
                warn_once(
                    path.parent,
                    f"files in {path.parent} cannot be locked ({error.strerror}): processes that need the same kernel "
                    "at the same time will each compile it",
                )
                return None
        waited = time.monotonic() - started
        if waited >= seconds:
            logger.warning("went on without the lock %s, which was held for %.0f s", path, waited)
            return None
        if not told and waited >= _PATIENCE_SECONDS:
            told = True
            logger.warning("waiting for another process that holds %s, for %.0f s at most", path, seconds)
        time.sleep(0.02)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False

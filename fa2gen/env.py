"""Every environment variable that fa2gen reads: documented, and read, here and nowhere else.

Each function reads its variable when it is called, never at import, so a program or a test can still change its mind.
An empty value counts as unset. A value that cannot be meant raises `InvalidInput` naming the variable and what it may
hold: a typing error that is silently ignored costs an afternoon.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fa2gen.arch import ARCHES
from fa2gen.errors import InvalidInput
from fa2gen.log import warn_once

__all__ = ["VARIABLES", "aot_dir", "arch", "cache_dir", "disable_jit", "jobs", "log_level", "problems", "specs_dirs"]

_PREFIX = "FA2GEN_"
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_JOB_COUNT = re.compile("0*[1-9][0-9]{0,3}")
_FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Variable:
    """One row of the table: `default` and `meaning` are what the documentation and `fa2gen doctor` print."""

    name: str
    default: str
    meaning: str

    def text(self) -> str | None:
        """The value without surrounding blanks, or None when it is unset or empty."""
        return os.environ.get(self.name, "").strip() or None

    def refuse(self, allowed: str) -> InvalidInput:
        """The error for a value that is none of `allowed`."""
        return InvalidInput(f"{self.name}={self.text()!r} is not valid: it must be {allowed} (unset: {self.default})")


_CACHE_DIR = Variable(
    "FA2GEN_CACHE_DIR",
    "fa2gen/ in the user's cache directory",
    "folder of compiled kernels; only its owner may write it",
)
_AOT_DIR = Variable("FA2GEN_AOT_DIR", "none", "folder written by `fa2gen build --out`, searched before the cache")
_SPECS = Variable(
    "FA2GEN_SPECS", "none", "folders of your own specs, separated by colons: their tilings come before all others"
)
_DISABLE_JIT = Variable(
    "FA2GEN_DISABLE_JIT", "0", "1: never compile at run time; a kernel that was not built is an error"
)
_JOBS = Variable("FA2GEN_JOBS", "the usable CPU cores", "how many kernels are compiled at once")
_ARCH = Variable("FA2GEN_ARCH", "by the device", "force a kernel family: " + " or ".join(ARCHES))
_LOG_LEVEL = Variable("FA2GEN_LOG_LEVEL", "WARNING", "what is logged: " + ", ".join(_LOG_LEVELS))
_FA3_LIBRARY = Variable(
    "FA2GEN_FA3_LIBRARY", "an installed package", "`fa2gen bench` and `examples/`: FlashAttention-3's operator library"
)

VARIABLES = (_CACHE_DIR, _AOT_DIR, _SPECS, _DISABLE_JIT, _JOBS, _ARCH, _LOG_LEVEL, _FA3_LIBRARY)


def cache_dir() -> Path:
    """The root of the kernel cache, absolute; it need not exist.

    Where there is no home for it (no HOME and no passwd entry, as in a container; `~nobody/`; a current folder that was
    removed) it is a private folder among the temporary ones, with one warning: kernels never fail for want of a cache.
    """
    text = _CACHE_DIR.text()
    try:
        if text:
            return Path(text).expanduser().absolute()
        from platformdirs import user_cache_path  # only here: not every process needs it

        return user_cache_path("fa2gen").absolute()
    except (RuntimeError, OSError) as error:
        root = _temporary_folder() / f"fa2gen-{os.geteuid()}"
        asked = f"{_CACHE_DIR.name}={text!r}" if text else "the user's cache directory"
        warn_once(
            root, f"{asked} cannot be found ({error}): kernels are kept in {root}; set {_CACHE_DIR.name} to keep them"
        )
        return root


def aot_dir() -> Path | None:
    """The ahead-of-time folder, absolute, or None. One without a meaning (`~nobody/`) is a folder that is not there."""
    return _folder(text) if (text := _AOT_DIR.text()) else None


def specs_dirs() -> tuple[Path, ...]:
    """The user's own folders of specs, absolute, the first one's tilings before the second's."""
    return tuple(_folder(part) for part in (_SPECS.text() or "").split(os.pathsep) if part.strip())


def disable_jit() -> bool:
    """Whether only kernels that are already compiled may be used."""
    flag = _FLAGS.get((_DISABLE_JIT.text() or "0").lower())
    if flag is None:
        raise _DISABLE_JIT.refuse("0 or 1")
    return flag


def jobs() -> int:
    """How many kernels to compile at once, at least 1."""
    text = _JOBS.text()
    if text is None:
        return len(os.sched_getaffinity(0))  # a container may use fewer cores than the machine has
    if not _JOB_COUNT.fullmatch(text):
        raise _JOBS.refuse("a whole number from 1 to 9999")
    return int(text)


def arch() -> str | None:
    """The kernel family to use whatever the device, or None."""
    text = _ARCH.text()
    if text is not None and text not in ARCHES:
        raise _ARCH.refuse(" or ".join(ARCHES))
    return text


def log_level() -> str | None:
    """A level name that Python's logging knows, or None: as the application has it."""
    text = _LOG_LEVEL.text()
    text = text and text.upper()
    if text is not None and text not in _LOG_LEVELS:
        raise _LOG_LEVEL.refuse("one of " + ", ".join(_LOG_LEVELS))
    return text


def problems() -> list[str]:
    """What is wrong in the environment, for `fa2gen doctor`: values that cannot be meant, and names that look like ours
    and are not, most likely misspelt."""
    found = []
    for read in (cache_dir, aot_dir, specs_dirs, disable_jit, jobs, arch, log_level):
        try:
            read()
        except InvalidInput as error:
            found.append(str(error))
    ours = {variable.name for variable in VARIABLES}
    strange = sorted(name for name in os.environ if name.startswith(_PREFIX) and name not in ours)
    return found + [f"{name} is no variable of fa2gen's: misspelt?" for name in strange]


def _folder(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except (RuntimeError, OSError):
        return Path("/", text)


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError:  # none can be written: the cache will say so
        return Path("/tmp")

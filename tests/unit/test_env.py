"""The table of environment variables: each is read when asked for, and a value that cannot be meant is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fa2gen import env, log
from fa2gen.errors import Fa2GenError


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def test_defaults(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert env.cache_dir() == Path("/somewhere/fa2gen")
    assert env.aot_dir() is None
    assert env.disable_jit() is False
    assert env.jobs() >= 1
    assert env.arch() is None
    assert env.log_level() is None


@pytest.mark.parametrize(
    ("read", "name", "text", "value"),
    [
        (env.cache_dir, "FA2GEN_CACHE_DIR", "/tmp/kernels", Path("/tmp/kernels")),
        (env.cache_dir, "FA2GEN_CACHE_DIR", "~/kernels", Path.home() / "kernels"),
        (env.cache_dir, "FA2GEN_CACHE_DIR", "kernels", Path.cwd() / "kernels"),
        (env.aot_dir, "FA2GEN_AOT_DIR", "/opt/kernels", Path("/opt/kernels")),
        (env.aot_dir, "FA2GEN_AOT_DIR", "", None),
        (env.disable_jit, "FA2GEN_DISABLE_JIT", "1", True),
        (env.disable_jit, "FA2GEN_DISABLE_JIT", "True", True),
        (env.disable_jit, "FA2GEN_DISABLE_JIT", "0", False),
        (env.disable_jit, "FA2GEN_DISABLE_JIT", "  ", False),
        (env.jobs, "FA2GEN_JOBS", "3", 3),
        (env.arch, "FA2GEN_ARCH", "sm80", "sm80"),
        (env.log_level, "FA2GEN_LOG_LEVEL", "debug", "DEBUG"),
    ],
)
def test_values(monkeypatch, read, name, text, value):
    monkeypatch.setenv(name, text)
    assert read() == value


@pytest.mark.parametrize(
    ("read", "name", "text", "hint"),
    [
        (env.disable_jit, "FA2GEN_DISABLE_JIT", "maybe", "0 or 1"),
        (env.jobs, "FA2GEN_JOBS", "0", "whole number from 1"),
        (env.jobs, "FA2GEN_JOBS", "-2", "whole number from 1"),
        (env.jobs, "FA2GEN_JOBS", "many", "whole number from 1"),
        (env.jobs, "FA2GEN_JOBS", "\u0663", "whole number from 1"),
        (env.jobs, "FA2GEN_JOBS", "9" * 5000, "whole number from 1"),
        (env.jobs, "FA2GEN_JOBS", "1.5", "whole number from 1"),
        (env.arch, "FA2GEN_ARCH", "sm70", "sm80 or sm90"),
        (env.arch, "FA2GEN_ARCH", "SM90A", "sm80 or sm90"),
        (env.log_level, "FA2GEN_LOG_LEVEL", "loud", "DEBUG, INFO, WARNING, ERROR"),
    ],
)
def test_bad_values_name_the_variable_and_what_it_may_hold(monkeypatch, read, name, text, hint):
    monkeypatch.setenv(name, text)
    with pytest.raises(Fa2GenError) as caught:
        read()
    assert name in str(caught.value) and repr(text) in str(caught.value) and hint in str(caught.value)


def test_every_variable_is_documented():
    assert all(variable.default and variable.meaning for variable in env.VARIABLES)
    assert len({variable.name for variable in env.VARIABLES}) == len(env.VARIABLES)


def test_problems_name_what_is_wrong_and_what_is_misspelt(monkeypatch):
    assert env.problems() == []
    monkeypatch.setenv("FA2GEN_CACHEDIR", "/tmp")
    monkeypatch.setenv("FA2GEN_CACHE_DIR", "/tmp")
    monkeypatch.setenv("FA2GEN_JOBS", "0")
    monkeypatch.setenv("FA2GEN_DISABLE_JIT", "maybe")
    found = env.problems()
    assert [next(name for name in ("JIT", "JOBS", "CACHEDIR") if name in text) for text in found] == [
        "JIT",
        "JOBS",
        "CACHEDIR",
    ]


# No home -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, "~no_such_user/x", "relative"])
def test_a_cache_without_a_home_is_a_private_temporary_one(monkeypatch, tmp_path, caplog, text):
    """As in a container: no HOME, no name for the uid; or a current folder that was removed."""

    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(log, "_warned", set())
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    if text:
        monkeypatch.setenv("FA2GEN_CACHE_DIR", text)
    if text == "relative":
        gone = tmp_path / "gone"
        gone.mkdir()
        monkeypatch.chdir(gone)
        gone.rmdir()
    else:
        monkeypatch.setattr(Path, "expanduser", nobody)
        monkeypatch.setattr("platformdirs.user_cache_path", nobody)
    for _ in range(3):
        assert env.cache_dir() == tmp_path / f"fa2gen-{os.geteuid()}"
    assert len(caplog.records) == 1 and "FA2GEN_CACHE_DIR" in caplog.text
    if text:
        assert repr(text) in caplog.text
    monkeypatch.undo()


def test_without_a_home_kernels_are_found_all_the_same(tmp_path):
    """In a process of a uid that has neither: the case of a container, which monkeypatching may not tell whole."""
    code = (
        "import os, pwd\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "from fa2gen.store import Store\n"
        "print(Store().root, Store().list())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == f"{tmp_path}/fa2gen-{os.geteuid()} ()\n", done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_ahead_of_time_folder_without_a_meaning_is_not_there(monkeypatch):
    monkeypatch.setenv("FA2GEN_AOT_DIR", "~no_such_user/x")
    folder = env.aot_dir()
    assert folder is not None and folder.is_absolute() and not folder.exists()


# The library's logger ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "configured", "shown"),
    [
        ("INFO", "", ["fa2gen: news"]),
        ("WARNING", "", []),
        (None, "", []),
        ("INFO", "logging.basicConfig(format='app %(message)s')", ["app news"]),
        (None, "logging.basicConfig(format='app %(message)s', level='INFO')", ["app news"]),
    ],
)
def test_the_level_is_the_library_s(level, configured, shown):
    code = (
        f"import logging; {configured or 'pass'}\nfrom fa2gen import log, store\nstore.Store(); log.logger.info('news')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "FA2GEN_LOG_LEVEL"}
    environment |= {"FA2GEN_LOG_LEVEL": level} if level else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == shown

"""The table of environment variables: each is read when asked for, and a value that cannot be meant is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fa2gen import env
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
    assert env.log_level() == "WARNING"


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


def test_misspelt_variables_are_found(monkeypatch):
    monkeypatch.setenv("FA2GEN_CACHEDIR", "/tmp")
    monkeypatch.setenv("FA2GEN_CACHE_DIR", "/tmp")
    assert env.unknown() == ["FA2GEN_CACHEDIR"]

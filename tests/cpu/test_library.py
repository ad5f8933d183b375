"""What is loaded into this process is what fa2gen compiled for this user, or it is compiled anew."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from fa2gen import files, log
from fa2gen.cpu import build
from fa2gen.cpu.build import build_source
from fa2gen.render import Rendered
from fa2gen.store import Store

# Any kernel will do, and the machine takes four seconds: this one needs none of it.
SOURCE = Rendered('extern "C" int answer() { return 42; }\n', ("here.j2:1",))


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What was compiled. The cache is this test's own; the machine is an empty file."""
    commands: list[tuple[str, ...]] = []

    def compile_plainly(arguments: tuple[str, ...], what: str, origins: tuple[str, ...], cwd: Path) -> str:
        commands.append(arguments)
        output = Path(cwd, arguments[arguments.index("-o") + 1])
        if "all.cc" in arguments:
            output.write_bytes(b"the machine")
        else:
            source = Path(cwd, "kernel.cc").read_text().replace("FA2GEN_CPU_ENTRY", "//")
            command = [build.find_compiler(), "-x", "c++", "-shared", "-fPIC", "-o", str(output), "-"]
            subprocess.run(command, input=source, text=True, check=True)
        return ""

    monkeypatch.setattr(build, "_compile", compile_plainly)
    monkeypatch.setattr(build, "_unusable", set())
    build._temporary.cache_clear()
    monkeypatch.setattr(log, "_warned", set())
    monkeypatch.setenv("FA2GEN_CACHE_DIR", str(tmp_path / "cache"))
    return commands


def library() -> Path:
    return build_source("k", SOURCE).path


def test_a_library_is_compiled_once_for_its_owner_alone(compiled, tmp_path):
    path = library()
    assert library() == path and len(compiled) == 2  # the machine, the kernel
    assert path.parent.parent == tmp_path / "cache" / "cpu"
    assert {file.name for file in path.parent.iterdir()} == {"kernel.so", "kernel.cc", "warnings.txt", "meta.json"}
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert Store().size() > path.stat().st_size and Store().clear() == 2
    assert not path.exists()


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "another", "no seal", "a pipe", "for all to write", "its folder for all"]
)
def test_a_damaged_or_planted_library_is_compiled_anew(compiled, damage):
    path = library()
    whole = path.read_bytes()
    if damage == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif damage == "no seal":
        (path.parent / "meta.json").unlink()
    elif "for all" in damage:
        (path if damage == "for all to write" else path.parent).chmod(0o777)
    elif damage == "another":
        path.write_bytes(whole.replace(b"answer", b"attack"))
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    assert library() == path and len(compiled) == 3
    assert path.read_bytes() == whole


def test_a_damaged_machine_is_compiled_anew(compiled):
    path = library()
    (machine,) = path.parent.parent.glob("machine-*/machine.o")
    machine.write_bytes(b"")
    path.write_bytes(b"")
    library()
    assert machine.read_bytes() == b"the machine" and len(compiled) == 4


@pytest.mark.parametrize("place", ["cache", "cache/cpu"])
def test_a_cache_that_others_can_write_is_neither_read_nor_written(compiled, tmp_path, caplog, place):
    planted = library()
    (tmp_path / place).chmod(0o777)
    before = sorted((tmp_path / "cache").rglob("*"))
    path = library()
    assert path != planted and path == library() and len(compiled) == 4
    assert tmp_path not in path.parents and path.parent.parent.stat().st_mode & 0o777 == 0o700
    assert sorted((tmp_path / "cache").rglob("*")) == before
    assert len(caplog.records) == 1 and "chmod go-w" in caplog.text


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_cache_that_cannot_be_written_costs_the_time_and_a_warning(compiled, tmp_path, monkeypatch, caplog, code):
    real = files.tempfile.mkdtemp

    def full(suffix: str | None = None, prefix: str | None = None, dir: Path | None = None) -> str:
        if dir and tmp_path in Path(dir).parents:
            raise OSError(code, os.strerror(code), str(dir))
        return real(suffix, prefix, dir)

    monkeypatch.setattr(files.tempfile, "mkdtemp", full)
    path = library()
    assert path == library() and path.is_file() and len(compiled) == 2
    assert len(caplog.records) == 1 and os.strerror(code) in caplog.text


def test_a_cache_that_is_a_file(compiled, tmp_path, caplog):
    (tmp_path / "cache").write_text("hello")
    assert library() == library()
    assert len(compiled) == 2 and len(caplog.records) == 1

"""`fa2gen doctor`, and that nothing is called done that is not where a cache, a folder or the environment is broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

import fa2gen
from fa2gen import catalog, log
from fa2gen.arch import ARCHES
from fa2gen.cli import ExitStatus, app
from fa2gen.doctor import _kernels
from fa2gen.select import forget as forget_selections
from fa2gen.spec import Direction

ROOT = Path(__file__).resolve().parents[2]
NAME = "fa2_fwd_sm80_bf16_d64_m128_n64_s2_w4"


class Result(types.SimpleNamespace):
    """What a command did."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def fa2(*arguments: str) -> Result:
    """Run a command in this process. An exception that would be a traceback fails the test."""
    done = CliRunner().invoke(app, list(arguments), prog_name="fa2gen")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Result(status=done.exit_code, stdout=done.stdout, stderr=done.stderr)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty kernel cache of this test's own."""
    monkeypatch.setenv("FA2GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(log, "_warned", set())
    return tmp_path / "cache"


def test_doctor(cache):
    found = fa2("doctor", "--json").json
    assert found["fa2gen"]["version"] == fa2gen.__version__
    assert found["compiler"]["nvrtc"] and found["compiler"]["error"] is None
    assert found["cache"]["dir"] == str(cache)
    assert {row["head_dim"] for row in found["kernels"]} == {64, 128, 256}
    if not found["driver"]["gpus"]:  # one of each family then, with the passes that it has
        shown = {(row["device"], row["direction"]) for row in found["kernels"]}
        assert shown == {(arch, direction) for arch in ARCHES for direction in get_args(Direction)}
        assert all(row["name"] for row in found["kernels"])
    human = fa2("doctor").stdout
    assert all(label in human for label in ("fa2gen", "compiler", "driver", "torch", "cache", "kernels", "problems"))


def test_doctor_where_nothing_is_installed(cache, monkeypatch):
    """Missing parts are what it is for: it reports them, and fails because no kernel can be built."""

    def missing(name: str) -> Any:
        raise ImportError(f"no module {name}")

    monkeypatch.setattr("fa2gen.doctor.import_module", missing)
    done = fa2("doctor", "--json")
    assert done.status == ExitStatus.FAILED
    assert done.json["problems"][0].startswith("compiler: ")
    assert done.json["driver"]["gpus"] == []
    assert done.json["torch"]["version"] is None


def broken(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks one thing of this machine."""
    if setting in ("cache", "aot"):
        monkeypatch.setenv(f"FA2GEN_{setting.upper()}_DIR", str(tmp_path))
        tmp_path.chmod(0o777)
    else:
        name, _, value = setting.partition("=")
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("FA2GEN_CACHEDIR=x", "FA2GEN_CACHEDIR|misspelt"),
        ("FA2GEN_DISABLE_JIT=maybe", "FA2GEN_DISABLE_JIT='maybe'|0 or 1"),
        ("FA2GEN_JOBS=0", "FA2GEN_JOBS='0'|whole number"),
        ("FA2GEN_ARCH=sm70", "FA2GEN_ARCH='sm70'|sm80 or sm90"),
        ("FA2GEN_AOT_DIR=nowhere", "AOT folder|nowhere is not used|manifest.json"),
        ("FA2GEN_SPECS=nowhere", "FA2GEN_SPECS names|nowhere"),
        ("FA2GEN_DISABLE_JIT=1", "FA2GEN_DISABLE_JIT is set|kernels are not built|fa2gen build"),
        ("aot", "AOT folder|is not used|chmod go-w"),
        ("cache", "cache|is not used|chmod go-w"),
    ],
)
def test_doctor_names_what_is_broken(cache, tmp_path, monkeypatch, setting, words):
    broken(setting, tmp_path, monkeypatch)
    forget()
    done = fa2("doctor", "--json")
    assert done.status == ExitStatus.FAILED
    assert any(all(word in problem for word in words.split("|")) for problem in done.json["problems"]), done.json
    assert not cache.exists()
    monkeypatch.undo()
    forget()


def forget() -> None:
    """What was read from the environment's folders is read anew."""
    for cached in (catalog.tuned_rows, catalog.written_tilings, catalog.users_tilings, catalog._written):
        cached.cache_clear()
    forget_selections()


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that has one GPU."""
    folder = tmp_path_factory.mktemp("driver")
    source = ROOT / "tests/unit/fake_libcuda.c"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    command = [compiler, "-shared", "-fPIC", "-w", "-o", str(folder / "libcuda.so.1"), str(source), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return folder


@pytest.mark.parametrize(
    ("gpus", "version", "problem"),
    [("1", "13000", None), ("1", "12040", "CUDA 12.4 cannot load"), ("0", "13000", "CUDA_ERROR_NO_DEVICE")],
)
def test_doctor_with_a_driver(cache, monkeypatch, fake_driver, gpus, version, problem):
    """Of a GPU every fact is shown; an old driver, and one that finds no GPU, is a problem."""
    for name, value in (("FAKE_GPUS", gpus), ("FAKE_VERSION", version), ("LD_LIBRARY_PATH", str(fake_driver))):
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "fa2gen", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert not done.stderr and "Traceback" not in done.stdout
    assert f"CUDA {version[:2]}.{int(version[2:]) // 10}" in done.stdout
    assert ("NVIDIA Fake, compute capability 9.0, 132 SMs, 80.0 GiB" in done.stdout) == (gpus == "1")
    if gpus == "1":
        assert "NVIDIA Fake: fwd" in done.stdout
    problems = done.stdout.split("problems", 1)[1]
    assert (problem or "torch: ") in problems and ("driver: " in problems) == (problem is not None)


def test_doctor_holds_what_a_report_needs(cache):
    found = fa2("doctor", "--json").json
    assert found["packages"].keys() >= {"pydantic", "jinja2", "numpy", "cuda-core", "nvidia-cuda-nvrtc", "torch"}
    assert all(found["packages"].values())
    assert found["system"]["kernel"].startswith("Linux") and found["system"]["libc"].startswith("glibc")
    assert not cache.exists()


def test_rows_of_kernels_come_in_one_order():
    """Whatever order Python's sets have in a process."""
    ask = "from fa2gen.doctor import _kernels; print([row['problem'] for row, _ in _kernels([])])"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{[row['problem'] for row, _ in _kernels([])]}\n", done.stderr


# Nothing is called done that is not ----------------------------------------------------------------------------------


def test_a_cache_that_keeps_nothing_fails_a_build(cache):
    cache.mkdir()
    cache.chmod(0o777)
    done = fa2("build", NAME)
    assert done.status == ExitStatus.FAILED
    assert "1 kernel in" in done.stderr and "1 could not be kept" in done.stderr
    refused = fa2("cache", "clear")
    assert refused.status == ExitStatus.FAILED and "chmod go-w" in refused.stderr


@pytest.mark.parametrize("command", ["cache list", "cache size", "cache clear", "cache dir", "doctor"])
def test_looking_at_the_cache_makes_none(cache, command):
    fa2(*command.split())
    assert not cache.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        *(f"build {NAME} {rest}" for rest in ("--target sm_999", "--out README.md", "--out /proc/nope")),
        f"report {NAME} --html --out /proc/nope/page.html",
        f"report {NAME} --result /proc/nope",
        "bench --save /proc/nope/result.json",
        "bench --plot /proc/nope",
        "bench --peer nope",
        "bench --out /proc/nope",
        "tune --head-dim 64 --out /proc/nope",
        "tune --head-dim 64 --journal /proc/nope/journal",
        "shim wheel --out /proc/nope",
        "explain --gpu nope",
    ],
)
def test_options_are_looked_at_first(cache, arguments):
    """What cannot be read, written or found is a fault of usage, named before anything is compiled or measured."""
    done = fa2(*arguments.split())
    assert done.status == ExitStatus.USAGE
    assert any(word in done.stderr for word in ("nope", "sm_999", "README.md", "--plot"))
    assert not cache.exists()

"""`build`: many specs into the cache or a folder, with plans and a compiler that cost nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import struct
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import pytest

from fa2gen import build as builder
from fa2gen import log
from fa2gen import store as stores
from fa2gen.build import BuildResult, build
from fa2gen.compile import Compiled, ResourceReport, Unit, launch_facts
from fa2gen.errors import CompileError, InfeasibleSpec, InvalidInput, StoreError
from fa2gen.spec import KernelSpec, Problem, Tiling
from fa2gen.store import Store


def spec(head_dim: int, arch: Any = "sm90") -> KernelSpec:
    return KernelSpec(
        problem=Problem(head_dim=head_dim),
        tiling=Tiling(arch=arch, tile_m=128, tile_n=128, num_mma_warps=8),
    )


SPECS = [spec(head_dim) for head_dim in (64, 96, 128, 192)]


@dataclass(frozen=True)
class Plan:
    spec: KernelSpec
    num_threads: int = 384
    shared_memory_bytes: int = 1024
    params: tuple[Any, ...] = ()
    tensor_maps: tuple[Any, ...] = ()
    entry_points: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def arch(self) -> str:
        return self.spec.tiling.arch

    @property
    def head_dim(self) -> int:
        return self.spec.problem.head_dim

    @property
    def target(self) -> str:
        return {"sm80": "sm_80", "sm90": "sm_90a"}[self.spec.tiling.arch]


def make_plan(spec: KernelSpec, shared_memory_limit: int | None = None) -> Any:
    if spec.problem.head_dim == 256:
        raise InfeasibleSpec(f"{spec.name} does not fit")
    return Plan(spec)


def plan_unit(plan: Any, target: str | None = None) -> Unit:
    return Unit(plan.name, f"// {plan.name}\n", target or plan.target, launch_facts(plan))


@pytest.fixture(autouse=True)
def compiler(monkeypatch, tmp_path):
    """Counts compilations; refuses head dim 8; takes longer for the first spec than for the last."""
    names: list[str] = []

    def compile_unit(unit: Unit) -> Compiled:
        names.append(unit.name)
        if "_d8_" in unit.name:
            raise CompileError(f"{unit.name} does not compile")
        time.sleep(0.1 if "_d64_" in unit.name else 0)
        size = 100
        header = struct.pack("<6s10x2HI3QI6H", b"\x7fELF\x02\x01", 2, 190, 1, 0, 0, 64 + size, 0, 64, 56, 0, 64, 1, 0)
        report = ResourceReport(168, 8, 12, 16, unit.launch["shared_memory_bytes"], 0.5, ("C7508",))
        return Compiled(unit.name, unit.source, header + bytes(size) + bytes(64), report)

    monkeypatch.setattr(builder, "make_plan", make_plan)
    for module in (builder, stores):
        monkeypatch.setattr(module, "plan_unit", plan_unit)
    monkeypatch.setattr(stores, "compile_unit", compile_unit)
    monkeypatch.setattr(log, "_warned", set())
    monkeypatch.setenv("FA2GEN_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("FA2GEN_AOT_DIR", "FA2GEN_DISABLE_JIT", "FA2GEN_JOBS"):
        monkeypatch.delenv(name, raising=False)
    stores.read_ahead_of_time.cache_clear()
    return names


def test_results_are_in_the_order_of_the_specs_and_progress_in_that_of_completion():
    seen: list[BuildResult] = []
    results = build(SPECS, jobs=2, progress=seen.append)
    assert [result.name for result in results] == [spec.name for spec in SPECS]
    assert sorted(seen, key=results.index) == results
    assert seen[0] is not results[0], "the slowest kernel was reported first"


def test_progress_comes_in_the_calling_thread():
    threads = set()
    build(SPECS, jobs=2, progress=lambda result: threads.add(threading.current_thread()))
    assert threads == {threading.current_thread()}


def test_a_result_as_json():
    (result,) = build([spec(128)])
    assert json.loads(json.dumps(result.to_json())) == {
        "name": "fa2_fwd_sm90_bf16_d128_m128_n128_s2_w8",
        "arch": "sm90",
        "direction": "fwd",
        "head_dim": 128,
        "deterministic": False,
        "dtype": "bf16",
        "mask": "full",
        "varlen": False,
        "sink": False,
        "dropout": False,
        "partial": False,
        "head_dim_v": None,
        "paged": False,
        "cache_dtype": "same",
        "learned": "",
        "score": "",
        "allow": "",
        "inputs": "",
        "target": "sm_90a",
        "registers": 168,
        "spill_bytes": 20,
        "stack_bytes": 16,
        "shared_memory_bytes": 1024,
        "compile_seconds": 0.5,
        "notes": ["C7508"],
        "cached": False,
        "kept": True,
        "error": None,
    }


def test_failures_are_results(tmp_path):
    results = build([spec(64), spec(256), spec(8), spec(128)], tmp_path / "out")
    assert [bool(result.error) for result in results] == [False, True, True, False]
    assert "does not fit" in str(results[1].error) and "does not compile" in str(results[2].error)
    assert results[1].to_json()["registers"] is None and results[1].spec.problem.head_dim == 256
    assert names_in(tmp_path / "out") == [spec(128).name, spec(64).name]


def test_a_defect_is_not_mistaken_for_a_failure(monkeypatch):
    def defect(plan, target=None):
        raise ZeroDivisionError

    monkeypatch.setattr(builder, "plan_unit", defect)
    with pytest.raises(ZeroDivisionError):
        build(SPECS)


def test_what_is_built_is_found_in_the_cache(compiler):
    build(SPECS)
    assert len(compiler) == len(SPECS)
    again = build(SPECS)
    assert all(result.cached for result in again)
    assert Store().get_or_compile(make_plan(SPECS[0])).name == SPECS[0].name
    assert len(compiler) == len(SPECS)


def names_in(out) -> list[str]:
    return [row["name"] for row in json.loads((out / "manifest.json").read_text())["kernels"]]


def test_a_folder_holds_all_that_loading_needs(tmp_path, monkeypatch, compiler):
    out = tmp_path / "out"
    build(SPECS, out)
    for one in SPECS:
        assert sorted(file.name for file in (out / one.name).iterdir()) == ["kernel.cu", "kernel.cubin", "meta.json"]
    assert sorted(names_in(out)) == sorted(one.name for one in SPECS)
    assert {path.name for path in out.iterdir()} == {one.name for one in SPECS} | {"manifest.json"}

    monkeypatch.setenv("FA2GEN_AOT_DIR", str(out))
    monkeypatch.setenv("FA2GEN_DISABLE_JIT", "1")
    monkeypatch.setenv("FA2GEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(stores, "plan_unit", None)
    assert all(Store().get_or_compile(make_plan(one)).name == one.name for one in SPECS)
    assert len(compiler) == len(SPECS)


def test_a_current_folder_is_left_alone(tmp_path, compiler):
    out = tmp_path / "out"
    build(SPECS, out)
    before = {path: path.stat().st_ino for path in out.rglob("kernel.*")}
    Store().clear()
    assert all(result.cached for result in build(SPECS, out))
    assert {path: path.stat().st_ino for path in out.rglob("kernel.*")} == before
    assert len(compiler) == len(SPECS)


def test_a_changed_or_damaged_kernel_is_built_again(tmp_path, monkeypatch, compiler):
    out = tmp_path / "out"
    build(SPECS[:2], out)
    (out / SPECS[0].name / "kernel.cubin").write_bytes(b"\x7fELF")
    monkeypatch.setattr(
        builder, "plan_unit", lambda plan, target: replace(plan_unit(plan), source=f"// edited {plan.name}\n")
    )
    assert [result.cached for result in build(SPECS[:2], out)] == [False, False]
    assert all("edited" in (out / one.name / "kernel.cu").read_text() for one in SPECS[:2])


def test_a_folder_can_be_filled_in_several_calls(tmp_path):
    build(SPECS[:1], tmp_path / "out")
    build(SPECS[1:], tmp_path / "out")
    assert sorted(names_in(tmp_path / "out")) == sorted(one.name for one in SPECS)


def test_two_targets_of_one_kernel_lie_beside_each_other(tmp_path, monkeypatch, compiler):
    out, one = tmp_path / "out", spec(128, "sm80")
    build([one], out)
    (result,) = build([one], out, target="sm_90")
    assert (result.target, result.cached) == ("sm_90", False)
    monkeypatch.setenv("FA2GEN_AOT_DIR", str(out))
    found = [Store().get_or_compile(make_plan(one), target).meta["target"] for target in (None, "sm_90")]
    assert found == ["sm_80", "sm_90"]
    assert len(compiler) == 2


def test_to_build_is_to_ask_for_it(monkeypatch):
    monkeypatch.setenv("FA2GEN_DISABLE_JIT", "1")
    assert build(SPECS[:1])[0].error is None


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda out: out.write_text(""), "File exists"),
        (lambda out: (out.mkdir(), out.chmod(0o775)), "chmod go-w"),
        (lambda out: (out.mkdir(), (out / "manifest.json").write_text('{"my": "web app"}')), "not fa2gen's"),
        (lambda out: (out.mkdir(), (out / "manifest.json").mkdir()), "not fa2gen's"),
    ],
    ids=["a file", "for all to write", "another's manifest", "a folder for a manifest"],
)
def test_a_folder_that_would_not_be_used_is_refused_at_once(tmp_path, spoil, reason, compiler):
    out = tmp_path / "out"
    spoil(out)
    before = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")}
    with pytest.raises(InvalidInput, match=reason) as caught:
        build(SPECS, out)
    assert str(out) in str(caught.value)
    assert not compiler
    assert {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")} == before


def test_a_build_leaves_what_is_not_its_own(tmp_path):
    (tmp_path / ".tmp-backup").mkdir()
    (tmp_path / ".tmp-backup" / "x").write_text("years of work")
    (tmp_path / SPECS[0].name).mkdir()
    (tmp_path / SPECS[0].name / "notes").write_text("years of work")
    os.utime(tmp_path / ".tmp-backup", (0, 0))
    results = build(SPECS, tmp_path)
    assert "'notes'" in str(results[0].error) and not any(result.error for result in results[1:])
    assert (tmp_path / ".tmp-backup" / "x").read_text() == (tmp_path / SPECS[0].name / "notes").read_text()


def test_a_manifest_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stores, "write_file", full)
    with pytest.raises(StoreError, match="manifest"):
        build(SPECS, tmp_path / "out")


@pytest.mark.parametrize("why", ["refused", "read-only"])
def test_what_the_cache_did_not_keep_is_said(tmp_path, monkeypatch, why):
    if why == "refused":
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o777)
    else:
        monkeypatch.setattr(stores, "write_entry", lambda *arguments, **options: os.open("/proc/nope", os.O_CREAT))
    assert not any(result.kept or result.error for result in build(SPECS))
    monkeypatch.undo()


def test_an_interrupted_build_stops_and_can_go_on(compiler):
    many = [spec(head_dim) for head_dim in range(16, 248, 8)]

    def interrupt(result) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(many, jobs=1, progress=interrupt)
    done = len(compiler)
    assert done < len(many)
    assert sum(result.cached for result in build(many)) == done


def test_the_number_of_jobs_comes_from_the_environment(monkeypatch):
    threads = []

    def watch(*arguments):
        threads.append(threading.get_ident())
        time.sleep(0.02)  # a second thread would take the next one meanwhile
        return real(*arguments)

    real = builder._build_one
    monkeypatch.setattr(builder, "_build_one", watch)
    for jobs in (1, 2):
        monkeypatch.setenv("FA2GEN_JOBS", str(jobs))
        threads.clear()
        build(SPECS)
        assert len(set(threads)) == jobs


def test_a_cache_that_cannot_be_used_costs_one_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FA2GEN_CACHE_DIR", str(tmp_path / "file"))
    assert not any(result.error for result in build(SPECS, tmp_path / "out"))
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_nothing_to_build():
    assert build([]) == []

"""The command line: exit status, one JSON document on stdout, errors without a traceback, help with examples."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import fa2gen
from fa2gen import env, verify
from fa2gen.arch import ARCHES
from fa2gen.bench.points import PRESETS
from fa2gen.cli import ExitStatus, app
from fa2gen.cli.console import progress
from fa2gen.errors import CompileError
from fa2gen.options import Options
from fa2gen.plan import make_plan
from fa2gen.select import best_spec
from fa2gen.spec import Direction, KernelSpec, Problem, declared

ROOT = Path(__file__).resolve().parents[2]
NAME = "fa2_fwd_sm90_bf16_d128_m128_n128_s2_w8"
OF_KERNELS = ("build", "render", "plan", "list", "verify", "tune", "bench", "explain", "report")
"""The commands that are told which kernels."""
BUILD_KEYS = {
    *("name", "arch", "direction", "head_dim", "dtype", "mask"),
    *("registers", "spill_bytes", "shared_memory_bytes", "compile_seconds", "notes"),
}
VERIFY_KEYS = {"name", "shape", "max_error", "max_allowed", "mean_error", "mean_allowed", "ok"}


class Result(types.SimpleNamespace):
    """What a command did."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def fa2(*arguments: str, given: str | None = None) -> Result:
    """Run a command in this process, `given` on its standard input. An exception that would be a traceback fails the
    test."""
    done = CliRunner().invoke(app, list(arguments), prog_name="fa2gen", input=given)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Result(status=done.exit_code, stdout=done.stdout, stderr=done.stderr)


def fa2_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    command = [sys.executable, "-m", "fa2gen", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty kernel cache of this test's own."""
    monkeypatch.setenv("FA2GEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Help and version


def commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [()]
    for name, command in get_command(app).commands.items():
        found.append((name,))
        found += [(name, inner) for inner in getattr(command, "commands", ())]
    return found


def test_the_commands_are_those_that_were_promised():
    names = {path[0] for path in commands() if path}
    assert names == {*OF_KERNELS, "spec-schema", "cache", "doctor", "shim"}


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_has_examples(command, monkeypatch):
    """On 80 columns, too, each on a line of its own: one that wraps can be neither read nor pasted."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    found: Any = get_command(app)
    for name in command:
        found = found.commands[name]
    done = fa2(*command, "--help")
    assert done.status == ExitStatus.DONE
    assert "Usage: fa2gen" in done.stdout
    title, *examples = found.epilog.splitlines()
    assert title == "[bold]Examples[/]"
    shown = [line.strip() for line in done.stdout.splitlines()]
    assert all(line in shown for line in examples if not line.startswith("["))


def test_commands_have_a_description_without_docstrings():
    """Under `python -OO` there are none."""
    code = (
        "from typer.main import get_command\n"
        "from fa2gen.cli import app\n"
        "def bare(command, path):\n"
        "    found = [] if command.help else [path]\n"
        "    for name, inner in getattr(command, 'commands', {}).items():\n"
        "        found += bare(inner, [*path, name])\n"
        "    return found\n"
        "print(bare(get_command(app), []))\n"
    )
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_completion_completes(tmp_path):
    """Commands, options, the values that a field may have, spec files and kernels' names."""
    (tmp_path / "my.toml").touch()
    for typed, expected in (
        ("fa2gen build m", "my.toml"),
        ("fa2gen render fa2_fwd_sm90_bf16_d256_cau", "fa2_fwd_sm90_bf16_d256_causal_m128_n64_s2_w8_r1"),
        ("fa2gen ver", "verify"),
        ("fa2gen build --dt", "--dtype"),
        ("fa2gen build --mask ca", "causal"),
        ("fa2gen render --arch ", "sm80"),
    ):
        environment = {**os.environ, "_FA2GEN_COMPLETE": "complete_bash", "COMP_WORDS": typed}
        done = fa2_process(cwd=tmp_path, env={**environment, "COMP_CWORD": str(len(typed.split(" ")) - 1)})
        assert expected in done.stdout.split(), done.stdout + done.stderr


def test_version():
    assert fa2("-h").stdout == fa2("--help").stdout
    assert fa2("--version").stdout == fa2("-V").stdout == f"fa2gen {fa2gen.__version__}\n"


def test_shim_works_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "cli.py"), "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"fa2gen {fa2gen.__version__}\n"


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nonsense", "nonsense"),
        ("render --nonsense", "--nonsense"),
        ("render --head-dim ten", "--head-dim"),
        ("render --head-dim 12", "multiple of 8 from 8 to 256; nearest 16"),
        ("render --head-dim 0", "nearest 8"),
        ("render --head-dim -8", "nearest 8"),
        ("render --head-dim 264", "nearest 256"),
        ("render --dtype fp8", "bf16"),
        ("render --mask sliding", "causal"),
        ("render --arch sm100", "sm90"),
        ("render --target hip", "cuda"),
        ("render fa2_fwd_sm90_bf16_d128", "is not a kernel name"),
        ("render fa2_fwd_sm90_bf16_d128_m128_n128_s2_w8;exit", "is not a kernel name"),
        (f"render {NAME} --head-dim 64", "not both"),
        (f"render {NAME} --set tile_n=64", "not both"),
        (f"render {NAME} --direction bwd", "not both"),
        ("render --direction sideways", "bwd"),
        ("render --set tile_n", "FIELD=VALUE"),
        ("render --set tile_n=many", "FIELD=VALUE"),
        (f"render --set tile_n={'9' * 5000}", "FIELD=VALUE"),
        ("render --set tile_q=64", "did you mean 'tile_"),
        ("render --set tile_n=100", "multiple of 16"),
        ("render --set swizzle_bytes=48", "128, 64 or 32"),
        ("plan --head-dim 256 --set tile_n=256", "does not fit sm90"),
        ("build --arch sm75", "sm80"),
        ("build --head-dim 20", "nearest 24"),
        ("build --jobs 0", "--jobs"),
        ("list --head-dim 1000", "nearest 256"),
        ("verify --on tpu", "gpu"),
        ("verify fa2", "is not a kernel name"),
        (f"verify {NAME} --arch sm80", "not both"),
        (f"verify {NAME} --direction fwd", "not both"),
        ("verify --stats", "add --on cpu"),
        ("build --direction forward", "bwd"),
        ("build --direction fwd --deterministic", "is for direction"),
        ("render --deterministic", "is for direction"),
        ("render none.toml", "none.toml"),
        ("build .", "is not a kernel name"),
        ("list ./", "Is a directory"),
        ("build --out /proc/nope", "--out /proc/nope cannot be written"),
        ("build --out README.md --head-dim 8", "--out README.md cannot be written"),
        ("build --target sm_999", "--target sm_999 is none of sm80 kernels, which have sm_80"),
        ("build --arch sm90 --target sm_80", "sm_90a"),
        ("bench --peer nonsense", "no contestant 'nonsense'; there are fa2gen-sm90"),
        ("bench --arch sm70", "sm80"),
        ("bench --preset host --direction bwd", "host is forward only"),
        ("bench --direction fwd --direction bwd", "one direction at a time"),
        ("bench --save /proc/nope/x.json", "--save /proc/nope cannot be written"),
        ("tune", "say which problems"),
        ("tune --head-dim 64 --out /proc/nope", "--out /proc/nope cannot be written"),
        ("explain --gpu h20", "is no GPU that is known here"),
        ("explain --seqlen 9999999999999", "--seqlen"),
        ("cache nonsense", "nonsense"),
    ],
)
def test_usage_errors(arguments, message):
    done = fa2(*arguments.split())
    assert done.status == ExitStatus.USAGE
    assert done.stdout == ""
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_bad_environment_is_a_usage_error(monkeypatch):
    monkeypatch.setenv("FA2GEN_LOG_LEVEL", "loud")
    done = fa2("cache", "dir")
    assert (done.status, done.stdout) == (ExitStatus.USAGE, "")
    assert "FA2GEN_LOG_LEVEL" in done.stderr


@pytest.mark.parametrize("error", [CompileError("no compiler"), PermissionError(13, "not allowed", "/x")])
def test_failures_are_a_message_and_status_1(monkeypatch, error):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("fa2gen.render.render", fail)
    done = fa2("render", NAME)
    assert (done.status, done.stdout) == (ExitStatus.FAILED, "")
    assert done.stderr == f"{type(error).__name__}: {error}\n"


def test_a_closed_pipe_is_quiet():
    with subprocess.Popen(
        [sys.executable, "-m", "fa2gen", "render", NAME], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


# render, plan, list


def test_render_by_name_and_by_options():
    by_name = fa2("render", NAME)
    assert by_name.status == ExitStatus.DONE
    assert f"{NAME}(" in by_name.stdout
    by_options = ["--arch", "sm90", "--head-dim", "128", "--dtype", "bf16", "--mask", "full"]
    for field, value in KernelSpec.from_name(NAME).tiling.model_dump(exclude={"arch"}).items():
        by_options += ["--set", f"{field}={value}"]  # every one: what is left open is as in specs/
    assert fa2("render", *by_options).stdout == by_name.stdout


def test_render_of_a_backward_kernel():
    shown = fa2("render", "--direction", "bwd", "--head-dim", "64").stdout
    assert all(
        f"fa2_bwd_sm90_bf16_d64_m128_n128_s2_w8_l1{part}(" in shown for part in ("_preprocess", "", "_postprocess")
    )


def test_render_is_what_the_library_renders():
    from fa2gen.render import render

    assert fa2("render", NAME).stdout == render(make_plan(KernelSpec.from_name(NAME))).source


def test_render_with_a_launcher():
    from fa2gen.render import render, render_launcher

    plan = make_plan(KernelSpec.from_name(NAME))
    shown = fa2("render", NAME, "--with-host").stdout
    assert shown == render(plan).source + render_launcher(plan).source
    origins = fa2("render", NAME, "--with-host", "--origins").stdout.splitlines()
    assert len(origins) == len(shown.splitlines()) and origins[-1].startswith("common/launcher.cc.j2:")
    refused = fa2("render", NAME, "--with-host", "--target", "cpu")
    assert refused.status == ExitStatus.USAGE and "--target" in refused.stderr


def test_render_origins():
    lines = fa2("render", NAME, "--origins").stdout.splitlines()
    assert len(lines) == len(fa2("render", NAME).stdout.splitlines())
    assert any(line.startswith("sm90/fwd.cu.j2:") for line in lines)


@pytest.mark.parametrize(("arch", "direction"), list(itertools.product(ARCHES, get_args(Direction))))
def test_plan_lists_what_fits_with_the_default_first(arch, direction):
    rows = fa2("plan", "--arch", arch, "--direction", direction, "--head-dim", "256", "--json").json
    assert rows[0]["name"] == best_spec(Problem(direction=direction, head_dim=256), arch).name
    assert len({row["name"] for row in rows}) == len(rows) > 1
    assert all(0 < row["shared_memory_bytes"] <= row["shared_memory_limit"] for row in rows)
    assert all(row["register_estimate"] for row in rows)


def test_plan_of_one_kernel():
    (row,) = fa2("plan", NAME, "--json").json
    plan = make_plan(KernelSpec.from_name(NAME))
    assert (row["name"], row["num_threads"]) == (NAME, plan.num_threads)
    assert NAME in fa2("plan", NAME).stdout


@pytest.mark.parametrize(
    "name",
    [
        "fa2_fwd_sm80_fp16_d256_causal_m128_n256_s2_w8",
        "fa2_bwd_sm90_fp16_d256_det_m128_n128_s2_w8",
        "fa2_bwd_sm80_bf16_d256_causal_det_m128_n128_s4_w8",
    ],
)
def test_what_a_refusal_says_to_type_is_about_the_same_problem(name):
    spec = KernelSpec.from_name(name)
    hint = fa2("plan", name).stderr.split("List every fit: fa2gen ")[1]
    rows = fa2(*hint.split(), "--json").json
    assert {KernelSpec.from_name(row["name"]).problem for row in rows} == {spec.problem}
    assert {row["arch"] for row in rows} == {spec.tiling.arch}


def test_plan_says_why_not():
    done = fa2("plan", "fa2_fwd_sm90_bf16_d256_m128_n128_s2_w8")
    assert "InfeasibleSpec: fa2_fwd_sm90_bf16_d256_m128_n128_s2_w8 does not fit sm90" in done.stderr
    assert "shared memory" in done.stderr and "nearest" in done.stderr
    backward = fa2("plan", "fa2_bwd_sm90_bf16_d256_m128_n128_s2_w8").stderr.split("List every fit: fa2gen ")[1]
    assert len(fa2(*backward.split(), "--json").json) > 1  # what it says can be typed


@pytest.mark.parametrize("command", ["plan", "build"])
def test_shared_memory_of_the_target_is_the_limit(command, cache):
    name = "fa2_bwd_sm80_bf16_d256_m64_n64_s2_w8"
    refused = fa2(command, name).stderr
    assert f"{name} does not fit sm80\n  shared memory  214,016 B needed" in refused
    assert "166,912 B available (232,448 B on other devices)" in refused and "nearest" in refused
    (row,) = fa2("plan", name, "--target", "sm_90", "--json").json
    assert (row["shared_memory_bytes"], row["shared_memory_limit"]) == (214_016, 232_448)


# build, list, cache


def test_build_then_list_then_clear(cache, tmp_path):
    wanted = ("--arch", "sm90", "--head-dim", "8")
    out = tmp_path / "out"

    assert not any(row["cached"] for row in fa2("list", *wanted, "--json").json)
    built = fa2("build", *wanted, "--out", str(out), "--jobs", "2", "--json")
    assert built.status == ExitStatus.DONE
    kinds = [*itertools.product(get_args(Direction), ("fp16", "bf16"), ("full", "causal"))]
    assert [(row["direction"], row["dtype"], row["mask"]) for row in built.json] == kinds
    for row in built.json:
        assert row.keys() >= BUILD_KEYS
        assert (row["arch"], row["head_dim"]) == ("sm90", 8)
        assert row["registers"] > 0 and row["shared_memory_bytes"] > 0 and row["compile_seconds"] > 0
        assert (row["spill_bytes"], row["notes"]) == (0, [])
    assert "12 kernels in" in built.stderr and "(0 from the cache)" in built.stderr
    assert (out / "manifest.json").is_file()

    again = fa2("build", *wanted)
    assert "(12 from the cache)" in again.stderr
    assert all(row["name"] in again.stdout for row in built.json)
    assert "(4 from the cache)" in fa2("build", *wanted, "--direction", "bwd").stderr
    assert all(row["cached"] for row in fa2("list", *wanted, "--json").json)

    names = {row["name"] for row in built.json}
    assert fa2("cache", "dir").stdout == f"{cache}\n"
    assert {meta["name"] for meta in fa2("cache", "list", "--json").json} == names
    assert all(name in fa2("cache", "list").stdout for name in names)
    size = fa2("cache", "size", "--json").json
    assert (size["kernels"], size["dir"]) == (12, str(cache)) and size["bytes"] > 0
    assert fa2("cache", "clear").status == ExitStatus.DONE
    assert fa2("cache", "size", "--json").json["kernels"] == 0


def test_a_built_folder_serves_both_passes(cache, tmp_path, monkeypatch):
    """What the selector asks for at run time is in it, and nothing is generated or compiled."""
    from fa2gen import store
    from fa2gen.explain import KNOWN_DEVICES
    from fa2gen.select import select
    from fa2gen.spec import Problem

    out = tmp_path / "out"
    assert fa2("build", "--arch", "sm90", "--head-dim", "8", "--out", str(out)).status == ExitStatus.DONE
    monkeypatch.setenv("FA2GEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("FA2GEN_AOT_DIR", str(out))
    monkeypatch.setenv("FA2GEN_DISABLE_JIT", "1")
    monkeypatch.setattr(store, "plan_unit", None)
    for direction in get_args(Direction):
        chosen = select(Problem(direction=direction, head_dim=8, mask="causal"), KNOWN_DEVICES[0])
        entry = store.Store().get_or_compile(chosen.plan, chosen.target)
        assert entry.name == chosen.plan.name and entry.cubin.startswith(b"\x7fELF")


def test_build_needs_no_torch(cache):
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from fa2gen.cli import app\n"
        "app(['build', '--arch', 'sm90', '--head-dim', '8', '--json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 12


def test_build_reports_every_failure(cache, monkeypatch):
    """One kernel that fails costs status 1, and the others are still there."""
    from fa2gen.compile import compile_unit

    def flaky(unit: Any) -> Any:
        if "causal" in unit.name:
            raise CompileError(f"{unit.name} does not compile")
        return compile_unit(unit)

    monkeypatch.setattr("fa2gen.store.compile_unit", flaky)
    done = fa2("build", "--arch", "sm90", "--head-dim", "8", "--json")
    assert done.status == ExitStatus.FAILED
    assert [row["error"] is None for row in done.json] == [True, False] * 6
    assert done.stderr.count("does not compile") == 6
    assert "6 failed" in done.stderr


def listed(*arguments: str) -> list[KernelSpec]:
    """What `fa2gen list` lists; whether it is cached is not looked at, for which each kernel would be rendered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fa2gen.compile.plan_unit", lambda plan: plan)
        patch.setattr("fa2gen.store.key_of", lambda plan: "")
        patch.setattr("fa2gen.store.Store.try_load", lambda store, key: None)
        return [KernelSpec.from_name(row["name"]) for row in fa2("list", *arguments, "--json").json]


def is_usual(problem):
    of_its_own = (problem.deterministic, problem.varlen, problem.sink, problem.dropout, problem.paged)
    return not any((*of_its_own, problem.has_expression))


def test_list_is_the_catalogue():
    """Family by family and pass by pass: what specs/ writes, in its order, then what was tuned and is not among it."""
    from fa2gen.catalog import catalogue, tuned_rows
    from fa2gen.select import served_by

    everything = listed()
    assert [spec.tiling.arch for spec in everything] == sorted(spec.tiling.arch for spec in everything)
    assert all(is_usual(spec.problem) for spec in everything)
    for arch, direction in itertools.product(ARCHES, get_args(Direction)):
        specs = listed("--arch", arch, "--direction", direction)
        ours = [spec for spec in everything if (spec.tiling.arch, spec.problem.direction) == (arch, direction)]
        assert specs == ours
        written = [spec for spec in catalogue(arch) if spec.problem.direction == direction]
        written = [spec for spec in written if is_usual(spec.problem)]
        assert specs[: len(written)] == written
        tuned = {
            spec
            for (problem, family), rows in tuned_rows().items()
            if (family, problem.direction) == (arch, direction)
            for row in rows
            for spec in served_by(row)
            if is_usual(spec.problem)
        }
        assert {*specs[len(written) :]} == tuned - {*written}


def test_what_is_not_in_the_cache_is_not_rendered(cache, monkeypatch):
    """A list of hundreds of kernels would take 50 ms for each."""
    monkeypatch.setattr("fa2gen.compile.plan_unit", lambda plan: pytest.fail(f"renders {plan.name}"))
    assert not any(row["cached"] for row in fa2("list", "--arch", "sm80", "--json").json)


def test_deterministic_kernels_are_listed_where_they_are_asked_for():
    """A forward kernel always is deterministic, so that it stays; what trains deterministically is the whole list."""
    specs, usual = listed("--deterministic"), listed()
    assert all(spec.problem.deterministic for spec in specs if spec.problem.direction == "bwd")
    forward = [spec for spec in usual if spec.problem.direction == "fwd"]
    assert [spec for spec in specs if spec.problem.direction == "fwd"] == forward and len(specs) > len(forward)
    backward = [spec for spec in specs if spec.problem.direction == "bwd"]
    assert listed("--direction", "bwd", "--deterministic") == backward


@pytest.mark.parametrize("direction", get_args(Direction))
def test_list_has_what_the_selector_takes(cache, direction):
    """At every length, of every head dim that specs/ names, on GPUs with tuned rows and without."""
    from fa2gen.catalog import catalogue
    from fa2gen.explain import device_named
    from fa2gen.select import select

    ways = {
        "fwd": ((), ("--varlen",)),
        "bwd": ((), ("--varlen",), ("--deterministic",), ("--varlen", "--deterministic")),
        "decode": ((), ("--paged",)),
    }
    flags = [("--direction", direction, *way) for way in ways[direction]]
    names = {spec.name for arguments in flags for spec in listed(*arguments)}
    problems = {spec.problem for spec in catalogue() if spec.problem.direction == direction}
    problems = {problem for problem in problems if not problem.has_expression}
    assert any(problem.deterministic for problem in problems) == (direction == "bwd")
    for problem in problems:
        for gpu in ("h200", "h100", "a100"):
            for seqlen in (512, 2048, 8192):
                assert select(problem, device_named(gpu), None, seqlen).plan.name in names


def test_a_head_dim_that_specs_lacks_has_the_kinds_that_specs_has(monkeypatch):
    """A mask that the catalogue does not hold, or at few head dims, is built where it is asked for, not because it
    exists."""
    from fa2gen.catalog import catalogue

    kinds = set(itertools.product(get_args(Direction), ("fp16", "bf16"), ("full", "causal")))
    specs = listed("--head-dim", "24", "--arch", "sm90")
    assert {(spec.problem.direction, spec.problem.dtype, spec.problem.mask) for spec in specs} == kinds
    assert len(specs) == len(kinds)
    without = tuple(spec for spec in catalogue() if spec.problem.mask == "full")
    monkeypatch.setattr("fa2gen.catalog.catalogue", lambda arch: [s for s in without if s.tiling.arch == arch])
    monkeypatch.setattr("fa2gen.catalog.tuned_rows", dict)
    assert {spec.problem.mask for spec in listed("--head-dim", "24")} == {"full"}
    assert {spec.problem.mask for spec in listed("--head-dim", "24", "--mask", "causal")} == {"causal"}
    assert {spec.problem.mask for spec in listed("--head-dim", "64", "--mask", "causal")} == {"causal"}


# One way to say which kernels


VALUES = {
    "direction": "bwd",
    "head_dim": 72,
    "head_dim_v": 40,
    "dtype": "fp16",
    "mask": "causal",
    "varlen": True,
    "sink": True,
    "dropout": True,
    "partial": True,
    "deterministic": True,
    "cache_dtype": "int8",
    "paged": True,
    "score": "number_0 * tanh(s / number_0)",
    "allow": "j <= i",
    "inputs": "number_0: float",
    "learned": "input_0",
}
"""Of each field of a problem a value that is not its default."""
NEEDS = {
    "score": {"inputs": VALUES["inputs"]},
    "inputs": {"score": VALUES["score"]},
    "learned": {"score": "s + input_0[h, i - j]", "inputs": "input_0: float"},
}
"""What a field has beside it."""

SHOWN = {
    "build": lambda done: [KernelSpec.from_name(row["name"]).problem for row in done.json],
    "render": lambda done: [
        KernelSpec.from_name(name).problem for name in re.findall(r"^// (fa2_\S+)$", done.stdout, re.M)
    ],
    "plan": lambda done: [Problem(**{name: row[name] for name in Problem.model_fields}) for row in done.json],
    "list": lambda done: [Problem(**{name: row[name] for name in Problem.model_fields}) for row in done.json],
    "verify": lambda done: [KernelSpec.from_name(row["name"]).problem for row in done.json],
    "tune": lambda done: [Problem(**{name: row[name] for name in Problem.model_fields}) for row in done.json],
    "explain": lambda done: [Problem(**row["problem"]) for row in done.json],
}
EXTRA = {"tune": ("--dry-run", "--candidates", "1", "--json"), "render": (), "verify": ("--on", "cpu", "--json")}


@pytest.fixture
def quick(monkeypatch):
    """Nothing is compiled, run or looked for on a GPU."""
    from fa2gen.build import BuildResult

    def refuse(*_: Any) -> Any:
        raise CompileError("there is no compiler in this test")

    monkeypatch.setattr("fa2gen.store.Store.get_or_compile", refuse)
    monkeypatch.setattr("fa2gen.explain._gpu_here", lambda: None)
    results = lambda specs, *_, **__: [BuildResult(spec, compile_seconds=0.0) for spec in specs]  # noqa: E731
    monkeypatch.setattr("fa2gen.build.build", results)
    monkeypatch.setattr(verify, "nothing_to_run_on", lambda place: None)
    monkeypatch.setattr(verify, "runnable", lambda arch, place: True)
    shape = verify.SHAPES["cpu"][0]
    one = lambda specs, *_, **__: (verify.Outcome(spec.name, shape, Options(), ok=True) for spec in specs)  # noqa: E731
    monkeypatch.setattr(verify, "verify", one)


@pytest.mark.parametrize("command", OF_KERNELS)
def test_options_offer_what_the_fields_allow(command):
    """Whatever values a field has: a new mask is an option's value without a word in the command line."""
    for about in declared(Problem).values():
        if about.is_text:
            continue
        done = fa2(command, about.option, "nonsense")
        refusal = " ".join(done.stderr.replace("│", " ").split())
        assert done.status == ExitStatus.USAGE
        if about.values and not about.is_flag:
            assert all(f"'{value}'" in refusal for value in about.values), refusal


def test_the_table_has_every_field():
    assert VALUES.keys() == Problem.model_fields.keys()
    assert all(VALUES[name] != about.default for name, about in declared(Problem).items())
    # bench measures and report compiles: tests/unit/test_bench.py, test_report.py
    assert {*SHOWN, "bench", "report"} == {*OF_KERNELS}


def values_of(field: str) -> dict[str, Any]:
    """What a problem is given that has this field: itself, what it needs, and a direction that has it."""
    values = {"head_dim": 64, field: VALUES[field], **NEEDS.get(field, {})}
    if only := declared(Problem)[field].only_for:
        values["direction"] = only.directions[0]
    return values


@pytest.mark.parametrize("field", Problem.model_fields)
@pytest.mark.parametrize("command", SHOWN)
def test_every_command_takes_and_shows_every_field(quick, cache, command, field):
    values = values_of(field)
    options = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in values.items()]
    done = fa2(command, *options, "--arch", "sm90", *EXTRA.get(command, ("--json",)))
    assert done.status == ExitStatus.DONE, done.stderr
    problems = SHOWN[command](done)
    assert problems and all(getattr(problem, name) == value for problem in problems for name, value in values.items())


@pytest.mark.parametrize(
    ("field_and_source", "command"),
    [*zip(itertools.product(Problem.model_fields, ("name", "file", "standard input")), itertools.cycle(SHOWN))],
)
def test_every_field_comes_by_a_name_and_a_spec_as_by_options(quick, cache, field_and_source, command):
    field, source = field_and_source
    values = values_of(field)
    problem = Problem(**values)
    toml = "schema = 1\n[problem]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    path = cache.parent / "my.toml"
    path.write_text(toml)
    said = {"name": best_spec(problem, "sm90").name, "file": str(path), "standard input": "-"}[source]
    given = toml if said == "-" else None
    done = fa2(command, said, *EXTRA.get(command, ("--json",)), given=given)
    assert done.status == ExitStatus.DONE, done.stderr
    assert {*SHOWN[command](done)} == {problem}


TWO = """
schema = 1
[problem]
head_dim = [64, 96]
[[tiling]]
arch = "sm90"
tile_m = 128
tile_n = 64
num_mma_warps = 8
[[tiling]]
arch = "sm80"
tile_m = 64
tile_n = 64
num_mma_warps = 4
"""


@pytest.mark.parametrize("command", ["build", "list", "plan", "verify", "explain"])
def test_a_spec_says_how(quick, cache, tmp_path, command):
    """Its tilings are taken, several sources one after the other; --arch takes those of a family."""
    path = tmp_path / "my.toml"
    path.write_text(TWO)
    extra = EXTRA.get(command, ("--json",))

    def names(*arguments: str) -> list[str]:
        done = fa2(command, *arguments, *extra)
        assert done.status == ExitStatus.DONE, done.stderr
        return [row.get("name") or row["kernel"] for row in done.json]

    tilings = ("sm90_bf16_d{}_m128_n64_s2_w8", "sm80_bf16_d{}_m64_n64_s2_w4")
    expected = [f"fa2_fwd_{tiling.format(head_dim)}" for tiling in tilings for head_dim in (64, 96)]
    assert names(str(path)) == expected
    assert names(str(path), NAME) == [*expected, NAME]
    assert names(str(path), "--arch", "sm80") == expected[2:]


def test_a_spec_without_the_family_that_is_asked_for(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(TWO[: TWO.index('[[tiling]]\narch = "sm80"')])
    done = fa2("build", str(path), "--arch", "sm80")
    assert done.status == ExitStatus.USAGE and "has no tiling for sm80" in done.stderr


@pytest.mark.parametrize("command", OF_KERNELS)
def test_sources_or_options(command, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(TWO)
    for source in (str(path), NAME):
        done = fa2(command, source, "--head-dim", "64", "--mask", "causal")
        assert done.status == ExitStatus.USAGE and "not both" in done.stderr


@pytest.mark.parametrize("command", OF_KERNELS)
def test_a_fault_in_a_spec_is_named_with_its_file(command, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(TWO.replace("96", "97"))
    done = fa2(command, str(path))
    assert (done.status, done.stdout) == (ExitStatus.USAGE, "")
    assert f"InvalidInput: {path}: Problem is not valid:\n  head_dim" in done.stderr and "nearest 104" in done.stderr
    assert "standard input: no schema" in fa2(command, "-", given="").stderr


def test_a_setting_stands_in_every_kernel(quick):
    for command in ("build", "verify", "plan", "explain"):
        done = fa2(
            command,
            "--head-dim",
            "64",
            "--arch",
            "sm90",
            "--direction",
            "fwd",
            "--set",
            "tile_n=48",
            *EXTRA.get(command, ("--json",)),
        )
        rows = [KernelSpec.from_name(row.get("name") or row["kernel"]) for row in done.json]
        assert rows and all(spec.tiling.tile_n == 48 for spec in rows)


def test_the_schema_is_printed():
    from fa2gen.catalog import spec_schema

    assert fa2("spec-schema").json == spec_schema()


# 80 columns


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr("fa2gen.cli.console._width", lambda: 80)


LONG = "fa2_bwd_sm90_bf16_d128_causal_det_m128_n128_s2_w8_z64_r1"


def test_at_80_columns_nothing_is_cut(quick, cache, narrow, monkeypatch):
    """Each line fits, and every name, number and verdict is whole."""
    from fa2gen.build import BuildResult

    spec = KernelSpec.from_name(LONG)
    results = [BuildResult(spec, "sm_90a", 255, 1_234, 16, 232_448, 12.34, cached=True)]
    monkeypatch.setattr("fa2gen.build.build", lambda *_, **__: results)
    outcomes = [
        verify.Outcome(LONG, verify.SHAPES["gpu"][-1], Options(), 3.91e-3, 1.17e-2, 1.23e-4, 4.56e-4, ok=ok)
        for ok in (True, False)
    ]
    monkeypatch.setattr(verify, "verify", lambda *_, **__: iter(outcomes))
    shown = {
        "build": ("255", "1,234 B", "232,448 B", "12.34", "cached"),
        "verify": ("WRONG", "3.91e-03", "1.17e-02", "1.23e-04", "4.56e-04", "2 x 2048 x 2048, heads 4:4"),
        "list": ("no",),
        "plan": ("232,448 B",),
    }
    for command, words in shown.items():
        arguments = [NAME] if command in ("list", "plan") else [LONG]
        done = fa2(command, *arguments)
        lines = done.stdout.splitlines()
        assert all(len(line) <= 80 for line in lines), done.stdout
        assert arguments[0] in lines[1].split(), done.stdout
        assert all(word in done.stdout for word in words), done.stdout
    outcomes[1] = replace(outcomes[1], options=Options(causal=True, window_left=64, chunk=48, deterministic=True))
    assert "heads 4:4, chunk 48, window_left 64" in fa2("verify", LONG).stdout
    assert "ok" not in fa2("verify", LONG).stdout.split()  # of a kernel that fails at a shape, the failures
    outcomes[1] = replace(outcomes[1], ok=True)
    assert "ok" in fa2("verify", LONG).stdout.split()


@pytest.mark.parametrize(
    "arguments", ["explain --head-dim 88", "tune --head-dim 88 --dry-run", "plan --head-dim 256", "doctor"]
)
def test_at_80_columns_texts_wrap_between_words(quick, cache, narrow, arguments):
    done = fa2(*arguments.split())
    lines = done.stdout.splitlines()
    assert lines and all(len(line) <= 80 for line in lines if "/" not in line), done.stdout
    assert "…" not in done.stdout
    for name in re.findall(r"fa2_\w+", done.stdout):
        KernelSpec.from_name(name)


def test_rows_of_a_bench_are_whole_at_80_columns(narrow, capsys):
    from fa2gen.cli.console import print_row

    titles = ("point", "fa2gen-sm90", "fa2gen-sm80", "cudnn", "fa2", "fa3", "ours / best peer")
    for row in (titles, ("fwd d128 bf16 causal 4 x 4096, 16 heads", *["1234.5"] * 5, "1.07 (cudnn)")):
        print_row(titles, (44, 13, 20), row)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "fa2gen-sm90 1234.5" in lines[2] and "ours / best peer 1.07 (cudnn)" in " ".join(lines)


def test_progress_is_told_where_there_is_no_terminal(capsys, monkeypatch):
    """A log shows that something happens, also while one kernel takes long."""
    monkeypatch.setattr("fa2gen.cli.console.SECONDS_BETWEEN_LINES", 0.01)
    with progress("building", 3) as advance:
        advance("first")
        while "1 of 3" not in (text := capsys.readouterr().err):
            pass
    assert re.search(r"building: 1 of 3 after \d+ s, first", text)


# verify


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def test_verify_without_a_gpu_is_status_3():
    if has_gpu():
        pytest.skip("there is a GPU")
    done = fa2("verify", "--arch", "sm90", "--json")
    assert (done.status, done.json) == (ExitStatus.NOTHING_TO_RUN_ON, [])
    assert "nothing verified" in done.stderr


def test_verify_on_host_without_a_compiler_is_status_3(monkeypatch):
    from fa2gen.cpu import find_compiler

    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    find_compiler.cache_clear()  # other tests of this process have found one
    done = fa2("verify", "--on", "cpu", "--json")
    assert (done.status, done.json) == (ExitStatus.NOTHING_TO_RUN_ON, [])
    assert "compiler" in done.stderr


@pytest.fixture
def machine(monkeypatch):
    """fa2gen.cpu stands in: its run_kernel computes right answers until a test replaces it."""
    from fa2gen.cpu import Report, RunOptions
    from fa2gen.ops.kvcache_reference import cached_reference
    from fa2gen.ops.validate_cache import Cached
    from fa2gen.reference import attention_backward_tiled, attention_reference

    def run_kernel(spec: KernelSpec, x: dict[str, Any], options: Any, run_options: RunOptions, **_: Any) -> Report:
        if spec.problem.direction == "fwd":
            right = attention_reference(x["q"], x["k"], x["v"], **options._asdict())
        elif spec.problem.direction == "decode":
            places = {name: y for name, y in x.items() if name in Cached._fields and name not in ("q", "k", "v")}
            right = cached_reference(Cached(x["q"], x["k"], x["v"], **places), options)
        else:
            inputs = (x[name] for name in ("dout", "q", "k", "v", "o", "lse"))
            right = attention_backward_tiled(*inputs, **options._asdict())
        for name, value in zip(RESULTS[spec.problem.direction], right, strict=True):
            x[name].copy_(value)
        return Report(0.0)

    module = types.ModuleType("fa2gen.cpu")
    module.RunOptions = RunOptions
    module.run_kernel = run_kernel
    monkeypatch.setitem(sys.modules, "fa2gen.cpu", module)
    monkeypatch.setattr(fa2gen, "cpu", module, raising=False)
    monkeypatch.setattr(verify, "nothing_to_run_on", lambda place: None)
    return module


RESULTS = {"fwd": ("o", "lse"), "bwd": ("dq", "dk", "dv"), "decode": ("o", "lse")}
CAUSAL = "fa2_fwd_sm90_bf16_d64_causal_m128_n128_s2_w8"
BACKWARD = "fa2_bwd_sm90_bf16_d64_causal_m128_n128_s2_w8_l1"


@pytest.mark.parametrize("name", [CAUSAL, BACKWARD])
def test_verify_right_answers(machine, name):
    done = fa2("verify", name, "--on", "cpu", "--json")
    assert done.status == ExitStatus.DONE
    assert len(done.json) == len(verify.SHAPES["cpu"])
    for row in done.json:
        assert row.keys() >= VERIFY_KEYS
        assert (row["name"], row["ok"], row["error"], row["counts"]) == (name, True, None, {})
        assert row["max_error"] <= row["max_allowed"] and row["mean_error"] <= row["mean_allowed"]
        assert row["shape"].keys() == {"batch", "seqlen_q", "seqlen_k", "num_heads", "num_heads_kv"}
    human = fa2("verify", name, "--on", "cpu")
    assert name in human.stdout and "all right" in human.stderr


def test_verify_of_one_direction(machine):
    wanted = ("verify", "--on", "cpu", "--arch", "sm90", "--head-dim", "64", "--json")
    names = {way: {row["name"] for row in fa2(*wanted, "--direction", way).json} for way in get_args(Direction)}
    every = {row["name"] for row in fa2(*wanted).json}
    assert every == set().union(*names.values()) and BACKWARD in names["bwd"]
    assert all(name.startswith(f"fa2_{way}_") for way, found in names.items() for name in found)


def wrong_value(out: Any, lse: Any) -> None:
    out[0, 0, 0, 0] += 1


def wrong_lse(out: Any, lse: Any) -> None:
    lse[0, 0, -1] += 0.01


def unwritten(out: Any, lse: Any) -> None:
    out[0, -1, -1, -1] = float("nan")


def one_too_many(out: Any, lse: Any) -> None:
    out.as_strided((1,), (1,), out.storage_offset() + out.numel())[0] = 0


def one_too_early(out: Any, lse: Any) -> None:
    lse.as_strided((1,), (1,), lse.storage_offset() - 1)[0] = 0


def with_fault(machine: Any, fault: Any, *names: str) -> None:
    """fa2gen.cpu.run_kernel, with something wrong in the results of those names."""
    right = machine.run_kernel

    def faulty(spec: KernelSpec, x: dict[str, Any], options: Any, **others: Any) -> Any:
        report = right(spec, x, options, **others)
        fault(*(x[name] for name in names))
        return report

    machine.run_kernel = faulty


@pytest.mark.parametrize("fault", [wrong_value, wrong_lse, unwritten, one_too_many, one_too_early])
def test_verify_catches(machine, fault):
    with_fault(machine, fault, "o", "lse")
    done = fa2("verify", CAUSAL, "--on", "cpu", "--json")
    assert done.status == ExitStatus.FAILED
    assert not any(row["ok"] for row in done.json)
    assert "WRONG" in done.stderr
    assert "WRONG" in fa2("verify", CAUSAL, "--on", "cpu").stdout


@pytest.mark.parametrize("fault", [wrong_value, unwritten, one_too_many])
@pytest.mark.parametrize("which", RESULTS["bwd"])
def test_verify_catches_in_each_gradient(machine, fault, which):
    with_fault(machine, lambda x: fault(x, None), which)
    done = fa2("verify", BACKWARD, "--on", "cpu", "--json")
    assert done.status == ExitStatus.FAILED
    assert not any(row["ok"] for row in done.json)


def test_verify_of_a_kernel_that_does_not_run(machine):
    def fail(*_: Any, **__: Any) -> None:
        raise CompileError("no compiler")

    machine.run_kernel = fail
    done = fa2("verify", CAUSAL, "--on", "cpu", "--json")
    assert done.status == ExitStatus.FAILED
    assert {row["error"] for row in done.json} == {"no compiler"}


def test_outcome_with_nan_is_json():
    outcome = verify.Outcome(NAME, verify.SHAPES["gpu"][0], Options(), max_error=float("nan"), max_allowed=1.0)
    assert replace(outcome, mean_error=float("inf")).to_json()["mean_error"] is None
    assert outcome.to_json()["max_error"] is None


# README.md and the pages of docs/ say what is true


def pages() -> str:
    return "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))


def readme_block(after: str) -> str:
    """The first fenced block that follows some text."""
    return pages().split(after, 1)[1].split("```", 2)[1].split("\n", 1)[1].rstrip()


def test_readme_excerpt_is_rendered():
    excerpt = readme_block("## What comes out").splitlines()
    lines = fa2("render", "fa2_fwd_sm90_bf16_d128_causal_m128_n128_s2_w8").stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip() == excerpt[0])
    indent = len(lines[start]) - len(excerpt[0])
    rendered = [line[indent:] for line in lines[start : start + len(excerpt)]]
    assert rendered == excerpt, "the template has changed: copy the excerpt anew into README.md"


@pytest.mark.parametrize(
    "shown", dict.fromkeys(block.split("\n", 1)[1] for block in pages().split("```")[1::2] if "\n$ fa2gen " in block)
)
def test_what_pages_show_is_printed(shown):
    """Every block that begins with a command holds what it prints."""
    command, printed = shown.split("\n", 1)
    done = fa2(*command.removeprefix("$ fa2gen ").split())
    assert (done.stdout + done.stderr).rstrip() == printed.rstrip()


def readme_commands() -> list[str]:
    """Every `fa2gen ...` that a page shows in a block, without the comment behind it."""
    lines = [line for block in pages().split("```")[1::2] for line in block.splitlines()]
    return [re.split(r"\s+#", line)[0] for line in lines if line.startswith("fa2gen ")]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_taken(quick, cache, tmp_path, monkeypatch, command):
    """Where they are typed beside the spec that it shows, on a machine without a GPU."""

    def no_gpu(what: str) -> None:
        raise typer.Exit(ExitStatus.NOTHING_TO_RUN_ON)

    monkeypatch.setattr("fa2gen.cli.measure._need_gpu", no_gpu)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text(readme_block("as a kernel's name, or as options:"))
    words = re.split(" > | && ", command)[0].split()[1:]
    done = fa2(*words)
    assert done.status in (ExitStatus.DONE, ExitStatus.NOTHING_TO_RUN_ON), done.stderr


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_can_be_asked_for(monkeypatch, preset):
    """Up to where a GPU is needed."""

    def no_gpu(what: str) -> None:
        raise typer.Exit(ExitStatus.NOTHING_TO_RUN_ON)

    monkeypatch.setattr("fa2gen.cli.measure._need_gpu", no_gpu)
    done = fa2("bench", "--preset", preset)
    assert done.status == ExitStatus.NOTHING_TO_RUN_ON, done.stderr


def test_readme_python_is_python():
    scope: dict[str, Any] = {}
    exec(readme_block("The same in Python:"), scope)
    assert scope["compiled"].cubin.startswith(b"\x7fELF")


def test_readme_lists_every_variable():
    rows = [line for line in pages().splitlines() if line.startswith("| `FA2GEN_")]
    assert rows == [f"| `{variable.name}` | {variable.default} | {variable.meaning} |" for variable in env.VARIABLES]

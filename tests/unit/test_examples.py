"""The examples run where there is no GPU, and tell right from wrong."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fa2gen.cpu import find_compiler
from fa2gen.errors import Fa2GenError

PATH = Path(__file__).resolve().parents[2] / "examples" / "run_on_cpu.py"
SMALL = "fa2_fwd_sm80_fp16_d64_causal_m128_n64_s2_w4"


@pytest.fixture
def example():
    try:
        find_compiler()
    except Fa2GenError as error:
        pytest.skip(str(error))
    spec = importlib.util.spec_from_file_location("run_on_cpu", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_kernel_is_run_and_judged(example, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_on_cpu.py", SMALL])
    assert example.main() == 0
    printed = capsys.readouterr().out
    assert SMALL in printed and "greatest error" in printed and printed.endswith("right\n")


def test_a_wrong_kernel_is_seen(example, monkeypatch, capsys):
    right = example.run_on_cpu

    def wrong(*arguments):
        out, lse, report = right(*arguments)
        return out + np.float16(0.01), lse, report

    monkeypatch.setattr(example, "run_on_cpu", wrong)
    monkeypatch.setattr("sys.argv", ["run_on_cpu.py", SMALL])
    assert example.main() == 1 and capsys.readouterr().out.endswith("WRONG\n")


# Every other example, as its first lines say that it is run; without a GPU in seconds, and with "right" at the end

LAUNCHERS = {"context_parallel": ("-m", "torch.distributed.run", "--nproc-per-node", "2")}
TESTED_ELSEWHERE = {"run_on_cpu", "train_gpt"}
EXAMPLES = sorted(path for path in PATH.parent.glob("*.py") if path.stem not in TESTED_ELSEWHERE)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_right(path, tmp_path):
    pytest.importorskip("transformers" if "transformers" in path.stem else "torch")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PATH.parents[1]), *filter(None, sys.path)]),
        "FA2GEN_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *LAUNCHERS.get(path.stem, ()), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.endswith("right\n"), done.stdout


def test_the_page_has_every_example():
    page = (PATH.parent / "README.md").read_text()
    assert [path.name for path in sorted(PATH.parent.glob("*.py")) if f"]({path.name})" not in page] == []

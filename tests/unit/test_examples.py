"""The examples that need neither a GPU nor torch run, and tell right from wrong."""

from __future__ import annotations

import importlib.util
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

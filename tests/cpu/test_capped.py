"""Scores of a cap on SM90: exponentials under a row's first maximum, and tanh of small scores as a polynomial.

A warp decides for each block of keys which tanh it takes, and the cap of a head whether further maxima are looked for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fa2gen import cases
from fa2gen.cpu import RunOptions, run_kernel
from fa2gen.options import Shape
from fa2gen.plan import make_plan
from fa2gen.spec import KernelSpec, Mask, Problem, Tiling
from tests.cpu.faults import Fault, symptom

TILING = Tiling(arch="sm90", tile_m=64, tile_n=32, num_stages=2, num_mma_warps=4, lazy_rescale=1)
SHAPE = Shape(1, 70, 133, 2, 1)


def name_of(score: str = "cap * tanh(s / cap)", mask: Mask = "causal", **fields: Any) -> str:
    return KernelSpec(problem=Problem(head_dim=64, mask=mask, score=score, **fields), tiling=TILING).name


CAPPED, WINDOW = name_of(), name_of(mask="window")
OF_HEADS = name_of("cap[h] * tanh(s / cap[h])")


def run(name, sizes=(), rendered=None, cap=50.0, gain=1.0, change=lambda tensors: None, shape=SHAPE, **how):
    """(verdict,) of a case whose tensors `change` has had first."""
    spec = KernelSpec.from_name(name)
    case = cases.make(spec, shape, gain=gain)
    if case.options.expression.numbers:
        expression = case.options.expression._replace(numbers=(cap,))
        case = replace(case, options=case.options._replace(expression=expression))
    change(case.tensors)
    run_kernel(make_plan(spec), case.tensors, case.options, run_options=RunOptions(**how), rendered=rendered)
    assert cases.written_outside(case) is None
    return (cases.verdict(case),)


def from_end_to_end(tensors: dict[str, torch.Tensor]) -> None:
    """Of all rows the scores of some keys are as low as can be, of others as high."""
    for name in "qk":
        tensors[name].abs_()
    tensors["k"][:, :30] *= -1
    tensors["k"][:, 60:] *= -1


def all_are_low(tensors: dict[str, torch.Tensor]) -> None:
    tensors["q"].abs_()
    tensors["k"].abs_().neg_()


def first_keys_are_high(tensors: dict[str, torch.Tensor]) -> None:
    """Of a row's blocks of keys, which come from the last on."""
    for name in "qk":
        tensors[name].abs_()
    tensors["k"][:, 32:] *= -1


def one_is_large(tensors: dict[str, torch.Tensor]) -> None:
    """One score of its block and warp is."""
    tensors["q"].mul_(0.1)
    tensors["k"][:, 70] = 30 * tensors["q"][:, 40, 0] / tensors["q"][:, 40, 0].norm() ** 2 * 8


@pytest.mark.parametrize(
    ("name", "cap", "gain", "change"),
    [
        (CAPPED, 50.0, 1.0, lambda tensors: None),  # a polynomial
        (CAPPED, 50.0, 30.0, lambda tensors: None),  # tanh
        (CAPPED, 1000.0, 30.0, lambda tensors: None),  # maxima
        (CAPPED, 52.0, 30.0, from_end_to_end),
        (CAPPED, 1000.0, 30.0, all_are_low),
        (WINDOW, 50.0, 1.0, one_is_large),
        (WINDOW, -30.0, 30.0, lambda tensors: None),
        (OF_HEADS, 0.0, 10.0, lambda tensors: tensors["input_0"].copy_(torch.tensor([20.0, 500.0]))),
        (name_of("min(max(s, -4.0), 6.0)", "full"), 0.0, 3.0, lambda tensors: None),
    ],
)
def test_scores_of_all_sizes(name, cap, gain, change):
    (verdict,) = run(name, cap=cap, gain=gain, change=change)
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize(("name", "rows"), [(CAPPED, 1), (WINDOW, 70)])
def test_a_row_with_one_key_is_its_value(name, rows):
    """To the bit, as without a cap: else gradients, which are 0 there, would be the noise of dO * O."""
    spec = KernelSpec.from_name(name)
    case = cases.make(spec, Shape(4, 70, 70, 4, 4), gain=4.0)
    options = case.options._replace(expression=case.options.expression._replace(numbers=(50.0,)))
    if name == WINDOW:
        options = options._replace(window_left=0, window_right=0)
    run_kernel(make_plan(spec), case.tensors, options, run_options=RunOptions())
    assert torch.equal(case.tensors["o"][:, :rows], case.tensors["v"][:, :rows])


@pytest.mark.parametrize("sink", (-torch.inf, 2.0))
def test_rows_without_keys_have_the_sink_alone(sink):
    (verdict,) = run(
        name_of(sink=True), change=lambda tensors: tensors["s_aux"].fill_(sink), shape=Shape(1, 70, 40, 2, 1)
    )
    assert verdict.ok, str(verdict)


LOW = {"cap": 52.0, "gain": 30.0, "change": first_keys_are_high, "shape": Shape(1, 70, 70, 2, 1)}
NEAR, SMALL = "kMostScore * factor <= kMaxExponent", "!any_lane(!(most <= cap.limit))"
FAULTS = (
    (Fault("always-small", CAPPED, SMALL, "true"), {"gain": 30.0}),
    (
        Fault("one-chain", CAPPED, "fmaxf(fmaxf(sums[0], sums[1]), fmaxf(sums[2], sums[3]))", "sums[0]"),
        {"change": one_is_large},
    ),
    (Fault("third", CAPPED, "kThird * first * square}", "0.0f}"), {"gain": 2.0}),
    (Fault("always-near", CAPPED, NEAR, "true"), {"cap": 1000.0, "gain": 30.0}),
    (
        Fault("one-beginning", CAPPED, "!cap.is_near ? -kInfinity : ", ""),
        {"cap": 1000.0, "gain": 30.0, "change": all_are_low},
    ),
    (Fault("nothing-hidden", CAPPED, "apply_mask(acc_s, ends, n_block * kTileN);\n                if", "if"), {}),
    (Fault("all-short", CAPPED, "blocks.begin_full >= blocks.end_full", "true"), {}),
    (Fault("begun-low", CAPPED, "kMostScore * factor - kMaxExponent", "-kMaxExponent"), LOW),
)


@pytest.mark.parametrize(("fault", "how"), FAULTS, ids=[str(fault) for fault, _ in FAULTS])
def test_fault_is_seen(fault, how):
    assert symptom(run, fault, ((),), seed=0, **how)

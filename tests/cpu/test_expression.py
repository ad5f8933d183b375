"""Expressions on the CPU: what they make of scores and gradients, dense and ragged, in both families."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from fa2gen import cases
from fa2gen.cpu import RunOptions, run_kernel
from fa2gen.features import examples_of
from fa2gen.options import Options, Shape
from fa2gen.plan import make_plan
from fa2gen.select import default_tiling
from fa2gen.spec import Direction, KernelSpec, Mask, Problem
from tests.cpu.faults import Fault, symptom

ARCHES = ("sm80", "sm90")
SOFTCAP = "cap * tanh(s / cap)"
SHAPE = Shape(1, 113, 203, 4, 2)
SMALL = Shape(1, 70, 131, 2, 1)
LEARNING = Shape(2, 70, 131, 2, 1)


def kernel(
    arch: str,
    direction: Direction = "fwd",
    head_dim: int = 64,
    mask: Mask = "causal",
    score: str = SOFTCAP,
    **fields: Any,
) -> KernelSpec:
    problem = Problem(direction=direction, head_dim=head_dim, mask=mask, score=score, **fields)
    return KernelSpec(problem=problem, tiling=default_tiling(problem, arch))


def run(name: str, shape: Shape = SHAPE, options: Options | None = None, rendered=None, gain: float = 1.0, **how):
    """(verdict, tensors) of a case."""
    spec = KernelSpec.from_name(name)
    case = cases.make(spec, shape, options, gain=gain)
    run_kernel(make_plan(spec), case.tensors, case.options, run_options=RunOptions(**how), rendered=rendered)
    assert cases.written_outside(case) is None
    return cases.verdict(case), case.tensors


@pytest.mark.parametrize(
    ("arch", "direction", "head_dim", "mask", "varlen"),
    [
        (arch, direction, head_dim, mask, varlen)
        for arch, direction in itertools.product(ARCHES, ("fwd", "bwd"))
        for head_dim, mask, varlen in (
            (64, "causal", True),
            (72, "window", False),
            (128, "full", False),
            (256, "causal", False),
        )
    ],
)
def test_a_cap(arch, direction, head_dim, mask, varlen):
    spec = kernel(arch, direction, head_dim, mask, varlen=varlen)
    verdict, _ = run(spec.name)
    assert verdict.ok, verdict


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(
    "score",
    [
        "s + 0.01 * (j - i) * s",
        "s * sigmoid(s)",
        "where(j > i, s, 0.5 * s) - abs(i - j) / 64",
        "bend * s * abs(s) + h",
        "s + where(s > 0, sqrt(s), 0)",
    ],
)
def test_other_scores(arch, direction, score):
    verdict, _ = run(kernel(arch, direction, score=score, mask="full").name, SMALL)
    assert verdict.ok, verdict


ALIBI = "s - slope[b, h] * abs(i + seqlen_k - seqlen_q - j)"
BIAS = "s + bias[b, h, i, j]"


@pytest.mark.parametrize(
    ("score", "arch", "direction", "head_dim", "mask", "varlen"),
    [
        *((ALIBI, arch, direction, 128, "causal", False) for arch in ARCHES for direction in ("fwd", "bwd")),
        (ALIBI, "sm90", "bwd", 64, "causal", True),
        *((BIAS, arch, direction, 64, "full", direction == "fwd") for arch in ARCHES for direction in ("fwd", "bwd")),
        *(("s + table[h, abs(i - j)]", arch, "bwd", 64, "window", True) for arch in ARCHES),
        *(("where(kind[b, j] == 2, 0.5 * s, s)", arch, "fwd", 72, "full", False) for arch in ARCHES),
    ],
)
def test_tensors(score, arch, direction, head_dim, mask, varlen):
    verdict, _ = run(kernel(arch, direction, head_dim, mask, score, varlen=varlen).name, SMALL)
    assert verdict.ok, verdict


@pytest.mark.parametrize(("head_dim", "score"), [(72, "s + table[h, i - j]"), (64, ALIBI), (96, ALIBI), (96, SOFTCAP)])
def test_blocks_of_keys_in_turn(head_dim, score):
    """As large batches run them: each has keys, and the warpgroups a pace, of its own."""
    plan = make_plan(kernel("sm90", "bwd", head_dim, score=score))
    tiling = plan.tiling.model_copy(update={"lag": 1, "keys_in_turn": 1})
    verdict, _ = run(KernelSpec(problem=plan.problem, tiling=tiling).name, Shape(2, 150, 331, 2, 2))
    assert verdict.ok, verdict


def test_keys_too_far_away_to_count():
    """Their exponentials are left out, but not a NaN among them."""
    spec = kernel("sm90", "fwd", 64, "causal", ALIBI)
    case = cases.make(spec, Shape(1, 200, 600, 1, 1))
    case.tensors["input_0"].fill_(0.25)
    run_kernel(make_plan(spec), case.tensors, case.options)
    assert cases.verdict(case).ok, cases.verdict(case)
    case.tensors["k"][:, 3] = float("nan")
    run_kernel(make_plan(spec), case.tensors, case.options)
    assert case.tensors["o"].isnan().all()


@pytest.mark.parametrize("arch", ARCHES)
def test_a_head_whose_scores_are_minus_infinity(arch):
    """As one that is left out by a bias: like a row that sees nothing."""
    spec = kernel(arch, score="s + bias[h]", mask="full")
    case = cases.make(spec, SMALL)
    case.tensors["input_0"][0] = float("-inf")
    run_kernel(make_plan(spec), case.tensors, case.options)
    assert case.tensors["lse"][:, 0].isneginf().all() and not case.tensors["o"][:, :, 0].any()
    assert cases.verdict(case).ok, cases.verdict(case)


@pytest.mark.parametrize("arch", ARCHES)
def test_the_greater_of_a_nan_is_nan(arch):
    spec = kernel(arch, score="max(s, 0.0)")
    case = cases.make(spec, SMALL)
    case.tensors["k"][:, 0] = float("nan")
    run_kernel(make_plan(spec), case.tensors, case.options)
    assert case.tensors["o"].isnan().all()


@pytest.mark.parametrize("arch", ARCHES)
def test_what_is_hidden_has_no_derivative(arch):
    """Where a causal mask hides a key the logarithm has none: it adds nothing to the tensor's gradient."""
    spec = kernel(arch, "bwd", score="s + gain[h] * log(1 + i - j)", learned="gain")
    verdict, _ = run(spec.name, Shape(1, 70, 70, 2, 1))
    assert verdict.ok, verdict


LEARNED = {
    # Each with the way in which its elements find their numbers, and whether derivatives are kept with P.
    "a dense bias": (BIAS, "bias"),
    "a bias of all batch entries, and slopes": ("s + bias[h, i, j] - slope[h] * abs(i - j)", "bias, slope"),
    "distances": ("s + far[h, abs(i - j)]", "far"),
    "buckets": ("s + far[h, bucket[abs(i - j)]]", "far"),
    "rows and columns": ("s * row[b, i] + column[h, j]", "row, column"),
    "a cap": ("cap[0] * tanh((s + bias[h, i, j]) / cap[0])", "cap, bias"),
}


@pytest.mark.parametrize(
    ("score", "arch", "head_dim", "mask", "varlen"),
    [
        ("a dense bias", "sm80", 64, "causal", True),
        ("a dense bias", "sm90", 256, "full", False),
        ("a bias of all batch entries, and slopes", "sm90", 64, "causal", True),
        ("distances", "sm90", 128, "full", False),
        ("buckets", "sm80", 72, "causal", False),
        ("rows and columns", "sm80", 64, "full", False),
        ("rows and columns", "sm90", 128, "causal", True),
        ("a cap", "sm90", 128, "causal", False),
        ("a cap", "sm80", 64, "window", True),
        ("a cap", "sm90", 192, "full", False),
    ],
)
def test_tensors_learn(score, arch, head_dim, mask, varlen):
    """Grouped heads, several entries; results lie in buffers of NaN, which the kernels must clear."""
    text, learned = LEARNED[score]
    verdict, _ = run(kernel(arch, "bwd", head_dim, mask, text, learned=learned, varlen=varlen).name, LEARNING)
    assert verdict.ok, verdict


def test_one_tensor_for_all_of_an_axis_learns():
    """(1, heads, 1, seqlen_k): a padding's bias, whose numbers all rows add to."""
    spec = kernel("sm90", "bwd", 64, "causal", BIAS, learned="bias")
    case = cases.make(spec, LEARNING)
    bias = case.tensors["input_0"][:1, :, :1].contiguous()
    assert case.options.expression
    options = case.options._replace(expression=case.options.expression._replace(shapes=(tuple(bias.shape),)))
    gradient = torch.full_like(bias, torch.nan)
    case = replace(case, options=options, tensors={**case.tensors, "input_0": bias, "dinput_0": gradient}, buffers={})
    case = replace(case, tensors=case.tensors | cases._forward(case, by_kernel=False))
    run_kernel(make_plan(spec), case.tensors, options)
    assert cases.verdict(case).ok
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


def test_a_gradient_of_one_element_each_is_the_same_in_every_run():
    spec = kernel("sm90", "bwd", 64, "causal", BIAS, learned="bias", deterministic=True)
    (_, first), (_, again) = (run(spec.name, SMALL, seed=seed) for seed in (0, 5))
    assert all(torch.equal(first[name], again[name]) for name in ("dq", "dk", "dv", "dinput_0"))


@pytest.mark.parametrize(
    ("score", "allow", "arch", "direction", "varlen"),
    [
        (
            "",
            f"j <= i + seqlen_k - seqlen_q and document{at[0]} == document{at[1]}",
            arch,
            direction,
            direction == "fwd",
        )
        for arch in ARCHES
        for direction, at in (("fwd", ("[b, i]", "[b, j]")), ("bwd", ("[i, hk, b]", "[j, hk, b]")))
    ]
    + [(ALIBI, "seen[b, j] or j == i", arch, "bwd", False) for arch in ARCHES],
)
def test_masks_of_tensors(score, allow, arch, direction, varlen):
    """Documents, whose positions may be any axis, and a padding mask."""
    verdict, _ = run(kernel(arch, direction, 64, "full", score, allow=allow, varlen=varlen).name, SMALL)
    assert verdict.ok, verdict


@pytest.mark.parametrize("arch", ARCHES)
def test_a_bias_may_hide_all_of_a_row(arch):
    """-inf in any block, also where no mask is, and in whole rows: out 0, LSE -inf, as if a mask had."""
    spec = kernel(arch, "fwd", 64, "full", BIAS)
    case = cases.make(spec, SMALL)
    bias = case.tensors["input_0"]
    bias[..., 64:] = bias[:, 1, 7] = -torch.inf
    run_kernel(make_plan(spec), case.tensors, case.options)
    out, lse = case.tensors["o"], case.tensors["lse"]
    assert not out[:, 7, 1].any() and torch.isneginf(lse[:, 1, 7]).all()
    assert torch.isfinite(out).all() and torch.isfinite(lse).sum() == lse.numel() - 1


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_the_score_as_it_is_gives_the_plain_kernel(arch, direction):
    """Not only the same bits: the same problem."""
    problem = Problem(direction=direction, head_dim=128, score="s", allow="True")
    assert problem == Problem(direction=direction, head_dim=128)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_large_scores_are_capped(arch, direction):
    """Far beyond the cap, where the derivative is nothing, and rows that see no key."""
    spec = kernel(arch, direction)
    example = examples_of(spec.problem)[0]
    for cap, gain in ((1.0, 4.0), (50.0, 6.0)):
        assert example.expression
        options = example._replace(expression=example.expression._replace(numbers=(cap,)))
        verdict, tensors = run(spec.name, Shape(1, 150, 61, 2, 1), options, gain=gain)
        assert verdict.ok, (cap, verdict)
        assert all(torch.isfinite(tensors[x]).all() for x in (("o",) if direction == "fwd" else ("dq", "dk", "dv")))


@pytest.mark.parametrize(("arch", "direction"), [("sm80", "bwd"), ("sm90", "fwd"), ("sm90", "bwd")])
def test_sanitizers_and_schedules(arch, direction):
    name = kernel(arch, direction, deterministic=direction == "bwd").name
    results = ("o", "lse") if direction == "fwd" else ("dq", "dk", "dv")
    _, first = run(name, SMALL, sanitize=True)
    _, again = run(name, SMALL, seed=3, num_sms=3)
    assert all(torch.equal(again[x], first[x]) for x in results)


FORWARD = {arch: kernel(arch).name for arch in ARCHES}
BACKWARD = {arch: kernel(arch, "bwd", 128).name for arch in ARCHES}
SPLIT = kernel("sm90", "bwd", 64).name
POSITIONS = {arch: kernel(arch, score="s - abs(i - j) / 8 + h / 4", mask="full").name for arch in ARCHES}
LEARNING_BIAS = kernel("sm80", "bwd", score=BIAS, learned="bias").name
LEARNING_ROWS = kernel("sm90", "bwd", score="s * row[b, i] + column[h, j]", learned="row, column").name
LEARNING_FAR = kernel("sm90", "bwd", score="s + far[h, max(i - j, 9)]", learned="far").name
STARTING = kernel("sm90", "bwd", 128, score=ALIBI).name
TURNS = f"{kernel('sm90', 'bwd', 96, score=ALIBI).name}_t1"
GENTLE = kernel("sm90", head_dim=128, score="s - slope[b, h] / 64 * abs(i + seqlen_k - seqlen_q - j)").name
OF_STEP = ");\n        Seqlen const s = seqlen_of(p, block.bidb);\n        int const key"
FAULTS = [
    *(
        Fault("another-scale", name, "finalize_softmax(row_max", "finalize_softmax(row_sum")
        for name in FORWARD.values()
    ),
    *(
        Fault("no-derivative", name, "probabilities[c] * score.slope", "probabilities[c]")
        for name in (*BACKWARD.values(), SPLIT)
    ),
    *(
        Fault("hidden-weights", BACKWARD[arch], "acc_s[i] : 0.0f;", "acc_s[i] : acc_s[i];", count=n)
        for arch, n in (("sm90", 1),)
    ),
    *(Fault("rows-too-low", name, "n / 2 % 2 * 8;", "n / 2 % 2 * 4;") for name in POSITIONS.values()),
    Fault("another-origin", POSITIONS["sm90"], "static_cast<float>(row - column);", "static_cast<float>(row);"),
    Fault("another-entry", kernel("sm90", score=ALIBI).name, "with_values(p, bidb, bidh,", "with_values(p, 0, bidh,"),
    Fault(
        "another-diagonal",
        kernel("sm90", "bwd", mask="full", score=ALIBI).name,
        "float>(right - down)",
        "float>(right)",
    ),
    Fault("one-term-for-two-keys", STARTING, "first_query - key - 8 * row)", "first_query - key)"),
    Fault("terms-left-out", STARTING, "/*adds=*/true", "/*adds=*/false"),
    Fault("terms-of-another-block", TURNS, f"k_state.stage{OF_STEP}", f"k_state.stage ^ 1{OF_STEP}"),
    Fault("rows-that-do-not-rise", STARTING, "lse_log2 -= rise * static_cast<float>(row_of_block);", ""),
    Fault("few-keys-count", GENTLE, "kFaint = -40.0f", "kFaint = 4.0f"),
    Fault("a-row-forgotten", kernel("sm90", score=ALIBI).name, "base[row] -= row_terms[row];", ""),
    Fault("another-place", kernel("sm80", score=BIAS).name, "p.input_0_last_3 + 1)", "p.input_0_last_3)"),
    Fault("not-cleared", LEARNING_BIAS, "store_global_float(gradient + i, 0.0f);", ""),
    Fault("another-element", LEARNING_BIAS, "16 * tile + j / 2 % 2 * 8;", "16 * tile;"),
    Fault("half-of-the-lanes", LEARNING_ROWS, "upper ? values[i] : values[half + i]", "values[half + i]"),
    Fault(
        "hidden-derivatives",
        LEARNING_ROWS,
        "weighted(probability_0[j % 2], derivative_0",
        "weighted(1.0f, derivative_0",
    ),
    Fault("one-number-for-all", LEARNING_FAR, "if (any_lane(differs_0)) {", "if (false) {"),
    Fault("a-sum-of-one-lane", LEARNING_FAR, "sum_of_lanes(sum_0, 1, 16)", "sum_of_lanes(sum_0, 1, 8)"),
    *(Fault("columns-too-far", name, "n / 4 * 8 + n % 2;", "n / 4 * 8;") for name in POSITIONS.values()),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_seen(fault):
    if not symptom(run, fault, [SMALL._replace(batch=2)], 0):
        pytest.fail("no run shows it")

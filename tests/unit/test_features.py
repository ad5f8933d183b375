"""A feature is one module, its blocks, one field or word, and its numbers: what is declared fits together."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path
from typing import get_args

import pytest

from fa2gen.arch import ArchName
from fa2gen.errors import InvalidInput
from fa2gen.features import MASKS, examples_of, features_of, key_range, rooms_of
from fa2gen.features.window import WINDOW
from fa2gen.launch import launch_of
from fa2gen.options import CacheShape, Expression, Options, Shape
from fa2gen.plan import make_plan
from fa2gen.select import default_tiling
from fa2gen.spec import Direction, KernelSpec, Mask, Problem, declared

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    **dict.fromkeys(("fwd", "bwd"), Shape(2, 300, 400, 6, 2)),
    "decode": CacheShape(2, 3, 400, 6, 2, entries=60, page_size=16, table_rows=2, table_stride=25),
}
PROBLEMS = [
    Problem(direction=direction, head_dim=64, mask=mask, deterministic=deterministic)
    for direction, mask in itertools.product(get_args(Direction), get_args(Mask))
    for deterministic in ((False, True) if direction == "bwd" else (False,))
]
PROBLEMS += [Problem(direction="decode", head_dim=64, mask=mask, paged=True) for mask in get_args(Mask)]
PROBLEMS += [Problem(head_dim=64, mask=mask, varlen=True, paged=True) for mask in get_args(Mask)]
KERNELS = [(problem, arch) for problem in PROBLEMS for arch in get_args(ArchName)]


# What a call can say, one thing at a time.
ONE_EACH = [
    {"causal": True},
    {"window_left": 5},
    {"chunk": 7},
    {"deterministic": True},
    {"varlen": True},
    {"sink": True},
    {"dropout_p": 0.1},
    {"expression": Expression(score="2 * s")},
    {"expression": Expression(allow="i != j")},
]


def shape_of(problem):
    return SHAPES["decode" if problem.paged else problem.direction]


def plan_of(problem, arch):
    return make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, arch)))


def test_every_mask_has_a_feature():
    assert MASKS.keys() == set(get_args(Mask))
    assert all(feature.name == mask for mask, feature in MASKS.items())


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.text)
def test_what_features_declare_is_there(problem):
    for room, block in rooms_of(problem).items():
        assert (ROOT / f"templates/rooms/{room}/{block}.cuh.j2").is_file(), f"{room}: {block}"
    for options in examples_of(problem):
        assert (
            options.problem(problem.direction, problem.head_dim, problem.dtype, problem.head_dim_v, problem.paged)
            == problem
        )
        for feature in features_of(problem):
            assert feature.formulas.keys() <= {param.name for param in feature.params}


@pytest.mark.parametrize(("problem", "arch"), KERNELS, ids=str)
def test_a_launch_gives_every_number_that_params_hold(problem, arch):
    """Addresses and strides come later; of everything else none may be missing or of another kind."""
    plan = plan_of(problem, arch)
    for options in examples_of(problem):
        launch = launch_of(plan, shape_of(problem), options, num_sms=132)
        later = {p.name: 0 for p in plan.params if p.is_address or p.name.endswith("_stride")}
        assert not later.keys() & launch.values.keys()
        struct.pack(plan.params_format, *plan.pack_params({**later, **launch.values}))
        assert launch.scratch.keys() == {scratch.name for scratch in plan.scratch}
        assert len(launch.grids) == len(plan.entry_points)


@pytest.mark.parametrize(("problem", "arch"), KERNELS, ids=str)
def test_a_kernel_is_not_launched_for_another_mask(problem, arch):
    plan = plan_of(problem, arch)
    for mask in get_args(Mask):
        other = problem.model_copy(update={"mask": mask})
        for options in examples_of(other):
            if mask == problem.mask or MASKS[problem.mask].general:
                launch_of(plan, shape_of(problem), options, num_sms=132)
            else:
                with pytest.raises(InvalidInput, match=f"{problem.mask} mask"):
                    launch_of(plan, shape_of(problem), options, num_sms=132)


# Options -------------------------------------------------------------------------------------------------------------


def test_options_of_one_kind_make_one_problem():
    """A kernel is remembered by the kind: with a field less, a call with dropout ran the kernel without, if a call
    without had come first."""
    said = [{}, *({**a, **b} for a, b in itertools.combinations(ONE_EACH, 2))]
    made = {}
    for direction, given in itertools.product(("fwd", "bwd"), said):
        options = Options(**given)
        made.setdefault((direction, options.kind), set()).add(options.problem(direction, 64, "bf16"))
    assert max(map(len, made.values())) == 1
    assert len({problem for (problem,) in made.values() if problem.direction == "bwd"}) == len(made) / 2


LENGTHS = (1, 2, 5, 8)
SIDES = (-1, 0, 1, 3, 7, 100)


@pytest.mark.parametrize("seqlen_q", LENGTHS)
@pytest.mark.parametrize("seqlen_k", LENGTHS)
def test_key_ranges_against_the_definition(seqlen_q, seqlen_k):
    for causal, left, right, chunk in itertools.product((False, True), SIDES, SIDES, (0, 1, 3, 8, 50)):
        options = Options(causal=causal, window_left=left, window_right=right, chunk=chunk)
        for i in range(seqlen_q):
            d = i + seqlen_k - seqlen_q
            seen = [
                j
                for j in range(seqlen_k)
                if (left < 0 or j >= d - left)
                and (not causal or j <= d)
                and (causal or right < 0 or j <= d + right)
                and (not chunk or j // chunk == d // chunk)
            ]
            first, end = key_range(options, seqlen_q, seqlen_k, i)
            assert list(range(first, max(first, end))) == seen, (options, i)


@pytest.mark.parametrize("seqlen_q", LENGTHS)
@pytest.mark.parametrize("seqlen_k", LENGTHS)
def test_reduced_options_show_the_same(seqlen_q, seqlen_k):
    """And are no more than they need be: what hides nothing is full, what a causal mask says is causal."""
    rows = range(seqlen_q)

    def shown(options):
        ranges = (key_range(options, seqlen_q, seqlen_k, i) for i in rows)
        return [range(first, max(first, end)) or range(0) for first, end in ranges]

    for causal, left, right, chunk in itertools.product((False, True), SIDES, SIDES, (0, 1, 3, 8, 50)):
        options = Options(0.3, causal, left, right, chunk, True)
        reduced = options.reduced(seqlen_q, seqlen_k)
        assert shown(reduced) == shown(options), options
        assert (reduced.softmax_scale, reduced.deterministic) == (0.3, True)
        assert reduced.reduced(seqlen_q, seqlen_k) == reduced
        if left < 0 and not chunk:
            assert reduced.mask in ("full", "causal") or right > 0
        if left >= seqlen_k and not chunk and (causal or right == 0):
            assert reduced.mask == "causal"


# Files ---------------------------------------------------------------------------------------------------------------

MOST_FILES = 8
MORE_FILES = {
    "head_dim": 12,
    "head_dim_v": 10,
    "dtype": 25,
    "direction": 12,
    "deterministic": 16,
    "varlen": 25,
    "sink": 13,
    "dropout": 18,
    "paged": 16,
    "learned": 11,
    "partial": 19,
}
"""Of fields that were there before there was a limit, or change what every step of a kernel does, or how each ends."""


def askers(field: str) -> list[str]:
    """The files of kernels, plans and launches that ask for a field of a problem; those where its options are declared,
    and the doors that take them, are not among them."""
    folders = ("features", "plan", "cpu", "launch.py", "render.py", "source.py", "select.py")
    paths = [path for folder in folders for path in (ROOT / "fa2gen" / folder).rglob("*.py")]
    paths += [ROOT / "fa2gen" / name for name in folders if name.endswith(".py")]
    paths += (ROOT / "templates").rglob("*.j2")
    asks = re.compile(rf"\b(k|plan|problem|self)\.{field}\b")
    return sorted(path.relative_to(ROOT).as_posix() for path in paths if asks.search(path.read_text()))


@pytest.mark.parametrize("field", declared(Problem))
def test_few_files_know_of_a_feature(field):
    """What it puts into rooms, operands and formulas nobody asks for; the fewer ask, the less the next one misses."""
    found = askers(field)
    assert len(found) <= MORE_FILES.get(field, MOST_FILES), "\n".join(found)
    # The limit of those is what they need.
    assert field not in MORE_FILES or len(found) > MORE_FILES[field] - 5


def test_the_walk_through_a_feature_leads_to_files():
    text = (ROOT / "templates/README.md").read_text()
    walk = text[text.index("## Adding a feature") : text.index("## Words")]
    named = re.findall(r"`([\w./]+/[\w.]*)`", walk)
    assert len(named) >= 7
    for name in named:
        assert any((ROOT / folder / name).exists() for folder in (".", "fa2gen", "templates")), name
    assert "window" in get_args(Mask) and {"window_left", "window_right", "chunk"} <= set(Options._fields)
    assert (WINDOW.rooms, WINDOW.left_edge) == ({"mask": "window"}, True) and WINDOW.formulas and WINDOW.examples

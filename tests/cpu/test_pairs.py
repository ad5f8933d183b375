"""Every two values of a problem's fields meet in some kernel: a few rows cover all pairs, read off the declarations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import pytest

from fa2gen import cases
from fa2gen.options import Shape
from fa2gen.select import best_spec
from fa2gen.spec import Direction, Problem
from fa2gen.testing import problems

SHAPES = (Shape(2, 81, 150, 4, 2), Shape(1, 150, 65, 2, 2))
HEAD_DIMS = {"head_dim": [64, 72], "head_dim_v": [None, 40]}
CAPS = {"score": ["", "cap * tanh(s / cap)"]}


def pairs(problem: Problem) -> Iterator[tuple[tuple[str, Any], ...]]:
    yield from itertools.combinations(problem.model_dump().items(), 2)


def covering(choices: Sequence[Problem]) -> list[Problem]:
    """Few of them that have all pairs of values that any has: each the one with the most that are missing."""
    missing = {pair for problem in choices for pair in pairs(problem)}
    found = []
    while missing:
        found.append(max(choices, key=lambda problem: sum(pair in missing for pair in pairs(problem))))
        missing -= set(pairs(found[-1]))
    return found


def choices_of(direction: Direction) -> list[Problem]:
    """Rows of caches of 8-bit numbers are whole copies of 16 bytes: another head dim there. Partial results go with few
    other fields: test_partial.py has them."""
    return problems(
        direction=direction,
        partial=False,
        **HEAD_DIMS | CAPS | ({"head_dim": [64, 80]} if direction == "decode" else {}),
    )


ROWS = [row for way in get_args(Direction) for row in covering(choices_of(way))]


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("problem", ROWS, ids=lambda problem: problem.text)
def test_features_meet(problem, arch):
    """On one architecture among sequences that end in the midst of blocks, on the other with rows that see no key."""
    if (problem.cache_dtype, arch) == ("e4m3", "sm80"):
        pytest.skip("no sm80 kernel reads e4m3: before 8.9 nothing converts it")
    number = (ROWS.index(problem) + (arch == "sm90")) % 2
    case = cases.make(best_spec(problem, arch), SHAPES[number], with_dlse=bool(number))
    cases.run(case, "cpu")
    assert cases.written_outside(case) is None
    verdict = cases.verdict(case)
    assert verdict.ok, verdict


def test_few_rows_cover_all_pairs():
    every = {pair for way in get_args(Direction) for problem in choices_of(way) for pair in pairs(problem)}
    assert {pair for row in ROWS for pair in pairs(row)} == every
    assert len(ROWS) <= 32

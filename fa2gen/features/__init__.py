"""What each value of a problem's fields brings to kernels: one module a feature, pure, without torch.

`features_of(problem)` are the features of a kernel in the order of the problem's fields. A new one is a module here
(its `Feature`), a row in this file, a block in templates/rooms/, a field or a word in `fa2gen.spec`, and its numbers in
`fa2gen.options`.
"""

from __future__ import annotations

import itertools

from fa2gen.features.base import Feature, Param, Scratch
from fa2gen.features.deterministic import DETERMINISTIC
from fa2gen.features.dropout import DROPOUT
from fa2gen.features.expression import expression_of
from fa2gen.features.mask import CAUSAL, FULL, key_range
from fa2gen.features.paged import PAGED
from fa2gen.features.partial import PARTIAL
from fa2gen.features.scaled import SCALED
from fa2gen.features.sink import SINK
from fa2gen.features.varlen import VARLEN
from fa2gen.features.window import WINDOW
from fa2gen.options import Options
from fa2gen.spec import SAME, Problem

__all__ = ["MASKS", "Feature", "Param", "Scratch", "examples_of", "features_of", "key_range", "rooms_of"]

MASKS: dict[str, Feature] = {"full": FULL, "causal": CAUSAL, "window": WINDOW}


def features_of(problem: Problem) -> tuple[Feature, ...]:
    """The features of a problem's kernels."""
    return (
        MASKS[problem.mask],
        *([VARLEN[problem.direction]] if problem.varlen else []),
        *([SINK[problem.direction]] if problem.sink else []),
        *([DROPOUT] if problem.dropout else []),
        *([PAGED[problem.direction]] if problem.paged else []),
        *([PARTIAL] if problem.partial else []),
        *([SCALED] if problem.cache_dtype != SAME else []),
        *([DETERMINISTIC] if problem.deterministic else []),
        *([expression_of(problem)] if problem.has_expression else []),
    )


def examples_of(problem: Problem) -> tuple[Options, ...]:
    """Options of calls that a problem's kernels are made for; the first is the typical one."""
    choices = itertools.product(*(feature.examples for feature in features_of(problem)))
    return tuple(
        Options(**{name: value for example in chosen for name, value in example.items()}) for chosen in choices
    )


def rooms_of(problem: Problem) -> dict[str, str]:
    """Room -> the block of templates/rooms/<room>/ that stands there in a problem's kernels."""
    found = {"seqlen": "cache" if problem.direction == "decode" else "dense", "row_end": "plain"}
    for feature in features_of(problem):
        found |= feature.rooms
    return found

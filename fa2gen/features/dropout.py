"""Dropout: elements of P are dropped after the softmax, by numbers that a seed in device memory and their place give.

O = (Z * P / (1 - p)) V, where Z is 1 for what is kept; sums of rows and LSE are those of all of P. Backward,
dV = (Z * P / (1 - p))^T dO and dS = P * (Z * dP / (1 - p) - dPsum). Z is drawn anew by each pass, and is the same for
both, as it depends on the sequence, the head, the query and the key alone: see fa2gen.reference.dropout_keep.
"""

from __future__ import annotations

import math

from fa2gen.features.attention import Operand
from fa2gen.features.base import Feature, Param

__all__ = [
    "DROPOUT",
    "DROP_DIGITS",
    "DROP_ROTATIONS",
    "DROP_STEPS",
    "INDEPENDENT_ELEMENTS",
    "LAST_ROTATION",
    "keep_steps",
]

DROP_DIGITS = 12  # of an element's random number, of which 4 are its own: see templates/common/dropout.cuh.j2
DROP_STEPS = 1 << DROP_DIGITS  # what is dropped is a multiple of 1 / DROP_STEPS of all


# How far a call's four words are rotated, once and again, for the sums of bits that are the second four digits, and how
# far those are for the last four. Found by a search: 8 digits of any INDEPENDENT_ELEMENTS elements are independent.
DROP_ROTATIONS = ((5, 19, 28, 26), (25, 3, 9, 4))
LAST_ROTATION = 11
INDEPENDENT_ELEMENTS = 3


def keep_steps(dropout_p: float) -> int:
    """Of DROP_STEPS equally likely numbers, how many keep an element; some drop it, and some do not."""
    return min(max(math.floor((1.0 - dropout_p) * DROP_STEPS + 0.5), 1), DROP_STEPS - 1)


DROPOUT = Feature(
    "dropout",
    operands=(Operand("rng_state", "state"),),
    params=(*(Param(f"keep_digit_{i}", "int") for i in range(DROP_DIGITS)), Param("keep_scale", "float")),
    formulas={
        **{  # of keep_steps, 32 times each, the last first
            f"keep_digit_{i}": f"-(min(max(lround((1 - dropout_p) * {DROP_STEPS}), 1), {DROP_STEPS - 1}) >> {i} & 1)"
            for i in range(DROP_DIGITS)
        },
        "keep_scale": "1 / (1 - dropout_p)",
    },
    examples=({"dropout_p": 0.17},),
)

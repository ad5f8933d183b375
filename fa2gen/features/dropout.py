"""Dropout: elements of P are dropped after the softmax, by numbers that a seed in device memory and their place give.

O = (Z * P / (1 - p)) V, where Z is 1 for what is kept; sums of rows and LSE are those of all of P. Backward,
dV = (Z * P / (1 - p))^T dO and dS = P * (Z * dP / (1 - p) - dPsum). Z is drawn anew by each pass, and is the same for
both, as it depends on the sequence, the head, the query and the key alone: see fa2gen.reference.dropout_keep.
"""

from __future__ import annotations

import math

from fa2gen.features.attention import Operand
from fa2gen.features.base import Feature, Param

__all__ = ["DROPOUT", "DROP_DIGITS", "DROP_STEPS", "OWN_DIGITS", "keep_steps"]

DROP_DIGITS = 12  # of an element's random number; the last are its neighbour's: see templates/common/dropout.cuh.j2
OWN_DIGITS = 8
DROP_STEPS = 1 << DROP_DIGITS  # what is dropped is a multiple of 1 / DROP_STEPS of all


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

"""Dropout: elements of P are dropped after the softmax, by numbers that a seed in device memory and their place give.

O = (Z * P / (1 - p)) V, where Z is 1 for what is kept; sums of rows and LSE are those of all of P. Backward,
dV = (Z * P / (1 - p))^T dO and dS = P * (Z * dP / (1 - p) - dPsum). Z is drawn anew by each pass, and is the same for
both, as it depends on the sequence, the head, the query and the key alone: see fa2gen.reference.dropout_keep.
"""

from __future__ import annotations

from collections.abc import Mapping

from fa2gen.features.attention import Operand
from fa2gen.features.base import Feature, Param
from fa2gen.options import AnyShape, Options

__all__ = ["DROPOUT", "DROP_STEPS", "keep_steps"]

DROP_STEPS = 1 << 15  # of 15 random bits: what is dropped is a multiple of 1 / DROP_STEPS of all


def keep_steps(dropout_p: float) -> int:
    """Of DROP_STEPS equally likely numbers, how many keep an element; some drop it, and some do not."""
    return min(max(round((1.0 - dropout_p) * DROP_STEPS), 1), DROP_STEPS - 1)


def _values(options: Options, _: AnyShape) -> Mapping[str, int | float]:
    return {
        "keep_threshold": 65537 * keep_steps(options.dropout_p),  # for both halves of 32 bits
        "keep_scale": 1.0 / (1.0 - options.dropout_p),
    }


DROPOUT = Feature(
    "dropout",
    operands=(Operand("rng_state", "state"),),
    params=(Param("keep_threshold", "int"), Param("keep_scale", "float")),
    values=_values,
    formulas={
        "keep_threshold": "65537 * min(max(lround((1 - dropout_p) * 32768), 1), 32767)",
        "keep_scale": "1 / (1 - dropout_p)",
    },
    examples=({"dropout_p": 0.17},),
)

"""Attention sinks: one learnable logit a query head in each softmax's sum, which no value stands for.

P = exp(S) / (sum(exp(S)) + exp(sink)), so LSE has the sink in it, and with it the gradients of Q, K and V are those of
any softmax. Of the sink itself P is P_sink = exp(sink - LSE) and dP is 0: dSink = -sum over rows of P_sink * dPsum, of
which the preprocess kernel leaves one number for each of its warps, and the postprocess kernel their sum.
"""

from __future__ import annotations

from fa2gen.features.attention import Operand
from fa2gen.features.base import Feature, Scratch
from fa2gen.spec import Direction

__all__ = ["SINK"]

_S_AUX = Operand("s_aux", "head")

_FORWARD = Feature("sink", rooms={"row_end": "sink"}, operands=(_S_AUX,), examples=({"sink": True},))

SINK: dict[Direction, Feature] = {
    "fwd": _FORWARD,
    "decode": _FORWARD,
    "bwd": Feature(
        "sink",
        operands=(_S_AUX, Operand("ds_aux", "head", out=True)),
        scratch=(Scratch("sink_sums", "float*"),),
        examples=({"sink": True},),
    ),
}

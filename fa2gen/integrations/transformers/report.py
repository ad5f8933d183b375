"""What of a model's attention runs by fa2gen, and why not the rest: `report`."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch

from fa2gen.errors import InvalidInput
from fa2gen.integrations.transformers.attention import recorded
from fa2gen.integrations.transformers.models import INTERFACE, OWN

__all__ = ["Line", "report"]


class Line(NamedTuple):
    """One attention module.

    runs  "fa2gen", "sdpa" where fa2gen refused, "refused" where nothing else could, another attn_implementation,
          or "own": code of the module's own, which no attn_implementation reaches.
    asks  what the module asked for: heads, head dim, mask, features.
    why   it is not "fa2gen".
    """

    module: str
    kind: str
    runs: str
    asks: str = ""
    why: str = ""

    def __str__(self) -> str:
        return f"{self.runs:8} {self.module} ({self.kind}): {'; '.join(x for x in (self.asks, self.why) if x)}"


def report(model: Any, **inputs: Any) -> list[Line]:
    """Of each attention module of a transformers model, in the model's order, what runs and why.

    One forward pass is made, without gradients, with these inputs, as the model is: in training mode it has dropout.
    Without inputs a text model gets a few tokens of its own. Raises InvalidInput where the model needs others, and what
    the model raises of those that are given before its first attention.
    """
    given = bool(inputs)
    if not given and not hasattr(model, "dummy_inputs"):
        raise InvalidInput(
            f"{type(model).__name__} is no transformers model, whose inputs would be known; give report those of a "
            "forward pass: report(model, input_ids=...)"
        )
    if not given:
        inputs = {name: x.to(model.device) for name, x in model.dummy_inputs.items()}
    refusal = None
    with recorded() as calls, torch.no_grad():
        try:
            model(**inputs)
        except Exception as error:
            if not calls and given:
                raise
            if not calls:
                raise InvalidInput(
                    f"{type(model).__name__} does not run with {', '.join(inputs)} ({error}); give report the inputs "
                    "of a forward pass: report(model, pixel_values=...)"
                ) from error
            refusal = error
    lines = []
    for name, module in model.named_modules():
        if (call := calls.get(module)) is not None:
            lines.append(Line(name, type(module).__name__, call.runs, call.asks, call.why))
        elif "Attention" in type(module).__name__ and not any(inner in calls for inner in module.modules()):
            lines += _without_call(name, module, refusal)
    return lines


def _without_call(name: str, module: Any, refusal: Exception | None) -> list[Line]:
    """Of a module that called no attention function of ours, where it has attention at all."""
    try:
        source = inspect.getsource(next(kind for kind in type(module).__mro__ if "forward" in vars(kind)))
    except OSError:
        source = ""
    kind, chosen = type(module).__name__, getattr(getattr(module, "config", None), "_attn_implementation", None)
    if INTERFACE in source:
        why = f"attn_implementation is {chosen!r}" if refusal is None else f"not reached: {refusal}"
        return [Line(name, kind, str(chosen), why=why)]
    if OWN.search(source):
        return [Line(name, kind, "own", why="computes attention itself, whatever attn_implementation says")]
    return []

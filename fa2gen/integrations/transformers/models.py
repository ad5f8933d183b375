"""What a model's source says of its attention where transformers says nothing: read once a model."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["INTERFACE", "OWN", "Model", "model_of", "overlays_are_made"]

INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # by which a transformers module looks for its attention function
OWN = re.compile(r"[sS]oftmax|scaled_dot_product_attention")  # in code that computes attention itself
_CLASS = re.compile(r"^class \w*Attention\w*\b.*(?:\n(?!\S).*)*", re.MULTILINE)
_ADDS = re.compile(r"\+=? attention_mask\b")
_JOINS = re.compile(r"\bcat\(\[attention_mask, \w+\.to\(attention_mask\.dtype\)")  # a bias of more keys to it
# A mask that is wanted whatever it hides: it is joined to another, or looked up.
_WHOLE = re.compile(r"\ballow_is_causal_skip\W+False|\bindexed_attention\b|\battention_mask\.dtype == torch\.bool\b")
_WINDOWS = re.compile(r"\bcreate_\w*sliding_window\w*")  # as masks of one are made
_SAYS_WINDOWS = re.compile(r"\bsliding_window=")  # as attention hears of one
_CAUSAL = re.compile(r"\bis_causal(?:: [\w |]+)?\s*=\s*([\w.]+)")
_NEVER_CAUSAL = {"False", "None", "is_causal", "self.is_causal"}
# How a model asks for masks that are more than causal, windows and packed sequences.
_OVERLAYS = re.compile(r"\b(?:or_mask_function|and_mask_function|block_sequence_ids)=(?!None\b)")


class Model(NamedTuple):
    """What to know of a model to make its masks.

    own            some of its attention is its own code, which knows masks as what is added to scores, and no others.
    whole          it does more with masks than hand them to its attention.
    windows        its attention hears of sliding windows otherwise.
    makes_windows  it makes masks of sliding windows itself.
    causal         its attention hears otherwise that it is causal, or whether.
    bidirectional  all of its attention hears otherwise that it is not.
    overlays       its masks may be more than causal, windows and packed sequences.
    """

    own: bool = False
    whole: bool = False
    windows: bool = True
    makes_windows: bool = False
    causal: bool = True
    bidirectional: bool = True
    overlays: bool = False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def model_of(config: type) -> Model:
    """Of the model that a class of configs belongs to: the usual where its source is not found, or has no attention."""
    for known in config.__mro__:
        module = known.__module__.replace("configuration_", "modeling_")
        if "modeling_" in module and module in sys.modules:
            return _read(getattr(sys.modules[module], "__file__", None))
    return Model()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def overlays_are_made() -> bool:
    """Whether a model that is loaded makes masks that are more than causal, windows and packed sequences."""
    names = [name for name in sys.modules if name.rpartition(".")[2].startswith("modeling_")]
    return any(_read(getattr(sys.modules[name], "__file__", None)).overlays for name in names)


@cache
def _read(file: str | None) -> Model:
    if file is None:
        return Model()
    source = Path(file).read_text(encoding="utf-8")
    overlays = _OVERLAYS.search(source) is not None
    if INTERFACE not in source:
        return Model(own=OWN.search(source) is not None, overlays=overlays)
    said = set(_CAUSAL.findall(source))
    classes = _CLASS.findall(source)
    adds = any(INTERFACE not in x and OWN.search(x) and _ADDS.search(x) for x in classes)
    return Model(
        own=adds or _JOINS.search(source) is not None,
        whole=_WHOLE.search(source) is not None,
        windows=_SAYS_WINDOWS.search(source) is not None,
        makes_windows=_WINDOWS.search(source) is not None,
        causal=not said or not said <= _NEVER_CAUSAL,
        bidirectional=not any(INTERFACE in x and "is_causal" not in x for x in classes),
        overlays=overlays,
    )

"""The mask function: transformers' masks, as what kernels take.

transformers asks for a mask once a forward pass and kind of layer, and gives it to the attention of each. It is

    None                      what there is to hide, the attention's is_causal and sliding_window say.
    (batch, keys) bool        the keys that count, beside that. `Rows` of it says more.
    (batch, 1, q, keys) bool  everything, for what is neither: images that see themselves, prefixes, chunks.
    (batch, 1, q, keys)       everything, to be added to scores, for models with attention of their own.

Which kind a mask is, is read off the functions that transformers composes it of, by an exact list: what is not in it is
of the third kind. So is what the model's source says its attention would not hear of otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fa2gen.integrations.transformers.models import model_of, overlays_are_made
from fa2gen.integrations.transformers.rows import Rows

__all__ = ["mask"]

_CAUSAL = "causal_mask_function"
_PACKED = "packed_sequence_mask_function"
_WINDOWS = {"sliding_window_overlay", "sliding_window_bidirectional_overlay"}
# What the attention hears of otherwise: is_causal, sliding_window, and where packed sequences begin.
_SAID = {_CAUSAL, _PACKED, "bidirectional_mask_function", *_WINDOWS}
_HOLDERS = {"and_masks", "remap_positions_for_packed_sequence"}  # of other functions, all of which hide


def mask(
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    q_length: int | None = None,
    q_offset: Any = 0,
    kv_offset: int = 0,
    cache_position: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """The mask of a forward pass, of the kinds that the module names.

    attention_mask  (batch, seen) bool, of all keys since the first.
    q_length        queries, the first at place q_offset, which a static cache has on the device; transformers 4 gives
                    their places in place of both, cache_position.
    kv_length       keys, the first at place kv_offset; of a static cache those too that were not seen yet.
    """
    queries: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset}
    if cache_position is not None:
        queries = {"cache_position": cache_position}
        q_length = cache_position.shape[0]
        q_offset = 0 if q_length == kv_length else cache_position[0]
    assert q_length is not None
    model = model_of(type(others.get("config")))
    asked: dict[str, Any] = {
        "batch_size": batch_size, "kv_length": kv_length, "mask_function": mask_function, "kv_offset": kv_offset,
        "attention_mask": attention_mask, **queries, **others,
    }  # fmt: skip
    if model.own:
        return _made("eager_mask", asked if model.bidirectional else asked | {"allow_is_bidirectional_skip": False})
    if model.whole:
        return _made("sdpa_mask", asked | {"allow_is_causal_skip": False})
    tracing = torch.compiler.is_compiling()
    parts = {} if tracing else _parts(mask_function)
    known = _is_named(mask_function, others) if tracing else parts.keys() <= _SAID
    may_be_windows = model.makes_windows and mask_function.__name__ == "and_mask"  # which may be packed sequences
    windows = may_be_windows if tracing else not _WINDOWS.isdisjoint(parts)
    known = known and (model.windows or not windows)
    if isinstance(q_offset, Tensor) and q_length > 1:
        known = known and not tracing
        q_offset = int(q_offset) if known else q_offset
    causal = mask_function.__name__ != "bidirectional_mask_function" if tracing else _CAUSAL in parts
    silent = not (model.causal if causal else model.bidirectional)  # nobody but the mask says so
    seen = q_offset + q_length - kv_offset if causal else kv_length  # how many keys the last query sees
    if not known or (silent and tracing) or (isinstance(seen, int) and seen > kv_length):
        return _made("sdpa_mask", asked | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    if attention_mask is None and _PACKED in parts:
        ids = parts[_PACKED]["packed_sequence_mask"].expand(batch_size, -1)
        begins = torch.nn.functional.pad(ids.diff(dim=1) != 0, (1, 0))
        return Rows.of_packed(begins).told(torch.ones_like(begins), causal, kv_length)
    device = others.get("device") if cache_position is None else cache_position.device
    counted = _counted(attention_mask, kv_length, kv_offset)
    if isinstance(seen, int) and seen == kv_length:
        if silent and counted is None:
            counted = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    elif q_length > 1:
        counted = (
            torch.ones(batch_size, seen, dtype=torch.bool, device=device) if counted is None else counted[:, :seen]
        )
    else:  # the next token of a static cache: masks of one shape for all of them
        visible = (torch.arange(kv_length, device=device) < seen).expand(batch_size, -1)
        counted = visible if counted is None else counted & visible
    return counted if tracing or counted is None else Rows.of(counted).told(counted, causal, kv_length, silent)


def _counted(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """The part of a mask of all keys that is about these."""
    if attention_mask is None:
        return None
    # Made here before: generate makes the masks of a static cache, and the model makes them again of those.
    first = 0 if attention_mask.shape[1] == kv_length else kv_offset
    part = attention_mask[:, first : first + kv_length]
    return torch.nn.functional.pad(part, (0, kv_length - part.shape[1])) if part.shape[1] < kv_length else part


def _made(by: str, asked: dict[str, Any]) -> Tensor | None:
    """The mask that transformers makes for others."""
    from transformers import masking_utils

    made: Tensor | None = getattr(masking_utils, by)(**asked)
    return made


def _parts(function: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    """The functions that a mask function is made of, by name, and what each encloses."""
    name = function.__qualname__.partition(".")[0]
    if function.__module__ != "transformers.masking_utils":
        return {f"{function.__module__}.{name}": {}}
    code, cells = function.__code__, function.__closure__ or ()
    enclosed = {variable: cell.cell_contents for variable, cell in zip(code.co_freevars, cells, strict=True)}
    if name not in _HOLDERS:
        return {name: enclosed}
    held = enclosed.get("mask_functions") or (enclosed["mask_function"],)
    return {name: what for inner in held for name, what in _parts(inner).items()}


def _is_named(function: Callable[..., Any], others: dict[str, Any]) -> bool:
    """`_parts(function)` all in _SAID, as far as torch.compile can tell, which does not look into a function.

    An intersection of masks may hold a union there, such as images in packed sequences. It is asked by being called;
    and where torch.compile cannot do that, it is taken for the usual one if no model that is loaded makes others.
    """
    name = function.__name__  # the one thing that can be asked for of a top-level function and of a nested one
    if name in _SAID:
        return True
    if name != "and_mask" or others.get("use_vmap") or getattr(others.get("config"), "attention_chunk_size", None):
        return False
    if others.get("allow_is_causal_skip", True):
        return True
    at = torch.zeros(1, dtype=torch.long, device=others.get("device"))
    try:
        function(at, at, _Row(0), at)
    except _UnionFound:
        return False
    except (TypeError, AttributeError):
        return not overlays_are_made()
    return True


class _UnionFound(Exception):
    pass


class _Row(int):
    """A query's place that knows what transformers' unions and intersections of masks do with one first."""

    def new_zeros(self, *_: Any, **__: Any) -> NoReturn:
        raise _UnionFound

    def new_ones(self, *shape: Any, **said: Any) -> Tensor:
        return torch.ones(*shape, **said)

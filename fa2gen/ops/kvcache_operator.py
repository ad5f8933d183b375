"""The operators of calls over a cache: `fa2gen::decode`, and `fa2gen::decode_append`, which writes into the caches.

Registered with the others in `fa2gen.ops.library`. They have no gradients, no rule for vmap, and count as the products
over all rows of the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fa2gen.ops.forward_only import forward_only
from fa2gen.ops.kvcache import cached_cuda
from fa2gen.ops.kvcache_reference import cached_reference
from fa2gen.ops.validate import validate_options
from fa2gen.ops.validate_cache import Cached, capacity_of, validate_cached
from fa2gen.options import Options, expression_said

__all__ = ["CACHE_SCHEMAS", "cache_kernels"]

_PLACES = ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table")
_ANGLES = ("rotary_cos", "rotary_sin")
_TENSORS = {
    "decode": ("q", "k_cache", "v_cache", *_PLACES),
    "decode_append": ("q", "k_cache", "v_cache", "k", "v", *_ANGLES, *_PLACES),
}
_OPTIONS = (
    "float softmax_scale, bool causal=False, SymInt window_left=-1, SymInt window_right=-1, SymInt num_splits=0, "
    "bool rotary_interleaved=True, Tensor? s_aux=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, Tensor[]? tensors=None, "
    'str score="", str allow="", str inputs="", float[] numbers=[]'
)
_NUMBERS = ("s_aux", "k_descale", "v_descale")
_WRITTEN = {"k_cache": "Tensor(a!)", "v_cache": "Tensor(b!)"}


def _schema(name: str) -> str:
    written = _WRITTEN if name == "decode_append" else {}
    types = {x: written.get(x, "Tensor?" if x in (*_PLACES, *_ANGLES) else "Tensor") for x in _TENSORS[name]}
    tensors = ", ".join(f"{kind} {x}" for x, kind in types.items())
    return f"({tensors}, {_OPTIONS}) -> (Tensor out, Tensor lse)"


CACHE_SCHEMAS = {name: _schema(name) for name in _TENSORS}


def _called(implementation: Callable[..., Any], name: str) -> Callable[..., Any]:
    """An implementation that takes (Cached, Options, interleaved, num_splits), as the dispatcher calls it."""
    names = _TENSORS[name]

    def implemented(*arguments: Any, **named: Any) -> Any:
        said = dict(zip((*names, *_option_names()), arguments, strict=False)) | named
        tensors = tuple(said.get("tensors") or ())
        given = Cached(**{n: said[n] for n in (*names, *_NUMBERS) if n in said}, tensors=tensors)
        options = Options(
            softmax_scale=said["softmax_scale"],
            causal=said.get("causal", False),
            window_left=said.get("window_left", -1),
            window_right=said.get("window_right", -1),
            expression=expression_said(said, tensors),
        )
        return implementation(given, options, said.get("rotary_interleaved", True), said.get("num_splits", 0))

    return implemented


def _option_names() -> list[str]:
    return [part.partition("=")[0].split()[1] for part in _OPTIONS.split(", ")]


def _fake(given: Cached, options: Options, _: bool, num_splits: int) -> tuple[Tensor, Tensor]:
    validate_options(options)
    validate_cached(given, num_splits, options)
    batch, seqlen_q, num_heads, _ = given.q.shape
    lse = given.q.new_empty((batch, num_heads, seqlen_q), dtype=torch.float32)
    return given.q.new_empty(given.q.shape), lse


def _flops(name: str) -> Callable[..., int]:
    def flops(*arguments: Any, **_: Any) -> int:
        given = Cached(**dict(zip(_TENSORS[name], arguments, strict=False)))
        batch, seqlen_q, num_heads, head_dim = given.q.shape
        return int(4 * batch * num_heads * seqlen_q * capacity_of(given) * head_dim)

    return flops


def cache_kernels(name: str) -> Mapping[str, Callable[..., Any]]:
    """Dispatch key, or kind of rule -> what an operator has for it."""
    kernels = {
        "CPU": _called(cached_reference, name),
        "CUDA": _called(cached_cuda, name),
        "fake": _called(_fake, name),
        "flops": _flops(name),
    }
    instead = (
        "a cache is not built: what is mapped over is a longer batch, q.flatten(0, 1), with cache_batch_idx or "
        "block_table saying where each sequence's keys are"
    )
    return forward_only(name, kernels, instead)

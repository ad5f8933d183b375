"""The attention function: a layer's call as transformers makes it, to `flash_attn_func` or `flash_attn_varlen_func`."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from fa2gen.errors import UnsupportedProblem
from fa2gen.integrations.transformers.fallback import by_sdpa, pairs_of
from fa2gen.integrations.transformers.rows import Plan, Rows, begins_of, packed_plan, padded_plan
from fa2gen.ops import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from fa2gen.ops.arguments import NO_WINDOW
from fa2gen.ops.validate import DTYPES, validate
from fa2gen.spec import HEAD_DIM_STEP

__all__ = ["Call", "attention_by", "recorded"]

Attention: TypeAlias = Callable[..., tuple[Tensor, None]]
_OF_KVCACHE = frozenset(inspect.signature(flash_attn_with_kvcache).parameters)
_EXPAND = (
    "position_ids (1, seqlen) that begin anew are not built for a larger batch under torch.compile; give it "
    "position_ids.expand(batch, -1)"
)
_warned: set[tuple[type, str]] = set()
_calls: dict[Any, Call] | None = None  # of each module, the last; while someone records them


class Call(NamedTuple):
    """What became of a module's call: what ran ("fa2gen", "sdpa", "refused"), what was asked for, why not fa2gen."""

    runs: str
    asks: str
    why: str = ""


@contextmanager
def recorded() -> Iterator[dict[Any, Call]]:
    """The calls that are made within, by module."""
    global _calls
    before, _calls = _calls, {}
    try:
        yield _calls
    finally:
        _calls = before


@dataclass(frozen=True)
class Asked:
    """What a layer asks for beside q, k and v; window (left, right) keys, -1 no limit."""

    scaling: float | None
    causal: bool
    window: tuple[int, int] = NO_WINDOW
    dropout: float = 0.0
    softcap: float | None = None
    s_aux: Tensor | None = None
    deterministic: bool = False

    def options(self) -> dict[str, Any]:
        """For flash_attn's functions."""
        return {
            "dropout_p": self.dropout,
            "softmax_scale": self.scaling,
            "causal": self.causal,
            "window_size": self.window,
            "softcap": float(self.softcap or 0.0),
            "deterministic": self.deterministic,
            "s_aux": self.s_aux,
        }


def attention_by(fallback: str | None) -> Attention:
    """transformers' attention function by fa2gen; what it refuses by `fallback`, "sdpa", or else refused."""

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        deterministic: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """(out, None); out (batch, q, heads, value's head_dim) of query (batch, heads, q, head_dim), key and value
        (batch, heads_kv, keys, head_dim). The mask is one of `masks.mask`'s, or the model's own of four dimensions.

        sliding_window  how many keys a query sees, its own included; where not causal, so many to each side.

        Raises UnsupportedProblem where something is asked for that would be left out.
        """
        padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        if padding is not None and padding.dtype != torch.bool:
            padding = padding != 0
        causal = _causal(module, is_causal, padding)
        side = -1 if sliding_window is None else sliding_window - 1
        if deterministic is None:
            deterministic = os.environ.get("FLASH_ATTENTION_DETERMINISTIC") == "1"
        window = (side, -1 if causal else side)
        asked = Asked(scaling, causal, window, dropout, softcap, s_aux, deterministic)
        try:
            _refuse_others(query, key, others)
        except UnsupportedProblem as refusal:
            _record(module, "refused", query, key, asked, str(refusal))
            raise
        query, key, value = _in_one_dtype(module, query, key, value)
        plan = None
        if padding is not None:
            every_query = query.shape[2] == 1 or (not causal and window == NO_WINDOW)
            keys, plan = _of_padding(padding, query.shape[2], every_query)
            key, value = key[:, :, :keys], value[:, :, :keys]
            position_bias = None if position_bias is None else position_bias[..., :keys]
        elif attention_mask is None:
            plan = _of_packing(query, key, causal, position_ids, cu_seq_lens_q, cu_seq_lens_k)
        try:
            if position_bias is not None:
                raise UnsupportedProblem("an additive bias (position_bias) is not built; nearest: sdpa")
            if attention_mask is not None and padding is None:
                raise UnsupportedProblem("a mask of pairs of queries and keys is not built; nearest: sdpa")
            if plan is not None and plan.gathered is not None and window != NO_WINDOW:
                raise UnsupportedProblem("a padding mask with holes is not built beside a window; nearest: sdpa")
            out = _attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), asked, plan)
            _record(module, "fa2gen", query, key, asked)
            return out, None
        except UnsupportedProblem as refusal:
            beyond_sdpa = [name for name, x in (("softcap", softcap), ("s_aux", s_aux)) if x is not None]
            runs = "refused" if fallback is None or beyond_sdpa else fallback
            _record(module, runs, query, key, asked, str(refusal))
            if fallback is None:
                raise
            if beyond_sdpa:
                raise UnsupportedProblem(
                    f"{type(module).__name__}: {refusal}. sdpa has no {beyond_sdpa[0]} either: "
                    'attn_implementation="eager" has'
                ) from refusal
            _warn_once(module, str(refusal))
        pairs = attention_mask
        if pairs is None or padding is not None:
            pairs = pairs_of(query, key, causal, window, padding, plan)
        return by_sdpa(module, query, key, value, pairs, position_bias, causal, dropout, scaling), None

    return attention


def _attend(q: Tensor, k: Tensor, v: Tensor, asked: Asked, plan: Plan | None = None) -> Tensor:
    """out (batch, q, heads, v's head_dim) of q, k, v (batch, seqlen, heads, head_dim).

    Raises UnsupportedProblem for what fa2gen does not compute.
    """
    options = asked.options()
    if torch.compiler.is_compiling() and not torch.is_autocast_enabled(q.device.type):
        validate(q, k, v)  # in sight of torch.compile, which then sees a refusal here, and not within an operator
    if q.shape[1] == 1 and not torch.is_grad_enabled() and (plan is None or plan.spans is not None):
        try:
            return _next_token(q, k, v, options, plan)
        except UnsupportedProblem:  # of what the others may do
            pass
    if plan is None:
        out: Tensor = flash_attn_func(q, k, v, **options)
        return out
    of_query, of_key, used_q, used_k = plan.lengths
    packed = plan.rows(q, k, v)
    out = flash_attn_varlen_func(*packed, of_query, of_key, seqused_q=used_q, seqused_k=used_k, **options)
    return plan.batch(out, *q.shape[:2])


def _next_token(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], plan: Plan | None) -> Tensor:
    """`_attend` of one query each, which sees all keys that count, by kernels for that: k and v stay where they are."""
    others = {name: x for name, x in options.items() if x is not None and name not in ("dropout_p", "deterministic")}
    if options["dropout_p"] or not others.keys() <= _OF_KVCACHE or v.shape != k.shape or q.shape[-1] % HEAD_DIM_STEP:
        raise UnsupportedProblem("dropout, a narrower v and odd head dims are not built for the next token")
    if plan is None:
        out: Tensor = flash_attn_with_kvcache(q, k, v, **others)
        return out
    assert plan.spans is not None
    first, end = plan.spans
    return plan.checked(flash_attn_with_kvcache(q, k, v, cache_seqlens=end, cache_leftpad=first, **others))


# What a call says -------------------------------------------------------------------------------------------------


def _refuse_others(query: Tensor, key: Tensor, others: dict[str, Any]) -> None:
    """Raise UnsupportedProblem for what is asked for by a name that is not known here, and is about attention.

    That is a tensor of queries and keys, or numbers (heads,) or (batch, heads, ..., ...). Others pass by: transformers
    hands a model's inputs down to its attention.
    """
    heads, pairs = query.shape[1], (query.shape[2], key.shape[2])
    for name, x in others.items():
        if x is None:
            continue
        if name in ("indices", "block_indices"):
            _refuse(name, "sparse attention")
        if name == "cache":
            _refuse(name, "continuous batching, with a cache in pages,")
        if not isinstance(x, Tensor):
            continue
        if x.dim() > 2 and tuple(x.shape[-2:]) == pairs:
            _refuse(name, f"a tensor {tuple(x.shape)} of queries and keys", nearest='"eager"')
        if x.is_floating_point() and (tuple(x.shape) == (heads,) or (x.dim() == 4 and x.shape[1] == heads)):
            _refuse(name, f"a tensor {tuple(x.shape)} of heads", nearest='"eager"')
    if others.get("output_attentions") and not torch.compiler.is_compiling():
        _warn("weights of attention (output_attentions) are never in memory: eager attention has them")


def _refuse(name: str, what: str, nearest: str = '"sdpa" or "eager"') -> NoReturn:
    raise UnsupportedProblem(
        f"{what} is not built, and {name} was given; take attn_implementation={nearest} for this model"
    )


def _causal(module: Any, is_causal: bool | None, padding: Tensor | None) -> bool:
    """Whether a layer's mask is causal: what its mask was made for says it best."""
    if padding is not None and not torch.compiler.is_compiling() and (made := Rows.of(padding).causal) is not None:
        return made
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _in_one_dtype(module: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Out of fp32 where only rotations or norms are in it, and the model is not. Autocast is left to `attention`."""
    if torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = q.dtype
    if dtype == torch.float32:
        linear = (x for x in module.modules() if isinstance(x, torch.nn.Linear))
        of_model = v.dtype if v.dtype in DTYPES else getattr(next(linear, None), "weight", v).dtype
        dtype = of_model if of_model in DTYPES else dtype
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _of_padding(mask: Tensor, seqlen_q: int, every_query: bool) -> tuple[int, Plan | None]:
    """How many of the keys there are to look at, and where sequences lie among them."""
    if torch.compiler.is_compiling():
        return mask.shape[1], padded_plan(mask, seqlen_q, every_query, doubt=True)
    rows = Rows.of(mask)
    plan = rows.plan(mask, seqlen_q, every_query)
    return (rows.keys if plan is None else mask.shape[1]), plan


def _of_packing(
    query: Tensor,
    key: Tensor,
    causal: bool,
    position_ids: Tensor | None,
    of_query: Tensor | None,
    of_key: Tensor | None,
) -> Plan | None:
    """Where sequences lie that are packed: by cu_seq_lens, or by position_ids that begin anew."""
    if of_query is not None:
        return Plan((of_query.int(), (of_query if of_key is None else of_key).int(), None, None))
    batch, _, seqlen, _ = query.shape
    if position_ids is None or not causal or seqlen == 1 or seqlen != key.shape[2]:
        return None
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != seqlen:
        return None
    if torch.compiler.is_compiling():
        begins = begins_of(position_ids, gaps=True)  # transformers' mask, which would say it, is not looked into
        if position_ids.shape[0] != batch:  # made by the model for all alike, most often: not worth a break of graphs
            torch._assert_async(~begins.any(), _EXPAND)
            return None
        return packed_plan(begins) if bool(begins.any()) else None
    return Rows.of_positions(position_ids, batch).packed


def _record(module: Any, runs: str, query: Tensor, key: Tensor, asked: Asked, why: str = "") -> None:
    if _calls is None or torch.compiler.is_compiling():
        return
    heads = f"{query.shape[1]} heads" if query.shape[1] == key.shape[1] else f"{query.shape[1]}/{key.shape[1]} heads"
    asks = [f"{heads} of {query.shape[3]}", str(query.dtype).removeprefix("torch.")]
    asks += ["causal"] * asked.causal + [f"window {asked.window}"] * (asked.window != NO_WINDOW)
    asks += [f"softcap {asked.softcap}"] * bool(asked.softcap) + ["sinks"] * (asked.s_aux is not None)
    asks += [f"dropout {asked.dropout}"] * bool(asked.dropout)
    _calls[module] = Call(runs, ", ".join(asks), why)


# What fa2gen refuses ----------------------------------------------------------------------------------------------


def _warn_once(module: Any, reason: str) -> None:
    if torch.compiler.is_compiling() or (type(module), reason) in _warned:
        return
    _warned.add((type(module), reason))
    _warn(f"{type(module).__name__} runs by transformers' sdpa: {reason}")


def _warn(message: str) -> None:
    warnings.warn(f"fa2gen: {message}", stacklevel=4)

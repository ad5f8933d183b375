"""What one attention call says beside its tensors: their sizes and the options."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from fa2gen.expression import split_window
from fa2gen.spec import SAME, CacheDType, Direction, DType, Mask, Problem, anonymous, program_of, text_of

__all__ = [
    "SAID_BY_TENSORS",
    "SPLIT_KEYS",
    "UNLIMITED",
    "AnyShape",
    "CacheShape",
    "Expression",
    "Options",
    "Queries",
    "Shape",
    "expression_said",
    "split_shift",
]

UNLIMITED = -1
"""A side of a window that hides nothing."""
SPLIT_KEYS = 64
"""Over a cache, of the pieces that keys are dealt out in."""


class Shape(NamedTuple):
    """Sizes of one call, but for the head dims, which a kernel knows.

    q (batch, seqlen_q, num_heads, head_dim), k (batch, seqlen_k, num_heads_kv, head_dim); v and out likewise, with v's
    head dim. Of a ragged batch, batch is the number of sequences, seqlen_q and seqlen_k are the rows of all of them
    together: q (seqlen_q, num_heads, head_dim), k (seqlen_k, num_heads_kv, head_dim).
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_kv: int


class CacheShape(NamedTuple):
    """Sizes of one call over a cache of keys and values; its lengths lie on the device.

    q and out (batch, seqlen_q, num_heads, head_dim), or of a ragged batch (seqlen_q, num_heads, head_dim), where
    seqlen_q are the queries of all sequences, as Shape has them. Caches (entries, rows, num_heads_kv, head_dim): an
    entry is a sequence's place, or a page.

    seqlen_k      the most keys that a sequence can have: the rows of an entry, or those of all pages of a table's row.
    seqlen_new    keys of each sequence that this call has written behind its length.
    entries       of the caches.
    page_size     rows of a page; 0: no pages.
    table_rows    sequences in the table of pages, and table_stride the numbers from one to the next.
    rotary_dim    columns of Q and of the new keys that are turned, by tables of angles of rotary_rows positions.
    interleaved   whether pairs of columns that are turned are neighbours, or else half of rotary_dim apart.
    rotary_steps  whether each query has a position of its own, or else all that behind the sequence's keys.
    split_shift   -1: keys are split as keeps the device busy; s: into parts of 64 << s keys, whatever the batch.
    k_scale_batch from the scale of one sequence's 8-bit keys to the next, and k_scale_head from one head's; of values
                  v_scale_batch and v_scale_head.
    seqlen_wide   rows of each sequence's 8-bit keys that are to be written in 16 bits, and of its values.
    key_parts     of each tile's keys, where a kernel of prefill has them in parts; at most MAX_KEY_PARTS.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_kv: int
    seqlen_new: int = 0
    entries: int = 1
    page_size: int = 0
    table_rows: int = 0
    table_stride: int = 0
    split_shift: int = -1
    rotary_dim: int = 0
    rotary_rows: int = 0
    interleaved: bool = False
    rotary_steps: bool = False
    k_scale_batch: int = 0
    k_scale_head: int = 0
    v_scale_batch: int = 0
    v_scale_head: int = 0
    seqlen_wide: int = 0
    key_parts: int = 1


MAX_KEY_PARTS = 32
"""One for each lane of the warp that puts a row's parts together."""


def split_shift(num_splits: int, seqlen_k: int) -> int:
    """Of a CacheShape, where each sequence's keys are in at most num_splits parts; 0: as keeps the device busy."""
    if num_splits == 0:
        return UNLIMITED
    pieces = -(-seqlen_k // (SPLIT_KEYS * num_splits))
    return max(pieces - 1, 0).bit_length()


AnyShape: TypeAlias = Shape | CacheShape

Queries: TypeAlias = Literal["even", "uneven", "any"]
"""Of the sequences of a batch over pages: as many each, or not, which decides which kernel is the quickest; "any" asks
for one that depends on nothing of the batch, so that no row's bits do."""


SAID_BY_TENSORS = ("varlen", "sink")
"""Options that a call's tensors say: operators have no argument for them."""


class Expression(NamedTuple):
    """What a call does to scores beside its mask, as `Problem` says it, with the numbers of the call.

    numbers  the values of number_0 and so on, those of `inputs` that are no tensors, in their order.
    shapes   the sizes of those that are.
    learned  of a backward call, which of those have gradients.
    """

    score: str = ""
    allow: str = ""
    inputs: str = ""
    numbers: tuple[float, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    learned: str = ""

    @property
    def kind(self) -> tuple[str, ...]:
        """What decides which problem it makes."""
        return (*self[:3], self.learned)


def expression_said(said: Mapping[str, Any], tensors: Iterable[Any]) -> Expression | None:
    """The expression of an operator's arguments, of which some have names of its fields, and of its tensors; None where
    they say none."""
    parts = {name: said[name] for name in Expression._fields if name in said}
    parts |= {"numbers": tuple(parts.get("numbers", ())), "shapes": tuple(tuple(x.shape) for x in tensors)}
    return Expression(**parts) if parts.get("score") or parts.get("allow") else None


@functools.lru_cache(maxsize=1024)
def _split(expression: Expression, lengths: tuple[int, int] | None) -> tuple[int, int, Expression | None]:
    """(window_left, window_right, the rest) of an expression; see `fa2gen.expression.split_window`."""
    program = program_of(*expression[:3])
    numbers = program.numbers(expression.numbers)
    left, right, rest = split_window(program, numbers, lengths)
    plain = anonymous(rest)
    if not plain.score and not plain.allow:
        return left, right, None
    still = tuple(numbers[x.name] for x in rest.inputs if not x.is_tensor)
    inputs = text_of(plain.types)
    return left, right, expression._replace(score=plain.score, allow=plain.allow, inputs=inputs, numbers=still)


class Options(NamedTuple):
    """The numbers and switches of a call.

    softmax_scale  None: head_dim ** -0.5.
    causal         query i sees no key after d = i + seqlen_k - seqlen_q, whatever window_right is.
    window_left    query i sees no key before d - window_left; -1: no limit.
    window_right   query i sees no key after d + window_right; -1: no limit.
    chunk          query i sees keys of its own chunk alone, floor(j / chunk) == floor(d / chunk); 0: no chunks.
    deterministic  gradients are the same bits in every run.
    varlen         the batch is ragged: sequences of their own lengths, packed.
    sink           each softmax has a sink: the logits s_aux, one a query head, are a tensor of the call.
    expression     what becomes of scores, and which keys are seen beside the mask; None: the scores as they are.
    partial        results, out or all gradients, are fp32, not rounded: to be merged with those of other calls.
    dropout_p      an element of P is dropped with this probability, 0 <= dropout_p < 1, in steps of 2^-12; the others
                   count 1 / (1 - dropout_p) times. The random bits, rng_state, are a tensor of the call.
    """

    softmax_scale: float | None = None
    causal: bool = False
    window_left: int = UNLIMITED
    window_right: int = UNLIMITED
    chunk: int = 0
    deterministic: bool = False
    varlen: bool = False
    sink: bool = False
    expression: Expression | None = None
    dropout_p: float = 0.0
    partial: bool = False

    def scale(self, head_dim: int) -> float:
        """What scores are multiplied with."""
        return float(head_dim**-0.5) if self.softmax_scale is None else self.softmax_scale

    def reduced(self, seqlen_q: int, seqlen_k: int) -> Options:
        """The same mask over these lengths, with no limit that hides nothing, so that the plainest kernel serves it.

        Where causal, window_right is -1 then; what a window of (-1, 0) means is causal. What an expression says like a
        window becomes one: of `j <= i and document[i] == document[j]` the first, with as many queries as keys.
        """
        if self.window_left < 0 and self.window_right < 0 and not self.chunk and not self.expression:
            return self
        if self.expression and self.expression.allow:
            found = _split(self.expression, None if self.varlen else (seqlen_q, seqlen_k))
            if found[:2] != (UNLIMITED, UNLIMITED):
                return self._within(*found).reduced(seqlen_q, seqlen_k)
        left, right = self.window_left, 0 if self.causal else self.window_right
        if left >= seqlen_k - 1:  # the last query's own key is seqlen_k - 1
            left = UNLIMITED
        if right >= seqlen_q - 1 and right > 0:  # the first query's is seqlen_k - seqlen_q
            right = UNLIMITED
        # Queries stand at seqlen_k - seqlen_q to seqlen_k - 1: all in the keys' one chunk, if that begins at key 0.
        one_chunk = self.chunk >= seqlen_k and seqlen_q <= seqlen_k and not self.varlen
        chunk = 0 if one_chunk else self.chunk
        causal = right == 0
        return self._replace(causal=causal, window_left=left, window_right=UNLIMITED if causal else right, chunk=chunk)

    def _within(self, left: int, right: int, expression: Expression | None) -> Options:
        """These limits too, and another expression."""
        sides = ((self.window_left, left), (0 if self.causal else self.window_right, right))
        both = [min((limit for limit in side if limit >= 0), default=UNLIMITED) for side in sides]
        return self._replace(causal=False, window_left=both[0], window_right=both[1], expression=expression)

    @property
    def mask(self) -> Mask:
        """Which of the masks that kernels are made for shows what these options do, whatever the lengths."""
        if self.window_left < 0 and not self.chunk:
            if self.causal or self.window_right == 0:
                return "causal"
            if self.window_right < 0:
                return "full"
        return "window"

    @property
    def numbers(self) -> dict[str, int | float]:
        """What formulas of a launch name; window_right is 0 where causal."""
        right = 0 if self.causal else self.window_right
        found = {"window_left": self.window_left, "window_right": right, "chunk": self.chunk}
        return found | {"dropout_p": self.dropout_p}

    @property
    def kind(self) -> tuple[Any, ...]:
        """What of these options decides which problem they make; the others are numbers of a call."""
        expression = self.expression and self.expression.kind
        return (self.mask, self.varlen, self.sink, self.deterministic, expression, self.dropout_p > 0, self.partial)

    def problem(
        self,
        direction: Direction,
        head_dim: int,
        dtype: DType,
        head_dim_v: int | None = None,
        paged: bool = False,
        cache_dtype: CacheDType = SAME,
    ) -> Problem:
        """What a kernel for these options computes; `paged` is whether its cache is, cache_dtype what it holds."""
        return _problem(self.kind, direction, head_dim, dtype, head_dim_v, paged, cache_dtype)


@functools.lru_cache(maxsize=1024)  # to check a Problem takes 30 us
def _problem(
    kind: tuple[Any, ...],
    direction: Direction,
    head_dim: int,
    dtype: DType,
    head_dim_v: int | None,
    paged: bool,
    cache_dtype: CacheDType,
) -> Problem:
    """Of an Options' kind."""
    mask, varlen, sink, deterministic, expression, dropout, partial = kind
    score, allow, inputs, learned = expression or Expression().kind
    return Problem(
        direction=direction,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        mask=mask,
        varlen=varlen,
        sink=sink,
        dropout=dropout,
        partial=partial,
        deterministic=deterministic and direction == "bwd",
        paged=paged,
        cache_dtype=cache_dtype,
        score=score,
        allow=allow,
        inputs=inputs,
        learned=learned if direction == "bwd" else "",
    )

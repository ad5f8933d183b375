"""What is measured: points in problem space, and the presets that are lists of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import NormalDist
from typing import Any, Literal

from fa2gen.bench.workloads import WORKLOADS
from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.features import examples_of, key_range
from fa2gen.features.expression import EXAMPLE_NUMBER, shapes_of
from fa2gen.options import UNLIMITED, Expression, Options, Shape
from fa2gen.spec import SAME, CacheDType, Direction, DType, Mask, Problem, anonymous, program_of, text_of

__all__ = ["HIDDEN", "PRESETS", "TOKENS", "Point", "documents", "flops_of", "preset_points", "spec_points"]

TOKENS, HIDDEN = 16_384, 2048  # of one batch: FlashAttention-2, section 4.1
NEW_LENGTHS = 2048  # more than signatures are remembered; of one head, so that the GPU still waits
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Point:
    """One measurement: q (batch, seqlen, heads, head_dim), k and v (batch, seqlen, heads_kv, head_dim).

    lengths     of a ragged batch's sequences, of which seqlen is the longest: q (total, heads, head_dim), and k and v
                likewise. With pages they are new queries, the last ones of each sequence's `keys`: k and v are
                (batch, seqlen, heads_kv, head_dim) then, before they are laid into pages.
    head_dim_v  of v, where it is another.
    tokens      over a cache, the queries of each sequence: q (batch, tokens, heads, head_dim); seqlen are its keys.
    page_size   of the cache's pages, which lie in no order; 0: no pages.
    keys        over a cache or pages, how many each sequence has, seqlen at most; (): all have seqlen.
    cache_dtype what the cache holds.
    calls       what is called: "same", one call again and again; "new lengths", each call with another seqlen, of a
                ragged batch in two sequences, than those before it, up to this one; or "step", a forward and a backward
                pass together.
    workload    of preset flex: which score or mask, and of which inputs.
    score, allow, inputs  of a spec's expression, as `Problem` has them; what it names is made up.
    """

    preset: str
    direction: Direction
    head_dim: int
    dtype: DType
    causal: bool
    batch: int
    seqlen: int
    heads: int
    heads_kv: int
    window_left: int = UNLIMITED
    window_right: int = UNLIMITED
    deterministic: bool = False
    lengths: tuple[int, ...] = ()
    head_dim_v: int | None = None
    tokens: int = 0
    page_size: int = 0
    keys: tuple[int, ...] = ()
    cache_dtype: CacheDType = SAME
    calls: Literal["same", "new lengths", "step"] = "same"
    workload: str = ""
    score: str = ""
    allow: str = ""
    inputs: str = ""

    @property
    def shape(self) -> Shape:
        rows = sum(self.lengths) or self.seqlen
        keys = sum(self.keys) if self.lengths and self.keys else rows
        return Shape(self.batch, self.tokens or rows, keys, self.heads, self.heads_kv)

    def size(self, heads: int, head_dim: int, of_query: bool = False) -> tuple[int, ...]:
        """Of a tensor with so many heads; `of_query` is whether it has q's rows."""
        seqlen = self.tokens or self.seqlen if of_query else self.seqlen
        is_packed = self.lengths and (of_query or not self.page_size)
        return (*((sum(self.lengths),) if is_packed else (self.batch, seqlen)), heads, head_dim)

    @property
    def sequences(self) -> list[Point]:
        """Of a ragged batch, each sequence as a dense point of its own."""
        alone = replace(self, batch=1, lengths=(), keys=(), page_size=0, cache_dtype=SAME)
        if self.keys:
            return [replace(alone, tokens=n, seqlen=keys) for n, keys in zip(self.lengths, self.keys, strict=True)]
        return [replace(alone, seqlen=length) for length in self.lengths]

    @property
    def expression(self) -> Expression | None:
        """What is done to scores beside the mask."""
        cap = EXAMPLE_NUMBER
        program = program_of(self.score, self.allow, self.inputs)
        if self.workload:
            of = WORKLOADS[self.workload]
            cap, program = of.cap, anonymous(program_of(of.score, of.allow, ""))
        if not program.score and not program.allow:
            return None
        numbers = tuple(cap for x in program.inputs if not x.is_tensor)
        longest = self.shape if not self.lengths else self.shape._replace(seqlen_q=self.seqlen, seqlen_k=self.seqlen)
        return Expression(program.score, program.allow, text_of(program.types), numbers, shapes_of(program, longest))

    @property
    def options(self) -> Options:
        """Reduced: the plainest that show the same; of a spec's expression as it says."""
        whole = Options(
            causal=self.causal,
            window_left=self.window_left,
            window_right=self.window_right,
            deterministic=self.deterministic,
            varlen=bool(self.lengths),
            expression=self.expression,
        )
        return whole if self.score or self.allow else whole.reduced(self.seqlen, self.seqlen)

    @property
    def flops(self) -> float:
        """See `flops_of`; of a ragged batch the sum over its sequences."""
        if self.lengths:
            return sum(point.flops for point in self.sequences)
        if self.keys:
            return sum(replace(self, batch=1, seqlen=keys, keys=()).flops for keys in self.keys)
        if self.workload:
            seen = WORKLOADS[self.workload].seen
            whole = replace(self, workload="", causal=False)
            return whole.flops * sum(seen(b, self.seqlen) for b in range(self.batch)) / self.batch / self.seqlen**2
        return flops_of(self.problem, self.shape, self.options)

    @property
    def problem(self) -> Problem:
        """What a kernel for it computes: of many queries over 8-bit numbers, of their widened ones."""
        cache_dtype = self.cache_dtype if self.tokens else SAME
        return self.options.problem(
            self.direction, self.head_dim, self.dtype, self.head_dim_v, bool(self.page_size), cache_dtype
        )

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Point:
        """The point of a row of results, also of one that was saved before a field was known."""
        known = {item.name: row[item.name] for item in fields(cls) if item.name in row}
        return cls(**known | {name: tuple(known.get(name, ())) for name in ("lengths", "keys")})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.heads_kv else f"{self.heads}:{self.heads_kv}"
        sides = f"{self.window_left},{0 if self.causal else self.window_right}"
        window = [sides] if self.window_left >= 0 or self.window_right >= 0 else []
        if self.workload:
            words = (*replace(self, workload="").problem.words, self.workload)
            return f"{' '.join(words)} {self.batch} x {self.seqlen}, {heads} heads"
        of_calls = "" if self.calls == "same" else f", {self.calls}"
        size = f"{sum(self.lengths)} in {self.batch}" if self.lengths else f"{self.batch} x {self.seqlen}"
        if self.tokens:
            size = f"{self.batch} x {self.tokens} over {self.seqlen}"
        if self.keys:
            queries = f"{sum(self.lengths)} of {self.batch}" if self.lengths else f"{self.batch} x {self.tokens}"
            size = f"{queries} over {sum(self.keys)} in all"
        if self.page_size:
            of_kind = f"{self.cache_dtype} " if self.lengths and self.cache_dtype != SAME else ""
            size = f"{size} in {of_kind}pages of {self.page_size}"
        return f"{' '.join((*self.problem.words, *window))} {size}, {heads} heads{of_calls}"


def flops_of(problem: Problem, shape: Shape, options: Options) -> float:
    """As the FlashAttention-2 paper counts: 4 D H B for each score, 2.5 times that backward; causal half of S^2, of
    queries over more keys a triangle less than all, and a window the scores that it shows. Each product counts its own
    head dim: Q K^T, dK, dQ and, backward, S again that of Q and K, the others that of V."""
    scores = float(shape.seqlen_q) * shape.seqlen_k
    if problem.mask == "causal":
        scores -= 0.5 * shape.seqlen_q**2
    elif options.window_left >= 0 or options.window_right >= 0 or options.chunk:
        rows = range(shape.seqlen_q)
        ranges = (key_range(options, shape.seqlen_q, shape.seqlen_k, row) for row in rows)
        scores = float(sum(max(0, end - first) for first, end in ranges))
    d, dv = problem.head_dims
    depth = 3 * d + 2 * dv if problem.direction == "bwd" else d + dv
    return 2.0 * scores * depth * shape.num_heads * shape.batch


def _point(preset: str, head_dim: int, dtype: DType, causal: bool, seqlen: int, **sizes: int) -> Point:
    """A point of TOKENS tokens and hidden size HIDDEN, but for the sizes that are given."""
    heads = sizes.get("heads", HIDDEN // head_dim)
    return Point(
        preset=preset,
        direction="fwd",
        head_dim=head_dim,
        dtype=dtype,
        causal=causal,
        batch=sizes.get("batch", max(1, TOKENS // seqlen)),
        seqlen=seqlen,
        heads=heads,
        heads_kv=sizes.get("heads_kv", heads),
        window_left=sizes.get("window_left", UNLIMITED),
        head_dim_v=sizes.get("head_dim_v"),
    )


def _paper(dtype: DType) -> list[Point]:
    """The paper's figures 4 to 6, with head dim 256 beside its 64 and 128."""
    return [
        _point("paper", head_dim, dtype, causal, seqlen)
        for head_dim in (64, 128, 256)
        for causal in (False, True)
        for seqlen in (512, 1024, 2048, 4096, 8192, 16_384)
    ]


def _odd(dtype: DType) -> list[Point]:
    """Head dims that libraries round up to 64, 96, 128 or 192, and those between their grids."""
    return [
        _point("odd", head_dim, dtype, causal, 4096, batch=4)
        for causal in (False, True)
        for head_dim in (32, 40, 48, 72, 80, 96, 112, 144, 160, 176, 192)
    ]


def _gqa(dtype: DType) -> list[Point]:
    """Grouped and multi-query attention of current models, causal."""
    return [
        _point("gqa", head_dim, dtype, True, seqlen, heads=heads, heads_kv=heads_kv)
        for heads, heads_kv, head_dim, seqlen in (
            (32, 8, 128, 2048),
            (32, 8, 128, 8192),
            (64, 8, 128, 8192),
            (32, 4, 128, 2048),
            (64, 8, 64, 8192),
            (16, 2, 256, 4096),
            (32, 1, 64, 2048),
            (32, 1, 64, 8192),
        )
    ]


def _sharded(dtype: DType) -> list[Point]:
    """Few heads of one long sequence, as each of several GPUs has that share a model's heads."""
    return [
        _point("sharded", head_dim, dtype, causal, seqlen, batch=1, heads=heads)
        for head_dim in (64, 128, 256)
        for causal in (False, True)
        for heads, seqlen in ((2, 4096), (4, 4096), (2, 8192), (1, 16_384))
    ]


def _window(dtype: DType) -> list[Point]:
    """Sliding windows of current models: 1024 and 4096 keys, and gpt-oss's 128 with 64/8 heads of 64."""
    return [
        _point("window", 128, dtype, True, 16_384, batch=1, heads=16, window_left=1023),
        _point("window", 128, dtype, True, 16_384, batch=1, heads=16, window_left=4095),
        _point("window", 128, dtype, True, 8192, batch=2, heads=32, heads_kv=8, window_left=1023),
        _point("window", 64, dtype, True, 8192, batch=2, heads=64, heads_kv=8, window_left=127),
        _point("window", 256, dtype, True, 8192, batch=2, heads=8, heads_kv=4, window_left=1023),
    ]


def _ragged(
    preset: str, head_dim: int, dtype: DType, causal: bool, lengths: Sequence[int], heads: int, heads_kv: int
) -> Point:
    sizes = {"batch": len(lengths), "heads": heads, "heads_kv": heads_kv}
    return replace(_point(preset, head_dim, dtype, causal, max(lengths), **sizes), lengths=tuple(lengths))


def _log_normal(number: int, median: float) -> int:
    """One of many lengths, log-normal as those of texts of the web are; the same each time."""
    share = (number + 0.5) * GOLDEN % 1.0  # evenly spread, in no order
    return max(1, round(median * math.exp(1.2 * NormalDist().inv_cdf(share))))


def documents(total: int, longest: int, median: float = 500.0) -> list[int]:
    """Lengths of documents that are packed to `total` tokens; none above `longest`, the last one cut."""
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, longest, _log_normal(len(lengths), median)))
    return lengths


def _varlen(dtype: DType) -> list[Point]:
    """Ragged batches: six sequences of 64 to 4096 tokens, packed documents, and sequences of one length."""
    six = (4096, 64, 4096, 1984, 2048, 4096)
    return [
        _ragged("varlen", 128, dtype, True, six, 16, 16),
        *(_ragged("varlen", 128, dtype, True, documents(n, n // 4), 64, 8) for n in (4096, 8192, 16_384, 32_768)),
        *(_ragged("varlen", 128, dtype, causal, [512] * 32, 16, 16) for causal in (False, True)),
        _ragged("varlen", 128, dtype, True, [2048] * 8, 16, 16),
    ]


def _mla(dtype: DType) -> list[Point]:
    """Training of DeepSeek-V3: 128 heads of 192, whose values have 128."""
    return [
        _point("mla", 192, dtype, causal, seqlen, batch=1, heads=128, head_dim_v=128)
        for causal in (False, True)
        for seqlen in (4096, 8192)
    ]


def _decode(dtype: DType) -> list[Point]:
    """Queries over caches: batches and lengths of serving, one of them ragged; the heads of current models; more
    tokens; pages of 16 and of 1; 8-bit caches."""
    plain = replace(
        _point("decode", 128, dtype, False, 8192, batch=16, heads=32, heads_kv=8), direction="decode", tokens=1
    )

    def sized(*sizes: tuple[int, int], **fields: Any) -> list[Point]:
        return [replace(plain, batch=batch, seqlen=seqlen, **fields) for batch, seqlen in sizes]

    keys = tuple(min(32_768, _log_normal(number, 2500)) for number in range(32))
    short, long = ((1, 1024), (1, 8192), (1, 65_536)), ((16, 1024), (16, 8192), (16, 65_536))
    heads = ((128, 64, 8), (128, 32, 32), (128, 32, 2), (64, 32, 8), (64, 64, 8), (256, 32, 8), (256, 32, 2))
    return [
        *sized((128, 4096), *short, *long, (128, 1024), (128, 8192)),  # 128 x 65,536 are 34 GB
        *sized((32, max(keys)), keys=keys),
        *(replace(plain, head_dim=d, heads=h, heads_kv=hk) for d, h, hk in heads),
        *(replace(plain, causal=True, tokens=tokens) for tokens in (2, 4, 8, 16)),
        *sized((128, 4096), *long[1:2], *short[1:], page_size=16),
        *sized(*long[1:2], *short[1:2], page_size=1),
        *(
            point
            for kind in ("e4m3", "int8")
            for point in sized((128, 4096), *long[1:2], *short[1:2], cache_dtype=kind)
        ),
    ]


def _prefill(dtype: DType) -> list[Point]:
    """New queries over the pages of 32/8 heads: prompts of one length, chunks of a prompt behind what the cache has,
    and both in a batch as a server's; pages of 16, of 1, and of 16 with 8-bit numbers."""
    several = tuple(min(2048, _log_normal(number, 500)) for number in range(16))
    behind = tuple(n + min(8192, _log_normal(number + 16, 1000)) * (number % 2) for number, n in enumerate(several))

    def chunks(lengths: tuple[int, ...], keys: tuple[int, ...], page_size: int, kind: CacheDType = SAME) -> Point:
        ragged = _ragged("prefill", 128, dtype, True, lengths, 32, 8)
        return replace(ragged, seqlen=-(-max(keys) // 16) * 16, keys=keys, page_size=page_size, cache_dtype=kind)

    prompts = [((n,) * batch, (n,) * batch) for batch, n in ((16, 512), (4, 2048), (1, 8192))]
    behind_others = [((512,) * 4, (8192,) * 4), (several, behind)]
    return [
        *(chunks(*sizes, page_size) for page_size in (16, 1) for sizes in (*prompts, *behind_others)),
        *(chunks(*sizes, 16, "e4m3") for sizes in behind_others),
    ]


def _flex(dtype: DType) -> list[Point]:
    """Scores and masks of expressions: Gemma's cap, ALiBi, eight documents of random length in each batch entry, images
    whose tokens see each other within causal text."""
    return [
        replace(_point("flex", head_dim, dtype, of.causal, seqlen), workload=name)
        for name, of in WORKLOADS.items()
        for head_dim in (64, 128)
        for seqlen in (2048, 8192)
    ]


def _host(dtype: DType) -> list[Point]:
    """Problems so small that the GPU waits for the host."""
    tiny = [_point("host", head_dim, dtype, True, 128, batch=1, heads=1) for head_dim in (64, 128)]
    ragged = _ragged("host", 64, dtype, True, (32, 32, 64), 1, 1)
    return [
        *tiny,
        replace(tiny[0], seqlen=NEW_LENGTHS, calls="new lengths"),
        replace(tiny[0], calls="step"),
        ragged,
        replace(_ragged("host", 64, dtype, True, (NEW_LENGTHS,), 1, 1), calls="new lengths"),
        replace(ragged, calls="step"),
        replace(tiny[0], direction="decode", causal=False, tokens=1),
    ]


PRESETS: dict[str, Callable[[DType], list[Point]]] = {
    "paper": _paper,
    "odd": _odd,
    "gqa": _gqa,
    "sharded": _sharded,
    "window": _window,
    "varlen": _varlen,
    "mla": _mla,
    "decode": _decode,
    "prefill": _prefill,
    "flex": _flex,
    "host": _host,
}
FORWARD_ONLY = {"host", "prefill"}  # what autograd adds to a call is torch's; over pages there are no gradients


def preset_points(
    preset: str,
    dtype: DType = "bf16",
    head_dims: Sequence[int] = (),
    seqlens: Sequence[int] = (),
    direction: Direction = "fwd",
    masks: Sequence[Mask] = (),
    head_dims_v: Sequence[int] = (),
) -> list[Point]:
    """The points of a preset in one direction, narrowed to some head dims, of V too, seqlens and masks.

    Raises InvalidInput where nothing is left.
    """
    if preset not in PRESETS:
        raise InvalidInput(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    if direction != "fwd" and preset in FORWARD_ONLY:
        others = ", ".join(name for name in PRESETS if name not in FORWARD_ONLY)
        raise InvalidInput(f"preset {preset} is forward only; {direction} has {others}")
    points = PRESETS[preset](dtype)
    over_caches = all(point.tokens for point in points)
    if direction == ("bwd" if over_caches else "decode"):
        others = ", ".join(name for name in PRESETS if (name == "decode") != over_caches)
        raise InvalidInput(f"preset {preset} has no points of direction {direction}; there are those of {others}")
    points = [point if point.tokens else replace(point, direction=direction) for point in points]
    left = [
        point
        for point in points
        if (not head_dims or point.head_dim in head_dims)
        and (not seqlens or point.seqlen in seqlens)
        and (not masks or point.problem.mask in masks)
        and (not head_dims_v or point.problem.head_dims[1] in head_dims_v)
    ]
    if not left:
        raise InvalidInput(
            f"preset {preset} has no such point: its head dims are {sorted({p.head_dim for p in points})}, "
            f"its seqlens {sorted({p.seqlen for p in points})}, its masks {sorted({p.problem.mask for p in points})}"
        )
    return left


def spec_points(problems: Sequence[Problem], seqlens: Sequence[int] = ()) -> list[Point]:
    """Each problem with the typical options of its calls, at TOKENS tokens and hidden size HIDDEN.

    Without seqlens at those of the paper; of ragged batches, they are the longest of packed documents.
    """
    for name, what in (("sink", "attention sinks"), ("dropout", "dropout"), ("partial", "results in fp32")):
        if refused := next((problem for problem in problems if getattr(problem, name)), None):
            raise UnsupportedProblem(f"bench measures no {what}: {refused.text}\n  nearest        without {name}")
    over_caches = (problem for problem in problems if problem.has_expression and problem.direction == "decode")
    if refused := next(over_caches, None):
        raise UnsupportedProblem(
            f"bench measures no expressions over caches: {refused.text}\n  nearest        without score and allow"
        )
    if refused := next((problem for problem in problems if problem.paged and problem.varlen), None):
        raise UnsupportedProblem(
            f"bench measures no prefill over pages: {refused.text}\n  nearest        without paged"
        )
    if refused := next((problem for problem in problems if problem.cache_dtype != SAME), None):
        raise UnsupportedProblem(
            f"bench measures no caches of 8-bit numbers: {refused.text}\n  nearest        without cache_dtype"
        )
    points = []
    for problem, seqlen in itertools.product(
        problems, seqlens or sorted({point.seqlen for point in PRESETS["paper"]("bf16")})
    ):
        typical, heads = examples_of(problem)[0], max(1, HIDDEN // problem.head_dim)
        lengths = tuple(documents(TOKENS, seqlen)) if problem.varlen else ()
        points.append(
            Point(
                preset="specs",
                direction=problem.direction,
                head_dim=problem.head_dim,
                dtype=problem.dtype,
                causal=typical.causal,
                batch=len(lengths) or max(1, TOKENS // seqlen),
                seqlen=max(lengths, default=seqlen),
                heads=heads,
                heads_kv=heads // 4 if problem.direction == "decode" and heads % 4 == 0 else heads,
                tokens=int(problem.direction == "decode"),
                page_size=16 if problem.paged else 0,
                window_left=typical.window_left,
                window_right=typical.window_right,
                deterministic=problem.deterministic,
                lengths=lengths,
                head_dim_v=problem.head_dim_v,
                score=problem.score,
                allow=problem.allow,
                inputs=problem.inputs,
            )
        )
    return points

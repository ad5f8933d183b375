"""Default tilings: good ones for any supported problem, with no spec written by hand and nothing measured.

One table for each family of kernels. The first tiling of a row that fits the device and the plan's rules is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fa2gen.arch import ARCHES, ArchName
from fa2gen.errors import InfeasibleSpec
from fa2gen.features import features_of
from fa2gen.features.expression import scattered, score_code
from fa2gen.layout import align_up
from fa2gen.plan.base import bytes_text
from fa2gen.plan.feasible import plan_of
from fa2gen.spec import SAME, Direction, KernelSpec, Problem, Tiling

__all__ = ["default_tiling", "is_apart", "tiling_for_rows"]

Span = Literal[128, 64, 32]
Shape = tuple[int, int, int, int]  # tile_m, tile_n, num_stages, num_mma_warps


@dataclass(frozen=True)
class _Row:
    """Tilings for some problems, in order of preference.

    head_dim    the largest that they are for, of Q and K or of V and O.
    from_head_dim  the least, of the larger of the two.
    from_bytes  least shared memory of a block on the device that they are for.
    uneven      whether they are for masks whose blocks hold different amounts of work; None: for all.
    left_edge   whether they are for masks that hide keys before those that a query sees; None: for all.
    ragged      whether they are for ragged batches; None: for all.
    expression  whether they are for scores or masks of an expression; None: for all.
    lagging     tilings with dQ a step later, which come first.
    abreast     tilings with heads abreast, which come first in ragged batches.
    tensors     whether they are for expressions of tensors; None: for all.
    tables      whether they are for masks of tensors that tiles are passed by for; None: for all.
    distance    whether they are only for scores that positions change by their distance alone.
    scattered   the only scores that they are for, by the numbers that these look up (`scattered`); "": for all.
    apart       whether their problems take no tiling that was tuned for plain kernels.
    head_dims   the only pair of Q's and V's that they are for; None: for all.
    eight_bits  whether they are for caches of 8-bit numbers.
    dropout     whether they are for dropout without an expression; None: for all.
    deterministic  whether they are for gradients with one order of sums; None: for all.
    """

    head_dim: int
    shapes: tuple[Shape, ...]
    from_head_dim: int = 0
    from_bytes: int = 0
    uneven: bool | None = None
    left_edge: bool | None = None
    ragged: bool | None = None
    expression: bool | None = None
    tensors: bool | None = None
    tables: bool | None = None
    distance: bool = False
    scattered: Literal["pairs", "places", ""] = ""
    apart: bool = False
    head_dims: tuple[int, int] | None = None
    lagging: tuple[Shape, ...] = ()
    abreast: tuple[Shape, ...] = ()
    eight_bits: bool = False
    dropout: bool | None = None
    deterministic: bool | None = None


@dataclass(frozen=True)
class _Family:
    """The default tilings of one architecture's kernels for one pass: the first row that a problem meets is its own.

    spans         bytes of a panel's row, for head dims: each is tried for a shape before the next shape is.
    lazy_rescale  of all tilings.
    """

    rows: tuple[_Row, ...]
    spans: Callable[[tuple[int, int]], tuple[Span, ...]]
    lazy_rescale: Literal[0, 1] = 0

    def row(self, problem: Problem, shared_memory_limit: int) -> _Row:
        uneven = any(feature.uneven for feature in features_of(problem))
        left_edge = any(feature.left_edge for feature in features_of(problem))
        return next(
            row
            for row in self.rows
            if row.from_head_dim <= max(problem.head_dims) <= row.head_dim
            and shared_memory_limit >= row.from_bytes
            and row.uneven in (None, uneven)
            and row.left_edge in (None, left_edge)
            and row.ragged in (None, problem.varlen)
            and row.expression in (None, problem.has_expression)
            and row.tensors in (None, any(x.is_tensor for x in problem.program.inputs))
            and row.tables in (None, bool(problem.program.tile_bounds))
            and (
                not row.distance
                or (problem.program.score_tree is not None and score_code(problem.program, "fwd").of_distance)
            )
            and row.scattered in ("", scattered(problem))
            and row.head_dims in (None, problem.head_dims)
            and row.eight_bits == (problem.cache_dtype != SAME)
            and row.dropout in (None, problem.dropout and not problem.has_expression)
            and row.deterministic in (None, problem.deterministic)
        )


def _least_padding(head_dims: tuple[int, int]) -> tuple[Span, ...]:
    """The widest panels that waste no more than 64-byte ones do; 32 bytes where those would be half empty."""
    if max(head_dims) <= 16:
        return (32, 64)
    return (128,) if all(align_up(d, 64) == align_up(d, 32) for d in head_dims) else (64,)


def _widest_that_fits(_: tuple[int, int]) -> tuple[Span, ...]:
    """A narrow panel wastes less of a ragged head dim, but takes more copies."""
    return (128, 64, 32)


def _widest(_: tuple[int, int]) -> tuple[Span, ...]:
    return (128,)


# 16 rows, four warps, and as many bytes on their way as a block may have: 196 KB of an H100's 227.
_DECODING = _Family(
    (
        _Row(64, ((16, 32, 6, 4), (16, 32, 4, 4), (16, 32, 2, 4))),
        _Row(128, ((16, 32, 3, 4), (16, 32, 2, 4), (16, 16, 2, 4))),
        _Row(192, ((16, 16, 4, 4), (16, 16, 3, 4), (16, 16, 2, 4), (16, 16, 2, 2))),
        _Row(256, ((16, 16, 3, 4), (16, 16, 2, 4), (16, 16, 2, 2))),
        # Twice the warps: half the bytes a key are twice the keys in the same time.
        _Row(64, ((16, 32, 6, 8), (16, 32, 4, 8), (16, 32, 2, 8)), eight_bits=True),
        _Row(128, ((16, 32, 3, 8), (16, 32, 2, 8), (16, 32, 2, 4)), eight_bits=True),
        _Row(192, ((16, 32, 2, 8), (16, 32, 3, 4), (16, 32, 2, 4), (16, 32, 2, 2)), eight_bits=True),
        _Row(256, ((16, 32, 3, 4), (16, 32, 2, 4), (16, 32, 2, 2)), eight_bits=True),
    ),
    _least_padding,
)


# Of gradients, with dQ a step later, where the rules allow it (d = 128: 1.02 to 1.07 times the best others from 1k on;
# d = 64: 1.02 to 1.04 from 2k on, 0.97 at 512; H200).
_LAGGING: tuple[Shape, ...] = ((128, 128, 2, 8), (64, 128, 2, 8))
_WIDE_LAGGING: tuple[Shape, ...] = ((128, 128, 2, 8), (80, 128, 2, 8), (64, 128, 2, 8))
_PASSING = ((64, 96, 2, 8), (64, 80, 2, 8))  # of gradients: as many keys as the registers hold

_THREE_BY_64 = tuple((192, 64, stages, 12) for stages in (4, 3, 2))  # warpgroups, by keys
_TWO_BY_80 = ((128, 80, 3, 8), *((128, keys, 2, 8) for keys in (80, 64, 48, 32)))
_TWO_BY_96 = ((128, 96, 3, 8), (128, 96, 2, 8), *_TWO_BY_80[1:])
_OF_DOCUMENTS = (*_THREE_BY_64[1:], (128, 112, 2, 8), (128, 64, 2, 8))
_BY_128_KEYS = ((64, 128, 2, 8), (64, 128, 1, 8), (64, 64, 2, 8), (64, 64, 1, 8), (32, 32, 1, 4))
_FAMILIES: dict[tuple[ArchName, Direction], _Family] = {
    ("sm80", "decode"): _DECODING,
    ("sm90", "decode"): _DECODING,
    # Two blocks of 4 warps share an SM wherever registers allow it: 32 rows a warp up to head dim 160, since each
    # fragment of K and V that a warp loads should serve two products (the time is then set by the products, not by
    # ldmatrix). All compile without a spill, for sm_80 and sm_90, with every mask and dtype. What comes later in a row
    # is for devices with less shared memory, the last for any.
    ("sm80", "fwd"): _Family(
        (
            # Full masks on an SM with room for another stage (H100), of the rows below, 512 to 16k: 64 1.010 to 1.025,
            # 128 1.009 to 1.042. At 48, 80, 96 and 120 0.99 to 1.00; ragged 0.99 and 0.95. Causal 1.00, but with lazy
            # rescale 64 keys spill 4 bytes there at 104 and 128 (sm_90); 2k, 8k 1.005, 1.02, 512 0.98.
            *(
                _Row(
                    d,
                    (shape,),
                    head_dims=(d, d),
                    uneven=uneven,
                    left_edge=False,
                    ragged=False,
                    expression=False,
                    dropout=False,
                    from_bytes=200 << 10,
                )
                for d, shape, uneven in (
                    (64, (128, 64, 3, 4), False),
                    (104, (128, 48, 2, 4), True),
                    (128, (128, 48, 2, 4), None),
                )
            ),
            # With a bias 32 rows a warp spill 14 registers at 64.
            _Row(160, ((128, 64, 1, 8), (64, 64, 1, 4), (64, 32, 1, 4)), tensors=True),
            _Row(96, ((128, 64, 2, 4), (128, 64, 1, 4), (64, 32, 1, 4))),
            _Row(112, ((128, 64, 1, 4), (64, 32, 1, 4)), left_edge=False),
            # With a cap 32 rows a warp spill from 120 on: 8 registers of 64 keys, 4 of 48.
            _Row(160, ((128, 64, 1, 8), (64, 64, 1, 4), (64, 32, 1, 4)), expression=True),
            _Row(
                120, ((128, 48, 2, 4), (128, 48, 1, 4), (128, 64, 1, 8), (64, 32, 1, 4))
            ),  # 64 keys spill 4 registers (causal) or 2 (at 112, windows)
            _Row(128, ((128, 64, 1, 4), (128, 64, 1, 8), (64, 32, 1, 4))),  # 8 warps: with random bits
            _Row(152, ((128, 32, 1, 4), (64, 32, 1, 4))),
            _Row(160, ((128, 32, 1, 4), (64, 32, 1, 4)), left_edge=False),
            # 32 rows a warp spill on sm_90: 7 registers at 160 with a window, 4 at 176.
            _Row(224, ((128, 64, 1, 8), (64, 64, 1, 4), (64, 32, 1, 4))),
            # Where an SM has room for two blocks of 64 rows (H100, H200), FlashAttention-2 prefers them.
            _Row(256, ((64, 64, 1, 4), (128, 64, 1, 8), (64, 32, 1, 4)), from_bytes=200 << 10),
            _Row(256, ((128, 64, 1, 8), (64, 64, 1, 4), (64, 32, 1, 4))),
        ),
        _least_padding,
        lazy_rescale=1,
    ),
    # The most queries and keys whose accumulators fit eight warps.
    ("sm80", "bwd"): _Family(
        (
            # Where an SM has room for two blocks of 4 warps, each with keys of its own (H100): 64 1.10, causal 1.06
            # times the row below, grouped heads 1.02 to 1.06, 32, 48 1.10 to 1.17; deterministic 1.00, causal 0.90.
            *(
                _Row(
                    d,
                    ((32, 128, 2, 4), (128, 128, 2, 8)),
                    head_dims=(d, d),
                    left_edge=False,
                    ragged=False,
                    expression=False,
                    dropout=False,
                    deterministic=False,
                    from_bytes=200 << 10,
                )
                for d in (32, 48, 64)
            ),
            _Row(64, ((128, 128, 2, 8), (64, 128, 2, 8), (32, 32, 1, 4))),
            _Row(
                80, ((64, 128, 1, 8), (64, 64, 2, 8), (64, 64, 1, 8), (32, 32, 1, 4)), expression=True
            ),  # 2: spills, sm_90
            _Row(112, _BY_128_KEYS),
            _Row(128, _BY_128_KEYS, abreast=_BY_128_KEYS[:1]),  # else 8 bytes spill, of where a head's walk ends
            # Two stages of 256, 214,016 bytes, where a block may have as many (Hopper).
            _Row(
                256,
                ((64, 64, 2, 8), (64, 64, 1, 8)),
                head_dims=(256, 256),
                left_edge=False,
                ragged=False,
                expression=False,
                dropout=False,
                from_bytes=214_016,
            ),
            _Row(256, ((64, 64, 2, 8), (64, 64, 1, 8), (32, 64, 1, 8), (32, 32, 1, 4))),
        ),
        _least_padding,
    ),
    # Three warpgroups where their 160 registers hold 64 keys or more, else two: what `fa2gen tune` found on an H200. A
    # third hides more of the softmax and reads K and V once for 192 rows (d = 128 at 8k: 1.08x two warpgroups). With
    # three, as many keys a block as the registers hold; with two, few enough that O has a place beside Q's.
    ("sm90", "fwd"): _Family(
        (
            # 1.01 times 80 keys, which fit, at 8k (784 full and 737 causal); 1.04 times (128, 128, 2, 8) (H100).
            _Row(192, ((192, 64, 2, 12), (128, 64, 2, 8), (128, 48, 2, 8)), head_dims=(192, 128), left_edge=False),
            # Scattered numbers, of each element, take registers: tilings that spill none, but for a bias within a cap
            # from 80 to 96 (times those of plain kernels, 2k and 8k, H100: a dense bias at 64 causal 1.25, 1.38, full
            # 1.22, 1.23, 128 0.95, 1.27, 1.19, 1.20; T5's buckets, causal, 64 1.00, 1.02, 96 1.04, 1.02, 128 1.03,
            # 1.12, but full 0.98, 1.01 and 0.97, 1.00, causal at 40 0.95, 0.98; both at 104 0.97 to 1.00).
            _Row(96, _THREE_BY_64, scattered="pairs", apart=True),
            _Row(96, _THREE_BY_64, from_head_dim=64, uneven=True, scattered="places", apart=True),
            _Row(112, _TWO_BY_80, from_head_dim=112, scattered="pairs", apart=True),
            _Row(112, _TWO_BY_80, from_head_dim=112, uneven=True, scattered="places", apart=True),
            _Row(128, _TWO_BY_96, from_head_dim=112, scattered="pairs", apart=True),
            _Row(128, _TWO_BY_96, from_head_dim=112, uneven=True, scattered="places", apart=True),
            # Documents: the blocks at their edges need a mask, so that short ones waste less (d = 128, 8k: 0.76 of a
            # ragged batch's speed with 64 keys, 0.70 with 80; images the same; at 96 1.07 and 1.12 times the tiling of
            # plain kernels, at 64 and 72 that is the faster; H100).
            _Row(64, ((192, 96, 4, 12), (192, 80, 4, 12), (192, 64, 4, 12)), tables=True),
            _Row(72, _OF_DOCUMENTS, tables=True),
            _Row(96, (_THREE_BY_64[0], *_OF_DOCUMENTS), tables=True, apart=True),
            _Row(128, _OF_DOCUMENTS, tables=True),
            _Row(160, tuple((128, keys, 2, 8) for keys in (112, 96, 80, 64)), tables=True),
            # One warpgroup: a bias in a window, whose keys are passed by.
            _Row(256, (*((128, keys, 2, 8) for keys in (64, 48, 32)), (64, 48, 2, 4)), tables=True),
            # Random bits are drawn beside the exponentials, which takes registers: two warpgroups have more, above head
            # dim 64 (8k, full: 128 1.08 to 1.11 times (192, 64, 2, 12); 64 0.94 times three, causal 0.94; H100).
            _Row(64, ((192, 128, 4, 12),), dropout=True, left_edge=False),
            _Row(64, ((128, 128, 4, 8),), dropout=True),
            _Row(128, ((128, 128, 2, 8),), dropout=True, left_edge=False),
            # 112: a window of scores of an expression; 96: with random bits too
            _Row(64, ((192, 128, 4, 12), (192, 112, 4, 12), (192, 96, 4, 12))),
            # Where most of a long row is too faint to count, blocks have less to do, and short ones waste less (ALiBi,
            # d = 128: 0.94 of plain at 8k, 0.98 at 2k; with 80 keys 0.92, 0.92; H100).
            _Row(128, (*((192, 64, stages, 12) for stages in (3, 2)), (128, 64, 2, 8)), distance=True),
            # Windows: each warpgroup visits few blocks of keys, so that short ones waste less at the window's two ends,
            # and copies further ahead hide more of a walk's start (128, 1023 of 16k: 1.10 times (192, 80, 2, 12); 256:
            # 1.05 times 80 keys; H100). At 64 exponentials bind as ever: 1.03 times (256, 64, 4, 16), window 127.
            _Row(
                256,
                (*((192, 64, stages, 12) for stages in (4, 3, 2)), *((128, keys, 2, 8) for keys in (64, 48, 32))),
                left_edge=True,
            ),
            _Row(
                256,
                (
                    *((192, keys, 2, 12) for keys in (128, 112, 96, 80, 64)),
                    *((128, keys, 2, 8) for keys in (80, 64, 48, 32)),  # 32: random bits beside tensors
                ),
            ),
        ),
        _widest_that_fits,
        lazy_rescale=1,
    ),
    # Two warpgroups of 64 keys each where dK and dV of 64 keys fit one's registers, with as many queries as fit: the
    # operand reads of S, dP and dQ, which limit it, cost the less an element the more there are. Beyond head dim 160
    # one warpgroup holds dV, the other dK, and P passes between them; by products only where it can not. With causal
    # masks 64 queries a block above head dim 64, as the diagonal wastes half of its blocks (d = 128: 1.04x 80 queries
    # at 2k, but 0.97x at 8k, H200).
    ("sm90", "bwd"): _Family(
        (
            # With scores 128 queries do not fit, and with 64 keys both warpgroups compute them (a cap, 8k causal: 0.84
            # of plain with 112 queries, 0.78 with 64, 0.53 with 64 x 64; H100).
            _Row(
                64,
                (*((queries, 128, 2, 8) for queries in (128, 112, 96, 80, 64)), (64, 64, 2, 8)),
                expression=True,
                lagging=_LAGGING[:1],
            ),
            _Row(
                256,
                ((128, 128, 2, 8), (64, 128, 2, 8), (48, 128, 2, 8), *_PASSING, (64, 64, 2, 8)),
                uneven=True,
                lagging=_LAGGING,
            ),
            # 1.02 times 48 x 128 at 8k; with a causal mask 1.00, and 0.96 at 2k (H100).
            _Row(192, (*_PASSING[:1], (48, 128, 2, 8), (64, 64, 2, 8)), head_dims=(192, 128)),
            # With dQ a step later 80 queries are 1.02 times 64 at 112; up to 104 64 leave room for V in registers, and
            # with blocks of keys in turn are 1.02 times 80 at 72, 1.03 at 80 (4k, H100).
            *(
                _Row(
                    head_dim,
                    ((128, 128, 2, 8), (80, 128, 2, 8), (64, 128, 2, 8), (48, 128, 2, 8), *_PASSING, (64, 64, 2, 8)),
                    lagging=lagging,
                )
                for head_dim, lagging in ((104, _LAGGING), (112, _WIDE_LAGGING), (256, _LAGGING))
            ),
        ),
        _widest,
    ),
}


def is_apart(problem: Problem, arch: ArchName) -> bool:
    """Whether a problem takes no tiling that was tuned for plain kernels, as they have not the registers for it."""
    return _FAMILIES[arch, problem.direction].row(problem, ARCHES[arch].shared_memory_per_block).apart


def default_tiling(problem: Problem, arch: ArchName, shared_memory_limit: int | None = None) -> Tiling:
    """The best tiling known for a problem without measuring.

    shared_memory_limit  bytes that one block may have on the device: 166,912 on 8.0, 101,376 on 8.6 and 8.9, 232,448
                         on 9.0; None: what the architecture has.

    Raises InfeasibleSpec where not even the last, the smallest, fits the limit or keeps the kernel's rules.
    """
    limit = shared_memory_limit or ARCHES[arch].shared_memory_per_block
    family = _FAMILIES[arch, problem.direction]
    row = family.row(problem, limit)
    # Masks have lag: documents at 8k 0.908 of a ragged batch, 0.875 without, at 2k 0.96, 0.97, images of plain 0.878,
    # 0.874 and 0.838, 0.83 (d = 128; documents in 8k at 72 to 112 1.01 to 1.03 times, 2k 0.99; H100). Beside a score
    # that was not measured. Of scores a cap 0.88 of plain with lag, 0.83 without (d = 128, 8k, H200), ALiBi 1.01 to
    # 1.10 times, 2k and 8k (H100); those that look tensors up at positions were not measured, and a head's cap that
    # learns spills with it.
    program = problem.program
    of_positions = any({*x.axes} - {"b", "h", "hk"} for x in program.inputs if x.is_tensor)
    looks_up = problem.learned or (program.score_tree is not None and (problem.allow or of_positions))
    lagging = () if looks_up and problem.head_dim > 64 else row.lagging
    if problem.allow and problem.head_dim <= 64 and (problem.varlen or problem.mask == "window"):
        lagging = ()  # documents, 2k, 8k: 0.97, 0.99 in a window, 0.97, 1.00 ragged, grouped 1.03, 1.025 (H100)
    ways: tuple[tuple[tuple[Shape, ...], dict[str, Any]], ...] = (
        (row.abreast if problem.varlen else (), {"heads_abreast": 1}),
        (lagging, {"lag": 1}),
        (row.shapes, {}),
    )
    for (tile_m, tile_n, stages, warps), way in ((shape, way) for shapes, way in ways for shape in shapes):
        for span in family.spans(problem.head_dims):
            tiling = Tiling(
                arch=arch,
                tile_m=tile_m,
                tile_n=tile_n,
                num_stages=stages,
                num_mma_warps=warps,
                swizzle_bytes=span,
                lazy_rescale=family.lazy_rescale,
                **way,
            )
            found = plan_of(KernelSpec(problem=problem, tiling=tiling))
            if found.shared_memory_bytes <= limit and not found.broken_rules():
                return tiling
    if found.shared_memory_bytes <= limit and (broken := found.broken_rules()):
        reasons = "".join(f"\n  {rule.rule:<14} {rule.detail}" for rule in broken)
        raise InfeasibleSpec(f"no {arch} kernel for {problem.text}:{reasons}")
    of_gradients = "the gradients of " if problem.direction == "bwd" else ""
    raise InfeasibleSpec(
        f"no tiling for {of_gradients}{problem.head_dims_text} fits {arch} with {bytes_text(limit)} of "
        f"shared memory\n  nearest        {bytes_text(found.shared_memory_bytes)} (tile_m {tile_m}, tile_n {tile_n}, "
        f"num_stages {stages})"
    )


_WIDE_ROWS = 32
"""Of a decoding kernel's tile: as many as serve a fragment of K or V at once and leave registers for it."""
_LEAST_STAGES, _MOST_STAGES = 2, 6


def tiling_for_rows(problem: Problem, tiling: Tiling, rows: int, shared_memory_limit: int) -> Tiling:
    """A decoding kernel's tiling, wider where a sequence has more rows than it holds, so that K and V are read once for
    all of them; itself where no wider one fits."""
    if rows <= tiling.tile_m or tiling.tile_m >= _WIDE_ROWS:
        return tiling
    # Twice the warps where registers allow: each has twice the products of a tile of 16 rows.
    for warps, tile_n in itertools.product((8, tiling.num_mma_warps), dict.fromkeys((tiling.tile_n, 16))):
        per_warp = tiling.num_stages * tiling.tile_n * tiling.num_mma_warps // (warps * tile_n)
        changes = {"tile_m": _WIDE_ROWS, "tile_n": tile_n, "num_mma_warps": warps}
        wide = tiling.model_copy(update={**changes, "num_stages": min(per_warp, _MOST_STAGES)})
        if wide.num_stages < _LEAST_STAGES:
            continue
        found = plan_of(KernelSpec(problem=problem, tiling=wide))
        if found.shared_memory_bytes <= shared_memory_limit and not found.broken_rules():
            return wide
    return tiling

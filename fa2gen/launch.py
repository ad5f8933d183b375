"""Launch facts of one call: grids, `Params` values and scratch memory, from a plan, sizes and options.

Pure integers, for GPU and CPU alike. The formulas are those that a render tells whoever launches it without this
package, and that its launcher in C++ has: fa2gen/plan/recipe.py, made functions of Python here, once a plan.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from fa2gen.arch import ArchName
from fa2gen.errors import InvalidInput
from fa2gen.features import MASKS
from fa2gen.layout import CHUNK_BYTES, ELEMENT_BYTES, NUMBER_BYTES, ceil_div
from fa2gen.options import MAX_KEY_PARTS, AnyShape, CacheShape, Options, Shape
from fa2gen.plan import KernelPlan, fits, make_plan, recipe
from fa2gen.spec import KernelSpec

__all__ = [
    "MAX_GRID_YZ",
    "MAX_SEQLEN",
    "MAX_STRIDE_BYTES",
    "RAGGED_ROWS",
    "TILES_OF_FEW",
    "Launch",
    "for_few_queries",
    "heads_per_section",
    "launch_of",
    "launches_of",
    "map_numbers_of",
    "page_strides",
    "pages_apart",
    "pages_refusal",
    "ragged_dimensions",
    "reads_pages_quickly",
    "row_by_row",
    "suits_decoding",
    "value_names",
    "with_packed_heads",
]


RAGGED_ROWS = 1 << 30  # as in templates/ptx/tma.cuh.j2
TMA_ALIGNMENT = 128  # of a box in shared memory
# Of packed keys' time (8k causal; 16 chunks of 512 queries over 4k keys; 128 columns, H100) pages of 8 rows took 1.04
# and 1.04 in boxes, 1.27 and 1.15 row by row; of 4 rows 1.16 and 1.19, and 1.27 and 1.15.
QUICK_BOX_ROWS = 8
PACKED_GROUPS = (1, 2, 4, 8, 16)  # 16 rows of a warp are whole queries of so many heads
# How many of the rounds of tiles packed heads may leave: 11 of 12 took 0.955 of the time, 3 of 4 0.98, 5 of 8 0.78, as
# many 1.00 to 1.03 (pages of 16, H100).
PACKED_ROUNDS = 0.95
PREFILL_ROWS = 128  # of a tile, the least by which prefill is counted
# That kernels of decoding have at once. Of more, kernels of prefill with keys in parts are the quicker ones.
# Microseconds of decoding, of prefill, 8k keys, sequences x queries, 32 heads of 128 over 8, H100: 1 x 8 30 and 28, 4 x
# 8 65 and 65, 16 x 8 193 and 193, 1 x 16 33 and 27, 4 x 16 77 and 66, 1 x 64 55 and 36, 2 x 64 92 and 51.
DECODING_ROWS = 32
# Where keys are not in parts, kernels of prefill are the quicker ones on SM90 from so many rows of an item (a
# sequence's queries and the heads that share K and V), and 40, times items, times head dim, and 24, on, a
# multiprocessor and round of prefill's tiles; and of more rows than decoding reads keys for at once. Microseconds of
# decoding, of prefill, 8k keys, sequences x queries, H100: 32 heads of 128 over 8, 1 x 64 54 and 76, 1 x 96 90 and 76,
# 2 x 32 65 and 78, 2 x 64 90 and 79, 4 x 16 83 and 84, 4 x 32 104 and 84, 8 x 12 140 and 119; heads of 64, 4 x 32 58
# and 67, 4 x 48 77 and 67, 8 x 16 78 and 73; 16 heads of 256 over 4, 1 x 64 82 and 104, 1 x 128 125 and 103, 4 x 16 95
# and 110, 4 x 32 147 and 110. By SM80 kernels rows times items alone count: of head dim 128, 64 rows of 128 items took
# 215 and 913, 256 rows 812 and 943, 2048 rows of 16 items 830 and 464 (H200).
PREFILL_PAYS, SM80_PREFILL_PAYS = 4350, 72
# Keys of a sequence times rounds of prefill's tiles, from which few sequences' queries are worth laying out anew for
# decoding, how many multiprocessors a head of K and V must have in each round, and what PREFILL_PAYS is for them.
# Microseconds of 1, 2, 4 and 8 sequences of 2 queries, 32 heads of 128 over 8, in a graph (H100): 4k keys by decoding
# 52, 70, 85, 110, by prefill 47, 49, 56, 70; 32k keys 108, 157, 244, 419 and 293, 288, 296, 412.
LAID_OUT_KEYS, LAID_OUT_SMS, LAID_OUT_PAYS = 8192, 4, 4000
MAX_GRID_YZ = 65_535
MAX_SEQLEN = 2**31 - 512  # a kernel rounds lengths up to whole tiles, in 32 bits
MAX_STRIDE_BYTES = 2**40 - 1  # of a tensor map


class Launch(NamedTuple):
    """What to launch, and what memory it needs beside its operands.

    grids    blocks of each of the plan's entry points, which run one after the other.
    values   every field of Params that sizes and options decide (addresses and strides are not among them).
    scratch  4-byte numbers of each of the plan's scratch memories, in their order.
    """

    grids: tuple[tuple[int, int, int], ...]
    values: Mapping[str, Any]
    scratch: Mapping[str, int]


LaunchOf: TypeAlias = Callable[[AnyShape, Options, int], tuple[Any, ...]]
"""(shape, options, num_sms) -> grids, values, scratch, as `launch_of` says, in tuples, and whether a device takes such
grids."""
MapNumbersOf: TypeAlias = Callable[
    [AnyShape, Mapping[str, Sequence[int]], Mapping[str, Any]], tuple[tuple[int, ...], bool]
]
"""(shape, strides, values) -> the numbers of all tensor maps, one behind the other, and whether maps can hold them; the
values are looked at for what a box follows from."""


def launch_of(plan: KernelPlan, shape: AnyShape, options: Options, num_sms: int) -> Launch:
    """Grids, Params and scratch of a kernel.

    num_sms is the device's number of multiprocessors: persistent kernels take one block on each. Raises InvalidInput
    for options with another mask than the plan's and for groups that its parts do not divide, OverflowError where a
    count does not fit 32-bit integers.
    """
    grids, values, scratch, _ = launches_of(plan)(shape, options, num_sms)
    names = [memory.name for memory in plan.scratch]
    return Launch(grids, dict(zip(value_names(plan), values, strict=True)), dict(zip(names, scratch, strict=True)))


def value_names(plan: KernelPlan) -> list[str]:
    """The fields of Params that sizes and options decide, in their order."""
    return [param.name for param in plan.params if not param.is_address and not param.name.endswith("_stride")]


@functools.lru_cache(maxsize=1024)
def launches_of(plan: KernelPlan) -> LaunchOf:
    """`launch_of` of a plan, for whoever asks often: to look a plan up takes a quarter of what a launch does, and to
    name its values as much."""
    mask, is_general, head_dim = plan.mask, MASKS[plan.mask].general, plan.head_dim
    parts = plan.tiling.group_parts
    packs_heads = plan.packs_heads
    found, is_given_more = _launch_function(plan)
    more = [feature.given for feature in plan.features]
    latest: tuple[Any, ...] = (None,)  # options, their scale and numbers: other lengths come with the same

    def numbers_of(options: Options) -> tuple[Options, float, dict[str, Any]]:
        if not is_general and options.mask != mask:
            raise InvalidInput(f"{plan.name} has a {mask} mask, and {options} ask for a {options.mask} one")
        given: dict[str, Any] = {}
        if is_given_more:
            given |= options.numbers
            for given_by in more:
                given |= given_by(options)
        return options, options.scale(head_dim), given

    def launch_of_plan(shape: AnyShape, options: Options, num_sms: int) -> tuple[Any, ...]:
        nonlocal latest
        if (known := latest)[0] is not options:
            known = latest = numbers_of(options)
        _, scale, given = known
        if parts > 1 and (group := shape.num_heads // shape.num_heads_kv) % parts:
            raise InvalidInput(f"{plan.name} has groups in {parts} parts, which do not divide groups of {group} heads")
        if packs_heads:
            group = shape.num_heads // shape.num_heads_kv
            if group not in PACKED_GROUPS:
                raise InvalidInput(f"{plan.name} has rows of groups of 1, 2, 4, 8 or 16 heads, not of {group}")
            given = {**given, "group": group}
            shape = shape._replace(seqlen_q=shape.seqlen_q * group, num_heads=shape.num_heads_kv)
        asked = (shape, scale, num_sms, given)
        launch: tuple[Any, ...] = found(*asked)
        if not launch[3]:
            limited = recipe.limits(plan)
            counts_of, _ = _function(recipe.sizes(plan), _tuple(map(_in_python, limited.values())), _ARGUMENTS)
            for what, count in zip(limited, counts_of(*asked), strict=True):
                if count >= 2**31:
                    raise OverflowError(f"{count:,} {what} exceed 2^31")
        return launch

    return launch_of_plan


def map_numbers_of(plan: KernelPlan) -> MapNumbersOf:
    """What of a plan's tensor maps, in the order of its entry points', sizes and strides decide.

    Of each: its sizes, innermost first, the steps in bytes of all dimensions but that, and what a box follows from.
    """
    maps = recipe.maps(plan)
    body, steps, of_map = [f"{', '.join(Shape._fields)} = shape[:{len(Shape._fields)}]"], [], {}
    for operand in (x for x in plan.operands if x.name in {tensor_map.name for tensor_map in maps}):
        name, row_bytes = operand.name, operand.head_dim(plan.problem) * ELEMENT_BYTES
        body.append(f"{name}_batch, {name}_row, {name}_head = strides[{name!r}]")
        # A dimension of one element may have any stride in torch, not in a tensor map; that from one row to the next
        # leads from page to page too.
        rows, heads = ("seqlen_k", "num_heads_kv") if operand.of == "key" else ("seqlen_q", "num_heads")
        dimensions = {"row": rows, "head": heads, "batch": "1" if plan.varlen else "batch"}
        for step, size in dimensions.items():
            bytes_of = f"{name}_{step} * {ELEMENT_BYTES}"
            of_pages = plan.paged and operand.of == "key" and step == "row"
            body.append(f"{name}_{step} = {bytes_of if of_pages else f'{bytes_of} if {size} > 1 else {row_bytes}'}")
            steps.append(f"{name}_{step}")
        found = f"{rows}, {heads}, batch, {name}_row, {name}_head, {name}_batch"
        if plan.varlen:
            found = f"*ragged({heads}, {name}_row, {name}_head, {plan.packs_heads and operand.of != 'key'})"
        of_map[name] = f"{operand.head_dim(plan.problem)}, {found}"
    of_box = {(True, False): "values['box_rows'], ", (False, True): "values['group'], ", (False, False): ""}
    numbers = (f"{of_map[found.name]}, {of_box[found.of_pages, found.of_groups]}" for found in maps)
    space: dict[str, Any] = {"ragged": lambda *sizes: itertools.chain(*ragged_dimensions(*sizes))}
    # All bits of that are 1, so that one comparison says whether some step has a higher one.
    body.append(f"return ({''.join(numbers)}), ({' | '.join(steps) or 0}) <= {MAX_STRIDE_BYTES}")
    exec("\n    ".join(["def function(shape, strides, values):", *body]), space)
    function: MapNumbersOf = space["function"]
    return function


def heads_per_section(plan: KernelPlan, shape: AnyShape) -> int:
    """How many neighbouring (batch, head) pairs are walked together, so that what they read stays in L2: of gradients,
    heads of K and V with their groups in one part."""
    return int(_section_function(plan)(shape)) // plan.tiling.group_parts


# Formulas as functions -----------------------------------------------------------------------------------------------


def _limited(value: int, limit: int) -> int:
    """As the comment in renders says."""
    return limit if value < 0 else min(value, limit)


_CALLED = {"min": min, "max": max, "gcd": math.gcd, "limited": _limited, "lround": lambda x: math.floor(x + 0.5)}


_ARGUMENTS = ("shape", "softmax_scale", "num_sms", "given")


def _launch_function(plan: KernelPlan) -> tuple[Callable[..., tuple[Any, ...]], bool]:
    """(shape, softmax_scale, num_sms, given) -> what a `LaunchOf` gives, whose last is whether kernels can count in 32
    bits, too; and whether anything is looked up in `given`, the numbers of options."""
    formulas = recipe.of_features(plan) | recipe.reals(plan)
    reals = {param.name for param in plan.params if param.ctype == "float"}
    values = _tuple(_in_python(formulas.get(name, name), real=name in reals) for name in value_names(plan))
    grids = [[_in_python(size) for size in recipe.grid(plan, entry)] for entry in plan.entry_points]
    scratch = _tuple(map(_in_python, recipe.memory(plan).values()))
    conditions = [f"{_in_python(text)} < {2**31}" for text in recipe.limits(plan).values()]
    conditions += [f"{name} <= {MAX_SEQLEN}" for name in ("seqlen_q", "seqlen_k")]
    conditions += [f"{size} <= {MAX_GRID_YZ}" for _, *yz in grids for size in yz if size != "1"]
    result = _tuple((_tuple(map(_tuple, grids)), values, scratch, " and ".join(dict.fromkeys(conditions))))
    return _function(recipe.sizes(plan), result, _ARGUMENTS)


@functools.lru_cache(maxsize=1024)
def _section_function(plan: KernelPlan) -> Callable[..., Any]:
    """Of a shape."""
    return _function(recipe.section(plan), "heads_per_section", ("shape",))[0]


def _function(sizes: Mapping[str, str], result: str, arguments: Sequence[str]) -> tuple[Callable[..., Any], bool]:
    """A function of these arguments, and whether it reads the last, which has what the formulas name beside a shape's
    sizes and the other arguments, and do not make themselves."""
    body = [*(f"{name} = {_in_python(text)}" for name, text in sizes.items()), f"return {result}"]
    names = {node.id for node in ast.walk(ast.parse("\n".join(body))) if isinstance(node, ast.Name)}
    names -= {*sizes, *_CALLED, *arguments}
    of_shape = sorted(names.intersection(CacheShape._fields))  # Shape's are among them
    others = sorted(names.difference(of_shape))
    read = [f"{name} = shape.{name}" for name in of_shape] + [f"{name} = {arguments[-1]}[{name!r}]" for name in others]
    space: dict[str, Any] = dict(_CALLED)
    exec("\n    ".join([f"def function({', '.join(arguments)}):", *read, *body]), space)
    return space["function"], bool(others)


def _in_python(formula: str, real: bool = False) -> str:
    """C++'s `/` of whole numbers that are not negative is Python's `//`."""
    return formula if real else formula.replace("/", "//")


def _tuple(items: Iterable[str]) -> str:
    return f"({''.join(f'{item}, ' for item in items)})"


def ragged_dimensions(
    heads: int, row_bytes: int, head_bytes: int, heads_first: bool = False
) -> tuple[tuple[int, ...], list[int]]:
    """Sizes and steps in bytes of a ragged batch's tensor map, beside its columns: (rows, heads, round, rows again).

    Rows end at RAGGED_ROWS, where a kernel puts the last row of a sequence, so that TMA clips what is behind it. The
    third leads from there round 2^64 bytes, and the fourth from the tensor's first row to the end of the sequence:
    RAGGED_ROWS * row + RAGGED_ROWS * (2^34 - row) = 2^64.
    """
    inner = [(RAGGED_ROWS, row_bytes), (heads, head_bytes)]
    sizes, steps = zip(*(reversed(inner) if heads_first else inner), strict=True)
    return (*sizes, 2 * RAGGED_ROWS, 2 * RAGGED_ROWS), [*steps, 2**64 // RAGGED_ROWS - row_bytes, row_bytes]


def page_strides(shape: CacheShape, strides: Sequence[int]) -> tuple[int, int, int]:
    """Of a tensor (pages, page_size, heads, head_dim), from one page, one row, one head to the next: a dimension of one
    element has the stride that it would have if there were more."""
    page_step, row_step, head_step = strides
    row_step = page_step if shape.page_size == 1 else row_step
    return shape.page_size * row_step if shape.entries == 1 else page_step, row_step, head_step


def pages_apart(plan: KernelPlan, strides: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Numbers of Params that follow from strides (as `page_strides` gives them), where TMA reads pages."""
    names = {found.name for entry in plan.entry_points for found in entry.tensor_maps if found.of_pages}
    return {f"{name}_page_stride": strides[name][0] // strides[name][1] for name in sorted(names)}


def reads_pages_quickly(plan: KernelPlan, shape: CacheShape) -> bool:
    """Whether boxes of TMA, if the kernel has any, are so large that their number does not count."""
    found = [tensor_map for entry in plan.entry_points for tensor_map in entry.tensor_maps if tensor_map.of_pages]
    return all(tensor_map.rows_of(shape.page_size) >= QUICK_BOX_ROWS for tensor_map in found)


def row_by_row(plan: KernelPlan) -> KernelPlan | None:
    """The kernel that is as another over pages, but copies each row of K and V by itself: so pages may be of any size
    and distance. None where there is none: of expressions."""
    spec = KernelSpec(problem=plan.problem, tiling=plan.tiling.model_copy(update={"page_rows": 1}))
    return make_plan(spec) if fits(spec) else None


def with_packed_heads(plan: KernelPlan, shape: AnyShape, num_sms: int) -> KernelPlan:
    """The kernel whose rows are of all heads that share K and V, if its tiles then take fewer rounds of the
    multiprocessors, of sequences as long as they are on average."""
    if 0 in (shape.batch, shape.seqlen_q, shape.num_heads, shape.num_heads_kv) or plan.arch != "sm90":
        return plan
    rows, group = ceil_div(shape.seqlen_q, shape.batch), shape.num_heads // shape.num_heads_kv
    plain, packed = (
        ceil_div(shape.batch * heads * ceil_div(count, plan.tile_m), num_sms)
        for heads, count in ((shape.num_heads, rows), (shape.num_heads_kv, rows * group))
    )
    if group not in PACKED_GROUPS or packed > PACKED_ROUNDS * plain or shape.seqlen_q * group >= RAGGED_ROWS:
        return plan
    spec = KernelSpec(problem=plan.problem, tiling=plan.tiling.model_copy(update={"pack_heads": 1}))
    return make_plan(spec) if fits(spec) else plan


class _Tile(NamedTuple):
    """One by which few queries over pages may be multiplied.

    microseconds  over 8k keys, causal, where one, two, ... of its warpgroups have rows.
    """

    tile_m: int
    tile_n: int
    num_stages: int
    microseconds: tuple[float, ...]

    def spec(self, plan: KernelPlan, packs_heads: bool, splits_keys: bool = False) -> KernelSpec:
        """Of a plan's problem."""
        changes = {"tile_m": self.tile_m, "tile_n": self.tile_n, "num_stages": self.num_stages}
        changes |= {"num_mma_warps": self.tile_m // 16, "pack_heads": int(packs_heads), "split_keys": int(splits_keys)}
        return KernelSpec(problem=plan.problem, tiling=plan.tiling.model_copy(update=changes))


@functools.lru_cache(maxsize=1024)  # calls of every new length ask for the same (2 ms)
def _has_room(tile: _Tile, plan: KernelPlan, packs_heads: bool, splits_keys: bool = False) -> bool:
    """Whether a tile's spec of a plan's problem is feasible."""
    return fits(tile.spec(plan, packs_heads, splits_keys))


FEW_QUERIES = 128  # of a sequence, at most
# Microseconds in which 8k keys and values of one head of 128 come from memory, and what that is multiplied with for a
# tile that would not be in step with another that reads the same ones, as they have not as many rows.
KEYS_IN_MEMORY, OUT_OF_STEP = 1.7, 1.3
# Microseconds that parts of keys take beside what their products do: each, and all to be put together, of which so many
# bytes are written and read in one; the least keys of a part, and how many each query has where queries are many.
PART, MERGE, MERGED_BYTES, KEYS_OF_A_PART, KEYS_OF_A_QUERY = 2, 4, 2.5e6, 256, 4
# By head dim, as timed on an H100: microseconds of the tiles for many queries, and others.
TILES_OF_FEW: dict[int, tuple[tuple[float, ...], tuple[_Tile, ...]]] = {
    64: ((64, 90, 103, 115), (_Tile(64, 128, 4, (62,)), _Tile(128, 160, 2, (80, 87)))),
    96: ((74, 96, 125), (_Tile(64, 128, 2, (70,)), _Tile(128, 128, 2, (80, 93)))),
    128: ((83, 105, 140), (_Tile(64, 128, 2, (76,)), _Tile(128, 128, 2, (77, 101)))),
    256: ((122, 163), (_Tile(64, 96, 2, (106,)),)),
}


def for_few_queries(
    plan: KernelPlan, shape: CacheShape, num_sms: int, keys: int | None = None
) -> tuple[KernelPlan, CacheShape]:
    """`with_packed_heads` of sequences that all have as many queries, and the shape that it is launched with; of few
    queries, with the tile that is done soonest: one of 192 rows has idle warpgroups, or a second of its kind has, which
    then are not in step, and both read the keys from memory (8 sequences of 64 queries over 8k, 32 heads of 128 over 8,
    175 us, with tiles of 128 rows 132). And its keys in parts, where tiles alone do not fill the device.

    keys  of a sequence, about; by default as many as it can have.
    """
    usual = with_packed_heads(plan, shape, num_sms)
    if 0 in (shape.batch, shape.seqlen_q, shape.num_heads, shape.num_heads_kv) or plan.arch != "sm90":
        return usual, shape
    queries, group = ceil_div(shape.seqlen_q, shape.batch), shape.num_heads // shape.num_heads_kv
    keys = shape.seqlen_k if keys is None else keys
    are_few = queries <= FEW_QUERIES
    if not are_few and KEYS_OF_A_QUERY * queries > keys:
        return usual, shape
    if shape.seqlen_q * group >= RAGGED_ROWS or plan.problem.has_expression:
        return usual, shape
    like_128 = tuple(plan.head_dim / 128 * time for time in TILES_OF_FEW[128][0])
    microseconds, tiles = TILES_OF_FEW.get(plan.head_dim, (like_128, ()))
    if plan.head_dim_v != plan.head_dim or plan.tiling.page_rows:
        tiles = ()
    times_8k = keys / 8192
    from_memory = KEYS_IN_MEMORY * plan.head_dim / 128 * shape.batch * shape.num_heads_kv * times_8k
    part_bytes = NUMBER_BYTES * shape.seqlen_q * shape.num_heads * plan.head_dim_v
    own = _Tile(plan.tile_m, plan.tile_n, plan.num_stages, tuple(microseconds))

    def busy(tile: _Tile, packs_heads: bool, parts: int = 1) -> float:
        rows, heads = (queries * group, shape.num_heads_kv) if packs_heads else (queries, shape.num_heads)
        rounds = ceil_div(shape.batch * heads * ceil_div(rows, tile.tile_m) * parts, num_sms)
        used = min(ceil_div(rows, 64), tile.tile_m // 64, len(tile.microseconds))
        return rounds * (tile.microseconds[used - 1] * times_8k / parts + PART * (parts > 1))

    def takes(tile: _Tile, packs_heads: bool, out_of_step: float = 1) -> float:
        rows = queries * group if packs_heads else queries
        in_step = rows <= tile.tile_m or ceil_div((rows - 1) % tile.tile_m + 1, 64) == tile.tile_m // 64
        return max(busy(tile, packs_heads), from_memory * (1 if in_step else out_of_step))

    def takes_in_parts(tile: _Tile, packs_heads: bool, parts: int) -> float:
        products = busy(tile, packs_heads, parts)
        merge = (MERGE + parts * part_bytes / MERGED_BYTES) if parts > 1 else 0
        return max(products, from_memory) + products / 3 + merge

    both = (False, True)[: 1 + (group in PACKED_GROUPS and not plan.sink)]
    chosen, packs = own, usual.packs_heads
    ways = [(takes(x, pack, OUT_OF_STEP), pack, x) for pack in both for x in tiles if _has_room(x, plan, pack)]
    if are_few and ways and min(ways)[0] <= PACKED_ROUNDS * takes(own, usual.packs_heads):
        _, packs, chosen = min(ways)
    most = min(MAX_KEY_PARTS, keys // KEYS_OF_A_PART)
    split = [
        (takes_in_parts(x, pack, parts), pack, parts, x)
        for pack in both
        for x in (*tiles, own)
        if most > 1 and _has_room(x, plan, pack, True)
        for parts in range(2, most + 1)
    ]
    parts = 1
    if split and min(split)[0] <= PACKED_ROUNDS * takes_in_parts(chosen, packs, 1):
        _, packs, parts, chosen = min(split)
    found = make_plan(chosen.spec(plan, packs, parts > 1))
    return (found, shape._replace(key_parts=parts)) if reads_pages_quickly(found, shape) else (usual, shape)


def suits_decoding(
    arch: ArchName,
    batch: int,
    queries: int,
    heads: int,
    heads_kv: int,
    head_dim: int,
    num_sms: int,
    *,
    may_pack: bool = True,
    laid_out_keys: int | None = None,
) -> bool:
    """Whether a call over a cache is for kernels of decoding, which split keys over the device and multiply few rows at
    once, or for those of prefill.

    may_pack       whether kernels of prefill may have the heads of a group as rows, and keys in parts.
    laid_out_keys  the most keys of a sequence, where queries must be laid out anew for decoding, and only for it.
    """
    group = heads // heads_kv
    rows, items = queries * group, batch * heads_kv
    if may_pack and arch == "sm90" and group in PACKED_GROUPS:
        return rows <= DECODING_ROWS and laid_out_keys is None
    rounds = ceil_div(batch * heads * ceil_div(queries, PREFILL_ROWS), num_sms)
    few_keys = laid_out_keys is not None and laid_out_keys * rounds < LAID_OUT_KEYS
    many_items = laid_out_keys is not None and LAID_OUT_SMS * items > num_sms * rounds
    if arch == "sm90" and (few_keys or many_items):  # SM80's prefill takes several times as long
        return False
    if arch == "sm80":
        are_few = rows * items < SM80_PREFILL_PAYS * num_sms * rounds
    else:
        at_once = rows <= recipe.ROWS_AT_ONCE * DECODING_ROWS
        pays = PREFILL_PAYS if laid_out_keys is None else LAID_OUT_PAYS
        are_few = at_once and (rows + 40) * items * (head_dim + 24) < pays * num_sms * rounds
    return rows <= DECODING_ROWS or are_few


def pages_refusal(plan: KernelPlan, shape: AnyShape, strides: Mapping[str, Sequence[int]]) -> str | None:
    """Why a kernel can not read pages of these sizes and strides (as `page_strides` gives them), or None."""
    if plan.tiling.page_rows:
        assert isinstance(shape, CacheShape)
        most = max(shape.entries * strides[name][0] for name in ("k", "v")) * ELEMENT_BYTES // CHUNK_BYTES
        return f"{most:,} chunks of 16 bytes exceed 2^31" if most >= 2**31 else None
    for tensor_map in (found for entry in plan.entry_points for found in entry.tensor_maps if found.of_pages):
        assert isinstance(shape, CacheShape)
        name, (page_step, row_step, _) = tensor_map.name, strides[tensor_map.name]
        rows = tensor_map.rows_of(shape.page_size)
        least = TMA_ALIGNMENT // tensor_map.swizzle_bytes
        if rows % least:
            return f"pages of {shape.page_size} rows, of head dim {plan.head_dim}: a multiple of {least} rows is needed"
        if page_step % row_step:
            return f"pages of {name} are {page_step} elements apart, rows {row_step}: a multiple of that is needed"
        if (count := shape.entries * (page_step // row_step) + shape.seqlen_k) >= 2**31:
            return f"{count:,} rows of all pages of {name} exceed 2^31"
    return None

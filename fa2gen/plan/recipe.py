"""How a kernel is launched, in formulas and words: for whoever takes a rendered source into another project.

The comment at the end of every render, the C++ launcher of `fa2gen render --with-host` and the package's own launches
(`fa2gen.launch`) are made of these. Formulas are C++ over 64-bit integers, and Python's too but for `/`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

from fa2gen.features import Param
from fa2gen.features.attention import Operand
from fa2gen.features.varlen import ENTRY_NUMBERS, VARLEN
from fa2gen.layout import ELEMENT_BYTES
from fa2gen.options import MAX_KEY_PARTS, SPLIT_KEYS
from fa2gen.plan.base import (
    SECTION_BYTES,
    SECTION_HEADS,
    SECTION_HEADS_OF_GRADIENTS,
    SECTION_HEADS_OF_LEVEL,
    EntryPoint,
    KernelPlan,
    TensorMapPlan,
)
from fa2gen.plan.bwd import BackwardPlan
from fa2gen.plan.decode import APPEND_THREADS, LAYOUT_ENTRIES, WIDE_CHUNKS
from fa2gen.spec import SAME

__all__ = [
    "LEAST_UNITS",
    "arguments",
    "asked_by_sizes",
    "braced",
    "call_fields",
    "counted",
    "encoder",
    "feature_assignments",
    "grid",
    "host_type",
    "limits",
    "lines",
    "maps",
    "memory",
    "of_features",
    "options",
    "passed_on",
    "reals",
    "section",
    "shared_bytes",
    "sizes",
    "strided",
    "tensor_sizes",
]

DEFAULT_SHARED_BYTES = 48 << 10  # what a kernel may have without being asked


_OPTIONS = {
    "window_left": "keys that a query sees before its own place; -1: all",
    "window_right": "keys that it sees after it; -1: all, 0: a causal mask",
    "chunk": "a query sees its own chunk of so many keys alone; 0: all are one",
    "dropout_p": "the probability that an element of P is dropped, above 0 and below 1",
}
_OF_A_CACHE = {
    "seqlen_k": "the most keys that a sequence can have: of an entry of the caches, or of all pages of a table's row",
    "seqlen_new": "keys that are appended to each sequence",
    "entries": "of the caches: places of sequences, or pages",
    "split_shift": "-1: keys are dealt out evenly; s: in parts of 64 << s keys, whatever the batch",
    "rotary_dim, rotary_rows": "columns that are turned, and positions of the tables of angles; 0: none",
    "interleaved, rotary_steps": "pairs are neighbours; queries have positions of their own",
}
_OF_8_BITS = {
    "k_scale_batch, k_scale_head": "from one sequence's scale of K to the next, and one head's",
    "v_scale_batch, v_scale_head": "of V likewise",
    "seqlen_wide": "so many keys of each sequence are written to k_wide in 16 bits, and values to v_wide; 0: none",
}
LEAST_UNITS = 2
"""So many pieces a block at least: fewer are not worth the part's way through memory."""
ITEM_UNITS = 3
"""So many pieces the end of an item counts as, where a block has several: 32 sequences of 200 to 32k keys take 246 us
with none, 242 with 1, 239 with 3, 240 with 4 (H100)."""
ROWS_AT_ONCE = 8
"""Over a cache, so many blocks at most read the same keys at once, for rows of their own."""


def sizes(plan: KernelPlan) -> dict[str, str]:
    """Name -> formula of what a plan's launch computes from batch, seqlen_q, seqlen_k, num_heads, num_heads_kv and
    softmax_scale; later ones use earlier ones."""
    if plan.problem.direction == "decode":
        return _decoding_sizes(plan)
    grids = (text for entry in plan.entry_points for text in grid(plan, entry))
    formulas = _words(*grids, *memory(plan).values(), *limits(plan).values())
    return _needed(_sizes(plan), formulas | {param.name for param in plan.params})


def section(plan: KernelPlan) -> dict[str, str]:
    """Those of `sizes` that heads_per_section is computed from, and itself, whether kernels have use for it or not.

    So many neighbouring (batch, head) pairs are walked together: forward, whole groups of query heads that share K and
    V; backward, heads of K and V, with the Q, dO and sums of dQ of their groups, and each in parts. Never more than
    there are: kernels multiply it with a number of blocks in 32 bits.
    """
    return _needed(_sizes(plan), {"heads_per_section"})


def _needed(found: dict[str, str], wanted: set[str]) -> dict[str, str]:
    """Of formulas, of which later ones use earlier ones, those that are wanted and what they use."""
    for name in reversed(found):
        if name in wanted:
            wanted = wanted | _words(found[name])
    return {name: text for name, text in found.items() if name in wanted}


def _sizes(plan: KernelPlan) -> dict[str, str]:
    """`sizes` of a pass over whole sequences, with those that this plan has no use for."""
    tiling, of_batch, of_parts = plan.tiling, "" if plan.varlen else "batch * ", _of_parts(plan)
    fewest = "1" if plan.least_section_heads == 1 else f"max(1, {plan.least_section_heads} / num_heads_per_kv)"
    if plan.problem.direction == "bwd":  # heads of K and V, with Q, dO and the fp32 sums of dQ of their groups
        read = f"num_heads_per_kv * seqlen_q * {plan.section_row_bytes}"
        heads = f"{of_batch}num_heads_kv"
        if not plan.problem.deterministic:
            heads = f"min({heads}, {SECTION_HEADS_OF_GRADIENTS})"
        least = "least_section" if plan.times_in_order > 1 else "1"
        section = f"min(max({least}, section_bytes / ({read})), {heads}){of_parts}"
        if plan.is_level:
            section = f"min(max(1, {SECTION_HEADS_OF_LEVEL} / num_heads_per_kv), {of_batch}num_heads_kv)"
    else:  # whole groups of query heads that share K and V
        read = f"seqlen_k * {plan.section_row_bytes}"
        section = f"min(section_heads_kv * num_heads_per_kv, {of_batch}num_heads)"
    return {
        "num_heads_per_kv": "num_heads / num_heads_kv",
        "num_m_blocks": _blocks(plan, "seqlen_q", tiling.tile_m),
        "num_n_blocks": _blocks(plan, "seqlen_k", tiling.tile_n),
        "num_tiles": f"num_m_blocks * {of_batch}num_heads{' * key_parts' if plan.has_key_parts else ''}",
        "num_rows": "seqlen_q * num_heads",
        "num_batch_heads": f"{of_batch}num_heads",
        "num_batch_heads_kv": f"{of_batch}num_heads_kv{of_parts}",
        "num_key_blocks": f"num_n_blocks * {of_batch}num_heads_kv{of_parts}",
        "num_sequences": "batch",
        "tables": f"min(batch / {plan.own_sequences + 1}, 1)",
        **dict(_bounds(plan)),
        "box_rows": f"gcd(page_size, {tiling.tile_n})",
        "tile_pages": f"{tiling.tile_n} / page_size",
        "tile_rows": f"{tiling.tile_n} - tile_pages * page_size",
        "section_bytes": f"{plan.section_bytes} * min(num_heads_per_kv, {plan.sections_of_groups})",
        "least_section": f"max(1, min({SECTION_HEADS_OF_GRADIENTS}, {plan.times_in_order} * section_bytes / ({read})))",
        "section_heads_kv": f"max({fewest}, min({SECTION_BYTES} / ({read}), {SECTION_HEADS} / num_heads_per_kv))",
        "heads_per_section": section,
        "num_whole_blocks": "max(num_key_blocks - 1, 0) / num_sms * num_sms",
        "num_tail_blocks": "num_key_blocks - num_whole_blocks",
        "some_rows": "max(seqlen_q, 1)",
        **({"stores_first": first} if isinstance(plan, BackwardPlan) and (first := plan.stores_first) else {}),
        "softmax_scale_log2": f"softmax_scale * {math.log2(math.e)!r}",
    }


def _bounds(plan: KernelPlan) -> Iterator[tuple[str, str]]:
    """How many pairs of bounds the tables of tensors have, with those before them; and all."""
    before = ""
    for index, table in enumerate(plan.tile_tables):
        yield f"bounds_{index}", f"{before}{table.count}"
        before = f"bounds_{index} + "
    if before:
        yield "num_bounds", before.removesuffix(" + ")


def _decoding_sizes(plan: KernelPlan) -> dict[str, str]:
    """`sizes` of queries over a cache; seqlen_k is the most keys that a sequence can have."""
    tile_m, tile_n = plan.tiling.tile_m, plan.tiling.tile_n
    return {
        "num_sequences": "batch",
        "cache_entries": "entries",
        "rotary_interleaved": "interleaved",
        "num_heads_per_kv": "num_heads / num_heads_kv",
        "num_m_blocks": f"(seqlen_q * num_heads_per_kv + {tile_m - 1}) / {tile_m}",
        "fixed_parts": "min(split_shift + 1, 1)",
        "unit_shift": f"{(SPLIT_KEYS // tile_n).bit_length() - 1} + max(split_shift, 0)",
        "least_units": f"{LEAST_UNITS} - fixed_parts * {LEAST_UNITS - 1}",
        "unit_keys": f"{tile_n} << unit_shift",
        "num_units": "((seqlen_k + unit_keys - 1) / unit_keys + 1) * batch * num_heads_kv * num_m_blocks",
        "num_blocks": "min((num_units + least_units - 1) / least_units, num_sms)",
        "entry_sequences": f"max((batch + {LAYOUT_ENTRIES - 1}) / {LAYOUT_ENTRIES}, 1)",
        "num_entries": "(batch + entry_sequences - 1) / entry_sequences",
        "rows_at_once": f"1 + (num_m_blocks - 1) * min(min({ROWS_AT_ONCE}, num_blocks) / max(num_m_blocks, 1), 1)",
        "row_rounds": "num_m_blocks / rows_at_once",
        "round_reciprocal": f"{2**31 - 1} / max(row_rounds, 1)",
        "num_runs": "num_blocks / rows_at_once",
        "item_units": f"{ITEM_UNITS} * (1 - fixed_parts) * min(batch * num_heads_kv * row_rounds / (num_runs + 1), 1)",
        "runs_of_each": "num_runs / max(num_heads_kv * row_rounds, 1)",
        "are_nearly_all": "min(20 * runs_of_each * num_heads_kv * row_rounds / (19 * max(num_runs, 1)), 1)",
        "item_runs": "runs_of_each * are_nearly_all * (1 - fixed_parts) * (1 / entry_sequences)",
        "run_reciprocal": f"{2**31 - 1} / max(num_runs, 1)",
        "num_new_chunks": f"{plan.problem.head_dim // 8} * batch"
        " * (2 * seqlen_new * num_heads_kv + min(rotary_dim, 1) * seqlen_q * num_heads)",
        **(_wide_sizes(plan) if plan.problem.cache_dtype != SAME else {}),
        "num_slots": "fixed_parts * num_units + (1 - fixed_parts) * 2 * num_blocks",
        "softmax_scale_log2": f"softmax_scale * {math.log2(math.e)!r}",
    }


def _wide_sizes(plan: KernelPlan) -> dict[str, str]:
    """Of each sequence's keys, or values, that become 16-bit numbers."""
    chunks = APPEND_THREADS * WIDE_CHUNKS
    return {
        "num_wide_chunks": f"{plan.problem.head_dim // 8} * seqlen_wide * num_heads_kv",
        "num_wide_blocks": f"(num_wide_chunks + {chunks - 1}) / {chunks}",
    }


def reals(plan: KernelPlan) -> dict[str, str]:
    """Name -> formula of the fields of Params that are no whole numbers, but the scale and those of features."""
    return {"inverse_group": "1 / num_heads_per_kv"} if plan.problem.direction == "decode" else {}


def _words(*formulas: str) -> set[str]:
    return set(re.findall(r"[a-z]\w*", " ".join(formulas)))


def _blocks(plan: KernelPlan, rows: str, tile: int) -> str:
    """How many blocks a head has; of a ragged batch, the most that there can be: every sequence, and every gap between
    them, may end in a block that is not full."""
    return f"{rows} / {tile} + 2 * batch + 1" if plan.varlen else f"({rows} + {tile - 1}) / {tile}"


def _of_parts(plan: KernelPlan) -> str:
    """What a number of blocks of keys is multiplied with."""
    return f" * {plan.tiling.group_parts}" if plan.tiling.group_parts > 1 else ""


def _blocks_of_keys(plan: KernelPlan) -> str:
    """How many blocks of threads the main kernel of gradients has."""
    if plan.tiling.tail_parts > 1:
        return f"num_whole_blocks + num_tail_blocks * {plan.tiling.tail_parts}"
    return f"num_n_blocks * num_heads_kv{'' if plan.varlen else ' * batch'}{_of_parts(plan)}"


def grid(plan: KernelPlan, entry: EntryPoint) -> tuple[str, str, str]:
    """Formulas of a kernel's grid; `num_sms` is the device's number of multiprocessors."""
    of_batch, batch = ("", "1") if plan.varlen else (" * batch", "batch")
    return {
        "persistent": ("min(num_tiles, num_sms)", "1", "1"),
        "persistent key blocks": ("min(num_key_blocks, num_sms)", "1", "1"),
        "tiles": ("num_m_blocks", "num_heads", batch),
        "query blocks": (f"num_m_blocks * num_heads{of_batch}", "1", "1"),
        "key blocks": (_blocks_of_keys(plan), "1", "1"),
        "groups": (f"num_n_blocks * num_heads_kv{of_batch}", "1", "1"),
        "tail": ("num_tail_blocks", "1", "1"),
        "one": ("tables" if plan.own_sequences else "1", "1", "1"),
        "tile bounds": (f"(num_bounds + {plan.bound_warps - 1}) / {plan.bound_warps}", "1", "1"),
        "parts": ("num_blocks", "1", "1"),
        "new rows": (f"(num_new_chunks + {entry.num_threads - 1}) / {entry.num_threads}", "1", "1"),
        "wide rows": ("batch * num_wide_blocks", "2", "1"),
        "result rows": (f"(num_rows + {entry.num_threads // 32 - 1}) / {entry.num_threads // 32}", "1", "1"),
    }[entry.grid]


def memory(plan: KernelPlan) -> dict[str, str]:
    """Name -> formula of how many 4-byte numbers each of the plan's scratch memories holds."""
    blocks = f"num_m_blocks * num_heads{'' if plan.varlen else ' * batch'}"
    counts = {
        "sequences": f"{ENTRY_NUMBERS} * (3 * batch + 2)",  # and the gaps between them, of queries and of keys
        "num_blocks": "1",
        "m_list": "num_m_blocks",
        "n_list": f"{ENTRY_NUMBERS} * num_n_blocks",
        "tile_counter": "2" if plan.own_sequences else "1",  # and one of blocks that have left
        "lse_log2": f"{blocks} * {plan.tiling.tile_m}",
        "dpsum": f"{blocks} * {plan.tiling.tile_m}",
        "tile_bounds": "2 * num_bounds",
        "parts": f"num_slots * {plan.tiling.tile_m * plan.problem.head_dim}",
        "part_sums": f"num_slots * {2 * plan.tiling.tile_m}",
        "counters": "fixed_parts * num_units + (1 - fixed_parts) * num_blocks",
        "o_parts": f"key_parts * num_rows * {plan.vo.head_dim}",
        "lse_parts": "key_parts * num_rows",
    }
    if isinstance(plan, BackwardPlan):
        shares = f" * {plan.num_dq_shares}" if plan.num_dq_shares > 1 else ""
        counts["dq_sums"] = counts["dq_turns"] = f"{blocks}{shares}"
        counts["dq_acc"] = f"{blocks} * {plan.dq_block_floats}"
        keys = f"num_n_blocks * num_heads_kv{'' if plan.varlen else ' * batch'}"
        parted = "num_tail_blocks" if plan.splits_tail else keys
        counts["dkv_parts"] = f"{parted} * {plan.num_parts * plan.part_floats}"
        counts["sink_sums"] = f"{blocks} * {plan.preprocess_warps}"
    if plan.own_sequences:
        counts |= {scratch.name: f"tables * ({counts[scratch.name]})" for scratch in VARLEN["fwd"].scratch}
    return {scratch.name: counts[scratch.name] for scratch in plan.scratch}


def limits(plan: KernelPlan) -> dict[str, str]:
    """What must be less than 2^31, as the kernels count in 32 bits, and its formula."""
    if plan.problem.direction == "decode":
        wide = f"max(num_wide_chunks + {APPEND_THREADS * WIDE_CHUNKS}, batch * num_wide_blocks)"
        of_wide = {"pieces of wide keys": wide} if plan.problem.cache_dtype != SAME else {}
        return {
            "units of keys": f"num_units * (1 + item_units + min(item_runs, 1)) + num_sms * {SPLIT_KEYS}",
            "keys of a sequence": "2 * (seqlen_k + unit_keys)",
            "pieces of new keys and of queries": "num_new_chunks",
            **of_wide,
            "512ths of rows of a head of K and V": f"num_m_blocks * {plan.tiling.tile_m << 9}",  # rows are below 2^22
        }
    of_batch, parts = "" if plan.varlen else "batch * ", " * key_parts" if plan.has_key_parts else ""
    found = {"queries": "seqlen_q", "keys": "seqlen_k", "tiles": f"num_m_blocks * {of_batch}num_heads{parts} + num_sms"}
    if plan.problem.direction == "bwd":
        rows = f"num_m_blocks * {plan.tiling.tile_m} * num_heads_per_kv"
        found |= {"blocks of keys": _blocks_of_keys(plan), "query rows of a group of heads": rows}
        found["keys and queries"] = f"num_n_blocks * {plan.tiling.tile_n} + seqlen_q"
    if plan.has_key_parts:
        found["rows of all heads"] = "num_rows + num_sms"
    return found | ({"bounds of tiles": "2 * num_bounds"} if plan.tile_tables else {})


def row_bytes(plan: KernelPlan, name: str) -> int:
    """Of one row of one of the plan's (batch, seqlen, heads, head_dim) tensors."""
    return _operand(plan, name).head_dim(plan.problem) * ELEMENT_BYTES


def _operand(plan: KernelPlan, name: str) -> Operand:
    return next(operand for operand in plan.operands if operand.name == name)


def maps(plan: KernelPlan) -> list[TensorMapPlan]:
    """Every kernel's tensor maps, in the order in which they are passed."""
    return [tensor_map for entry in plan.entry_points for tensor_map in entry.tensor_maps]


def tensor_sizes(plan: KernelPlan, tensor_map: TensorMapPlan) -> str:
    """The rows and heads of the tensor that a map describes, as arguments in the launcher."""
    of = _operand(plan, tensor_map.name).of
    return "call.seqlen_k, call.num_heads_kv" if of == "key" else "call.seqlen_q, call.num_heads"


def encoder(plan: KernelPlan, tensor_map: TensorMapPlan) -> str:
    """The launcher's function that encodes a map, of tensors of its width."""
    width = plan.vo if _operand(plan, tensor_map.name).of_v else plan.qk
    return f"encode{width.function}"


def arguments(plan: KernelPlan, entry: EntryPoint) -> list[str]:
    """What an entry point is passed, in the launcher."""
    before = plan.entry_points[: plan.entry_points.index(entry)]
    first = sum(len(other.tensor_maps) for other in before)
    return [*(f"&maps[{first + i}]" for i in range(len(entry.tensor_maps))), "&params"]


def shared_bytes(plan: KernelPlan) -> list[str]:
    """Of every entry point."""
    return [str(entry.shared_memory_bytes) for entry in plan.entry_points]


def braced(items: Iterable[str]) -> str:
    """`{a, b}`."""
    return "{" + ", ".join(items) + "}"


def host_type(param: Param) -> str:
    """A field of Params, for a compiler that has headers."""
    if param.is_address:
        return "CUdeviceptr"
    return {"int64_t": "std::int64_t", "int": "std::int32_t", "float": "float"}[param.ctype]


def strided(plan: KernelPlan) -> list[str]:
    """The (batch, seqlen, heads, head_dim) tensors of a launch."""
    return [operand.name for operand in plan.operands if operand.is_tensor]


def of_features(plan: KernelPlan) -> dict[str, str]:
    """Name -> formula of the fields of Params that features add, over options, seqlen_q and seqlen_k.

    `limited(x, n)` is n where x is negative, else the less of the two.
    """
    return {name: text for feature in plan.features for name, text in feature.formulas.items()}


def options(plan: KernelPlan) -> dict[str, str]:
    """The numbers of a call's options that those are computed from, and what each is."""
    numbers = {x.token: "number of the expression" for x in plan.problem.program.inputs if not x.is_tensor}
    for operand in (operand for operand in plan.operands if operand.is_input):
        lasts = (param.name for param in plan.params if param.name.startswith(f"{operand.name}_last_"))
        numbers |= {name: f"size {axis} of {operand.name}, less 1" for axis, name in enumerate(lasts)}
    wanted = _words(*of_features(plan).values())
    return {name: what for name, what in (_OPTIONS | numbers).items() if name in wanted}


def asked_by_sizes(plan: KernelPlan) -> list[str]:
    """Those that `sizes` are computed from."""
    words = _words(*sizes(plan).values())
    return [name for name in options(plan) if name in words]


_DENSE = {
    "row": "(batch, num_heads, seqlen_q), fp32, dense",
    "bounds": "(batch + 1,), int32, dense",
    "lengths": "(batch,), int32, dense",
    "head": "(num_heads,), fp32, dense",
    "floats": "tensor of the expression, fp32, dense",
    "ints": "tensor of the expression, int32, dense",
    "state": "(4,), int32: 128 random bits; on a multiple of 16 bytes",
}


def call_fields(plan: KernelPlan) -> Iterator[str]:
    """Declarations of what a call of the launcher says beside its sizes and scale."""
    kinds = {param.name: "double" if param.ctype == "float" else "std::int64_t" for param in plan.params}
    yield from (f"{kinds.get(name, 'std::int64_t')} {name};  // {what}" for name, what in options(plan).items())
    yield from (f"Tensor {name};" for name in strided(plan))
    for operand in plan.operands:
        if not operand.is_tensor:
            note = "; or 0" if operand.optional else ""
            what = "gradient of a " if operand.is_input and operand.out else ""
            yield f"CUdeviceptr {operand.name};  // {what}{_DENSE[operand.of]}{note}"
    for scratch in plan.scratch:
        note = "; all zeros before the first launch, and left so" if scratch.cleared else ""
        yield f"CUdeviceptr {scratch.name};  // see Scratch{note}"


def counted(plan: KernelPlan) -> list[str]:
    """The whole numbers of Params that are among `sizes`, or are what those are computed from."""
    known = sizes(plan)
    added = [param.name for feature in plan.features for param in feature.params if param.name in known]
    return [*plan.sizes, *added]


def feature_assignments(plan: KernelPlan) -> Iterator[str]:
    """Statements that set what features add to Params, in the launcher."""
    kinds = {param.name: host_type(param) for param in plan.params}
    asked = options(plan)
    for name, formula in of_features(plan).items():
        in_call = re.sub(r"[a-z]\w*", lambda word: f"call.{word[0]}" if word[0] in asked else word[0], formula)
        yield f"found.params.{name} = static_cast<{kinds[name]}>({in_call});"


def passed_on(plan: KernelPlan) -> list[str]:
    """The fields of a call that go into Params as they are."""
    dense = [operand.name for operand in plan.operands if not operand.is_tensor]
    return [*dense, *(scratch.name for scratch in plan.scratch)]


def lines(plan: KernelPlan) -> Iterator[str]:
    """The recipe in words, a line of a comment each."""
    many, takes = len(plan.entry_points) > 1, "tensor maps, then Params, by value" if maps(plan) else "Params by value"
    yield f"Compile with nvcc -std=c++17 -arch={plan.target} -cubin, or with NVRTC."
    if plan.has_launcher:
        yield f"`fa2gen render {'SPEC.toml' if plan.has_score else plan.name} --with-host` adds a launcher in C++."
    yield ""
    yield f"Kernels, one after the other on one stream; each takes {takes}:" if many else f"Kernel; it takes {takes}:"
    for entry in plan.entry_points:
        yield f"  {entry.symbol}"
        shared = f"{entry.shared_memory_bytes} bytes of dynamic shared memory"
        yield f"    grid ({', '.join(grid(plan, entry))}), {entry.num_threads} threads, {shared}"
        if entry.tensor_maps:
            yield f"    maps of {', '.join(m.argument.removeprefix('map_') for m in entry.tensor_maps)}"
        if entry.shared_memory_bytes > DEFAULT_SHARED_BYTES:
            yield f"    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = {entry.shared_memory_bytes}"
        if entry.starts_early:
            attribute = "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
            behind = " behind another of these" if plan.own_sequences else ""
            yield f"    may have {attribute} = 1{behind}: it then starts early"
    if maps(plan):
        sizes_of_map = "(head_dim, seqlen, heads, batch)"
        if plan.varlen:
            sizes_of_map = "(head_dim, 2^30, heads, 2^31, 2^31)"
        yield f"Tensor maps: tiled, {sizes_of_map}, 16-bit elements, zeros outside, on 64 bytes"
        if plan.varlen:
            yield "  steps in bytes: of a row, of a head, 2^34 - that of a row, of a row"
        yield from (f"  {text}" for text in _boxes(maps(plan)))
    if plan.paged and plan.varlen:
        yield "Of a call over pages, beside batch, seqlen_q (of all sequences) and heads:"
        yield "  seqlen_k: the most keys that a sequence can have, those of all pages of a table's row"
        yield "  page_size, entries: rows of a page, and pages; table_stride: numbers from one row to the next"
        if plan.has_key_parts:
            yield f"  key_parts: of each tile's keys, 1 to {MAX_KEY_PARTS}"
        if any(tensor_map.of_pages for tensor_map in maps(plan)):
            yield "  Params has k_page_stride, the rows from one page of k to the next; and v_page_stride"
    if plan.packs_heads:
        yield "Rows of q and o are of all heads that share K and V, group = num_heads / num_heads_kv of the tensors:"
        yield "  seqlen_q is group times theirs here, num_heads their num_heads_kv; their maps have heads before rows"
    if plan.problem.direction == "decode":
        yield "Of a call over caches, beside batch, seqlen_q and heads:"
        said = _OF_A_CACHE | (_OF_8_BITS if plan.problem.cache_dtype != SAME else {})
        yield from (f"  {name}: {text}" for name, text in said.items())
        yield from (f"  Params has {name} = {text}, no whole number" for name, text in reals(plan).items())
    yield "Sizes, in whole numbers:"
    yield from (f"  {name} = {text}" for name, text in sizes(plan).items())
    if scratch := plan.scratch:
        yield "Device memory beside the tensors, in 4-byte numbers:"
        counts = memory(plan)
        for one in scratch:
            note = "; all zeros before the first launch, and left so" if one.cleared else ""
            yield f"  {one.name}: {counts[one.name]}{note}"
    if options(plan):
        yield "Options; limited(x, n) is n where x < 0, else min(x, n):"
        yield from (f"  {name}: {what}" for name, what in options(plan).items())
        yield from (f"  Params has {name} = {text}" for name, text in of_features(plan).items())


def _boxes(tensor_maps: list[TensorMapPlan]) -> Iterator[str]:
    """`q, o: box 64 x 16, swizzle 128 bytes`, one line for each kind."""
    kinds: dict[tuple[int, int | str, int], list[str]] = {}
    for tensor_map in tensor_maps:
        rows = "box_rows" if tensor_map.of_pages else tensor_map.box_rows
        if tensor_map.of_groups:
            rows = f"min(group, {rows}) x {rows} / min(group, {rows})"
        kind = (tensor_map.box_cols, rows, tensor_map.swizzle_bytes)
        name = tensor_map.argument.removeprefix("map_")
        if name not in kinds.setdefault(kind, []):
            kinds[kind].append(name)
    for (columns, rows, span), names in kinds.items():
        yield f"{', '.join(names)}: box {columns} x {rows} x 1 x 1, swizzle {span} bytes"

"""A cubin made launchable: loaded on one device, its attributes set, its arguments packed once and launched often.

`Kernel` is one cubin on one device. `Kernel.prepare` fixes everything that a call's sizes, strides and options decide
and returns a `PreparedLaunch`; calling that with addresses and a stream is the hot path, and replaces only the
addresses. Tensors are plain integers here (addresses, and strides in elements), so that this module needs no torch.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, lru_cache, partial
from itertools import accumulate
from operator import itemgetter
from typing import Any, NoReturn

from cuda.bindings import driver

from fa2gen.compile import CUDA_CORE_IMPORT
from fa2gen.errors import Fa2GenError, UnsupportedProblem
from fa2gen.launch import (
    MAX_GRID_YZ,
    MAX_SEQLEN,
    LaunchOf,
    launches_of,
    map_numbers_of,
    page_strides,
    pages_apart,
    pages_refusal,
    value_names,
)
from fa2gen.layout import ELEMENT_BYTES, NUMBER_BYTES, align_up
from fa2gen.options import AnyShape, CacheShape, Options, Shape
from fa2gen.plan import KernelPlan, TensorMapPlan, recipe
from fa2gen.plan.base import EntryPoint

with CUDA_CORE_IMPORT:
    from cuda.core import Device, ObjectCode

__all__ = ["Kernel", "PreparedLaunch", "Strides", "argument_sizes", "zeroed_memory"]

Strides = tuple[int, int, int]
"""Of a (batch, seqlen, heads, head_dim) tensor: elements from one batch, one row, one head to the next."""

_MAP_BYTES = 128  # sizeof(CUtensorMap); it must lie on a 64-byte boundary
_ALIGNMENT = 64
SCRATCH_ALIGNMENT = 128
_LINE = SCRATCH_ALIGNMENT // NUMBER_BYTES
_NO_STRIDES = (0, 0, 0)
_NO_VALUES: dict[str, Any] = {}
_NO_STEPS: Sequence[int] = ()
_Arguments = tuple[bytes, tuple[int, ...], bytes]
"""All arguments of a launch; the addresses in them, and the numbers of their tensor maps. A NamedTuple takes 0.3 us."""
_REMEMBERED_ARGUMENTS = 64  # of a launch, for so many sets of addresses; 0.6 to 1.6 KB each

# CUlaunchConfig: grid, block, bytes of shared memory, stream, address and number of CUlaunchAttributes.
_CONFIG = struct.Struct("<7I4xQQI4x")
# CUlaunchAttribute with a number: a kernel may start before the one before has ended. Captured, it becomes a
# programmatic edge.
_ATTRIBUTE = struct.Struct("<I4xI60x")
_STARTS_EARLY = int(driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)

_SUCCESS = driver.CUresult.CUDA_SUCCESS
_SWIZZLE = {span: int(getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{span}B")) for span in (32, 64, 128)}
_DATA_TYPE = {
    "fp16": int(driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16),
    "bf16": int(driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16),
}


def argument_sizes(plan: KernelPlan, entry: EntryPoint | None = None) -> tuple[int, ...]:
    """Bytes of each argument of a kernel (of the plan's main one) in order: the tensor maps, then Params."""
    maps = (entry or plan).tensor_maps
    return (*(_MAP_BYTES for _ in maps), struct.calcsize(plan.params_format))


class Kernel:
    """One cubin on one device.

    plan    what it was built from.
    cubin   the whole ELF image.
    device  CUDA ordinal. Its primary context becomes this thread's current one; callers guard the current device.

    Raises Fa2GenError when there is no driver, when the device cannot load the cubin, or when the cubin's arguments are
    not those of the plan (a folder built by another version).
    """

    def __init__(self, plan: KernelPlan, cubin: bytes, device: int) -> None:
        self.plan = plan
        self.device = device
        try:
            # First of all: without a driver this raises, where ObjectCode.get_kernel would hang at its second call.
            self._device = Device(device)
            self._device.set_current()
        except Exception as error:
            raise Fa2GenError(f"no CUDA device {device} to load {plan.name} on: {error}") from error
        self.num_sms: int = self._device.properties.multiprocessor_count
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        before = _checked("cuThreadExchangeStreamCaptureMode", driver.cuThreadExchangeStreamCaptureMode(relaxed))
        try:  # loading is allowed while a graph is being captured only in this mode
            self._load(cubin)
        finally:
            driver.cuThreadExchangeStreamCaptureMode(before)

    def _load(self, cubin: bytes) -> None:
        name = self.plan.name
        try:
            self._code = ObjectCode.from_cubin(cubin, name=name)
            kernels = [self._code.get_kernel(entry.symbol) for entry in self.plan.entry_points]
            sizes = [tuple(argument.size for argument in kernel.arguments_info) for kernel in kernels]
        except Exception as error:
            raise Fa2GenError(f"device {self.device} does not load {name} ({len(cubin):,} B): {error}") from error
        for entry, found in zip(self.plan.entry_points, sizes, strict=True):
            if found != argument_sizes(self.plan, entry):
                raise Fa2GenError(
                    f"{entry.symbol} takes arguments of {found} B, its plan packs "
                    f"{argument_sizes(self.plan, entry)} B: the cubin was built by another version of fa2gen; "
                    "build it again"
                )
        # Always, not only above the 48 KiB that need it: the attribute is per kernel and device, and starts at 48 KiB.
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        ordinal = driver.CUdevice(self.device)
        self.functions: list[Any] = []  # of the plan's entry points
        for entry, kernel in zip(self.plan.entry_points, kernels, strict=True):
            handle = driver.CUkernel(int(kernel.handle))
            shared = entry.shared_memory_bytes
            result = driver.cuKernelSetAttribute(attribute, shared, handle, ordinal)
            _checked(f"{entry.symbol}: {shared:,} B of dynamic shared memory on device {self.device}", result)
            # The context's own function: forces the (lazy) load now rather than in the first launch.
            function = _checked(f"{entry.symbol}: cuKernelGetFunction", driver.cuKernelGetFunction(handle))
            self.functions.append(function)

    @cached_property
    def block(self) -> _Block:
        """Where launches have their arguments."""
        return _Block(self.plan, self.functions)

    def set_current(self) -> None:
        """Make the device's context this thread's current one."""
        self._device.set_current()

    @cached_property
    def _launch_of(self) -> LaunchOf:
        return launches_of(self.plan)

    def prepare(self, shape: AnyShape, strides: Mapping[str, Strides], options: Options) -> PreparedLaunch:
        """Everything about a launch but the addresses.

        strides  of the plan's operands that are (batch, seqlen, heads, head_dim) tensors.

        All sizes are at least 1; strides of dimensions longer than 1 are multiples of 16 bytes. Raises
        UnsupportedProblem where a size exceeds what the grid, an int32 or a tensor map can hold.
        """
        block, plan = self.block, self.plan
        if is_paged := block.is_paged and isinstance(shape, CacheShape):
            strides = {**strides, **{name: page_strides(shape, strides[name]) for name in ("k", "v")}}
            if why := pages_refusal(plan, shape, strides):
                raise UnsupportedProblem(f"{plan.name} can not read these pages: {why}; nearest: arch='sm80'")
        grids, values, scratch = self.sized(shape, options)
        named, steps = _NO_VALUES, _NO_STEPS
        if is_paged:
            named = {**dict(zip(value_names(plan), values, strict=True)), **pages_apart(plan, strides)}
            values = [named[name] for name in block.numbers]
        if block.strided:
            steps = [step for name in block.strided for step in strides.get(name, _NO_STRIDES)]
        numbers, fits = block.map_numbers(shape, strides, named)
        if not fits:
            _refuse_strides(plan, strides)
        return PreparedLaunch(self, (grids, values, scratch), steps, block.pack_numbers(*numbers))

    def sized(self, shape: AnyShape, options: Options) -> tuple[Any, Any, Any]:
        """(grids, values, scratch) of a `LaunchOf`. Raises UnsupportedProblem as `prepare` does."""
        try:
            grids, values, scratch, fits = self._launch_of(shape, options, self.num_sms)
        except OverflowError as error:
            raise UnsupportedProblem(
                f"too large for one launch: {error}; split the batch over several calls"
            ) from error
        if not fits:
            _refuse_grids(shape, grids)
        return grids, values, scratch


def _refuse_grids(shape: AnyShape, grids: Sequence[tuple[int, int, int]]) -> None:
    """Raises UnsupportedProblem where one launch is too large."""
    _, ys, zs = zip(*grids, strict=True)
    for what, size, limit in (
        ("seqlen_q", shape.seqlen_q, MAX_SEQLEN),
        ("seqlen_k", shape.seqlen_k, MAX_SEQLEN),
        ("heads", max(ys), MAX_GRID_YZ),
        ("batch", max(zs), MAX_GRID_YZ),
    ):
        if size > limit:
            raise UnsupportedProblem(
                f"{what} is {size:,}; one launch takes at most {limit:,}: split it over more calls"
            )


def _refuse_strides(plan: KernelPlan, strides: Mapping[str, Strides]) -> NoReturn:
    """Raises UnsupportedProblem: one of them is too large."""
    widest = {
        name: max(strides[name]) * ELEMENT_BYTES for name in dict.fromkeys(found.name for found in recipe.maps(plan))
    }
    name = max(widest, key=lambda name: widest[name])
    raise UnsupportedProblem(
        f"{name} has a stride of {widest[name]:,} B; a tensor map holds less than 2^40 B; use a contiguous copy, or an "
        "SM80 kernel (arch='sm80')"
    )


class _Block:
    """One block of memory in which all launches of a kernel have their arguments, one launch at a time.

    The driver copies them at the call: so a lock around "write the arguments, launch" is all that threads need, and
    what a launch keeps for itself are the bytes that it wrote, for each stream and set of addresses.

    The tensor maps of all entry points come first, on the 64-byte grid that they need, then the Params that all share,
    then of each entry point its CUlaunchConfig. Behind what launches write is what cuLaunchKernelEx takes as
    kernelParams of each entry point, the places of its maps and of Params, and the attribute of those that start early.

    standing   the arguments that stand there; None: they are being written.
    launches   of each entry point its number, and what launches it with what stands there, and gives the driver's code.
    """

    def __init__(self, plan: KernelPlan, functions: Sequence[Any]) -> None:
        self.lock = threading.Lock()
        self.standing: _Arguments | None = None
        names = (*(operand.name for operand in plan.operands), *(scratch.name for scratch in plan.scratch))
        maps = recipe.maps(plan)
        params = struct.Struct(plan.params_format)
        pointers = struct.Struct(f"<{len(maps) + len(plan.entry_points)}Q")
        params_at = _MAP_BYTES * len(maps)
        configs_at = align_up(params_at + params.size, 8)
        pointers_at = configs_at + _CONFIG.size * len(plan.entry_points)
        attribute_at = pointers_at + pointers.size
        self._memory = memory = (ctypes.c_char * (_ALIGNMENT + attribute_at + _ATTRIBUTE.size))()
        start = -ctypes.addressof(memory) % _ALIGNMENT
        base = ctypes.addressof(memory) + start

        # The numbers of all maps, one behind the other: sizes and steps of each, and what sizes of a box follow from.
        rank = 5 if plan.varlen else 4
        counts = [2 * rank - 1 + tensor_map.has_box for tensor_map in maps]
        self._numbers = (ctypes.c_uint64 * sum(counts))()
        self.pack_numbers = struct.Struct(f"<{sum(counts)}Q").pack
        self._write_numbers = struct.Struct(f"{8 * sum(counts)}s").pack_into
        self.maps = [
            _TensorMap(plan, tensor_map, names.index(tensor_map.name), base + _MAP_BYTES * i, self._numbers, first)
            for i, (tensor_map, first) in enumerate(zip(maps, accumulate(counts, initial=0), strict=False))
        ]
        self.map_numbers, self.is_paged = map_numbers_of(plan), plan.paged
        # What becomes Params: addresses, which each call writes, strides of operands, 0 of those that are missing, and
        # numbers.
        fields = {param.name: param for param in plan.params}
        held = [name for name, param in fields.items() if param.is_address]
        self.strided = [x.name for x in plan.operands if f"{x.name}_row_stride" in fields]
        steps = [f"{name}_{step}_stride" for name in self.strided for step in ("batch", "row", "head")]
        self.numbers = list(fields)[len(held) + len(steps) :]
        assert list(fields) == [*held, *steps, *self.numbers], "addresses, then strides, must lead Params"
        self.pack_params = struct.Struct(f"<{8 * len(held)}x" + plan.params_format[1 + len(held) :]).pack
        # Addresses come first in Params (8-byte fields do), so that one short pack replaces them all.
        self._start, self._params_at = start, start + params_at
        self._arguments = struct.Struct(f"{pointers_at}s")
        self._pack_params = struct.Struct(f"{params.size}s").pack_into
        self._pack_addresses = struct.Struct(f"<{len(held)}Q").pack_into
        self._pick = itemgetter(*(names.index(name) for name in held))
        # Scratch that must be zeros lies apart from what needs not be.
        self.is_cleared = bool(plan.scratch) and all(scratch.cleared for scratch in plan.scratch)
        self._apart = [scratch.cleared and not self.is_cleared for scratch in plan.scratch]
        self.places = lru_cache(maxsize=64)(self._places)  # forward kernels have the same at every call

        _ATTRIBUTE.pack_into(memory, start + attribute_at, _STARTS_EARLY, 1)
        # By ctypes, with all arguments made once: half of what cuda.bindings takes.
        launch, pointer = _driver_function("cuLaunchKernelEx"), ctypes.c_void_p.from_param
        self.launches: list[tuple[int, Callable[[], int]]] = []
        # Where they are in `_memory`, sizes behind the grid's, and whether they start early behind another launch.
        self._configs: list[tuple[int, tuple[int, ...], bool]] = []
        self._attribute = base + attribute_at
        places: list[int] = []  # of the arguments of each entry point in turn
        first = 0
        for entry, function in zip(plan.entry_points, functions, strict=True):
            at = configs_at + _CONFIG.size * len(self._configs)
            sizes = (entry.num_threads, 1, 1, entry.shared_memory_bytes)
            self._configs.append((start + at, sizes, entry.starts_early))
            arguments = base + pointers_at + 8 * len(places)
            of_launch = pointer(base + at), pointer(int(function)), pointer(arguments), None
            self.launches.append((len(self.launches), partial(launch, *of_launch)))
            places += (base + _MAP_BYTES * i for i in range(first, first + len(entry.tensor_maps)))
            places.append(base + params_at)
            first += len(entry.tensor_maps)
        pointers.pack_into(memory, start + pointers_at, *places)

    def _places(self, scratch: tuple[int, ...]) -> tuple[list[tuple[bool, int]], int, int]:
        """Of scratch memories of so many 4-byte numbers: whether each lies apart, and from where on; and the bytes of
        all that do not, and of those that do."""
        found, ends = [], [0, 0]
        for is_apart, count in zip(self._apart, scratch, strict=True):
            found.append((is_apart, ends[is_apart]))
            ends[is_apart] += -(-count // _LINE) * SCRATCH_ALIGNMENT  # each begins on a cache line
        return found, ends[False], ends[True]

    def write(self, arguments: _Arguments) -> None:
        """What `encoded` gave."""
        self._arguments.pack_into(self._memory, self._start, arguments[0])
        self.standing = arguments

    def encoded(
        self,
        addresses: tuple[int, ...],
        params: bytes,
        numbers: bytes,
        grids: Sequence[tuple[int, int, int]],
        stream: int,
    ) -> _Arguments:
        """Write, and give, the arguments of a launch. Of the same launch's, maps that need not move stay.

        addresses  of its operands and scratch.
        params     all of Params but those.
        numbers    of all tensor maps, as `map_numbers_of` gives them, packed.
        grids      of all entry points.
        """
        before, self.standing = self.standing, None
        stay = before[1] if before is not None and before[2] is numbers else None
        self._write_numbers(self._numbers, 0, numbers)
        for tensor_map in self.maps:
            operand = tensor_map.operand
            if stay is None or stay[operand] != addresses[operand]:
                tensor_map.address.value = addresses[operand]
                if code := tensor_map.encode():
                    tensor_map.refuse(code)
        self._pack_params(self._memory, self._params_at, params)
        self._pack_addresses(self._memory, self._params_at, *self._pick(addresses))
        follows = False  # a kernel that is launched
        for (at, sizes, starts_early), grid in zip(self._configs, grids, strict=True):
            if 0 not in grid:
                _CONFIG.pack_into(self._memory, at, *grid, *sizes, stream, self._attribute, follows and starts_early)
                follows = True
        written = self._arguments.unpack_from(self._memory, self._start)[0]
        self.standing = arguments = (written, addresses, numbers)
        return arguments


class PreparedLaunch:
    """The kernels of one call with their arguments packed; call it with addresses. Safe to call from several threads.

    scratch_bytes     of the memory that a call takes beside its operands; 0: none.
    scratch_cleared   whether it must be all zeros at the call, and is left so; else its content does not matter.
    cleared_bytes     of memory that must be all zeros and is left so, where that is not all of it; else 0.
    """

    __slots__ = (
        "_block",
        "_encoded",
        "_grids",
        "_launches",
        "_numbers",
        "_params",
        "_scratch_at",
        "_steps",
        "cleared_bytes",
        "kernel",
        "scratch_bytes",
        "scratch_cleared",
    )

    def __init__(self, kernel: Kernel, sized: tuple[Any, Any, Any], steps: Sequence[int], numbers: bytes) -> None:
        """sized    as `Kernel.sized` gives it.
        steps    strides of the operands that have them in Params.
        numbers  as `_Block.encoded` takes them.
        """
        grids, values, scratch = sized
        self.kernel = kernel  # keeps the module loaded
        self._block = block = kernel.block
        self.scratch_cleared = block.is_cleared
        self._scratch_at, self.scratch_bytes, self.cleared_bytes = block.places(scratch)
        self._steps, self._numbers = steps, numbers
        self._params: bytes = block.pack_params(*steps, *values)
        # What was written before for these operands, scratch, cleared memory and stream: an allocator gives the same in
        # turn.
        self._encoded: dict[tuple[tuple[int, ...], int, int, int], _Arguments] = {}
        self._grids = grids
        self._launches = block.launches
        for grid in grids:
            if 0 in grid:
                self._launches = [one for one in block.launches if 0 not in grids[one[0]]]
                break

    def resized(self, shape: Shape, options: Options) -> PreparedLaunch:
        """The same of a ragged batch with other totals, above 1, and another number of sequences: neither strides nor
        tensor maps change with them. Raises UnsupportedProblem as `Kernel.prepare` does."""
        return PreparedLaunch(self.kernel, self.kernel.sized(shape, options), self._steps, self._numbers)

    def __call__(self, operands: tuple[int, ...], scratch: int, stream: int, cleared: int = 0) -> None:
        """Launch on the CUstream with handle `stream`, in the current context.

        operands  addresses of the plan's operands: multiples of 16 bytes, and 0 for an optional one that is missing.
        scratch   address of `scratch_bytes` bytes that no other launch in flight uses; any number if there are none.
        cleared   of `cleared_bytes` bytes likewise.

        Raises Fa2GenError with the driver's reason.
        """
        block = self._block
        given = (operands, scratch, cleared, stream)
        with block.lock:
            if not self._encoded or (arguments := self._encoded.get(given)) is None:
                bases = (scratch, cleared)
                addresses = (*operands, *[bases[is_apart] + at for is_apart, at in self._scratch_at])
                arguments = block.encoded(addresses, self._params, self._numbers, self._grids, stream)
                if len(self._encoded) >= _REMEMBERED_ARGUMENTS:
                    self._encoded.clear()
                self._encoded[given] = arguments
            elif block.standing is not arguments:
                block.write(arguments)
            for entry, launch in self._launches:
                if code := launch():
                    self._launch_again(entry, code)

    def _launch_again(self, number: int, code: int) -> None:
        """What the driver refused, in a thread that has not touched CUDA yet. Raises Fa2GenError with its reason."""
        if code == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            self.kernel.set_current()
            code = self._block.launches[number][1]()
        entry, grid = self.kernel.plan.entry_points[number], self._grids[number]
        shared = f"{entry.shared_memory_bytes:,} B of shared memory"
        what = f"{entry.symbol}: launch of {grid} x {entry.num_threads} threads with {shared}"
        _checked(what, (driver.CUresult(code),))


class _TensorMap:
    """One tensor map of a block, encoded in place.

    operand, name  whose it is, by its place among a launch's addresses.
    address        of that tensor, which is to be set.
    encode         what then encodes the map, and gives the driver's code.
    """

    __slots__ = (
        "_box",
        "_box_of",
        "_map",
        "_numbers",
        "_plan",
        "_rank",
        "_rows",
        "address",
        "encode",
        "name",
        "operand",
    )

    def __init__(
        self,
        plan: KernelPlan,
        tensor_map: TensorMapPlan,
        operand: int,
        at: int,
        numbers: ctypes.Array[ctypes.c_uint64],
        first: int,
    ) -> None:
        """at: where it lies; numbers: of a block's maps, those of this one from `first` on."""
        self.operand, self.name = operand, tensor_map.name
        self._plan, self._rank = plan, (rank := 5 if plan.varlen else 4)
        self.address = ctypes.c_void_p()
        self._numbers, self._rows = numbers, (first, first + 2 * rank - 1)
        box, *constants = _map_constants(tensor_map, rank)
        self._box, self._box_of = (ctypes.c_uint32 * rank)(*box), tensor_map.box_of
        at_sizes, pointer = 8 * first, ctypes.c_void_p.from_param
        self._map = partial(
            _driver_function("cuTensorMapEncodeTiled"),
            *(pointer(at), _DATA_TYPE[plan.dtype], rank, self.address),
            *(ctypes.byref(numbers, at_sizes), ctypes.byref(numbers, at_sizes + 8 * rank)),
            *(ctypes.byref(self._box), *constants),
        )
        self.encode: Callable[[], int] = self._encode_boxed if tensor_map.has_box else self._map

    def _encode_boxed(self) -> int:
        self._box[1], self._box[2] = self._box_of(self._numbers[self._rows[1]])
        code: int = self._map()
        return code

    def refuse(self, code: int) -> NoReturn:
        """Raises Fa2GenError with the driver's reason not to encode it."""
        numbers, rank = self._numbers[slice(*self._rows)], self._rank
        _checked(
            f"{self._plan.name}: tensor map of {self.name}, innermost first {(*numbers[:rank],)}, "
            f"{numbers[rank:]} B apart, address {self.address.value:#x}",
            (driver.CUresult(code),),
        )
        raise AssertionError("a code that is no error")


@cache
def _map_constants(tensor_map: TensorMapPlan, rank: int) -> tuple[Any, ...]:
    """What cuTensorMapEncodeTiled takes behind the sizes and strides."""
    return (
        (ctypes.c_uint32 * rank)(tensor_map.box_cols, tensor_map.box_rows, *[1] * (rank - 2)),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        _SWIZZLE[tensor_map.swizzle_bytes],
        int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B),
        int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),  # zeros
    )


@cache
def _driver_function(name: str) -> Any:
    """A function of the driver, through ctypes: cuTensorMapEncodeTiled, which cuda.bindings lets encode into an object
    of its own, that does not lie on the 64-byte grid that the driver asks for, and cuLaunchKernelEx.

    Its arguments are C ints, and what c_void_p.from_param and byref gave once: types that are said take thrice as long
    (0.9 us) to be looked at, and c_void_p themselves a quarter longer.
    """
    try:
        return getattr(ctypes.CDLL("libcuda.so.1"), name)
    except (OSError, AttributeError) as error:
        raise Fa2GenError(f"the driver has no {name} (12.0 and later have it): {error}") from error


@cache
def _stream(handle: int) -> Any:
    return driver.CUstream(handle)


def zeroed_memory(device: int, num_bytes: int, stream: int) -> int:
    """Address of new device memory, zeros to what is launched on the stream from now on; it is never freed.

    In the current context, which must be the device's. Not while the stream is being captured; another stream may be.
    Raises Fa2GenError with the driver's reason.
    """
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = _checked("cuThreadExchangeStreamCaptureMode", driver.cuThreadExchangeStreamCaptureMode(relaxed))
    try:
        address = _checked(f"{num_bytes:,} B on device {device}", driver.cuMemAlloc(num_bytes))
        _checked("cuMemsetD8Async", driver.cuMemsetD8Async(address, 0, num_bytes, _stream(stream)))
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)
    return int(address)


def _checked(what: str, result: tuple[Any, ...]) -> Any:
    """The value of a driver call, whose first result is its error code. Raises Fa2GenError."""
    code, *value = result
    if code != _SUCCESS:
        _, text = driver.cuGetErrorString(code)
        reason = text.decode() if isinstance(text, bytes) else "no description"
        raise Fa2GenError(f"{what}: {driver.CUresult(code).name} ({reason})")
    return value[0] if value else None

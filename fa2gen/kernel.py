"""A cubin made launchable: loaded on one device, its attributes set, its arguments packed once and launched often.

`Kernel` is one cubin on one device. `Kernel.prepare` fixes everything that a call's sizes, strides and options decide
and returns a `PreparedLaunch`; calling that with addresses and a stream is the hot path, and replaces only the
addresses. Tensors are plain integers here (addresses, and strides in elements), so that this module needs no torch.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import threading
from collections.abc import Mapping, Sequence
from functools import cache, cached_property, partial
from operator import itemgetter
from typing import Any

from cuda.bindings import driver

from fa2gen.compile import CUDA_CORE_IMPORT
from fa2gen.errors import Fa2GenError, UnsupportedProblem
from fa2gen.launch import Launch, launch_of, ragged_dimensions
from fa2gen.layout import ELEMENT_BYTES, NUMBER_BYTES, align_up
from fa2gen.options import AnyShape, Options
from fa2gen.plan import KernelPlan, TensorMapPlan
from fa2gen.plan.base import EntryPoint

with CUDA_CORE_IMPORT:
    from cuda.core import Device, ObjectCode

__all__ = ["Kernel", "PreparedLaunch", "Strides", "argument_sizes", "zeroed_memory"]

Strides = tuple[int, int, int]
"""Of a (batch, seqlen, heads, head_dim) tensor: elements from one batch, one row, one head to the next."""

_MAP_BYTES = 128  # sizeof(CUtensorMap); it must lie on a 64-byte boundary
_ALIGNMENT = 64
SCRATCH_ALIGNMENT = 128
_PACK_MAP = struct.Struct(f"{_MAP_BYTES}s").pack_into  # a fifth of the time of ctypes.memmove
_MAX_GRID_YZ = 65_535
_MAX_SEQLEN = 2**31 - 512  # a kernel rounds lengths up to whole tiles, in 32 bits
_MAX_STRIDE_BYTES = 2**40 - 1
_REMEMBERED_MAPS = 64  # encoded tensor maps kept for each argument of a launch; 128 bytes each

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
        self.early_lock = threading.Lock()

    @cached_property
    def layout(self) -> _Layout:
        """Where launches have their arguments."""
        return _Layout(self.plan)

    @cached_property
    def early_configs(self) -> dict[str, Any]:
        """Of the entry points that start early: what the driver reads a launch from, under `early_lock`."""
        return {entry.symbol: _early_config(entry) for entry in self.plan.entry_points if entry.starts_early}

    def prepare(self, shape: AnyShape, strides: Mapping[str, Strides], options: Options) -> PreparedLaunch:
        """Everything about a launch but the addresses.

        strides  of the plan's operands that are (batch, seqlen, heads, head_dim) tensors.

        All sizes are at least 1; strides of dimensions longer than 1 are multiples of 16 bytes. Raises
        UnsupportedProblem where a size exceeds what the grid, an int32 or a tensor map can hold.
        """
        try:
            launch = launch_of(self.plan, shape, options, self.num_sms)
        except OverflowError as error:
            raise UnsupportedProblem(
                f"too large for one launch: {error}; split the batch over several calls"
            ) from error
        for what, size, limit in (
            ("seqlen_q", shape.seqlen_q, _MAX_SEQLEN),
            ("seqlen_k", shape.seqlen_k, _MAX_SEQLEN),
            *(("heads", grid[1], _MAX_GRID_YZ) for grid in launch.grids),
            *(("batch", grid[2], _MAX_GRID_YZ) for grid in launch.grids),
        ):
            if size > limit:
                raise UnsupportedProblem(
                    f"{what} is {size:,}; one launch takes at most {limit:,}: split it over more calls"
                )
        return PreparedLaunch(self, shape, launch, strides)


class _Layout:
    """What all launches of a kernel share: how their arguments lie in one block of memory.

    The tensor maps of all entry points come first, on the 64-byte grid that they need, then the Params that all share,
    then what cuLaunchKernel takes as kernelParams of each entry point: the places of its maps, and of Params.
    """

    def __init__(self, plan: KernelPlan) -> None:
        self.names = (*(operand.name for operand in plan.operands), *(scratch.name for scratch in plan.scratch))
        # Which operand each tensor map is of.
        self.maps = tuple((self.names.index(m.name), m) for entry in plan.entry_points for m in entry.tensor_maps)
        self.params = struct.Struct(plan.params_format)
        self.values_of = itemgetter(*(param.name for param in plan.params))
        self.params_at = _MAP_BYTES * len(self.maps)
        self.pointers_at = align_up(self.params_at + self.params.size, 8)
        self.stride_names = {
            operand.name: tuple(f"{operand.name}_{step}_stride" for step in ("batch", "row", "head"))
            for operand in plan.operands
        }
        # Addresses come first in Params (8-byte fields do), so that one short pack replaces them all.
        held = [param.name for param in plan.params if param.is_address]
        assert held == [param.name for param in plan.params[: len(held)]], "addresses must lead Params"
        # An operand that is missing has no strides either.
        self.zeros = dict.fromkeys(held, 0) | {param.name: 0 for param in plan.params if param.ctype == "int64_t"}
        self.pack_addresses = struct.Struct(f"<{len(held)}Q").pack_into
        self.pick = itemgetter(*(self.names.index(name) for name in held))
        self.cleared = tuple(scratch.cleared for scratch in plan.scratch)

        offsets: list[int] = []  # of the arguments of each entry point in turn
        self.first_pointers: list[int] = []  # where those of an entry point begin
        first = 0
        for entry in plan.entry_points:
            self.first_pointers.append(self.pointers_at + 8 * len(offsets))
            offsets += (_MAP_BYTES * i for i in range(first, first + len(entry.tensor_maps)))
            offsets.append(self.params_at)
            first += len(entry.tensor_maps)
        self.argument_offsets = tuple(offsets)
        self.pointers = struct.Struct(f"<{len(offsets)}Q")
        self.size = self.pointers_at + self.pointers.size


class PreparedLaunch:
    """The kernels of one call with their arguments packed; call it with addresses. Safe to call from several threads.

    All arguments lie in one block, and the driver copies them at the call: so a lock around "write the addresses,
    launch" is all that threads need.

    scratch_bytes     of the memory that a call takes beside its operands; 0: none.
    scratch_cleared   whether it must be all zeros at the call, and is left so; else its content does not matter.
    cleared_bytes     of memory that must be all zeros and is left so, where that is not all of it; else 0.
    """

    def __init__(self, kernel: Kernel, shape: AnyShape, launch: Launch, strides: Mapping[str, Strides]) -> None:
        plan, layout = kernel.plan, kernel.layout
        self.kernel = kernel  # keeps the module loaded
        # Each scratch memory begins on a cache line.
        counts = [align_up(NUMBER_BYTES * count, SCRATCH_ALIGNMENT) for count in launch.scratch.values()]
        self.scratch_cleared = all(layout.cleared) and bool(counts)
        apart = [cleared and not self.scratch_cleared for cleared in layout.cleared]
        self.scratch_bytes = sum(itertools.compress(counts, [not is_apart for is_apart in apart]))
        self.cleared_bytes = sum(itertools.compress(counts, apart))
        self._scratch_at: list[tuple[bool, int]] = []  # (whether it lies apart, from where on)
        ends = {False: 0, True: 0}
        for is_apart, count in zip(apart, counts, strict=True):
            self._scratch_at.append((is_apart, ends[is_apart]))
            ends[is_apart] += count
        self._lock = threading.Lock()
        # The operands and scratch that the block holds the addresses of; None: it is being written.
        self._packed: tuple[tuple[int, ...], int, int] | None = None

        self._memory = memory = (ctypes.c_char * (_ALIGNMENT + layout.size))()
        start = -ctypes.addressof(memory) % _ALIGNMENT
        base = ctypes.addressof(memory) + start
        values: dict[str, Any] = {**layout.zeros, **launch.values}
        for name, steps in strides.items():
            values.update(zip(layout.stride_names[name], steps, strict=True))
        self._params_at = start + layout.params_at
        layout.params.pack_into(memory, self._params_at, *layout.values_of(values))
        layout.pointers.pack_into(
            memory, start + layout.pointers_at, *[base + offset for offset in layout.argument_offsets]
        )
        dims = [operand.shape(shape, plan.problem) for operand in plan.operands]
        self._maps = []
        at = start
        for operand, tensor_map in layout.maps:
            steps = strides[tensor_map.name]
            self._maps.append((operand, _TensorMap(plan, tensor_map, dims[operand], steps, memory, at)))
            at += _MAP_BYTES
        self._pack, self._pick = layout.pack_addresses, layout.pick
        self._launches: list[partial[None]] = []  # each takes the stream
        for entry, function, grid, at in zip(
            plan.entry_points, kernel.functions, launch.grids, layout.first_pointers, strict=True
        ):
            if 0 in grid:
                continue
            if entry.starts_early:
                what = (kernel, entry, function, grid, base + at)
                self._launches.append(partial(_launch_early, *what))
            else:
                sizes = (*grid, entry.num_threads, entry.shared_memory_bytes)
                self._launches.append(partial(_launch, kernel, entry.symbol, function, *sizes, base + at))

    def __call__(self, operands: tuple[int, ...], scratch: int, stream: int, cleared: int = 0) -> None:
        """Launch on the CUstream with handle `stream`, in the current context.

        operands  addresses of the plan's operands: multiples of 16 bytes, and 0 for an optional one that is missing.
        scratch   address of `scratch_bytes` bytes that no other launch in flight uses; any number if there are none.
        cleared   of `cleared_bytes` bytes likewise.

        Raises Fa2GenError with the driver's reason.
        """
        handle = _stream(stream)
        with self._lock:
            if (operands, scratch, cleared) != self._packed:  # an allocator gives the same ones in turn: 0.4 us less
                self._packed = None
                bases = (scratch, cleared)
                addresses = (*operands, *[bases[is_apart] + at for is_apart, at in self._scratch_at])
                for index, tensor_map in self._maps:
                    if addresses[index] != tensor_map.address:
                        tensor_map.point_to(addresses[index])
                self._pack(self._memory, self._params_at, *self._pick(addresses))
                self._packed = operands, scratch, cleared
            for launch in self._launches:
                launch(handle)


def _launch(
    kernel: Kernel,
    symbol: str,
    function: Any,
    gx: int,
    gy: int,
    gz: int,
    threads: int,
    shared: int,
    pointers: int,
    stream: Any,
) -> None:
    """cuLaunchKernel, also in a thread that has not touched CUDA yet. Raises Fa2GenError with the driver's reason."""
    (result,) = driver.cuLaunchKernel(function, gx, gy, gz, threads, 1, 1, shared, stream, pointers, 0)
    if result == _SUCCESS:
        return
    if result == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
        kernel._device.set_current()
        (result,) = driver.cuLaunchKernel(function, gx, gy, gz, threads, 1, 1, shared, stream, pointers, 0)
    _checked(_launch_text(symbol, (gx, gy, gz), threads, shared), (result,))


def _early_config(entry: EntryPoint) -> Any:
    """What cuLaunchKernelEx takes for a kernel that may start before the one before has ended, but for grid and stream.

    Made once a kernel: it takes 20 microseconds.
    """
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.blockDimX, config.blockDimY, config.blockDimZ = entry.num_threads, 1, 1
    config.sharedMemBytes = entry.shared_memory_bytes
    config.attrs = [attribute]
    config.numAttrs = 1
    return config


def _launch_early(
    kernel: Kernel,
    entry: EntryPoint,
    function: Any,
    grid: tuple[int, int, int],
    pointers: int,
    stream: Any,
) -> None:
    """cuLaunchKernelEx behind another launch, which has seen to the context. Captured, it becomes a programmatic edge.

    Raises Fa2GenError with the driver's reason.
    """
    with kernel.early_lock:
        config = kernel.early_configs[entry.symbol]
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.hStream = stream
        result = driver.cuLaunchKernelEx(config, function, pointers, 0)
    if result[0] != _SUCCESS:
        _checked(_launch_text(entry.symbol, grid, entry.num_threads, entry.shared_memory_bytes), result)


def _launch_text(symbol: str, grid: tuple[int, int, int], threads: int, shared: int) -> str:
    return f"{symbol}: launch of {grid} x {threads} threads with {shared:,} B of shared memory"


class _TensorMap:
    """One tensor map of a launch: encoded in place, for one address after another; the rest of it never changes."""

    __slots__ = ("_constants", "_encoded", "_memory", "_offset", "_plan", "_sizes", "_tensor_map", "address")

    def __init__(
        self,
        plan: KernelPlan,
        tensor_map: TensorMapPlan,
        dims: tuple[int, ...],
        strides: Strides,
        memory: ctypes.Array[ctypes.c_char],
        offset: int,
    ) -> None:
        self.address = 0
        self._plan, self._tensor_map, self._memory, self._offset = plan, tensor_map, memory, offset
        self._encoded: dict[int, bytes] = {}
        batch, seqlen, heads, head_dim = dims
        batch_step, row_step, head_step = strides
        # Innermost first: (D, S, H, B). A dimension of one element may have any stride in torch, not in a tensor map.
        row_bytes = head_dim * ELEMENT_BYTES
        row_step = row_step * ELEMENT_BYTES if seqlen > 1 else row_bytes
        head_step = head_step * ELEMENT_BYTES if heads > 1 else row_bytes
        batch_step = batch_step * ELEMENT_BYTES if batch > 1 else row_bytes
        if (longest := max(row_step, head_step, batch_step)) > _MAX_STRIDE_BYTES:
            raise UnsupportedProblem(
                f"{tensor_map.name} has a stride of {longest:,} B; a tensor map holds less than 2^40 B; "
                "use a contiguous copy, or an SM80 kernel (arch='sm80')"
            )
        sizes: tuple[int, ...] = (seqlen, heads, batch)
        steps: Sequence[int] = (row_step, head_step, batch_step)
        if plan.varlen:
            sizes, steps = ragged_dimensions(heads, row_step, head_step)
        self._sizes = (ctypes.c_uint64 * (2 * len(sizes) + 1))(head_dim, *sizes, *steps)
        self._constants = _map_constants(tensor_map, plan.dtype, 1 + len(sizes))

    def point_to(self, address: int) -> None:
        """Encode for the tensor at `address`, or copy what was encoded for it before (0.1 us instead of 1)."""
        encoded = self._encoded.get(address)
        if encoded is None:
            destination = ctypes.addressof(self._memory) + self._offset
            sizes = ctypes.addressof(self._sizes)
            head, tail = self._constants
            rank = head[1]
            result = _encode_tiled()(destination, *head, address, sizes, sizes + 8 * rank, *tail)
            if result:
                self.address = 0
                dims, steps = tuple(self._sizes[:rank]), self._sizes[rank:]
                _checked(
                    f"{self._plan.name}: tensor map of {self._tensor_map.name}, innermost first {dims}, {steps} B "
                    f"apart, address {address:#x}",
                    (driver.CUresult(result),),
                )
            if len(self._encoded) >= _REMEMBERED_MAPS:
                self._encoded.clear()
            self._encoded[address] = ctypes.string_at(destination, _MAP_BYTES)
        else:
            _PACK_MAP(self._memory, self._offset, encoded)
        self.address = address


@cache
def _map_constants(tensor_map: TensorMapPlan, dtype: str, rank: int) -> tuple[tuple[int, int], tuple[Any, ...]]:
    """What cuTensorMapEncodeTiled takes before the address, and after the sizes and strides."""
    return (_DATA_TYPE[dtype], rank), (
        (ctypes.c_uint32 * rank)(tensor_map.box_cols, tensor_map.box_rows, *[1] * (rank - 2)),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        _SWIZZLE[tensor_map.swizzle_bytes],
        int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B),
        int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),  # zeros
    )


@cache
def _encode_tiled() -> Any:
    """The driver's cuTensorMapEncodeTiled, through ctypes.

    cuda.bindings encodes into an object of its own, which does not lie on the 64-byte grid that the driver asks for.
    """
    try:
        encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise Fa2GenError(f"the driver has no tensor maps (SM90 kernels need 12.0 or later): {error}") from error
    array = ctypes.c_void_p
    encode.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p),  # map, data type, rank, address
        *(array, array, array, array),  # sizes, strides, box, element strides
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int),  # interleave, swizzle, L2 promotion, fill
    )
    encode.restype = ctypes.c_int
    return encode


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

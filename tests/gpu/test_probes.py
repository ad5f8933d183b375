"""What the CPU's model of the machine does is what a GPU does, to the bit: the probes of tests/probes/ on both.

Integers in, and their sums out: nothing is rounded, so nothing may differ.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver
from machine_probes import Probe, differences, probes, run_on_cpu

from fa2gen import kernel as launcher
from fa2gen.compile import Unit, compile_unit
from fa2gen.cpu import find_compiler
from fa2gen.errors import Fa2GenError
from fa2gen.plan.base import EntryPoint


@functools.cache
def cubin(source: str, target: str) -> bytes:
    """Each text once."""
    return compile_unit(Unit("probe", source, target, {"shared_memory_bytes": 0})).cubin


def run_on_gpu(probe: Probe, target: str) -> list[Any]:
    """The tensors after a run on the current device: loaded, mapped and launched as kernels are."""
    before, _ = probe.case()
    tensors = [x.cuda() for x in before]
    entry = EntryPoint("probe", probe.num_threads, probe.shared_bytes, probe.tensor_maps, "one")
    plan = SimpleNamespace(
        name="probe",
        entry_points=(entry,),
        num_threads=entry.num_threads,
        shared_memory_bytes=entry.shared_memory_bytes,
        tensor_maps=entry.tensor_maps,
        params_format=probe.params_format,
    )
    kernel = launcher.Kernel(plan, cubin(probe.unit(target).source, target), torch.cuda.current_device())

    values = (
        tensors[probe.values[param.name]].data_ptr() if param.code == "Q" else probe.values[param.name]
        for param in probe.k.params
    )
    params = struct.pack(probe.params_format, *values)
    maps = len(entry.tensor_maps)
    memory = ctypes.create_string_buffer(128 * maps + len(params) + 64)
    start = -ctypes.addressof(memory) % 64
    base = ctypes.addressof(memory) + start
    for number, tensor_map in enumerate(entry.tensor_maps):
        tensor = tensors[int(tensor_map.name)]
        of_tensor = SimpleNamespace(name="probe", dtype=probe.k.dtype, varlen=False, paged=False)
        batch, rows, heads, columns = tensor.shape
        steps = (tensor.element_size() * tensor.stride(dim) for dim in (1, 2, 0))
        numbers = (ctypes.c_uint64 * 7)(columns, rows, heads, batch, *steps)
        encoded = launcher._TensorMap(of_tensor, tensor_map, number, base + 128 * number, numbers, 0)
        encoded.address.value = tensor.data_ptr()
        assert encoded.encode() == 0
    ctypes.memmove(base + 128 * maps, params, len(params))
    pointers = (ctypes.c_void_p * (maps + 1))(*(base + 128 * number for number in range(maps + 1)))
    stream = launcher._stream(torch.cuda.current_stream().cuda_stream)
    sizes = (1, 1, 1, entry.num_threads, 1, 1, entry.shared_memory_bytes)
    (result,) = driver.cuLaunchKernel(kernel.functions[0], *sizes, stream, ctypes.addressof(pointers), 0)
    assert result == driver.CUresult.CUDA_SUCCESS
    torch.cuda.synchronize()
    return [x.cpu() for x in tensors]


@functools.cache
def has_compiler() -> bool:
    try:
        return bool(find_compiler())
    except Fa2GenError:
        return False


def cases() -> list[Any]:
    return [pytest.param(probe, target, id=f"{probe.name}-{target}") for probe in probes() for target in probe.targets]


@pytest.mark.parametrize(("probe", "target"), cases())
def test_gpu_and_host_agree(probe, target):
    capability = torch.cuda.get_device_capability()
    if target != "sm_80" and capability != (9, 0):
        pytest.skip(f"compiled for {target}, and {torch.cuda.get_device_name()} is {capability}")
    if target == "sm_80" and capability[0] != 8:
        pytest.skip("its cubin loads on 8.x only; the one for sm_90 runs the same text")
    _, expected = probe.case()
    found = run_on_gpu(probe, target)
    assert not (wrong := differences(found, expected)), wrong
    if has_compiler():
        assert not (wrong := differences(found, run_on_cpu(probe))), wrong

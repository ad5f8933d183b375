"""The GPUs that torch sees, as the selector knows them."""

from __future__ import annotations

import functools
from importlib import import_module

from fa2gen.select import Device

__all__ = ["current_device", "device_at"]


def current_device() -> Device:
    """torch's current CUDA device."""
    return device_at(import_module("torch").cuda.current_device())


@functools.cache
def device_at(index: int) -> Device:
    """The CUDA device of that ordinal."""
    properties = import_module("torch").cuda.get_device_properties(index)
    return Device(
        name=properties.name,
        compute_capability=(properties.major, properties.minor),
        shared_memory_per_block=properties.shared_memory_per_block_optin,
        num_sms=properties.multi_processor_count,
    )

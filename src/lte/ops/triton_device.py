"""The properties of a device that the kernels need."""
# pyright: basic, reportAttributeAccessIssue=false

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton.language as tl


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU, or the CPU that runs Triton's interpreter.

    Attributes:
        multiprocessors: how many it has.
        shared_memory: bytes that one program may use.
        overlap: launch arguments for kernels that begin before the previous kernel ends (Hopper and later).
    """

    multiprocessors: int
    shared_memory: int
    overlap: dict[str, Any]


@cache
def device_info(device: torch.device) -> DeviceInfo:
    """Return the properties of a device. They are looked up once."""
    if device.type != "cuda":
        return DeviceInfo(4, 100_000, {"PDL": False})
    properties = torch.cuda.get_device_properties(device)
    overlaps = properties.major >= 9 and hasattr(tl.extra.cuda, "gdc_wait")  # Triton 3.4 and later
    overlap = {"PDL": True, "launch_pdl": True} if overlaps else {"PDL": False}
    return DeviceInfo(properties.multi_processor_count, properties.shared_memory_per_block_optin, overlap)

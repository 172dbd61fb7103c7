"""Clocks: calls timed in turn, and the machine's memory bandwidth, cache and free memory."""

import math
import os
import statistics
import time
from pathlib import Path

import torch

from lte.inference.graphs import Action

_SHORTEST_SAMPLE = 2e-3  # seconds; a shorter one would measure the start of a graph and the clock's resolution
_UNKNOWN_CACHE = 128 * 2**20


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(runs: dict[str, Action], device: torch.device, repeats: int = 20, seconds: float = 3.0) -> dict[str, float]:
    """Return the median seconds of one call of each run. The runs take turns, so the machine is the same for all.

    On CUDA the runs should be graph replays. Then only the GPU is timed, by events, without a wait in between.

    Args:
        repeats: number of samples of each run.
        seconds: the time after which to stop on a CPU, but not before three samples.
    """
    if device.type == "cuda":
        return _in_turn_cuda(runs, repeats)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    began = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - began > seconds:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def _in_turn_cuda(runs: dict[str, Action], repeats: int) -> dict[str, float]:
    def record() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    calls: dict[str, int] = {}
    for name, run in runs.items():
        run()
        begin = record()
        for _ in range(3):
            run()
        end = record()
        torch.cuda.synchronize()
        one = max(begin.elapsed_time(end) / 3e3, 1e-7)
        calls[name] = min(1000, max(1, math.ceil(_SHORTEST_SAMPLE / one)))
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            run()  # so that the caches are as a call of the same run leaves them
            begin = record()
            for _ in range(calls[name]):
                run()
            events[name].append((begin, record()))
    torch.cuda.synchronize()
    return {
        name: statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3 / calls[name]
        for name, pairs in events.items()
    }


def memory_bandwidth(device: torch.device) -> float:
    """Return GB/s (10^9) of memory: the faster of reading (a sum) and copying (read plus write)."""
    count = 2**28 if device.type == "cuda" else 2**26  # fp32: 1 GiB, 256 MiB
    count = min(count, available_memory(device) // 16)
    source = torch.empty(count, device=device).normal_()
    target = torch.empty_like(source)
    runs: dict[str, Action] = {"read": lambda: source.sum(), "copy": lambda: target.copy_(source)}
    seconds = in_turn(runs, device, repeats=10, seconds=2.0)
    size = source.numel() * source.itemsize
    return max(size / seconds["read"], 2 * size / seconds["copy"]) / 1e9


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last level of cache: L2 of a GPU, L3 of a CPU (128 MiB if it is unknown)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    for level in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/level"):
        size = (level.parent / "size").read_text().strip()
        if level.read_text().strip() == "3" and size.endswith("K"):
            return int(size[:-1]) * 1024
    return _UNKNOWN_CACHE


def available_memory(device: torch.device) -> int:
    """Return the number of bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

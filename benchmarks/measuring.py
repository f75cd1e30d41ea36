"""Times and memory that can be compared: taken in turn, of this process alone, times as ratios with their spread."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def clock(device: str) -> float:
    """Seconds: on a CPU those of this process alone, as other work shares the machine."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(ways: dict[str, Callable[[], object]], *, repetitions: int, device: str) -> dict[str, list[float]]:
    """Seconds of each way at each repetition, one after the other; one more goes ahead to warm up."""
    seconds = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            start = clock(device)
            way()
            if repetition > 0:
                seconds[name].append(clock(device) - start)
    return seconds


def quartiles(one: list[float], other: list[float]) -> list[float]:
    """First quartile, median and third quartile of the ratios."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive")


def cell(quartiles: list[float]) -> str:
    """Median and quartiles, as text."""
    return f"{quartiles[1]:.2f} ({quartiles[0]:.2f}-{quartiles[2]:.2f})"


def peak_mebibytes(run: Callable[[], object], *, device: str) -> float:
    """Memory that a run takes at its peak, above what was taken before; on a CPU that of the process, as Linux sees it."""
    if device == "cpu":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

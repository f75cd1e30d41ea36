"""Time and memory of this process. Alternatives take turns, so that their ratios can be compared."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def clock(device: str) -> float:
    """Return seconds: processor time on a CPU, which excludes other processes, and wall-clock time on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(ways: dict[str, Callable[[], object]], *, repetitions: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each alternative at each repetition. They run in turn, after one warm-up."""
    seconds = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            start = clock(device)
            way()
            if repetition > 0:
                seconds[name].append(clock(device) - start)
    return seconds


def quartiles(one: list[float], other: list[float]) -> list[float]:
    """Return first quartile, median and third quartile of the ratios."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive")


def cell(quartiles: list[float]) -> str:
    """Format median and quartiles."""
    return f"{quartiles[1]:.2f} ({quartiles[0]:.2f}-{quartiles[2]:.2f})"


def processor(device: str) -> str:
    """Return the name of the processor or card."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))


def peak_mebibytes(run: Callable[[], object], *, device: str) -> float:
    """Return the increase of memory at the peak of a run: of the process on a CPU (Linux), or of the GPU."""
    if device == "cpu":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # return free memory to the system
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
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

# SPDX-License-Identifier: Apache-2.0

"""Processes for tests: forked, so that nothing is imported again, and waited for within a bounded time."""

import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import datasets
import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from datasets.fingerprint import fingerprint_rng
from tqdm import tqdm


CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate_configs"
PATIENCE = 900  # seconds after which a process counts as hung: many times what it takes, for busy machines


def in_child(function, *args, said: str | int | None = None) -> int:
    """Run in a forked process; returns its id. Its output goes to `said`, a file or its descriptor."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        fingerprint_rng.seed()  # the parent would draw the same fingerprints, and read the caches of this child
        own_progress_locks()
        if said is not None:
            file = said if isinstance(said, int) else os.open(said, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)
        status = function(*args)
        status = status if isinstance(status, int) else 0
    except BaseException as error:
        for _ in range(2):
            with suppress(BaseException):  # the signal of a worker that died may raise here, once
                traceback.print_exception(error)
                break
    finally:
        os._exit(status)


def own_progress_locks() -> None:
    """
    Give the progress bars of a forked process a lock of their own. The parent's lock is shared with other children: if
    one is killed while it holds the lock, all others wait forever. Subclasses of `tqdm` may have locks, too.
    """
    lock, kinds = threading.RLock(), [tqdm]
    for kind in kinds:
        kinds += kind.__subclasses__()
        kind.set_lock(lock)


def start_ranks(output: Path, function, *args) -> list[int]:
    """Run in two processes of one distributed job, with torchrun's environment. Output goes to OUTPUT/rank-N.txt."""
    output.mkdir(exist_ok=True)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def run(rank: int):
        os.environ |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return function(*args)

    return [in_child(run, rank, said=str(output / f"rank-{rank}.txt")) for rank in range(2)]


def launch(engine: str, mixed_precision: str, output: Path, function, *args) -> None:
    """
    Run in two processes that must succeed, by Accelerate's launcher with the shipped config of an engine. The
    launcher's last step, which starts the processes, is replaced by a fork, so that nothing is imported again.
    """
    options = ["--config_file", CONFIGS / f"{engine}.yaml", "--num_processes", 2, "--mixed_precision", mixed_precision]
    launched = []
    with patch("torch.distributed.run.run", lambda _: launched.extend(start_ranks(output, function, *args))):
        launch_command(launch_command_parser().parse_args([str(option) for option in [*options, "script.py"]]))
    ends = [end_of(child) for child in launched]
    assert ends == [0, 0], [path.read_text(errors="replace")[-6000:] for path in output.glob("rank-*.txt")]


def join_engine(cache: Path) -> None:
    """In a process that was forked for an engine: reset the state of the parent, and use another cache of scores."""
    datasets.config.HF_DATASETS_CACHE = cache
    AcceleratorState._reset_state(reset_partial_state=True)
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would have to be compiled; gloo suffices


def leave_engine() -> None:
    """Destroy the process group after a barrier. A process that leaves too early can make the other one abort."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def wait_for(paths: list[Path]) -> None:
    """Wait until all of these files exist."""
    deadline = time.monotonic() + PATIENCE
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            pytest.fail(f"{paths} were not written")
        time.sleep(0.001)


def free_port() -> str:
    """A free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def kill(child: int) -> None:
    """Kill a process, and wait for its end."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def end_of(child: int) -> int:
    """Wait for a process; returns its status, as `waitpid` does."""
    deadline = time.monotonic() + PATIENCE
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGABRT)  # pytest's fault handler says where
            os.waitpid(child, 0)
            pytest.fail(f"a process hangs for {PATIENCE} seconds")
        time.sleep(0.02)
    return ended[1]


def finish(children: list[int]) -> None:
    """Wait for processes that must succeed."""
    assert [end_of(child) for child in children] == [0] * len(children)


def fails(function, *args) -> str:
    """Run in a process that must end with an error, by itself; returns its output."""
    status, text = outcome(function, *args)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0, text[-2000:]
    return text


def succeeds(function, *args) -> str:
    """Run in a process that must succeed; returns its output."""
    status, text = outcome(function, *args)
    assert status == 0, text[-6000:]
    return text


def outcome(function, *args) -> tuple[int, str]:
    """Run in a process; returns its status, as `waitpid` does, and its output with that of its children."""
    reader, writer = os.pipe()  # a file would be full, too, on a full disk
    child = in_child(function, *args, said=writer)
    os.close(writer)
    with open(reader, errors="replace") as pipe, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(pipe.read)
        return end_of(child), reading.result(PATIENCE)


def run_script(script: Path, folder: Path, *options) -> None:
    """In a child: run a script in a folder as from the command line, but with the modules imported so far."""
    os.chdir(folder)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.argv = [script.name, *map(str, options)]
    runpy.run_path(str(script), run_name="__main__")

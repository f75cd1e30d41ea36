# SPDX-License-Identifier: Apache-2.0

"""Deaths and disks for tests: processes that end at a random moment or byte, a disk that is full or cannot be written."""

import ctypes
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from tqdm import tqdm


NUM_FAULTS = int(os.environ.get("TRL_TFPO_FAULTS", 3))  # of each random test; `make test-reliability` asks for more
PATIENCE = 300  # seconds after which something counts as hung: many times what it takes, for machines with other work


def in_child(function, *args, said: str | int | None = None) -> int:
    """Run in a process of its own, forked so that nothing has to be imported again; what it says goes to a file. Its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        tqdm.set_lock(threading.RLock())  # its own is shared with other children, which are killed while they hold it
        if said is not None:
            file = said if isinstance(said, int) else os.open(said, os.O_WRONLY)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)
        status = function(*args)
        status = status if isinstance(status, int) else 0
    except BaseException as error:
        for _ in range(2):
            with suppress(BaseException):  # where a worker died, its signal may raise once more, in the middle of this
                traceback.print_exception(error)
                break
    finally:
        os._exit(status)


def wait_for(paths: list[Path]) -> None:
    """Until all of these files are there, within a bounded time."""
    deadline = time.monotonic() + PATIENCE
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            pytest.fail(f"{paths} do not come")
        time.sleep(0.001)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def end_of(child: int) -> int:
    """What `waitpid` says of it once it has ended, within a bounded time."""
    deadline = time.monotonic() + PATIENCE
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGABRT)  # pytest's fault handler says where
            os.waitpid(child, 0)
            pytest.fail(f"a process hangs for {PATIENCE} seconds")
        time.sleep(0.02)
    return ended[1]


def finish(children: list[int]) -> None:
    assert [end_of(child) for child in children] == [0] * len(children)


def fails(function, *args) -> str:
    """What a process says that must end with an error, by itself."""
    reader, writer = os.pipe()  # a file would be full, too
    child = in_child(function, *args, said=writer)
    os.close(writer)
    with open(reader, errors="replace") as pipe, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(pipe.read)
        status, text = end_of(child), reading.result(PATIENCE)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0, text[-2000:]
    return text


def strike(draw: random.Random, seconds: float, num_bytes: int, function, *args) -> bool:
    """
    Run in a process that dies at a random moment of so many seconds, or at a random byte of so many of a file that it
    writes. Whether it died.
    """
    if draw.random() < 0.5:
        child = in_child(function, *args)
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
    else:
        child = in_child(without_room, signal.SIG_DFL, draw.randint(1, num_bytes), function, *args, said=os.devnull)
    return os.WIFSIGNALED(end_of(child))


def without_room(action: signal.Handlers, num_bytes: int, function, *args):
    """
    In a child: no file grows beyond so many bytes. With `SIG_IGN` that is an error, as on a full disk; with `SIG_DFL` it
    is the death of the process.
    """
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    return function(*args)


def on_read_only(folder: Path, function, *args):
    """In a child: nothing can be written to a folder, by root either."""
    if os.geteuid() != 0:
        os.chmod(folder, 0o555)
        return function(*args)
    libc, path = ctypes.CDLL(None, use_errno=True), os.fsencode(folder)
    new_namespace, private, bind, read_only = 0x20000, 1 << 14 | 1 << 18, 1 << 12, 1 | 1 << 5 | 1 << 12
    if (
        libc.unshare(new_namespace)
        or libc.mount(None, b"/", None, private, None)
        or libc.mount(path, path, None, bind, None)
        or libc.mount(None, path, None, read_only, None)
    ):
        raise OSError(ctypes.get_errno(), "no folder can be made read-only here")
    return function(*args)

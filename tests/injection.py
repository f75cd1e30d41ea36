# SPDX-License-Identifier: Apache-2.0

"""Faults for tests: processes that end at a random moment or byte, and disks that are full or read-only."""

import ctypes
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

from processes import end_of, in_child


NUM_FAULTS = int(os.environ.get("TRL_TFPO_FAULTS", 3))  # of each random test; `make test-reliability` asks for more


def strike(draw: random.Random, seconds: float, num_bytes: int, function, *args) -> bool:
    """
    Call a function in a process that is killed at a random time within `seconds`, or at a random byte within the first
    `num_bytes` of a file that it writes. Return whether the process was killed before its end.
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
    In a child: call a function while no file can grow beyond `num_bytes`. With `SIG_IGN`, a longer write raises an
    error, as on a full disk; with `SIG_DFL`, it kills the process.
    """
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    return function(*args)


def on_read_only(folder: Path, function, *args):
    """In a child: call a function while a folder is read-only."""
    if os.geteuid() == 0:  # permissions do not stop root
        mount_read_only(folder)
    else:
        os.chmod(folder, 0o555)
    return function(*args)


def mount_read_only(folder: Path) -> None:
    """Mount a folder on itself, read-only, for this process alone."""
    clone_newns = 0x20000  # CLONE_NEWNS of <sched.h>: a new mount namespace
    assert ctypes.CDLL(None).unshare(clone_newns) == 0
    for arguments in (["--make-rprivate", "/"], ["--bind", folder, folder], ["-o", "remount,bind,ro", folder]):
        subprocess.run(["mount", *arguments], check=True)

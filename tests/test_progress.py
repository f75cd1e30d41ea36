# SPDX-License-Identifier: Apache-2.0

"""Long work says how far it is, in a terminal and in a log."""

import io
import sys

import datasets
import pytest

from trl_tfpo.common import progress
from trl_tfpo.common.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are told to."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_where_there_is_no_terminal(clock, capsys):
    """A job that says nothing for an hour is killed; one that writes a line for each batch fills the disk."""
    with Progress(1000, "Annotating", "pairs") as shown:
        shown.update(200, is_skipped=True)  # from the cache
        for _ in range(100):
            clock[0] += 1
            shown.update(8)
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines[0] == "Annotating: 320 of 1,000 pairs (32%), about 01:25 left"  # 8 pairs in a second
    assert len(lines) == 100 // 15
    assert last == "Annotating: 1,000 of 1,000 pairs (100%), took 01:40"


def test_what_is_quick_or_unwanted_is_silent(clock, capsys):
    """Lines of tasks that took a second would hide what matters, and `disable_progress_bars` is meant for all."""
    with Progress(10, "Quick", "pairs") as shown:
        shown.update(10)
    with Progress(10, "Elsewhere", "pairs", is_shown=False) as shown:
        clock[0] += 100
        shown.update(5)
    datasets.disable_progress_bars()
    try:
        with Progress(10, "Unwanted", "pairs") as shown:
            clock[0] += 100
            shown.update(5)
    finally:
        datasets.enable_progress_bars()
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_bar_in_a_terminal(clock, monkeypatch):
    """In a terminal it moves with every part of a batch, and there are no lines."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(4, "Annotating", "pairs") as shown:
        shown.bar.mininterval, seen = 0, []
        for _ in range(8):
            clock[0] += 100
            shown.update(0.5)
            seen.append(shown.bar.n)
    assert seen == [0, 1, 1, 2, 2, 3, 3, 4]
    said = sys.stderr.getvalue()
    assert "Annotating" in said and "3/4" in said and " of 4 pairs" not in said

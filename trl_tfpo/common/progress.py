# SPDX-License-Identifier: Apache-2.0

"""Progress of a long task: a bar in a terminal, occasional lines in a log."""

import sys
import time

import datasets
from datasets.utils import tqdm


LINE_SECONDS = 15.0  # between two lines


class Progress:
    """
    Context manager that shows the progress of a task on standard error.

    In a terminal, it shows a bar. Elsewhere, such as in a log, it prints a line at most every 15 seconds.
    `datasets.disable_progress_bars()` turns both off.

    Args:
        total (`int`):
            Number of units of work.
        desc (`str`):
            Name of the task.
        unit (`str`):
            Name of the units, plural.
        is_shown (`bool`, *optional*, defaults to `True`):
            Whether this process shows the progress.
    """

    def __init__(self, total: int, desc: str, unit: str, is_shown: bool = True) -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self.bar = tqdm(total=total, desc=desc, unit=f" {unit}", leave=False, disable=None if is_shown else True)
        self.has_lines = is_shown and not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
        self.done, self.skipped = 0.0, 0.0
        self.begin = self.last_line = time.monotonic()
        self.num_lines = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        if error_type is None and self.num_lines:
            self._print(f"took {tqdm.format_interval(time.monotonic() - self.begin)}")

    def update(self, amount: float, *, is_skipped: bool = False) -> None:
        """
        Add finished units.

        Args:
            amount (`float`):
                Number of units, possibly fractional.
            is_skipped (`bool`, *optional*, defaults to `False`):
                Whether an earlier run finished them. The estimate of the remaining time ignores such units.
        """
        self.done = min(self.done + amount, self.total)
        self.skipped += amount if is_skipped else 0
        self.bar.update(int(self.done + 1e-6) - self.bar.n)
        now = time.monotonic()
        if self.has_lines and now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            worked = self.done - self.skipped
            rest = (now - self.begin) * (self.total - self.done) / worked if worked > 0 else None
            self._print("" if rest is None else f"about {tqdm.format_interval(rest)} left")

    def _print(self, time_text: str) -> None:
        self.num_lines += 1
        done = f"{int(self.done + 1e-6):,} of {self.total:,} {self.unit} ({self.done / max(self.total, 1):.0%})"
        sys.stderr.write(f"{self.desc}: {', '.join(filter(None, [done, time_text]))}\n")
        sys.stderr.flush()

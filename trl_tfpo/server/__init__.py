# SPDX-License-Identifier: Apache-2.0

"""
An OpenAI-compatible server: one patient, some doctors, and for every request its own weights.

`Engine` decodes what many clients ask for in one batch; `make_app` puts it behind HTTP. `trl-tfpo serve` runs both.
"""

from .app import make_app
from .engine import Engine, Generation, Limits


__all__ = ["Engine", "Generation", "Limits", "make_app"]

# SPDX-License-Identifier: Apache-2.0

"""
An OpenAI-compatible server: one patient, several doctors, and exponents for each request.

[`Engine`] decodes the completions of many clients in one batch, and [`make_app`] makes its HTTP interface. `trl-tfpo
serve` runs both.
"""

from .app import make_app
from .engine import Engine, Limits
from .generation import Event, Generation, TokenScore


__all__ = ["Engine", "Event", "Generation", "Limits", "TokenScore", "make_app"]

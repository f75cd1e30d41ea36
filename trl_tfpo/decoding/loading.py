# SPDX-License-Identifier: Apache-2.0

"""Loading of saved doctors for guidance."""

import os
from typing import Any

from ..models.saved_doctor import load_doctor
from ..models.token_credits import load_credits
from .doctors import Doctor


def load_guiding_doctor(path: str | os.PathLike, **kwargs: Any) -> Doctor:
    """Load a doctor from a folder or the Hub, in eval mode, with its credits. `kwargs` are as in `from_pretrained`."""
    model = load_doctor(path, with_value_head=False, **kwargs).eval()
    return Doctor(model, credits=load_credits(path, **kwargs))

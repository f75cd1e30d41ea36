# SPDX-License-Identifier: Apache-2.0

"""
Lets Model Runner V2 run on a CPU, in each process with this folder in `PYTHONPATH`.

V2 needs Triton, whose stock build has no backend for CPUs. Triton's interpreter (`TRITON_INTERPRET=1`) runs its
kernels. vLLM looks for the backend when it is imported, and finds this stand-in.
"""

import contextlib
from types import SimpleNamespace


with contextlib.suppress(ImportError):
    from triton.backends import backends

    backends.setdefault("cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True)))

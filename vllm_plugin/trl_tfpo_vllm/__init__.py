# SPDX-License-Identifier: Apache-2.0

"""Doctors of trl-tfpo in vLLM: patient and doctors are one model, and each request has its own weights."""

from .config import guided_config


__all__ = ["guided_config"]
__version__ = "0.1.0"

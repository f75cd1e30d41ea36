# SPDX-License-Identifier: Apache-2.0

"""
The cache folder, with downloaded models and trained doctors.

```
SmolLM2-135M-Instruct/                    a patient
doctors/SmolLM2-135M-Instruct/cheerful/   a doctor for it
doctors/world/praise-200/                 a doctor of the controlled world, after 200 steps
```
"""

import os
from pathlib import Path


CONFIG_FILES = ("config.json", "adapter_config.json")  # one of them is in the folder of a model


def default_cache() -> Path:
    """Return the cache folder: `$TRL_TFPO_CACHE`, or `~/.cache/trl-tfpo`."""
    return Path(os.environ.get("TRL_TFPO_CACHE") or Path.home() / ".cache" / "trl-tfpo")


def doctors_folder(cache: Path, patient: str) -> Path:
    """Return the folder in the cache for doctors of a patient, given by its name or path."""
    return cache / "doctors" / Path(patient).resolve().name


def cached_models(cache: Path) -> tuple[Path, list[Path]] | None:
    """
    Return the folders of a patient and of its doctors in the cache, or `None` if no patient there has a doctor.

    If several patients have doctors, the first one in alphabetical order is returned.
    """
    for doctors in sorted((cache / "doctors").glob("*")):
        patient = cache / doctors.name
        saved = [path for path in sorted(doctors.glob("*")) if any((path / name).is_file() for name in CONFIG_FILES)]
        if saved and (patient / "config.json").is_file():
            return patient, saved
    return None

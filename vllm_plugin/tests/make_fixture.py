# SPDX-License-Identifier: Apache-2.0

"""
Store numbers of the main package, which the mixture here must give too. Run in the environment of trl-tfpo:

    python vllm_plugin/tests/make_fixture.py
"""

import json
import math
from pathlib import Path

import torch

from trl_tfpo.functional import guided_logps


WEIGHTS = {  # of the patient and of two doctors, one row for each token
    "product": [[1.0, 0.5, 0.25], [1.0, 1.5, 0.0]],
    "mixture": [[0.5, 0.3, 0.2], [0.0, 0.5, 0.5]],
    "away from a doctor": [[1.0, -0.5, 0.8], [1.5, 0.7, -1.2]],
    "against the patient": [[-0.5, 1.0, 1.0], [0.0, 1.0, -0.3]],
}


def make_cases() -> list[dict]:
    """Logits, weights and the guided log-probabilities of the main package."""
    torch.manual_seed(0)
    cases = []
    for name, rows in WEIGHTS.items():
        for is_masked in (False, True):
            logits = (2 * torch.randn(3, 2, 6, dtype=torch.float64)).round(decimals=3)  # models, tokens, vocabulary
            if is_masked:
                logits[0, :, 1] = logits[1, 0, 2] = logits[2, 1, 3] = -math.inf
            weights = torch.tensor(rows, dtype=torch.float64)
            expected = guided_logps(
                patient_logits=logits[0],
                doctor_logits=list(logits[1:]),
                alpha=weights[:, :1],
                beta=list(weights[:, 1:].T[:, :, None]),
            )
            cases.append(
                {
                    "name": f"{name}, masked" if is_masked else name,
                    "patient_logits": rows_of(logits[0]),
                    "doctor_logits": [rows_of(doctor) for doctor in logits[1:]],
                    "weights": rows,
                    "expected": rows_of(expected),
                }
            )
    return cases


def rows_of(tensor: torch.Tensor) -> list[list[float | None]]:
    """Rows (T, V) with None for minus infinity, which JSON does not have."""
    return [[None if x == -math.inf else round(x, 9) for x in row] for row in tensor.tolist()]


if __name__ == "__main__":
    path = Path(__file__).parent / "guided_logps.json"
    path.write_text(json.dumps(make_cases(), indent=1) + "\n", encoding="utf-8")

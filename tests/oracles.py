# SPDX-License-Identifier: Apache-2.0

"""The equations once more: plain Python floats and loops, sharing no code with the package."""

import math


def importance(gaps, temperature=1.0, floor=0.05):
    mean = sum(abs(gap) for gap in gaps) / len(gaps)
    return [math.tanh(abs(gap) / (mean + floor) / temperature) for gap in gaps]


def rewards(gaps, sign, direction, temperature, threshold, disagreement_weight=0.5):
    found = []
    for gap, size in zip(gaps, importance(gaps, temperature), strict=True):
        face = (gap > 0) - (gap < 0)
        agreement = face if face == sign else disagreement_weight * face
        value = {"label": sign, "faces": face, "agreement": agreement}[direction]
        found.append(value * size if size > threshold else 0.0)
    return found


def potential(token_rewards, policy_logps, log_values, reference_logps, temperature, weight):
    found, score, policy = [log_values[0]], 0.0, 0.0
    for reward, logp, log_value, reference in zip(
        token_rewards, policy_logps, log_values[1:], reference_logps, strict=True
    ):
        score += reward / temperature + weight * reference
        policy += logp
        found.append(score + log_value - policy)
    return found


def subtb(states, decay):
    total, weights = 0.0, 0.0
    for n in range(len(states)):
        for m in range(n):
            weight = decay ** (n - m - 1)  # 0.0 ** 0 is 1
            total += weight * (states[n] - states[m]) ** 2
            weights += weight
    return total / weights if weights else 0.0


def guided(patient, doctors, alpha, betas):
    """From probabilities to probabilities."""
    scores = [
        patient[token] ** alpha * math.prod(doctor[token] ** beta for doctor, beta in zip(doctors, betas, strict=True))
        for token in range(len(patient))
    ]
    return [score / sum(scores) for score in scores]

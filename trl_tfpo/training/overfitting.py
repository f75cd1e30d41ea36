# SPDX-License-Identifier: Apache-2.0

"""Warn of overfitting when held-out metrics get worse, and name the best step."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler


MIN_RISE = 0.01  # a smaller relative rise of the loss is noise
LOSS, ACCURACY = "_loss", "_rewards/accuracies"  # ends of the names of metrics


class WarnOfOverfitting(TrainerCallback):
    """
    Warn once in each training run when held-out metrics get worse, and name the best step.

    [`best_before_decline`] says when a metric gets worse. There is no warning with `load_best_model_at_end` or an
    `EarlyStoppingCallback` in `handler`. [`TFPOTrainer`] always adds this callback.
    """

    def __init__(self, handler: CallbackHandler) -> None:
        self.handler = handler
        self.is_active = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_active = state.is_world_process_zero and not args.load_best_model_at_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_active = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        stops = any(isinstance(callback, EarlyStoppingCallback) for callback in self.handler.callbacks)
        if not self.is_active or stops or metrics is None:
            return
        for name in metrics:
            if not name.endswith((LOSS, ACCURACY)):
                continue
            values = {entry["step"]: entry[name] for entry in state.log_history if name in entry}
            prefix = name.removesuffix(LOSS).removesuffix(ACCURACY)
            num_pairs = metrics.get(f"{prefix}_runtime", 0) * metrics.get(f"{prefix}_samples_per_second", 0)
            best = best_before_decline(list(values.values()), num_pairs=num_pairs if name.endswith(ACCURACY) else None)
            if best is not None:
                self.is_active = False
                step, *since = list(values)[best:]
                warnings.warn(
                    f"Held-out metrics get worse: `{name}` was best at step {step} ({values[step]:.4g}), and then "
                    f"{', '.join(f'{values[x]:.4g}' for x in since)} (steps {', '.join(map(str, since))}). Train for "
                    "fewer epochs, stop early with `EarlyStoppingCallback`, or keep the best doctor with "
                    f"`load_best_model_at_end=True` and `metric_for_best_model={name!r}`."
                )
                return


def best_before_decline(values: Sequence[float], *, num_pairs: float | None) -> int | None:
    """
    Index of the best evaluation if a metric gets worse, otherwise `None`.

    It gets worse if each of the last two evaluations is worse than the one before, and the last is worse than the best
    by more than noise: 1% of a loss, or one standard error of an accuracy.

    Args:
        values (`Sequence[float]`):
            Loss or accuracy of each evaluation.
        num_pairs (`float`, *optional*):
            Number of held-out pairs, for accuracies. `None` for losses.
    """
    losses = list(values) if num_pairs is None else [-value for value in values]
    if len(losses) < 3:
        return None
    best = min(range(len(losses)), key=losses.__getitem__)
    noise = MIN_RISE * abs(losses[best])
    if num_pairs is not None:
        noise = math.sqrt(values[best] * (1 - values[best]) / max(num_pairs, 1))
    is_worse = losses[-3] < losses[-2] < losses[-1] and losses[-1] > losses[best] + noise
    return best if is_worse else None

# SPDX-License-Identifier: Apache-2.0

"""What held-out pairs say while a doctor is trained."""

import math
import warnings
from collections.abc import Sequence

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler


MIN_RISE = 0.01  # share of the best loss, below which a rise is noise
FLOW_LOSS, ACCURACY = "_loss", "_rewards/accuracies"  # ends of the names of metrics


class WarnWhenHeldOutTurns(TrainerCallback):
    """
    Warns once in a training that held-out pairs get worse: the flow loss has risen, or the share of pairs that the doctor gets
    right has fallen, in the last two evaluations, each time, and is beyond the best by 1% or one standard error.

    Silent where the best model is loaded at the end, or an `EarlyStoppingCallback` stops. [`TFPOTrainer`] adds it by itself.

    Args:
        handler ([`~transformers.trainer_callback.CallbackHandler`]):
            Of the trainer; knows the other callbacks.
    """

    def __init__(self, handler: CallbackHandler):
        self.handler = handler
        self.watches = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.watches = state.is_world_process_zero and not args.load_best_model_at_end

    def on_train_end(self, args, state, control, **kwargs):
        self.watches = False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        stops = any(isinstance(callback, EarlyStoppingCallback) for callback in self.handler.callbacks)
        if not self.watches or stops:
            return
        for name in metrics or {}:
            if not name.endswith((FLOW_LOSS, ACCURACY)):
                continue
            values = {entry["step"]: entry[name] for entry in state.log_history if name in entry}
            prefix = name.removesuffix(FLOW_LOSS).removesuffix(ACCURACY)
            num_pairs = metrics.get(f"{prefix}_runtime", 0) * metrics.get(f"{prefix}_samples_per_second", 0)
            best = turned(list(values.values()), num_pairs=num_pairs if name.endswith(ACCURACY) else None)
            if best is not None:
                self.watches = False
                step, *since = list(values)[best:]
                warnings.warn(
                    f"Held-out pairs get worse: `{name}` was best at step {step} ({values[step]:.4g}); since then it was "
                    f"{', '.join(f'{values[x]:.4g}' for x in since)} (steps {', '.join(map(str, since))}). Train for fewer "
                    "passes; or keep the best doctor by `load_best_model_at_end=True` with "
                    f"`metric_for_best_model={name!r}`, and stop by `EarlyStoppingCallback`."
                )
                return


def turned(values: Sequence[float], *, num_pairs: float | None) -> int | None:
    """
    Where the best of some evaluations is, if the last two each got worse, and the last is worse than the best by more than noise.

    Args:
        values (`Sequence[float]`):
            One for each evaluation.
        num_pairs (`float`, *optional*):
            Pairs of which these are shares, of which more is better; noise is then one standard error. None of a loss, of which
            less is better; noise is then 1%.

    Returns:
        `int` or `None`: its index.
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

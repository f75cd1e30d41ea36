# SPDX-License-Identifier: Apache-2.0

"""
Arguments as users write them: types of all settings are checked in one place, and an unknown name is answered with
what to use instead.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import numbers
import os
import re
import types
import typing
from collections.abc import Callable
from enum import Enum


PACKING = "`train_sampling_strategy='group_by_length'` makes batches with little padding (sequences are not packed)"
REFERENCE = "the reference is the doctor before training, or with `policy='guided'` the patient; `reference_weight` is its exponent"
CUT = "`max_length` limits prompt and completion together; completions are cut at the end, prompts never"
GENERATION = "nothing is generated in training; `LogGuidedCompletionsCallback` shows guided completions"
OBJECTIVE = "`TFPOTrainer(objective=...)` takes another loss"
OF_TRAINER = "pass it to `TFPOTrainer`"
INSTEAD = {  # of arguments of TRL's trainers and configs, and of transformers' Trainer
    "beta": "`reward_temperature` is its counterpart in training; the strength of guidance is `beta` of "
    "`DoctorGuidedLogitsProcessor`",
    "compute_loss_func": OBJECTIVE,
    "dataset_num_proc": "several processes of `accelerate launch` share the annotation",
    "f_divergence_type": OBJECTIVE,
    "faces": OF_TRAINER,
    "formatting_func": "map the dataset to `prompt`, `chosen` and `rejected` beforehand",
    "generate_during_eval": GENERATION,
    "label_smoothing": "`disagreement_weight` says how far a label that the faces contradict counts",
    "log_completions": GENERATION,
    "loss_type": OBJECTIVE,
    "max_completion_length": CUT,
    "max_prompt_length": CUT + ". `drop_unusable=True` leaves out pairs whose prompt is too long",
    "max_seq_length": CUT,
    "model_init": "make a new trainer for each trial, with the model by name",
    "objective": OF_TRAINER,
    "optimizer_cls_and_kwargs": "`optimizers` takes an optimizer and a scheduler, `args.optim` a name",
    "packing": PACKING,
    "pad_token": "set `processing_class.pad_token`",
    "padding_free": PACKING,
    "patient_model": OF_TRAINER,
    "peft_config": OF_TRAINER,
    "precompute_ref_batch_size": "`scoring_batch_size`",
    "precompute_ref_log_probs": "they always are with `policy='doctor'`, and never with another policy",
    "preprocess_logits_for_metrics": "there are no predictions of single tokens; `evaluate` and `predict` return metrics",
    "ref_adapter_name": REFERENCE,
    "ref_model": REFERENCE,
    "ref_model_init_kwargs": REFERENCE,
    "reference_free": "`reference_weight=0`",
    "reward_fn": OF_TRAINER,
    "reward_funcs": "rewards are those of the two faces; `TFPOTrainer(reward_fn=...)` takes another rule",
    "sync_ref_model": REFERENCE + ". It stays as it is in training",
    "tokenizer": "`processing_class`",
    "truncation_mode": CUT,
    "use_vllm": GENERATION,
}
# Fields of `TrainingArguments` that take more than their annotation says, or get more from its parser
BEYOND_ANNOTATION = {"accelerator_config", "debug", "fsdp", "resume_from_checkpoint"}


def explains_unknown(cls: type | None = None, *, settings: type | None = None) -> Callable | type:
    """
    Class decorator: an unknown keyword argument raises a `TypeError` that says what to use instead.

    Args:
        cls (`type`):
            The class.
        settings (`type`, *optional*):
            A dataclass whose fields users may have passed to the class itself.

    Returns:
        `type`: the class, with the same signature.
    """
    if cls is None:
        return functools.partial(explains_unknown, settings=settings)
    init = cls.__init__
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        for name in kwargs.keys() - known.keys():
            if settings is not None and name in settings.__dataclass_fields__:
                hint = f"It is a field of `{settings.__name__}`: pass `args={settings.__name__}(..., {name}=...)`."
            else:
                hint = instead_of(name, known)
            raise TypeError(f"`{cls.__name__}` has no argument `{name}`. {hint or 'Leave it out.'}")
        init(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


def instead_of(name: str, known: typing.Iterable[str]) -> str:
    """What to use instead of an argument that there is not: a known replacement, or the nearest name; may be empty."""
    if name in INSTEAD:
        return f"Instead: {INSTEAD[name]}."
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean `{nearest[0]}`?" if nearest else ""


def check_counts(**counts: int | None) -> None:
    """Raise `ValueError` unless each of the named counts is at least 1, or `None`."""
    for name, value in counts.items():
        if value is not None and not value >= 1:
            raise ValueError(f"`{name}` must be at least 1. Got {value}; leave it out for the default.")


def check_types(settings: object) -> None:
    """
    Check every field of a dataclass against its annotation.

    Configuration files and sweeps pass whatever was written, and most of it would be noticed late or never. A whole
    number counts as a float and 2.0 as a whole number, 0 and 1 as booleans, a path or a number as a text, and a single
    text as a list of texts. Objects that a file cannot hold are left to whoever uses them, and so is the default of a
    field.

    Args:
        settings (dataclass instance):
            What is checked.

    Raises:
        `ValueError`: when a value is not of the type of its field, or a text where a dictionary belongs is not JSON.
    """
    hints = {}
    for cls in reversed(type(settings).__mro__):
        with contextlib.suppress(NameError):  # of names that a subclass imports for type checkers only
            hints |= typing.get_type_hints(cls)
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name, None), hints.get(field.name, typing.Any)
        if value is field.default or field.name in BEYOND_ANNOTATION:
            continue
        if not _fits(value, hint):
            value = _meant(value, hint)
            if value is None:
                value = getattr(settings, field.name)
                raise ValueError(
                    f"`{field.name}` must be {_describe(hint)}. Got {value!r} ({type(value).__name__}); "
                    f"{_remedy(value, hint)}."
                )
            setattr(settings, field.name, value)
        if isinstance(value, str) and field.name.endswith("_kwargs"):
            try:
                is_mapping = isinstance(json.loads(value), dict)
            except ValueError:
                is_mapping = False
            if not is_mapping:
                raise ValueError(
                    f"`{field.name}` must be a dictionary, or one in JSON. Got {value!r}; write it like "
                    f"'{{\"name\": 1}}'."
                )


def _fits(value: object, hint: object) -> bool:
    """Whether a value is of the annotated type; of what no configuration file holds, always."""
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is typing.Literal:
        return value in arguments
    if value is None or hint is type(None):
        return value is None and hint in (None, type(None), typing.Any)
    if hint is typing.Any or not isinstance(value, (bool, numbers.Real, str, os.PathLike, list, tuple, dict)):
        return True
    hint = origin or hint
    if not isinstance(hint, type):
        return True
    if issubclass(hint, Enum):
        return isinstance(value, hint) or value in [member.value for member in hint]
    if hint is bool:
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, (str, os.PathLike))
    if hint in (list, tuple):
        of = arguments[0] if arguments else typing.Any
        if isinstance(value, str):
            return of in (str, typing.Any)
        return isinstance(value, (list, tuple)) and all(_fits(one, of) for one in value)
    return isinstance(value, hint)


def _meant(value: object, hint: object) -> int | str | None:
    """The value of the annotated type that a number stands for: a whole number for 2.0, a text for 2024. None for others."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    accepted = {hint, *typing.get_args(hint)}
    if int in accepted and float(value).is_integer():
        return int(value)
    return str(value) if str in accepted else None


def _describe(hint: object) -> str:
    """A type in words."""
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        names = [_describe(part) for part in arguments if part is not type(None)]
        return " or ".join(dict.fromkeys(names))
    hint = origin or hint
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of its names"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a dictionary"}
    words |= {list: "a list", tuple: "a list"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _remedy(value: object, hint: object) -> str:
    """What to do about a value of another type."""
    if value is None:
        return "leave it out for the default"
    if isinstance(value, str):
        is_power = re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value) is not None
        return (
            "write it as `1.0e-8` is written, as YAML reads `1e-8` as a text"
            if is_power
            else "write it without quotes"
        )
    if isinstance(value, bool):
        return "write it in quotes, as YAML reads `yes`, `no`, `on` and `off` as true and false"
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return "write it without brackets"
    if _fits(str(value), hint):
        return "write it in quotes"
    return "correct it, or leave it out for the default"

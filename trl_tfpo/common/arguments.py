# SPDX-License-Identifier: Apache-2.0

"""Checks of arguments: types of settings, and replacements for arguments of other trainers."""

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
from typing import TYPE_CHECKING, Any, TypeVar


if TYPE_CHECKING:
    from _typeshed import DataclassInstance


T = TypeVar("T")

PACKING = "`train_sampling_strategy='group_by_length'` reduces padding (sequences are not packed)"
REFERENCE = (
    "the reference is the doctor before training, or the patient with `policy='guided'`; `reference_weight` is its "
    "exponent"
)
TRUNCATION = "`max_length` limits prompt and completion together; completions are truncated at the end, prompts never"
GENERATION = "nothing is generated in training; `LogGuidedCompletionsCallback` shows guided completions"
OBJECTIVE = "`TFPOTrainer(objective=...)` takes another loss"
TRAINER_ARGUMENT = "pass it to `TFPOTrainer`"
REPLACEMENTS = {  # for arguments of TRL's trainers and configs, and of transformers' Trainer
    "beta": "`reward_temperature` has this role in training; the strength of guidance is `beta` of "
    "`DoctorGuidedLogitsProcessor`",
    "compute_loss_func": OBJECTIVE,
    "dataset_num_proc": "`accelerate launch` divides the annotation among several processes",
    "f_divergence_type": OBJECTIVE,
    "faces": TRAINER_ARGUMENT,
    "formatting_func": "map the dataset to `prompt`, `chosen` and `rejected` beforehand",
    "generate_during_eval": GENERATION,
    "label_smoothing": "`disagreement_weight` reduces rewards that contradict the label",
    "log_completions": GENERATION,
    "loss_type": OBJECTIVE,
    "max_completion_length": TRUNCATION,
    "max_prompt_length": TRUNCATION + ". `drop_unusable=True` drops pairs whose prompt is too long",
    "max_seq_length": TRUNCATION,
    "model_init": "create a new trainer for each trial, with the name of the model",
    "objective": TRAINER_ARGUMENT,
    "optimizer_cls_and_kwargs": "`optimizers` takes an optimizer and a scheduler, `args.optim` a name",
    "packing": PACKING,
    "pad_token": "set `processing_class.pad_token`",
    "padding_free": PACKING,
    "patient_model": TRAINER_ARGUMENT,
    "peft_config": TRAINER_ARGUMENT,
    "precompute_ref_batch_size": "`scoring_batch_size`",
    "precompute_ref_log_probs": "reference log-probabilities are always precomputed with `policy='doctor'` (unless "
    "`reference_weight=0`), and never with other policies",
    "preprocess_logits_for_metrics": "logits are not kept; `evaluate` and `predict` return metrics",
    "ref_adapter_name": REFERENCE,
    "ref_model": REFERENCE,
    "ref_model_init_kwargs": REFERENCE,
    "reference_free": "`reference_weight=0`",
    "reward_fn": TRAINER_ARGUMENT,
    "reward_funcs": "rewards come from the two faces; `TFPOTrainer(reward_fn=...)` takes another rule",
    "sync_ref_model": REFERENCE + ". The reference does not change in training",
    "tokenizer": "`processing_class`",
    "truncation_mode": TRUNCATION,
    "use_vllm": GENERATION,
}
# Fields of `TrainingArguments` that accept types other than their annotation
UNCHECKED_FIELDS = {"accelerator_config", "debug", "fsdp", "resume_from_checkpoint"}


def explains_unknown(*, settings: type | None = None) -> Callable[[type[T]], type[T]]:
    """
    Class decorator: an unknown keyword argument raises a `TypeError` that names its replacement.

    Args:
        settings (`type`, *optional*):
            A dataclass whose fields users may pass to the class by mistake.
    """
    return functools.partial(_explain_unknown_arguments, settings=settings)


def _explain_unknown_arguments(cls: type[T], settings: type | None) -> type[T]:
    init: Callable[..., None] = vars(cls)["__init__"]
    known = inspect.signature(init).parameters
    fields = set() if settings is None else {field.name for field in dataclasses.fields(settings)}

    @functools.wraps(init)
    def __init__(self: T, *args: object, **kwargs: object) -> None:
        for name in kwargs.keys() - known.keys():
            if settings is not None and name in fields:
                hint = f"It is a field of `{settings.__name__}`: pass `args={settings.__name__}(..., {name}=...)`."
            else:
                hint = suggest_replacement(name, known)
            raise TypeError(f"`{cls.__name__}` has no argument `{name}`. {hint or 'Leave it out.'}")
        init(self, *args, **kwargs)

    setattr(cls, "__init__", __init__)  # noqa: B010
    return cls


def suggest_replacement(name: str, known: typing.Iterable[str]) -> str:
    """Suggest a replacement, or a similar name, for an unknown argument. Return "" if there is none."""
    if name in REPLACEMENTS:
        return f"Instead: {REPLACEMENTS[name]}."
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean `{nearest[0]}`?" if nearest else ""


def check_counts(**counts: int | None) -> None:
    """Raise `ValueError` if a count is less than 1. `None` is allowed."""
    for name, value in counts.items():
        if value is not None and not value >= 1:
            raise ValueError(f"`{name}` must be at least 1. Got {value}; leave it out for the default.")


def check_types(settings: "DataclassInstance") -> None:
    """
    Check every field of a dataclass against its annotation.

    Values from configuration files and sweeps may have any type. These are accepted: an integer as a float, 2.0 as an
    integer, 0 and 1 as booleans, a path or a number as a string, a single string as a list of strings, and JSON as a
    dictionary. Objects that a file cannot contain, and the default of a field, are not checked.

    Raises:
        `ValueError`: if a value does not have the type of its field.
    """
    hints: dict[str, Any] = {}
    for cls in reversed(type(settings).__mro__):
        with contextlib.suppress(NameError):  # for names that are imported for type checkers only
            hints |= typing.get_type_hints(cls)
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name, None), hints.get(field.name, Any)
        if value is field.default or field.name in UNCHECKED_FIELDS:
            continue
        if not _has_type(value, hint):
            value = _convert(value, hint)
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
                    f"`{field.name}` must be a dictionary, or JSON of one. Got {value!r}; write it like "
                    "'{\"name\": 1}'."
                )


def _has_type(value: object, hint: Any) -> bool:
    """Whether a value has the annotated type. Always true for objects that a file cannot contain."""
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in arguments)
    if origin is typing.Literal:
        return value in arguments
    if value is None or hint is type(None):
        return value is None and hint in (None, type(None), Any)
    if hint is Any or not isinstance(value, (bool, numbers.Real, str, os.PathLike, list, tuple, dict)):
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
        of = arguments[0] if arguments else Any
        if isinstance(value, str):
            return of in (str, Any)
        return isinstance(value, (list, tuple)) and all(_has_type(one, of) for one in value)
    return isinstance(value, hint)


def _convert(value: object, hint: Any) -> int | str | None:
    """Convert a number to the annotated type: 2.0 to an integer, 2024 to a string. Return `None` for other values."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    accepted = {hint, *typing.get_args(hint)}
    if int in accepted and float(value).is_integer():
        return int(float(value))
    return str(value) if str in accepted else None


def _describe(hint: Any) -> str:
    """Name a type for an error text."""
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        names = [_describe(part) for part in arguments if part is not type(None)]
        return " or ".join(dict.fromkeys(names))
    hint = origin or hint
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"a name like {next(iter(hint)).value!r}"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "a dictionary"}
    words |= {list: "a list", tuple: "a list"}
    return words.get(hint, str(getattr(hint, "__name__", hint)))


def _remedy(value: object, hint: Any) -> str:
    """Suggest how to correct a value of another type."""
    if value is None:
        return "leave it out for the default"
    if isinstance(value, str):
        if re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value):
            return "write it like `1.0e-8`, because YAML reads `1e-8` as a string"
        if re.fullmatch(r"[+-]?[\d.]+([eE][+-]?\d+)?|true|false|yes|no|on|off|null", value, flags=re.IGNORECASE):
            return "write it without quotes"
    if isinstance(value, bool) and _has_type(str(value), hint):
        return "write it in quotes, because YAML reads `yes`, `no`, `on` and `off` as true and false"
    if isinstance(value, (list, tuple)) and len(value) == 1 and _has_type(value[0], hint):
        return "write it without brackets"
    if not isinstance(value, (str, list, tuple, dict)) and _has_type(str(value), hint):
        return "write it in quotes"
    return "correct it, or leave it out for the default"

# SPDX-License-Identifier: Apache-2.0

"""
Exponents that a doctor of guided flow was trained for. They distinguish it from a language model.

A doctor of guided flow is a ratio of two policies and generates no sensible text alone. Three marks identify it after
loading:

1. `config.guidance` in the config of a full model;
2. a record under `auto_mapping` in the config of an adapter. All loaders keep it;
3. rows of the head that add up to zero. Merging an adapter removes its config, but keeps this mark. A head with this
   mark alone raises an error.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..common._upstream import active_adapters, adapter_layers
from ..common.atomic import FORMAT, check_format
from ..common.language_model import LanguageModel, is_sharded, unwrap_peft
from .adapters import VALUE_HEAD, check_adapters
from .guidance_head import GuidanceHead
from .named_model import check_model_exists


if TYPE_CHECKING:
    from peft import PeftConfig

TRAINING_EXPONENTS = {"alpha": 1.0, "beta": 1.0}  # exponents of patient and doctor in training
EXPONENTS_FILE = "guidance.json"
RECORD = "trl_tfpo"  # key of our record in the `auto_mapping` of an adapter config
ZERO_SUM = 0.02  # threshold, relative to the sum of independent rows: above the rounding error of bfloat16
# For each head: the state of its weights, and whether their rows add up to zero
_ZERO_SUMS: WeakKeyDictionary[torch.nn.Module, tuple[tuple[int, int], bool]] = WeakKeyDictionary()


def trained_exponents(model: LanguageModel, adapters: Sequence[str] | None = None) -> dict[str, float]:
    """
    Exponents that a doctor of guided flow was trained for.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A language model, or a doctor of guided flow, before or after training.
        adapters (sequence of `str`, *optional*):
            Names of the adapters in use. Defaults to the active adapters.

    Returns:
        `dict[str, float]`: `alpha` of the patient and `beta` of the doctor; empty for a language model.

    Raises:
        `ValueError`: if the head belongs to guided flow but no exponents are recorded; if the head of an adapter is
            missing; if active adapters have different exponents; if the format version is not supported.
    """
    base, configs = unwrap_peft(model), getattr(model, "peft_config", None) or {}
    if adapters is None:
        adapters = active_adapters(adapter_layers(model))
    found = {name: _exponents_of_adapter(model, name) for name in adapters if name in configs}
    known = {name: exponents for name, exponents in found.items() if exponents is not None}
    if known:
        first = next(iter(known.values()))
        if any(exponents != first for exponents in known.values()):
            raise ValueError(
                f"Active adapters must be trained for the same exponents. Got {known}; activate only one."
            )
        return first
    guidance = getattr(base.config, "guidance", None)
    belongs_to_base = getattr(base, "guiding_adapter", None) not in configs  # rather than to an adapter
    if belongs_to_base and isinstance(guidance, dict) and guidance.keys() >= {"alpha", "beta"}:
        return {name: guidance[name] for name in ("alpha", "beta")}
    if _rows_add_up_to_zero(base, adapters):
        raise ValueError(
            "A doctor of guided flow must record the exponents that it was trained for. Got a head whose rows add up "
            "to zero, without a record: an adapter was merged, or the config belongs to another model. Set "
            '`model.config.guidance = {"alpha": 1.0, "beta": 1.0}`, or load the saved doctor with `load_doctor`.'
        )
    return {}


def check_is_language_model(model: LanguageModel, adapters: Sequence[str] | None = None) -> None:
    """
    Raise `ValueError` if a patient is a doctor of guided flow, or has an unsupported adapter.

    `adapters` are the names of the adapters in use, by default the active ones.
    """
    check_adapters(model, "The patient")
    if trained_exponents(model, adapters):
        raise ValueError(
            "The patient must be a language model. Got a doctor of guided flow, which is a ratio of two policies; "
            "pass the model that it guides. If the doctor is an adapter on the patient, disable it, or pass it to "
            "`DoctorGuidedLogitsProcessor` as `Doctor(model, adapter=NAME)`."
        )


def record_exponents(model: LanguageModel, exponents: dict[str, float]) -> None:
    """Record exponents in the configs of the active adapters; an empty record with `policy="doctor"`."""
    for name in active_adapters(adapter_layers(model)):
        config = _peft_config(model, name)
        config.task_type = config.task_type or "CAUSAL_LM"  # without a task type PEFT overwrites `auto_mapping`
        config.auto_mapping = {**(config.auto_mapping or {}), RECORD: {"format": FORMAT, **exponents}}


def save_exponents(model: LanguageModel, folder: str | os.PathLike) -> None:
    """Save the format version and the trained exponents of a doctor next to its weights."""
    contents = {"format": FORMAT} | trained_exponents(model)
    (Path(folder) / EXPONENTS_FILE).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def load_exponents(path: str | os.PathLike, **source: Any) -> dict[str, float] | None:
    """
    Load the exponents that a doctor was trained for, from its folder or Hub id.

    `source` may contain `revision`, `subfolder`, `cache_dir` and `token`, as for `from_pretrained`.

    Returns:
        `dict`: `alpha` and `beta`; empty for a doctor of `policy="doctor"`; `None` without a record.

    Raises:
        `ValueError`: if the folder does not exist, or its format is not supported.
    """
    check_model_exists(path)
    file = cached_file(path, EXPONENTS_FILE, _raise_exceptions_for_missing_entries=False, **source)
    if file is None:
        return None
    contents = json.loads(Path(file).read_text(encoding="utf-8"))
    check_format(contents.pop("format", FORMAT), f"The doctor in {str(path)!r}")
    return contents


@torch.no_grad()
def center_head(model: LanguageModel, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """
    Subtract the mean row from the head of a doctor of guided flow, in place.

    All logits of a state change by the same constant, which changes no probability.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The doctor. Without a `state_dict`, a sharded doctor is not changed.
        state_dict (`dict[str, torch.Tensor]`, *optional*):
            Gathered weights to change instead of those in the model.
    """
    if not trained_exponents(model) or (state_dict is None and is_sharded(model)):
        return
    head = _active_head(unwrap_peft(model), active_adapters(adapter_layers(model)))
    if isinstance(head, GuidanceHead):  # centered when it is saved
        return
    if state_dict is not None:
        names = [f"{name}.weight" for name, module in model.named_modules() if module is head]
        state_dict.update(
            {name: state_dict[name] - _mean_row(state_dict[name]) for name in names if name in state_dict}
        )
    elif (weight := _float_weight(head)) is not None:
        weight.sub_(_mean_row(weight))


def _peft_config(model: LanguageModel, name: str) -> "PeftConfig":
    return cast("PeftConfig", model.peft_config[name])


def _exponents_of_adapter(model: LanguageModel, name: str) -> dict[str, float] | None:
    """Exponents in an adapter config, or `None` if the adapter is not a doctor."""
    config = _peft_config(model, name)
    own_modules = set(getattr(config, "modules_to_save", None) or ())
    record = (config.auto_mapping or {}).get(RECORD)
    if record is None and VALUE_HEAD not in own_modules:
        return None
    heads = own_modules - {VALUE_HEAD}
    if record is None and heads:  # saved by an early version
        raise ValueError(
            f"The adapter {name!r} must record the exponents that it was trained for. Got no record, and the trained "
            f"modules {sorted(heads)}; load it with `load_doctor`, and save it again."
        )
    loaded = {
        path.rsplit(".", 1)[-1]
        for path, module in model.named_modules()
        if name in getattr(module, "modules_to_save", ())
    }
    if missing := heads - loaded:
        raise ValueError(
            f"The adapter {name!r} must be complete. Got no {sorted(missing)}: another loader, or a combination of "
            "adapters, omits them; load it with `load_doctor` or `PeftModel.from_pretrained`."
        )
    record = dict(record or {})
    check_format(record.pop("format", FORMAT), f"The adapter {name!r}")
    return record


def _active_head(base: PreTrainedModel, adapters: Sequence[str]) -> torch.nn.Module:
    """The language model head under these adapters."""
    head = base.get_output_embeddings()
    own = getattr(head, "modules_to_save", {})
    return next((own[name] for name in adapters if name in own), getattr(head, "original_module", head))


def _float_weight(head: torch.nn.Module) -> torch.Tensor | None:
    """Weights (V, H) of a head, or `None` if they are absent, quantized or sharded."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.device.type == "meta" or weight.dim() != 2 or not weight.numel():
        return None
    return weight if weight.is_floating_point() and weight.dtype.itemsize > 1 else None


def _mean_row(weight: torch.Tensor) -> torch.Tensor:
    """Mean row (H,) of a matrix, accumulated in at least float32."""
    return weight.mean(dim=0, dtype=torch.promote_types(weight.dtype, torch.float32)).to(weight.dtype)


@torch.no_grad()
def _rows_add_up_to_zero(base: PreTrainedModel, adapters: Sequence[str]) -> bool:
    """Whether the mean row of the head is much shorter than expected from independent rows."""
    head = _active_head(base, adapters)
    if is_sharded(base) or (weight := _float_weight(head)) is None:
        return False
    state, found = (weight.data_ptr(), weight._version), _ZERO_SUMS.get(head)
    if found is None or found[0] != state:
        num_rows, dtype = len(weight), torch.promote_types(weight.dtype, torch.float32)
        mean_length = weight.mean(dim=0, dtype=dtype).norm()
        root_mean_square = torch.linalg.vector_norm(weight, dtype=dtype) / num_rows**0.5
        is_zero = root_mean_square > 0 and mean_length * num_rows**0.5 <= ZERO_SUM * root_mean_square
        found = _ZERO_SUMS[head] = state, bool(is_zero)
    return found[1]

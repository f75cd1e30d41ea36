# SPDX-License-Identifier: Apache-2.0

"""
Marks that distinguish doctors of guided flow from language models, and checks of PEFT adapters.

A doctor of guided flow is a ratio of two policies. Alone it generates no sensible text. Three marks identify it after
loading:

1. `config.guidance` in the config of a full model;
2. a record under `auto_mapping` in the config of an adapter, which every way of loading keeps;
3. weights of the head whose rows add up to zero. This changes no probability. Merging an adapter removes its config,
   but keeps this mark. A head that has no other mark raises an error.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..common._upstream import active_adapters, adapter_layers
from ..common.atomic import FORMAT, check_format
from ..common.language_model import LanguageModel, is_sharded, unwrap_peft
from .guidance_head import GuidanceHead


if TYPE_CHECKING:
    from peft import PeftConfig

VALUE_HEAD = "value_head"
RECORD = "trl_tfpo"  # key of our record in the `auto_mapping` of an adapter's config
ZERO_SUM = 0.02  # threshold, relative to the sum of independent rows: above the rounding error of bfloat16
# For each head: the state of its weights, and whether their rows add up to zero
_ZERO_SUMS: WeakKeyDictionary[torch.nn.Module, tuple[tuple[int, int], bool]] = WeakKeyDictionary()


def check_adapters(model: LanguageModel, name: str = "A doctor") -> None:
    """
    Check that all adapters change weights only, and that each of them can be switched off.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        name (`str`, *optional*, defaults to `"A doctor"`):
            Name of the model in messages.

    Raises:
        `ValueError`: for prompt learning, activated LoRA, and adapters whose layers cannot be switched off.
    """
    configs = getattr(model, "peft_config", None) or {}
    switchable = {
        adapter
        for layer in (adapter_layers(model) if configs else [])
        for attribute in getattr(layer, "adapter_layer_names", ())
        if hasattr(getattr(layer, attribute, None), "keys")
        for adapter in getattr(layer, attribute)
    }
    for adapter, config in configs.items():
        reason = why_unreadable(config)
        if reason is None and adapter not in switchable:
            reason = "Its layers cannot be switched on and off"
        if reason:
            raise ValueError(
                f"{name} may have adapters of its weights only, such as LoRA. Got the adapter {adapter!r}, a "
                f"{type(config).__name__}. {reason}; load the model without it."
            )


def why_unreadable(config: "PeftConfig") -> str | None:
    """Reason why an adapter with this config is not supported in doctors and patients, or `None`."""
    if config.is_prompt_learning or config.is_adaption_prompt:
        return "Prompt learning adds tokens that patient and decoding do not see"
    if getattr(config, "alora_invocation_tokens", None):
        return "Activated LoRA depends on invocation tokens in the input, which are absent when single tokens are read"
    return None


def check_speaks(model: LanguageModel, adapters: Sequence[str] | None = None) -> None:
    """
    Check that a patient is a language model rather than a doctor of guided flow.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The patient.
        adapters (sequence of `str`, *optional*):
            Names of the adapters that are used. Defaults to the active adapters.

    Raises:
        `ValueError`: if an adapter is not supported, see [`check_adapters`], or the model is a doctor of guided flow.
    """
    check_adapters(model, "The patient")
    if trained_exponents(model, adapters):
        raise ValueError(
            "The patient must be a language model. Got a doctor of guided flow, which is a ratio of two policies; "
            "pass the model that it guides. If the doctor is an adapter on the patient, pass it to the guide as "
            "`Doctor(model, adapter=NAME)`, or switch it off."
        )


def trained_exponents(model: LanguageModel, adapters: Sequence[str] | None = None) -> dict[str, float]:
    """
    Exponents that a doctor was trained for: `alpha` of the patient and `beta` of the doctor.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A language model, or a doctor of guided flow.
        adapters (sequence of `str`, *optional*):
            Names of the adapters that are used. Defaults to the active adapters.

    Returns:
        `dict[str, float]`: the exponents; empty for a language model.

    Raises:
        `ValueError`: if the head is marked but the exponents are unknown; if the head of an adapter is missing; if
            adapters have different exponents; if the format is not supported.
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
                f"Adapters that are active together must be trained for the same exponents. Got {known}; activate one."
            )
        return first
    guidance = getattr(base.config, "guidance", None)
    is_about_base = getattr(base, "guiding_adapter", None) not in configs
    # Otherwise the record in the config of the base model is about one of the adapters
    if is_about_base and isinstance(guidance, dict) and guidance.keys() >= {"alpha", "beta"}:
        return {name: guidance[name] for name in ("alpha", "beta")}
    if _rows_add_up_to_zero(base, adapters):
        raise ValueError(
            "A doctor of guided flow must have a record of the exponents that it was trained for. Got a head whose "
            "rows add up to zero, without a record: PEFT merged an adapter, or the config is that of another model. "
            'Set `model.config.guidance = {"alpha": 1.0, "beta": 1.0}`, or load the saved doctor with `load_doctor`.'
        )
    return {}


def record_exponents(model: LanguageModel, exponents: dict[str, float]) -> None:
    """
    Record the exponents that the active adapters are trained for, in their configs.

    Args:
        model ([`~peft.PeftModel`]):
            The doctor.
        exponents (`dict[str, float]`):
            `alpha` and `beta`; empty for a doctor with a policy of its own.
    """
    for name in active_adapters(adapter_layers(model)):
        config = _peft_config(model, name)
        config.task_type = config.task_type or "CAUSAL_LM"  # without a task type PEFT would overwrite `auto_mapping`
        config.auto_mapping = {**(config.auto_mapping or {}), RECORD: {"format": FORMAT, **exponents}}


@torch.no_grad()
def center_head(model: LanguageModel, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """
    Shift the language model head of a doctor of guided flow so that its rows add up to zero, in place.

    All logits of a position change by the same number, so no probability changes.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The doctor. A sharded doctor is changed only with a `state_dict`.
        state_dict (`dict[str, torch.Tensor]`, *optional*):
            Gathered weights of the doctor, which are changed instead of the model.
    """
    if not trained_exponents(model) or (state_dict is None and is_sharded(model)):
        return
    head = _active_head(unwrap_peft(model), active_adapters(adapter_layers(model)))
    if isinstance(head, GuidanceHead):  # its weights are the embeddings; it is centered when it is saved
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
    """Exponents in the config of an adapter, or `None` if the adapter is not a doctor."""
    config = _peft_config(model, name)
    own_modules = set(getattr(config, "modules_to_save", None) or ())
    record = (config.auto_mapping or {}).get(RECORD)
    if record is None and VALUE_HEAD not in own_modules:
        return None
    heads = own_modules - {VALUE_HEAD}
    if record is None and heads:  # saved by an early version
        raise ValueError(
            f"The adapter {name!r} must have a record of the exponents that it was trained for. Got one without a "
            f"record, with {sorted(heads)} of its own; load it with `load_doctor`, and save it again."
        )
    loaded = {
        path.rsplit(".", 1)[-1]
        for path, module in model.named_modules()
        if name in getattr(module, "modules_to_save", ())
    }
    if missing := heads - loaded:
        raise ValueError(
            f"The adapter {name!r} must be complete. Got one without its {sorted(missing)}, which were lost when it "
            "was loaded or combined; load it with `load_doctor` or `PeftModel.from_pretrained`."
        )
    record = dict(record or {})
    check_format(record.pop("format", FORMAT), f"The adapter {name!r}")
    return record


def _active_head(base: PreTrainedModel, adapters: Sequence[str]) -> torch.nn.Module:
    """The language model head that is used with these adapters."""
    head = base.get_output_embeddings()
    own = getattr(head, "modules_to_save", {})
    return next((own[name] for name in adapters if name in own), getattr(head, "original_module", head))


def _float_weight(head: torch.nn.Module) -> torch.Tensor | None:
    """Weights (V, H) of a head, or `None` if they are not floating point, or absent."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.device.type == "meta" or weight.dim() != 2 or not weight.numel():
        return None
    return weight if weight.is_floating_point() and weight.dtype.itemsize > 1 else None


def _mean_row(weight: torch.Tensor) -> torch.Tensor:
    """Mean (H,) of the rows of a matrix, accumulated in float32 or float64."""
    return weight.mean(dim=0, dtype=torch.promote_types(weight.dtype, torch.float32)).to(weight.dtype)


@torch.no_grad()
def _rows_add_up_to_zero(base: PreTrainedModel, adapters: Sequence[str]) -> bool:
    """Whether the mean row of the head is much shorter than that of independent rows."""
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

# SPDX-License-Identifier: Apache-2.0

"""
What a loaded model is: a language model, or a ratio that guides one; and which PEFT adapters can be read at all.

A doctor of guided flow is a ratio of two policies. Read as a language model it gives nonsense, so it says what it is
in each place that survives loading:

1. the model's config, `config.guidance`, for a full model;
2. the config of the adapter, under `auto_mapping`, which PEFT carries through every way of loading an adapter;
3. the weights: the rows of its head add up to zero, which changes no probability. This survives merging, after which
   PEFT keeps no trace of the adapter. A head without the other two marks is refused.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..common._upstream import active_adapters, adapter_layers, is_sharded, unwrap_peft
from ..common.atomic import FORMAT, check_format
from .guidance_head import GuidanceHead


if TYPE_CHECKING:
    from peft import PeftConfig

VALUE_HEAD = "value_head"
RECORD = "trl_tfpo"  # key of our record in the `auto_mapping` of an adapter's config
_ZERO_SUMS: WeakKeyDictionary[torch.nn.Module, tuple] = (
    WeakKeyDictionary()
)  # by head: the state of its weights, and whether their rows add up to zero
ZERO_SUM = 0.02  # of the sum that independent rows would have: above what rounding to bfloat16 leaves


def check_adapters(model: PreTrainedModel, name: str = "A doctor") -> None:
    """
    Check that the model reads tokens one by one, and that each of its adapters can be switched off.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        name (`str`, *optional*, defaults to `"A doctor"`):
            What a message calls it.

    Raises:
        `ValueError`: on prompt learning, activated LoRA, and adapters that are not layers of their own name.
    """
    configs = getattr(model, "peft_config", None) or {}
    switchable = {
        adapter
        for layer in (adapter_layers(model) if configs else [])
        for attribute in layer.adapter_layer_names
        if hasattr(getattr(layer, attribute, None), "keys")
        for adapter in getattr(layer, attribute).keys()
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
    """Why an adapter with this config cannot be part of a doctor or a patient; `None` where it can."""
    if config.is_prompt_learning or config.is_adaption_prompt:
        return "Prompt learning adds tokens that patient and decoding do not see"
    if getattr(config, "alora_invocation_tokens", None):
        return "Activated LoRA is on only after its invocation tokens, which are not looked for when single tokens are read"
    return None


def check_speaks(model: PreTrainedModel, adapters: Sequence[str] | None = None) -> None:
    """
    Check that a patient is a language model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The patient.
        adapters (sequence of `str`, *optional*):
            Names of the adapters that it is read with. By default those that are active.

    Raises:
        `ValueError`: when an adapter cannot be read, see [`check_adapters`], or the model is a doctor of guided flow.
    """
    check_adapters(model, "The patient")
    if trained_exponents(model, adapters):
        raise ValueError(
            "The patient must be a language model. Got a doctor of guided flow, which is a ratio of two policies; "
            "pass what it guides. If it is an adapter on the patient, pass it to the guide as `Doctor(model, "
            "adapter=NAME)`, or switch it off."
        )


def trained_exponents(model: PreTrainedModel, adapters: Sequence[str] | None = None) -> dict[str, float]:
    """
    The exponents `alpha` of the patient and `beta` of the doctor in its training, however the doctor was loaded.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A language model, or a doctor of guided flow.
        adapters (sequence of `str`, *optional*):
            Adapters that are active when the model is read. By default those that are active now.

    Returns:
        `dict[str, float]`: empty for a language model.

    Raises:
        `ValueError`: when the weights are those of guided flow but nothing says for which exponents; when the head of
            an adapter is missing; when the adapters do not agree; on a later format.
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
                f"Adapters that are read together must be trained for the same exponents. Got {known}; activate one."
            )
        return first
    guidance = getattr(base.config, "guidance", None)
    is_ours = isinstance(guidance, dict) and guidance.keys() >= {"alpha", "beta"}
    if is_ours and getattr(base, "guiding_adapter", None) not in configs:  # else it is about that adapter alone
        return {name: guidance[name] for name in ("alpha", "beta")}
    if _rows_add_up_to_zero(base, adapters):
        raise ValueError(
            "A doctor must say for which exponents it was trained. Got one whose head has rows that add up to zero, "
            "as doctors of guided flow have, without a record of them: an adapter that PEFT merged, or another "
            "config. "
            'Set `model.config.guidance = {"alpha": 1.0, "beta": 1.0}`, or load the saved doctor with `load_doctor`.'
        )
    return {}


def record_exponents(model: PreTrainedModel, exponents: dict[str, float]) -> None:
    """
    Write down in the configs of the active adapters for which exponents they are trained, and that they are language
    models, of which PEFT then saves the record.

    Args:
        model ([`~peft.PeftModel`]):
            The doctor.
        exponents (`dict[str, float]`):
            `alpha` and `beta`; empty for a doctor with a policy of its own.
    """
    for name in active_adapters(adapter_layers(model)):
        config = model.peft_config[name]
        config.task_type = config.task_type or "CAUSAL_LM"  # without one PEFT would overwrite `auto_mapping`
        config.auto_mapping = {**(config.auto_mapping or {}), RECORD: {"format": FORMAT, **exponents}}


@torch.no_grad()
def center_head(model: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """
    Shift the language model head of a doctor of guided flow, so that its rows add up to zero, in place.

    All logits of a position change by one number, so no probability changes.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The doctor. Where it is sharded nothing is done without a `state_dict`.
        state_dict (`dict[str, torch.Tensor]`, *optional*):
            Its weights, gathered. The head in it is replaced, and not that of the model.
    """
    if not trained_exponents(model) or (state_dict is None and is_sharded(model)):
        return
    head = _read_head(unwrap_peft(model), active_adapters(adapter_layers(model)))
    if isinstance(head, GuidanceHead):  # its weights are the embeddings; what is saved is centered
        return
    if state_dict is not None:
        names = [f"{name}.weight" for name, module in model.named_modules() if module is head]
        state_dict.update(
            {name: state_dict[name] - _mean_row(state_dict[name]) for name in names if name in state_dict}
        )
    elif (weight := _float_weight(head)) is not None:
        weight.sub_(_mean_row(weight))


def _exponents_of_adapter(model: PreTrainedModel, name: str) -> dict[str, float] | None:
    """What the config of an adapter says; `None` where it is not one of ours."""
    config = model.peft_config[name]
    own_modules = set(getattr(config, "modules_to_save", None) or ())
    record = (config.auto_mapping or {}).get(RECORD)
    if record is None and VALUE_HEAD not in own_modules:
        return None
    heads = own_modules - {VALUE_HEAD}
    if record is None and heads:  # before adapters had a record
        raise ValueError(
            f"The adapter {name!r} must say for which exponents it was trained. Got one that was saved without a "
            f"record, with {sorted(heads)} of its own; load it with `load_doctor`, and save it again."
        )
    loaded = {
        path.rsplit(".", 1)[-1]
        for path, module in model.named_modules()
        if name in getattr(module, "modules_to_save", ())
    }
    if missing := heads - loaded:
        raise ValueError(
            f"The adapter {name!r} must be whole. Got one without its {sorted(missing)}, which the way it was loaded "
            "or combined has left out; load it with `load_doctor` or `PeftModel.from_pretrained`."
        )
    record = dict(record or {})
    check_format(record.pop("format", FORMAT), f"The adapter {name!r}")
    return record


def _read_head(base: PreTrainedModel, adapters: Sequence[str]) -> torch.nn.Module:
    """The language model head that is read with these adapters."""
    head = base.get_output_embeddings()
    own = getattr(head, "modules_to_save", {})
    return next((own[name] for name in adapters if name in own), getattr(head, "original_module", head))


def _float_weight(head: torch.nn.Module) -> torch.Tensor | None:
    """Weights (V, H) of a head; `None` where they are not floats, or not there."""
    weight = getattr(head, "weight", None)
    is_matrix = weight is not None and weight.dim() == 2 and weight.numel() > 0 and weight.device.type != "meta"
    return weight if is_matrix and weight.is_floating_point() and weight.dtype.itemsize > 1 else None


def _mean_row(weight: torch.Tensor) -> torch.Tensor:
    """Mean (H,) of the rows of a matrix, added up in float32 or float64."""
    return weight.mean(dim=0, dtype=torch.promote_types(weight.dtype, torch.float32)).to(weight.dtype)


@torch.no_grad()
def _rows_add_up_to_zero(base: PreTrainedModel, adapters: Sequence[str]) -> bool:
    """Whether the mean row of the head is far shorter than it would be were the rows independent."""
    head = _read_head(base, adapters)
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

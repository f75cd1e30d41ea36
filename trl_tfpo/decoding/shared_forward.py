# SPDX-License-Identifier: Apache-2.0

"""
One forward pass for the patient and the doctors that are adapters on it.

Shapes: B rows of the patient, D doctors in its forward pass, V vocabulary. The pass and its KV cache have (1 + D) B
rows: those of the patient, then those of each doctor. Separate rows keep the states of the doctors out of the patient.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..common._upstream import active_adapters, adapter_layers, using_adapters
from ..common.language_model import unwrap_peft
from .doctors import NO_ADAPTER
from .logits_processor import DoctorGuidedLogitsProcessor


if TYPE_CHECKING:
    from peft import LoraConfig


@contextmanager
def shared_forward(patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor, num_rows: int) -> Iterator[None]:
    """
    Within the context, each forward pass of the patient also computes the logits of the doctors on its weights.

    The context is for greedy search and sampling of `num_rows` (B) texts, without reordered rows. The guide must be
    called once after each pass.
    """
    base, layers = unwrap_peft(patient), adapter_layers(patient)
    shared: dict[int, list[torch.Tensor]] = {i: [] for i, doctor in enumerate(guide.doctors) if doctor.is_on(base)}
    names = [*patient_adapters(patient, guide), NO_ADAPTER][:1]
    names += [[*guide.doctors[index].adapters, NO_ADAPTER][0] for index in shared]
    adapter_of_row = [name for name in names for _ in range(num_rows)]

    def repeat_rows(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        def is_by_row(value: object) -> bool:
            return isinstance(value, torch.Tensor) and value.dim() > 1 and value.size(0) == num_rows

        return args, {k: torch.cat([v] * len(names)) if is_by_row(v) else v for k, v in kwargs.items()}

    def split_logits(_: torch.nn.Module, args: tuple, output: CausalLMOutputWithPast) -> CausalLMOutputWithPast:
        rows_of_patient, *rows_of_doctors = output["logits"].split(num_rows)
        for logits, rows in zip(shared.values(), rows_of_doctors, strict=True):
            logits.append(rows[:, -1])
        output["logits"] = rows_of_patient
        return output

    def choose_adapters(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"adapter_names": adapter_of_row}

    with ExitStack() as stack:
        stack.enter_context(using_adapters(layers, [name for name in names if name != NO_ADAPTER]))
        for hook in (
            base.register_forward_pre_hook(repeat_rows, with_kwargs=True),
            base.register_forward_hook(split_logits),
            *(layer.register_forward_pre_hook(choose_adapters, with_kwargs=True) for layer in layers),
        ):
            stack.callback(hook.remove)
        stack.enter_context(guide.external_logits({i: partial(_take, logits) for i, logits in shared.items()}))
        yield


def _take(logits: list[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Take a doctor's logits (B, V), or raise `ValueError` unless there was one forward pass since the last call."""
    if len(logits) != 1:
        raise ValueError(
            f"There must be one forward pass of the patient for each call of the guide. Got {len(logits)} passes; use "
            "`patient.generate` with `logits_processor=[guide]`, and adapters disabled."
        )
    return logits.pop()


def can_share(patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor) -> bool:
    """
    Whether [`shared_forward`] supports the doctors on the patient's weights.

    There must be at least one. Each must read the prompts of the patient, and be needed at every step. PEFT can choose
    adapters by row only for LoRA without DoRA and biases, and only one adapter per row. The layers with adapters must
    keep the rows of the batch. Experts of a mixture and OPT's feed-forward layers do not.
    """
    base = unwrap_peft(patient)
    doctors = [doctor for doctor in guide.doctors if doctor.is_on(base)]
    used = [patient_adapters(patient, guide), *(doctor.adapters for doctor in doctors)]
    if not doctors or not any(used) or any(len(names) > 1 for names in used):
        return False
    if any(doctor.prompt is not None for doctor in doctors):
        return False
    is_read_at_every_step = all(isinstance(beta, torch.Tensor) or beta != 0 for beta in guide.betas)
    if guide.min_patient_entropy or any(map(callable, guide.betas)) or not is_read_at_every_step:
        return False
    configs = {name: config for doctor in doctors for name, config in getattr(doctor.model, "peft_config", {}).items()}
    if not all(_can_choose_by_row(configs.get(name)) for names in used for name in names):
        return False
    if base.config.get_text_config() is not base.config or base.config.model_type == "opt":
        return False
    return not any("expert" in name for name, module in base.named_modules() if hasattr(module, "_disable_adapters"))


def _can_choose_by_row(config: "LoraConfig | None") -> bool:
    """Whether PEFT can apply an adapter with this config to some rows of a batch only."""
    return (
        config is not None
        and config.peft_type == "LORA"
        and not config.use_dora
        and config.bias == "none"
        and not config.target_parameters
    )


def patient_adapters(patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor) -> tuple[str, ...]:
    """Return the adapters of the patient: the active adapters, without doctors of the guide."""
    doctors = {
        name
        for doctor in guide.doctors
        if doctor.is_on(patient) and (doctor.prompt is None or doctor.adapter is not None)
        for name in doctor.adapters
    }
    return tuple(name for name in active_adapters(adapter_layers(patient)) if name not in doctors)

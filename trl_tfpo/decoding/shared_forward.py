# SPDX-License-Identifier: Apache-2.0

"""
Doctors that are adapters on the patient's own weights, read in the same forward pass.

Shapes: B rows, D doctors that share, V vocabulary. The pass has (1 + D) B rows: the patient's, then each doctor's. They
have rows of their own in the KV cache too, so nothing of a doctor reaches the patient.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from ..common._upstream import active_adapters, adapter_layers, unwrap_peft, using_adapters
from .doctors import NO_ADAPTER
from .logits_processor import DoctorGuidedLogitsProcessor


@contextmanager
def shared_forward(patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor, num_rows: int) -> Iterator[None]:
    """
    Within the context a forward pass of the patient is one of its adapter doctors too, who tell the guide what they saw.

    For greedy search and sampling: rows must keep their place, and the guide must ask once for each pass.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            The patient, or the `PeftModel` around it.
        guide ([`DoctorGuidedLogitsProcessor`]):
            The guidance. Its doctors on other weights read as always.
        num_rows (`int`):
            B, texts generated at once.
    """
    base, layers = unwrap_peft(patient), adapter_layers(patient)
    sharing = [index for index, doctor in enumerate(guide.doctors) if doctor.is_on(base)]
    names = [*patient_adapters(patient, guide), NO_ADAPTER][:1]
    names += [[*guide.doctors[index].adapters, NO_ADAPTER][0] for index in sharing]
    rows = [name for name in names for _ in range(num_rows)]
    memories, told = guide.memories, [_Told() for _ in sharing]

    def widen(_, args, kwargs):
        def is_by_row(value):
            return isinstance(value, torch.Tensor) and value.dim() > 1 and value.size(0) == num_rows

        return args, {k: torch.cat([v] * (1 + len(told))) if is_by_row(v) else v for k, v in kwargs.items()}

    def split(_, args, output):
        for index, one in enumerate(told):
            one.hear(output.logits[(1 + index) * num_rows : (2 + index) * num_rows, -1])
        output.logits = output.logits[:num_rows]
        return output

    def choose_adapters(_, args, kwargs):
        return args, kwargs | {"adapter_names": rows}

    with ExitStack() as stack:
        stack.enter_context(using_adapters(layers, [name for name in names if name != NO_ADAPTER]))
        for hook in (
            base.register_forward_pre_hook(widen, with_kwargs=True),
            base.register_forward_hook(split),
            *(layer.register_forward_pre_hook(choose_adapters, with_kwargs=True) for layer in layers),
        ):
            stack.callback(hook.remove)
        guide.memories = list(memories)
        for index, one in zip(sharing, told, strict=True):
            guide.memories[index] = one
        try:
            yield
        finally:
            guide.memories = memories


def can_share(patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor) -> bool:
    """
    Whether all doctors on the patient's weights, of which there is one at least, can be rows of its forward pass, and
    are heard at every step.

    PEFT chooses by row among LoRA adapters without DoRA and biases, one for each row. The rows must reach the adapters
    as they are, which neither experts of a mixture nor OPT's feed-forward layers see to.
    """
    base = unwrap_peft(patient)
    doctors = [doctor for doctor in guide.doctors if doctor.is_on(base)]
    configs = {name: config for doctor in doctors for name, config in getattr(doctor.model, "peft_config", {}).items()}
    used = [patient_adapters(patient, guide), *(doctor.adapters for doctor in doctors)]
    if not doctors or not any(used) or any(len(names) > 1 for names in used):
        return False
    if any(doctor.prompt is not None for doctor in doctors):
        return False
    if guide.min_patient_entropy or any(
        not isinstance(x, torch.Tensor) and (callable(x) or x == 0) for x in guide.betas
    ):
        return False
    for name in {name for names in used for name in names}:
        config = configs.get(name)
        if config is None or config.peft_type != "LORA" or config.use_dora or config.bias != "none":
            return False
        if config.target_parameters:
            return False
    if base.config.get_text_config() is not base.config or base.config.model_type == "opt":
        return False
    return not any("expert" in name for name, module in base.named_modules() if hasattr(module, "_disable_adapters"))


def patient_adapters(patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor) -> tuple[str, ...]:
    """Adapters that the patient is read with: those that are active, less those that are doctors of the guide."""
    doctors = {
        name
        for doctor in guide.doctors
        if doctor.is_on(patient) and (doctor.prompt is None or doctor.adapter is not None)
        for name in doctor.adapters
    }
    return tuple(name for name in active_adapters(adapter_layers(patient)) if name not in doctors)


class _Told:
    """In place of a doctor's memory: what it said in the forward pass of the patient."""

    num_embeddings = math.inf

    def __init__(self):
        self.said = []

    def hear(self, logits: torch.Tensor) -> None:
        self.said.append(logits)

    def logits(self, tokens: torch.LongTensor) -> torch.Tensor:
        if len(self.said) != 1:
            raise ValueError(
                "A doctor in the patient's forward pass must be asked once for each. Got "
                f"{len(self.said)} passes; use `patient.generate` with adapters disabled, and `logits_processor=[guide]`."
            )
        return self.said.pop()

    def forget(self) -> None:
        self.said.clear()

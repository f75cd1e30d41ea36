# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Doctors that are adapters on the patient's own weights, read in the same forward pass.

Shapes: B rows, D doctors that share, V vocabulary. The pass has (1 + D) B rows: the patient's, then each doctor's. They
have rows of their own in the KV cache too, so nothing of a doctor reaches the patient.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from ._compat import adapter_layers, is_peft_model, unwrap_peft, using_adapter
from .doctors import NO_ADAPTER, Doctor
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
    sharing = {i: name for i, doctor in enumerate(guide.doctors) if (name := lora_on(base, doctor))}
    rows = [NO_ADAPTER] * num_rows + [name for name in sharing.values() for _ in range(num_rows)]
    memories, told = guide.memories, [_Told() for _ in sharing]

    def widen(_, args, kwargs):
        def is_by_row(value):
            return isinstance(value, torch.Tensor) and value.dim() > 1 and value.size(0) == num_rows

        return args, {k: torch.cat([v] * (1 + len(told))) if is_by_row(v) else v for k, v in kwargs.items()}

    def split(_, args, output):
        for index, one in enumerate(told):
            one.said = output.logits[(1 + index) * num_rows : (2 + index) * num_rows, -1]
        output.logits = output.logits[:num_rows]
        return output

    def choose_adapters(_, args, kwargs):
        return args, kwargs | {"adapter_names": rows}

    with ExitStack() as stack:
        stack.enter_context(using_adapter(layers, True))
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


def lora_on(base: PreTrainedModel, doctor: Doctor) -> str | None:
    """Name of the adapter if the doctor is one on `base` that can differ by row, which of PEFT's are LoRA and none."""
    if unwrap_peft(doctor.model) is not base or not is_peft_model(doctor.model) or doctor.prompt is not None:
        return None
    name = doctor.adapter or doctor.model.active_adapter
    if name == NO_ADAPTER:
        return name
    config = doctor.model.peft_config.get(name) if isinstance(name, str) else None
    if config is None or config.peft_type != "LORA" or config.use_dora or config.bias != "none":
        return None
    return None if any(getattr(layer, "merged", False) for layer in adapter_layers(base)) else name


class _Told:
    """In place of a doctor's memory: what it said in the forward pass of the patient."""

    num_embeddings = float("inf")
    said: torch.Tensor

    def logits(self, tokens: torch.LongTensor) -> torch.Tensor:
        return self.said

    def forget(self) -> None:
        pass

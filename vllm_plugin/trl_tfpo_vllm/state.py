# SPDX-License-Identifier: Apache-2.0

"""
Weights of requests in Model Runner V2, as an input of the model.

Shapes: R slots for requests, T scheduled tokens (padding included), D doctors and references.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from .checks import guidance_of


class GuidedModelState(DefaultModelState):
    """
    Model state of vLLM with the weights of each request. The model gets a row of weights for each scheduled token.

    Args:
        vllm_config ([`~vllm.config.VllmConfig`]), model (`nn.Module`), encoder_cache, device:
            As in [`~vllm.v1.worker.gpu.model_states.interface.ModelState`].
    """

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.guidance = guidance_of(self.model_config)
        default = torch.tensor(self.guidance.request_weights(None))  # (1 + D,)
        self._by_slot_cpu = default.repeat(self.max_num_reqs, 1)  # (R, 1 + D)
        self._by_slot = self._by_slot_cpu.to(device)
        self._by_token = default.repeat(self.max_num_tokens, 1).to(device)  # the address that CUDA graphs read
        self._token_indices = torch.arange(self.max_num_tokens, device=device)
        self._is_changed = False

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Set the weights of a slot. vLLM calls it again for a request that was preempted."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        weights = self.guidance.request_weights(params.extra_args if params else None)
        self._by_slot_cpu[req_index] = torch.tensor(weights)
        self._is_changed = True

    def apply_staged_writes(self) -> None:
        """Copy changed weights to the device."""
        super().apply_staged_writes()
        if self._is_changed:
            self._by_slot.copy_(self._by_slot_cpu)  # pageable memory: the copy is synchronous
            self._is_changed = False

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Add `guidance_weights` (T, 1 + D), float32, to the inputs of the model."""
        inputs = super().prepare_inputs(input_batch, req_states)
        num_tokens = input_batch.num_tokens
        ends = input_batch.query_start_loc[1 : input_batch.num_reqs + 1]
        request = torch.bucketize(self._token_indices[:num_tokens], ends.long(), right=True)
        slots = input_batch.idx_mapping[: input_batch.num_reqs].long()[request.clamp(max=input_batch.num_reqs - 1)]
        self._by_token[:num_tokens] = self._by_slot[slots]
        return inputs | {"guidance_weights": self._by_token[: input_batch.num_tokens_after_padding]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Add `guidance_weights` to the inputs of a dummy run."""
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return inputs | {"guidance_weights": self._by_token[:num_tokens]}

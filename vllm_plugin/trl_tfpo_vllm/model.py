# SPDX-License-Identifier: Apache-2.0

"""
Patient, doctors and references as one vLLM model.

Each forward pass runs all models on the same tokens. Its output concatenates the hidden states of all models and the
weights of each token, so rows keep their weights when vLLM selects or copies them. Logits are the log-probabilities of
the guided policy, to which vLLM applies grammars, penalties and temperature.

Shapes: T scheduled tokens, H sum of the hidden sizes, D doctors and references, V vocabulary of the patient.
"""

from collections.abc import Iterable
from itertools import combinations, groupby

import torch
from torch import nn
from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import has_inner_state, is_attention_free, is_hybrid, supports_multimodal
from vllm.model_executor.models.interfaces_base import VllmModelForTextGeneration
from vllm.model_executor.models.utils import init_vllm_registered_model
from vllm.sequence import IntermediateTensors

from .admission import admission_of
from .checks import check_modes, config_of, guidance_of
from .lora import Lora
from .mixture import guided_logps, pack_weights, unpack_weights
from .saved_doctor import VALUE_HEAD, read_doctor
from .sharing import are_alike, share_modules


class GuidedForCausalLM(nn.Module):
    """
    A patient guided by doctors.

    Args:
        vllm_config ([`~vllm.config.VllmConfig`]):
            Config of the patient, with the fields of [`Guidance.to_fields`].
        prefix (`str`, *optional*, defaults to `""`):
            Prefix of the names of layers.

    Raises:
        `ValueError`: in unsupported modes, and when a model has a state other than keys and values, or reads images.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.check(vllm_config)
        model_config = vllm_config.model_config
        path = model_config.hf_config_path or model_config.model
        patient = AutoConfig.from_pretrained(path, revision=model_config.revision, trust_remote_code=False)
        self.names, self.paths, self.configs = ["patient"], [str(path)], [model_config.hf_config]
        architectures = [patient.architectures]  # the engine's config names this class
        self.loras: dict[str, Lora] = {}
        self.secondary_weights: list[DefaultModelLoader.Source] = []  # which the loader reads after the patient
        for index, folder in enumerate(guidance_of(model_config).factors):
            saved, name = read_doctor(folder), f"factor{index}"  # vLLM allows one integer in the name of a layer
            config = config_of(saved)
            if saved.adapter is not None:
                self.loras[name] = Lora(saved, config)
            # Other safetensors in the folder are the value head and the credits
            source = DefaultModelLoader.Source(
                saved.base, saved.revision, prefix=f"{name}.", allow_patterns_overrides=["model*.safetensors"]
            )
            self.secondary_weights.append(source)
            self.names.append(name)
            self.paths.append(str(folder))
            self.configs.append(config)
            architectures.append(config.architectures)
        for name, path, config, architecture in zip(self.names, self.paths, self.configs, architectures, strict=True):
            _check_kind(path, architecture, model_config)
            layers = f"{prefix}.{name}" if prefix else name
            model = init_vllm_registered_model(
                vllm_config, prefix=layers, hf_config=config, architectures=architecture
            )
            setattr(self, name, model)
        self.sizes = [config.hidden_size for config in self.configs]
        self.num_embeddings = [config.vocab_size for config in self.configs]
        self.found_by_name = list(vllm_config.compilation_config.static_forward_context.values())

    @staticmethod
    def check(vllm_config: VllmConfig) -> None:
        """Raise `ValueError` in unsupported modes, and in an engine that does not check requests on arrival."""
        check_modes(vllm_config)
        model_config = vllm_config.model_config
        if admission_of(guidance_of(model_config)) not in (model_config.logits_processors or ()):
            raise ValueError(
                "Requests must be checked when they arrive. Got an engine without the check, which this version of "
                "vLLM does not add; use the version in the README of the plugin."
            )

    @staticmethod
    def get_model_state_cls() -> type:
        """Return the class that keeps the weights of requests. Only Model Runner V2 calls this method."""
        from .state import GuidedModelState

        return GuidedModelState

    @property
    def models(self) -> list[VllmModelForTextGeneration]:
        """The patient, then doctors and references."""
        return [getattr(self, name) for name in self.names]

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the patient's embeddings (T, hidden size) for token ids (T,)."""
        return self.models[0].embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        guidance_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Run patient and doctors on the scheduled tokens.

        Args:
            input_ids, positions (`torch.Tensor` of shape `(T,)`):
                Token ids and positions.
            guidance_weights (`torch.Tensor` of shape `(T, 1 + D)`):
                Exponents of the patient, and of each doctor and reference.

        Returns:
            `torch.Tensor` of shape `(T, H + 3 * (1 + D))`.

        Raises:
            `ValueError`: without ids or weights, and with `inputs_embeds`.
        """
        if input_ids is None or inputs_embeds is not None or guidance_weights is None:
            raise ValueError(
                "Guidance needs token ids and the weights of requests. Got a forward pass without them; use Model "
                "Runner V2, and no prompt embeddings."
            )
        states = []
        for model, size in zip(self.models, self.num_embeddings, strict=True):
            # Ids beyond a doctor's embeddings are padding of the patient's vocabulary
            ids = input_ids.clamp(max=size - 1) if size < self.num_embeddings[0] else input_ids
            states.append(model(ids, positions))
        return torch.cat([*states, pack_weights(guidance_weights, states[0].dtype)], dim=-1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """
        Return the log-probabilities of the guided policy.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, H + 3 * (1 + D))`):
                Rows of the output of [`forward`].

        Returns:
            `torch.Tensor` of shape `(T, V)`: log-probabilities in nats, float32. `None` on ranks to which vLLM gathers
            no logits.
        """
        *states, packed = hidden_states.split([*self.sizes, hidden_states.size(-1) - sum(self.sizes)], dim=-1)
        logits = [
            model.compute_logits(state.contiguous()) for model, state in zip(self.models, states, strict=True)
        ]  # on all ranks, because they gather together
        if logits[0] is None:
            return None
        patient, *doctors = [x.float() for x in logits]
        return guided_logps(patient, doctors, unpack_weights(packed))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """
        Load patient and doctors.

        Args:
            weights (iterable of `(str, torch.Tensor)`):
                Names and tensors: those of the patient, then those of each doctor, with its name in `names` as prefix.

        Returns:
            `set[str]`: names of the parameters that were loaded.

        Raises:
            `ValueError`: when a model gets no weights, or an adapter does not fit its base.
        """
        loaded: set[str] = set()
        owners = set()
        # The loader reads one model after the other. Groups are iterators, so no model is in memory twice
        for owner, group in groupby(weights, key=lambda item: self._owner(item[0])):
            own = ((name.removeprefix(f"{owner}."), tensor) for name, tensor in group)
            own = ((name, tensor) for name, tensor in own if not name.startswith(f"{VALUE_HEAD}."))
            merged = self.loras[owner].merge(own) if owner in self.loras else own
            loaded |= {f"{owner}.{name}" for name in getattr(self, owner).load_weights(merged)}
            owners.add(owner)
        if missing := [path for name, path in zip(self.names, self.paths, strict=True) if name not in owners]:
            raise ValueError(
                f"The weights of all models must be read. Got none of {missing}, because some load formats read only "
                "one model; leave out `load_format`."
            )
        for (model, config), (other, its_config) in combinations(zip(self.models, self.configs, strict=True), 2):
            if are_alike(config, its_config):
                share_modules(other, model, apart=self.found_by_name)
        return loaded

    def _owner(self, name: str) -> str:
        """Return the name of the model of a weight. Weights of the patient have no prefix."""
        owner = name.partition(".")[0]
        return owner if owner in self.names[1:] else self.names[0]


def _check_kind(path: str, architectures: list[str], model_config: ModelConfig) -> None:
    """Raise `ValueError` unless a model reads only text, and has no state other than keys and values."""
    kind, _ = ModelRegistry.resolve_model_cls(architectures, model_config=model_config)
    if supports_multimodal(kind) or has_inner_state(kind) or is_attention_free(kind) or is_hybrid(kind):
        raise ValueError(
            f"Patient, doctors and references must be language models with attention alone. Got a {kind.__name__} in "
            f"{path!r}, which reads images or has another state; use `trl-tfpo serve` or another model."
        )

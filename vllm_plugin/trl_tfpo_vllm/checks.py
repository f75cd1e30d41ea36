# SPDX-License-Identifier: Apache-2.0

"""Checks at the start of an engine: its modes, and whether patient and doctors are compatible."""

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from .admission import PREFIX, admission_of
from .guidance import ARCHITECTURE, PATIENT, Guidance
from .saved_doctor import SavedDoctor, read_doctor


if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


class GuidedConfig(VerifyAndUpdateConfig):
    """Hook of vLLM that checks the config of an engine at its start, and adds the check of requests."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Raise `ValueError` on unsupported modes and on doctors that are incompatible with the patient."""
        check_modes(vllm_config)
        model_config = vllm_config.model_config
        guidance = guidance_of(model_config)
        check_doctors(guidance, model_config)
        others = [name for name in model_config.logits_processors or () if not str(name).startswith(PREFIX)]
        model_config.logits_processors = [*others, admission_of(guidance)]


def guidance_of(model_config: "ModelConfig") -> Guidance:
    """Read the doctors from the config of the patient, to which `hf_overrides` adds them."""
    doctors = getattr(model_config.hf_config, "guided_doctors", None)
    if not doctors:
        raise ValueError(
            f"{ARCHITECTURE} needs doctors in `hf_overrides`. Got none; pass the arguments that "
            "`trl_tfpo_vllm.guided_config` returns."
        )
    return Guidance.from_fields(doctors, getattr(model_config.hf_config, "guided_alpha", None))


def check_modes(vllm_config: "VllmConfig") -> None:
    """
    Raise `ValueError` on modes of the engine in which guidance would be absent or wrong.

    Args:
        vllm_config ([`~vllm.config.VllmConfig`]):
            The config of the engine.
    """
    if not vllm_config.use_v2_model_runner:
        raise ValueError(
            "Guidance needs Model Runner V2: the older runner ignores the weights of requests. Got the older runner; "
            "set VLLM_USE_V2_MODEL_RUNNER=1, or leave out the options that V2 does not support. vLLM logs them in a "
            "warning."
        )
    model, parallel, speculation = (
        vllm_config.model_config,
        vllm_config.parallel_config,
        vllm_config.speculative_config,
    )
    unsupported = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "a quantized patient": model.quantization is not None,
        "LoRA adapters of requests": vllm_config.lora_config is not None,
        "prompt embeddings": model.enable_prompt_embeds,
        "pooling": model.runner_type != "generate",
        "speculation by hidden states": speculation is not None and speculation.method not in ("draft_model", "ngram"),
    }
    if found := [name for name, is_used in unsupported.items() if is_used]:
        raise ValueError(
            f"Guidance does not support {' or '.join(found)}. Got it in the config of the engine; start the engine "
            "without it."
        )


def check_doctors(guidance: Guidance, model_config: "ModelConfig") -> None:
    """
    Raise `ValueError` unless every doctor and reference is compatible with the patient.

    All models must read only text. Doctors and references must have the patient's tokenizer (the same token for every
    id), an embedding for each token, and at least as many positions as the engine. They must not be quantized.

    Args:
        guidance ([`Guidance`]):
            The doctors.
        model_config ([`~vllm.config.ModelConfig`]):
            The config of the patient in the engine.
    """
    _check_reads_text("The patient", model_config.hf_config)
    patient_tokens = _tokens_by_id(model_config.tokenizer or model_config.model)
    models = {f"Doctor {doctor.name!r}": doctor.path for doctor in guidance.doctors}
    models |= {
        f"The reference of doctor {doctor.name!r}": doctor.reference
        for doctor in guidance.doctors
        if doctor.reference not in (None, PATIENT)
    }
    for label, path in models.items():
        tokens, config = _tokens_by_id(path), config_of(read_doctor(path))
        _check_reads_text(label, config)
        differing = [i for i in patient_tokens.keys() | tokens.keys() if patient_tokens.get(i) != tokens.get(i)]
        if differing:
            first = min(differing)
            raise ValueError(
                f"{label} must have the patient's tokenizer: the same token for every id. Got {len(differing)} ids "
                f"that differ; the first is {first}: {patient_tokens.get(first)!r} for the patient, here "
                f"{tokens.get(first)!r}. Use two models of one family."
            )
        if getattr(config, "quantization_config", None):
            raise ValueError(
                f"{label} must not be quantized, because the engine uses the patient's kernels for it. Got a "
                "`quantization_config` in its folder or that of its base; save its weights in bfloat16."
            )
        if tokens and config.vocab_size <= max(tokens):
            raise ValueError(
                f"{label} must have an embedding for every token. Got {config.vocab_size} embeddings and the id "
                f"{max(tokens)}; use a model of the patient's family."
            )
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and positions < model_config.max_model_len:
            raise ValueError(
                f"{label} must have as many positions as the engine. Got {positions}, and a `max_model_len` of "
                f"{model_config.max_model_len}; pass `max_model_len={positions}`."
            )


def config_of(saved: SavedDoctor) -> PreTrainedConfig:
    """Read the config of a doctor, or of the base of its adapter."""
    try:
        return AutoConfig.from_pretrained(saved.base, revision=saved.revision, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"A doctor must have a model that can be found. Got {saved.base!r} for {str(saved.folder)!r}; write the "
            "right folder or Hub id as `base_model_name_or_path` in its `adapter_config.json`."
        ) from error


def _check_reads_text(label: str, config: PreTrainedConfig) -> None:
    """Raise `ValueError` when a model has parts besides a language model."""
    if config.get_text_config() is not config:
        raise ValueError(
            f"{label} must be a language model. Got a {type(config).__name__}, of a model that also reads images or "
            "sound; use `trl-tfpo serve` or another model."
        )


def _tokens_by_id(path: str) -> dict[int, str]:
    """Return the token of each id, including added and special tokens."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Patient and doctors must be saved with their tokenizer, for a comparison. Got none in {path!r}; if the "
            "doctor has the patient's tokenizer, save it there with `save_pretrained`."
        ) from error
    return {index: token for token, index in tokenizer.get_vocab().items()}

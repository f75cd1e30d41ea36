# SPDX-License-Identifier: Apache-2.0

"""Plan of a training run from configs and data: counts of tokens and steps, memory of weights and optimizer."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..annotation.score_cache import SHARD_SIZE
from ..annotation.token_rewards import REWARD_COLUMNS
from ..data.tokenization import FACE_COLUMNS, ID_COLUMNS, all_eos_token_ids, tokenize_preferences
from ..faces import Faces, resolve_faces
from ..models.doctor import make_doctor
from ..models.named_model import model_without_weights
from .base_policy import POLICIES
from .config import TFPOConfig
from .reference import REFERENCE_COLUMNS


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


ZERO3_LIVE_PARAMETERS = 10**9  # DeepSpeed's default of `stage3_max_live_parameters`
GIB = 2**30
NOTE = (
    "Activations are not counted. They grow with `per_device_train_batch_size` and the length of the rows; "
    "`activation_checkpointing` reduces them. Counts of parameters and bytes of weights are exact. The optimizer is "
    "AdamW. Weights in 4 or 8 bits are not sharded. Not counted either: logits, padding tokens, memory that CUDA, "
    "NCCL and the allocator reserve, communication buffers other than the buckets of DDP and gathered weights, "
    "evaluation, offloading, and a head with a free row for each token."
)


@dataclass(frozen=True)
class Memory:
    """
    Bytes in one process during one phase, without activations.

    Args:
        phase (`str`):
            Name of the phase.
        weights (`int`):
            Weights, including those gathered from other processes.
        gradients (`int`):
            Gradients. Counted twice for DDP, because its communication buckets are a copy.
        optimizer (`int`):
            Two states of AdamW and, with DeepSpeed, float32 copies of weights and gradients.
    """

    phase: str
    weights: int
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        """Bytes of weights, gradients and optimizer states together."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class TrainingPlan:
    """
    Result of [`training_plan`]. `str(plan)` is a page of Markdown.

    Args:
        num_pairs (`int`):
            Preference pairs in the training data, extrapolated if only a sample was tokenized.
        num_tokenized_pairs (`int`):
            Pairs that were tokenized.
        is_extrapolated (`bool`):
            Whether only a sample was tokenized.
        longest_row (`int`):
            Tokens of the longest row in a training batch. If only a sample was tokenized: `max_length`, or without one
            the longest row of the sample.
        annotation_tokens (`int`):
            Tokens that the patient reads in annotation, summed over processes, each prompt once under each face (twice
            for models with sliding windows). The patient reads fewer if prompts begin alike. 0 for an annotated
            dataset.
        reference_tokens (`int`):
            Tokens that the reference reads before training, summed over processes, each prompt once (twice for
            models with sliding windows). It reads fewer if prompts begin alike. 0 if it reads none.
        training_tokens (`int`):
            Tokens of the pairs in one epoch. Models read fewer if they read a prompt once for both completions.
        num_shards (`int`):
            Shards of the score cache. Processes divide the shards among themselves.
        num_update_steps (`int`):
            Optimizer steps of the whole training.
        num_processes (`int`):
            Number of processes.
        patient_parameters (`int`):
            Parameters of the patient. 0 for an annotated dataset.
        doctor_parameters (`int`):
            Parameters of the doctor, including its value head and adapter.
        trainable_parameters (`int`):
            Parameters of the doctor that are trained.
        memory (list of [`Memory`]):
            One entry for each phase; for several processes, one entry for training under each engine.
    """

    num_pairs: int
    num_tokenized_pairs: int
    is_extrapolated: bool
    longest_row: int
    annotation_tokens: int
    reference_tokens: int
    training_tokens: int
    num_shards: int
    num_update_steps: int
    num_processes: int
    patient_parameters: int
    doctor_parameters: int
    trainable_parameters: int
    memory: list[Memory]

    def __str__(self) -> str:
        tokenized = f"extrapolated from {self.num_tokenized_pairs:,}" if self.is_extrapolated else "all tokenized"
        longest = "`max_length`, or if unset the longest of the sample" if self.is_extrapolated else "all tokenized"
        counts = [
            ("preference pairs", self.num_pairs, tokenized),
            ("tokens of the longest row", self.longest_row, longest),
            ("tokens annotated by the patient", self.annotation_tokens, f"once, in {self.num_shards:,} shards"),
            ("tokens scored by the reference", self.reference_tokens, f"once, in {self.num_shards:,} shards"),
            ("tokens trained on", self.training_tokens, "in each epoch"),
            ("optimizer steps", self.num_update_steps, f"with {self.num_processes} process(es)"),
            ("parameters of the patient", self.patient_parameters, "frozen"),
            ("parameters of the doctor", self.doctor_parameters, f"{self.trainable_parameters:,} trained"),
        ]
        lines = ["| plan | | |", "|---|---:|---|"]
        lines += [f"| {name} | {count:,} | {note} |" for name, count, note in counts]
        lines += ["", "| GiB in each process | weights | gradients | optimizer | sum |", "|---|---:|---:|---:|---:|"]
        for row in self.memory:
            sizes = (row.weights, row.gradients, row.optimizer, row.total)
            lines.append(f"| {row.phase} | {' | '.join(f'{size / GIB:.2f}' for size in sizes)} |")
        return "\n".join([*lines, "", NOTE])


def training_plan(
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    doctor: str | PreTrainedConfig,
    patient: str | PreTrainedConfig | None = None,
    args: TFPOConfig,
    faces: Faces | str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    patient_quantization_config: BitsAndBytesConfig | None = None,
    peft_config: "PeftConfig | None" = None,
    num_processes: int = 1,
    mixed_precision: bool = True,
    max_pairs: int = 1000,
) -> TrainingPlan:
    """
    Count tokens, steps and bytes of a training run with these arguments. No weights or accelerator are needed.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference dataset in any format of TRL, or an annotated dataset.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of doctor and patient.
        doctor (`str` or [`~transformers.PreTrainedConfig`]):
            Name, path or config of the doctor. Only the config is read. Weights stored in quantized form count as
            unquantized.
        patient (`str` or [`~transformers.PreTrainedConfig`], *optional*):
            The same for the patient. Not needed for an annotated dataset, except with `policy="guided"`.
        args ([`TFPOConfig`]):
            Settings of the training run.
        faces ([`~trl_tfpo.faces.Faces`] or `str`, *optional*):
            Contrastive prompts for the patient.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of the doctor.
        patient_quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of the patient.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter of the doctor.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes of the training run.
        mixed_precision (`bool`, *optional*, defaults to `True`):
            Whether training computes in bfloat16, the default on an accelerator.
        max_pairs (`int`, *optional*, defaults to `1000`):
            Maximum number of pairs to tokenize. A longer dataset is sampled, and its counts are extrapolated.

    Raises:
        `ValueError`: if the dataset is empty, streamed or not a preference dataset; if a pair is unusable; if the
            patient or its faces are missing.

    Examples:

    ```python
    >>> from trl_tfpo import TFPOConfig
    >>> from trl_tfpo.training.plan import training_plan
    >>> from trl_tfpo.testbed import load_world
    >>> world = load_world()
    >>> plan = training_plan(
    ...     world.preference_dataset("praise", num_pairs=200, seed=0),
    ...     world.tokenizer,
    ...     doctor=world.doctor.config,
    ...     patient=world.patient.config,
    ...     args=TFPOConfig("runs/docs", per_device_train_batch_size=16, num_train_epochs=2, report_to="none"),
    ...     faces=world.attributes["praise"].faces,
    ... )
    >>> plan.num_pairs, plan.num_shards, plan.num_update_steps
    (200, 13, 26)

    ```
    """
    _check_arguments(dataset, patient, faces, args)
    is_annotated = _is_annotated(dataset)
    trust = args.trust_remote_code
    model = _StoredModel.of(doctor, args.model_init_kwargs, "float32", quantization_config, trust)
    frozen = None
    if patient is not None:
        frozen = _StoredModel.of(patient, args.patient_model_init_kwargs, "auto", patient_quantization_config, trust)
    policy = POLICIES[args.policy]
    base_policy = frozen if policy.needs_patient else model if policy.has_base else None
    base_bytes = 0 if base_policy is None else base_policy.num_bytes  # before `make_doctor` changes the model
    is_base_whole = base_policy is not None and bool(base_policy.quantized)
    doctor_model = make_doctor(
        model.model, peft_config, guides=policy.has_base, has_credits=bool(args.calibrate_rewards)
    )
    model = replace(model, model=doctor_model)  # heads and adapter are never quantized

    lengths = _tokenize(dataset, processing_class, faces, frozen, args, max_pairs)
    annotation_tokens, reference_tokens, memory = 0, 0, []
    if frozen is not None and not is_annotated:
        annotation_tokens = frozen.num_scored_tokens(lengths, FACE_COLUMNS)
        # With several processes, an unquantized doctor is moved to the accelerator later
        has_doctor = num_processes == 1 or model.quantized
        memory.append(Memory("annotation", frozen.num_bytes + (model.num_bytes if has_doctor else 0)))
    if args.reference_weight and not policy.has_base and not set(REFERENCE_COLUMNS) <= set(dataset.column_names):
        reference_tokens = model.num_scored_tokens(lengths, ID_COLUMNS[:1])
        memory.append(Memory("reference", model.num_bytes))
    sharded_bytes = base_bytes if is_base_whole else base_bytes // num_processes
    memory += _training_memory(model, base_bytes, sharded_bytes, 2 if mixed_precision else 4, num_processes)

    scale = len(dataset) / lengths.num_read
    num_tokenized = len(lengths.chosen)
    num_pairs = round(num_tokenized * scale)
    return TrainingPlan(
        num_pairs=num_pairs,
        num_tokenized_pairs=num_tokenized,
        is_extrapolated=scale > 1,
        longest_row=args.max_length if scale > 1 and args.max_length else max(lengths.rows),
        annotation_tokens=round(annotation_tokens * scale),
        reference_tokens=round(reference_tokens * scale),
        training_tokens=round(sum(lengths.rows) * scale),
        num_shards=math.ceil(num_pairs / SHARD_SIZE),
        num_update_steps=_num_update_steps(num_pairs, args, num_processes),
        num_processes=num_processes,
        patient_parameters=0 if frozen is None or is_annotated else frozen.model.num_parameters(),
        doctor_parameters=sum(parameter.numel() for parameter in model.parameters),
        trainable_parameters=sum(parameter.numel() for parameter in model.trained),
        memory=memory,
    )


def _check_arguments(
    dataset: Dataset, patient: str | PreTrainedConfig | None, faces: Faces | str | None, args: TFPOConfig
) -> None:
    if not isinstance(dataset, Dataset) or len(dataset) == 0:
        raise ValueError(
            f"A plan needs a dataset of known length with at least one pair. Got {dataset!r}; pass one split that is "
            "not empty, loaded with `streaming=False`."
        )
    if not _is_annotated(dataset) and (patient is None or faces is None):
        raise ValueError(
            "A dataset without token rewards needs a patient and faces. Got "
            f"`patient={patient!r}` and `faces={faces!r}`; pass both, or an annotated dataset."
        )
    if POLICIES[args.policy].needs_patient and patient is None:
        raise ValueError(
            "`policy='guided'` needs the patient in training. Got `patient=None`; pass its name or config."
        )


def _is_annotated(dataset: Dataset) -> bool:
    return set(dataset.column_names).issuperset(ID_COLUMNS + REWARD_COLUMNS)


# Tokens and steps


@dataclass(frozen=True)
class _Lengths:
    """Number of tokens of each prompt and completion, by column, for the usable pairs."""

    columns: dict[str, list[int]]
    num_read: int  # pairs, usable or not

    @property
    def chosen(self) -> list[int]:
        return self.columns["chosen_ids"]

    @property
    def rejected(self) -> list[int]:
        return self.columns["rejected_ids"]

    @property
    def rows(self) -> list[int]:
        """Tokens of each row in training: a prompt with one of its completions."""
        prompts = self.columns["prompt_ids"]
        return [sum(row) for side in (self.chosen, self.rejected) for row in zip(prompts, side, strict=True)]


def _tokenize(
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    faces: Faces | str | None,
    patient: "_StoredModel | None",
    args: TFPOConfig,
    max_pairs: int,
) -> _Lengths:
    """Lengths of all pairs, or of a sample of `max_pairs`."""
    pairs = dataset if len(dataset) <= max_pairs else dataset.shuffle(seed=0).select(range(max_pairs))
    num_read = len(pairs)
    if not _is_annotated(dataset):
        pairs = tokenize_preferences(
            pairs,
            processing_class,
            faces=None if faces is None else resolve_faces(faces),
            eos_token_ids=all_eos_token_ids(processing_class, None if patient is None else patient.outline),
            max_length=args.max_length,
            drop_unusable=args.drop_unusable,
            convert_transcripts=args.convert_transcripts,
        )
    names = [name for name in pairs.column_names if name in ID_COLUMNS + FACE_COLUMNS]
    return _Lengths({name: [len(ids) for ids in pairs[name]] for name in names}, num_read)


def _num_update_steps(num_pairs: int, args: TFPOConfig, num_processes: int) -> int:
    """Optimizer steps, as `Trainer` and Accelerate count them."""
    if args.max_steps > 0:
        return args.max_steps
    num_batches = num_pairs / args.per_device_train_batch_size / num_processes
    num_batches = math.floor(num_batches) if args.dataloader_drop_last else math.ceil(num_batches)
    steps_per_epoch = max(1, math.ceil(num_batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * steps_per_epoch)


# Models


@dataclass(frozen=True)
class _StoredModel:
    """A model on the meta device, with the quantization of its stored weights."""

    model: "PreTrainedModel | PeftModel"
    outline: PreTrainedModel  # the model without adapters
    quantization_config: BitsAndBytesConfig | None
    quantized: frozenset[int]  # ids of the weights that are stored in 4 or 8 bits

    @classmethod
    def of(
        cls,
        source: str | PreTrainedConfig,
        init_kwargs: dict[str, Any] | str | None,
        default_dtype: str,
        quantization_config: BitsAndBytesConfig | None,
        trust_remote_code: bool,
    ) -> "_StoredModel":
        """The model of a name, path or config, in the dtype in which `TFPOTrainer` loads it."""
        init_kwargs = init_kwargs if isinstance(init_kwargs, dict) else {}
        if isinstance(source, str):
            config = AutoConfig.from_pretrained(
                source, revision=init_kwargs.get("revision"), trust_remote_code=trust_remote_code
            )
        else:
            config = copy.deepcopy(source)
        dtype = init_kwargs.get("dtype", default_dtype)
        model = model_without_weights(config, dtype, trust_remote_code=trust_remote_code)
        return cls(model, model, quantization_config, _quantized(model, quantization_config))

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.parameters if parameter.requires_grad]

    @property
    def unquantized(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.parameters if id(parameter) not in self.quantized]

    @property
    def num_bytes(self) -> int:
        """Bytes of parameters, buffers and quantization constants."""
        num_bytes = sum(tensor.nbytes for tensor in [*self.model.buffers(), *self.unquantized])
        for parameter in self.parameters:
            if id(parameter) in self.quantized and self.quantization_config is not None:
                num_bytes += _quantized_bytes(parameter, self.quantization_config)
        return num_bytes

    def num_scored_tokens(self, lengths: _Lengths, prompt_columns: list[str]) -> int:
        """
        Tokens that the model reads to score both completions after each column of prompts.

        The last token of a completion is not read. A prompt is counted once for both completions, and twice for models
        with sliding windows, which read it twice. Other common beginnings are counted each time.
        """
        num_tokens = sum(length - 1 for length in lengths.chosen + lengths.rejected) * len(prompt_columns)
        num_prompt_tokens = sum(sum(lengths.columns[name]) for name in prompt_columns)
        if getattr(self.outline.config.get_text_config(), "sliding_window", None) is None:
            return num_tokens + num_prompt_tokens
        return num_tokens + 2 * num_prompt_tokens


def _quantized(model: PreTrainedModel, config: BitsAndBytesConfig | None) -> frozenset[int]:
    """Ids of the weights that bitsandbytes stores in 4 or 8 bits: all linear layers except the head."""
    if config is None or not (config.load_in_4bit or config.load_in_8bit):
        return frozenset()
    kept = [model.get_output_embeddings()]
    kept += [model.get_submodule(name) for name in config.llm_int8_skip_modules or []]
    return frozenset(
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and not any(module is other for other in kept)
    )


def _quantized_bytes(parameter: torch.nn.Parameter, config: BitsAndBytesConfig) -> int:
    """Bytes of a weight in 4 or 8 bits, with its quantization constants."""
    if config.load_in_8bit:
        return parameter.numel() + 4 * len(parameter)  # one float32 scale for each row
    num_bytes = math.ceil(parameter.numel() / 2) + 16 * 4  # with the float32 table of the 16 values
    num_blocks = math.ceil(parameter.numel() / 64)
    if not config.bnb_4bit_use_double_quant:
        return num_bytes + 4 * num_blocks
    return num_bytes + num_blocks + 4 * math.ceil(num_blocks / 256) + 256 * 4 + 4


# Memory of training


def _training_memory(
    model: _StoredModel, base_bytes: int, sharded_bytes: int, size: int, num_processes: int
) -> Iterator[Memory]:
    """
    Memory of training a doctor under each engine.

    `base_bytes` is the size of the frozen base policy, and `sharded_bytes` its size in each process with ZeRO-3 and
    FSDP2. `size` is the size of a weight in the dtype of the computation, in bytes.
    """
    gradients = sum(parameter.nbytes for parameter in model.trained)
    if num_processes == 1:
        yield Memory("training", model.num_bytes + base_bytes, gradients, 2 * gradients)
        return
    yield Memory("training, DDP", model.num_bytes + base_bytes, 2 * gradients, 2 * gradients)

    num_trained = sum(parameter.numel() for parameter in model.trained)
    num_unquantized = sum(parameter.numel() for parameter in model.unquantized)
    whole = model.num_bytes - sum(parameter.nbytes for parameter in model.unquantized)  # sharded by no engine
    optimizer = 16 * num_trained // num_processes  # weights, gradients and two states, in float32
    share = size * num_trained // num_processes
    weights = whole + size * num_unquantized + base_bytes
    yield Memory("training, ZeRO-1", weights, size * num_trained, optimizer)
    yield Memory("training, ZeRO-2", weights, share, optimizer)

    gathered = size * min(num_unquantized, ZERO3_LIVE_PARAMETERS)
    weights = whole + size * num_unquantized // num_processes + gathered + sharded_bytes
    yield Memory("training, ZeRO-3", weights, share, optimizer)

    layers = _layer_sizes(model)
    gathered = size * (num_unquantized - sum(layers) + 2 * max(layers))  # parameters outside layers, and two layers
    shards = sum(4 * p.numel() if p.requires_grad else p.nbytes for p in model.unquantized)
    weights = whole + shards // num_processes + gathered + sharded_bytes
    yield Memory("training, FSDP2", weights, 4 * num_trained // num_processes, 8 * num_trained // num_processes)


def _layer_sizes(model: _StoredModel) -> list[int]:
    """Number of unquantized parameters in each decoder layer, that is, in the modules of the largest `ModuleList`."""
    lists = [module for module in model.model.modules() if isinstance(module, torch.nn.ModuleList)]
    sizes = [
        [sum(p.numel() for p in layer.parameters() if id(p) not in model.quantized) for layer in each]
        for each in lists
    ]
    return max(sizes, key=sum)

# SPDX-License-Identifier: Apache-2.0

"""What a training will read, do and hold in memory, worked out from configs and data: no weights, no accelerator."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.trainer import disable_dropout_in_model

from ..annotation.score_cache import SHARD_SIZE
from ..annotation.token_rewards import REWARD_COLUMNS
from ..common._upstream import unwrap_peft
from ..data.tokenization import FACE_COLUMNS, ID_COLUMNS, all_eos_token_ids, tokenize_preferences
from ..faces import Faces, resolve_faces
from ..models.doctor import make_doctor
from ..models.guidance_head import GuidanceHead
from ..models.named_model import model_without_weights
from .activation_memory import peak_activations, reads_branches
from .config import TFPOConfig
from .reference import REFERENCE_COLUMNS


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


LOGPS_TOKENS, LOGPS_IDS = 4096, 32768  # the tile of TRL's fused head
ZERO3_LIVE_PARAMETERS = 10**9  # DeepSpeed's default of `stage3_max_live_parameters`
GIB = 2**30
NOTE = (
    "An estimate: nothing was loaded or run. Counts of parameters and bytes of weights are exact. Activations are those "
    "of the model's own operations, by shape, for a batch in which every row is as long as the longest, with SDPA that "
    "does not hold attention weights. Peaks that need not coincide are added, and the optimizer is AdamW. Weights in 4 or "
    "8 bits count whole in each process. Left out: padding in the counts of tokens, what CUDA, NCCL and the allocator "
    "keep for themselves, buffers of communication other than DDP's buckets and gathered weights, evaluation, "
    "offloading, and a head with a row for each token, where the data ask for one."
)


@dataclass(frozen=True)
class Memory:
    """
    Bytes that one process holds in one phase.

    Args:
        phase (`str`):
            What is done.
        weights (`int`):
            Weights, with those gathered from other processes.
        gradients (`int`):
            Gradients, with the buckets in which DDP sends them.
        optimizer (`int`):
            Two states of AdamW and, with DeepSpeed, its float32 copies of weights and gradients.
        logps (`int`):
            Buffers of the log-probabilities.
        activations (`int`, *optional*):
            The most that the forward and backward pass hold beside all these. None where the model's operations depend
            on values, as in some mixtures of experts: not estimated, and not in the total.
        kept_activations (`int`, *optional*):
            The same without activation checkpointing. None where there is no backward pass.
    """

    phase: str
    weights: int
    gradients: int
    optimizer: int
    logps: int
    activations: int | None
    kept_activations: int | None = None

    @property
    def total(self) -> int:
        """Sum of all that is estimated, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.logps + (self.activations or 0)


@dataclass(frozen=True)
class TrainingPlan:
    """
    What [`training_plan`] found. `str(plan)` is a page of Markdown.

    Args:
        num_pairs (`int`):
            Preference pairs that are trained on, extrapolated where only some were tokenized.
        num_tokenized_pairs (`int`):
            How many were tokenized.
        is_extrapolated (`bool`):
            Whether there are more.
        longest_row (`int`):
            Tokens of the longest row of a training batch: of all pairs, or `max_length` where only some were tokenized.
        annotation_tokens (`int`):
            Tokens that the patient reads, in all processes. 0 for an annotated dataset.
        reference_tokens (`int`):
            Tokens that the doctor reads before training, as the reference. 0 without one.
        training_tokens (`int`):
            Tokens in the batches of one epoch.
        num_shards (`int`):
            Shards of what is scored before training: shared out between processes, and kept as they are done.
        num_update_steps (`int`):
            Optimizer steps of the whole training.
        num_processes (`int`):
            Processes that share the work.
        patient_parameters (`int`):
            Parameters of the patient. 0 for an annotated dataset.
        doctor_parameters (`int`):
            Parameters of the doctor with its value head and adapter.
        trainable_parameters (`int`):
            Those of them that are trained.
        memory (list of [`Memory`]):
            The phases one after the other; training under each engine where there are several processes.
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
        counts = [
            ("preference pairs", self.num_pairs, tokenized),
            (
                "tokens of the longest row",
                self.longest_row,
                "`max_length`" if self.is_extrapolated else "all tokenized",
            ),
            ("tokens annotated by the patient", self.annotation_tokens, f"once, in {self.num_shards:,} shards"),
            ("tokens scored by the reference", self.reference_tokens, f"once, in {self.num_shards:,} shards"),
            ("tokens trained on", self.training_tokens, "in each epoch"),
            ("optimizer steps", self.num_update_steps, f"with {self.num_processes} process(es)"),
            ("parameters of the patient", self.patient_parameters, "frozen"),
            ("parameters of the doctor", self.doctor_parameters, f"{self.trainable_parameters:,} trained"),
        ]
        lines = [
            "| plan | | |",
            "|---|---:|---|",
            *(f"| {name} | {count:,} | {note} |" for name, count, note in counts),
        ]
        lines += [
            "",
            "| GiB in each process | weights | gradients | optimizer | log-probabilities | activations | sum | "
            "activations without checkpointing |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in self.memory:
            sizes = [row.weights, row.gradients, row.optimizer, row.logps, row.activations, row.total]
            cells = ["-" if size is None else f"{size / GIB:.2f}" for size in [*sizes, row.kept_activations]]
            lines.append(f"| {row.phase} | {' | '.join(cells)} |")
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
    Work out what [`TFPOTrainer`] would do with these arguments, without weights and without an accelerator.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference dataset of any of TRL's formats, or an annotated one.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of doctor and patient.
        doctor (`str` or [`~transformers.PreTrainedConfig`]):
            Name, path or config of the doctor. Only the config is read; weights that are stored quantized count as if
            they were not.
        patient (`str` or [`~transformers.PreTrainedConfig`], *optional*):
            The same for the patient. Not needed for an annotated dataset.
        args ([`TFPOConfig`]):
            Settings of the training.
        faces ([`~trl_tfpo.faces.Faces`] or `str`, *optional*):
            Faces of the patient, which lengthen its prompts.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Of the doctor.
        patient_quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Of the patient.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter of the doctor.
        num_processes (`int`, *optional*, defaults to `1`):
            Processes that the training will have.
        mixed_precision (`bool`, *optional*, defaults to `True`):
            Whether it will compute in bfloat16, as by default on an accelerator.
        max_pairs (`int`, *optional*, defaults to `1000`):
            Of a longer dataset this many pairs are drawn and tokenized, and counts are extrapolated.

    Returns:
        [`TrainingPlan`]: counts, and the bytes of each phase.

    Raises:
        `ValueError`: when the dataset is empty, streamed or not a preference dataset, when a pair is unusable, and when
        a patient or its faces are missing.

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
    if not isinstance(dataset, Dataset) or len(dataset) == 0:
        raise ValueError(
            "A plan needs a dataset of known length, and at least one pair. Got "
            f"{dataset!r}; pass one split with rows, loaded with `streaming=False`."
        )
    is_annotated = set(dataset.column_names).issuperset(ID_COLUMNS + REWARD_COLUMNS)
    if not is_annotated and (patient is None or faces is None):
        raise ValueError(
            "A dataset without token rewards needs a patient and faces. Got "
            f"`patient={patient!r}` and `faces={faces!r}`; pass both, or an annotated dataset."
        )
    if args.policy == "guided" and patient is None:
        raise ValueError(
            "`policy='guided'` needs the patient in training. Got `patient=None`; pass its name or config."
        )
    compute_dtype = torch.bfloat16 if mixed_precision else torch.float32

    # Models
    model = _empty_model(doctor, args.model_init_kwargs, "float32", args)
    quantized = _quantized(model, quantization_config)
    if patient is not None:
        frozen = _empty_model(patient, args.patient_model_init_kwargs, "auto", args)
    guided, width = 0, 0  # bytes of what the doctor guides in training, and the size of its hidden states
    if args.policy != "doctor":
        is_ratio = args.policy == "ratio"
        beside, its_config = (model, quantization_config) if is_ratio else (frozen, patient_quantization_config)
        guided = _weight_bytes(beside, _quantized(beside, its_config), its_config)
        width = beside.config.get_text_config().hidden_size
    model = make_doctor(model, peft_config, guides=args.policy != "doctor", has_credits=args.calibrate_rewards)
    if args.disable_dropout:
        disable_dropout_in_model(model)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights = _weight_bytes(model, quantized, quantization_config)

    # Data
    pairs = dataset if len(dataset) <= max_pairs else dataset.shuffle(seed=0).select(range(max_pairs))
    scale = len(dataset) / len(pairs)
    if not is_annotated:
        pairs = tokenize_preferences(
            pairs,
            processing_class,
            faces=resolve_faces(faces),
            eos_token_ids=all_eos_token_ids(processing_class, frozen),
            max_length=args.max_length,
            drop_unusable=args.drop_unusable,
            convert_transcripts=args.convert_transcripts,
        )
    lengths = {name: [len(ids) for ids in pairs[name]] for name in pairs.column_names if name.endswith("_ids")}
    prompts, chosen, rejected = (lengths[name] for name in ID_COLUMNS)
    num_pairs = round(len(pairs) * scale)
    longest_completion = max(chosen + rejected)
    longest_row = max(map(sum, (*zip(prompts, chosen, strict=True), *zip(prompts, rejected, strict=True))))
    if scale > 1 and args.max_length:
        longest_row = args.max_length  # some pair that was not read may have it

    # What is scored before training
    memory, annotation_tokens, reference_tokens = [], 0, 0
    if not is_annotated:
        annotation_tokens, memory_of_patient = _plan_scoring(
            "annotation",
            frozen,
            _quantized(frozen, patient_quantization_config),
            patient_quantization_config,
            [(lengths[name], chosen, rejected) for name in FACE_COLUMNS],
            args,
            # The doctor is there already, but with several processes not yet on the accelerator
            beside=weights if num_processes == 1 or quantized else 0,
        )
        memory.append(memory_of_patient)
    if args.reference_weight and args.policy == "doctor" and not set(REFERENCE_COLUMNS) <= set(dataset.column_names):
        reference_tokens, memory_of_reference = _plan_scoring(
            "reference", model, quantized, quantization_config, [(prompts, chosen, rejected)], args
        )
        memory.append(memory_of_reference)

    # Training
    num_rows = 2 * args.per_device_train_batch_size
    head = model.get_output_embeddings()
    is_shared = isinstance(head, GuidanceHead) and args.policy == "ratio"  # embeddings: both heads are one product
    hidden_size = unwrap_peft(model).config.get_text_config().hidden_size + (0 if is_shared else width)
    head = head.weight
    logps = _logps_bytes(num_rows * longest_completion, hidden_size, compute_dtype) + (
        num_rows * longest_completion * hidden_size * 4 + (len(head) * hidden_size * 4 if head.requires_grad else 0)
    )
    if guided and not is_shared:  # the head that is as wide as both
        logps += len(head) * hidden_size * head.itemsize
    activations = {}
    for casts_weights in (False, True) if num_processes > 1 else (False,):  # DDP autocasts, the others cast
        for checkpoints in (False, True) if args.activation_checkpointing else (False,):
            activations[casts_weights, checkpoints] = peak_activations(
                model,
                num_rows=num_rows,
                num_tokens=longest_row,
                compute_dtype=compute_dtype,
                quantized=quantized,
                trains=True,
                casts_weights=casts_weights,
                checkpoints=checkpoints,
            )
    for engine, casts_weights, *states in _engine_states(
        model, parameters, trained, quantized, weights, compute_dtype.itemsize, num_processes
    ):
        held, *others = states
        is_shared_out = engine.endswith(("ZeRO-3", "FSDP2"))
        memory.append(
            Memory(
                engine,
                held + (guided // num_processes if is_shared_out else guided),
                *others,
                logps,
                activations[casts_weights, bool(args.activation_checkpointing)],
                activations[casts_weights, False],
            )
        )

    # Steps, as `Trainer` and Accelerate count them
    num_batches = num_pairs / args.per_device_train_batch_size / num_processes
    num_batches = math.floor(num_batches) if args.dataloader_drop_last else math.ceil(num_batches)
    steps_per_epoch = max(1, math.ceil(num_batches / args.gradient_accumulation_steps))
    return TrainingPlan(
        num_pairs=num_pairs,
        num_tokenized_pairs=len(pairs),
        is_extrapolated=scale > 1,
        longest_row=longest_row,
        annotation_tokens=round(annotation_tokens * scale),
        reference_tokens=round(reference_tokens * scale),
        training_tokens=round(scale * (2 * sum(prompts) + sum(chosen) + sum(rejected))),
        num_shards=math.ceil(num_pairs / SHARD_SIZE),
        num_update_steps=args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch),
        num_processes=num_processes,
        patient_parameters=0 if is_annotated else frozen.num_parameters(),
        doctor_parameters=sum(parameter.numel() for parameter in parameters),
        trainable_parameters=sum(parameter.numel() for parameter in trained),
        memory=memory,
    )


# Models without weights


def _empty_model(
    source: str | PreTrainedConfig, init_kwargs: dict | None, default_dtype: str, args: TFPOConfig
) -> PreTrainedModel:
    """The model that would be loaded, on the meta device, with a config of its own."""
    init_kwargs = init_kwargs or {}
    if isinstance(source, str):
        source = AutoConfig.from_pretrained(
            source, revision=init_kwargs.get("revision"), trust_remote_code=args.trust_remote_code
        )
    dtype = init_kwargs.get("dtype", default_dtype)
    return model_without_weights(copy.deepcopy(source), dtype, trust_remote_code=args.trust_remote_code)


def _quantized(model: PreTrainedModel, config: BitsAndBytesConfig | None) -> set[int]:
    """Ids of the weights that bitsandbytes stores in 4 or 8 bits: of all linear layers but the head."""
    if config is None or not (config.load_in_4bit or config.load_in_8bit):
        return set()
    kept = [model.get_output_embeddings()]
    kept += [model.get_submodule(name) for name in config.llm_int8_skip_modules or []]
    return {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and not any(module is other for other in kept)
    }


def _weight_bytes(model: "PreTrainedModel | PeftModel", quantized: set[int], config: BitsAndBytesConfig | None) -> int:
    """Bytes of parameters, buffers, and the constants of quantization."""
    num_bytes = sum(buffer.nbytes for buffer in model.buffers())
    for parameter in model.parameters():
        if id(parameter) not in quantized:
            num_bytes += parameter.nbytes
        elif config.load_in_8bit:
            num_bytes += parameter.numel() + 4 * len(parameter)  # a scale for each row
        else:
            num_blocks = math.ceil(parameter.numel() / 64)
            num_bytes += math.ceil(parameter.numel() / 2) + 16 * 4  # the code
            if config.bnb_4bit_use_double_quant:
                num_bytes += num_blocks + 4 * math.ceil(num_blocks / 256) + 256 * 4 + 4
            else:
                num_bytes += 4 * num_blocks
    return num_bytes


# Memory


def _plan_scoring(
    phase: str,
    model: "PreTrainedModel | PeftModel",
    quantized: set[int],
    quantization_config: BitsAndBytesConfig | None,
    lengths: list[tuple[list[int], list[int], list[int]]],
    args: TFPOConfig,
    beside: int = 0,
) -> tuple[int, Memory]:
    """Tokens that the model reads to score pairs of these lengths, and what it holds beside so many bytes."""
    config = unwrap_peft(model).config.get_text_config()
    if reads_branches(model):
        rows = [prompt + one + other + 1 for part in lengths for prompt, one, other in zip(*part, strict=True)]
        num_rows = max(1, args.scoring_batch_size // 2)
    else:
        rows = [
            prompt + one
            for part in lengths
            for name in (1, 2)
            for prompt, one in zip(part[0], part[name], strict=True)
        ]
        num_rows = args.scoring_batch_size
    longest_completion = max(max(one + other) for _, one, other in lengths)
    largest = max((parameter.numel() for parameter in model.parameters() if id(parameter) in quantized), default=0)
    compute_dtype = torch.bfloat16 if quantized else unwrap_peft(model).dtype
    activations = peak_activations(
        model, num_rows=num_rows, num_tokens=max(rows), compute_dtype=compute_dtype, quantized=quantized
    )
    return sum(rows), Memory(
        phase,
        weights=beside
        + _weight_bytes(model, quantized, quantization_config)
        + largest * compute_dtype.itemsize,  # one layer at a time is dequantized
        gradients=0,
        optimizer=0,
        logps=_logps_bytes(args.scoring_batch_size * longest_completion, config.hidden_size, compute_dtype),
        activations=activations,
    )


def _logps_bytes(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes of a tile of logits, and of the hidden states and the slice of the head it is made of."""
    return dtype.itemsize * (min(num_tokens, LOGPS_TOKENS) * LOGPS_IDS + (num_tokens + LOGPS_IDS) * hidden_size)


def _engine_states(model, parameters, trained, quantized, weights, half, num_processes) -> Iterator[tuple]:
    """For each engine its name, whether it casts the weights, and bytes of weights, gradients and optimizer."""
    num_trained = sum(parameter.numel() for parameter in trained)
    gradients = sum(parameter.nbytes for parameter in trained)
    if num_processes == 1:
        yield "training", False, weights, gradients, 2 * gradients
        return
    yield "training, DDP", False, weights, 2 * gradients, 2 * gradients  # DDP's buckets are a copy

    num_floats = sum(parameter.numel() for parameter in parameters if id(parameter) not in quantized)
    whole = weights - sum(parameter.nbytes for parameter in parameters if id(parameter) not in quantized)
    optimizer = 16 * num_trained // num_processes  # weights, two states, and gradients for the step, in float32
    yield "training, ZeRO-1", True, whole + half * num_floats, half * num_trained, optimizer
    yield "training, ZeRO-2", True, whole + half * num_floats, half * num_trained // num_processes, optimizer
    gathered = half * min(num_floats, ZERO3_LIVE_PARAMETERS)
    yield (
        "training, ZeRO-3",
        True,
        whole + half * num_floats // num_processes + gathered,
        half * num_trained // num_processes,
        optimizer,
    )
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = max(
        ([sum(p.numel() for p in layer.parameters() if id(p) not in quantized) for layer in each] for each in lists),
        key=sum,
    )
    gathered = half * (num_floats - sum(layers) + 2 * max(layers))  # what is in no layer, a layer and the next
    shards = sum(4 * p.numel() if p.requires_grad else p.nbytes for p in parameters if id(p) not in quantized)
    yield (
        "training, FSDP2",
        True,
        whole + shards // num_processes + gathered,
        4 * num_trained // num_processes,
        8 * num_trained // num_processes,
    )

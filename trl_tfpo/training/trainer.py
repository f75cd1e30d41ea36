# SPDX-License-Identifier: Apache-2.0

"""Trainer of a doctor by token-level flow-guided preference optimization (TFPO)."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate.utils import set_seed
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.data.data_collator import DataCollator
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, PredictionOutput, TrainOutput

from ..annotation.token_rewards import (
    GAP_COLUMNS,
    REWARD_COLUMNS,
    annotate_token_rewards,
    check_annotated_for,
    check_has_patient,
    check_patient,
)
from ..common._upstream import keep_output_precision
from ..common.arguments import explains_unknown
from ..common.atomic import check_writable
from ..common.language_model import LanguageModel
from ..data.tokenization import (
    FACE_COLUMNS,
    ID_COLUMNS,
    MASK_COLUMNS,
    all_eos_token_ids,
    check_some_completion_ends,
    columns_of,
    row_lengths,
    tokenize_preferences,
)
from ..faces import Faces, resolve_faces
from ..models.doctor import set_head_learning_rate
from ..models.fingerprint import model_fingerprint
from ..models.initial_head import start_at_credits
from ..models.named_model import NamedModel, outline_of
from .arguments import objective_of, prepare_doctor, resolve_doctor, resolve_patient, resolve_tokenizer, reward_fn_of
from .base_policy import POLICIES, place_base_policy, read_base_policy
from .checkpoints import complete_checkpoint, resolve_checkpoint
from .checks import (
    check_callables,
    check_can_annotate,
    check_collator,
    check_loss,
    check_one_device,
    check_split,
)
from .collator import TokenRewardCollator, align_with_collator
from .config import TFPOConfig, resolve_args
from .doctor_files import DoctorFiles
from .head_choice import choose_head
from .objective import describe_batch, pair_rewards
from .overfitting import WarnOfOverfitting
from .pair_means import PairMeans
from .reference import REFERENCE_COLUMNS, check_not_streamed, with_reference_logps
from .reward_choice import choose_rewards


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


AnyDataset: TypeAlias = Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict


@explains_unknown(settings=TFPOConfig)
class TFPOTrainer(DoctorFiles):
    """
    Trainer for token-level flow-guided preference optimization (TFPO), the method of
    [LLMdoctor](https://huggingface.co/papers/2601.10416).

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The doctor: a causal language model with the patient's tokenizer, or its name or path.
        patient_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Frozen language model that annotates datasets without token rewards. It is released after annotation. With
            `policy="guided"` it is always required, stays in memory, and reads each batch.
        args ([`TFPOConfig`], *optional*):
            Settings. Defaults to `TFPOConfig("<model name>-TFPO")`.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Defaults to a [`TokenRewardCollator`] that reads annotated columns. A `TokenRewardCollator` with a patient
            annotates each batch; the datasets are then not annotated before training.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference dataset in any format of TRL, or a dataset annotated by [`annotate_token_rewards`]. A streamed
            dataset must be annotated. With `policy="doctor"` it also needs `chosen_ref_logps` and
            `rejected_ref_logps`, unless `reference_weight=0`.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], or `dict` of them, *optional*):
            Preference dataset for evaluation, with the same conditions.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of doctor and patient. Defaults to the tokenizer of the doctor.
        compute_metrics, callbacks, optimizers (*optional*):
            As in [`~transformers.Trainer`]. `compute_metrics` is not called, because there are no labels.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a doctor given by name.
        patient_quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a patient given by name.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Config of an adapter to train. The value head is trained and saved with the adapter.
        faces ([`~trl_tfpo.faces.Faces`] or `str`, *optional*):
            Contrastive prompts: a pair of opposite instructions for the patient, or one of the pairs `"helpfulness"`,
            `"harmlessness"` and `"honesty"`. Required to annotate a dataset.
        reward_fn (`Callable`, *optional*):
            Replaces [`~trl_tfpo.functional.token_rewards`] in annotation.
        objective (`Callable`, *optional*):
            Replaces [`~trl_tfpo.training.objective.tfpo_objective`]. Receives the same tensors as keyword arguments,
            and returns `(loss, metrics)`.

    Raises:
        `ValueError`: if doctor, patient, tokenizer, datasets and settings are not compatible.
        `TypeError`: if an argument does not exist. For arguments of other TRL trainers, it names the replacement.

    Examples:

    ```python
    >>> from trl_tfpo import TFPOConfig, TFPOTrainer
    >>> from trl_tfpo.testbed import load_world
    >>> world = load_world()
    >>> trainer = TFPOTrainer(
    ...     model=world.doctor,
    ...     patient_model=world.patient,
    ...     args=TFPOConfig("runs/docs", max_steps=1, report_to="none", disable_tqdm=True),
    ...     train_dataset=world.preference_dataset("praise", num_pairs=8, seed=0),
    ...     processing_class=world.tokenizer,
    ...     faces=world.attributes["praise"].faces,
    ... )
    >>> result = trainer.train()  # doctest: +ELLIPSIS
    {'train_runtime': ...}
    >>> result.global_step
    1

    ```
    """

    _tag_names = ["trl", "tfpo", "trl-tfpo"]
    _name = "TFPO"
    _paper = {
        "title": "LLMdoctor: Token-Level Flow-Guided Preference Optimization for Efficient Test-Time Alignment of "
        "Large Language Models",
        "id": "2601.10416",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{llmdoctor2026,
                title     = {{LLMdoctor: Token-Level Flow-Guided Preference Optimization for Efficient Test-Time
                             Alignment of Large Language Models}},
                year      = 2026,
                booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
                eprint    = {2601.10416},
            }"""),
    }
    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # `compute_loss` divides by the pairs of a step

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        patient_model: str | PreTrainedModel | None = None,
        args: TFPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: AnyDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        patient_quantization_config: BitsAndBytesConfig | None = None,
        peft_config: "PeftConfig | None" = None,
        faces: Faces | str | None = None,
        reward_fn: Callable[..., torch.Tensor] | None = None,
        objective: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]] | None = None,
    ):
        # Settings
        args = resolve_args(args, model)
        check_callables(reward_fn=reward_fn, objective=objective)
        check_split(train_dataset, "train_dataset")
        if isinstance(train_dataset, IterableDataset):
            accelerator_config: Any = args.accelerator_config
            accelerator_config.dispatch_batches = False  # batches of different lengths cannot be concatenated
        policy = POLICIES[args.policy]
        self.faces = faces
        self.reward_fn = reward_fn or reward_fn_of(args)
        self.objective: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]] = objective or objective_of(args)

        # Models and tokenizer
        set_seed(args.seed)  # the initial weights of adapters are random
        self.patient_model = resolve_patient(patient_model, args, patient_quantization_config)
        language_model = resolve_doctor(model, args, quantization_config)
        base_policy = policy.base(language_model, self.patient_model)  # before the heads are added
        doctor = language_model.loaded if isinstance(language_model, NamedModel) else language_model
        processing_class = resolve_tokenizer(processing_class, doctor, args)
        doctor = prepare_doctor(doctor, args, policy, peft_config)

        # Data
        if data_collator is None:
            data_collator = TokenRewardCollator(
                processing_class,
                max_length=args.max_length,
                pad_to_multiple_of=args.pad_to_multiple_of,
                convert_transcripts=args.convert_transcripts,
            )
        check_collator(data_collator, args)
        train_dataset, eval_dataset = self._prepare_data(
            train_dataset, eval_dataset, doctor, processing_class, data_collator, args
        )
        if policy.needs_patient:
            check_has_patient(self.patient_model)
        elif isinstance(self.patient_model, NamedModel):
            self.patient_model.unload()
        else:
            self.patient_model = None

        # Trainer
        super().__init__(
            model=doctor,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_one_device(self.args)
        self.add_callback(WarnOfOverfitting(self.callback_handler))
        keep_output_precision(self.accelerator)

        # Base policy, and initial logits of the doctor
        if policy.needs_patient:
            check_patient(self.patient_model, processing_class)  # type: ignore[arg-type]  # given, see above
        self.base_policy = None if base_policy is None else place_base_policy(base_policy, self.accelerator)
        if self.calibration is not None:
            credits = self.calibration.credits / args.reward_temperature
            start_at_credits(doctor, credits, self.train_dataset, data_collator)

        # Reference log-probabilities. With a base policy, they are computed for each batch
        self._caches_reference = args.reference_weight > 0 and not policy.has_base
        self._reference_fingerprint = model_fingerprint(doctor) if self._caches_reference else None
        self.train_dataset = self._add_reference_logps(self.train_dataset)
        self.eval_dataset = self._add_reference_logps(self.eval_dataset)

        # Metrics
        self._means = PairMeans()
        self._metric_key_prefix = "eval"
        doctor.add_model_tags(self._tag_names)

    # Data

    def _prepare_data(
        self,
        train_dataset: Dataset | IterableDataset,
        eval_dataset: AnyDataset | None,
        model: LanguageModel,
        processing_class: PreTrainedTokenizerBase,
        data_collator: DataCollator,
        args: TFPOConfig,
    ) -> tuple[AnyDataset, AnyDataset | None]:
        """Annotate both datasets, calibrate their rewards, and choose the head of the doctor."""
        patient = None if self.patient_model is None else outline_of(self.patient_model)
        self._eos_token_ids = all_eos_token_ids(processing_class, model, patient)
        self._online_faces, max_length = None, args.max_length
        if isinstance(data_collator, TokenRewardCollator):
            self._online_faces = data_collator.faces
            self._eos_token_ids = align_with_collator(data_collator, args, train_dataset, self._eos_token_ids)
            max_length = data_collator.max_length
        train_dataset = self._annotate(train_dataset, processing_class, args)
        eval_dataset = self._annotate(eval_dataset, processing_class, args)
        check_some_completion_ends(train_dataset, self._eos_token_ids, max_length)
        is_online = bool(self._online_faces)
        self.calibration, self.rewards_summary = choose_rewards(
            train_dataset, eval_dataset, model, args, self._eos_token_ids, is_online=is_online
        )
        train_dataset, eval_dataset = self._calibrate(train_dataset), self._calibrate(eval_dataset)
        if self.calibration is None:  # token credits always lie in the span of the embeddings
            choose_head(model, train_dataset, self._eos_token_ids, is_online=is_online)
        return train_dataset, eval_dataset

    def _annotate(
        self, dataset: AnyDataset | None, processing_class: PreTrainedTokenizerBase, args: TFPOConfig
    ) -> AnyDataset | None:
        """Add token rewards to a dataset, or only token ids if the collator annotates each batch."""
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: self._annotate(split, processing_class, args) for name, split in dataset.items()}
        columns = columns_of(dataset)
        if args.reference_weight and not POLICIES[args.policy].has_base:
            check_not_streamed(dataset, columns, args.reference_weight)
        if self._online_faces:
            if FACE_COLUMNS[0] in columns:
                return dataset
            return tokenize_preferences(
                dataset,
                processing_class,
                faces=resolve_faces(self._online_faces),
                eos_token_ids=self._eos_token_ids,
                max_length=args.max_length,
                drop_unusable=args.drop_unusable,
                convert_transcripts=args.convert_transcripts,
            )
        if columns.issuperset(ID_COLUMNS + REWARD_COLUMNS):
            check_annotated_for(dataset, processing_class)
            return dataset
        check_can_annotate(dataset, self.faces, self.patient_model)
        return annotate_token_rewards(
            dataset,
            self.patient_model,  # type: ignore[arg-type]  # not None, nor are faces: see above
            processing_class,
            faces=self.faces,  # type: ignore[arg-type]
            reward_fn=self.reward_fn,
            max_length=args.max_length,
            drop_unusable=args.drop_unusable,
            batch_size=args.scoring_batch_size,
            convert_transcripts=args.convert_transcripts,
            eos_token_ids=self._eos_token_ids,
        )

    def _calibrate(self, dataset: AnyDataset | None, needs_gaps: bool = True) -> AnyDataset | None:
        """Calibrate the rewards of a dataset if calibrated rewards are used."""
        if dataset is None or self.calibration is None:
            return dataset
        return self.calibration.apply(dataset, needs_gaps=needs_gaps)

    def _add_reference_logps(self, dataset: AnyDataset | None) -> AnyDataset | None:
        """Add reference log-probabilities to a dataset, if there is a reference but no base policy."""
        if dataset is None or not self._caches_reference:
            return dataset
        return with_reference_logps(dataset, self, fingerprint=str(self._reference_fingerprint))

    def _prepare_new(self, dataset: AnyDataset) -> Any:
        """Annotate a new dataset, calibrate its rewards, and add reference log-probabilities."""
        dataset = self._annotate(dataset, self.processing_class, self.args)
        dataset = self._calibrate(dataset, needs_gaps=bool(self.args.calibrate_rewards))
        return self._add_reference_logps(dataset)

    def _set_signature_columns_if_needed(self):
        # Columns that the collator reads. By default `Trainer` keeps arguments of the model's forward
        if self._signature_columns is None:
            scores = [*REWARD_COLUMNS, *GAP_COLUMNS, *REFERENCE_COLUMNS]
            self._signature_columns = [*ID_COLUMNS, *MASK_COLUMNS, *FACE_COLUMNS, *scores]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        name = self.args.length_column_name
        needs_lengths = self.args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        if needs_lengths and isinstance(dataset, Dataset) and name not in dataset.column_names:
            dataset = dataset.add_column(name, row_lengths(dataset))  # for the sampler only
        return super()._get_train_sampler(dataset)

    def _prepare_inputs(self, inputs: dict) -> dict:
        # With DeepSpeed in half precision, the parent class would also cast token rewards
        return {name: tensor.to(self.args.device) for name, tensor in inputs.items()}

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        output_dir = str(self.args.output_dir)
        if self.args.should_save:
            check_writable(output_dir)
        checkpoint = resolve_checkpoint(resume_from_checkpoint, output_dir)
        self._measured = None  # the strengths of other weights
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def create_optimizer(self, model=None):
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            rate = self.args.value_head_learning_rate
            rate = 10 * self.args.learning_rate if rate is None else rate
            set_head_learning_rate(optimizer, model or self.model, rate)
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}
        if self.base_policy is None:
            outputs, reference_logps = model(**tokens), inputs.get("reference_logps")
        else:
            base_logits, reference_logps = read_base_policy(self.base_policy, **tokens)
            outputs = model(**tokens, base_logits=base_logits)
        loss, metrics = self.objective(
            **outputs,
            token_rewards=inputs["token_rewards"],
            is_complete=inputs["is_complete"],
            reference_logps=reference_logps,
        )
        check_loss(loss, inputs, self)
        num_pairs = len(inputs["is_complete"]) // 2
        rewards = None
        if reference_logps is not None:
            rewards = pair_rewards(
                doctor_logps=outputs["doctor_logps"],
                reference_logps=reference_logps,
                completion_mask=outputs["completion_mask"],
                reward_temperature=self.args.reward_temperature,
            )
        description = describe_batch(
            doctor_logps=outputs["doctor_logps"],
            completion_mask=outputs["completion_mask"],
            token_rewards=inputs["token_rewards"],
            gaps=inputs.get("gaps"),
            rewards=rewards,
        )
        self._means.record(self._mode, metrics | description, num_pairs, self.accelerator.gather)
        if num_items_in_batch is not None:
            loss = loss * (num_pairs * self.accelerator.num_processes / num_items_in_batch)
        return (loss, {**outputs, "rewards": rewards}) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Batches of one optimizer step, and the number of their pairs in all processes, the divisor of the loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_pairs = torch.tensor(sum(len(batch["is_complete"]) // 2 for batch in batches), device=device)
        return batches, self.accelerator.gather(num_pairs).sum()

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        prefix = f"{self._metric_key_prefix}_" if self._mode == "eval" else ""
        # In place, because `evaluate` returns this dict, and `metric_for_best_model` is looked up in it
        logs.update(self._means.take(self._mode, prefix))
        super().log(logs, start_time)

    # Evaluation

    def evaluate(
        self,
        eval_dataset: AnyDataset | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        self._metric_key_prefix = metric_key_prefix
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[arg-type]
        if isinstance(eval_dataset, dict):
            metrics: dict[str, float] = {}
            for name, split in eval_dataset.items():
                metrics |= self.evaluate(split, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        return super().evaluate(self._prepare_new(eval_dataset), ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """
        Compute metrics and the implicit rewards of pairs.

        Args:
            test_dataset ([`~datasets.Dataset`]):
                Preference dataset in any of the formats of `train_dataset`.
            ignore_keys (`list[str]`, *optional*):
                Has no effect.
            metric_key_prefix (`str`, *optional*, defaults to `"test"`):
                Prefix of the names of the metrics.

        Returns:
            [`~transformers.trainer_utils.PredictionOutput`]: `predictions` of shape `(num_pairs, 2)`, the implicit
            rewards of the chosen and of the rejected completion, see [`~trl_tfpo.training.objective.pair_rewards`], or
            `None` without a reference; and `metrics` as in `evaluate`.

        Raises:
            `ValueError`: if the dataset is a dict of splits, cannot be annotated, or has no gaps although
                `calibrate_rewards=True`; with `policy="doctor"` and a reference, if the doctor has been trained and
                the dataset has no reference log-probabilities.
        """
        check_split(test_dataset, "test_dataset")
        output = super().predict(self._prepare_new(test_dataset), ignore_keys, metric_key_prefix)
        metrics = {**(output.metrics or {}), **self._means.take("eval", f"{metric_key_prefix}_")}
        return output._replace(metrics=metrics)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), None if prediction_loss_only else outputs["rewards"], None

    # Saving: see also `DoctorFiles`

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with complete_checkpoint(self, folder):
            super()._save_checkpoint(model, trial)

# SPDX-License-Identifier: Apache-2.0

"""
The methods that `frontier.py` compares. All have the same preference pairs, steps and batches. Our methods, and "the
faces alone", also use the two faces of the patient.

A method returns a *guide* for a task and settings. A method without a guide returns a *policy*: a function from a
comparison and a strength to a row of results.
"""

import inspect
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from patient_samples import Guide, PatientSamples
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, DynamicCache, PreTrainedModel, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from trl_tfpo import DoctorGuidedLogitsProcessor, TFPOConfig, TFPOTrainer, annotate_token_rewards
from trl_tfpo.data.tokenization import tokenize_prompt
from trl_tfpo.evaluation import RewardModel, best_of_n
from trl_tfpo.faces import apply_face
from trl_tfpo.functional import token_rewards
from trl_tfpo.testbed import Comparison, World, load_world
from trl_tfpo.testbed.language import MAX_NEW_TOKENS
from trl_tfpo.training.objective import tfpo_objective


Policy = Callable[[Comparison, float], dict]  # returns the row of a strength


@dataclass(frozen=True)
class Task:
    """Data and settings that all methods share."""

    attribute: str
    seed: int
    num_pairs: int
    max_steps: int
    num_samples_per_prompt: int
    num_patient_samples_per_prompt: int | None = None  # default: four times `num_samples_per_prompt`
    weights: Path | None = None  # of the world; default: the one in the package

    @cached_property
    def world(self) -> World:
        return load_world(self.weights)

    @cached_property
    def pairs(self) -> Dataset:
        return self.world.preference_dataset(self.attribute, num_pairs=self.num_pairs, seed=self.seed)

    @cached_property
    def gaps(self) -> Dataset:
        """The pairs with the gap of the patient's faces at each token."""
        faces, settings = self.world.attributes[self.attribute].faces, dict(batch_size=256, sparsity_threshold=0.0)
        return annotate_token_rewards(self.pairs, self.world.patient, self.world.tokenizer, faces=faces, **settings)

    def rewarded(self, settings: dict) -> Dataset:
        """Return the pairs with token rewards, in the format of `annotate_token_rewards`."""
        names = inspect.signature(token_rewards).parameters
        chosen = {name: value for name, value in settings.items() if name in names}

        def add_rewards(pair: dict) -> dict:
            rewards = {}
            for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
                gap = torch.tensor([pair[f"{side}_gaps"]])
                mask, zero = torch.ones_like(gap, dtype=torch.bool), torch.zeros_like(gap)
                logps = dict(positive_logps=gap, negative_logps=zero, completion_mask=mask)
                found = token_rewards(**logps, preference_sign=torch.tensor([sign]), **chosen)
                rewards[f"{side}_token_rewards"] = found[0].tolist()
            return rewards

        return self.gaps.map(add_rewards)

    def fresh(self, name: str) -> PreTrainedModel:
        """Return a copy of the patient or of the doctor for training."""
        return getattr(load_world(self.weights), name)

    @cached_property
    def _drawn(self) -> dict[str, tuple[Comparison, PatientSamples]]:
        return {}

    def comparison(self, split: str) -> Comparison:
        """Return patient samples and frontier on the prompts of a split. They are drawn once."""
        return self._draw(split)[0]

    def samples(self, split: str) -> PatientSamples:
        """Return the patient samples of the comparison, for importance weighting."""
        return self._draw(split)[1]

    @property
    def key(self) -> dict:
        """Values that identify the rows of this task in an output."""
        return asdict(self) | {"weights": self.weights and str(self.weights)}

    def _draw(self, split: str) -> tuple[Comparison, PatientSamples]:
        if split not in self._drawn:
            names = ("num_samples_per_prompt", "num_patient_samples_per_prompt", "seed")
            settings = {name: getattr(self, name) for name in names}
            comparison = Comparison(self.world, self.attribute, split=split, **settings)
            self._drawn[split] = comparison, PatientSamples.of(comparison)
        return self._drawn[split]

    def common(self, output_dir: str) -> dict:
        """Return settings of all trainers."""
        settings = dict(max_steps=self.max_steps, per_device_train_batch_size=16, seed=self.seed, bf16=False)
        settings |= dict(lr_scheduler_type="cosine", activation_checkpointing=False, dataloader_pin_memory=False)
        return settings | dict(save_strategy="no", report_to="none", disable_tqdm=True, output_dir=output_dir)


@dataclass(frozen=True)
class Method:
    """
    A method and the settings of its measurement.

    Args:
        policy (`Callable`):
            Function from a task and one of the settings to a [`Guide`] or a [`Policy`].
        passes (`str`):
            Forward passes per token, in addition to one of the patient.
        grid (`list[dict]`):
            Settings to try. The best settings are measured.
        largest (`float`):
            Largest strength of a guide.
        strengths (`list[float]`, *optional*):
            Strengths of a policy, which is not matched to a KL.
        num_seeds (`int`, *optional*):
            Number of seeds to measure; all by default.
    """

    policy: Callable[..., Guide | Policy]
    passes: str
    grid: list[dict] = field(default_factory=lambda: [{}])
    largest: float = 1.0
    strengths: list[float] | None = None
    num_seeds: int | None = None


def train(trainer: Trainer) -> None:
    """Train, with logs on standard error, because standard output is for tables."""
    with redirect_stdout(sys.stderr):
        trainer.train()


# This package


def train_tfpo(task: Task, objective=None, **settings) -> PreTrainedModel:
    doctor = task.fresh("doctor")
    with tempfile.TemporaryDirectory() as folder:
        trainer = TFPOTrainer(
            model=doctor,
            patient_model=task.world.patient,
            args=TFPOConfig(**task.common(folder), scoring_batch_size=256, **settings),
            train_dataset=task.rewarded(settings),
            processing_class=task.world.tokenizer,
            objective=objective,
        )
        train(trainer)
    return doctor.eval()


def tfpo(task: Task, **settings) -> Guide:
    """Train a doctor by TFPO. By default it guides by a product, or by a mixture if it is a language model."""
    doctor = train_tfpo(task, **settings)
    return lambda beta: DoctorGuidedLogitsProcessor(doctor, beta=beta)


def product(task: Task, **settings) -> Guide:
    doctor = train_tfpo(task, **settings)
    return lambda beta: DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=beta)


# Others


def train_dpo(task: Task, model: PreTrainedModel, callbacks=None, peft_config=None, **settings) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(**task.common(folder), precompute_ref_log_probs=True, **settings),
            train_dataset=task.pairs,
            processing_class=task.world.tokenizer,
            callbacks=callbacks,
            peft_config=peft_config,
        )
        train(trainer)
    return trainer.model.eval()


def genarm(task: Task, reward_scale: float, **settings) -> Guide:
    def bradley_terry(*, doctor_logps, completion_mask, **_):
        chosen, rejected = doctor_logps.masked_fill(~completion_mask, 0).sum(dim=1).chunk(2)
        return -F.logsigmoid(reward_scale * (chosen - rejected)).mean(), {}

    return product(task, objective=bradley_terry, policy="doctor", reference_weight=0.0, **settings)


def dpo_doctor(task: Task, **settings) -> Guide:
    doctor, reference = train_dpo(task, task.fresh("doctor"), **settings), task.fresh("doctor")
    return lambda beta: DoctorGuidedLogitsProcessor(doctor, beta=beta, reference=reference)


@lru_cache(maxsize=8)
def tuned_patient(task: Task, **settings) -> tuple[PreTrainedModel, dict[float, dict[str, torch.Tensor]]]:
    """Return the patient tuned by DPO, and its weights at each of `STOPS`."""
    saved = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            for share in STOPS:
                if state.global_step == round(share * args.max_steps):
                    saved[share] = {name: x.detach().clone() for name, x in model.state_dict().items()}

    return train_dpo(task, task.fresh("patient"), callbacks=[Keep()], **settings), saved


def dpo_patient(task: Task, **settings) -> Guide:
    tuned, _ = tuned_patient(task, **settings)
    return lambda beta: DoctorGuidedLogitsProcessor(tuned, beta=beta)


def dpo_patient_stopped(task: Task, **settings) -> Policy:
    """Return the tuned patient after a share of the steps, without guidance."""
    _, saved = tuned_patient(task, **settings)
    stopped = task.fresh("patient")

    def policy(comparison: Comparison, share: float) -> dict:
        stopped.load_state_dict(saved[share])
        return comparison.add("stopped", DoctorGuidedLogitsProcessor(stopped, beta=1.0), beta=share)

    return policy


def dpo_patient_lora(task: Task, **settings) -> Guide:
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = train_dpo(task, task.fresh("patient"), peft_config=adapter, **settings).merge_and_unload()
    return lambda beta: DoctorGuidedLogitsProcessor(tuned, beta=beta)


def temperature(task: Task) -> Policy:
    return lambda comparison, value: comparison.add(
        "temperature", DoctorGuidedLogitsProcessor(task.world.patient, alpha=0.0, beta=1 / value), beta=value
    )


@lru_cache(maxsize=4)
def train_reward_model(task: Task, **settings) -> PreTrainedModel:
    """Train the doctor as a reward model with TRL's `RewardTrainer`."""
    with tempfile.TemporaryDirectory() as folder:
        task.world.doctor.save_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        model.config.pad_token_id = task.world.tokenizer.pad_token_id
        args = RewardConfig(**task.common(folder), **settings)
        tokenizer = task.world.tokenizer
        train(RewardTrainer(model=model, args=args, train_dataset=task.pairs, processing_class=tokenizer))
    return model.eval()


def faces_alone(task: Task) -> Policy:
    """Return the patient times the ratio of its two faces. Nothing is trained."""
    patient, again = task.world.patient, task.fresh("patient")
    faces = task.world.attributes[task.attribute].faces
    samples, prompts = task.samples("test"), task.comparison("test").prompts
    doctor_logits = []
    for face in (faces.positive, faces.negative):
        faced = [
            tokenize_prompt(apply_face(prompt, face, placement=faces.placement), task.world.tokenizer)
            for prompt in prompts
        ]
        doctor_logits.append(samples.logits_after(faced, patient))

    def policy(comparison: Comparison, strength: float) -> dict:
        def guide(beta: float) -> DoctorGuidedLogitsProcessor:
            return DoctorGuidedLogitsProcessor(patient, beta=beta, reference=again)

        (row,) = samples.follow(guide, doctor_logits, [strength], attribute=task.attribute)
        return row

    return policy


def best_policy(task: Task) -> Policy:
    """Return the best possible policy, an upper bound of all methods. Its strength is its reward."""
    return lambda comparison, reward: task.samples("test").best(task.attribute, reward)


def best_by_oracle(task: Task) -> Policy:
    return lambda comparison, n: comparison.add_best_of_n(n)


def best_by_reward_model(task: Task, **settings) -> Policy:
    judge = RewardModel(train_reward_model(task, **settings), task.world.tokenizer, batch_size=256)
    scored = {}  # of each comparison

    def policy(comparison: Comparison, n: int) -> dict:
        texts = comparison.rows[0]["texts"]
        num_samples = len(texts) // len(comparison.prompts)
        if id(comparison) not in scored:
            prompts = [prompt for prompt in comparison.prompts for _ in range(num_samples)]
            scored[id(comparison)] = torch.tensor(judge(prompts, texts)).view(-1, num_samples)
        num_groups = num_samples // n
        groups = torch.arange(len(texts)).view(-1, num_samples)[:, : num_groups * n].reshape(-1, n)
        scores = scored[id(comparison)][:, : num_groups * n].reshape(-1, n)
        winners = groups.gather(1, scores.argmax(dim=1, keepdim=True)).flatten().tolist()
        kl = best_of_n(comparison.patient_rewards, n)["kl"]
        return comparison.add_samples("best of n", [texts[index] for index in winners], kl=kl, beta=n)

    return policy


def args_decoding(task: Task, top_k: int, **settings) -> Policy:
    """Return ARGS: the patient's likeliest tokens, reweighted by the reward of the text that ends with the token."""
    reward_model, tokenizer = train_reward_model(task, **settings), task.world.tokenizer

    def policy(comparison: Comparison, weight: float) -> dict:
        prompts = [prompt for prompt in comparison.prompts for _ in range(task.num_samples_per_prompt)]
        ids = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        generator = torch.Generator().manual_seed(task.seed)
        parts = [_args_samples(task, reward_model, x, weight, top_k, generator) for x in ids.split(256)]
        texts = [text for texts, _ in parts for text in texts]
        return comparison.add_samples("ARGS", texts, kl=torch.cat([kl for _, kl in parts]).mean().item(), beta=weight)

    return policy


@torch.no_grad()
def _args_samples(task, reward_model, ids, weight, top_k, generator) -> tuple[list[str], torch.Tensor]:
    """Return texts, and their KL (B,) in nats, for prompts (B, L) of one length."""
    patient, tokenizer, num_prompt = task.world.patient, task.world.tokenizer, ids.size(1)
    cache, kl, is_done = DynamicCache(), torch.zeros(len(ids)), torch.zeros(len(ids), dtype=torch.bool)
    for step in range(MAX_NEW_TOKENS):
        logits = patient(ids if step == 0 else ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        logps, tokens = logits.log_softmax(dim=-1).topk(top_k)  # (B, k)
        # The candidates follow the text, all at the same position; each attends to the text and to itself
        num_text = ids.size(1)
        sees = torch.ones(num_text + top_k, num_text + top_k, dtype=torch.bool).tril()
        sees[num_text:, num_text:] = torch.eye(top_k, dtype=torch.bool)
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        position_ids = torch.arange(num_text + top_k).clamp(max=num_text)[None]
        hidden = reward_model.model(
            torch.cat([ids, tokens], dim=1), attention_mask=mask[None, None], position_ids=position_ids
        ).last_hidden_state[:, num_text:]
        rewards = reward_model.score(hidden).squeeze(-1)  # (B, k)
        policy = (logps + weight * rewards).log_softmax(dim=-1)
        kl += (policy.exp() * (policy - logps)).sum(dim=1).masked_fill(is_done, 0)
        token = tokens.gather(1, policy.exp().multinomial(1, generator=generator))
        token = token.masked_fill(is_done[:, None], tokenizer.pad_token_id)
        ids, is_done = torch.cat([ids, token], dim=1), is_done | (token.squeeze(1) == tokenizer.eos_token_id)
        if is_done.all():
            break
    return tokenizer.batch_decode(ids[:, num_prompt:], skip_special_tokens=True), kl


# Objectives with a part left out


def full_trajectory(*, doctor_logps, log_values, token_rewards, completion_mask, is_complete, reference_logps, **_):
    """Trajectory balance: the balance of the whole trajectory only, with an initial flow for each prompt."""
    score = token_rewards / TFPOConfig.reward_temperature + TFPOConfig.reference_weight * reference_logps  # (B, T)
    gain = score - doctor_logps
    return (log_values[:, 0] - gain.masked_fill(~completion_mask, 0).sum(dim=1))[is_complete].square().mean(), {}


def no_boundary(*, is_complete, **tensors):
    return tfpo_objective(is_complete=torch.zeros_like(is_complete), **tensors)


def fine_tuning(*, doctor_logps, completion_mask, **_):
    return -doctor_logps.masked_fill(~completion_mask, 0).sum(dim=1).chunk(2)[0].mean(), {}


STOPS = [0.2, 0.4, 0.7, 1.0]  # shares of the steps
REWARDS = [2.0, 2.5]  # at which diversity is compared
RATE = dict(learning_rate=3e-3)
GUIDED = RATE | dict(policy="guided", reward_direction="faces", reward_temperature=0.5)
ALONE = dict(policy="doctor", reward_temperature=0.125)  # the doctor is a language model
PUBLISHED = ALONE | dict(
    reward_direction="label", importance_temperature=1.0, gap_floor=1e-6, reference_weight=0.0, subtb_lambda=1.0
)


def over(*names: str, values: list[tuple]) -> list[dict]:
    return [dict(zip(names, row, strict=True)) for row in values]


DPO_GRID = over("beta", "learning_rate", values=[(0.1, 1e-4), (0.3, 1e-4)])
METHODS = {
    "guided flow": Method(
        tfpo,
        "1 of the doctor",
        [GUIDED, GUIDED | dict(reward_temperature=0.35)],
        largest=4.0,
    ),
    "TFPO": Method(tfpo, "1 of the doctor", [RATE], largest=2.0),
    "guided flow, more diverse": Method(tfpo, "1 of the doctor", [GUIDED | dict(reference_weight=0.95)], largest=4.0),
    "TFPO, more diverse": Method(tfpo, "1 of the doctor", [RATE | dict(reference_weight=0.9)], largest=2.0),
    "TFPO, the doctor alone": Method(tfpo, "1 of the doctor", [RATE | ALONE], num_seeds=1),
    "TFPO as published": Method(
        product,
        "1 of the doctor",
        [
            PUBLISHED | dict(learning_rate=3e-3),
            PUBLISHED | dict(learning_rate=6e-3, value_head_learning_rate=6e-3, reward_temperature=0.06),
        ],
        largest=2.0,
        num_seeds=1,
    ),
    "GenARM": Method(
        genarm,
        "1 of the doctor",
        over("reward_scale", "learning_rate", values=[(0.02, 1e-3), (0.05, 1e-3), (0.1, 1e-3)]),
        num_seeds=1,
    ),
    "the faces alone": Method(faces_alone, "2 of the patient", strengths=[0.2, 0.4, 0.6, 1.0, 1.5, 2.0, 3.0]),
    "DPO doctor": Method(
        dpo_doctor,
        "2 of the doctor",
        over("beta", "learning_rate", values=[(0.1, 1e-3), (0.3, 3e-4), (0.3, 1e-3)]),
        largest=4.0,
        num_seeds=2,
    ),
    "best of n by a reward model": Method(
        best_by_reward_model,
        "n - 1 of the patient",
        over("learning_rate", values=[(1e-3,), (3e-3,)]),
        strengths=[2, 4, 8, 16, 32],
        num_seeds=2,
    ),
    "ARGS": Method(
        args_decoding,
        "as many as candidates, of the reward model",
        over("top_k", "learning_rate", values=[(40, 3e-3)]),
        strengths=[0.5, 1.0],
        num_seeds=1,
    ),
    "DPO patient": Method(dpo_patient, "1 of a patient", DPO_GRID),
    "DPO patient, stopped": Method(dpo_patient_stopped, "0", DPO_GRID, strengths=STOPS, num_seeds=1),
    "DPO patient, LoRA": Method(
        dpo_patient_lora,
        "1 of a patient",
        over("beta", "learning_rate", values=[(0.1, 3e-4), (0.3, 1e-3)]),
        num_seeds=1,
    ),
    "best of n by the oracle": Method(
        best_by_oracle, "n - 1 of the patient", strengths=[2, 4, 8, 16, 32], num_seeds=2
    ),
    "temperature": Method(temperature, "0", strengths=[0.5, 0.85, 1.2], num_seeds=1),
    "the best possible": Method(best_policy, "", strengths=REWARDS),
}

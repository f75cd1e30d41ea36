# SPDX-License-Identifier: Apache-2.0

"""The trainer: what users of TRL expect, and the invariants a training loop can break in silence."""

import copy
import json
import warnings

import pytest
import torch
from conftest import FACES, conversational_rows, make_llama, save_model
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trainers import config, losses, make_trainer
from transformers import AutoModelForCausalLM

from trl_tfpo import (
    DoctorGuidedLogitsProcessor,
    TFPOTrainer,
    TokenRewardCollator,
    annotate_token_rewards,
    load_doctor,
)
from trl_tfpo.annotation.token_rewards import annotation_settings
from trl_tfpo.models.fingerprint import model_fingerprint


METRICS = {
    "loss/subtb",
    "loss/value",
    "flow/potential_std",
    "token_rewards/sparsity",
    "rewards/chosen",
    "rewards/rejected",
    "token_rewards/agreement",
    "token_rewards/chosen",
    "token_rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "values/start",
}


@pytest.fixture
def annotated(preferences, patient, tokenizer):
    return annotate_token_rewards(preferences, patient, tokenizer, faces=FACES)


class TestTraining:
    def test_raw_preferences_in_a_trained_doctor_out(self, preferences, patient, doctor, tokenizer, tmp_path):
        """The whole journey: every parameter moves, the patient does not, all metrics are there."""
        before = {name: parameter.detach().clone() for name, parameter in doctor.named_parameters()}
        patient_before = model_fingerprint(patient)
        trainer = TFPOTrainer(
            model=doctor,
            patient_model=patient,
            args=config(tmp_path, max_steps=10),
            train_dataset=preferences,
            eval_dataset={"one": preferences, "two": preferences},
            processing_class=tokenizer,
            faces=FACES,
        )
        trainer.train()
        assert doctor.lm_head.weight.equal(before["lm_head.weight"]) and doctor.lm_head.map.any()
        for name, parameter in doctor.named_parameters():
            if name in before and name != "lm_head.weight":  # the vocabulary is frozen, the map before it is not
                assert not parameter.equal(before[name]), f"{name} was not trained"
        assert doctor.value_head.weight.abs().sum() > 0
        assert model_fingerprint(patient) == patient_before
        assert trainer.patient_model is None
        assert losses(trainer)[-1] < losses(trainer)[0]
        assert METRICS <= trainer.state.log_history[0].keys()

        evaluated = trainer.evaluate()
        for split in ("one", "two"):
            assert {f"eval_{split}_{name}" for name in METRICS} <= evaluated.keys()
            assert evaluated[f"eval_{split}_loss"] == pytest.approx(evaluated["eval_one_loss"])

    def test_all_parts_know_the_same_ends(self, preferences, patient, doctor, tokenizer, tmp_path):
        """All parts know the end tokens of the generation config, where alone Gemma names the end of a turn."""
        tokenizer.chat_template = tokenizer.chat_template.replace("' ' + eos_token", "' <unk>'")
        patient.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.unk_token_id]
        options = dict(train_dataset=preferences, processing_class=tokenizer, faces=FACES)
        trainer = TFPOTrainer(model=doctor, patient_model=patient, args=config(tmp_path), **options)
        assert next(iter(trainer.get_train_dataloader()))["is_complete"].all()
        options["train_dataset"] = trainer.train_dataset  # and without the patient, from what the annotation recorded
        trainer = TFPOTrainer(
            model=make_llama(2), args=config(tmp_path), data_collator=TokenRewardCollator(tokenizer), **options
        )
        assert next(iter(trainer.get_train_dataloader()))["is_complete"].all()

    def test_the_collators_patient_says_where_answers_end(self, preferences, patient, doctor, tokenizer, tmp_path):
        """The end tokens of a patient that only the collator has are known: a completion ends at the first one."""
        patient.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.unk_token_id]
        dataset = preferences.map(lambda row: {"prompt": "say", "chosen": " good <unk> and", "rejected": " bad"})
        trainer = TFPOTrainer(
            model=doctor,
            args=config(tmp_path),
            data_collator=TokenRewardCollator(tokenizer, patient=patient, faces=FACES),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        assert tokenizer.decode(trainer.train_dataset[0]["chosen_ids"]) == "good <unk>"

    @pytest.mark.parametrize("where", ["the trainer", "the collator"])
    def test_transcripts_are_converted(self, where, patient, doctor, tokenizer, tmp_path):
        """A setting that is read and then dropped trains on a format in which nobody asks."""
        start = "\n\nHuman: say the soup\n\nAssistant:"
        dataset = Dataset.from_list([{"chosen": start + " good", "rejected": start + " bad"}] * 4)
        collator = TokenRewardCollator(
            tokenizer, patient=patient, faces=FACES, convert_transcripts=where == "the collator"
        )
        trainer = TFPOTrainer(
            model=doctor,
            patient_model=patient,
            args=config(tmp_path, convert_transcripts=where == "the trainer"),
            data_collator=collator if where == "the collator" else None,
            train_dataset=dataset,
            processing_class=tokenizer,
            faces=FACES,
        )
        assert tokenizer.decode(trainer.train_dataset[0]["prompt_ids"]) == "<s> <user> say the soup <assistant>"

    def test_some_completion_is_whole_within_max_length(self, annotated, doctor, tokenizer, tmp_path):
        """Where all are cut there is no boundary, and rewards do not reach the doctor."""
        with pytest.raises(ValueError, match="must end in EOS.*within `max_length`=9"):
            make_trainer(annotated, tmp_path, doctor, max_length=9)

    def test_several_turns(self, preferences, patient, doctor, tokenizer, tmp_path):
        """The loss falls on answers of several turns, under either policy."""
        more = [{"role": "user", "content": "and the bread"}, {"role": "assistant", "content": "very good"}]
        dataset = preferences.map(lambda row: {"chosen": row["chosen"] + more})
        for policy in ("ratio", "doctor"):
            trainer = TFPOTrainer(
                model=copy.deepcopy(doctor),
                patient_model=patient,
                args=config(tmp_path, max_steps=8, policy=policy),
                train_dataset=dataset,
                processing_class=tokenizer,
                faces=FACES,
            )
            trainer.train()
            assert losses(trainer)[-1] < losses(trainer)[0]

    def test_models_may_be_made_of_one_config(self, preferences, patient, tokenizer, tmp_path):
        """What the doctor's config says of it must not be said of the patient, who would be refused as a doctor."""
        doctor = type(patient)(patient.config)
        trainer = TFPOTrainer(
            model=doctor,
            patient_model=patient,
            args=config(tmp_path),
            train_dataset=preferences,
            processing_class=tokenizer,
            faces=FACES,
        )
        assert trainer.model.config is trainer.model.model.layers[0].self_attn.config is not patient.config
        assert not hasattr(patient.config, "guidance")

    def test_how_tokens_are_rewarded_is_passed_on(self, preferences, patient, doctor, tokenizer, tmp_path):
        """A setting that is read and then dropped gives other rewards than those asked for, without a word."""
        settings = dict(disagreement_weight=0.25, importance_temperature=2.0, gap_floor=0.1, sparsity_threshold=0.2)
        trainer = TFPOTrainer(
            model=doctor,
            patient_model=patient,
            args=config(tmp_path, **settings),
            train_dataset=preferences,
            processing_class=tokenizer,
            faces=FACES,
        )
        assert annotation_settings(trainer.train_dataset)["reward"].items() >= settings.items()

    def test_annotated_datasets_need_no_patient(self, annotated, doctor, tokenizer, tmp_path):
        """Annotate once, train often, on a machine that could never hold the patient."""
        trainer = make_trainer(annotated, tmp_path, doctor, eval_dataset=annotated)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before

    def test_asking_the_patient_online_trains_the_same(self, preferences, annotated, patient, tokenizer, tmp_path):
        """Two paths to the same rewards must lead to the same doctor."""
        runs = []
        for dataset, collator in (
            (annotated, None),
            (preferences, TokenRewardCollator(tokenizer, patient=patient, faces=FACES)),
        ):
            trainer = TFPOTrainer(
                model=make_llama(2),
                args=config(tmp_path),
                data_collator=collator,
                train_dataset=dataset,
                processing_class=tokenizer,
            )
            trainer.train()
            runs.append(losses(trainer))
        assert runs[0] == pytest.approx(runs[1], rel=1e-4)

    def test_models_by_path(self, preferences, patient, doctor, tokenizer, tmp_path):
        """How real models are given."""
        for name, model in (("patient", patient), ("doctor", doctor)):
            save_model(tmp_path / name, model, tokenizer)
        trainer = TFPOTrainer(
            model=str(tmp_path / "doctor"),
            patient_model=str(tmp_path / "patient"),
            args=config(tmp_path / "run", max_steps=1),
            train_dataset=preferences,
            faces=FACES,
        )
        trainer.train()
        assert trainer.patient_model.name == str(tmp_path / "patient")
        assert "loaded" not in vars(trainer.patient_model)  # let go
        trainer.evaluate(trainer.train_dataset)

    @pytest.mark.slow
    @pytest.mark.parametrize("reference_weight", [0.0, 1.0])
    def test_accumulation_8x1_equals_1x8(self, annotated, tokenizer, tmp_path, reference_weight):
        """A loss scaled twice, or not at all, trains at another learning rate whenever memory is short."""
        weights, subtb = [], []
        for batch_size, accumulation in ((8, 1), (1, 8), (3, 3)):  # in threes the last batch has two pairs
            trainer = make_trainer(
                annotated,
                tmp_path,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                reference_weight=reference_weight,
                max_steps=3,
                optim="sgd",
            )
            trainer.train()
            weights.append(trainer.model.state_dict())
            subtb.append([entry["loss/subtb"] for entry in trainer.state.log_history if "loss" in entry])
        for others in weights[1:]:
            for name, one in weights[0].items():
                torch.testing.assert_close(one, others[name], rtol=1e-4, atol=1e-5)
        assert subtb[1] == pytest.approx(subtb[0], rel=1e-4) and subtb[2] == pytest.approx(subtb[0], rel=1e-4)

    @pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
    def test_batches_of_like_lengths(self, annotated, tokenizer, tmp_path, strategy):
        """
        Preference data have lengths from ten to a thousand: at random, half of what is computed is padding. Batches of
        different numbers of pairs must not change what an optimizer step learns.
        """

        def lengthen(row, index):
            prompt_ids = row["prompt_ids"] * (1 + index % 4)
            return {**row, "prompt_ids": prompt_ids}

        dataset = annotated.map(lengthen, with_indices=True)

        def train(strategy, batch_size, accumulation):
            trainer = make_trainer(
                dataset,
                tmp_path,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                train_sampling_strategy=strategy,
                max_steps=-1,
                num_train_epochs=1,
                optim="sgd",
            )
            batches = []
            collate = trainer.data_collator
            trainer.data_collator = lambda rows: batches.append(rows) or collate(rows)
            trainer.train()
            assert sorted(row["prompt_ids"] + row["chosen_ids"] for rows in batches for row in rows) == sorted(
                row["prompt_ids"] + row["chosen_ids"] for row in dataset
            )
            padded = sum(collate(rows)["attention_mask"].numel() for rows in batches)
            return trainer.model.state_dict(), padded

        weights, padded = train(strategy, 2, 4)
        assert padded < 0.95 * train("random", 2, 4)[1]
        if strategy == "batch_rebalance":  # which moves pairs only within a step
            for name, one in train(strategy, 8, 1)[0].items():
                torch.testing.assert_close(one, weights[name], rtol=1e-4, atol=1e-5)

    def test_an_objective_of_ones_own(self, annotated, doctor, tokenizer, tmp_path):
        """The researcher's door: the trainer holds no mathematics."""
        seen = {}

        def likelihood(*, doctor_logps, completion_mask, **tensors):
            seen.update(tensors)
            loss = -doctor_logps.masked_fill(~completion_mask, 0).sum(1).mean()
            return loss, {"loss/likelihood": loss.detach()}

        trainer = TFPOTrainer(
            model=doctor,
            args=config(tmp_path, max_steps=10),
            train_dataset=annotated,
            processing_class=tokenizer,
            objective=likelihood,
        )
        trainer.train()
        assert {"log_values", "token_rewards", "completion_ids", "is_complete", "reference_logps"} <= seen.keys()
        assert losses(trainer)[-1] < losses(trainer)[0]
        assert "loss/likelihood" in trainer.state.log_history[0]

    def test_best_model_by_any_metric(self, annotated, doctor, tokenizer, tmp_path):
        """`metric_for_best_model` reads what `evaluate` returns."""
        trainer = make_trainer(
            annotated,
            tmp_path,
            doctor,
            eval_dataset=annotated,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_flow/potential_std",
            greater_is_better=False,
        )
        trainer.train()
        assert trainer.state.best_metric is not None


class TestReference:
    def test_reference_is_the_doctor_before_training(self, annotated, tokenizer, tmp_path):
        """With no rewards and the reference as target, the doctor is already right: loss zero at step one."""
        silent = annotated.map(
            lambda row: {name: [0.0] * len(row[name]) for name in ("chosen_token_rewards", "rejected_token_rewards")}
        )
        trainer = make_trainer(silent, tmp_path, max_steps=1, reference_weight=1.0, value_loss_weight=0.0)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(0, abs=1e-8)

    def test_adapter_is_off_in_the_reference(self, annotated, tokenizer, tmp_path):
        """A trained adapter must not be its own reference."""
        doctor = get_peft_model(make_llama(2), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        settings = dict(args=config(tmp_path, policy="doctor"), train_dataset=annotated, processing_class=tokenizer)
        trainer = TFPOTrainer(model=doctor, **settings)
        plain = TFPOTrainer(model=make_llama(2), **settings)
        for one, other in zip(
            trainer.train_dataset["chosen_ref_logps"], plain.train_dataset["chosen_ref_logps"], strict=True
        ):
            assert one == pytest.approx(other, abs=1e-5)

    def test_a_new_dataset_after_training_has_no_reference(self, annotated, doctor, tokenizer, tmp_path):
        """Scored by the trained doctor, the reference would be the policy itself."""
        args = config(tmp_path, max_steps=1, policy="doctor")
        trainer = TFPOTrainer(model=doctor, args=args, train_dataset=annotated, processing_class=tokenizer)
        trainer.train()
        with pytest.raises(ValueError, match="before training"):
            trainer.evaluate(annotated)


@pytest.mark.slow
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_the_head_learns_at_its_own_rate(annotated, tokenizer, tmp_path, peft_config):
    """log V spans hundreds of nats: at the rate of a pretrained model its head may never get there."""
    runs = {}
    for rate in (None, 1e-2, 0.0, 0.1):
        settings = dict(reference_weight=0.0, value_head_learning_rate=rate, weight_decay=0.1)
        trainer = TFPOTrainer(
            model=make_llama(2),
            args=config(tmp_path / str(rate), **settings),
            train_dataset=annotated,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train()
        state = trainer.model.state_dict()
        (head,) = (
            state[name]
            for name in state
            if "value_head" in name and name.endswith("weight") and "original" not in name
        )
        runs[rate] = losses(trainer), head
        groups = trainer.optimizer.param_groups
        assert sum(len(group["params"]) for group in groups) == sum(
            p.requires_grad for p in trainer.model.parameters()
        )
    assert runs[None][0] == pytest.approx(runs[0.1][0], rel=1e-6) and torch.allclose(runs[None][1], runs[0.1][1])
    assert not runs[0.0][1].any()
    assert runs[None][1].norm() > 2 * runs[1e-2][1].norm()
    assert len({tuple(values) for values, _ in runs.values()}) >= 3


@pytest.mark.slow
def test_a_compiled_doctor_learns_the_same(annotated, tokenizer, tmp_path):
    """Compiled for speed, it must not lose the value head, nor be saved under other names."""

    def run(name, **settings):
        trainer = make_trainer(annotated, tmp_path / name, **settings)
        trainer.train()
        trainer.save_model()
        return trainer

    plain, compiled = run("plain"), run("compiled", torch_compile=True, torch_compile_backend="eager")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    assert one.keys() == other.keys()
    assert load_doctor(tmp_path / "compiled").value_head.weight.shape == (1, 16)


class TestCheckpoints:
    @pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
    def test_resume_equals_uninterrupted(self, annotated, tokenizer, tmp_path, peft):
        """A head or an optimiser state that is lost on resume shows only in the loss curve, days later."""

        def run(output_dir, **settings):
            trainer = TFPOTrainer(
                model=make_llama(2),
                args=config(output_dir, save_strategy="steps", save_steps=2, **settings),
                train_dataset=annotated,
                processing_class=tokenizer,
                peft_config=LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1) if peft else None,
            )
            return trainer

        whole = run(tmp_path / "whole")
        whole.train()
        resumed = run(tmp_path / "whole")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert losses(resumed)[-2:] == losses(whole)[-2:]
        for (name, one), other in zip(
            whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
        ):
            assert one.equal(other), name

    def test_full_model_folder(self, annotated, patient, doctor, tokenizer, tmp_path):
        """Saved, it is an ordinary causal language model that guides, and a doctor that can go on training."""
        trainer = make_trainer(annotated, tmp_path, doctor)
        trainer.train()
        trainer.save_model()
        assert load_doctor(tmp_path).value_head.weight.equal(doctor.value_head.weight)
        self.assert_guides(AutoModelForCausalLM.from_pretrained(tmp_path), patient)

    @pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
    def test_adapter_folder(self, annotated, patient, tokenizer, tmp_path, use_dora):
        """An adapter checkpoint holds the adapter and the heads, nothing else, and guides."""
        make_llama(2).save_pretrained(tmp_path / "base")
        trainer = TFPOTrainer(
            model=str(tmp_path / "base"),
            args=config(tmp_path / "run"),
            train_dataset=annotated,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", use_dora=use_dora),
        )
        trainer.train()
        trainer.save_model()
        saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
        assert all(any(part in name for part in ("lora_", "value_head", "lm_head")) for name in saved)
        assert any("value_head" in name for name in saved)
        assert not (tmp_path / "run" / "model.safetensors").exists()
        self.assert_guides(AutoModelForCausalLM.from_pretrained(tmp_path / "run"), patient)
        self.assert_guides(load_doctor(tmp_path / "run"), patient)

    @staticmethod
    def assert_guides(doctor, patient):
        inputs = {
            "input_ids": torch.tensor([[1, 5, 11, 17, 14, 6]]),
            "attention_mask": torch.ones(1, 6, dtype=torch.long),
        }
        settings = dict(
            max_new_tokens=8, do_sample=False, output_logits=False, output_scores=True, return_dict_in_generate=True
        )
        processor = DoctorGuidedLogitsProcessor(doctor.eval(), beta=0.5, attention_mask=inputs["attention_mask"])
        guided = patient.generate(**inputs, **settings, logits_processor=[processor])
        alone = patient.generate(**inputs, **settings)
        assert not torch.allclose(guided.scores[0], alone.scores[0].log_softmax(-1))

    def test_model_card(self, annotated, doctor, tokenizer, tmp_path):
        """A checkpoint on the Hub has to say what it is and how it is used."""
        trainer = make_trainer(annotated, tmp_path, doctor, save_strategy="steps", save_steps=4)
        trainer.train()
        card = (tmp_path / "README.md").read_text()
        assert "DoctorGuidedLogitsProcessor" in card and "2601.10416" in card and "tfpo" in card
        for told in (
            FACES.positive,
            FACES.negative,
            "`beta=1.0`",
            '`reward_direction="agreement"`',
            "`policy=ratio`",
            "`reward_temperature=0.25`",
        ):
            assert told in card, told
        assert json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())["architectures"] == [
            "LlamaForCausalLM"
        ]


class TestPeft:
    def test_the_callers_config_is_left_alone(self, annotated, tokenizer, tmp_path):
        """A config is often shared by several runs."""
        peft_config = LoraConfig(r=2, target_modules=["q_proj"])
        TFPOTrainer(
            model=make_llama(2),
            args=config(tmp_path),
            train_dataset=annotated,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        assert not peft_config.modules_to_save

    def test_a_peft_model_trains_its_adapter_and_head_only(self, annotated, tokenizer, tmp_path):
        """The base of a `PeftModel` is frozen, the value head is new and must not be."""
        doctor = get_peft_model(make_llama(2), LoraConfig(r=2, target_modules=["q_proj"]))
        before = {name: parameter.detach().clone() for name, parameter in doctor.named_parameters()}
        args = config(tmp_path, policy="doctor")  # others need a new head, thus a `peft_config`
        trainer = TFPOTrainer(model=doctor, args=args, train_dataset=annotated, processing_class=tokenizer)
        trainer.train()
        for name, parameter in doctor.named_parameters():
            if name in before:
                assert parameter.equal(before[name]) != ("lora_" in name), name
        head = doctor.get_base_model().value_head.modules_to_save["default"]
        assert head.weight.abs().sum() > 0

    def test_checkpointing_of_activations(self, annotated, tokenizer, tmp_path):
        """TRL's default; with an adapter the inputs must require gradients or nothing is trained."""
        runs = []
        for checkpointing in (False, True):
            trainer = TFPOTrainer(
                model=make_llama(2),
                args=config(tmp_path, activation_checkpointing=checkpointing),
                train_dataset=annotated,
                processing_class=tokenizer,
                peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
            )
            trainer.train()
            runs.append(losses(trainer))
        assert runs[0] == pytest.approx(runs[1], rel=1e-5)


@pytest.mark.slow
def test_streamed_datasets(annotated, preferences, patient, doctor, tokenizer, tmp_path):
    """A stream of annotated rows, or one annotated as it is read, must train as the dataset does."""
    streams = {
        "whole": annotated,
        "annotated": annotated.to_iterable_dataset(),
        "as it is read": annotate_token_rewards(
            preferences.to_iterable_dataset(), patient, tokenizer, faces=FACES, max_length=1024
        ),
    }
    runs = []
    for name, stream in streams.items():
        trainer = make_trainer(
            stream, tmp_path / name, copy.deepcopy(doctor), reference_weight=0.0, train_sampling_strategy="sequential"
        )
        trainer.train()
        runs.append(losses(trainer))
    assert len(runs[0]) == 4
    assert runs[1] == pytest.approx(runs[0], rel=1e-6) and runs[2] == pytest.approx(runs[0], rel=1e-6)


def test_dataset_dict_for_evaluation(preferences, patient, doctor, tokenizer, tmp_path):
    """All of TRL's containers."""
    trainer = TFPOTrainer(
        model=doctor,
        patient_model=patient,
        args=config(tmp_path, max_steps=1),
        train_dataset=Dataset.from_list(conversational_rows(4)),
        eval_dataset=DatasetDict({"test": preferences}),
        processing_class=tokenizer,
        faces=FACES,
    )
    assert "eval_test_loss" in trainer.evaluate()


class TestRewards:
    """What users of `DPOTrainer` look at first."""

    @pytest.mark.parametrize("policy", ["ratio", "guided", "doctor"])
    def test_rewards_are_log_ratios_to_the_policy_before_training(
        self, policy, annotated, patient, tokenizer, tmp_path
    ):
        """Accuracies of anything else, such as log-probabilities, prefer the shorter completion, and are believed."""
        before = {"ratio": make_llama(2), "guided": copy.deepcopy(patient), "doctor": make_llama(2)}[policy]
        trainer = TFPOTrainer(
            model=make_llama(2),
            patient_model=patient if policy == "guided" else None,
            args=config(tmp_path, policy=policy, reward_temperature=0.5, per_device_eval_batch_size=3),
            train_dataset=annotated,
            eval_dataset=annotated,
            processing_class=tokenizer,
        )
        start = trainer.evaluate()
        assert start["eval_rewards/chosen"] == pytest.approx(0, abs=1e-4)
        assert start["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
        trainer.train()
        evaluated, predicted = trainer.evaluate(), trainer.predict(trainer.eval_dataset)

        def log_probs(row, name):
            ids = torch.tensor([row["prompt_ids"] + row[name]])
            with torch.no_grad():
                logits = before(ids).logits
                after = trainer.model(ids).logits
            if policy != "doctor":
                after = logits.log_softmax(-1) + after.log_softmax(-1)
            index = ids[:, 1:, None]
            both = [x.log_softmax(-1)[:, :-1].gather(2, index)[0, -len(row[name]) :].sum() for x in (after, logits)]
            return 0.5 * (both[0] - both[1]).item()

        expected = torch.tensor([[log_probs(row, "chosen_ids"), log_probs(row, "rejected_ids")] for row in annotated])
        assert expected.abs().max() > 0.01  # it has learned something
        torch.testing.assert_close(torch.tensor(predicted.predictions), expected, rtol=1e-3, atol=1e-4)
        margins = expected[:, 0] - expected[:, 1]
        for metrics, prefix in ((evaluated, "eval"), (predicted.metrics, "test")):
            assert metrics[f"{prefix}_rewards/chosen"] == pytest.approx(
                expected[:, 0].mean().item(), rel=1e-3, abs=1e-4
            )
            assert metrics[f"{prefix}_rewards/rejected"] == pytest.approx(
                expected[:, 1].mean().item(), rel=1e-3, abs=1e-4
            )
            assert metrics[f"{prefix}_rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-3, abs=1e-4)
            assert metrics[f"{prefix}_rewards/accuracies"] == pytest.approx((margins > 0).float().mean().item())
            assert metrics[f"{prefix}_token_rewards/chosen"] == start["eval_token_rewards/chosen"]

    @pytest.mark.slow
    def test_pairs_count_alike_under_accumulation(self, annotated, tokenizer, tmp_path):
        """A mean over batches of different sizes is not the mean over pairs."""
        logged = []
        for batch_size, accumulation in ((8, 1), (1, 8), (3, 3)):
            settings = dict(
                per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, optim="sgd"
            )
            trainer = make_trainer(annotated, tmp_path, **settings)
            trainer.train()
            names = ("rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected")
            logged.append(
                [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry][1:]
            )
        for other in logged[1:]:
            torch.testing.assert_close(torch.tensor(other), torch.tensor(logged[0]), rtol=1e-3, atol=1e-4)

    def test_without_a_reference_there_are_none(self, annotated, doctor, tokenizer, tmp_path):
        """A ratio to nothing would be a log-probability under the name of a reward."""
        trainer = make_trainer(annotated, tmp_path, doctor, policy="doctor", reference_weight=0.0)
        predicted = trainer.predict(annotated)
        assert predicted.predictions is None and "test_loss" in predicted.metrics
        assert not any(name.startswith("test_rewards/") for name in predicted.metrics)
        assert "test_token_rewards/chosen" in predicted.metrics

    def test_predictions_for_raw_preferences(self, preferences, annotated, doctor, patient, tokenizer, tmp_path):
        """`predict` takes what `evaluate` takes, and leaves nothing behind for the next evaluation."""
        save_model(tmp_path / "patient", make_llama(1, 32), tokenizer)
        trainer = TFPOTrainer(
            model=doctor,
            patient_model=str(tmp_path / "patient"),
            args=config(tmp_path),
            train_dataset=annotated,
            processing_class=tokenizer,
            faces=FACES,
        )
        before = trainer.evaluate(annotated.select([0]))
        predicted = trainer.predict(preferences, metric_key_prefix="held_out")
        assert predicted.predictions.shape == (len(preferences), 2)
        assert predicted.metrics["held_out_logps/chosen"] < 0
        again = trainer.evaluate(annotated.select([0]))
        assert again["eval_logps/chosen"] == pytest.approx(before["eval_logps/chosen"])


def test_a_dict_of_splits_is_not_a_training_set(preferences, annotated, doctor, tokenizer, tmp_path):
    """`load_dataset` without a split gives one, and the error of whoever indexes it first does not say so."""
    splits = DatasetDict(train=annotated, test=annotated)
    with pytest.raises(
        ValueError, match=r"`train_dataset` must be one split. Got a `DatasetDict` of \['test', 'train'\]"
    ):
        make_trainer(splits, tmp_path, doctor)
    trainer = make_trainer(annotated, tmp_path, doctor)
    with pytest.raises(ValueError, match="`test_dataset` must be one split"):
        trainer.predict(splits)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_faces_that_say_nothing_are_noticed_before_training(is_streamed, annotated, tokenizer, tmp_path):
    """A training on chance ends as smoothly as any, and its doctor has learned what nobody wanted."""
    columns = {"chosen_gaps": [1.0], "rejected_gaps": [-1.0]}

    def with_agreement(share):
        def set_gaps(row, index):
            sign = 1 if index * 37 % 100 < share * 100 else -1
            return {
                f"{name}_gaps": [sign * columns[f"{name}_gaps"][0]] * len(row[f"{name}_ids"])
                for name in ("chosen", "rejected")
            }

        dataset = annotated.select([0] * 100).map(set_gaps, with_indices=True)
        return dataset.to_iterable_dataset() if is_streamed else dataset

    def make(dataset):
        return make_trainer(dataset, tmp_path)

    with pytest.warns(
        UserWarning,
        match=r"chosen completion of 47% of (100 pairs, and chance is 50 ± 10|64 pairs, .* ± 12)%. Describe in",
    ):
        make(with_agreement(0.47))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The faces")
        make(with_agreement(0.7))
        make(annotated.remove_columns(["chosen_gaps", "rejected_gaps"]))
        make(annotated.select(range(3)))  # of so few nothing can be said


def test_keyword_arguments_for_a_loaded_model_are_not_ignored_in_silence(annotated, tokenizer, tmp_path):
    """A `dtype` that nobody reads is a training in another precision than the one that was asked for."""
    with pytest.warns(
        UserWarning, match=r"`model_init_kwargs` apply only to a `model` given by name.*ignored \['dtype'\]"
    ):
        make_trainer(annotated, tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.warns(UserWarning, match="`patient_model_init_kwargs` apply only to a `patient_model`"):
        TFPOTrainer(
            model=make_llama(2),
            patient_model=make_llama(1, 32),
            args=config(tmp_path, patient_model_init_kwargs={"dtype": "bfloat16"}),
            train_dataset=annotated,
            processing_class=tokenizer,
        )

# SPDX-License-Identifier: Apache-2.0

"""
Wrong input, one row each, for every public function, command and endpoint: the error states the rule, the value got and
the remedy, and nothing is written.
"""

import json
import shlex
from dataclasses import replace

import httpx
import pytest
import torch
from conftest import WORDS, conversational_rows, make_llama, make_tokenizer, serving
from datasets import Dataset
from peft import PrefixTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, T5Config, T5ForConditionalGeneration

from trl_tfpo import (
    Doctor,
    DoctorGuidedLogitsProcessor,
    Faces,
    TFPOConfig,
    TFPOTrainer,
    TokenRewardCollator,
    annotate_token_rewards,
    evaluation,
    functional,
    guided_generate,
    load_doctor,
    reward_report,
    show_token_rewards,
    speculative_guided_generate,
    testbed,
    tfpo_objective,
)
from trl_tfpo.cli import main
from trl_tfpo.server import Engine, Generation, Limits, make_app
from trl_tfpo.testbed import load_world
from trl_tfpo.training.plan import training_plan


FACES = Faces(positive="you are kind", negative="you are rude")
ROWS = conversational_rows(4)
TEXTS = ["you are", "are you"]
IDS = torch.tensor([[1, 5, 11]])
ZEROS, STATES, MASK = torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3, dtype=torch.bool)
PERMUTED = " ".join(WORDS.split()[:4] + WORDS.split()[:3:-1])


def edited(**changes):
    return Dataset.from_list([{**row, **changes} for row in ROWS])


def annotate(dataset=None, patient=None, tokenizer=None, faces=FACES, **settings):
    return annotate_token_rewards(
        Dataset.from_list(ROWS) if dataset is None else dataset,
        patient or make_llama(1, 32),
        tokenizer or make_tokenizer(),
        faces=faces,
        **settings,
    )


def train(tmp_path, *, model=None, tokenizer=None, train_dataset=None, settings=None, **arguments):
    return TFPOTrainer(
        model=model or make_llama(2),
        args=TFPOConfig("run", report_to="none", **(settings or {})),
        train_dataset=annotate() if train_dataset is None else train_dataset,
        processing_class=tokenizer or make_tokenizer(),
        **arguments,
    )


def broken_patient(value):
    patient = make_llama(1, 32)
    with torch.no_grad():
        patient.model.norm.weight.fill_(value)
    return patient


def patient_of_another_family(tmp_path):
    make_llama(1, 32).save_pretrained(tmp_path / "other")
    make_tokenizer(PERMUTED).save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def tiny_t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=22, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def collate(**changes):
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8]}
    rewards = {"chosen_token_rewards": [0.9, 0.0], "rejected_token_rewards": [-0.5]}
    return TokenRewardCollator(make_tokenizer(), max_length=8)([{**pair, **rewards, **changes}])


def rewards(**settings):
    tensors = dict(positive_logps=ZEROS, negative_logps=ZEROS, preference_sign=ZEROS[:, 0], completion_mask=MASK)
    return functional.token_rewards(**tensors, **settings)


def scores(**settings):
    return functional.log_prefix_scores(token_rewards=ZEROS, completion_mask=MASK, **settings)


def objective(num_rows=2, **settings):
    zeros = torch.zeros(num_rows, 3)
    return tfpo_objective(
        doctor_logps=zeros,
        log_values=torch.zeros(num_rows, 4),
        token_rewards=zeros,
        completion_ids=zeros.long(),
        completion_mask=zeros == 0,
        is_complete=zeros[:, 0] == 0,
        **settings,
    )


def guide(doctor="make one", **settings):
    return DoctorGuidedLogitsProcessor(make_llama(2) if doctor == "make one" else doctor, **settings)


def generate(**arguments):
    defaults = dict(guide=guide(), input_ids=IDS, max_new_tokens=2)
    return guided_generate(make_llama(1), **defaults | arguments)


def complete(patient=None, prompts=TEXTS, **settings):
    return evaluation.generate_completions(
        patient or make_llama(1), make_tokenizer(), prompts, **dict(max_new_tokens=2) | settings
    )


def length(prompts, completions):
    return [float(len(text)) for text in completions]


def measure(reward_fn=length, **settings):
    return evaluation.evaluate_guidance(
        make_llama(1), make_tokenizer(), TEXTS, reward_fn, max_new_tokens=2, **settings
    )


def report(methods=None, reward_fn=length, **settings):
    methods = methods or {"patient": ["bad", "bad"], "doctor": ["kind", "bad"]}
    return evaluation.evaluate_completions(TEXTS, methods, reward_fn, **settings)


def submit(prompt_ids, **settings):
    engine = Engine(make_llama(1), make_tokenizer(), {})
    try:
        engine.submit(Generation(prompt_ids, print, **settings))
    finally:
        engine.close()


def serve_aliases(**aliases):
    engine = Engine(make_llama(1), make_tokenizer(), {})
    try:
        make_app(engine, model_name="tiny", aliases=aliases)
    finally:
        engine.close()


def write(path, text):
    path.write_text(text)
    return path


EMPTY = [{"role": "assistant", "content": ""}]
ANNOTATION = {
    "missing columns": (lambda _: annotate(Dataset.from_list(ROWS).remove_columns("rejected")), "'chosen' and 'rejected'"),
    "empty completion": (lambda _: annotate(edited(chosen=EMPTY)), "at least one token before EOS.*drop_unusable"),
    "empty prompt": (lambda _: annotate(Dataset.from_list([{"prompt": "", "chosen": "good", "rejected": "bad"}])), "at least one token"),
    "prompt longer than max_length": (lambda _: annotate(max_length=5), "shorter than `max_length`.*Got 6 tokens"),
    "nothing usable": (lambda _: annotate(max_length=5, drop_unusable=True), "At least one pair must be usable"),
    "another tokenizer": (lambda tmp: annotate(patient=patient_of_another_family(tmp)), "same tokenizer.*first is id 4"),
    "tokenizer larger than the patient": (lambda _: annotate(patient=make_llama(1, 32, vocab_size=9)), "9 embeddings for 22"),
    "identical faces": (lambda _: Faces(positive="be kind", negative="be kind "), "must differ"),
    "blank face": (lambda _: Faces(positive="be kind", negative=" "), "non-blank"),
    "unknown faces": (lambda _: annotate(faces="kindness"), "'harmlessness'"),
    "faces at no place": (lambda _: Faces("be kind", "be rude", placement="end"), "'system' or 'user'. Got 'end'"),
    "faces in a user turn that is not there": (
        lambda _: annotate(edited(prompt=[{"role": "system", "content": "x"}]), faces=replace(FACES, placement="user")),
        r"needs a user message.*Got roles \['system'\].*placement='system'",
    ),
    "faces the patient cannot tell apart": (lambda _: annotate(patient=broken_patient(0.0)), "not zero.*faces"),
    "NaN log-probabilities": (lambda _: annotate(patient=broken_patient(float("nan"))), "must be finite.*nan"),
    "infinite log-probabilities": (lambda _: annotate(patient=broken_patient(float("inf"))), "must be finite"),
    "vision dataset": (lambda _: annotate(Dataset.from_list(ROWS).add_column("images", [[]] * 4)), "vision"),
    "encoder-decoder patient": (lambda _: annotate(patient=tiny_t5()), "causal language model"),
    "unknown direction": (lambda _: annotate(reward_direction="up"), "'label', 'agreement' or 'faces'"),
    "disagreement above one": (lambda _: annotate(disagreement_weight=1.5), r"`disagreement_weight` must be in \[0, 1\]. Got 1.5"),
    "threshold of one": (lambda _: annotate(sparsity_threshold=1.0), r"\[0, 1\)"),
    "negative threshold": (lambda _: annotate(sparsity_threshold=-0.1), r"\[0, 1\)"),
    "rewards of another shape": (lambda _: annotate(reward_fn=lambda positive_logps, **_: positive_logps[:, :1]), "one finite reward"),
    "rewards that are not finite": (lambda _: annotate(reward_fn=lambda positive_logps, **_: positive_logps / 0), "one finite reward"),
    "not a dataset": (lambda _: annotate(dataset=ROWS), "one of the library Datasets. Got a `list`"),
    "no rows": (lambda _: annotate(Dataset.from_list(ROWS).select([])), "at least one row. Got none"),
    "row without a completion": (lambda _: annotate(edited(chosen=None)), "Row 0 .*must all be texts.*'chosen': None.*drop_unusable"),
    "row of numbers": (lambda _: annotate(Dataset.from_list([{"prompt": 1, "chosen": 2, "rejected": 3}])), "must all be texts"),
    "row of texts and messages": (lambda _: annotate(edited(chosen="good")), "must all be texts, or all lists of messages"),
    "messages without a role": (lambda _: annotate(edited(prompt=[{"content": "say"}])), "messages that have a role"),
    "prompt without messages": (lambda _: annotate(edited(prompt=[])), "messages that have a role"),
    "no patient": (lambda _: annotate_token_rewards(Dataset.from_list(ROWS), None, make_tokenizer(), faces=FACES), "`patient` must be a causal language model, .*Got None"),
    "patient that is not there": (lambda _: annotate(patient="./absent"), "Got './absent', which does not exist; check the path"),
    "not a tokenizer": (lambda _: annotate(tokenizer="words"), "must be a tokenizer.*Got a `str`"),
    "faces of a dict": (lambda _: annotate(faces={"positive": "a"}), "must be a `Faces` or one of"),
    "face that is no text": (lambda _: Faces(positive=3, negative="be rude"), "non-blank instruction. Got positive=3"),
    "batches of nothing": (lambda _: annotate(batch_size=0), "`batch_size` must be at least 1. Got 0"),
    "negative length": (lambda _: annotate(max_length=-1), "`max_length` must be at least 1. Got -1"),
    "mistyped setting": (lambda _: annotate(sparsity_treshold=0.3), r"Got \['sparsity_treshold'\] for `token_rewards`"),
    "reward function that is none": (lambda _: annotate(reward_fn=3), "`reward_fn` must be callable. Got 3"),
    "reward function that forgets to return": (lambda _: annotate(reward_fn=lambda **_: None), "one finite reward for each token.*Got NoneType"),
}  # fmt: skip
TRAINING = {
    "no dataset": (lambda _: TFPOTrainer(model=make_llama(2), args=TFPOConfig("run")), "`train_dataset` is required"),
    "no patient": (lambda tmp: train(tmp, train_dataset=Dataset.from_list(ROWS), faces=FACES), "needs a patient"),
    "no faces": (lambda tmp: train(tmp, train_dataset=Dataset.from_list(ROWS), patient_model=make_llama(1)), "needs `faces`"),
    "annotated by another tokenizer": (lambda tmp: train(tmp, tokenizer=make_tokenizer(PERMUTED)), "annotated with the doctor's tokenizer"),
    "patient of another family": (lambda tmp: train(tmp, train_dataset=Dataset.from_list(ROWS), faces=FACES, patient_model=patient_of_another_family(tmp)), "same tokenizer"),
    "tokenizer larger than the doctor": (lambda tmp: train(tmp, model=make_llama(2, vocab_size=9)), "9 embeddings for 22"),
    "streamed raw dataset": (lambda tmp: train(tmp, train_dataset=Dataset.from_list(ROWS).to_iterable_dataset(), patient_model=make_llama(1), faces=FACES, settings={"reference_weight": 0.0}), "token rewards already"),
    "streamed dataset with a reference": (lambda tmp: train(tmp, train_dataset=annotate().to_iterable_dataset(), settings={"max_steps": 1, "policy": "doctor"}), "policy='ratio'"),
    "vision dataset": (lambda tmp: train(tmp, train_dataset=Dataset.from_list(ROWS).add_column("image", ROWS), patient_model=make_llama(1), faces=FACES), "vision"),
    "prompt learning": (lambda tmp: train(tmp, peft_config=PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "Prompt learning"),
    "encoder-decoder doctor": (lambda tmp: train(tmp, model=tiny_t5()), "causal language model"),
    "not a tokenizer": (lambda tmp: train(tmp, tokenizer=object()), "must be a tokenizer"),
    "no completion ends": (lambda tmp: train(tmp, train_dataset=annotate(max_length=8)), "must end in EOS"),
    "quantization of a loaded model": (lambda tmp: train(tmp, quantization_config=BitsAndBytesConfig()), "given by name"),
    "patient in worker processes": (
        lambda tmp: train(
            tmp,
            train_dataset=Dataset.from_list(ROWS),
            data_collator=TokenRewardCollator(make_tokenizer(), patient=make_llama(1), faces=FACES),
            settings={"dataloader_num_workers": 2},
        ),
        "dataloader_num_workers=2",
    ),
    "doctor of None": (lambda _: TFPOTrainer(model=None, train_dataset=annotate()), "`model` must be a causal language model, .*Got None"),
    "doctor that is not there": (lambda tmp: train(tmp, model="./absent"), "Got './absent', which is not there"),
    "patient that is a number": (lambda tmp: train(tmp, patient_model=3), "`patient_model` must be a causal language model, .*Got 3"),
    "not a dataset": (lambda tmp: train(tmp, train_dataset=ROWS), "one of the library Datasets. Got a `list`"),
    "no rows": (lambda tmp: train(tmp, train_dataset=annotate().select([])), "at least one row"),
    "settings in a dict": (lambda _: TFPOTrainer(model=make_llama(2), args={}, train_dataset=annotate()), "`args` must be a `TFPOConfig`. Got a `dict`"),
    "objective that is none": (lambda tmp: train(tmp, objective=3), "`objective` must be callable. Got 3"),
    "ids of a larger vocabulary": (lambda tmp: train(tmp, train_dataset=Dataset.from_list([{**row, "prompt_ids": [99]} for row in annotate()])), "Got the token id 99, and its ids are 0 to 21"),
}  # fmt: skip
SETTINGS = {
    "negative reward temperature": (lambda _: TFPOConfig("run", **{"reward_temperature": -0.25}), "`reward_temperature` must be positive"),
    "negative reference weight": (lambda _: TFPOConfig("run", **{"reference_weight": -1.0}), "`reference_weight` must be at least 0"),
    "threshold of one": (lambda _: TFPOConfig("run", **{"sparsity_threshold": 1.0}), r"\[0, 1\)"),
    "unknown policy": (lambda _: TFPOConfig("run", **{"policy": "patient"}), "`policy` must be 'doctor', 'ratio' or 'guided'"),
    "unknown direction": (lambda _: TFPOConfig("run", **{"reward_direction": "labels"}), "'label', 'agreement' or 'faces'"),
    "negative disagreement": (lambda _: TFPOConfig("run", **{"disagreement_weight": -0.5}), "`disagreement_weight` must be in"),
    "gap floor of zero": (lambda _: TFPOConfig("run", **{"gap_floor": 0.0}), "`gap_floor` must be positive"),
    "importance temperature of zero": (lambda _: TFPOConfig("run", **{"importance_temperature": 0.0}), "must be positive"),
    "lambda above one": (lambda _: TFPOConfig("run", **{"subtb_lambda": 1.5}), r"\[0, 1\]"),
    "negative value loss weight": (lambda _: TFPOConfig("run", **{"value_loss_weight": -0.1}), "`value_loss_weight` must be at least 0"),
    "negative margin": (lambda _: TFPOConfig("run", **{"value_margin": -0.1}), "`value_margin` must be at least 0"),
    "negative learning rate of the head": (lambda _: TFPOConfig("run", **{"value_head_learning_rate": -1e-3}), "`value_head_learning_rate` must be"),
    "NaN": (lambda _: TFPOConfig("run", **{"value_margin": float("nan")}), "`value_margin` must be at least 0"),
    "max_length of zero": (lambda _: TFPOConfig("run", **{"max_length": 0}), "`max_length` must be at least 1"),
    "batches of nothing": (lambda _: TFPOConfig("run", per_device_train_batch_size=0), "`per_device_train_batch_size` must be at least 1"),
    "negative learning rate": (lambda _: TFPOConfig("run", learning_rate=-1.0), "`learning_rate` must be at least 0. Got -1.0"),
}  # fmt: skip
COLLATOR = {
    "neither tokenizer nor patient": (lambda _: TokenRewardCollator(), "Got neither; pass one"),
    "a patient without faces": (lambda _: TokenRewardCollator(make_tokenizer(), patient=make_llama(1)), "needs `faces`"),
    "padding to a multiple of zero": (lambda _: TokenRewardCollator(make_tokenizer(), pad_to_multiple_of=0), "`pad_to_multiple_of` must be at least 1. Got 0"),
    "no examples": (lambda _: TokenRewardCollator(make_tokenizer())([]), r"A batch must be of pairs with .*Got \[\]"),
    "preferences without rewards": (lambda _: TokenRewardCollator(make_tokenizer())(ROWS), "annotate_token_rewards"),
    "other numbers of rewards and tokens": (lambda _: collate(chosen_token_rewards=[0.1]), "one entry for each completion token. Got 1 for 2"),
    "long prompt": (lambda _: collate(prompt_ids=[5] * 9), "shorter than `max_length`"),
    "empty prompt": (lambda _: collate(prompt_ids=[]), "at least one token each. Got 0 of the prompt"),
    "empty completion": (lambda _: collate(chosen_ids=[], chosen_token_rewards=[]), "0 of the chosen one"),
    "reward that is not finite": (lambda _: collate(chosen_token_rewards=[0.1, float("nan")]), "`token_rewards` must be finite.* 1 values"),
    "reference of one completion": (lambda _: collate(chosen_ref_logps=[-1.0, -2.0]), "for all completions or for none. Got 1 for 2"),
}  # fmt: skip
FUNCTIONAL = {
    "unknown direction": (lambda _: rewards(reward_direction="up"), "'label', 'agreement' or 'faces'.*Got 'up'"),
    "disagreement above one": (lambda _: rewards(disagreement_weight=1.5), r"`disagreement_weight` must be in \[0, 1\]. Got 1.5"),
    "NaN disagreement": (lambda _: rewards(disagreement_weight=float("nan")), "`disagreement_weight` must be in"),
    "threshold of one": (lambda _: rewards(sparsity_threshold=1.0), r"\[0, 1\)"),
    "negative threshold": (lambda _: rewards(sparsity_threshold=-0.1), r"\[0, 1\)"),
    "importance temperature of zero": (lambda _: rewards(importance_temperature=0.0), "must be positive. Got 0.0"),
    "gap floor of zero": (lambda _: rewards(gap_floor=0.0), "`gap_floor` must be positive"),
    "importance at a temperature of zero": (lambda _: functional.token_importance(gap=ZEROS, completion_mask=MASK, importance_temperature=0.0), "must be positive. Got 0.0 and 0.05"),
    "no reference": (lambda _: scores(reference_weight=1.0), "`reference_logps` are required"),
    "reward temperature of zero": (lambda _: scores(reward_temperature=0.0), "`reward_temperature` must be positive"),
    "negative reward temperature": (lambda _: scores(reward_temperature=-0.25), "`reward_temperature` must be positive"),
    "negative reference weight": (lambda _: scores(reference_weight=-1.0), "`reference_weight` must be at least 0"),
    "negative lambda": (lambda _: functional.subtb_loss(potential=STATES, completion_mask=MASK, subtb_lambda=-0.1), r"`subtb_lambda` must be in \[0, 1\]"),
    "lambda above one": (lambda _: functional.subtb_loss(potential=STATES, completion_mask=MASK, subtb_lambda=1.1), r"\[0, 1\]. Got 1.1"),
    "negative margin": (lambda _: functional.value_discrimination_loss(chosen_log_values=STATES, rejected_log_values=STATES, divergence=torch.zeros(2).long(), value_margin=-0.1), "`value_margin` must be at least 0. Got -0.1"),
    "a beta too many": (lambda _: functional.guided_logps(patient_logits=ZEROS, doctor_logits=[ZEROS], beta=[0.5, 0.5]), "one weight for each doctor. Got 2 for 1"),
    "share of zero": (lambda _: functional.plausible_mask(patient_logits=ZEROS, min_patient_prob=0.0), r"must be in \(0, 1\]. Got 0.0"),
    "share above one": (lambda _: functional.plausible_mask(patient_logits=ZEROS, min_patient_prob=1.5), r"must be in \(0, 1\]. Got 1.5"),
    "objective of rows that are no pairs": (lambda _: objective(num_rows=3), "must be pairs.* Got 3 rows"),
    "objective of nothing": (lambda _: objective(num_rows=0), "must be pairs.* Got 0 rows"),
    "objective without a reference": (lambda _: objective(), "`reference_logps` are required"),
    "objective with a negative margin": (lambda _: objective(reference_weight=0.0, value_margin=-1.0), "`value_margin`"),
}  # fmt: skip
DECODING = {
    "no doctor": (lambda _: guide([]), "at least one doctor"),
    "None for a doctor": (lambda _: guide(None), "must be a language model. Got None"),
    "name of a doctor": (lambda _: guide("my-doctor"), "Got 'my-doctor'; load one with `load_doctor`"),
    "doctor in training mode": (lambda _: guide(make_llama(2).train()), r"must be in eval mode.*`.eval\(\)`"),
    "encoder-decoder doctor": (lambda _: guide(tiny_t5().eval()), "T5ForConditionalGeneration, an encoder-decoder"),
    "folder that is not there": (lambda _: DoctorGuidedLogitsProcessor.from_pretrained("./absent"), "Got './absent', which is not there"),
    "doctor to load that is not there": (lambda _: load_doctor("./absent"), "Got './absent', which is not there"),
    "file instead of a folder": (lambda tmp: load_doctor(str((tmp / "file").write_text("") or tmp / "file")), "which is not there"),
    "beta that is no number": (lambda _: guide(beta="much"), "`beta` must be a number, .* Got 'much'; try 0.5"),
    "beta of None": (lambda _: guide(beta=None), "`beta` must be a number, .* Got None"),
    "beta that is not finite": (lambda _: guide(beta=float("inf")), "`beta` must be finite. Got inf"),
    "alpha that is not finite": (lambda _: guide(alpha=torch.tensor([1.0, float("nan")])), "`alpha` must be finite"),
    "beta above one": (lambda _: guide(beta=1.2), "must not exceed 1 in sum.*pass `alpha`"),
    "a beta too few": (lambda _: guide([make_llama(2), make_llama(3)], beta=[0.5]), "a `beta` and a `reference` for each. Got 2, 1"),
    "probability above one": (lambda _: guide(min_patient_prob=1.5), r"`min_patient_prob` must be in \[0, 1\].*Got 1.5"),
    "negative probability": (lambda _: guide(min_patient_prob=-1), r"`min_patient_prob` must be in \[0, 1\].*Got -1"),
    "negative entropy": (lambda _: guide(min_patient_entropy=-1), "`min_patient_entropy` a number of nats, at least 0"),
    "mask that is a list": (lambda _: guide(attention_mask=[[1, 1]]), r"must have shape \(B, L\).*Got list"),
    "mask of one text": (lambda _: guide(attention_mask=torch.ones(3)), r"must have shape \(B, L\).*Got Tensor of shape \(3,\)"),
    "mask of nothing": (lambda _: guide(attention_mask=torch.ones(1, 0)), "with at least one token"),
    "mask padded on the right": (lambda _: guide(attention_mask=torch.tensor([[1, 0]])), "left-padded.*padding_side='left'"),
    "too few tokenizers": (lambda _: guide(processing_classes=[make_tokenizer()]), "Got 1 for 1 patient, 1 doctors"),
    "unknown adapter": (lambda _: Doctor(make_llama(2), adapter="kind"), "Got 'kind', and it has"),
    "prompt of a doctor without ids": (lambda _: Doctor(make_llama(2), prompt={"text": "a"}), "must have the `input_ids`"),
    "trace that was not kept": (lambda _: guide().trace(IDS), "return_trace=True"),
    "a doctor instead of a guide": (lambda _: generate(guide=make_llama(2)), "Got a `LlamaForCausalLM`; make one"),
    "text instead of ids": (lambda _: generate(input_ids="you are"), r"shape \(B, L\).*Got str"),
    "ids of one text": (lambda _: generate(input_ids=IDS[0]), r"shape \(B, L\).*Got \(3,\)"),
    "no ids": (lambda _: generate(input_ids=IDS[:, :0]), r"at least one token. Got \(1, 0\)"),
    "ids that are not whole": (lambda _: generate(input_ids=IDS.float()), "torch.float32"),
    "ids beyond the vocabulary": (lambda _: generate(input_ids=torch.tensor([[1, 99]])), "from 0 to 21. Got 1 to 99"),
    "negative ids": (lambda _: generate(input_ids=torch.tensor([[1, -9]])), "from 0 to 21. Got -9 to 1"),
    "mask of another shape": (lambda _: generate(attention_mask=torch.ones(2, 3)), r"Got \(2, 3\) for ids \(1, 3\)"),
    "unknown argument of generate": (lambda _: generate(temprature=1.0), "temprature"),
    "speculation for two": (lambda _: generate(input_ids=IDS.repeat(2, 1), speculative=True), "Got 2 rows"),
    "negative number of drafts": (lambda _: generate(speculative=True, num_draft_tokens=-1), "Got -1; try 4"),
    "speculation without a guide": (lambda _: make_llama(1).generate(IDS, custom_generate=speculative_guided_generate), "Got 0; for several doctors"),
}  # fmt: skip
EVALUATION = {
    "no prompt": (lambda _: complete(prompts=[]), r"at least one prompt.* Got \[\]"),
    "a text instead of prompts": (lambda _: complete(prompts="you are"), "a sequence .*Got 'you are'.*pass a list"),
    "prompt without tokens": (lambda _: complete(prompts=[""]), "must have at least one token. Got none for ''"),
    "prompt that is a number": (lambda _: complete(prompts=[3]), "must be a text, or messages that have a role. Got 3"),
    "prompt without messages": (lambda _: complete(prompts=[[]]), r"messages that have a role. Got \[\]"),
    "no samples": (lambda _: complete(num_samples_per_prompt=0), "`num_samples_per_prompt` 0"),
    "batches of nothing": (lambda _: complete(batch_size=-1), "`batch_size` must be at least 1. Got -1"),
    "negative temperature": (lambda _: complete(temperature=-1.0), "`temperature` must be at least 0.* Got -1.0"),
    "temperature that is no number": (lambda _: complete(temperature=float("nan")), "`temperature` must be at least 0.* Got nan"),
    "top_p above one": (lambda _: complete(top_p=7.0), r"`top_p` in \(0, 1\]. Got 1.0 and 7.0"),
    "no new tokens": (lambda _: complete(max_new_tokens=0), "`max_new_tokens` must be greater than 0"),
    "patient in training mode": (lambda _: complete(patient=make_llama(1).train()), "must be in eval mode"),
    "a weight for each row": (lambda _: complete(guide=guide(beta=torch.tensor([0.1, 0.2]))), "one strength at a time"),
    "KL of a weight for each row": (lambda _: evaluation.guided_kl(make_llama(1), guide(beta=torch.tensor([0.1, 0.2])), []), "one strength at a time"),
    "KL in batches of nothing": (lambda _: evaluation.next_token_statistics(make_llama(1), None, [], batch_size=0), "`batch_size` must be at least 1"),
    "KL of tokens that differ": (lambda _: evaluation.sampled_kl([ZEROS[0]], [ZEROS[0, :1]]), "the same token ids with both"),
    "KL at a temperature": (lambda _: measure(temperature=0.7), "`temperature` must be 1. Got 0.7"),
    "a reward too few": (lambda _: measure(lambda **_: [1.0]), r"a finite number for each completion. Got \[1.0\] for 2"),
    "reward that is not finite": (lambda _: measure(lambda **_: [1.0, float("nan")]), "a finite number for each completion"),
    "no rewards": (lambda _: measure(lambda **_: None), "a finite number for each completion. Got None"),
    "KL of zero": (lambda _: evaluation.match_kl(make_llama(1), make_tokenizer(), TEXTS, guide, 0.0), "`target_kl` must be positive. Got 0.0"),
    "n-grams of nothing": (lambda _: evaluation.distinct_n(["a"], 0), "`n` must be at least 1. Got 0"),
    "pairs of nothing": (lambda _: evaluation.self_similarity([["a", "b"]], max_pairs=0), "`max_pairs` must be at least 1"),
    "best of more than there are": (lambda _: evaluation.best_of_n([[0.0, 1.0]], n=3), "`n` must be between 1 .* Got 3"),
    "best of what is not finite": (lambda _: evaluation.best_of_n([[0.0, float("nan")]], n=1), "finite rewards.* 1 rewards not finite"),
    "interval of one prompt": (lambda _: evaluation.bootstrap_interval([1.0]), "at least two prompts"),
    "interval of what is not finite": (lambda _: evaluation.bootstrap_interval([1.0, float("inf")]), "1 not finite"),
    "level of one": (lambda _: evaluation.bootstrap_interval([1.0, 2.0], level=1.0), "`level` must be between 0 and 1"),
    "no resamples": (lambda _: evaluation.bootstrap_interval([1.0, 2.0], num_resamples=0), "`num_resamples` at least 1"),
    "completions of half the prompts": (lambda _: evaluation.head_to_head(TEXTS, ["a"], ["a", "b"], length), "as many completions of each"),
    "other numbers of seeds": (lambda _: evaluation.head_to_head(["a"], [["x"]] * 3, [["y"]] * 2, length), "Got 2 for 3"),
    "negative tie margin": (lambda _: evaluation.head_to_head(["a"], ["x"], ["y"], length, tie_margin=-1.0), "`tie_margin` must not be negative"),
    "no methods": (lambda _: evaluation.evaluate_completions(TEXTS, {}), "must name methods"),
    "unknown baseline": (lambda _: report(baseline="dpo"), "must name methods .* Got 'dpo'"),
    "nobody to judge": (lambda _: report(reward_fn=None, baseline="patient"), "somebody who judges"),
    "completion of no prompt": (lambda _: report(methods={"doctor": ["one text"]}), "2 prompts"),
    "measure of another size": (lambda _: report(measures={"doctor": {"kl": [0.1]}}), "one for each completion"),
    "measure that is there": (lambda _: report(measures={"doctor": {"reward": [0.1, 0.2]}}), "new names"),
    "level above one": (lambda _: report(level=1.5), "`level` must be between 0 and 1"),
    "level above one for a single prompt": (lambda _: evaluation.evaluate_completions(["a"], {"doctor": ["x"]}, length, level=1.5), "`level` must be between 0 and 1"),
    "report of something else": (lambda tmp: evaluation.Report.load(write(tmp / "report.json", '{"a": 1}')), "a file that `Report.save` wrote"),
    "report that is cut": (lambda tmp: evaluation.Report.load(write(tmp / "report.json", '{"settings": ')), "a file that `Report.save` wrote"),
    "reward model that is not there": (lambda _: evaluation.RewardModel("./absent"), "Got './absent', which is not there"),
    "reward model of two labels": (lambda _: evaluation.RewardModel(make_llama(1)), "must have one label"),
    "endpoint without http": (lambda _: evaluation.ChatJudge("localhost:8000", "model"), "URL of an endpoint. Got 'localhost:8000'"),
    "judge without workers": (lambda _: evaluation.ChatJudge("http://localhost/v1", "model", num_workers=0), "`num_workers` must be at least 1.* Got 0"),
    "judge of one completion": (lambda _: evaluation.ChatJudge("http://localhost/v1", "model").judge(["a"], [["x"]]), "two completions for each prompt"),
}  # fmt: skip
WORLD = {
    "unknown attribute": (lambda _: load_world().preference_dataset("prais", num_pairs=1, seed=0), r"one of \['calm', 'praise'\]. Got 'prais'"),
    "no pairs": (lambda _: load_world().preference_dataset("praise", num_pairs=0, seed=0), "at least one prompt"),
    "unknown split": (lambda _: load_world().prompts("dev"), "`split` must be one of .* Got 'dev'"),
    "world that is not there": (lambda _: load_world("absent"), "must hold the folders 'patient' and 'doctor'.*testbed.build"),
    "comparison of an unknown attribute": (lambda _: testbed.Comparison(load_world(), "prais"), "Got 'prais'"),
    "frontier of nine samples": (lambda _: testbed.reward_kl_frontier(torch.randn(4, 9)), r"finite \(P, N\) matrix.* Got shape \(4, 9\)"),
    "frontier of a list": (lambda _: testbed.reward_kl_frontier([1.0] * 50), r"finite \(P, N\) matrix"),
    "frontier of what is not finite": (lambda _: testbed.reward_kl_frontier(torch.full((2, 50), float("nan"))), r"finite \(P, N\) matrix"),
    "frontier of one reward": (lambda _: testbed.reward_kl_frontier(torch.ones(2, 50)), "must vary within a prompt"),
    "heat map of preferences": (lambda _: show_token_rewards(ROWS[0], make_tokenizer()), "annotate_token_rewards"),
    "report of preferences": (lambda _: reward_report(Dataset.from_list(ROWS), make_tokenizer(), "report"), "must have pairs with the columns"),
    "trace of another generation": (lambda _: guide(return_trace=True).trace(IDS), "none was traced"),
    "plan without faces": (lambda _: training_plan(Dataset.from_list(ROWS), make_tokenizer(), doctor="doctor", args=TFPOConfig("run")), "needs a patient and faces"),
}  # fmt: skip
SERVING = {
    "no rows": (lambda _: Limits(max_rows=0), "`max_rows` must be positive. Got 0"),
    "negative length": (lambda _: Limits(max_new_tokens=-1), "`max_new_tokens` must be positive. Got -1"),
    "time that is no number": (lambda _: Limits(max_seconds=float("nan")), "`max_seconds` must be positive. Got nan"),
    "patient in training mode": (lambda _: Engine(make_llama(1).train(), make_tokenizer(), {}), "eval mode"),
    "empty key": (lambda _: make_app(None, model_name="world", api_key=""), "an empty key; leave out `api_key`"),
    "model without a name": (lambda _: make_app(None, model_name=""), "must have names"),
    "weight that is not finite": (lambda _: submit([1], alpha=float("nan")), "`alpha` must be finite. Got nan"),
    "unknown doctor": (lambda _: submit([1], weights={"kind": 1.0}), r"among \[\]. Got \['kind'\]"),
    "negative temperature": (lambda _: submit([1], temperature=-1.0), r"`temperature` must be at least 0.* Got \(-1.0"),
    "no new tokens": (lambda _: submit([1], max_new_tokens=0), "`max_new_tokens` at least 1"),
    "prompt of nothing": (lambda _: submit([]), "must have 1 to 127 tokens. Got 0"),
    "prompt beyond the positions": (lambda _: submit([1] * 128), "must have 1 to 127 tokens. Got 128"),
    "negative id": (lambda _: submit([-4]), "tokens that all models know"),
    "id beyond the vocabulary": (lambda _: submit([99]), "tokens that all models know"),
    "top_k below zero": (lambda _: submit([1], top_k=-1), r"`top_k` must be at least 0.* Got \(-1"),
    "min_p above one": (lambda _: submit([1], min_p=1.5), r"`min_p` in \[0, 1\]"),
    "repetition penalty of zero": (lambda _: submit([1], repetition_penalty=0.0), "`repetition_penalty` at least 0.01"),
    "penalty that is not finite": (lambda _: submit([1], presence_penalty=float("inf")), "must be finite"),
    "bias for a token that is not there": (lambda _: submit([1], logit_bias={22: 1.0}), "from 0 to 21. Got 22"),
    "bias against all tokens": (lambda _: submit([1], logit_bias=dict.fromkeys(range(22), -100.0)), "must leave a token"),
    "bias for a patient without a say": (lambda _: submit([1], alpha=0.0, logit_bias={5: 1.0}), "its exponent must be above 0"),
    "alias of the patient's name": (lambda _: serve_aliases(tiny={}), "a name of its own. Got 'tiny'"),
    "alias without a name": (lambda _: serve_aliases(**{"": {}}), r"must have names.*\['tiny', ''\]"),
    "alias of an unknown doctor": (lambda _: serve_aliases(mild={"kind": 0.1}), r"Alias 'mild': `weights` must name doctors"),
}  # fmt: skip
TABLES = {
    "annotation": ANNOTATION,
    "collator": COLLATOR,
    "training": TRAINING,
    "settings": SETTINGS,
    "functional": FUNCTIONAL,
    "decoding": DECODING,
    "evaluation": EVALUATION,
    "world": WORLD,
    "serving": SERVING,
}
CALLS = {f"{table}: {name}": row for table, rows in TABLES.items() for name, row in rows.items()}


@pytest.mark.parametrize("attempt, message", CALLS.values(), ids=CALLS)
def test_a_call_is_refused(attempt, message, tmp_path, monkeypatch):
    """
    Rewards of the wrong tokens, a doctor that learned nothing overnight, a report on texts shifted by one: all look like
    any others. And what failed must leave nothing that looks like a result.
    """
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        attempt(tmp_path)
    assert not list((tmp_path / "here").iterdir())


# The command line: what is typed in the folder below, and a part of the one line that answers it

PAIRS = "annotate --dataset_name pairs.jsonl --output out.jsonl"
DRAW = "annotate --world praise --num_pairs 2 --output out.jsonl"
PATIENT = "--patient patient"
TRAIN = f"train --dataset_name pairs.jsonl {PATIENT} --doctor doctor --output_dir run --max_steps 1"
GENERATE = f"generate {PATIENT} --prompt 'you are'"
EVALUATE = "evaluate --output_dir report --completions"
SERVE = "serve --port 0"
COMMANDS = {
    "no verb": ("", None),
    "mistyped verb": ("anotate", "unknown command 'anotate', did you mean 'annotate'?"),
    "unknown verb": ("xyz", "unknown command 'xyz'. `trl-tfpo --help`"),
    "mistyped option": (f"{DRAW} --sparsity_treshold 0.3", "did you mean '--sparsity_threshold'?"),
    "mistyped option of train": ("train --lerning_rate 1", "did you mean '--learning_rate'?"),
    "mistyped option of generate": ("generate --world --temprature 1", "did you mean '--temperature'?"),
    "mistyped option of serve": ("serve --world --prot 80", "did you mean '--port'?"),
    "abbreviated option": (f"{DRAW} --sparsity 0.3", "unknown option '--sparsity'"),
    "stray argument": ("annotate pairs.jsonl --world praise --output out.jsonl", "pairs.jsonl"),
    "not a number": (f"{DRAW} --gap_floor much", "--gap_floor"),
    "no output": ("annotate --world praise", "--output"),
    "out of range": (f"{DRAW} --sparsity_threshold 1.5", "must be in [0, 1)"),
    "unknown direction": (f"{DRAW} --reward_direction up", "'up'"),
    "unknown attribute": ("annotate --world prais --output out.jsonl", "'prais'"),
    "no pairs": ("annotate --world praise --num_pairs 0 --output out.jsonl", "at least one prompt"),
    "nothing to annotate": ("annotate --output out.jsonl", "needs preferences and a patient"),
    "one face of two": (f"{DRAW} --positive_face x", "Faces are a pair"),
    "faces that are the same": (f"{PAIRS} {PATIENT} --positive_face x --negative_face x", "must differ"),
    "unknown faces": (f"{PAIRS} {PATIENT} --faces kindness", "'kindness'"),
    "faces at no place": (f"{PAIRS} {PATIENT} --face_placement end", "'system' or 'user'. Got 'end'"),
    "batches of nothing": (
        f"{PAIRS} {PATIENT} --scoring_batch_size 0",
        "`--scoring_batch_size` at least 1. Got 0 and 0",
    ),
    "negative length": (f"{PAIRS} {PATIENT} --max_length -1", "`max_length` must be at least 1. Got -1"),
    "4 bits and 8": (f"{PAIRS} {PATIENT} --patient_load_in_4bit --patient_load_in_8bit", "Got both"),
    "no such file": (f"annotate --dataset_name absent.jsonl {PATIENT} --output out.jsonl", "not there"),
    "broken file": (f"annotate --dataset_name broken.jsonl {PATIENT} --output out.jsonl", "cannot be read"),
    "empty file": (f"annotate --dataset_name empty.jsonl {PATIENT} --output out.jsonl", "cannot be read: it is empty"),
    "rows without texts": (f"annotate --dataset_name null.jsonl {PATIENT} --output out.jsonl", "Row 0 of the dataset"),
    "no such model": (f"{PAIRS} --patient ./absent", "Got './absent', which is not there"),
    "other columns": (f"annotate --dataset_name other.jsonl {PATIENT} --output out.jsonl", "chosen"),
    "no such split": (f"{PAIRS} {PATIENT} --dataset_split test", "must be one of ['train']"),
    "output exists": ("annotate --world praise --output pairs.jsonl", "must not exist"),
    "output is a folder of others": ("annotate --world praise --output patient --overwrite", "Only a dataset"),
    "output in a file": ("annotate --world praise --output pairs.jsonl/out.jsonl", "pairs.jsonl"),
    "no such config": (f"{DRAW} --config absent.yaml", "absent.yaml"),
    "config that is a list": (f"{DRAW} --config list.yaml", "YAML mapping"),
    "config that is no YAML": (f"{DRAW} --config broken.yaml", "must be a YAML file. Got 'broken.yaml'"),
    "mistyped key in a config": ("annotate --output out.jsonl --config typo.yaml", "--num_pairs"),
    "no word after --config": (f"{DRAW} --config", "must be followed by a YAML file"),
    "show less than nothing": (f"{DRAW} --show -1", "must not be negative"),
    "launch option that is no number": (f"{DRAW} --num_processes two", "--num_processes"),
    "stray argument after a launch option": (f"{DRAW} --num_processes 1 stray", "'stray'"),
    "no name": (f"annotate --dataset_name '' {PATIENT} --output out.jsonl", "Got ''"),
    "no such accelerate config": (f"{DRAW} --accelerate_config zero33", "did you mean 'zero3'?"),
    "train without data": ("train --output_dir run", "needs preferences"),
    "train without a doctor": ("train --dataset_name pairs.jsonl --output_dir run", "needs a doctor"),
    "train out of range": (f"{TRAIN} --subtb_lambda 2", "must be in [0, 1]"),
    "train in batches of nothing": (
        f"{TRAIN} --per_device_train_batch_size 0",
        "`per_device_train_batch_size` must be at least 1. Got 0",
    ),
    "train at a negative rate": (f"{TRAIN} --learning_rate -1", "`learning_rate` must be at least 0. Got -1.0"),
    "train on no such split": (f"{TRAIN} --dataset_train_split dev", "must be one of ['train']. Got 'dev'"),
    "train and evaluate on no such split": (f"{TRAIN} --eval_strategy steps", "must be one of ['train']. Got 'test'"),
    "train from no such checkpoint": (
        f"{TRAIN} --resume_from_checkpoint ./absent",
        "checkpoint must have been written",
    ),
    "train a doctor of another family": (f"{TRAIN} --doctor other", "must have the same tokenizer"),
    "train by no such column": (f"{TRAIN} --chosen_id_column better", "needs ['better', 'prompt', 'response_0'"),
    "plan for fewer than no processes": (f"{TRAIN} --dry_run -1", "must be a number of processes. Got -1"),
    "generate without a patient": ("generate --prompt hello", "a patient is needed"),
    "generate without prompts": (f"generate {PATIENT}", "there are no prompts"),
    "generate with a beta too many": ("generate --world --beta 0.5", "a number for each doctor"),
    "generate with too much beta": (f"{GENERATE} --doctor doctor --beta 2", "must not exceed 1"),
    "generate without a column": (f"generate {PATIENT} --dataset_name other.jsonl", "a column `prompt`"),
    "generate, no such doctor": ("generate --world --doctor ./absent", "Got './absent', which is not there"),
    "generate, doctor of another family": (f"{GENERATE} --doctor other", "must have the same tokenizer"),
    "generate at a negative temperature": (f"{GENERATE} --temperature -1", "`--temperature` must not be negative"),
    "generate from more than all": (f"{GENERATE} --top_p 7", "`--top_p` be in (0, 1]"),
    "generate no samples": (f"{GENERATE} --num_samples_per_prompt 0", "`num_samples_per_prompt` 0"),
    "generate into a folder of others": (f"{GENERATE} --output patient", "must not exist"),
    "generate over a file": (f"{GENERATE} --output pairs.jsonl", "must not exist"),
    "generate from numbers": (f"generate {PATIENT} --dataset_name numbers.jsonl", "Prompts must be texts"),
    "evaluate without a name": (f"{EVALUATE} a.jsonl", "NAME=DATASET"),
    "evaluate a name twice": (f"{EVALUATE} a=a.jsonl a=b.jsonl", "each name once"),
    "evaluate other prompts": (f"{EVALUATE} a=a.jsonl b=short.jsonl", "the same prompts"),
    "evaluate without columns": (f"{EVALUATE} a=other.jsonl", "`completion`"),
    "evaluate numbers": (f"{EVALUATE} a=numbers.jsonl", "must be a text or messages. Got 2"),
    "evaluate without a judge": (f"{EVALUATE} a=a.jsonl b=b.jsonl --baseline a", "somebody who judges"),
    "evaluate, rewards of nobody": (f"{EVALUATE} a=a.jsonl --output rewards.jsonl", "are for rewards"),
    "evaluate into a file": ("evaluate --output_dir a.jsonl --completions a=a.jsonl", "can be written to"),
    "evaluate at no level": (f"{EVALUATE} a=a.jsonl --level 2", "`level` must be between 0 and 1"),
    "evaluate by no such oracle": (f"{EVALUATE} a=a.jsonl --world prais", "Got 'prais'"),
    "serve nothing": (SERVE, "a patient is needed"),
    "serve at no port": ("serve --world --port 99999", "an address of this machine that is free"),
    "serve at no address": (f"{SERVE} --world --host 256.0.0.1", "an address of this machine that is free"),
    "serve a doctor without a name": (f"{SERVE} --world --doctor =path", "NAME=PATH"),
    "serve a doctor that is not there": (f"{SERVE} --world --doctor a=./absent", "Got './absent', which is not there"),
    "serve a doctor of another family": (f"{SERVE} --world --doctor a=doctor", "must have the same tokenizer"),
    "serve with a key that is not there": (f"{SERVE} --world --api_key_file absent.txt", "absent.txt"),
    "serve with an empty key": (f"{SERVE} --world --api_key_file empty.jsonl", "must hold a key"),
    "serve an alias without weights": (f"{SERVE} --world --alias mild", "NAME=DOCTOR:WEIGHT"),
    "serve an alias with half a weight": (f"{SERVE} --world --alias mild=kind", "Got 'mild=kind'"),
    "serve an alias of nobody": (
        f"{SERVE} --world --alias mild=kind:0.5",
        "Alias 'mild': `weights` must name doctors",
    ),
    "serve an alias twice": (f"{SERVE} --world --alias mild=kind:0.5 mild=kind:0.1", "each name and each doctor once"),
    "serve no choices": (f"{SERVE} --world --max_choices 0", "`max_choices` must be positive. Got 0"),
    "serve nobody": (f"{SERVE} --world --max_rows 0", "`max_rows` must be positive. Got 0"),
    "serve for no time": (f"{SERVE} --world --max_seconds nan", "`max_seconds` must be positive. Got nan"),
    "play without a patient": ("demo --doctor a=doctor", "`--doctor` needs `--patient`"),
    "play without a doctor": ("demo --patient patient", "needs at least one `--doctor"),
    "play at no port": ("demo --port -1", "an address of this machine that is free"),
    "play with doctors that learn nothing": ("demo --max_steps 0 --cache_dir cache", "`max_steps` must be at least 1"),
    "env with an option": ("env --all", "takes no options"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and files, good and bad."""
    folder = tmp_path_factory.mktemp("commands")
    for name, text in {
        "pairs.jsonl": "".join(json.dumps(row) + "\n" for row in conversational_rows(8)),
        "broken.jsonl": '{"prompt": "a", "chosen"',
        "empty.jsonl": "",
        "null.jsonl": '{"prompt": "you", "chosen": null, "rejected": "bad"}\n',
        "other.jsonl": '{"question": "a"}\n',
        "numbers.jsonl": '{"prompt": 1, "completion": 2}\n',
        "a.jsonl": '{"prompt": "you are", "completion": "kind"}\n',
        "b.jsonl": '{"prompt": "you are", "completion": "rude"}\n',
        "short.jsonl": '{"prompt": "another", "completion": "kind"}\n',
        "list.yaml": "- a\n",
        "broken.yaml": "a: [\n",
        "typo.yaml": "nun_pairs: 3\nworld: praise\n",
    }.items():
        (folder / name).write_text(text)
    for name, words in (("patient", WORDS), ("doctor", WORDS), ("other", PERMUTED)):
        make_llama(1).save_pretrained(folder / name)
        make_tokenizer(words).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("command, message", COMMANDS.values(), ids=COMMANDS)
def test_a_command_is_answered_in_one_line(command, message, folder, monkeypatch, capsys):
    """A traceback says nothing to somebody who mistyped a word; and a command that failed leaves nothing behind."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert main(shlex.split(command)) == 2
    captured = capsys.readouterr()
    if message is not None:
        (line,) = [line for line in captured.err.splitlines() if line.startswith("trl-tfpo")]
        assert message in line and ": error: " in line
    assert "Traceback" not in captured.err + captured.out
    assert sorted(folder.rglob("*")) == before


# HTTP: method, path, what is sent, and a part of the answer

KEY = "a-key-for-tests"
CHAT = {"model": "world", "messages": [{"role": "user", "content": "please review the park inn."}]}
TEXT = {"model": "world", "prompt": "the park inn"}
REQUESTS = {
    "no such model": ("POST", "/v1/chat/completions", CHAT | {"model": "/etc/passwd"}, 404, "must be 'world'"),
    "no such model for a text": ("POST", "/v1/completions", TEXT | {"model": "../world"}, 404, "must be 'world'"),
    "unknown doctor": ("POST", "/v1/chat/completions", CHAT | {"weights": {"kind": 1.0}}, 400, "must name doctors"),
    "weights above one": ("POST", "/v1/chat/completions", CHAT | {"weights": {"calm": 0.9, "wild": 0.9}}, 400, "must not exceed 1 in sum"),
    "weight that is no number": ("POST", "/v1/chat/completions", CHAT | {"weights": {"calm": "much"}}, 400, "weights.calm"),
    "weight that is not finite": ("POST", "/v1/completions", b'{"model": "world", "prompt": "a", "alpha": Infinity}', 400, "alpha"),
    "weight out of range": ("POST", "/v1/completions", TEXT | {"alpha": 11}, 400, "alpha"),
    "unknown field": ("POST", "/v1/chat/completions", CHAT | {"wieghts": {}}, 400, "wieghts"),
    "unknown field of a text": ("POST", "/v1/completions", TEXT | {"messages": []}, 400, "messages"),
    "no messages": ("POST", "/v1/chat/completions", CHAT | {"messages": []}, 400, "messages"),
    "no prompt": ("POST", "/v1/completions", {"model": "world"}, 400, "prompt"),
    "empty prompt": ("POST", "/v1/completions", TEXT | {"prompt": ""}, 400, "1 to 40 tokens. Got 0"),
    "too many prompts": ("POST", "/v1/completions", TEXT | {"prompt": ["a"] * 5}, 400, "number of prompts must be at most 4. Got 5"),
    "too many choices of prompts": ("POST", "/v1/completions", TEXT | {"prompt": ["a", "b"], "n": 3}, 400, "at most 4. Got 6"),
    "a list of no prompts": ("POST", "/v1/completions", TEXT | {"prompt": []}, 400, "prompt.texts: List should have at least 1"),
    "one empty prompt of two": ("POST", "/v1/completions", TEXT | {"prompt": [[5], []]}, 400, "prompt.lists of ids.1"),
    "prompts of two kinds": ("POST", "/v1/completions", TEXT | {"prompt": ["a", 5]}, 400, "prompt.texts.1"),
    "ids that are no numbers": ("POST", "/v1/completions", TEXT | {"prompt": [5, True]}, 400, "prompt.ids.1"),
    "an id beyond the vocabulary": ("POST", "/v1/completions", TEXT | {"prompt": [10**30]}, 400, "tokens that all models know"),
    "a negative id": ("POST", "/v1/completions", TEXT | {"prompt": [[5], [-1]]}, 400, "prompt.lists of ids.1.0"),
    "unknown role": ("POST", "/v1/chat/completions", CHAT | {"messages": [{"role": "doctor", "content": "a"}]}, 400, "role"),
    "message of an image": ("POST", "/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]}, 400, "content.parts.0.type: Input should be 'text'"),
    "message of no parts": ("POST", "/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": []}]}, 400, "content.parts"),
    "message of nothing": ("POST", "/v1/chat/completions", CHAT | {"messages": [{"role": "assistant", "content": None}]}, 400, "content: Field required"),
    "message that calls a tool": ("POST", "/v1/chat/completions", CHAT | {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, 400, "tool_calls: List should have at most 0 items"),
    "message that refuses": ("POST", "/v1/chat/completions", CHAT | {"messages": [{"role": "assistant", "content": "a", "refusal": "no"}]}, 400, "refusal"),
    "tools": ("POST", "/v1/chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "this is not supported otherwise, leave it out"),
    "a tool that must be used": ("POST", "/v1/chat/completions", CHAT | {"tool_choice": "required"}, 400, "tool_choice"),
    "an answer in JSON": ("POST", "/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format.type: Input should be 'text'; this is not supported otherwise"),
    "spoken answers": ("POST", "/v1/chat/completions", CHAT | {"modalities": ["text", "audio"]}, 400, "modalities"),
    "answers that are stored": ("POST", "/v1/chat/completions", CHAT | {"store": True}, 400, "store: Input should be False; this is not"),
    "effort": ("POST", "/v1/chat/completions", CHAT | {"reasoning_effort": "high"}, 400, "reasoning_effort"),
    "the best of two": ("POST", "/v1/completions", TEXT | {"best_of": 2}, 400, "best_of"),
    "a suffix": ("POST", "/v1/completions", TEXT | {"suffix": "b"}, 400, "suffix"),
    "a variable that the template lacks": ("POST", "/v1/chat/completions", CHAT | {"chat_template_kwargs": {"enable_thinking": True}}, 400, "variables of the chat template. Got 'enable_thinking'"),
    "a template of one's own": ("POST", "/v1/chat/completions", CHAT | {"chat_template_kwargs": {"chat_template": "a"}}, 400, "variables of the chat template. Got 'chat_template'"),
    "an argument as a variable": ("POST", "/v1/chat/completions", CHAT | {"chat_template_kwargs": {"tokenize": False}}, 400, "Got 'tokenize'"),
    "half a character in a variable": ("POST", "/v1/chat/completions", CHAT | {"chat_template_kwargs": {"bos_token": "\ud800"}}, 400, "chat_template_kwargs"),
    "half a character in a field": ("POST", "/v1/completions", TEXT | {"\ud800": 1}, 400, "valid string"),
    "half a character": ("POST", "/v1/completions", TEXT | {"prompt": "a \ud800"}, 400, "lone surrogates"),
    "half a character in a message": ("POST", "/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "\udfff"}]}, 400, "lone surrogates"),
    "half a character in a name": ("POST", "/v1/completions", TEXT | {"weights": {"\ud800": 1.0}}, 400, "must name doctors"),
    "negative temperature": ("POST", "/v1/chat/completions", CHAT | {"temperature": -1}, 400, "temperature"),
    "top_p of zero": ("POST", "/v1/chat/completions", CHAT | {"top_p": 0}, 400, "top_p"),
    "too many choices": ("POST", "/v1/chat/completions", CHAT | {"n": 5}, 400, "at most 4"),
    "no choices": ("POST", "/v1/completions", TEXT | {"n": 0}, 400, "n:"),
    "too many tokens": ("POST", "/v1/chat/completions", CHAT | {"max_tokens": 65}, 400, "at most 64"),
    "no tokens": ("POST", "/v1/completions", TEXT | {"max_tokens": 0}, 400, "`max_tokens` must be at least 1 without `echo`"),
    "no tokens of a conversation": ("POST", "/v1/chat/completions", CHAT | {"max_tokens": 0}, 400, "max_tokens"),
    "likeliest tokens without the rest": ("POST", "/v1/chat/completions", CHAT | {"top_logprobs": 2}, 400, "`top_logprobs` needs `logprobs`"),
    "usage of a stream that is none": ("POST", "/v1/completions", TEXT | {"stream_options": {"include_usage": True}}, 400, "`stream_options` is for streams"),
    "a penalty out of range": ("POST", "/v1/completions", TEXT | {"presence_penalty": 2.5}, 400, "presence_penalty"),
    "a penalty that overflows": ("POST", "/v1/completions", TEXT | {"repetition_penalty": 1e-300}, 400, "repetition_penalty"),
    "a bias for an unknown token": ("POST", "/v1/completions", TEXT | {"logit_bias": {"174": 1}}, 400, "`logit_bias` must be for token ids from 0 to 173. Got 174"),
    "a bias for a word": ("POST", "/v1/completions", TEXT | {"logit_bias": {"park": 1}}, 400, "logit_bias.park"),
    "a penalty for a patient without a say": ("POST", "/v1/completions", TEXT | {"alpha": 0, "frequency_penalty": 1}, 400, "its exponent must be above 0. Got 0"),
    "too many log-probabilities": ("POST", "/v1/completions", TEXT | {"logprobs": 6}, 400, "logprobs"),
    "negative seed": ("POST", "/v1/completions", TEXT | {"seed": -1}, 400, "seed"),
    "long prompt": ("POST", "/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "the park inn " * 50}]}, 400, "1 to 40 tokens"),
    "large request": ("POST", "/v1/chat/completions", CHAT | {"user": "a" * 30_000}, 413, "at most 20000 bytes"),
    "empty stop": ("POST", "/v1/chat/completions", CHAT | {"stop": [""]}, 400, "stop"),
    "too many stops": ("POST", "/v1/completions", TEXT | {"stop": ["a"] * 65}, 400, "stop"),
    "not JSON": ("POST", "/v1/chat/completions", b"{", 400, "JSON"),
    "not text": ("POST", "/v1/chat/completions", b"\xff\xfe", 400, "JSON"),
    "a list": ("POST", "/v1/chat/completions", b"[]", 400, "body"),
    "nested beyond reading": ("POST", "/v1/completions", b"[" * 19_000, 400, "parsing the body"),
    "a form": ("POST", "/v1/completions", b"model=world&prompt=a", 400, "JSON"),
    "of unknown length": ("POST", "/v1/completions", iter([b"{}"]), 411, "Content-Length"),
    "read what is written": ("GET", "/v1/chat/completions", None, 405, "Method Not Allowed"),
    "write what is read": ("POST", "/v1/models", {}, 405, "Method Not Allowed"),
    "write to health": ("DELETE", "/health", None, 405, "Method Not Allowed"),
    "write to metrics": ("PUT", "/metrics", None, 405, "Method Not Allowed"),
    "ask as a page of another site would": ("OPTIONS", "/v1/chat/completions", None, 405, "Method Not Allowed"),
    "no such model by its name": ("GET", "/v1/models/etc/passwd", None, 404, "must be 'world'"),
    "a path with a slash too many": ("GET", "/v1/models/", None, 404, "must be 'world'"),
    "no such path": ("GET", "/v1/engines", None, 404, "Not Found"),
    "a path to a file": ("GET", "/../../etc/passwd", None, 404, "Not Found"),
    "pages of documentation": ("GET", "/docs", None, 404, "Not Found"),
}  # fmt: skip


@pytest.fixture(scope="module")
def url():
    """A real server with little patience."""
    world = load_world()
    limits = Limits(max_prompt_tokens=40, max_new_tokens=64, max_choices=4, max_bytes=20_000)
    engine = Engine(world.patient, world.tokenizer, {"calm": world.doctor, "wild": world.doctor}, limits)
    with serving(make_app(engine, model_name="world", api_key=KEY)) as url:
        yield url


@pytest.mark.parametrize("method, path, body, status, message", REQUESTS.values(), ids=REQUESTS)
def test_a_request_is_refused(method, path, body, status, message, url):
    """Clients are programs: they need a status and a body of the form they know, never a traceback."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    answer = httpx.request(method, url + path, content=content, headers=headers, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert message.lower() in error["message"].lower() and error["type"]


@pytest.mark.parametrize("method, path", [("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/v1/x"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions")])  # fmt: skip
@pytest.mark.parametrize("key", [None, "", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \xff"])
def test_nothing_is_said_without_the_key(method, path, key, url):
    """A server whose key can be left out, or guessed by its beginning, has none."""
    headers = {} if key is None else {"authorization": key.encode("latin-1")}
    answer = httpx.request(method, url + path, json=TEXT if method == "POST" else None, headers=headers, timeout=60)
    assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"


def test_a_loss_that_is_not_finite_stops_training(tmp_path, monkeypatch):
    """The Trainer logs zeros instead of NaN by default, and goes on."""
    monkeypatch.chdir(tmp_path)
    doctor = make_llama(2)
    trainer = train(tmp_path, model=doctor, settings={"max_steps": 2, "reference_weight": 0.0})
    with torch.no_grad():
        doctor.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss must be finite. Got nan at step 0"):
        trainer.train()
    folder = tmp_path / "run" / "not-finite-0"
    batch = load_file(folder / "batch-0.safetensors")
    assert batch["input_ids"].shape == batch["completion_mask"].shape
    kept = AutoModelForCausalLM.from_pretrained(folder)
    assert kept.model.norm.weight.isnan().all() and not kept.lm_head.weight.any()  # as nothing was trained

# SPDX-License-Identifier: Apache-2.0

"""
Numbers at their edges: what is not finite is said or has no effect, and what is finite stays so.

`TRL_TFPO_BATCHES` says through how many random batches gradients are followed.
"""

import copy
import math
import os
import threading

import pytest
import torch
from conftest import FACES, WORDS, conversational_rows, make_llama, make_tokenizer, save_model
from datasets import Dataset

from trl_tfpo import (
    DoctorGuidedLogitsProcessor,
    TFPOConfig,
    TFPOTrainer,
    annotate_token_rewards,
    guided_generate,
    tfpo_objective,
)
from trl_tfpo.annotation.report import reward_report
from trl_tfpo.annotation.scoring import score_completions
from trl_tfpo.annotation.token_rewards import annotation_settings
from trl_tfpo.cli.models import load_models
from trl_tfpo.functional import guided_logps
from trl_tfpo.models.named_model import NamedModel
from trl_tfpo.server import Engine, Generation


NUM_BATCHES = int(os.environ.get("TRL_TFPO_BATCHES", 300))
PROMPT = torch.tensor([[1, 10, 12, 13]])
GREEDY = dict(do_sample=False, max_new_tokens=8, eos_token_id=None)


def biased(model, ids, value: float):
    """The model, with a bias on its logits."""
    bias = torch.zeros(model.config.vocab_size)
    bias[ids] = value
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


# Logits


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("culprit", ["the patient", "doctor 0"])
def test_logits_that_are_no_numbers_are_not_decoded(culprit, value, speculative):
    """An overflow would come out as one token for ever."""
    models = {"the patient": make_llama(1, 32), "doctor 0": make_llama(2)}
    biased(models[culprit], [5], value)
    guide = DoctorGuidedLogitsProcessor(models["doctor 0"])
    with pytest.raises(ValueError, match=f"must not be NaN. Got NaN from {culprit}"):
        guided_generate(models["the patient"], guide, input_ids=PROMPT, **GREEDY, speculative=speculative)


@pytest.mark.parametrize("masked", ["the patient", "doctor 0"])
def test_a_vocabulary_mask_is_kept(masked):
    """Minus infinity is an instruction and no accident: such a token must not come back through the other model."""
    models, allowed = {"the patient": make_llama(1, 32), "doctor 0": make_llama(2)}, [7, 8, 9]
    banned = [index for index in range(len(WORDS.split())) if index not in allowed]
    biased(models[masked], banned, -math.inf)
    guide = DoctorGuidedLogitsProcessor(models["doctor 0"], beta=0.1 if masked == "doctor 0" else 0.9)
    for settings in (GREEDY, GREEDY | dict(do_sample=True), GREEDY | dict(speculative=True)):
        output = guided_generate(models["the patient"], guide, input_ids=PROMPT, **settings)
        assert set(output[0, PROMPT.size(1) :].tolist()) <= set(allowed)


def test_a_vocabulary_mask_over_data_is_said_and_any_other_has_no_effect():
    """A completion that a model rules out has no finite reward; rows without such tokens are as they were."""
    rows, tokenizer = Dataset.from_list(conversational_rows()), make_tokenizer()
    unused = WORDS.split().index("a")
    plain, masked = make_llama(1, 32), biased(make_llama(1, 32), [unused], -math.inf)
    with torch.no_grad():
        biased(plain, [unused], -1e4)
    rewards = [
        annotate_token_rewards(rows, x, tokenizer, faces=FACES)["chosen_token_rewards"][:] for x in (plain, masked)
    ]
    assert rewards[0] == rewards[1]
    used = biased(make_llama(1, 32), [WORDS.split().index("good")], -math.inf)
    with pytest.raises(ValueError, match="must be finite.*every token of the data a finite logit"):
        annotate_token_rewards(rows, used, tokenizer, faces=FACES)


def test_a_row_that_overflows_ends_alone():
    """One prompt on which a server's model overflows would end the answers of all who ask at the same time."""
    patient, doctor = make_llama(1, 32), make_llama(2)
    with torch.no_grad():
        patient.model.embed_tokens.weight[5] = math.nan
    engine, ends = Engine(patient, make_tokenizer(), {"doctor": doctor}), {}
    done = threading.Semaphore(0)

    def submit(name, ids):
        def on_event(event):
            if "finish_reason" in event:
                ends[name] = event
                done.release()

        engine.submit(Generation(ids, on_event, temperature=0, max_new_tokens=6))

    submit("alone", [1, 10, 12])
    assert done.acquire(timeout=60)
    for name, ids in (("sound", [1, 10, 12]), ("broken", [1, 5, 12]), ("sound too", [1, 10, 12])):
        submit(name, ids)
    assert all(done.acquire(timeout=60) for _ in range(3))
    engine.close()
    assert ends["broken"]["finish_reason"] == "error"
    assert ends["sound"] == ends["sound too"] == ends["alone"] and ends["alone"]["num_tokens"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_patients_in_half_precision(dtype):
    """Rewards that depend on how a patient was loaded are not rewards of the data."""
    rows, tokenizer = Dataset.from_list(conversational_rows()), make_tokenizer()
    exact, half = (
        annotate_token_rewards(rows, make_llama(1, 32).to(x), tokenizer, faces=FACES) for x in (torch.float32, dtype)
    )
    for name in ("chosen_gaps", "rejected_gaps"):
        expected, found = (torch.tensor([value for row in x[name] for value in row]) for x in (exact, half))
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
        assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.98
    guide = DoctorGuidedLogitsProcessor(make_llama(2).to(dtype), beta=0.5)
    output = guided_generate(
        make_llama(1, 32).to(dtype),
        guide,
        input_ids=PROMPT,
        **GREEDY,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = torch.stack(output.scores)
    assert scores.dtype == torch.float32 and scores.isfinite().all()
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(scores.shape[:-1]))


# Shapes


def train(rows, tmp_path, max_length=None):
    """From texts to weights in two steps of one pair each, finite all along; the annotated dataset."""
    patient, doctor, tokenizer = make_llama(1, 32), make_llama(2), make_tokenizer()
    for model in (patient, doctor):
        model.config.max_position_embeddings = 8192
    trainer = TFPOTrainer(
        model=doctor,
        args=TFPOConfig(
            str(tmp_path),
            per_device_train_batch_size=1,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_length=None,
        ),
        train_dataset=annotate_token_rewards(
            Dataset.from_list(rows), patient, tokenizer, faces=FACES, max_length=max_length
        ),
        processing_class=tokenizer,
    )
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(math.isfinite(value) for entry in logged for value in entry.values())
    after = dict(trainer.model.named_parameters())
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not tensor.equal(before[name]) for name, tensor in after.items())
    return trainer.train_dataset


def test_completions_of_one_token(tmp_path):
    """One token has two states and one balance; any mean or variance over less is NaN."""
    rows = conversational_rows(2)
    rows[1]["prompt"][0]["content"] = "say"  # leaves room for the end, without which there is no boundary
    for row, word in zip(rows, ("soup", "good"), strict=True):
        row["chosen"][0]["content"] = word
    dataset = train(rows, tmp_path, max_length=7)
    assert [len(ids) for ids in dataset["chosen_ids"]] == [1, 2]
    assert len(dataset["rejected_ids"][0]) == 1


@pytest.mark.slow
def test_completions_of_4096_tokens(tmp_path):
    """Sums over thousands of tokens are where float32 ends."""
    rows = conversational_rows(1)
    rows[0]["chosen"][0]["content"] = " ".join(["good", "and", "kind"] * 1366)
    dataset = train(rows, tmp_path)
    assert len(dataset["chosen_ids"][0]) > 4096


@pytest.mark.parametrize("subtb_lambda", [0.0, 0.9, 0.999, 1.0])
def test_float32_is_enough_for_4096_tokens(subtb_lambda):
    """A loss whose digits are lost to cancellation trains on noise."""
    batch, losses, gradients = random_batch(torch.Generator().manual_seed(0), num_tokens=4096), [], []
    for dtype in (torch.float32, torch.float64):
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
        leaves = [tensors[name].requires_grad_() for name in ("doctor_logps", "log_values")]
        loss, _ = tfpo_objective(**tensors, subtb_lambda=subtb_lambda)
        losses.append(loss.double())
        gradients.append(torch.cat([x.double().flatten() for x in torch.autograd.grad(loss, leaves)]).nan_to_num())
    assert losses[0].isfinite() and torch.allclose(losses[0], losses[1], rtol=1e-3)
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


def test_without_rewards_a_doctor_stays_what_it_was():
    """Rewards of zero are no reason to move: with the whole reference, balance is the reference itself."""
    batch = random_batch(torch.Generator().manual_seed(1), num_tokens=7)
    batch |= dict(
        token_rewards=torch.zeros_like(batch["token_rewards"]), reference_logps=batch["doctor_logps"].clone()
    )
    batch["log_values"].zero_()
    batch["doctor_logps"].requires_grad_()
    loss, metrics = tfpo_objective(**batch, reference_weight=1.0, value_loss_weight=0.0)
    (gradient,) = torch.autograd.grad(loss, batch["doctor_logps"])
    assert metrics["loss/subtb"] < 1e-6 and gradient.abs().max() < 1e-3


# Gradients


def random_batch(draw: torch.Generator, num_tokens: int | None = None) -> dict[str, torch.Tensor]:
    """Pairs of any number, length and size of numbers; what the mask hides is not finite."""

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=draw))]

    num_rows, num_tokens = 2 * pick(1, 1, 2, 5), num_tokens or pick(1, 1, 2, 3, 17, 130)
    lengths = torch.randint(1, num_tokens + 1, (num_rows, 1), generator=draw)
    mask = torch.arange(num_tokens) < lengths  # (B, T)
    shape, scale = mask.shape, pick(1e-30, 1e-3, 1.0, 1.0, 30.0, 1e3)
    junk = pick(math.nan, math.inf, 0.0)
    state_mask = torch.arange(num_tokens + 1) <= lengths  # (B, S)
    rewards = pick(0.0, 1.0) * (2 * torch.rand(shape, generator=draw) - 1)
    return dict(
        doctor_logps=(-scale * torch.rand(shape, generator=draw)).masked_fill(~mask, junk),
        log_values=(scale * torch.randn(num_rows, num_tokens + 1, generator=draw)).masked_fill(~state_mask, junk),
        token_rewards=rewards.masked_fill(~mask, junk),
        reference_logps=(-scale * torch.rand(shape, generator=draw)).masked_fill(~mask, junk),
        completion_ids=torch.randint(4, shape, generator=draw),
        completion_mask=mask,
        is_complete=torch.rand(num_rows, generator=draw) < pick(0.0, 0.5, 1.0),
    )


def test_gradients_of_the_objective_are_finite(record_property):
    """One gradient that is not finite is the end of all weights at the next step."""
    draw, num_large = torch.Generator().manual_seed(0), 0
    for number in range(NUM_BATCHES):
        batch = random_batch(draw)
        leaves = [batch[name].requires_grad_() for name in ("doctor_logps", "log_values")]
        settings = dict(
            subtb_lambda=(0.0, 0.5, 0.999, 1.0)[number % 4],
            reference_weight=(0.0, 1.0)[number // 4 % 2],
            reward_temperature=(0.01, 0.125, 1.0)[number // 8 % 3],
        )
        loss, metrics = tfpo_objective(**batch, **settings)
        gradients = torch.autograd.grad(loss, leaves)
        assert loss.isfinite() and all(x.isfinite() for x in metrics.values()), (number, settings)
        assert all(x.isfinite().all() for x in gradients), (number, settings)
        assert (gradients[0][~batch["completion_mask"]] == 0).all(), (number, settings)
        num_large += loss > 1e4
    assert NUM_BATCHES / 20 < num_large < NUM_BATCHES / 2  # or the sizes do not vary
    record_property("random batches through the objective, gradients finite", NUM_BATCHES)


def test_gradients_of_guided_flow_are_finite(record_property):
    """The patient may rule tokens out; the doctor next to it must go on learning about the others."""
    draw = torch.Generator().manual_seed(0)
    for number in range(NUM_BATCHES):
        scale = (1e-3, 1.0, 30.0, 1e3)[number % 4]
        patient, doctor = (scale * torch.randn(5, 11, generator=draw) for _ in range(2))
        banned = torch.rand(patient.shape, generator=draw) < (0.0, 0.5, 0.95)[number % 3]
        banned.scatter_(1, torch.randint(11, (5, 1), generator=draw), False)
        patient = patient.masked_fill(banned, -math.inf)
        token = (~banned).float().multinomial(1, generator=draw)
        guided = guided_logps(patient_logits=patient, doctor_logits=[doctor.requires_grad_()], beta=[1.0])
        (gradient,) = torch.autograd.grad(guided.gather(1, token).square().sum(), doctor)
        assert gradient.isfinite().all() and (gradient[banned] == 0).all(), number
    record_property("random batches through guided flow, gradients finite", NUM_BATCHES)


def test_the_rounding_of_a_patient_in_halves_is_measured(monkeypatch, caplog, tmp_path):
    """Else nobody would know how many rewards are those of the dtype, and not of the data."""
    rows, tokenizer = Dataset.from_list(conversational_rows()), make_tokenizer()
    half = make_llama(1, 32).bfloat16()
    annotated = annotate_token_rewards(rows, half, tokenizer, faces=FACES)
    exact = annotate_token_rewards(rows, copy.deepcopy(half).float(), tokenizer, faces=FACES)
    assert "rounding" not in annotation_settings(exact)
    columns = [f"{name}_{kind}" for kind in ("gaps", "token_rewards") for name in ("chosen", "rejected")]
    gaps, rewards = (
        [torch.tensor([x for name in names for row in data[name] for x in row]) for data in (annotated, exact)]
        for names in (columns[:2], columns[2:])
    )
    rewarded = [x != 0 for x in rewards]
    found = annotation_settings(annotated)["rounding"]
    assert found["mean"] == pytest.approx((gaps[0] - gaps[1]).abs().mean().item(), abs=1e-4) and found["mean"] > 0
    share = (rewarded[0] ^ rewarded[1]).sum() / (rewarded[0] | rewarded[1]).sum()
    assert found["flipped"] == pytest.approx(share.item(), abs=0.02)
    assert reward_report(annotated, tokenizer, tmp_path)["rounding"] == found
    assert "the mean error of its gaps is" in (tmp_path / "rewards.html").read_text(encoding="utf-8")
    monkeypatch.setattr("trl_tfpo.annotation.token_rewards.MAX_FLIPPED", -1.0)
    annotate_token_rewards(rows, half, tokenizer, faces=FACES)
    assert "Load the patient in float32" in caplog.text


def test_scores_in_halves_are_nearer_to_float32_than_logits_in_halves():
    """A logit of 20 in bfloat16 is off by up to 0.06 nats, as much as many a gap."""
    half = make_llama(1, 64).bfloat16()
    half.lm_head.weight.data.mul_(10)
    exact = copy.deepcopy(half).float()
    prompt, completion = [3, 4, 5], [*range(3, 22), *range(3, 22)]
    ids = torch.tensor([prompt + completion])
    found, expected = (score_completions(model, [prompt], [completion], batch_size=1)[0] for model in (half, exact))
    with torch.no_grad():
        logps = half(ids).logits[0, 2:-1].float().log_softmax(dim=-1)
    rounded = logps.gather(1, ids[0, 3:, None])[:, 0]
    assert (found - expected).abs().mean() < 0.9 * (rounded - expected).abs().mean()
    assert half.dtype == torch.bfloat16 and not half.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("has_bfloat16, expected", [(False, torch.float32), (True, torch.bfloat16)])
def test_a_named_model_has_a_dtype_that_the_cpu_computes_in(monkeypatch, tmp_path, has_bfloat16, expected):
    """Else a patient in bfloat16 would be read at a sixth of the speed, and rounded, on most CPUs."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": has_bfloat16, "avx2": True})
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    make_llama(1).bfloat16().save_pretrained(tmp_path)
    model = NamedModel(str(tmp_path), dtype="auto")
    assert model.dtype == expected  # told before it is loaded
    assert model.loaded.dtype == expected
    assert NamedModel(str(tmp_path), dtype="bfloat16").loaded.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_verb_loads_models_in_the_dtype_that_is_asked_for(tmp_path, dtype):
    """Else the only way to a patient in float32 would be to convert its files."""
    save_model(tmp_path / "model", make_llama(1))
    path = str(tmp_path / "model")
    patient, _, doctors = load_models(path, [f"kind={path}"], in_4bit=False, trust_remote_code=False, dtype=dtype)
    assert patient.dtype == doctors["kind"].dtype == getattr(torch, dtype)
    with pytest.raises(ValueError, match="The data type must be one of"):
        load_models(path, [], in_4bit=False, trust_remote_code=False, dtype="fp8")

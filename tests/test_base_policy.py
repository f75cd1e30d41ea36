# SPDX-License-Identifier: Apache-2.0

"""Guided flow: what is trained is what will be decoded, and it starts at the patient."""

import pytest
import torch
from conftest import FACES, make_llama
from peft import LoraConfig
from trainers import config, losses, make_trainer
from transformers import AutoModelForCausalLM

from trl_tfpo import DoctorGuidedLogitsProcessor, TFPOTrainer, annotate_token_rewards, load_doctor
from trl_tfpo.models.doctor import add_value_head, make_doctor
from trl_tfpo.models.initial_head import start_at_zero
from trl_tfpo.models.trained_exponents import save_exponents
from trl_tfpo.training.base_policy import read_base_policy


LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
BATCH = {
    "input_ids": torch.tensor([[1, 5, 6, 7, 8, 2], [4, 9, 2, 0, 0, 0], [1, 4, 5, 6, 8, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]),
    "completion_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]).bool(),
}


def plain_logits(model):
    return model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits[:, :-1]


def tokens_of(output):
    return output.doctor_logps[output.completion_mask]  # (N,), row by row


@pytest.mark.parametrize("scale", [{}, {"logit_scale": 2.0}], ids=["fused", "of logits"])
@pytest.mark.parametrize("patient_vocab", [22, 30, 20], ids=["same", "padded patient", "padded doctor"])
def test_log_probabilities_and_gradients_are_those_of_the_product(patient_vocab, scale):
    """The normalizer, a sum over the vocabulary, has a gradient to the doctor."""
    size = min(22, patient_vocab)
    doctor, twin, patient = make_llama(3), make_llama(3), make_llama(1, vocab_size=patient_vocab, hidden_size=24)
    vars(patient.config).update(scale)  # one that Llama does not look at, but others do: then the logits are asked
    add_value_head(doctor)
    guided, reference_logps = read_base_policy(patient, **BATCH)
    found = tokens_of(doctor(**BATCH, base_logits=guided))
    found.square().sum().backward()

    patient_logps = plain_logits(patient).log_softmax(-1).detach()
    guided = (patient_logps[..., :size] + plain_logits(twin).log_softmax(-1)[..., :size]).log_softmax(-1)
    is_token, ids = BATCH["completion_mask"][:, 1:], BATCH["input_ids"][:, 1:, None]
    expected = guided.gather(2, ids)[..., 0][is_token]
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, other in twin.named_parameters():
        torch.testing.assert_close(doctor.get_parameter(name).grad, other.grad, atol=1e-4, rtol=1e-4)
    wanted = patient_logps.gather(2, ids)[..., 0][is_token].split(BATCH["completion_mask"].sum(1).tolist())
    for row, one in zip(reference_logps, wanted, strict=True):
        torch.testing.assert_close(row[: len(one)], one)
        assert not row[len(one) :].any()
    assert patient.training is False and not any(p.grad is not None for p in patient.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_training_starts_at_the_patient(tied, tmp_path):
    """A start elsewhere is a distance from the patient that the rewards never asked for."""
    doctor = make_llama(3)
    doctor.config.tie_word_embeddings = tied
    doctor.tie_weights()
    embeddings = doctor.get_input_embeddings().weight.detach().clone()
    start_at_zero(doctor)
    assert not plain_logits(doctor).any()
    assert doctor.get_input_embeddings().weight.equal(embeddings) and embeddings.any()
    patient = make_llama(1)
    guide = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=1.0)
    ids = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(guide(ids, patient(ids).logits[:, -1]), patient(ids).logits[:, -1].log_softmax(-1))

    torch.nn.init.normal_(doctor.lm_head.weight)
    start_at_zero(doctor)  # it has been trained
    assert plain_logits(doctor).any()
    doctor.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain_logits(again), plain_logits(doctor))
    assert again.get_input_embeddings().weight.equal(embeddings)


@pytest.mark.parametrize("policy", ["ratio", "guided"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
class TestTraining:
    @pytest.fixture
    def annotated(self, preferences, patient, tokenizer):
        return annotate_token_rewards(preferences, patient, tokenizer, faces=FACES)

    @pytest.fixture
    def run(self, annotated, patient, tokenizer, tmp_path, peft_config, policy):
        make_llama(2).save_pretrained(tmp_path / "base")

        def run(name, resume_from_checkpoint=None, **settings):
            trainer = TFPOTrainer(
                model=str(tmp_path / "base"),
                patient_model=patient if policy == "guided" else None,
                args=config(tmp_path / name, policy=policy, **settings),
                train_dataset=annotated,
                processing_class=tokenizer,
                peft_config=peft_config,
            )
            trainer.train(resume_from_checkpoint=resume_from_checkpoint)
            trainer.save_model()
            return trainer

        return run

    @pytest.mark.slow
    def test_what_is_decoded_is_what_was_trained(self, run, patient, policy):
        """The strength at which a doctor was trained is saved with it, and decoding uses it."""
        trainer = run("run", max_steps=8, per_device_train_batch_size=8)
        assert losses(trainer)[-1] < losses(trainer)[0]
        before = patient if policy == "guided" else make_llama(2)
        for name, parameter in before.named_parameters():  # what is guided in training stays as it was
            assert parameter.equal(trainer.base_policy.get_parameter(name))
        batch = {name: tensor for name, tensor in next(iter(trainer.get_train_dataloader())).items() if name in BATCH}
        trainer.model.eval()
        output = trainer.model(**batch, base_logits=read_base_policy(patient, **batch)[0])
        guide = DoctorGuidedLogitsProcessor.from_pretrained(trainer.args.output_dir)
        assert (guide.alpha, guide.betas) == (1.0, [1.0])
        for row, ids in enumerate(batch["input_ids"]):
            start = int(batch["completion_mask"][row].int().argmax())
            for t in range(int(output.completion_mask[row].sum())):
                prefix = ids[None, : start + t]
                guide.reset(attention_mask=torch.ones_like(prefix))
                decoded = guide(prefix, patient(prefix).logits[:, -1])[0, ids[start + t]]
                torch.testing.assert_close(output.doctor_logps[row, t], decoded, atol=1e-4, rtol=1e-4)

    @pytest.mark.slow
    def test_accumulation_and_resumption_change_nothing(self, run, policy):
        """The patient's part of the policy must be there in every part of a step, and after every restart."""
        whole = run("whole", save_strategy="steps", save_steps=2)
        split = run("split", per_device_train_batch_size=1, gradient_accumulation_steps=4)
        assert losses(split) == pytest.approx(losses(whole), rel=1e-4)
        checkpoint = whole.args.output_dir + "/checkpoint-2"
        resumed = run("whole", resume_from_checkpoint=checkpoint, save_strategy="no")
        assert losses(resumed)[-2:] == losses(whole)[-2:]

    def test_a_trained_doctor_goes_on(self, run, annotated, patient, tokenizer, tmp_path, policy):
        """Were its head set to zero again, a second dataset would wipe out the first."""
        first = run("first", max_steps=1)
        doctor = load_doctor(first.args.output_dir)
        before = plain_logits(doctor)
        settings = dict(args=config(tmp_path / "second", policy="guided", max_steps=1), processing_class=tokenizer)
        TFPOTrainer(model=doctor, patient_model=patient, train_dataset=annotated, **settings)
        assert before.any()
        torch.testing.assert_close(plain_logits(doctor), before)


def test_a_mixture_and_a_product_stand_side_by_side(tmp_path):
    """Two doctors that were trained in two ways each need their share, and only one takes it from the patient."""
    make_doctor(make_llama(2), guides=True).save_pretrained(tmp_path / "guided")
    make_llama(3).save_pretrained(tmp_path / "alone")
    save_exponents(make_doctor(make_llama(2), guides=True), tmp_path / "guided")
    names = [tmp_path / "guided", tmp_path / "alone"]
    guide = DoctorGuidedLogitsProcessor.from_pretrained(names)
    assert (guide.alpha, guide.betas) == (0.5, [1.0, 0.5])
    guide = DoctorGuidedLogitsProcessor.from_pretrained(names, beta=[0.7, 0.2])
    assert (guide.alpha, guide.betas) == (0.8, [0.7, 0.2])
    doctor = AutoModelForCausalLM.from_pretrained(names[0])
    assert DoctorGuidedLogitsProcessor(doctor, beta=0.3).alpha == 1.0  # however it was loaded
    guide = DoctorGuidedLogitsProcessor.from_pretrained(names[1], alpha=1.0, beta=0.3, min_patient_prob=0.1)
    assert (guide.alpha, guide.betas, guide.min_patient_prob) == (1.0, [0.3], 0.1)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_ratio_starts_at_the_doctor_before_training(preferences, patient, tokenizer, tmp_path, by_name):
    """A start elsewhere, or a reference that moves along, is another policy than the one that the rewards ask for."""
    annotated = annotate_token_rewards(preferences, patient, tokenizer, faces=FACES)
    make_llama(2).save_pretrained(tmp_path / "base")
    settings = dict(args=config(tmp_path / "run", policy="ratio"), train_dataset=annotated, processing_class=tokenizer)
    trainer = TFPOTrainer(model=str(tmp_path / "base") if by_name else make_llama(2), **settings)
    batch = {name: tensor for name, tensor in next(iter(trainer.get_train_dataloader())).items() if name in BATCH}
    guided, reference_logps = read_base_policy(trainer.base_policy, **batch)
    output = trainer.model(**batch, base_logits=guided)
    mask = output.completion_mask
    torch.testing.assert_close(output.doctor_logps[mask], reference_logps[mask], atol=1e-5, rtol=1e-5)
    expected = make_llama(2)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = expected.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    expected = expected[batch["completion_mask"][:, 1:]]
    torch.testing.assert_close(reference_logps[mask], expected, atol=1e-5, rtol=1e-5)
    trainer.train()
    again, _ = read_base_policy(trainer.base_policy, **batch)
    torch.testing.assert_close(again[0].dense(), guided[0].dense())
    trainer.save_model(tmp_path / "trained")
    with pytest.raises(ValueError, match="Got a doctor of guided flow"):
        TFPOTrainer(model=str(tmp_path / "trained") if by_name else trainer.model, **settings)


def test_the_patient_is_needed_to_the_end(preferences, patient, tokenizer, tmp_path):
    """Found out at the first step, it would be found out after hours of annotation."""
    annotated = annotate_token_rewards(preferences, patient, tokenizer, faces=FACES)
    with pytest.raises(ValueError, match="policy='guided'"):
        make_trainer(annotated, tmp_path, policy="guided")
    with pytest.raises(ValueError, match="not trained by guided flow"):
        make_doctor(make_doctor(make_llama(2), LORA), guides=True)

# SPDX-License-Identifier: Apache-2.0

"""Every engine in real processes: the same global batch gives the same doctor, as one process, saved and resumed."""

import json

import engine_run
import pytest
import torch
from conftest import conversational_rows, make_llama, make_tokenizer, save_model, write_rows
from datasets import Dataset
from peft import LoraConfig
from processes import launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_tfpo import DoctorGuidedLogitsProcessor, TFPOConfig, TFPOTrainer, annotate_token_rewards, load_doctor
from trl_tfpo.models.doctor import VALUE_HEAD
from trl_tfpo.models.saved_doctor import VALUE_HEAD_FILE


pytest.importorskip("deepspeed")
pytest.importorskip("bitsandbytes")

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
JOBS = ["full-undivided", "full", "full-resumed", "lora", "lora-resumed"]
GUIDED = ["ratio", "guided", "guided-resumed"]
WEIGHTS = dict(
    full="model.safetensors", guided="model.safetensors", ratio="model.safetensors", lora="adapter_model.safetensors"
)

pytestmark = pytest.mark.slow


def make_folder(folder, doctor_size=16, patient_size=32):
    """Preferences, a patient and a doctor, as files."""
    write_rows(folder / "preferences.jsonl", conversational_rows(24))
    save_model(folder / "patient", make_llama(1, patient_size))
    save_model(folder / "doctor", make_llama(2, doctor_size))
    return folder


def run_jobs(engine, folder, output, *jobs, mixed_precision="no"):
    """Run jobs in two processes of an engine."""
    launch(engine, mixed_precision, output, engine_run.run_as_rank, folder, output, *jobs)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The models and the data, and what one process makes of them."""
    folder = make_folder(tmp_path_factory.mktemp("engines"))
    for job in WEIGHTS:
        engine_run.run(folder, folder / "one", job)
    return folder


def report(folder, job):
    return json.loads((folder / f"{job}.json").read_text(encoding="utf-8"))


def steps(folder, job):
    return [entry for entry in report(folder, job)["history"] if "loss" in entry]


@pytest.mark.parametrize(
    ("engine", "jobs"),
    [
        ("ddp", JOBS + GUIDED),
        ("zero1", JOBS),
        ("zero2", JOBS),
        ("zero3", JOBS + GUIDED),
        ("fsdp2", JOBS + GUIDED),
    ],
)
def test_engine_equals_one_process(one_process, tmp_path, engine, jobs):
    """
    A loss that is averaged in another way trains at another learning rate on other hardware, a shard that is lost on
    save or resume costs the whole run, and a reference or a reward read from a shard is noise: all without a word.
    """
    run_jobs(engine, one_process, tmp_path, *jobs)
    for job in jobs:
        method = job.split("-")[0]
        seen = report(tmp_path, job)
        assert seen["engine"] == {"d": "MULTI_CPU", "z": "DEEPSPEED", "f": "FSDP"}[engine[0]]
        assert seen["is_sharded"] == (engine in ("zero3", "fsdp2"))
        assert seen["guided_is_sharded"] == (seen["is_sharded"] and method in ("ratio", "guided"))

        found, expected = steps(tmp_path, job), steps(one_process / "one", method)
        assert len(found) == len(expected) == 3
        for name in ("loss", "grad_norm", "loss/subtb", "loss/value"):
            assert [entry[name] for entry in found] == pytest.approx([entry[name] for entry in expected], rel=1e-5)
        for name in ("rewards/chosen", "rewards/margins"):
            assert [entry[name] for entry in found] == pytest.approx([entry[name] for entry in expected], abs=1e-4)
        assert seen["evaluated"] == pytest.approx(report(one_process / "one", method)["evaluated"], rel=1e-5)

        weights = load_file(tmp_path / job / WEIGHTS[method])
        targets = load_file(one_process / "one" / method / WEIGHTS[method])
        assert weights.keys() == targets.keys()
        for name, target in targets.items():
            torch.testing.assert_close(weights[name], target, rtol=1e-5, atol=1e-6, msg=name)

    for job in (jobs[-1], "full"):
        assert_usable(tmp_path / job, make_llama(1, 32))


def assert_usable(path, patient, **kwargs):
    """A saved doctor has the value head that was trained, and guides: as a doctor, and as an ordinary model."""
    doctor = load_doctor(path, **kwargs)
    head = value_head(doctor)
    assert head.equal(saved_value_head(path)) and head.dtype == torch.float32 and head.abs().sum() > 0
    for model in (doctor, AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()):
        assert not torch.allclose(next_logps(patient, model), next_logps(patient), atol=1e-3)


def value_head(doctor):
    """The weight of the value head, which is that of the adapter where there is one."""
    names = (f"{VALUE_HEAD}.weight", f"{VALUE_HEAD}.modules_to_save.default.weight")
    (weight,) = [tensor for name, tensor in doctor.named_parameters() if name.endswith(names)]
    return weight


def saved_value_head(path):
    """The same in a file: that of the adapter, or else one of its own."""
    file = path / WEIGHTS["lora"]
    tensors = load_file(file if file.exists() else path / VALUE_HEAD_FILE)
    (weight,) = [
        tensor for name, tensor in tensors.items() if name == "weight" or name.endswith(f"{VALUE_HEAD}.weight")
    ]
    return weight


def next_logps(patient, doctor=None):
    """The log-probabilities of the next token, with or without a doctor's guidance."""
    inputs = {"input_ids": torch.tensor([[1, 5, 11, 17]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    guides = [DoctorGuidedLogitsProcessor(doctor, beta=0.5, attention_mask=inputs["attention_mask"])] if doctor else []
    settings = dict(max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True)
    return patient.generate(**inputs, **settings, logits_processor=guides).scores[0].log_softmax(-1)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_flows_stay_float32_in_bfloat16_training(one_process, tmp_path, engine):
    """bfloat16 has three digits: a log-probability of -70 is off by a quarter of a nat, and so is the balance."""
    run_jobs(engine, one_process, tmp_path, "full", mixed_precision="bf16")
    seen = report(tmp_path, "full")["seen"]
    assert seen.keys() == {"doctor_logps", "log_values", "token_rewards", "reference_logps"}
    for name, tensor in seen.items():
        assert tensor == {"dtype": "torch.float32", "is_rounded": False}, name
    expected = steps(one_process / "one", "full")
    assert steps(tmp_path, "full")[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.1)


def test_quantized_patient_and_doctor(tmp_path):
    """A 4-bit doctor must learn the same whether or not it has been read before, for its reference, and go on so."""
    folder = make_folder(tmp_path, doctor_size=64, patient_size=128)  # a block of 4-bit weights has 64
    patient = AutoModelForCausalLM.from_pretrained(folder / "patient", quantization_config=NF4)
    annotated = annotate_token_rewards(
        Dataset.from_list(conversational_rows(8)), patient, make_tokenizer(), faces=engine_run.FACES
    )

    def train(dataset, resume_from_checkpoint=None):
        trainer = TFPOTrainer(
            model=str(folder / "doctor"),
            args=TFPOConfig(
                str(folder / "run"),
                max_steps=4,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="steps",
                save_steps=2,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=dataset,
            quantization_config=NF4,
            peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        trainer.save_model()
        return trainer

    whole = train(annotated)
    before = load_file(folder / "run" / "adapter_model.safetensors")
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trained = {name: tensor for name, tensor in before.items() if name.endswith("lora_B.weight")}
    assert len(trained) == 14 and all(tensor.abs().sum() > 0 for tensor in trained.values())

    resumed = train(whole.train_dataset, str(folder / "run" / "checkpoint-2"))  # the reference is in the dataset
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses
    for name, tensor in load_file(folder / "run" / "adapter_model.safetensors").items():
        assert tensor.equal(before[name]), name
    assert_usable(folder / "run", patient, quantization_config=NF4)

# SPDX-License-Identifier: Apache-2.0

"""However a doctor is loaded it is decoded as it was trained, or refused; and which adapters can be read at all."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import FACES, conversational_rows, make_llama, make_tokenizer
from datasets import Dataset
from peft import (
    AdaptionPromptConfig,
    AutoPeftModelForCausalLM,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from trainers import config, make_trainer
from transformers import AutoModelForCausalLM

from trl_tfpo import (
    Doctor,
    DoctorGuidedLogitsProcessor,
    TFPOTrainer,
    annotate_token_rewards,
    guided_generate,
    load_doctor,
)
from trl_tfpo.annotation.scoring import score_completions
from trl_tfpo.evaluation import Completion, evaluate_guidance, next_token_statistics
from trl_tfpo.models.doctor import make_doctor
from trl_tfpo.models.initial_head import start_at_zero
from trl_tfpo.models.saved_doctor import VALUE_HEAD_FILE
from trl_tfpo.models.trained_exponents import RECORD, TRAINING_EXPONENTS, center_head, trained_exponents
from trl_tfpo.server import Engine


LORA = LoraConfig(r=2, target_modules="all-linear")
IDS = torch.tensor([[1, 5, 11, 17]])
PROMPT = dict(input_ids=IDS, max_new_tokens=2, do_sample=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a base whose head is tied, two doctors as adapters, `ratio` and `doctor`, and a full `whole`."""
    folder = tmp_path_factory.mktemp("doctors")
    base = make_llama(2)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(folder / "base")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    rows = annotate_token_rewards(Dataset.from_list(conversational_rows()), make_llama(1, 32), tokenizer, faces=FACES)
    for name, policy, peft_config in (("ratio", "ratio", LORA), ("doctor", "doctor", LORA), ("whole", "ratio", None)):
        trainer = TFPOTrainer(
            model=str(folder / "base"),
            args=config(folder / name, policy=policy, max_steps=2, save_strategy="steps", save_steps=1),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train()
        trainer.save_model()
    return folder


@pytest.fixture
def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def guided_logps(doctor, **settings):
    patient = make_llama(1, 32)
    guide = DoctorGuidedLogitsProcessor(doctor, **{"beta": 0.5, **settings})
    return guide(IDS, patient(IDS).logits[:, -1])


def on_transformers_model(base, path):
    base.load_adapter(path, "helpful")
    return base


def moved(base, path, tmp_path):
    shutil.copytree(path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("guidance.json", "checkpoint-*"))
    return PeftModel.from_pretrained(base, tmp_path / "elsewhere")


def saved_again(base, path, tmp_path):
    PeftModel.from_pretrained(base, path, adapter_name="other").save_pretrained(tmp_path)
    return load_doctor(tmp_path / "other", with_value_head=False)


def second(base, path, other):
    model = PeftModel.from_pretrained(base, other, adapter_name="first")
    model.load_adapter(path, "second")
    return Doctor(model.eval(), adapter="second")


WAYS = {
    "PeftModel": lambda base, path, other, tmp_path: PeftModel.from_pretrained(base, path),
    "under another name": lambda base, path, other, tmp_path: PeftModel.from_pretrained(base, path, adapter_name="x"),
    "AutoPeftModel": lambda base, path, other, tmp_path: AutoPeftModelForCausalLM.from_pretrained(path),
    "AutoModel": lambda base, path, other, tmp_path: AutoModelForCausalLM.from_pretrained(path),
    "load_adapter": lambda base, path, other, tmp_path: on_transformers_model(base, path),
    "second adapter": lambda base, path, other, tmp_path: second(base, path, other),
    "moved": lambda base, path, other, tmp_path: moved(base, path, tmp_path),
    "saved again": lambda base, path, other, tmp_path: saved_again(base, path, tmp_path),
    "merged": lambda base, path, other, tmp_path: load_doctor(path, with_value_head=False).merge_and_unload(),
}


@pytest.mark.parametrize("name, alpha", [("ratio", 1.0), ("doctor", 0.5)])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_doctor_is_decoded_as_it_was_trained(folder, base, tmp_path, way, name, alpha):
    """A ratio that is mixed in as a language model gives less reward at twenty times the distance, without a word."""
    path, other = str(folder / name), str(folder / {"ratio": "doctor", "doctor": "ratio"}[name])
    wanted = guided_logps(load_doctor(path, with_value_head=False), alpha=alpha)
    doctor = way(base, path, other, tmp_path)
    doctor = doctor if isinstance(doctor, Doctor) else doctor.eval()
    assert DoctorGuidedLogitsProcessor(doctor, beta=0.5).alpha == alpha
    torch.testing.assert_close(guided_logps(doctor), wanted, atol=1e-5, rtol=1e-5)


def test_a_merged_doctor_stays_what_it_is_when_it_is_saved(folder, tmp_path):
    """Merged and published, it is a plain model of which nobody remembers the adapter."""
    load_doctor(folder / "ratio", with_value_head=False).merge_and_unload().save_pretrained(tmp_path)
    guide = DoctorGuidedLogitsProcessor.from_pretrained(tmp_path)
    assert (guide.alpha, guide.betas) == (1.0, [1.0])
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.guidance == TRAINING_EXPONENTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ratio", "ratio/checkpoint-1", "whole"])
def test_a_ratio_without_a_record_is_refused(folder, base, name, dtype):
    """PEFT forgets an adapter that it merges: only the weights can still say that they are no language model."""
    if name == "whole":
        doctor = AutoModelForCausalLM.from_pretrained(folder / name)
        del doctor.config.guidance
    else:
        doctor = PeftModel.from_pretrained(base, folder / name).merge_and_unload()
    doctor = doctor.eval().to(dtype)
    with pytest.raises(ValueError, match="add up to zero.*Set `model.config.guidance"):
        guided_logps(doctor)
    wanted = guided_logps(doctor, alpha=1.0)  # who gives the exponents need not be asked for them
    doctor.config.guidance = TRAINING_EXPONENTS
    assert guided_logps(doctor).equal(wanted)


def test_a_centred_head_says_the_same(folder):
    """The mark in the weights must cost nothing."""
    torch.manual_seed(0)
    doctor = make_llama(3, vocab_size=64)
    start_at_zero(doctor)
    torch.nn.init.normal_(doctor.lm_head.weight, mean=1.0)
    before = doctor(IDS).logits.log_softmax(-1)
    center_head(doctor)
    assert doctor.lm_head.weight.sum(dim=0).abs().max() < 1e-4
    torch.testing.assert_close(doctor(IDS).logits.log_softmax(-1), before, atol=1e-5, rtol=1e-5)
    plain = make_llama(3, vocab_size=64)
    weight = plain.lm_head.weight.clone()
    center_head(plain)  # no ratio
    assert plain.lm_head.weight.equal(weight) and trained_exponents(plain) == {}


def test_adapters_from_before_there_was_a_record(folder, base, tmp_path):
    """They are published. `load_doctor` finds their exponents next to them; PEFT alone cannot."""
    for name in ("ratio", "doctor"):
        shutil.copytree(folder / name, tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": None}))
    doctor = load_doctor(tmp_path / "ratio", with_value_head=False)
    assert guided_logps(doctor).equal(guided_logps(load_doctor(folder / "ratio", with_value_head=False)))
    doctor.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="Got no record, and the trained modules \\['lm_head'\\]; load it with"):
        guided_logps(PeftModel.from_pretrained(base, tmp_path / "ratio").eval())
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert DoctorGuidedLogitsProcessor(PeftModel.from_pretrained(base, tmp_path / "again").eval()).alpha == 1.0
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert DoctorGuidedLogitsProcessor(PeftModel.from_pretrained(base, tmp_path / "doctor").eval()).alpha == 0.5


def test_an_adapter_without_its_head_is_refused(folder, base):
    """On the language model's own head the changes of a ratio's layers mean nothing."""
    model = PeftModel.from_pretrained(base, folder / "ratio").eval()
    base.lm_head = base.lm_head.original_module
    with pytest.raises(ValueError, match="must be complete. Got no \\['lm_head'\\]"):
        guided_logps(model)


def test_a_later_record_is_refused(folder, base):
    """Another meaning of the exponents cannot be guessed."""
    model = PeftModel.from_pretrained(base, folder / "ratio").eval()
    model.peft_config["default"].auto_mapping[RECORD]["format"] = 2
    with pytest.raises(ValueError, match="must have format 1. Got format 2"):
        guided_logps(model)


def test_adapters_on_one_model_keep_their_own_exponents(folder, base):
    """The exponents belong to the adapter, not to the model that carries two of them, or to a stranger's adapter."""
    model = PeftModel.from_pretrained(base, folder / "ratio", adapter_name="ratio")
    model.load_adapter(folder / "doctor", "doctor")
    model.add_adapter("stranger", LoraConfig(r=2, target_modules=["q_proj"]))
    model.eval()
    doctors = {name: Doctor(model, adapter=name) for name in ("ratio", "doctor", "stranger", "__base__")}
    assert [doctor.exponents for doctor in doctors.values()] == [TRAINING_EXPONENTS, {}, {}, {}]
    guide = DoctorGuidedLogitsProcessor([doctors["ratio"], doctors["doctor"]], beta=[0.5, 0.25])
    assert guide.alpha == 0.75
    with pytest.raises(ValueError, match="`reference` is for doctors that are language models"):
        DoctorGuidedLogitsProcessor(doctors["ratio"], reference=doctors["__base__"])
    loaded = load_doctor(folder / "ratio", with_value_head=False)
    assert Doctor(loaded).exponents == TRAINING_EXPONENTS and Doctor(loaded, adapter="__base__").exponents == {}


def test_a_ratio_is_no_patient(folder, base):
    """The adapter that PEFT left on when another guides would speak in the patient's place."""
    model = PeftModel.from_pretrained(base, folder / "ratio", adapter_name="ratio")
    model.load_adapter(folder / "doctor", "doctor")
    model.eval()
    guide = DoctorGuidedLogitsProcessor(Doctor(model, adapter="doctor"), beta=0.5)
    rows, tokenizer = Dataset.from_list(conversational_rows()), make_tokenizer()
    whole = AutoModelForCausalLM.from_pretrained(folder / "whole")
    for attempt in (
        lambda: guided_generate(model, guide, **PROMPT),
        lambda: evaluate_guidance(model, tokenizer, ["say"], lambda **_: [0.0], guide=guide),
        lambda: annotate_token_rewards(rows, whole, tokenizer, faces=FACES),
        lambda: annotate_token_rewards(rows, str(folder / "whole"), tokenizer, faces=FACES),
        lambda: score_completions(whole, [[1, 5]], [[6]], batch_size=1),
        lambda: Engine(whole, tokenizer, {}),
    ):
        with pytest.raises(ValueError, match="patient must be a language model. Got a doctor of guided flow"):
            attempt()
    with pytest.raises(ValueError, match="A policy must be a language model, or a guide"):
        next_token_statistics(make_llama(1, 32), whole, [Completion("", [1, 5], [6], "", False)])
    guide = DoctorGuidedLogitsProcessor([Doctor(model, adapter="ratio"), Doctor(model, adapter="doctor")], beta=0.4)
    assert guided_generate(model, guide, **PROMPT).shape == (
        1,
        6,
    )  # both are doctors, and off when the patient is read


def test_what_a_doctor_is_does_not_change_in_training(folder, base):
    """Trained on as a policy of its own, a ratio would be saved, and decoded, as the ratio that it no longer is."""
    ratio = PeftModel.from_pretrained(base, folder / "ratio")
    with pytest.raises(ValueError, match="With `policy='doctor'` the doctor must be a language model"):
        make_doctor(ratio)
    with pytest.raises(ValueError, match="must be a `PeftModel`"):
        make_doctor(AutoModelForCausalLM.from_pretrained(folder / "ratio"), guides=True)
    head = ratio.lm_head.modules_to_save["default"].weight.clone()
    doctor = make_doctor(ratio, guides=True)
    assert doctor.lm_head.modules_to_save["default"].weight.equal(head) and head.any()
    trained = {name.split(".")[-3] for name, parameter in doctor.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B", "modules_to_save"}  # also of an adapter that was loaded frozen


def test_an_adapter_of_its_own_name_is_found(folder, tmp_path):
    """PEFT saves it in a folder below the one that the trainer was given."""
    shutil.copytree(folder / "doctor", tmp_path / "helpful")
    shutil.copytree(folder / "doctor", tmp_path / "checkpoint-1")
    assert trained_exponents(load_doctor(tmp_path)) == {}
    shutil.copytree(folder / "ratio", tmp_path / "harmless")
    with pytest.raises(ValueError, match="one adapter. Got .*'harmless', 'helpful'"):
        load_doctor(tmp_path)


def test_what_is_frozen_stays_frozen(folder, base):
    """Whoever trains one half of the adapter, as LoRA-FA does, must not train the other without a word."""
    model = PeftModel.from_pretrained(base, folder / "doctor", is_trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    trained = {name for name, parameter in make_doctor(model).named_parameters() if parameter.requires_grad}
    assert any("lora_B" in name for name in trained) and not any("lora_A" in name for name in trained)


def test_a_head_of_zeros_is_no_ratio():
    """Some models start with one; it adds up to zero without meaning anything."""
    model = make_llama(2)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert trained_exponents(model) == {}
    model.config.guidance = {"scale": 3}  # somebody else's
    assert trained_exponents(model) == {}


def test_the_head_is_looked_at_once(folder, base, monkeypatch):
    """The check of a head is cached, as a head may have a billion weights; changed weights are checked again."""
    model, calls = make_llama(3), []
    norm = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *args, **kwargs: calls.append(1) or norm(*args, **kwargs))
    assert trained_exponents(model) == {}
    num_calls = len(calls)
    assert trained_exponents(model) == {} and len(calls) == num_calls > 0
    with torch.no_grad():
        model.lm_head.weight -= model.lm_head.weight.mean(dim=0)
    with pytest.raises(ValueError, match="must record the exponents"):
        trained_exponents(model)


@pytest.mark.parametrize("name", ["ratio", "doctor", "whole"])
def test_the_card_is_ours(folder, name):
    """PEFT's empty template says nothing of how a doctor is used, and overwrites what does."""
    for path in (folder / name, folder / name / "checkpoint-2"):
        card = (path / "README.md").read_text(encoding="utf-8")
        assert "## How it guides" in card and "[More Information Needed]" not in card
        assert ("library_name: peft" in card) == (name != "whole")
        assert ("(product)" in card) == (name != "doctor")


@pytest.mark.parametrize("name", ["ratio", "doctor", "whole"])
def test_loading_is_silent(folder, name, capfd):
    """A table of unexpected weights and a warning at each start teach users to ignore both."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_doctor(folder / name)
        load_doctor(folder / name, with_value_head=False)
    if name == "whole":
        _, found = AutoModelForCausalLM.from_pretrained(folder / name, output_loading_info=True)
        assert not found["unexpected_keys"] and not found["missing_keys"]
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


def test_the_value_head_of_a_full_model_has_its_own_file(folder, tmp_path):
    """It is what training goes on from; a stale one would do so without a word."""
    doctor = load_doctor(folder / "whole")
    assert (folder / "whole" / VALUE_HEAD_FILE).is_file() and doctor.value_head.weight.any()
    shutil.copytree(folder / "whole", tmp_path / "again")
    torch.nn.init.ones_(doctor.value_head.weight)
    doctor.save_pretrained(tmp_path / "again")  # by transformers, among the other weights
    assert load_doctor(tmp_path / "again").value_head.weight.eq(1).all()


def test_the_best_model_comes_with_its_value_head(folder, tmp_path):
    """A policy with the flows of another step is out of balance, and trains on from there."""
    rows = Dataset.from_list(conversational_rows())
    tokenizer = make_tokenizer()
    rows = annotate_token_rewards(rows, make_llama(1, 32), tokenizer, faces=FACES)
    trainer = make_trainer(
        rows,
        tmp_path,
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_values/start",
    )
    trainer.state.best_metric = None
    trainer.train()
    best = load_doctor(trainer.state.best_model_checkpoint)
    assert trainer.model.value_head.weight.equal(best.value_head.weight)
    steps = [load_doctor(path).value_head.weight for path in sorted(Path(tmp_path).glob("checkpoint-*"))]
    assert not steps[0].equal(steps[-1])


REFUSED = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
    "adaption prompt": AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1, target_modules="self_attn"
    ),
    "activated LoRA": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5]),
}


@pytest.mark.parametrize("peft_config", REFUSED.values(), ids=REFUSED)
def test_adapters_that_are_not_of_the_weights_are_refused(peft_config):
    """Their tokens shift every position, and with a cache or per token they are not what was trained."""
    model, tokenizer = get_peft_model(make_llama(1, 32), peft_config).eval(), make_tokenizer()
    rows = Dataset.from_list(conversational_rows())
    guide = DoctorGuidedLogitsProcessor(make_llama(2), beta=0.5)
    annotated = annotate_token_rewards(rows, make_llama(1, 32), tokenizer, faces=FACES)
    for attempt in (
        lambda: DoctorGuidedLogitsProcessor(model),
        lambda: make_doctor(model),
        lambda: make_trainer(annotated, "unused", model, policy="doctor"),
        lambda: guided_generate(model, guide, **PROMPT),
        lambda: guided_generate(model, guide, **PROMPT, speculative=True),
        lambda: annotate_token_rewards(rows, model, tokenizer, faces=FACES),
        lambda: score_completions(model, [[1, 5]], [[6]], batch_size=1),
        lambda: evaluate_guidance(model, tokenizer, ["say"], lambda **_: [0.0]),
        lambda: Engine(model, tokenizer, {}),
        lambda: Engine(make_llama(1, 32), tokenizer, {"helpful": model}),
    ):
        with pytest.raises(ValueError, match="adapters of its weights only, such as LoRA"):
            attempt()
    plain = make_llama(2)
    with pytest.raises(ValueError, match="use an adapter of the weights, such as `LoraConfig`"):
        make_doctor(plain, peft_config)
    assert not hasattr(plain, "peft_config") and not hasattr(plain, "value_head")  # as it was


@pytest.mark.parametrize(
    "peft_config",
    [
        LoraConfig(target_modules=["q_proj"], use_dora=True),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        LoHaConfig(target_modules=["q_proj"], r=2),
        OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=4),
        VeraConfig(target_modules=["q_proj"], r=2),
        LNTuningConfig(target_modules=["norm"]),
        TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 4]),
    ],
    ids=lambda peft_config: peft_config.peft_type.value,
)
def test_adapters_of_the_weights_are_read(peft_config):
    """A rule that is too strict would shut out doctors that work."""
    model = get_peft_model(make_llama(2), peft_config).eval()
    assert Doctor(model).exponents == {} and Doctor(model).adapters == ("default",)

# SPDX-License-Identifier: Apache-2.0

"""A strength in nats: measured, saved with the doctor, and reached on other prompts."""

import json
import math
import re
import warnings

import pytest
import torch
from conftest import FACES, conversational_rows, make_llama, make_tokenizer, save_model, write_rows
from datasets import Dataset
from fastapi.testclient import TestClient
from peft import LoraConfig, get_peft_model
from trainers import make_trainer

from trl_tfpo import DoctorGuidedLogitsProcessor, TFPOConfig, TFPOTrainer, annotate_token_rewards, guided_generate
from trl_tfpo.cli import main
from trl_tfpo.custom_generate import generate
from trl_tfpo.data.tokenizer_identity import tokenizer_fingerprint
from trl_tfpo.evaluation import evaluate_guidance, measure_strengths
from trl_tfpo.models.fingerprint import patient_fingerprint
from trl_tfpo.models.strengths import STRENGTHS_FILE, Strength, StrengthTable, load_strengths, with_section


PROMPTS = ["say the soup", "you are", "the bread is"]
SETTINGS = dict(num_samples_per_prompt=2, max_new_tokens=6, batch_size=4)
RUN = dict(max_steps=2, report_to="none", disable_tqdm=True, dataloader_pin_memory=False)


def make_table(*rows: tuple[float, float], **facts) -> StrengthTable:
    """A table of these exponents and KLs, with made-up facts."""
    defaults = dict(alpha=1.0, patient="some/patient", patient_fingerprint="abc", tokenizer="def")
    sample = dict(num_prompts=32, num_samples_per_prompt=4, max_new_tokens=80, seed=0)
    return StrengthTable(
        tuple(Strength(beta, kl, 0.9 * kl, 1.1 * kl, 20.0) for beta, kl in rows), **(defaults | sample | facts)
    )


def no_reward(prompts, completions):
    return [0.0] * len(completions)


@pytest.fixture(scope="module")
def patient():
    return make_llama(1, 32)


@pytest.fixture(scope="module")
def saved(patient, tmp_path_factory):
    """A doctor that is a language model, saved with the table that was measured with the patient."""
    folder = tmp_path_factory.mktemp("saved") / "doctor"
    doctor = make_llama(2)
    save_model(folder, doctor)
    measure_strengths(patient, doctor, make_tokenizer(), PROMPTS, strengths=[0.4, 0.8], **SETTINGS).save(folder)
    return folder


# The measurement


@pytest.fixture(scope="module")
def praise(world, tmp_path_factory):
    """A doctor of the controlled world, trained for a few steps, measured on validation prompts and saved."""
    folder, attribute = tmp_path_factory.mktemp("praise") / "doctor", world.attributes["praise"]
    sizes = {"train": 48, "validation": 12}
    pairs = {x: world.preference_dataset("praise", num_pairs=num, seed=0, split=x) for x, num in sizes.items()}
    trainer = TFPOTrainer(
        model=type(world.doctor).from_pretrained(world.weights / "doctor"),
        patient_model=world.patient,
        args=TFPOConfig(str(folder), learning_rate=3e-3, per_device_eval_batch_size=96, **(RUN | {"max_steps": 20})),
        train_dataset=pairs["train"],
        eval_dataset=pairs["validation"],
        processing_class=world.tokenizer,
        faces=attribute.faces,
    )
    trainer.train()
    trainer.measure_strengths(world.patient, strengths=[0.25, 0.5, 1.0], num_samples_per_prompt=8, max_new_tokens=80)
    trainer.save_model()
    return folder


@pytest.mark.parametrize("kl", [0.5, 1.0])
def test_the_kl_is_that_of_other_prompts(kl, praise, world):
    """A strength in nats is a promise for prompts that the table has not seen."""
    guide = DoctorGuidedLogitsProcessor.from_pretrained(str(praise), kl=kl)
    found = evaluate_guidance(
        world.patient,
        world.tokenizer,
        world.prompts("test"),
        no_reward,
        guide=guide,
        num_samples_per_prompt=8,
        max_new_tokens=80,
        batch_size=96,
        seed=1,
    )
    row = min(load_strengths(praise).rows, key=lambda row: abs(row.kl - kl))
    of_table = kl / row.kl * (row.high - row.low) / (2 * 1.96)  # standard error
    assert abs(found["kl"] - kl) < 1.96 * math.hypot(found["kl_se"], of_table)
    assert found["kl_se"] < 0.1 * kl  # otherwise any KL would do


def test_the_table_has_the_kl_of_an_evaluation(patient, saved):
    """The two measures of a distance must be one."""
    table = load_strengths(saved)
    for row in table.rows:
        guide = DoctorGuidedLogitsProcessor.from_pretrained(str(saved), beta=row.beta)
        found = evaluate_guidance(patient, make_tokenizer(), PROMPTS, no_reward, guide=guide, **SETTINGS)
        assert row.kl == pytest.approx(found["kl"], rel=1e-3) and row.low <= row.kl <= row.high
        assert row.num_tokens == pytest.approx(found["num_tokens"], abs=0.05)
    assert table.alpha is None  # a language model is mixed in
    assert (table.num_prompts, table.num_samples_per_prompt, table.max_new_tokens, table.seed) == (3, 2, 6, 0)
    assert table.temperature == 1.0 and table.tokenizer == tokenizer_fingerprint(make_tokenizer())


def test_prompts_may_be_token_ids(patient, saved):
    """A dataset with token ids has no texts, and texts that are tokenized again may have other ids."""
    tokenizer = make_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    settings = dict(strengths=[0.4, 0.8], **SETTINGS)
    assert measure_strengths(patient, make_llama(2), tokenizer, ids, **settings) == load_strengths(saved)


@pytest.mark.parametrize("strengths", [[], [0.0, 0.5], [0.5, 0.5], [0.5, 0.2], [math.nan], [0.5, 1.5]])
def test_strengths_that_no_table_can_have(strengths, patient):
    """Refused before minutes of sampling."""
    with pytest.raises(ValueError, match="`strengths` must be|must not exceed 1"):
        measure_strengths(patient, make_llama(2), make_tokenizer(), PROMPTS, strengths=strengths)


# From nats to an exponent


def test_exponents_between_two_rows_by_hand():
    """The square root of the KL is linear in the exponent, from the patient on."""
    table = make_table((1.0, 1.0), (2.0, 9.0))
    expected = {0: 0.0, 0.25: 0.5, 1.0: 1.0, 4.0: 1.5, 9.0: 2.0}
    assert {kl: table.beta_at(kl) for kl in expected} == pytest.approx(expected)
    betas = [table.beta_at(kl) for kl in torch.linspace(0, 9, 200).tolist()]
    assert betas == sorted(set(betas))


@pytest.mark.parametrize("kl", [9.01, -0.1, math.nan, math.inf, "1", True, [1.0], None])
def test_a_kl_out_of_range(kl):
    """Beyond the largest measured KL the exponent would be a guess."""
    with pytest.raises(ValueError, match="in the measured range, from 0 to 9"):
        make_table((1.0, 1.0), (2.0, 9.0)).beta_at(kl)


def test_the_range_ends_where_the_kl_falls():
    """A doctor that ends texts early moves fewer nats at a larger strength: one KL would have two exponents."""
    table = make_table((1.0, 1.0), (2.0, 4.0), (3.0, 3.0), (4.0, 5.0))
    assert table.max_kl == 4.0 and table.beta_at(4.0) == 2.0
    with pytest.raises(ValueError, match="from 0 to 4"):
        table.beta_at(4.5)
    assert make_table((1.0, 0.0)).max_kl == 0.0  # a doctor that changes nothing


@pytest.mark.parametrize("rows", [(), ((0.0, 1.0),), ((2.0, 1.0), (1.0, 2.0)), ((1.0, -1.0),), ((1.0, math.nan),)])
def test_tables_that_are_none(rows):
    """A file from elsewhere may contain anything."""
    with pytest.raises(ValueError, match="A table of strengths must have"):
        make_table(*rows)


def test_a_guide_by_its_kl(saved, patient):
    """The strength in nats is the exponent of the table, however the doctor is named."""
    table = load_strengths(saved)
    kl = table.rows[0].kl
    guide = DoctorGuidedLogitsProcessor.from_pretrained(saved, kl=kl)
    assert guide.betas == [0.4] and guide.alpha == pytest.approx(0.6) and guide.strengths == table
    assert DoctorGuidedLogitsProcessor.from_pretrained(saved, kl=0).betas == [0.0]
    assert DoctorGuidedLogitsProcessor.from_pretrained(saved).strengths is None
    ids = {"input_ids": torch.tensor([[1, 5, 17]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    call = dict(**ids, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True)
    by_kl, by_beta = (generate(patient, doctor=str(saved), **call, **way) for way in ({"kl": kl}, {"beta": 0.4}))
    assert all(torch.equal(a, b) for a, b in zip(by_kl.scores, by_beta.scores, strict=True))


@pytest.mark.parametrize(
    "settings, rule",
    [
        ({"beta": 0.5}, r"Got `kl` and \['beta'\]"),
        ({"beta": 0.0}, r"Got `kl` and \['beta'\]"),
        ({"alpha": torch.ones(2)}, r"Got `kl` and \['alpha'\]"),
        ({"min_patient_prob": 0.1}, r"Got `kl` and \['min_patient_prob'\]"),
        ({"reference": make_llama(3)}, r"Got `kl` and \['reference'\]"),
        ({"kl": 1e6}, "in the measured range"),
    ],
)
def test_a_kl_with_another_policy(settings, rule, saved):
    """Nats that were measured for one policy are none of another."""
    with pytest.raises(ValueError, match=rule):
        DoctorGuidedLogitsProcessor.from_pretrained(saved, **({"kl": 0.01} | settings))


def test_a_kl_without_one_table(saved, patient, tmp_path):
    """KLs of several doctors do not add up, and older folders have no table."""
    with pytest.raises(ValueError, match="strength of one doctor"):
        DoctorGuidedLogitsProcessor.from_pretrained([saved, saved], kl=0.1)
    older = tmp_path / "older"
    save_model(older, make_llama(2))
    assert load_strengths(older) is None and DoctorGuidedLogitsProcessor.from_pretrained(older).betas == [0.5]
    with pytest.raises(ValueError, match="needs the strengths of the doctor"):
        DoctorGuidedLogitsProcessor.from_pretrained(older, kl=0.1)
    with pytest.raises(ValueError, match="needs the strengths of the doctor"):
        generate(patient, torch.tensor([[1, 5]]), doctor=str(older), kl=0.1)


# The patient


def test_another_patient_is_told(saved, patient):
    """The same exponent moves other nats in another patient."""
    guide = DoctorGuidedLogitsProcessor.from_pretrained(saved, kl=0.01)
    call = dict(input_ids=torch.tensor([[1, 5, 17]]), max_new_tokens=2, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guided_generate(patient, guide, **call)
    with pytest.warns(UserWarning, match="the KL may differ"):
        guided_generate(make_llama(3, 32), guide, **call)
    guide.strengths = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guided_generate(make_llama(3, 32), guide, **call)


def test_a_patient_is_known_in_every_form():
    """A warning about the same weights in bfloat16, or under an adapter, would teach to ignore warnings."""
    before = patient_fingerprint(make_llama(1))
    assert patient_fingerprint(make_llama(1).bfloat16()) == before
    adapted = make_llama(1)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    assert patient_fingerprint(get_peft_model(adapted, config)) == before
    changed = make_llama(1)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    assert len({before, patient_fingerprint(changed), patient_fingerprint(make_llama(3))}) == 3


# Files


def test_the_card_has_the_table_once(tmp_path):
    """A user picks a strength from the card; a second measurement replaces the first."""
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# A doctor\n\n## How it guides\n\nSo.\n\n## Citations\n\nThose.\n")
    make_table((1.0, 1.234), patient="a|b").save(tmp_path)
    make_table((1.0, 2.34), alpha=None, patient="a|b").save(tmp_path)
    text = card.read_text()
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == ["How it guides", "Strength in nats", "Citations"]
    assert "| 1 | 2.34 | 2.106 to 2.574 | 20.0 |" in text and "1.234" not in text and "license: mit" in text
    assert "the patient a\\|b" in text and "kl=1.0" in text and "is `1 - beta`" in text
    assert with_section("# A doctor\n", make_table((1.0, 0.5))).count("## Strength in nats") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", STRENGTHS_FILE]


def test_a_table_is_read_as_it_was_written(tmp_path):
    """Every digit that the card shows can be chosen, and every fact is kept."""
    table = make_table((0.5, 0.12345), (1.0, 1.0), alpha=None, seed=3)
    table.save(tmp_path)
    assert load_strengths(tmp_path) == table
    assert json.loads((tmp_path / STRENGTHS_FILE).read_text())["format"] == 1


@pytest.mark.parametrize(
    "contents, rule",
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 1}', "cannot be read"),
        ('{"format": 1, "rows": [{"beta": 1}]}', "cannot be read"),
        ('{"format": 2, "rows": []}', "must have format 1"),
    ],
)
def test_a_damaged_table(contents, rule, tmp_path):
    """Said in words, with what to do."""
    (tmp_path / STRENGTHS_FILE).write_text(contents)
    with pytest.raises(ValueError, match=rule):
        load_strengths(tmp_path)


# The trainer


@pytest.fixture(scope="module")
def annotated(patient):
    rows = Dataset.from_list(conversational_rows(8))
    return annotate_token_rewards(rows, patient, make_tokenizer(), faces=FACES)


def test_the_trainer_saves_what_it_measured(annotated, patient, tmp_path):
    """A table of other weights than those in the folder is worse than none."""
    trainer = make_trainer(annotated, tmp_path / "run", eval_dataset=annotated, max_steps=1)
    trainer.train()
    table = trainer.measure_strengths(patient, num_prompts=5, max_new_tokens=4)
    assert table.num_prompts == 2  # of 8 pairs
    assert [row.beta for row in table.rows] == [0.125, 0.25, 0.5, 1.0, 2.0] and table.alpha == 1.0
    assert trainer.model.training and not patient.training
    trainer.save_model()
    trainer.create_model_card(dataset_name="some/data")
    card = (tmp_path / "run" / "README.md").read_text()
    facts = ("you are kind", "you are rude", "some/data, 8 preference pairs", "`policy=ratio`")
    for told in (*facts, tokenizer_fingerprint(make_tokenizer()), table.as_table()):
        assert told in card
    assert load_strengths(tmp_path / "run") == table
    trainer.args.max_steps = 2
    trainer.train()
    assert trainer.strengths is None
    trainer.save_model()
    assert load_strengths(tmp_path / "run") is None
    assert "Strength in nats" not in (tmp_path / "run" / "README.md").read_text()


def test_training_again_makes_other_weights(annotated, patient, tmp_path):
    """As many steps as before do not make the doctor that was measured."""
    trainer = make_trainer(annotated, tmp_path, max_steps=1)
    trainer.train()
    trainer.measure_strengths(patient, PROMPTS, strengths=[0.5], max_new_tokens=2)
    trainer.train()
    assert trainer.strengths is None and trainer.state.global_step == 1


def test_an_adapter_on_the_patient_is_measured_against_the_patient(annotated, tmp_path):
    """With the adapter on in both, the distance would be 0, and the patient would seem to be another one."""
    base = make_llama(1)
    before, config = patient_fingerprint(base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    args = dict(policy="doctor", reference_weight=0.0, max_steps=1)
    trainer = make_trainer(annotated, tmp_path, get_peft_model(base, config), **args)
    trainer.train()
    table = trainer.measure_strengths(base, PROMPTS, strengths=[0.5, 1.0], max_new_tokens=4)
    assert table.rows[0].kl > 0 and table.patient_fingerprint == before
    guide = DoctorGuidedLogitsProcessor(trainer.model.eval(), beta=1.0)
    settings = dict(guide=guide, num_samples_per_prompt=4, max_new_tokens=4, batch_size=8)
    found = evaluate_guidance(make_llama(1), make_tokenizer(), PROMPTS, no_reward, **settings)
    assert table.rows[1].kl == pytest.approx(found["kl"], rel=1e-3)


def test_the_trainer_needs_a_patient_and_prompts(annotated, patient, tmp_path):
    """What is not there is named, with what to pass."""
    trainer = make_trainer(annotated, tmp_path)
    with pytest.raises(ValueError, match="pass the patient or its name"):
        trainer.measure_strengths()
    with pytest.raises(ValueError, match="no `eval_dataset`"):
        trainer.measure_strengths(patient)
    with pytest.raises(ValueError, match="same tokenizer|an embedding for every token"):
        trainer.measure_strengths(make_llama(1, vocab_size=8), PROMPTS)
    name = save_model(tmp_path / "patient", patient)
    table = trainer.measure_strengths(name, PROMPTS, strengths=[0.5], max_new_tokens=2)
    assert table.patient == name and table.num_prompts == 3


# Commands


def test_commands(saved, patient, tmp_path, capsys):
    """Measure, look, choose, decode: without a line of Python."""
    folder, name = tmp_path / "doctor", save_model(tmp_path / "patient", patient)
    save_model(folder, make_llama(2))
    assert main(["strengths", "--doctor", str(folder)]) == 2
    assert "has no table of strengths" in capsys.readouterr().err
    write_rows(tmp_path / "pairs.jsonl", conversational_rows(4))
    measured = ["strengths", "--doctor", str(folder), "--patient", name, "--max_new_tokens", "6"]
    measured += ["--dataset_name", str(tmp_path / "pairs.jsonl"), "--dataset_split", "train", "--num_prompts", "1"]
    assert main(measured) == 0
    table = load_strengths(folder)
    assert table.num_prompts == 1 and table.as_table() in capsys.readouterr().out
    questions = tmp_path / "questions.jsonl"  # without answers, and one of them twice
    asked = [[{"role": "user", "content": text}] for text in ("you are", "you are", "say the soup")]
    write_rows(questions, [{"prompt": prompt} for prompt in asked])
    measured = [
        "strengths",
        "--doctor",
        str(folder),
        "--patient",
        name,
        "--max_new_tokens",
        "6",
        "--prompt",
        "the soup",
    ]
    measured += ["--dataset_name", str(questions), "--dataset_split", "train"]
    assert main(measured) == 2 and main([*measured, "--overwrite", "--strengths", "0.5", "0.7"]) == 0
    assert load_strengths(folder).num_prompts == 3
    table = load_strengths(folder)
    assert [row.beta for row in table.rows] == [0.5, 0.7]
    capsys.readouterr()
    kl = str(table.rows[0].kl)
    assert main(["strengths", "--doctor", str(folder), "--kl", kl]) == 0
    assert capsys.readouterr().out == "0.5\n"
    decode = ["generate", "--patient", name, "--prompt", "you are", "--max_new_tokens", "6"]
    printed = []
    for way in (["--kl", kl], ["--beta", "0.5"]):
        assert main([*decode, "--doctor", str(folder), *way]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert main([*decode, "--doctor", str(folder), str(saved), "--kl", kl]) == 2
    assert main([*decode, "--kl", kl]) == 2
    assert main([*decode, "--doctor", str(folder), "--kl", kl, "--alpha", "1"]) == 2
    assert main(["strengths", "--doctor", str(tmp_path / "none"), "--patient", name, "--prompt", "you are"]) == 2


def test_a_server_with_a_strength_in_nats(saved, patient, tmp_path):
    """Requests without weights get the strength that the operator has chosen."""
    from trl_tfpo.cli.serve import ServeArguments, build

    kl, name = load_strengths(saved).rows[1].kl, save_model(tmp_path / "patient", patient)
    app = build(ServeArguments(patient=name, doctor=[f"kind={saved}"], kl=kl))
    with TestClient(app) as client:
        (model,) = client.get("/v1/models").json()["data"]
    assert model["doctors"] == {"kind": 0.8}
    with pytest.raises(ValueError, match="strength of one doctor"):
        build(ServeArguments(patient=name, kl=kl))

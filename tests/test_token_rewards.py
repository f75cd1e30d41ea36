# SPDX-License-Identifier: Apache-2.0

"""The annotated dataset: rewards for the right tokens, from a patient that is only read."""

import copy
from dataclasses import replace

import datasets
import huggingface_hub
import oracles
import pytest
import torch
from accelerate import PartialState
from conftest import FACES, conversational_rows, make_llama, save_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_tfpo import Faces, annotate_token_rewards
from trl_tfpo.annotation.score_cache import SHARD_SIZE
from trl_tfpo.annotation.token_rewards import GAP_COLUMNS, REWARD_COLUMNS, annotation_settings
from trl_tfpo.data.tokenization import ID_COLUMNS
from trl_tfpo.models import named_model
from trl_tfpo.models.fingerprint import model_fingerprint
from trl_tfpo.models.named_model import NamedModel


def plain_logps(model, prompt_ids, completion_ids):
    """One sequence, one forward, full softmax."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(completion_ids)[:, None])[:, 0]


def test_rewards_are_what_the_two_faces_say(preferences, patient, tokenizer):
    """Batching, sorting or padding that mixes rows or shifts tokens would reward the wrong words."""
    annotated = annotate_token_rewards(preferences, patient, tokenizer, faces=FACES, batch_size=3)
    template = dict(tokenize=True, return_dict=True, add_generation_prompt=True)
    for row in annotated:
        for name, sign in (("chosen", 1), ("rejected", -1)):
            logps = []
            for face in (FACES.positive, FACES.negative):
                messages = [{"role": "system", "content": face}, *row["prompt"]]
                face_ids = tokenizer.apply_chat_template(messages, **template)["input_ids"]
                logps.append(plain_logps(patient, face_ids, row[f"{name}_ids"]))
            gaps = (logps[0] - logps[1]).tolist()
            assert row[f"{name}_gaps"] == pytest.approx(gaps, abs=1e-5)
            expected = oracles.rewards(gaps, sign, "agreement", 3.0, 0.3)
            assert row[f"{name}_token_rewards"] == pytest.approx(expected, abs=1e-4)


def test_more_ids_may_end_a_completion(patient, tokenizer):
    """The doctor may know an end that its patient does not."""
    pair = {"prompt": "say", "chosen": " good <unk> and", "rejected": " bad"}
    dataset = Dataset.from_list([pair])
    (row,) = annotate_token_rewards(dataset, patient, tokenizer, faces=FACES, eos_token_ids=[tokenizer.unk_token_id])
    assert tokenizer.decode(row["chosen_ids"]) == "good <unk>"


def test_only_the_assistant_is_rewarded(patient, tokenizer):
    """A user's words between two turns of the assistant must not get a reward, nor change what the others get."""
    (row,) = conversational_rows(1)
    more = [{"role": "user", "content": "and the bread"}, {"role": "assistant", "content": "very good"}]
    row["chosen"] = row["chosen"] + more
    (row,) = annotate_token_rewards(Dataset.from_list([row]), patient, tokenizer, faces=FACES, sparsity_threshold=0.0)
    mask = torch.tensor(row["chosen_mask"]).bool()
    gaps, rewards = (torch.tensor(row[f"chosen_{name}"]) for name in ("gaps", "token_rewards"))
    assert (~mask).sum() == 5 and not gaps[~mask].any() and not rewards[~mask].any()
    expected = oracles.rewards(gaps[mask].tolist(), 1, "agreement", 3.0, 0.0)
    assert rewards[mask].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "similarity"),
    [
        ({"device_map": "auto"}, 0.9999),
        ({"dtype": torch.bfloat16}, 0.99),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, 0.98),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}, 0.7),
    ],
    ids=["device_map", "bfloat16", "8bit", "4bit"],
)
def test_patients_as_they_are_loaded(settings, similarity, preferences, tokenizer, tmp_path):
    """A large patient is never in float32 on one device; what it says must still be about the same."""
    make_llama(1, 64).save_pretrained(tmp_path)
    exact = annotate_token_rewards(preferences, make_llama(1, 64), tokenizer, faces=FACES)
    patient = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
    annotated = annotate_token_rewards(preferences, patient, tokenizer, faces=FACES)
    for name in ("chosen_gaps", "rejected_gaps"):
        gaps, expected = (torch.cat([torch.tensor(row) for row in data[name]]) for data in (annotated, exact))
        assert gaps.isfinite().all()
        assert torch.cosine_similarity(gaps, expected, dim=0) > similarity


def test_the_patient_is_only_read(preferences, patient, tokenizer):
    """Users trust that their model is the same afterwards: weights, mode and forward."""
    patient.train()
    before, forward = model_fingerprint(patient), patient.forward
    annotate_token_rewards(preferences, patient, tokenizer, faces=FACES)
    assert model_fingerprint(patient) == before
    assert patient.training and patient.forward == forward and "forward" not in vars(patient)
    assert all(parameter.grad is None for parameter in patient.parameters())


def test_a_dataset_dict_keeps_its_splits(patient, tokenizer):
    """Train and test are annotated alike, columns that were there stay."""
    splits = DatasetDict(
        {
            name: Dataset.from_list(conversational_rows(size)).add_column("id", list(range(size)))
            for name, size in (("train", 6), ("test", 3))
        }
    )
    annotated = annotate_token_rewards(splits, patient, tokenizer, faces=FACES)
    assert {name: len(split) for name, split in annotated.items()} == {"train": 6, "test": 3}
    assert annotated["test"]["id"] == [0, 1, 2]
    assert set(ID_COLUMNS) <= set(annotated["train"].column_names)


def test_settings_travel_with_the_dataset(preferences, patient, tokenizer, tmp_path):
    """A dataset on disk must say how its rewards were made."""
    annotated = annotate_token_rewards(preferences, patient, tokenizer, faces=FACES, sparsity_threshold=0.5)
    annotated.save_to_disk(tmp_path / "annotated")
    settings = annotation_settings(Dataset.load_from_disk(tmp_path / "annotated").select(range(2)))
    assert settings["faces"] == {"positive": "you are kind", "negative": "you are rude", "placement": "system"}
    assert settings["reward"]["sparsity_threshold"] == 0.5
    assert settings["reward"]["reward_direction"] == "agreement"
    assert annotation_settings(preferences) is None


def test_a_patient_by_path_gives_the_same(preferences, patient, tokenizer, tmp_path):
    """A name or path is how real patients are given."""
    save_model(tmp_path, patient, tokenizer)
    by_path = annotate_token_rewards(preferences, str(tmp_path), tokenizer, faces=FACES)
    by_model = annotate_token_rewards(preferences, patient, tokenizer, faces=FACES)
    assert by_path["chosen_token_rewards"] == by_model["chosen_token_rewards"]


def test_a_patient_by_name_is_loaded_once_for_a_dataset(patient, tokenizer, tmp_path, monkeypatch):
    """A patient given by name is loaded only if scores are missing, and its weights are told apart."""
    loads = []
    load_model = named_model.load_model
    monkeypatch.setattr(
        named_model, "load_model", lambda *args, **kwargs: loads.append(1) or load_model(*args, **kwargs)
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--patient" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("0" * 40)
    for path in (tmp_path / "patient", folder):
        save_model(path, patient, tokenizer)
    rows = Dataset.from_list(conversational_rows())

    def annotate(name, **settings):
        return annotate_token_rewards(rows, NamedModel(name, dtype="auto", **settings), tokenizer, faces=FACES)[
            "chosen_gaps"
        ]

    first = annotate(str(tmp_path / "patient"))
    assert annotate(str(tmp_path / "patient")) == first and len(loads) == 1
    annotate(str(tmp_path / "patient"), attn_implementation="eager")
    assert len(loads) == 2
    with torch.no_grad():
        patient.lm_head.weight.mul_(2)
    patient.save_pretrained(tmp_path / "patient")
    assert annotate(str(tmp_path / "patient")) != first and len(loads) == 3
    for _ in range(2):
        assert annotate("org/patient") == first and len(loads) == 4


def test_another_patient_or_setting_is_not_served_from_the_cache(patient, tokenizer, tmp_path):
    """A cache keyed on too little returns the rewards of another run."""
    Dataset.from_list(conversational_rows()).save_to_disk(tmp_path)
    dataset = Dataset.load_from_disk(tmp_path)
    first = annotate_token_rewards(dataset, patient, tokenizer, faces=FACES)
    other = copy.deepcopy(patient)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert annotate_token_rewards(dataset, other, tokenizer, faces=FACES)["chosen_gaps"] != first["chosen_gaps"]
    swapped = Faces(positive=FACES.negative, negative=FACES.positive)
    assert annotate_token_rewards(dataset, patient, tokenizer, faces=swapped)["chosen_gaps"] != first["chosen_gaps"]
    in_user_turn = annotate_token_rewards(dataset, patient, tokenizer, faces=replace(FACES, placement="user"))
    assert in_user_turn["chosen_gaps"] != first["chosen_gaps"]
    assert annotation_settings(in_user_turn)["faces"] == {**vars(FACES), "placement": "user"}
    for scale in (2, 3):  # two functions of one name, as in a notebook cell that was edited

        def reward_fn(*, positive_logps, negative_logps, scale=scale, **_):
            return scale * (positive_logps - negative_logps)

        annotated = annotate_token_rewards(dataset, patient, tokenizer, faces=FACES, reward_fn=reward_fn)
        assert annotated[0]["chosen_token_rewards"] == pytest.approx([scale * gap for gap in first[0]["chosen_gaps"]])
    again = annotate_token_rewards(dataset, patient, tokenizer, faces=FACES)
    assert again["chosen_gaps"] == first["chosen_gaps"]


def test_a_reward_function_of_ones_own(preferences, patient, tokenizer):
    """The researcher's door: tensors in, rewards out."""

    def sign_of_gap(*, positive_logps, negative_logps, preference_sign, completion_mask, scale):
        return scale * (positive_logps - negative_logps).sign() * completion_mask

    annotated = annotate_token_rewards(preferences, patient, tokenizer, faces=FACES, reward_fn=sign_of_gap, scale=2.0)
    for row in annotated:
        assert all(
            r == 2 * ((g > 0) - (g < 0)) for r, g in zip(row["chosen_token_rewards"], row["chosen_gaps"], strict=True)
        )


def test_processes_with_different_weights_are_refused(preferences, patient, tokenizer, monkeypatch):
    """Each process scores its share: one that never loaded the weights would fill it with noise."""
    monkeypatch.setattr("trl_tfpo.models.fingerprint.gather_object", lambda names: [*names, "of another process"])
    assert len(model_fingerprint(patient)) == 16
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    with pytest.raises(ValueError, match="same weights"):
        annotate_token_rewards(preferences, patient, tokenizer, faces=FACES)


def test_a_sharded_patient_is_refused(preferences, patient, tokenizer):
    """The parameters of a shard are empty, and the error of the first matrix product says nothing of it."""
    patient.lm_head.weight.ds_id = 0  # what DeepSpeed ZeRO-3 leaves on a parameter
    with pytest.raises(ValueError, match="all its parameters in each process"):
        annotate_token_rewards(preferences, patient, tokenizer, faces=FACES)


def same_row(one, other) -> bool:
    """The same tokens, and scores up to rounding: those of a stream come from other batches."""
    scores = {*REWARD_COLUMNS, *GAP_COLUMNS}
    same = [v == (pytest.approx(other[k], abs=1e-5) if k in scores else other[k]) for k, v in one.items()]
    return one.keys() == other.keys() and all(same)


def test_a_stream_is_annotated_as_it_is_read(patient, tokenizer):
    """Millions of pairs must neither wait for the last one nor have to fit in memory."""
    rows, num_read = conversational_rows(300), []
    stream = IterableDataset.from_generator(lambda: (num_read.append(1) or row for row in rows))
    annotated = annotate_token_rewards(stream, patient, tokenizer, faces=FACES)
    whole = annotate_token_rewards(Dataset.from_list(rows), patient, tokenizer, faces=FACES)
    num_read.clear()
    for index, (found, expected) in enumerate(zip(annotated, whole, strict=True)):
        assert same_row(found, expected)
        assert len(num_read) <= index + SHARD_SIZE + 1
    assert annotation_settings(annotated) == annotation_settings(whole)
    both = annotate_token_rewards(IterableDatasetDict({"train": stream}), patient, tokenizer, faces=FACES)
    assert same_row(next(iter(both["train"])), whole[0])

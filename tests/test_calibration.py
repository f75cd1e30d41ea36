# SPDX-License-Identifier: Apache-2.0

"""Calibrated token rewards: what such a token usually gets, weighted by what the labels say."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import FACES, make_llama
from datasets import Dataset
from trainers import config, make_trainer

from trl_tfpo import DoctorGuidedLogitsProcessor, TFPOTrainer, annotate_token_rewards
from trl_tfpo.annotation.token_rewards import SETTINGS_KEY
from trl_tfpo.functional import token_rewards
from trl_tfpo.training.calibration import calibrate
from trl_tfpo.training.checks import check_can_calibrate


VOCABULARY, SIZE, EOS = 60, 5, 2


def made_up_pairs(
    num_pairs: int = 200,
    signal: float = 1.0,
    noise: float = 1.0,
    of_label: float = 3.0,
    vocabulary: int = VOCABULARY,
):
    """
    Pairs of random tokens with values that are linear in their embeddings. A gap is a value with noise; labels are
    drawn from a Bradley-Terry model of the values.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    embeddings = normal(vocabulary, SIZE)
    values = embeddings @ normal(SIZE) / SIZE**0.5
    values[EOS] = 0
    rows = []
    for _ in range(num_pairs):
        sides = []
        for length in torch.randint(5, 12, (2,), generator=generator).tolist():
            ids = torch.randint(3, vocabulary, (length,), generator=generator)
            gaps = signal * values[ids] + noise * normal(length)
            sides.append(([*ids.tolist(), EOS], [*gaps.tolist(), 5.0], values[ids].sum()))
        margin = of_label * (sides[0][2] - sides[1][2])
        if torch.rand((), generator=generator) > margin.sigmoid():
            sides.reverse()
        rows.append({f"{name}_ids": side[0] for name, side in zip(("chosen", "rejected"), sides, strict=True)})
        rows[-1] |= {f"{name}_gaps": side[1] for name, side in zip(("chosen", "rejected"), sides, strict=True)}
    return Dataset.from_list(rows), embeddings, values


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]).float())[0, 1].item()


def test_credits_are_the_values_behind_noisy_gaps():
    """The gap of one token in one context is mostly noise; a doctor that learns it learns noise."""
    dataset, embeddings, values = made_up_pairs(noise=3.0)
    found = calibrate(dataset, embeddings, [EOS])
    gaps = torch.tensor([x for row in dataset["chosen_gaps"] for x in row[:-1]])
    ids = torch.tensor([x for row in dataset["chosen_ids"] for x in row[:-1]])
    assert correlation(gaps, values[ids]) < 0.5
    assert correlation(found.usual[3:], values[3:]) > 0.9 and correlation(found.credits[3:], values[3:]) > 0.95
    assert found.accuracy > 0.7 and found.log_likelihood > -0.6 and found.num_pairs == 200


def test_labels_speak_where_the_faces_know_nothing():
    """Faces that say nothing of what the labels reward must not be all that a doctor learns from."""
    dataset, embeddings, values = made_up_pairs(num_pairs=600, signal=0.0)
    found = calibrate(dataset, embeddings, [EOS])
    assert correlation(found.credits[3:], values[3:]) > 0.8


def test_length_and_the_end_get_no_reward():
    """Else a doctor learns to write more, or never to stop, whatever the labels want."""
    dataset, embeddings, _ = made_up_pairs()
    found = calibrate(dataset, embeddings, [EOS])
    ids = torch.tensor([x for name in ("chosen_ids", "rejected_ids") for row in dataset[name] for x in row[:-1]])
    assert found.credits[ids].mean().abs() < 0.02 * found.credits[ids].std()
    assert found.credits[EOS] == 0 and found.usual[EOS] == 0
    rewards = found.apply(dataset)["chosen_token_rewards"]
    assert all(row[-1] == 0 for row in rewards) and all(row[0] != 0 for row in rewards)


def test_rewards_are_the_terms_of_the_fit():
    """Rewards are the sum of the fitted terms: none is left out, and none is added twice."""
    dataset, embeddings, _ = made_up_pairs(num_pairs=40)
    masks = [[True] * (len(row) - 2) + [False, True] for row in dataset["chosen_ids"]]
    dataset = dataset.add_column("chosen_mask", masks)
    dataset = dataset.add_column("rejected_mask", [[True] * len(row) for row in dataset["rejected_ids"]])
    found = calibrate(dataset, embeddings, [EOS])
    weights = found.weights | {"sparse reward": 0.0}
    vars(found)["weights"].update(weights)
    row = found.apply(dataset)[0]
    expected = [
        found.credits[token].item() + weights["gap"] * gap
        for token, gap in zip(row["chosen_ids"][:-2], row["chosen_gaps"][:-2], strict=True)
    ]
    assert row["chosen_token_rewards"] == pytest.approx([*expected, 0.0, 0.0], abs=1e-5)


def test_labels_at_random_are_reported():
    """Training on rewards that explain nothing spends a day and buys noise."""
    dataset, embeddings, _ = made_up_pairs(of_label=0.0)
    found = calibrate(dataset, embeddings, [EOS])
    assert found.log_likelihood < -0.68 and found.sparse_log_likelihood < -0.68
    for is_used, name in ((True, "Calibrated"), (False, "Sparse")):
        with pytest.warns(
            UserWarning, match=f"rewards do not explain the labels. {name} token rewards are used"
        ) as told:
            found.report(is_used=is_used)
        assert len(told) == 1 and f"{found.log_likelihood:.3f}" in str(told[0].message)


def labelled_by_sparse_rewards(num_pairs: int = 300) -> Dataset:
    """The same pairs, with labels drawn from the sparse rewards of their gaps: there is nothing else to be learned."""
    dataset, _, _ = made_up_pairs(num_pairs=num_pairs, noise=3.0)
    generator, rows = torch.Generator().manual_seed(1), dataset.to_list()
    for row in rows:
        sums = []
        for name in ("chosen", "rejected"):
            gaps = torch.tensor([row[f"{name}_gaps"][:-1]])
            mask, zero, sign = torch.ones_like(gaps, dtype=torch.bool), torch.zeros_like(gaps), torch.ones(1)
            logps = dict(positive_logps=gaps, negative_logps=zero, preference_sign=sign, completion_mask=mask)
            sums.append(token_rewards(**logps, reward_direction="faces").sum())
        if torch.rand((), generator=generator) > torch.sigmoid(sums[0] - sums[1]):
            for column in ("ids", "gaps"):
                row[f"chosen_{column}"], row[f"rejected_{column}"] = row[f"rejected_{column}"], row[f"chosen_{column}"]
    return Dataset.from_list(rows)


def test_held_out_labels_choose():
    """Where the faces see all that counts, more terms are more noise; where they are noise, the sparse rewards are."""
    dataset, embeddings, _ = made_up_pairs(num_pairs=300, noise=3.0)
    found = calibrate(dataset, embeddings, [EOS])
    assert found.is_better and found.advantage > 3 * found.advantage_error > 0
    found = calibrate(labelled_by_sparse_rewards(), embeddings, [EOS])
    assert not found.is_better and found.sparse_log_likelihood > -0.6
    found.report(is_used=False)  # no warning: the rewards that are used explain the labels


@pytest.mark.parametrize(
    "sparse, calibrated, is_better", [(-0.45, -0.44, False), (-0.69, -0.67, True), (-0.6, -0.57, True)]
)
def test_many_labels_do_not_make_a_small_advantage_count(sparse, calibrated, is_better):
    """With 3,000 pairs a gain of 3% was significant, and the doctor of a drawn world reached 0.03 less."""
    found = calibrate(*made_up_pairs(num_pairs=64, noise=3.0)[:2], [EOS])
    changes = dict(sparse_log_likelihood=sparse, log_likelihood=calibrated, advantage_error=1e-4)
    assert replace(found, **changes).is_better is is_better


def test_labels_of_one_prompt_are_held_out_together():
    """A pair whose twin was fitted is not held out: random labels would look explained."""
    dataset, embeddings, _ = made_up_pairs(num_pairs=120, of_label=0.0)
    rows = [row | {"prompt_ids": [1, number]} for number, row in enumerate(dataset.to_list())]
    twins = Dataset.from_list([row for row in rows for _ in range(4)])
    alone = calibrate(Dataset.from_list(rows), embeddings, [EOS])
    found = calibrate(twins, embeddings, [EOS])
    seen = calibrate(twins.remove_columns("prompt_ids"), embeddings, [EOS])
    assert found.accuracy < 0.6 and seen.accuracy > found.accuracy + 0.05
    assert found.standard_error > 0.3 * alone.standard_error  # by prompts: four copies of a label are one


def test_large_data_are_drawn_from(monkeypatch):
    """The fit of a million pairs must take no longer than that of ten thousand."""
    dataset, embeddings, values = made_up_pairs(num_pairs=300)
    monkeypatch.setattr("trl_tfpo.training.calibration.MAX_PAIRS", 200)
    found = calibrate(dataset, embeddings, [EOS])
    assert found.num_pairs == 200 and correlation(found.credits[3:], values[3:]) > 0.9
    assert len(found.apply(dataset)) == 300


def test_too_little_to_calibrate_is_refused():
    """A fit to a handful of pairs, or to rewards without gaps, would be noise with decimals."""
    dataset, embeddings, _ = made_up_pairs(num_pairs=31)
    with pytest.raises(ValueError, match="at least 32 pairs with the columns .* Got 31 pairs"):
        calibrate(dataset, embeddings, [EOS])
    with pytest.raises(ValueError, match="annotate the dataset with `annotate_token_rewards`"):
        calibrate(dataset.remove_columns("chosen_gaps"), embeddings, [EOS])
    found = calibrate(made_up_pairs(num_pairs=32)[0], embeddings, [EOS])
    with pytest.raises(ValueError, match="need the columns .* Got \\['prompt'\\]; annotate the dataset"):
        found.apply(Dataset.from_dict({"prompt": ["a"]}))
    sharded = make_llama(2)
    sharded.lm_head.weight.ds_id = 0  # what DeepSpeed ZeRO-3 leaves on a parameter
    with pytest.raises(ValueError, match="needs the whole embeddings of the doctor. Got a sharded doctor"):
        check_can_calibrate(dataset, sharded, is_online=False)


def test_a_doctor_is_trained_on_calibrated_rewards(preferences, patient, tokenizer, tmp_path):
    """Evaluated by other rewards than it was trained on, a doctor would look worse or better than it is."""
    annotated = annotate_token_rewards(preferences, patient, tokenizer, faces=FACES)
    many = Dataset.from_list(annotated.to_list() * 5)
    trainer = TFPOTrainer(
        model=make_llama(2, hidden_size=8),
        args=config(tmp_path, max_steps=2, calibrate_rewards=True),
        train_dataset=many,
        eval_dataset={"same": annotated},
        processing_class=tokenizer,
    )
    credits = trainer.calibration.credits
    assert trainer.model.lm_head.map.any()  # it starts at the credits
    for dataset in (trainer.train_dataset, trainer.eval_dataset["same"]):
        row = dataset[0]
        assert row["chosen_token_rewards"] == trainer.calibration.apply(annotated)[0]["chosen_token_rewards"]
        assert credits[row["chosen_ids"]].any()
    trainer.train()
    assert trainer.evaluate()["eval_same_loss"] > 0
    trainer.save_model()
    (doctor,) = DoctorGuidedLogitsProcessor.from_pretrained(str(tmp_path)).doctors
    assert torch.allclose(doctor.credits, credits / trainer.args.reward_temperature)

    with pytest.raises(ValueError, match="needs all token rewards before training. Got a streamed dataset"):
        make_trainer(many.to_iterable_dataset(), tmp_path, max_steps=2, calibrate_rewards=True)


def annotated_pairs(num_pairs: int, **settings) -> tuple[Dataset, torch.Tensor]:
    """Pairs as a trainer takes them, with rewards of 0.1 throughout, and the embeddings of their tokens."""
    settings = dict(noise=3.0, vocabulary=22) | settings
    dataset, embeddings, _ = made_up_pairs(num_pairs=num_pairs, **settings)
    for name in ("chosen", "rejected"):
        dataset = dataset.add_column(f"{name}_token_rewards", [[0.1] * len(row) for row in dataset[f"{name}_ids"]])
    dataset = dataset.add_column("prompt_ids", [[3, 4 + row % 18] for row in range(num_pairs)])
    dataset.info.description = SETTINGS_KEY + json.dumps({"reward": {}})  # that the default rewards were asked for
    return dataset, embeddings


@pytest.fixture
def labelled():
    """160 pairs that calibrated rewards explain, and a doctor that knows the tokens."""
    dataset, embeddings = annotated_pairs(160)
    doctor = make_llama(2, hidden_size=8)
    with torch.no_grad():
        doctor.get_input_embeddings().weight.zero_()[: len(embeddings), :SIZE] = embeddings
    return dataset, doctor


def test_the_trainer_lets_labels_choose(labelled, tokenizer, tmp_path):
    """By default; and says so in the doctor's card, whatever comes out."""
    dataset, doctor = labelled
    trainer = make_trainer(dataset, tmp_path, copy.deepcopy(doctor))
    assert trainer.calibration.is_better and trainer.rewards_summary.startswith(
        "Calibrated token rewards are used: the"
    )
    assert trainer.train_dataset[0]["chosen_token_rewards"][0] != pytest.approx(0.1)
    trainer.save_model()
    assert f"| held-out labels | {trainer.rewards_summary} |" in (tmp_path / "README.md").read_text()

    for settings in ({"calibrate_rewards": False}, {"policy": "doctor"}):
        trainer = make_trainer(dataset, tmp_path, copy.deepcopy(doctor), **settings)
        assert trainer.calibration is None and trainer.rewards_summary is None
        assert trainer.train_dataset[0]["chosen_token_rewards"][0] == pytest.approx(0.1)


def test_other_data_without_gaps_are_evaluated(labelled, tokenizer, tmp_path):
    """Calibrated rewards that nobody asked for must not make a dataset unusable for evaluation."""
    dataset, doctor = labelled
    without_gaps = dataset.select(range(8)).remove_columns(["chosen_gaps", "rejected_gaps"])
    trainer = make_trainer(dataset, tmp_path, copy.deepcopy(doctor))
    assert trainer.calibration is not None
    with pytest.warns(
        UserWarning, match="token rewards of this dataset are used as they are: its loss is not comparable"
    ):
        metrics = trainer.evaluate(without_gaps)
    mean_sum = 0.1 * sum(map(len, without_gaps["chosen_ids"])) / len(without_gaps)
    assert metrics["eval_token_rewards/chosen"] == pytest.approx(mean_sum, rel=1e-4)
    with pytest.warns(UserWarning, match="token rewards of this dataset are used"):
        assert trainer.predict(without_gaps).predictions.shape == (8, 2)

    asked = make_trainer(dataset, tmp_path, copy.deepcopy(doctor), calibrate_rewards=True)
    with pytest.raises(ValueError, match="Calibrated rewards need the columns"):
        asked.evaluate(without_gaps)


def test_sparse_rewards_stay_where_nobody_asked(labelled, tokenizer, tmp_path):
    """Too few pairs decide nothing, and a user's own rewards, or a reading without labels, are not to be replaced."""
    dataset, doctor = labelled
    few = make_trainer(dataset.select(range(127)), tmp_path, copy.deepcopy(doctor))
    assert few.calibration is None and few.rewards_summary is None
    for reward in ({"reward_direction": "faces"}, {"function": "mine.my_rewards"}):
        chosen = dataset.select(range(160))
        chosen.info.description = SETTINGS_KEY + json.dumps({"reward": reward})
        assert make_trainer(chosen, tmp_path, copy.deepcopy(doctor)).calibration is None
    from_a_file = Dataset.from_list(dataset.to_list())  # whose rewards may be anybody's
    assert make_trainer(from_a_file, tmp_path, copy.deepcopy(doctor)).calibration is None
    without_gaps = dataset.remove_columns(["chosen_gaps", "rejected_gaps"])
    trainer = make_trainer(dataset, tmp_path, doctor, eval_dataset=without_gaps)
    assert trainer.calibration is None  # evaluation by other rewards would be another loss


def test_one_warning_before_training(tokenizer, tmp_path):
    """Two messages about the same labels would be read as two faults."""
    dataset, _ = annotated_pairs(200, of_label=0.0)
    for rows, expected in (
        (dataset, "rewards do not explain the labels"),
        (dataset.select(range(100)), "faces do not"),
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            make_trainer(rows, tmp_path, make_llama(2, hidden_size=8))
        told = [str(x.message) for x in told if "labels" in str(x.message)]
        assert len(told) == 1 and expected in told[0], told

# SPDX-License-Identifier: Apache-2.0

"""Held-out pairs are watched: a doctor that learns its pairs by heart is told of, and no other."""

import warnings

import pytest
from conftest import FACES, make_llama
from datasets import Dataset
from trainers import config
from transformers import EarlyStoppingCallback

from trl_tfpo import TFPOTrainer, annotate_token_rewards
from trl_tfpo.training.overfitting import best_before_decline


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([3.0, 2.0, 2.1, 2.2], 1),
        ([3.0, 2.0, 2.5, 2.1, 2.2], None),  # up, down, up
        ([3.0, 2.0, 2.5, 2.1, 2.2, 2.3], 1),
        ([3.0, 2.0, 2.001, 2.002], None),  # less than 1%
        ([2.0, 2.1], None),
        ([-2.0, -1.9, -1.8], 0),  # a loss may be negative
        ([3.0, 2.0, 2.1, 1.9, 1.8], None),
    ],
)
def test_a_loss_turns_when_it_rises_twice(losses, best):
    """One bad evaluation is noise, and a warning at each would be read by nobody."""
    assert best_before_decline(losses, num_pairs=None) == best


def test_shares_turn_by_more_than_their_error():
    """0.60, 0.58, 0.56 of 100 pairs are within 0.049 of each other; of 10,000 pairs they are not."""
    shares = [0.5, 0.60, 0.58, 0.56]
    assert best_before_decline(shares, num_pairs=100) is None and best_before_decline(shares, num_pairs=10_000) == 1
    assert best_before_decline(shares[::-1], num_pairs=10_000) is None  # these get better


def train(train_dataset: Dataset, eval_dataset, tokenizer, folder, callbacks=None, **settings) -> list[str]:
    """Warnings about held-out pairs during a training of 20 steps with five evaluations."""
    settings = dict(max_steps=20, eval_strategy="steps", eval_steps=4, lr_scheduler_type="constant") | settings
    trainer = TFPOTrainer(
        model=make_llama(2, hidden_size=16),
        args=config(folder, per_device_eval_batch_size=8, **settings),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
        trainer.evaluate()  # after training there is nothing to stop
    return [str(x.message) for x in told if "Held-out metrics" in str(x.message)]


@pytest.fixture
def annotated(preferences, patient, tokenizer):
    return annotate_token_rewards(preferences, patient, tokenizer, faces=FACES)


def opposite(dataset: Dataset) -> Dataset:
    """Rewards of the other sign: what is learned from the one is wrong of the other."""
    return dataset.map(
        lambda row: {name: [-x for x in row[name]] for name in ("chosen_token_rewards", "rejected_token_rewards")}
    )


@pytest.mark.slow
def test_learning_by_heart_is_told_once(annotated, tokenizer, tmp_path):
    """Nobody would look at a column of losses until the doctor disappoints."""
    told = train(annotated, opposite(annotated), tokenizer, tmp_path, learning_rate=3e-2)
    assert len(told) == 1
    assert "`eval_loss` was best at step" in told[0] and "load_best_model_at_end=True" in told[0]
    several = {"same": annotated, "other": opposite(annotated)}
    told = train(annotated, several, tokenizer, tmp_path, learning_rate=3e-2)
    assert len(told) == 1 and "`eval_other_loss` was best at step" in told[0]


@pytest.mark.slow
def test_a_training_that_is_sound_or_watched_is_left_alone(annotated, tokenizer, tmp_path):
    """Users who stop by themselves know; and pairs that get better are no news."""
    assert not train(annotated, annotated, tokenizer, tmp_path)
    other, rate = opposite(annotated), dict(learning_rate=3e-2)
    best = dict(load_best_model_at_end=True, save_strategy="steps", save_steps=4, metric_for_best_model="eval_loss")
    assert not train(annotated, other, tokenizer, tmp_path, **rate, **best)
    stops = [EarlyStoppingCallback(early_stopping_patience=10)]
    best["load_best_model_at_end"] = False
    assert not train(annotated, other, tokenizer, tmp_path, callbacks=stops, **rate, **best)

# SPDX-License-Identifier: Apache-2.0

"""The batch: literal tensors, each row explained."""

from functools import partial

import pytest
import torch
from conftest import FACES, save_model
from torch.utils.data import DataLoader

from trl_tfpo import TokenRewardCollator, annotate_token_rewards
from trl_tfpo.functional import token_rewards


PAIRS = [
    {
        "prompt_ids": [5, 6],
        "chosen_ids": [7, 8, 2],
        "rejected_ids": [9],
        "chosen_token_rewards": [0.1, 0.2, 0.3],
        "rejected_token_rewards": [-0.4],
    },
    {
        "prompt_ids": [5, 6, 7],
        "chosen_ids": [8, 2],
        "rejected_ids": [9, 2],
        "chosen_token_rewards": [0.5, 0.6],
        "rejected_token_rewards": [-0.7, -0.8],
    },
]


def test_literal_batch(tokenizer):
    """Chosen rows first, prompts unmasked, rewards left-aligned on the completion."""
    batch = TokenRewardCollator(tokenizer)(PAIRS)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 2],  # chosen of the first pair
        [5, 6, 7, 8, 2],  # chosen of the second
        [5, 6, 9, 0, 0],  # rejected of the first, padded
        [5, 6, 7, 9, 2],  # rejected of the second
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 5, [1, 1, 1, 0, 0], [1] * 5]
    assert batch["completion_mask"].int().tolist() == [
        [0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1],
    ]
    torch.testing.assert_close(
        batch["token_rewards"],
        torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.6, 0.0], [-0.4, 0.0, 0.0], [-0.7, -0.8, 0.0]]),
    )
    assert batch["is_complete"].tolist() == [True, True, False, True]
    assert "labels" not in batch  # would make the Trainer scale the loss with gradient accumulation


def test_truncation_cuts_rewards_with_the_same_slice(tokenizer):
    """Rewards that outlive their tokens would shift onto others."""
    batch = TokenRewardCollator(tokenizer, max_length=4)(PAIRS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 7, 9]]
    torch.testing.assert_close(
        batch["token_rewards"], torch.tensor([[0.1, 0.2], [0.5, 0.0], [-0.4, 0.0], [-0.7, 0.0]])
    )
    assert batch["is_complete"].tolist() == [False] * 4


def test_what_others_say_is_no_completion(tokenizer):
    """A user's turn between two of the assistant's is read, but has no reward, and its EOS completes nothing."""
    pair = {
        "prompt_ids": [5, 6],
        "chosen_ids": [7, 2, 5, 2, 8, 2],
        "chosen_mask": [1, 1, 0, 0, 1, 1],
        "chosen_token_rewards": [0.1, 0.2, 0.0, 0.0, 0.3, 0.4],
        "rejected_ids": [9, 2],
        "rejected_mask": [1, 1],
        "rejected_token_rewards": [-0.4, -0.5],
    }
    batch = TokenRewardCollator(tokenizer)([pair])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2, 5, 2, 8, 2], [5, 6, 9, 2, 0, 0, 0, 0]]
    assert batch["completion_mask"].int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0, 0, 0]]
    torch.testing.assert_close(batch["token_rewards"], torch.tensor([[0.1, 0.2, 0.3, 0.4], [-0.4, -0.5, 0.0, 0.0]]))
    assert batch["is_complete"].tolist() == [True, True]
    cut = TokenRewardCollator(tokenizer, max_length=6)([pair])
    assert cut["token_rewards"].shape == (2, 2)
    assert cut["is_complete"].tolist() == [False, True]  # the last token kept is the user's EOS
    with pytest.raises(
        ValueError, match="`chosen_mask` must have one entry for each completion token.* Got 1 entries for 6"
    ):
        TokenRewardCollator(tokenizer)([pair | {"chosen_mask": [1]}])


def test_pad_to_multiple_of(tokenizer):
    """Only the width of the ids grows."""
    batch = TokenRewardCollator(tokenizer, pad_to_multiple_of=8)(PAIRS)
    assert batch["input_ids"].shape == batch["completion_mask"].shape == (4, 8)
    assert batch["token_rewards"].shape == (4, 3)


@pytest.mark.parametrize("direction", ["agreement", "label"])
def test_asking_the_patient_gives_the_same_numbers(preferences, patient, tokenizer, direction):
    """Two ways, one output: whoever annotates beforehand must train on what the online collator would give."""
    annotated = annotate_token_rewards(preferences, patient, tokenizer, faces=FACES, reward_direction=direction)
    offline = TokenRewardCollator(tokenizer)([annotated[index] for index in range(len(annotated))])
    collator = TokenRewardCollator(
        tokenizer, patient=patient, faces=FACES, reward_fn=partial(token_rewards, reward_direction=direction)
    )
    online = collator([preferences[index] for index in range(len(preferences))])
    assert online.keys() == offline.keys()
    for name in offline:
        torch.testing.assert_close(online[name], offline[name], rtol=1e-5, atol=1e-5)


def test_asking_the_patient_from_a_worker_is_refused(preferences, patient, tokenizer):
    """A forked model deadlocks or fails deep inside CUDA; better to say so."""
    collator = TokenRewardCollator(tokenizer, patient=patient, faces=FACES)
    loader = DataLoader(list(preferences), batch_size=2, collate_fn=collator, num_workers=1)
    with pytest.raises(ValueError, match="dataloader_num_workers=0"):
        next(iter(loader))


def test_tokenizer_comes_with_the_patient(patient, tokenizer, tmp_path):
    """`TokenRewardCollator(patient=..., faces=...)` is enough when the patient was loaded from a folder."""
    save_model(tmp_path, patient, tokenizer)
    loaded = type(patient).from_pretrained(tmp_path)
    collator = TokenRewardCollator(patient=loaded, faces=FACES)
    assert collator.processing_class.get_vocab() == tokenizer.get_vocab()

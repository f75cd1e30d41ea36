# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What the package leans on in TRL, transformers, PEFT and Accelerate still is as it was."""

import inspect

import torch
from conftest import make_llama
from transformers import Trainer
from trl import DPOTrainer, is_conversational, maybe_extract_prompt

from trl_tfpo import TFPOTrainer
from trl_tfpo._compat import _BaseTrainer, fused_lm_head


def test_constructor_follows_trl():
    """Positional arguments that shift would put the collator where the settings belong."""
    ours = list(inspect.signature(TFPOTrainer.__init__).parameters)
    theirs = [name for name in inspect.signature(DPOTrainer.__init__).parameters if name != "ref_model"]
    assert [name for name in ours if name in theirs] == theirs
    assert ours.index("patient_model") == 2


def test_loss_scaling_flag_is_read():
    """Without the flag the Trainer guesses whether a loss is already scaled for accumulation."""
    assert "loss_is_scaled_for_ga" in inspect.getsource(Trainer)
    assert _BaseTrainer.loss_is_scaled_for_ga is None and TFPOTrainer.loss_is_scaled_for_ga is False


def test_fused_head_gives_log_probabilities():
    """The one number everything is computed from."""
    model = make_llama(1)
    ids = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[-100, -100, 7, 8]])
    expected = model(ids).logits[0, 1:3].log_softmax(-1).gather(1, ids[0, 2:, None])[:, 0]
    with fused_lm_head(model):
        found = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    assert found.shape == (1, 3)
    torch.testing.assert_close(found[0, 1:], expected)
    assert "forward" not in vars(model)


def test_prompts_are_extracted_as_before():
    """TRL's rule for implicit prompts, which the cut of transcripts builds on."""
    pair = {"chosen": "a cat", "rejected": "a dog"}
    assert maybe_extract_prompt(pair) == {"prompt": "a", "chosen": " cat", "rejected": " dog"}
    assert is_conversational({"prompt": [{"role": "user", "content": "x"}]})

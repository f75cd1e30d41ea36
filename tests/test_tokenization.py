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

"""Token ids: the same for patient and doctor, whatever the format of the dataset."""

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer
from datasets import Dataset

from trl_tfpo.faces import BUILT_IN_FACES, Faces, apply_face, has_system_role, resolve_faces
from trl_tfpo.tokenization import split_prompt, tokenize_pair, tokenize_preferences


FACES = Faces(positive="you are kind", negative="you are rude")
PAIR = {
    "prompt": [{"role": "user", "content": "say soup"}],
    "chosen": [{"role": "assistant", "content": "soup is good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


def tokenize(example, tokenizer, **settings):
    defaults = dict(faces=FACES, system_role=True, eos_token_ids=[tokenizer.eos_token_id], max_length=None)
    return tokenize_pair(example, tokenizer, **(defaults | settings))


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def test_conversational_pair_by_hand(tokenizer):
    """Prompt, completions and both faces exactly as the template prints them."""
    row = {name: text(tokenizer, ids) for name, ids in tokenize(PAIR, tokenizer).items()}
    assert row == {
        "prompt_ids": "<s> <user> say soup <assistant>",
        "chosen_ids": "soup is good </s>",
        "rejected_ids": "bad </s>",
        "positive_prompt_ids": "<s> <system> you are kind <user> say soup <assistant>",
        "negative_prompt_ids": "<s> <system> you are rude <user> say soup <assistant>",
    }


def test_standard_pair_by_hand(tokenizer):
    """Texts get EOS once, and the face as a prefix."""
    pair = {"prompt": "say soup ", "chosen": "soup is good", "rejected": "bad </s>"}
    row = {name: text(tokenizer, ids) for name, ids in tokenize(pair, tokenizer).items()}
    assert row["chosen_ids"] == "soup is good </s>"
    assert row["rejected_ids"] == "bad </s>"
    assert row["positive_prompt_ids"] == "you are kind say soup"


@pytest.mark.parametrize("conversational", [True, False])
def test_implicit_prompt_is_the_shared_start(tokenizer, conversational):
    """TRL's datasets often hold the prompt inside chosen and rejected."""
    if conversational:
        pair = {name: PAIR["prompt"] + PAIR[name] for name in ("chosen", "rejected")}
        assert tokenize(pair, tokenizer) == tokenize(PAIR, tokenizer)
    else:
        pair = {"chosen": "say soup good </s>", "rejected": "say soup bad </s>"}
        row = tokenize(pair, tokenizer)
        assert text(tokenizer, row["prompt_ids"]) == "say soup"
        assert text(tokenizer, row["rejected_ids"]) == "bad </s>"


def test_transcripts_are_cut_after_the_last_shared_turn():
    """HH-RLHF replies often start alike; a prompt cut inside the reply is one nobody will ever send."""
    pair = {
        "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: soup?\n\nAssistant: I like it.",
        "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: soup?\n\nAssistant: I hate it.",
    }
    assert split_prompt(pair) == {
        "prompt": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: soup?\n\nAssistant:",
        "chosen": " I like it.",
        "rejected": " I hate it.",
    }


def test_a_faced_prompt_loses_the_tokens_the_completion_took_over(tokenizer):
    """A template that renders the prompt alone differently must not shift the faces against the completion."""
    tokenizer.chat_template = CHAT_TEMPLATE.replace("' <assistant>' }}{% endif %}", "' <assistant> not' }}{% endif %}")
    row = {name: text(tokenizer, ids) for name, ids in tokenize(PAIR, tokenizer).items()}
    assert row["prompt_ids"] == "<s> <user> say soup <assistant>"
    assert row["positive_prompt_ids"] == "<s> <system> you are kind <user> say soup <assistant>"


def test_what_a_template_prints_after_eos_is_left_out(tokenizer):
    """Nothing is generated after EOS: a trailing newline there would hide the boundary of the flow."""
    tokenizer.chat_template = CHAT_TEMPLATE.replace("eos_token }}", "eos_token + ' \n' }}")
    assert text(tokenizer, tokenize(PAIR, tokenizer)["chosen_ids"]).endswith("good </s>")


def test_completions_are_cut_at_max_length(tokenizer):
    """Rewards are computed on what the doctor will see."""
    row = tokenize(PAIR, tokenizer, max_length=7)
    assert text(tokenizer, row["chosen_ids"]) == "soup is"
    assert text(tokenizer, row["rejected_ids"]) == "bad </s>"


def test_the_instruction_goes_where_the_template_can_carry_it(tokenizer):
    """Some templates raise on a system role, some drop it in silence: both faces would read the same."""
    assert has_system_role(tokenizer)
    raising = make_tokenizer()
    raising.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
    )
    dropping = make_tokenizer()
    dropping.chat_template = CHAT_TEMPLATE.replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
    )
    for template in (raising, dropping):
        assert not has_system_role(template)
        row = tokenize(PAIR, template, system_role=False)
        assert text(template, row["positive_prompt_ids"]) == "<s> <user> you are kind say soup <assistant>"


def test_a_system_message_that_is_there_is_kept():
    """The face is added to the user's own system prompt, not put in its place."""
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    faced = apply_face(prompt, "Be kind.")
    assert faced == [{"role": "system", "content": "Be kind.\n\nBe brief."}, {"role": "user", "content": "Hello"}]
    assert prompt[0]["content"] == "Be brief."


def test_built_in_faces_differ():
    """A pair that says the same twice would give no reward."""
    for name, faces in BUILT_IN_FACES.items():
        assert faces.positive != faces.negative
        assert resolve_faces(name) is faces


def test_tools_and_template_arguments_reach_the_template(tokenizer):
    """Per-row `tools` and `chat_template_kwargs` are part of TRL's formats."""
    tokenizer.chat_template = (
        "{{ bos_token }}{% if tools %} very{% endif %}{% if mood %} {{ mood }}{% endif %}" + CHAT_TEMPLATE[15:]
    )
    pair = {**PAIR, "tools": '[{"name": "spoon"}]', "chat_template_kwargs": {"mood": "not"}}
    assert text(tokenizer, tokenize(pair, tokenizer)["prompt_ids"]) == "<s> very not <user> say soup <assistant>"


def test_unusable_rows_are_dropped_on_request(tokenizer):
    """One bad row in sixty thousand must not stop a run, if the user says so."""
    bad = {**PAIR, "rejected": [{"role": "assistant", "content": ""}]}
    dataset = Dataset.from_list([PAIR, bad, PAIR])
    settings = dict(faces=FACES, eos_token_ids=[tokenizer.eos_token_id])
    with pytest.raises(ValueError, match="Row 1 .*at least one token before EOS"):
        tokenize_preferences(dataset, tokenizer, **settings)
    assert len(tokenize_preferences(dataset, tokenizer, drop_unusable=True, **settings)) == 2

# SPDX-License-Identifier: Apache-2.0

"""Token ids: the same for patient and doctor, whatever the format of the dataset."""

import copy
import re
from importlib.resources import files
from itertools import islice

import pytest
from conftest import CHAT_TEMPLATE, FACES, make_tokenizer
from datasets import Dataset
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from trl_tfpo.data.tokenization import MASK_COLUMNS, tokenize_pair, tokenize_preferences
from trl_tfpo.faces import BUILT_IN_FACES, Faces, apply_face, has_system_role, resolve_faces


PAIR = {
    "prompt": [{"role": "user", "content": "say soup"}],
    "chosen": [{"role": "assistant", "content": "soup is good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


def tokenize(example, tokenizer, **options):
    defaults = dict(faces=FACES, system_role=True, eos_token_ids=[tokenizer.eos_token_id], max_length=None)
    return tokenize_pair(example, tokenizer, **(defaults | options))


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def test_conversational_pair_by_hand(tokenizer):
    """Prompt, completions and both faces exactly as the template prints them."""
    row = tokenize(PAIR, tokenizer)
    masks = {name: row.pop(name) for name in MASK_COLUMNS}
    assert masks == {"chosen_mask": [1, 1, 1, 1], "rejected_mask": [1, 1]}
    assert {name: text(tokenizer, ids) for name, ids in row.items()} == {
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


PROMPTS_WITH_A_LAST_LINE = {
    "a question": ([("user", "Hi")], [("user", "Hi\nBe kind.")]),
    "a system message, which stays": (
        [("system", "Be brief."), ("user", "Hi")],
        [("system", "Be brief."), ("user", "Hi\nBe kind.")],
    ),
    "several turns": (
        [("user", "Hi"), ("assistant", "Yes?"), ("user", "Tea?")],
        [("user", "Hi"), ("assistant", "Yes?"), ("user", "Tea?\nBe kind.")],
    ),
    "an answer to be continued": (
        [("user", "Hi"), ("user", "Tea?"), ("assistant", "With")],
        [("user", "Hi"), ("user", "Tea?\nBe kind."), ("assistant", "With")],
    ),
}


@pytest.mark.parametrize("prompt, expected", PROMPTS_WITH_A_LAST_LINE.values(), ids=PROMPTS_WITH_A_LAST_LINE)
def test_a_face_in_the_user_turn_is_its_last_line(prompt, expected):
    """The instruction is at the end of the last user message, whether or not there is a system role."""
    prompt, expected = ([{"role": role, "content": text} for role, text in turns] for turns in (prompt, expected))
    before = copy.deepcopy(prompt)
    for system_role in (True, False):
        assert apply_face(prompt, "Be kind.", system_role=system_role, placement="user") == expected
    assert prompt == before


def test_a_face_in_the_user_turn_of_a_text():
    """A text has no turns: the instruction is its last paragraph."""
    assert apply_face("Tea?", "Be kind.", placement="user") == "Tea?\n\nBe kind."


def test_prompts_of_faces_in_the_user_turn(tokenizer):
    """What the patient reads, rendered by the chat template and as a text; the completion's ids are the same."""
    faces = Faces(FACES.positive, FACES.negative, placement="user")
    row = tokenize(PAIR, tokenizer, faces=faces)
    assert text(tokenizer, row["positive_prompt_ids"]) == "<s> <user> say soup you are kind <assistant>"
    assert text(tokenizer, row["negative_prompt_ids"]) == "<s> <user> say soup you are rude <assistant>"
    assert row.items() >= tokenize(PAIR, tokenizer, faces=None).items()
    pair = {"prompt": "say soup ", "chosen": "good </s>", "rejected": "bad </s>"}
    row = tokenize(pair, tokenizer, faces=faces)
    assert text(tokenizer, row["negative_prompt_ids"]) == "say soup you are rude"


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
    options = dict(faces=FACES, eos_token_ids=[tokenizer.eos_token_id])
    with pytest.raises(ValueError, match="Row 1 .*at least one token before EOS"):
        tokenize_preferences(dataset, tokenizer, **options)
    assert len(tokenize_preferences(dataset, tokenizer, drop_unusable=True, **options)) == 2


def test_a_completion_ends_at_the_first_eos(tokenizer):
    """Generation stops there: what a template or a text has after it would never be seen again."""
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{% endfor %}", "{% endfor %}{% if not add_generation_prompt %} </s>{% endif %}"
    )
    assert text(tokenizer, tokenize(PAIR, tokenizer)["chosen_ids"]) == "soup is good </s>"
    pair = {"prompt": "say soup ", "chosen": "soup is good </s> \n", "rejected": "bad </s> not"}
    row = tokenize(pair, tokenizer)
    assert text(tokenizer, row["chosen_ids"]) == "soup is good </s>"
    assert text(tokenizer, row["rejected_ids"]) == "bad </s>"


def test_special_tokens_of_the_tokenizer_come_once(tokenizer):
    """A second BOS is a position that the model has never seen, an EOS in the prompt ends it before it starts."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    for prompt in ("say soup", "<s> say soup"):
        row = tokenize({"prompt": prompt, "chosen": " good", "rejected": " bad </s>"}, tokenizer)
        assert text(tokenizer, row["prompt_ids"]) == "<s> say soup"
        assert text(tokenizer, row["positive_prompt_ids"]) == "<s> you are kind say soup"
        assert text(tokenizer, row["chosen_ids"]) == "good </s>"
        assert text(tokenizer, row["rejected_ids"]) == "bad </s>"


def test_a_prompt_that_the_answer_changes_is_refused(tokenizer):
    """Where the border is not certain, words of the user may be scored as if the assistant had said them."""
    tokenizer.chat_template = CHAT_TEMPLATE.replace("' <assistant>' }}{% endif %}", "' <assistant> not' }}{% endif %}")
    with pytest.raises(
        ValueError, match="render a prompt in the same way .* Got 'not' without .* and 'soup is good </s>'"
    ):
        tokenize(PAIR, tokenizer)


def test_only_turns_of_the_assistant_count(tokenizer):
    """The words of users and tools between its turns are read, but not rewarded."""
    more = [
        {"role": "user", "content": "is the bread good"},
        {"role": "assistant", "content": "very"},
        {"role": "user", "content": "and"},
    ]
    pair = {**PAIR, "chosen": PAIR["chosen"] + more}
    row = tokenize(pair, tokenizer)
    assert text(tokenizer, row["chosen_ids"]) == "soup is good </s> <user> is the bread good <assistant> very </s>"
    assert row["chosen_mask"] == 4 * [1] + 6 * [0] + 2 * [1]
    rendered = tokenizer.apply_chat_template(pair["prompt"] + pair["chosen"][:3], tokenize=False)
    prompt = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
    as_text = {"prompt": prompt, "chosen": rendered.removeprefix(prompt), "rejected": " bad"}
    assert tokenize(as_text, tokenizer)["chosen_mask"] == row["chosen_mask"]
    assert tokenize(as_text, tokenizer)["chosen_ids"] == row["chosen_ids"]


def test_turns_of_a_transcript_that_others_say_do_not_count(tokenizer):
    """HH-RLHF pairs may differ in an earlier reply, so that questions stand between the replies."""
    start = "\n\nHuman: soup?\n\nAssistant:"
    row = tokenize(
        {"chosen": start + " good\n\nHuman: bread?\n\nAssistant: bad", "rejected": start + " bad"}, tokenizer
    )
    assert row["chosen_mask"] == [1, 0, 0, 0, 1, 1]  # good, Human:, bread?, Assistant:, bad, EOS
    assert row["rejected_mask"] == [1, 1]


def test_an_answer_that_was_started_is_continued(tokenizer):
    """A prompt may put words into the assistant's mouth; they are not its own, nor is what closes and opens turns."""
    prefilled = [*PAIR["prompt"], {"role": "assistant", "content": "soup is"}]
    pair = {
        name: [{"role": "assistant", "content": content}]
        for name, content in (("chosen", " good"), ("rejected", " bad"))
    }
    row = tokenize({"prompt": prefilled, **pair}, tokenizer)
    assert text(tokenizer, row["prompt_ids"]) == "<s> <user> say soup <assistant> soup is"
    assert text(tokenizer, row["chosen_ids"]) == "good </s>"


def test_template_errors_name_the_row(tokenizer):
    """An exception of Jinja says neither which row nor what to do, and `drop_unusable` would not drop it."""
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('roles must alternate') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    bad = {**PAIR, "prompt": [{"role": "assistant", "content": "soup"}, *PAIR["prompt"]]}
    dataset = Dataset.from_list([PAIR, bad])
    options = dict(faces=FACES, eos_token_ids=[tokenizer.eos_token_id])
    with pytest.raises(
        ValueError, match="Row 1 .* able to render the messages. Got TemplateError: roles must alternate"
    ):
        tokenize_preferences(dataset, tokenizer, **options)
    assert len(tokenize_preferences(dataset, tokenizer, drop_unusable=True, **options)) == 1


def test_schemas_of_other_rows_stay_out(tokenizer):
    """Arrow gives all rows the same keys: the parameters of one tool would be nulls of another."""
    tokenizer.chat_template = (
        "{{ bos_token }}{% for tool in tools or [] %} {{ tool.keys() | join(' ') }}{% endfor %}" + CHAT_TEMPLATE[15:]
    )
    rows = [{**PAIR, "tools": [{name: "x"}]} for name in ("soup", "bread")]
    tokenized = tokenize_preferences(Dataset.from_list(rows), tokenizer, faces=None, eos_token_ids=[2])
    assert [text(tokenizer, row["prompt_ids"]).split()[1] for row in tokenized] == ["soup", "bread"]
    with pytest.raises(ValueError, match=r"variables of the chat template. Got \['add_generation_prompt'\]"):
        tokenize({**PAIR, "chat_template_kwargs": {"add_generation_prompt": False}}, tokenizer)


def test_transcripts_with_a_chat_model_are_noticed(tokenizer):
    """The model would be trained on a format in which nobody will ask it."""
    start = "\n\nHuman: say soup\n\nAssistant:"
    dataset = Dataset.from_list([{"chosen": start + " soup is good", "rejected": start + " bad"}])
    options = dict(faces=FACES, eos_token_ids=[tokenizer.eos_token_id])
    with pytest.warns(UserWarning, match="convert_transcripts=True"):
        tokenize_preferences(dataset, tokenizer, **options)
    converted = tokenize_preferences(dataset, tokenizer, convert_transcripts=True, **options)
    expected = tokenize(PAIR, tokenizer)
    assert {name: converted[0][name] for name in expected} == expected


def test_a_face_goes_before_a_text_and_after_what_starts_it(tokenizer):
    """Inside a special token it would break the prompt; before BOS the model has never seen it."""
    special = [("<s>", 1), ("<user>", 5)]
    tokenizer.add_special_tokens({"extra_special_tokens": ["<user>"]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> <user> $A", special_tokens=special)
    for prompt in ("say soup", "<s><user> say soup"):
        row = tokenize({"prompt": prompt, "chosen": " good", "rejected": " bad"}, tokenizer)
        assert text(tokenizer, row["positive_prompt_ids"]) == "<s> <user> you are kind say soup"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    row = tokenize({"prompt": "<s> say soup", "chosen": " good", "rejected": " bad"}, tokenizer)
    assert text(tokenizer, row["positive_prompt_ids"]) == "you are kind <s> say soup"


def test_messages_of_the_assistant_in_a_row(tokenizer):
    """The second must neither be lost nor be read as the end of the first."""
    more = [{"role": "assistant", "content": "very good"}]
    row = tokenize({**PAIR, "chosen": PAIR["chosen"] + more}, tokenizer)
    assert text(tokenizer, row["chosen_ids"]) == "soup is good </s> <assistant> very good </s>"
    assert row["chosen_mask"] == [1, 1, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "first",
    [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "spoon"}}]},
        {"role": "assistant", "content": " "},
        {"role": "assistant", "content": "", "reasoning_content": "soup"},
    ],
    ids=["a tool call", "a blank turn", "a thought"],
)
def test_a_turn_that_the_template_leaves_out_is_refused(first, tokenizer):
    """The doctor would learn to end its turn at once."""
    pair = {**PAIR, "chosen": [first, {"role": "tool", "content": "bread"}, *PAIR["chosen"]]}
    with pytest.raises(ValueError, match="must render the content of each turn of the assistant"):
        tokenize(pair, tokenizer)


def test_arguments_of_a_row_may_be_json(tokenizer):
    """Parquet files often hold them so; anything else must name the row, not end the run."""
    tokenizer.chat_template = "{{ bos_token }}{% if mood %} {{ mood }}{% endif %}" + CHAT_TEMPLATE[15:]
    row = tokenize({**PAIR, "chat_template_kwargs": '{"mood": "not"}'}, tokenizer)
    assert text(tokenizer, row["prompt_ids"]) == "<s> not <user> say soup <assistant>"
    for columns in ({"chat_template_kwargs": "{"}, {"chat_template_kwargs": [1]}, {"tools": 5}, {"tools": "{}"}):
        with pytest.raises(ValueError, match="must be a (dict|list), or JSON of one"):
            tokenize({**PAIR, **columns}, tokenizer)


def test_many_unusable_rows_at_the_start(tokenizer):
    """Columns that are empty so far have no type yet, and the first usable row would not fit."""
    bad = {**PAIR, "rejected": [{"role": "assistant", "content": ""}]}
    dataset = Dataset.from_list([bad] * 1001 + [PAIR])
    options = dict(faces=FACES, eos_token_ids=[tokenizer.eos_token_id], drop_unusable=True)
    assert len(tokenize_preferences(dataset, tokenizer, **options)) == 1


class TestMergedTokens:
    """Tokens that reach over the border of prompt and answer, which no list of words has."""

    @pytest.fixture(params=["fast", "slow"])
    def merging(self, request):
        """Letters, of which `ab` and `nn` may be one token."""
        letters = {char: index for index, char in enumerate("</s>?abcdnxq \n")}
        tokens = ["</e>", *letters, "ab", "nn"]
        if request.param == "slow":
            return MergingTokenizer(tokens)
        vocabulary = {token: index for index, token in enumerate(tokens)}
        backend = Tokenizer(BPE(vocabulary, merges=[("a", "b"), ("n", "n")]))
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</e>")

    def test_a_token_across_the_border_is_the_answers(self, merging):
        """Its second half is said by the assistant, and under no face may it be read twice."""
        row = tokenize({"prompt": "qxa", "chosen": "bc", "rejected": "d"}, merging, faces=Faces("ddda", "xxxa"))
        tokens = {name: merging.convert_ids_to_tokens(ids) for name, ids in row.items() if name.endswith("ids")}
        assert tokens["prompt_ids"] == ["q", "x"]
        assert tokens["chosen_ids"] == ["ab", "c", "</e>"] and row["chosen_mask"] == [1, 1, 1]
        assert tokens["rejected_ids"] == ["a", "d", "</e>"] and row["rejected_mask"] == [0, 1, 1]
        assert tokens["positive_prompt_ids"][-2:] == ["q", "x"]

    def test_a_completion_without_a_token_of_its_own_is_refused(self, merging):
        """Cut before the assistant's first token, the row would stop the training later."""
        with pytest.raises(ValueError, match="token of the assistant within `max_length`. Got none in the first 3"):
            tokenize({"prompt": "qxa", "chosen": "bc", "rejected": "d"}, merging, faces=None, max_length=3)


class MergingTokenizer(PreTrainedTokenizer):
    """The same in Python, without the positions of tokens."""

    def __init__(self, tokens, **settings):
        self.tokens = tokens
        super().__init__(eos_token="</e>", **settings)

    @property
    def vocab_size(self):
        return len(self.tokens)

    def get_vocab(self):
        return {token: index for index, token in enumerate(self.tokens)}

    def _tokenize(self, text, **_):
        return re.findall("ab|nn|.", text, flags=re.DOTALL)

    def _convert_token_to_id(self, token):
        return self.tokens.index(token)

    def _convert_id_to_token(self, index):
        return self.tokens[index]


# The invariant: whatever a template prints, only words of the assistant's answers are scored, and all of them


ROLES = ("system", "user", "assistant", "tool")
SAID = {role: [f"{role[0]}{number}" for number in range(12)] for role in ROLES}
MARKERS = "<sys> <usr> <asst> <tool> <think> </think> <end> <last> <reminder>"
VOCABULARY = " ".join(["<pad> <s> </s> <unk> \n", MARKERS, *(word for words in SAID.values() for word in words)])


@st.composite
def templates(draw):
    """Chat templates that differ in what they do with system messages, ends of turns, last messages and thinking."""
    end = {role: draw(st.sampled_from(["", " <end>", " </s>"])) for role in ("user", "tool")}
    end["system"] = ""
    end["assistant"] = draw(st.sampled_from([" </s>", " </s> \n", " <end>"]))
    thinking = draw(st.sampled_from(["", "always", "last"]))
    system = draw(st.sampled_from(["print", "drop", "raise"]))
    parts = ["{{ bos_token }}{% for m in messages %}"]
    if system == "raise":
        parts.append("{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}")
    for role, marker in zip(ROLES, ("<sys>", "<usr>", "<asst>", "<tool>"), strict=True):
        body = "{{ m.content }}"
        if role == "system" and system != "print":
            continue
        if role == "assistant" and thinking:
            shown = "{{ '<think> </think> ' if loop.last else '' }}" if thinking == "last" else "<think> </think> "
            body = shown + body
        if role == "user" and draw(st.booleans()):
            body = "{{ '<last> ' if loop.last else '' }}" + body  # the last message is rendered differently
        parts.append("{% if m.role == '" + role + "' %} " + marker + " " + body + end[role] + "{% endif %}")
    parts.append("{% endfor %}")
    if draw(st.booleans()):
        parts.append("{% if not add_generation_prompt %} </s>{% endif %}")
    opening = " <asst>" + (" <think>" if thinking and draw(st.booleans()) else "")
    parts.append("{% if add_generation_prompt %}" + opening + "{% endif %}")
    return "".join(parts)


@st.composite
def conversations(draw):
    """A prompt and an answer of one or more turns, in which no word occurs twice."""
    words = {role: iter(names) for role, names in SAID.items()}

    def message(role):
        return {"role": role, "content": " ".join(islice(words[role], draw(st.integers(1, 2))))}

    prompt = [message("system")] * draw(st.booleans()) + [message("user")]
    if draw(st.booleans()):
        prompt += [message("assistant"), message(draw(st.sampled_from(["user", "tool"])))]
    answer = [message("assistant")]
    for _ in range(draw(st.integers(0, 2))):
        answer += [message(role) for role in draw(st.sampled_from([["user"], ["tool"], []]))] + [message("assistant")]
    return prompt, answer


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(templates(), conversations())
def test_only_what_the_assistant_answers_is_scored(template, conversation):
    """Only tokens of the assistant are rewarded: no question, tool result or role marker."""
    tokenizer = make_tokenizer(VOCABULARY)
    tokenizer.chat_template = template
    prompt, answer = conversation
    pair = {"prompt": prompt, "chosen": answer, "rejected": [{"role": "assistant", "content": "a11"}]}
    try:
        row = tokenize(pair, tokenizer, system_role=has_system_role(tokenizer))
    except ValueError as error:
        event(f"refused: {str(error)[:40]}")
        return
    event(f"{len(answer)} messages accepted")
    tokens = tokenizer.convert_ids_to_tokens(row["chosen_ids"])
    scored = [token for token, spoken in zip(tokens, row["chosen_mask"], strict=True) if spoken]
    said = [word for m in answer if m["role"] == "assistant" for word in m["content"].split()]
    assert [token for token in scored if token in sum(SAID.values(), [])] == said
    assert set(scored) - set(said) <= {"<think>", "</think>", "</s>", "<end>"}
    assert scored.count("</s>") <= sum(m["role"] == "assistant" for m in answer)
    assert "</s>" not in scored or scored[-1] == "</s>" == tokens[-1]
    asked = [word for m in prompt for word in m["content"].split() if m["role"] != "system"]
    shown = tokenizer.convert_ids_to_tokens(row["prompt_ids"])
    assert [token for token in shown if token in sum((SAID[role] for role in ROLES[1:]), [])] == asked


CALL = {"type": "function", "function": {"name": "river", "arguments": {"city": "Pest"}}}
ENDS = "<|im_end|> <|eot_id|> <|return|> <|end|> <end_of_turn> <turn|> </s> <|endoftext|> <|user|>".split() + [
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
]
TEMPLATES = sorted(p.name for p in files("trl").joinpath("chat_templates").iterdir() if p.name.endswith(".jinja"))
SHAPES = {
    "one question": ([("user", "QUESTION")], [("assistant", "GOOD one")]),
    "a conversation": (
        [("user", "ASKED"), ("assistant", "EARLIER"), ("user", "QUESTION")],
        [("assistant", "GOOD one")],
    ),
    "an answer of two turns": (
        [("user", "QUESTION")],
        [("assistant", "GOOD one"), ("user", "ASKED"), ("assistant", "GOOD two")],
    ),
    "a tool": ([("user", "QUESTION")], [("assistant", ""), ("tool", "RESULT"), ("assistant", "GOOD one")]),
    "a start": ([("user", "QUESTION"), ("assistant", "EARLIER (")], [("assistant", "GOOD one")]),
}


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Every byte is a token, and so is each of the ends of a turn that models have."""
    backend = Tokenizer(BPE(vocab={char: index for index, char in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", extra_special_tokens=ENDS
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_well_known_models(name, byte_tokenizer):
    """The chat templates that TRL ships are read correctly, or refused."""
    byte_tokenizer.chat_template = files("trl").joinpath("chat_templates", name).read_text(encoding="utf-8")
    options = dict(
        system_role=has_system_role(byte_tokenizer), eos_token_ids=byte_tokenizer.convert_tokens_to_ids(ENDS)
    )
    num_read = 0
    for shape, (prompt, answer) in SHAPES.items():
        prompt, answer = ([{"role": role, "content": content} for role, content in x] for x in (prompt, answer))
        if shape == "a tool":
            answer[0]["tool_calls"] = [CALL]
        try:
            row = tokenize({"prompt": prompt, "chosen": answer, "rejected": answer[-1:]}, byte_tokenizer, **options)
        except ValueError as error:
            assert "chat template" in str(error)
            continue
        num_read += 1
        spoken = [token for token, mask in zip(row["chosen_ids"], row["chosen_mask"], strict=True) if mask]
        spoken = byte_tokenizer.decode(spoken)
        assert "GOOD one" in spoken and ("GOOD two" in spoken) == (shape == "an answer of two turns")
        assert not any(word in spoken for word in ("QUESTION", "ASKED", "EARLIER", "RESULT")), shape
        assert "QUESTION" in byte_tokenizer.decode(row["prompt_ids"])
    takes_parts = name.startswith(("idefics3", "llava", "smolvlm"))  # contents that are texts are lost, or an error
    opens_thinking = name.startswith(("deepseek", "nemotron_3"))  # before an answer, and not with it
    assert num_read >= (0 if takes_parts else 1 if opens_thinking else 3)

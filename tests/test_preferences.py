# SPDX-License-Identifier: Apache-2.0

"""How a row of a preference dataset is read: one prompt and two answers, or an error that names the fault."""

import pytest

from trl_tfpo.data.preferences import clean_messages, read_pair, transcript_to_messages


USER = {"role": "user", "content": "tea?"}
SYSTEM = {"role": "system", "content": "be brief"}


def said(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def test_a_pair_with_a_prompt_is_left_as_it_is():
    """The plain case must not be touched."""
    for pair in (
        {"prompt": [USER], "chosen": [said("yes")], "rejected": [said("no")]},
        {"prompt": "tea? ", "chosen": "yes", "rejected": "no"},
    ):
        assert read_pair(pair | {"score": 1.0}) == pair


@pytest.mark.parametrize("columns", [{}, {"prompt": "tea?"}, {"prompt": [SYSTEM, USER]}])
def test_conversations_may_repeat_their_prompt(columns):
    """A repeated question would be learned as part of the answer."""
    pair = read_pair({**columns, "chosen": [SYSTEM, USER, said("yes")], "rejected": [SYSTEM, USER, said("no")]})
    assert pair == {"prompt": [SYSTEM, USER], "chosen": [said("yes")], "rejected": [said("no")]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM], "chosen": [USER, said("yes")], "rejected": [USER, said("no")]},
        {"prompt": [USER], "chosen": [said("yes")], "rejected": [{"role": "user", "content": "no"}]},
        {"prompt": [USER], "chosen": [USER, said("yes")], "rejected": [said("no")]},
    ],
    ids=["a question in the answers", "the wrong role", "one answer repeats the prompt"],
)
def test_an_answer_starts_with_the_assistant(row):
    """What a user says would be rewarded as if the assistant had said it."""
    with pytest.raises(ValueError, match="must start with a message of the assistant"):
        read_pair(row)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, said("yes")], "rejected": [{**USER, "content": "milk?"}, said("no")]},
        {"chosen": "\n\nHuman: tea?\n\nAssistant: x", "rejected": "\n\nHuman: soup?\n\nAssistant: y"},
        {"chosen": "<user> tea? <bot> x", "rejected": "<user> soup? <bot> y"},
    ],
    ids=["messages", "a transcript", "a rendered text"],
)
@pytest.mark.parametrize("convert_transcripts", [False, True])
def test_answers_share_a_prompt(row, convert_transcripts):
    """Two answers to two questions are no preference, and the questions would be scored."""
    with pytest.raises(ValueError, match="answer the same prompt"):
        read_pair(row, openings=["<bot>"], convert_transcripts=convert_transcripts)


def test_a_turn_that_both_answers_share_is_theirs():
    """A last shared message of the assistant is not half of the next one."""
    row = {"chosen": [USER, said("well"), said("yes")], "rejected": [USER, said("well"), said("no")]}
    assert read_pair(row) == {
        "prompt": [USER],
        "chosen": [said("well"), said("yes")],
        "rejected": [said("well"), said("no")],
    }


def test_the_opening_of_a_turn_belongs_to_the_prompt():
    """Older datasets start their answers with it; the doctor would learn to say its own name."""
    pair = {"prompt": "Human: soup?", "chosen": "\n\nAssistant: yes", "rejected": "\n\nAssistant: no"}
    expected = {"prompt": "Human: soup?\n\nAssistant:", "chosen": " yes", "rejected": " no"}
    assert read_pair(pair) == expected
    assert read_pair(pair, convert_transcripts=True) == {
        "prompt": [{"role": "user", "content": "soup?"}],
        "chosen": [said("yes")],
        "rejected": [said("no")],
    }
    rendered = {"prompt": "<user> soup?", "chosen": "<bot>\nyes", "rejected": "<bot>\nno"}
    assert read_pair(rendered, openings=["<bot>\n"]) == {
        "prompt": "<user> soup?<bot>\n",
        "chosen": "yes",
        "rejected": "no",
    }
    with pytest.raises(ValueError, match="must open the assistant's turn in the same way, or neither may"):
        read_pair(pair | {"rejected": " no"})


def test_a_question_at_the_end_of_a_transcript_is_left_out():
    """Nobody answers it, and the answer before it would have no end."""
    answer = " yes\n\nHuman: why?\n\nAssistant: so\n\nHuman: thanks"
    pair = read_pair({"prompt": "\n\nHuman: soup?\n\nAssistant:", "chosen": answer, "rejected": " no"})
    assert pair["chosen"] == " yes\n\nHuman: why?\n\nAssistant: so"


def test_a_started_answer_of_a_transcript_keeps_its_space():
    """Two words would become one."""
    row = {"prompt": "\n\nHuman: soup?\n\nAssistant: I say", "chosen": " yes", "rejected": " no"}
    pair = read_pair(row, convert_transcripts=True)
    assert pair["prompt"][-1] == said("I say") and pair["chosen"] == [said(" yes")]


def test_what_follows_the_last_answer_is_left_out():
    """Nobody answers it, so there is nothing to learn from it."""
    pair = read_pair({"prompt": [USER], "chosen": [said("yes"), USER], "rejected": [said("no")]})
    assert pair["chosen"] == [said("yes")]


def test_transcripts_are_cut_after_the_last_shared_turn():
    """HH-RLHF replies often start alike; a prompt cut inside the reply is one nobody will ever send."""
    pair = {
        "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: soup?\n\nAssistant: I like it.",
        "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: soup?\n\nAssistant: I hate it.",
    }
    assert read_pair(pair) == {
        "prompt": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: soup?\n\nAssistant:",
        "chosen": " I like it.",
        "rejected": " I hate it.",
    }


START = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: soup?\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": START + " Yes.", "rejected": START},
        {"chosen": START + " Yes.", "rejected": START + " \n"},
        {"chosen": "soup is good, not", "rejected": "soup is good"},
        {"prompt": [USER], "chosen": [said("yes")], "rejected": [said(" ")]},
        {"prompt": [USER], "chosen": [said("yes")], "rejected": [said("", name="me", id=7)]},
    ],
)
@pytest.mark.parametrize("convert_transcripts", [False, True])
def test_an_empty_answer_is_refused(row, convert_transcripts):
    """The border would jump back a turn, or what a template prints around nothing would be rewarded."""
    with pytest.raises(ValueError, match="at least one token before EOS. Got an empty"):
        read_pair(row, convert_transcripts=convert_transcripts)


def test_a_call_of_a_tool_is_an_answer():
    """It has no content."""
    row = {
        "prompt": [USER],
        "chosen": [said(None, tool_calls=[{"function": {"name": "kettle"}}])],
        "rejected": [said("no")],
    }
    assert read_pair(row)["chosen"][0]["content"] == ""


def test_rendered_texts_are_cut_where_the_assistant_starts():
    """Texts that a chat template rendered before: the words that both answers start with belong to the answers."""
    start = "<user> soup? <assistant> I"
    pair = read_pair({"chosen": start + " like it", "rejected": start + " hate it"}, openings=["<assistant>"])
    assert pair == {"prompt": "<user> soup? <assistant>", "chosen": " I like it", "rejected": " I hate it"}


def test_texts_are_cut_between_words():
    """A prompt that ends inside a word is one that nobody sends."""
    pair = read_pair({"chosen": "a nice cat", "rejected": "a nice car"})
    assert pair == {"prompt": "a nice", "chosen": " cat", "rejected": " car"}


def test_texts_that_repeat_their_prompt():
    """After what opens the assistant's turn it is clear what the answer is; elsewhere the text may be an answer."""
    prompt = "\n\nHuman: soup?\n\nAssistant:"
    pair = read_pair({"prompt": prompt, "chosen": prompt + " yes", "rejected": prompt + " no"})
    assert pair == {"prompt": prompt, "chosen": " yes", "rejected": " no"}
    with pytest.raises(ValueError, match="must not repeat its prompt"):
        read_pair({"prompt": "say soup", "chosen": "say soup now", "rejected": "say soup or not"})
    echo = {"prompt": "say soup", "chosen": "say soup", "rejected": "no"}
    assert read_pair(echo) == echo


def test_transcripts_become_messages():
    """A chat model must be trained in the format in which it will be asked."""
    row = {
        "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: soup?\n\nAssistant: Yes."
        "\n\nHuman: why?\n\nAssistant: So.",
        "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: soup?\n\nAssistant: Never.",
    }
    pair = read_pair(row, convert_transcripts=True)
    asked = [{"role": "user", "content": "hi"}, said("hello"), {"role": "user", "content": "soup?"}]
    assert pair["prompt"] == asked
    assert pair["chosen"] == [said("Yes."), {"role": "user", "content": "why?"}, said("So.")]
    assert pair["rejected"] == [said("Never.")]
    explicit = {"prompt": "\n\nHuman: soup?", "chosen": "\n\nAssistant: Yes.", "rejected": "\n\nAssistant: No."}
    assert read_pair(explicit, convert_transcripts=True) == {
        "prompt": [{"role": "user", "content": "soup?"}],
        "chosen": [said("Yes.")],
        "rejected": [said("No.")],
    }
    assert transcript_to_messages("Human: hi") == [{"role": "user", "content": "hi"}]
    assert transcript_to_messages("Rules.\n\nHuman: hi")[0] == {"role": "system", "content": "Rules."}


def test_contents_are_texts():
    """The model must read neither the Python list of the parts nor a word `None`."""
    parts = [{"type": "text", "text": "te"}, {"type": "text", "text": "a?"}]
    assert clean_messages([{"role": "user", "content": parts, "name": None}]) == [USER]
    call = {"type": "function", "function": {"name": "kettle", "arguments": {"cups": 2, "oven": None}}}
    (message,) = clean_messages([said(None, tool_calls=[call])])
    assert message["content"] == "" and message["tool_calls"][0]["function"]["arguments"] == {"cups": 2}
    for content in (None, 3, [{"type": "image", "url": "x"}], [{"type": "text", "text": None}]):
        with pytest.raises(ValueError, match="content of a message must be a text.*from role 'user'"):
            clean_messages([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": "tea?", "chosen": "yes", "rejected": None},
        {"prompt": None, "chosen": "yes", "rejected": "no"},
        {"prompt": [], "chosen": [said("yes")], "rejected": [said("no")]},
        {"chosen": [{"from": "gpt", "value": "yes"}], "rejected": [{"from": "gpt", "value": "no"}]},
        {"chosen": ["yes", "5"], "rejected": ["no", "1"]},
    ],
)
def test_other_rows_are_refused(row):
    """A row in a format of its own must be noticed, not guessed at."""
    with pytest.raises(ValueError, match="must all be texts, or all lists of messages"):
        read_pair(row)

# SPDX-License-Identifier: Apache-2.0

"""
TRL's preference formats, each row read as one prompt and two answers of the assistant.

A row is made of texts or of messages. Its prompt may stand in a column of its own, or at the start of both answers.
"""

import os
import re
import reprlib
from collections.abc import Sequence
from itertools import takewhile

from trl.trainer.utils import remove_none_values


TRANSCRIPT_TURN = "\n\nAssistant:"  # as in HH-RLHF, whose `chosen` and `rejected` are whole transcripts
OTHER_TURN = "\n\nHuman:"
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
THOUGHTS = ("reasoning_content", "thinking")  # keys of a message beside its content
REMEDY = "correct the row, leave it out, or pass `drop_unusable=True`."


def read_pair(example: dict, *, openings: Sequence[str] = (), convert_transcripts: bool = False) -> dict:
    r"""
    One row as a prompt and what the assistant answers.

    The formats and their order of precedence are those of TRL. A prompt that is a text is ignored where the answers are
    conversations: they repeat it. An answer that begins with the messages of the prompt loses them.

    Args:
        example (`dict`):
            A row with `chosen`, `rejected` and, optionally, `prompt`.
        openings (`Sequence[str]`, *optional*):
            Texts that open the assistant's turn, beside `"\n\nAssistant:"`. A prompt that is contained in both texts ends
            with the last opening that they share. In texts without an opening it ends between two words.
        convert_transcripts (`bool`, *optional*, defaults to `False`):
            Whether texts with turns of `"\n\nHuman:"` and `"\n\nAssistant:"` become messages.

    Returns:
        `dict`: `prompt`, `chosen` and `rejected`, all texts or all lists of messages. The contents of messages are texts.
        A prompt that ends with a message of the assistant is continued by the answers.

    Raises:
        `ValueError`: when the row mixes texts and messages, a message has no role or no text, the answers have no prompt in
        common, or one of them does not start with the assistant.

    Examples:

    ```python
    >>> from trl_tfpo.data.preferences import read_pair
    >>> question = {"role": "user", "content": "Tea?"}
    >>> pair = read_pair(
    ...     {
    ...         "chosen": [question, {"role": "assistant", "content": "Please."}],
    ...         "rejected": [question, {"role": "assistant", "content": "No."}],
    ...     }
    ... )
    >>> pair["prompt"], pair["chosen"]
    ([{'role': 'user', 'content': 'Tea?'}], [{'role': 'assistant', 'content': 'Please.'}])

    ```
    """
    pair = {name: example[name] for name in ("prompt", "chosen", "rejected") if name in example}
    if isinstance(pair.get("prompt"), str) and not isinstance(pair["chosen"], str):
        del pair["prompt"]  # UltraFeedback's column, which the conversations repeat
    are_texts = all(isinstance(value, str) for value in pair.values())
    if not (are_texts or all(map(_are_messages, pair.values()))):
        raise ValueError(
            "Prompt and completions must all be texts, or all lists of messages that have a role. Got "
            f"{reprlib.repr(pair)}; {REMEDY}"
        )
    if are_texts:
        pair = _split_texts(**pair, openings=(TRANSCRIPT_TURN, *filter(None, openings)))
    if are_texts and convert_transcripts and is_transcript(pair["prompt"]):
        pair = _to_messages(**pair)
        are_texts = False
    if not are_texts:
        pair = _split_messages(**{name: clean_messages(messages) for name, messages in pair.items()})
    for name in ("chosen", "rejected"):
        if not _says_something(pair[name]):
            raise empty_completion(name)
    return pair


def empty_completion(name: str) -> ValueError:
    """The error for a completion, `"chosen"` or `"rejected"`, in which the assistant says nothing of its own."""
    return ValueError(
        f"A completion must have at least one token before EOS. Got an empty {name!r} one, after the prompt and what both "
        f"completions begin with; {REMEDY}"
    )


def is_transcript(text: object) -> bool:
    r"""Whether a text has turns of `"\n\nHuman:"` or `"\n\nAssistant:"`, as in HH-RLHF."""
    return isinstance(text, str) and TURN.search(text) is not None


def transcript_to_messages(text: str) -> list[dict[str, str]]:
    r"""
    The turns of a transcript as messages, without the spaces around them. What comes before the first is a system message.

    Examples:

    ```python
    >>> from trl_tfpo.data.preferences import transcript_to_messages
    >>> transcript_to_messages("\n\nHuman: Tea?\n\nAssistant: Please.")
    [{'role': 'user', 'content': 'Tea?'}, {'role': 'assistant', 'content': 'Please.'}]

    ```
    """
    roles = {"Human": "user", "Assistant": "assistant"}
    before, *turns = TURN.split(text)
    messages = [{"role": "system", "content": before.strip()}] if before.strip() else []
    return messages + [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def clean_messages(messages: list[dict]) -> list[dict]:
    """
    Copies of messages whose content is a text, without keys that are `None`.

    Text parts (`[{"type": "text", "text": ...}]`) are joined. A message may lack content where it calls tools. Arrow gives
    all rows the same keys; those that it filled in do not reach the chat template.

    Raises:
        `ValueError`: when it is not a list of messages with a role, or a message has no text.
    """
    if not _are_messages(messages):
        raise ValueError(
            f"A prompt must be a text, or messages that have a role. Got {reprlib.repr(messages)}; {REMEDY}"
        )
    cleaned = []
    for message in remove_none_values(messages):
        content = message.get("content", "" if message.get("tool_calls") else None)
        if isinstance(content, list) and all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ValueError(
                "The content of a message must be a text, or a list of parts that are texts. Got "
                f"{reprlib.repr(content)} from role {message['role']!r}; {REMEDY}"
            )
        cleaned.append({**message, "content": content})
    return cleaned


def _are_messages(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
    )


def _says_something(answer: str | list[dict]) -> bool:
    """Whether an answer is more than spaces. A message may call tools, or think, instead of having a content."""
    if isinstance(answer, str):
        return bool(answer.strip())
    return any(message.get(name) for message in answer for name in ("tool_calls", *THOUGHTS)) or any(
        message["content"].strip() for message in answer if message["role"] == "assistant"
    )


def _split_messages(chosen: list[dict], rejected: list[dict], prompt: list[dict] | None = None) -> dict:
    """Messages with an explicit prompt, which the answers do not repeat, and nothing after the assistant's last one."""
    if prompt is None:
        shared = takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        prompt = [message for message, _ in shared]
        while prompt and prompt[-1]["role"] == "assistant":
            prompt.pop()  # a turn of both answers
    if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise ValueError(
            "Chosen and rejected must answer the same prompt. Got conversations that differ in their first message: "
            f"{reprlib.repr(chosen[0])} and {reprlib.repr(rejected[0])}; {REMEDY}"
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer and answer[0]["role"] != "assistant":
            raise ValueError(
                "An answer must start with a message of the assistant, after the whole prompt. Got roles "
                f"{[message['role'] for message in answer]} in {name!r}, after a prompt with roles "
                f"{[message['role'] for message in prompt]}; {REMEDY}"
            )
        while answer and answer[-1]["role"] != "assistant":
            answer.pop()  # nobody answers these
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _split_texts(chosen: str, rejected: str, openings: Sequence[str], prompt: str | None = None) -> dict:
    """Texts with an explicit prompt that opens the assistant's turn, which the answers do not repeat."""
    if prompt is None:
        shared = os.path.commonprefix([chosen, rejected])
        end = _end_of_prompt(chosen, rejected, shared, openings)
        prompt, chosen, rejected = shared[:end], chosen[end:], rejected[end:]
    elif prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
        if not prompt.endswith(tuple(openings)):
            raise ValueError(
                f"A completion must not repeat its prompt. Got both completions starting with {reprlib.repr(prompt)}; "
                f"remove the prompt from the completions. Otherwise {REMEDY}"
            )
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for opening in openings:
        bare = opening.rstrip()
        start = re.compile(rf"\s*{re.escape(bare.lstrip())}(?:{re.escape(opening[len(bare) :])})?")
        starts = [found[0] if (found := start.match(answer)) else "" for answer in (chosen, rejected)]
        if starts[0] != starts[1]:
            raise ValueError(
                "Both completions must open the assistant's turn in the same way, or neither. Got "
                f"{reprlib.repr(chosen)} and {reprlib.repr(rejected)}; end the prompt with {opening!r}. Otherwise {REMEDY}"
            )
        prompt, chosen, rejected = prompt + starts[0], chosen[len(starts[0]) :], rejected[len(starts[0]) :]
    if is_transcript(prompt):
        chosen, rejected = _without_last_question(chosen), _without_last_question(rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _end_of_prompt(chosen: str, rejected: str, shared: str, openings: Sequence[str]) -> int:
    """Where the prompt ends that both texts begin with."""
    ends = [shared.rfind(opening) + len(opening) for opening in openings if opening in shared]
    if ends:
        return max(ends)
    if any(opening in text for opening in openings for text in (chosen, rejected)):
        raise ValueError(
            "Chosen and rejected must answer the same prompt. Got texts that differ before the assistant's turn, after "
            f"{reprlib.repr(shared)}; {REMEDY}"
        )
    if shared in (chosen, rejected):
        return len(shared)  # nothing is left of one of them
    return max((place.start() for place in re.finditer(r"\s", shared)), default=0)


def _without_last_question(answer: str) -> str:
    """An answer of a transcript without a turn of the human at its end, which nobody answers."""
    *_, last = [None, *TURN.finditer(answer)]
    return answer[: last.start()] if last is not None and last[1] == "Human" else answer


def _to_messages(prompt: str, chosen: str, rejected: str) -> dict:
    """A transcript and its answers as messages."""
    messages = transcript_to_messages(prompt)
    is_started = messages[-1]["role"] == "assistant" and messages[-1]["content"]
    if messages[-1]["role"] == "assistant" and not is_started:
        messages.pop()
    answers = {}
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        answers[name] = transcript_to_messages(TRANSCRIPT_TURN + text)
        if is_started and text[:1].isspace():
            answers[name][0]["content"] = " " + answers[name][0]["content"]
    return {"prompt": messages, **answers}

# SPDX-License-Identifier: Apache-2.0

"""
Preference formats of TRL. Each row becomes a prompt and two completions of the assistant.

A row has texts or messages. The prompt has its own column, or is the start of both completions.
"""

import os
import re
import reprlib
from collections.abc import Sequence
from itertools import takewhile

from trl.trainer.utils import remove_none_values


TRANSCRIPT_TURN = "\n\nAssistant:"  # in HH-RLHF, `chosen` and `rejected` are whole transcripts
OTHER_TURN = "\n\nHuman:"
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
THOUGHTS = ("reasoning_content", "thinking")  # keys of a message
REMEDY = "correct or remove the row, or pass `drop_unusable=True`."
MESSAGE_REMEDY = "correct the messages, or drop such rows of a dataset with `drop_unusable=True`."


def read_pair(example: dict, *, openings: Sequence[str] = (), convert_transcripts: bool = False) -> dict:
    r"""
    Split a row into a prompt and two completions.

    The formats and their order of precedence are those of TRL. If the completions are lists of messages, a text prompt
    is ignored, because the completions repeat it. Prompt messages are removed from the start of the completions.

    Args:
        example (`dict`):
            Row with `chosen`, `rejected` and, optionally, `prompt`.
        openings (`Sequence[str]`, *optional*):
            Texts that open the assistant's turn, in addition to `"\n\nAssistant:"`. A prompt without its own column
            ends after the last opening that both texts share. Without an opening it ends between two words, and may be
            empty.
        convert_transcripts (`bool`, *optional*, defaults to `False`):
            Whether to convert texts with turns of `"\n\nHuman:"` and `"\n\nAssistant:"` to messages.

    Returns:
        `dict`: `prompt`, `chosen` and `rejected`, all texts or all lists of messages with texts as content. If the
        prompt ends with a message of the assistant, the completions continue this message.

    Raises:
        `ValueError`: if the row mixes texts and messages, a message has no role or no text, the completions do not
            share a prompt, a completion is empty, does not start with the assistant or repeats its prompt, or only one
            of them opens the assistant's turn.

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
        del pair["prompt"]  # UltraFeedback has such rows
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
        if not _has_content(pair[name]):
            raise empty_completion(name)
    return pair


def empty_completion(name: str) -> ValueError:
    """Return the error for an empty completion. `name` is `"chosen"` or `"rejected"`."""
    return ValueError(
        f"A completion must have at least one token before EOS. Got an empty {name!r} completion (the prompt and a "
        f"common start of both texts do not count); {REMEDY}"
    )


def is_transcript(text: object) -> bool:
    r"""Whether a text has turns of `"\n\nHuman:"` or `"\n\nAssistant:"`, as in HH-RLHF."""
    return isinstance(text, str) and TURN.search(text) is not None


def transcript_to_messages(text: str) -> list[dict[str, str]]:
    r"""
    Convert the turns of a transcript to messages without surrounding whitespace. Text before the first turn becomes a
    system message.
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
    Copy messages, with texts as content and without keys whose value is `None`: Arrow adds these from other rows.

    Text parts (`[{"type": "text", "text": ...}]`) are joined. A message with tool calls needs no content.

    Raises:
        `ValueError`: if the argument is not a list of messages with a role, or a message has no text.
    """
    if not _are_messages(messages):
        raise ValueError(
            f"A prompt must be a text, or messages that have a role. Got {reprlib.repr(messages)}; correct the prompt."
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
                "The content of a message must be a text, or a list of text parts. Got "
                f"{reprlib.repr(content)} from role {message['role']!r}; {MESSAGE_REMEDY}"
            )
        cleaned.append({**message, "content": content})
    return cleaned


def _are_messages(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
    )


def _has_content(answer: str | list[dict]) -> bool:
    """Whether a completion has more than whitespace: content, tool calls or thoughts."""
    if isinstance(answer, str):
        return bool(answer.strip())
    return any(message.get(name) for message in answer for name in ("tool_calls", *THOUGHTS)) or any(
        message["content"].strip() for message in answer if message["role"] == "assistant"
    )


def _split_messages(chosen: list[dict], rejected: list[dict], prompt: list[dict] | None = None) -> dict:
    """Separate the prompt from both conversations, and drop messages after the assistant's last message."""
    if prompt is None:
        shared = takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        prompt = [message for message, _ in shared]
        while prompt and prompt[-1]["role"] == "assistant":
            prompt.pop()  # both completions start with this answer
    if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise ValueError(
            "Chosen and rejected must answer the same prompt. Got conversations without a common prompt, which "
            f"start with {reprlib.repr(chosen[0])} and {reprlib.repr(rejected[0])}; {REMEDY}"
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer and answer[0]["role"] != "assistant":
            raise ValueError(
                "A completion must start with a message of the assistant. Got roles "
                f"{[message['role'] for message in answer]} in {name!r}, after a prompt with roles "
                f"{[message['role'] for message in prompt]}; {REMEDY}"
            )
        while answer and answer[-1]["role"] != "assistant":
            answer.pop()  # the assistant does not answer this message
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _split_texts(chosen: str, rejected: str, openings: Sequence[str], prompt: str | None = None) -> dict:
    """Separate the prompt from both texts. The opening of the assistant's turn belongs to the prompt."""
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
                "Both completions must open the assistant's turn in the same way, or neither may open it. Got "
                f"{reprlib.repr(chosen)} and {reprlib.repr(rejected)}; end the prompt with {opening!r}. Otherwise "
                f"{REMEDY}"
            )
        prompt, chosen, rejected = prompt + starts[0], chosen[len(starts[0]) :], rejected[len(starts[0]) :]
    if is_transcript(prompt):
        chosen, rejected = _without_last_question(chosen), _without_last_question(rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _end_of_prompt(chosen: str, rejected: str, shared: str, openings: Sequence[str]) -> int:
    """Length of the prompt within `shared`, the common prefix of both texts."""
    ends = [shared.rfind(opening) + len(opening) for opening in openings if opening in shared]
    if ends:
        return max(ends)
    if any(opening in text for opening in openings for text in (chosen, rejected)):
        raise ValueError(
            "Chosen and rejected must answer the same prompt. Got texts that differ before the assistant's turn, "
            f"after {reprlib.repr(shared)}; {REMEDY}"
        )
    if shared in (chosen, rejected):
        return len(shared)  # one of the completions is empty
    return max((place.start() for place in re.finditer(r"\s", shared)), default=0)


def _without_last_question(answer: str) -> str:
    """Remove the last turn of a completion if it is the human's."""
    *_, last = [None, *TURN.finditer(answer)]
    return answer[: last.start()] if last is not None and last[1] == "Human" else answer


def _to_messages(prompt: str, chosen: str, rejected: str) -> dict:
    """Convert a transcript and its completions to messages."""
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

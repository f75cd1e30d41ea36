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

"""
Prompt and answer as the model sees them: one text, and the stretches of it in which the assistant speaks.

A stretch is a pair of a start and an end, in characters. What users and tools say between two turns of the assistant, and what a
chat template prints around them, is in none.
"""

import json
import os
import reprlib

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import remove_none_values

from .preferences import OTHER_TURN, REMEDY, TRANSCRIPT_TURN, is_transcript


def complete_text(
    prompt: str, completion: str, processing_class: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """A prompt and its answer with EOS; in a transcript, other people's turns interrupt the assistant."""
    text = prompt + completion + (processing_class.eos_token or "")
    turns, end = [], len(prompt)
    while end < len(text):
        start, end = end, text.find(OTHER_TURN, end) if is_transcript(prompt) else -1
        end = len(text) if end < 0 else end
        turns.append((start, end))
        end = text.find(TRANSCRIPT_TURN, end)
        end = len(text) if end < 0 else end + len(TRANSCRIPT_TURN)
    return text, turns


def complete_messages(
    prompt: list[dict],
    completion: list[dict],
    opened: str,
    processing_class: PreTrainedTokenizerBase,
    eos_token_ids: list[int],
    **template,
) -> tuple[str, list[tuple[int, int]]]:
    """
    A conversation as the chat template prints it.

    Args:
        prompt (`list[dict]`):
            Messages. A last one of the assistant is continued by the first of the completion.
        completion (`list[dict]`):
            Messages, the first of the assistant.
        opened (`str`):
            The prompt alone, from [`render_prompt`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        eos_token_ids (`list[int]`):
            Ids at which generation stops.
        template:
            From [`template_arguments`].

    Raises:
        `ValueError`: when the template fails, prints a prompt differently once the answer follows, leaves out what the
        assistant says, or does not show where a turn ends.
    """
    if not completion:
        return opened, []
    conversation = [*prompt, *completion]
    first = len(prompt)
    if prompt[-1]["role"] == "assistant":  # it is continued
        first -= 1
        continued = {**completion[0], "content": prompt[-1]["content"] + completion[0]["content"]}
        conversation = [*prompt[:-1], continued, *completion[1:]]
    text = _render(conversation, processing_class, **template)
    turns = []
    for index in range(first, len(conversation)):
        if conversation[index]["role"] != "assistant":
            continue
        before = opened if index == first else render_prompt(conversation[:index], processing_class, **template)
        if not text.startswith(before):
            raise ValueError(
                "A chat template must render a prompt in the same way once the answer follows. Got "
                f"{_ending(before, text)}; give the answers the thinking that the template expects, set "
                "`chat_template_kwargs` of the row, use another template, or " + REMEDY
            )
        start, end = len(before), len(text)
        if index + 1 < len(conversation):
            end = _end_of_turn(conversation, index, start, text, processing_class, eos_token_ids, **template)
        said = conversation[index]["content"].split()
        if said and said[-1] not in text[start:end]:
            raise ValueError(
                "A chat template must print what the assistant says. Got an answer that ends in "
                f"{reprlib.repr(said[-1])} and the rendering {reprlib.repr(text[start:end])}; use a template that takes the "
                f"content of a message as a text, or {REMEDY}"
            )
        turns.append((start, end))
    return text, turns


def _end_of_turn(
    conversation: list[dict],
    index: int,
    start: int,
    text: str,
    processing_class: PreTrainedTokenizerBase,
    eos_token_ids: list[int],
    **template,
) -> int:
    """Where the turn of a message, which is not the last, ends in the rendered text, or a little after its EOS."""
    upto = _render(conversation[: index + 1], processing_class, **template)
    if text.startswith(upto):
        return len(upto)
    # The last message is rendered differently: the turn ends before the content of the next
    following = conversation[index + 1]
    other = {**following, "content": "1" if following["content"].strip().startswith("0") else "0"}
    others = _render([*conversation[: index + 1], other, *conversation[index + 2 :]], processing_class, **template)
    end = len(os.path.commonprefix([text, others]))
    if not any(eos in text[start:end] for eos in processing_class.convert_ids_to_tokens(eos_token_ids) if eos):
        raise ValueError(
            f"It must be clear where a turn of the assistant ends. Got a chat template that renders message {index} "
            f"differently once others follow, and closes it with none of the ids {eos_token_ids}; use a completion of one "
            f"message, or {REMEDY}"
        )
    return end


def render_prompt(messages: list[dict], processing_class: PreTrainedTokenizerBase, **template) -> str:
    """Messages and what opens the assistant's turn; a last message of the assistant is left open. Raises `ValueError`."""
    is_continued = messages[-1]["role"] == "assistant"
    return _render(
        messages,
        processing_class,
        add_generation_prompt=not is_continued,
        continue_final_message=is_continued,
        **template,
    )


def _render(messages: list[dict], processing_class: PreTrainedTokenizerBase, **template) -> str:
    try:
        return processing_class.apply_chat_template(messages, tokenize=False, **template)
    except (TemplateError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The chat template must be able to render the messages. Got {type(error).__name__}: {error}; {REMEDY}"
        ) from error


def assistant_opening(processing_class: PreTrainedTokenizerBase) -> str:
    """What the chat template prints to open the assistant's turn. Empty where there is none, or no template."""
    if processing_class.chat_template is None:
        return ""
    question = [{"role": "user", "content": "x"}]
    try:
        closed, opened = (_render(question, processing_class, add_generation_prompt=flag) for flag in (False, True))
    except ValueError:
        return ""
    return opened.removeprefix(closed) if opened.startswith(closed) else ""


def _ending(before: str, text: str) -> str:
    """Where two renderings part ways, for an error."""
    at = len(os.path.commonprefix([before, text]))
    return f"{before[at : at + 40]!r} before an answer and {text[at : at + 40]!r} with it, after {before[:at][-40:]!r}"


def template_arguments(example: dict) -> dict:
    """`tools` and `chat_template_kwargs` of a row, without the keys that Arrow filled in from other rows."""
    tools = example.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else remove_none_values(tools or [])
    except ValueError as error:
        raise ValueError(
            f"`tools` must be a list of schemas, or that as JSON. Got {reprlib.repr(tools)}; {REMEDY}"
        ) from error
    arguments = remove_none_values(example.get("chat_template_kwargs") or {})
    taken = {"tools", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"} & arguments.keys()
    if taken:
        raise ValueError(
            f"`chat_template_kwargs` must hold variables of the chat template. Got {sorted(taken)}, which tokenization sets "
            f"itself; remove them, or {REMEDY}"
        )
    return {"tools": tools or None, **arguments}

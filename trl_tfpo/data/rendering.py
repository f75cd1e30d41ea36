# SPDX-License-Identifier: Apache-2.0

"""
Rendering of a prompt and its completion as one text, with the spans of the assistant's turns.

A span is the start and the end, in characters, of one turn of the assistant with its EOS. The end is an upper bound:
tokenization masks what follows EOS. Messages of users and tools are outside the spans, except in texts that are
already rendered.
"""

import contextlib
import inspect
import json
import os
import reprlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import remove_none_values

from .preferences import MESSAGE_REMEDY, OTHER_TURN, REMEDY, THOUGHTS, TRANSCRIPT_TURN, is_transcript


@dataclass
class ChatTemplate:
    """
    Chat template of a tokenizer, with the variables of one row.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        variables (`dict`, *optional*):
            `tools` and variables of the template, see [`template_variables`].
    """

    processing_class: PreTrainedTokenizerBase
    variables: dict[str, Any] = field(default_factory=dict)

    def render(self, messages: list[dict], **settings: Any) -> str:
        """Render messages as a text. Raises `ValueError` if the template fails."""
        try:
            text = self.processing_class.apply_chat_template(messages, tokenize=False, **settings, **self.variables)
            return str(text)
        except (TemplateError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"The chat template must be able to render the messages. Got {type(error).__name__}: {error}; "
                f"{MESSAGE_REMEDY}"
            ) from error

    def render_prompt(self, messages: list[dict], is_continued: bool = False) -> str:
        """Render messages and the opening of a turn, or with `is_continued` leave the last message open instead."""
        return self.render(messages, add_generation_prompt=not is_continued, continue_final_message=is_continued)

    @cached_property
    def opening(self) -> str:
        """Text with which the template opens the assistant's turn, empty if it is unknown."""
        if self.processing_class.chat_template is None:
            return ""
        question = [{"role": "user", "content": "x"}]
        try:
            closed, opened = (self.render(question, add_generation_prompt=flag) for flag in (False, True))
        except ValueError:
            return ""
        return opened.removeprefix(closed) if opened.startswith(closed) else ""


def template_variables(example: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    Read `tools` and `chat_template_kwargs` of a row, without the keys that Arrow adds from other rows.

    Raises:
        `ValueError`: if `tools` is not a list or `chat_template_kwargs` is not a dictionary (JSON is accepted); if a
            variable is one of [`reserved_variables`].
    """
    values: dict[str, Any] = {}
    for name, expected in (("tools", list), ("chat_template_kwargs", dict)):
        value: Any = example.get(name) or expected()
        with contextlib.suppress(TypeError, ValueError):
            value = json.loads(value) if isinstance(value, str) else remove_none_values(value)
        if not isinstance(value, expected):
            raise ValueError(
                f"`{name}` must be a {expected.__name__}, or JSON of one. Got {reprlib.repr(value)}; {REMEDY}"
            )
        values[name] = value
    variables = values["chat_template_kwargs"]
    if taken := reserved_variables(processing_class) & variables.keys():
        raise ValueError(
            f"`chat_template_kwargs` must hold variables of the chat template. Got {sorted(taken)}, which "
            f"tokenization sets itself; remove them, or {REMEDY}"
        )
    return {"tools": values["tools"] or None, **variables}


def reserved_variables(processing_class: PreTrainedTokenizerBase) -> set[str]:
    """
    Names that cannot be variables of a chat template: the messages, and arguments of `apply_chat_template` except
    `documents`.
    """
    return {*inspect.signature(processing_class.apply_chat_template).parameters, "messages", "conversations"} - {
        "kwargs",
        "documents",
    }


def complete_text(
    prompt: str, completion: str, processing_class: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """Join prompt, completion and EOS. The completion of a transcript has a span for each turn of the assistant."""
    text = prompt + completion + (processing_class.eos_token or "")
    spans, end = [], len(prompt)
    while end < len(text):
        start, end = end, text.find(OTHER_TURN, end) if is_transcript(prompt) else -1
        end = len(text) if end < 0 else end
        spans.append((start, end))
        end = text.find(TRANSCRIPT_TURN, end)
        end = len(text) if end < 0 else end + len(TRANSCRIPT_TURN)
    return text, spans


def complete_messages(
    prompt: list[dict], completion: list[dict], opened: str, template: ChatTemplate, eos_tokens: list[str]
) -> tuple[str, list[tuple[int, int]]]:
    """
    Render a prompt and its completion with the chat template.

    Args:
        prompt (`list[dict]`):
            Messages. If the last message is the assistant's, the first message of the completion continues it.
        completion (`list[dict]`):
            Messages, of which the first is the assistant's.
        opened (`str`):
            The rendered prompt, from [`ChatTemplate.render_prompt`].
        template ([`ChatTemplate`]):
            The template, with the variables of the row.
        eos_tokens (`list[str]`):
            Tokens at which generation stops.

    Returns:
        `str` and `list[tuple[int, int]]`: the text, and the spans of the assistant.

    Raises:
        `ValueError`: if the template fails, renders a prompt differently before a completion, omits the content of an
            assistant's turn, or does not mark the end of a turn.
    """
    conversation, first = [*prompt, *completion], len(prompt)
    if prompt[-1]["role"] == "assistant":  # the completion continues this message
        first -= 1
        continued = {**completion[0], "content": prompt[-1]["content"] + completion[0]["content"]}
        conversation = [*prompt[:-1], continued, *completion[1:]]
    text = template.render(conversation)
    spans = []
    for index, message in enumerate(completion, start=first):
        if message["role"] != "assistant":
            continue
        before = opened if index == first else template.render_prompt(conversation[:index])
        if not text.startswith(before):
            at = len(os.path.commonprefix([before, text]))
            raise ValueError(
                "A chat template must render a prompt in the same way with and without the answer. Got "
                f"{before[at : at + 40]!r} without the answer and {text[at : at + 40]!r} with it, after "
                f"{before[:at][-40:]!r}; give the answers the thinking that the template expects, set "
                f"`chat_template_kwargs` of the row, use another template, or {REMEDY}"
            )
        end = _end_of_turn(conversation, index, len(before), text, template, eos_tokens)
        _check_rendered(message, text[len(before) : end])
        spans.append((len(before), end))
    return text, spans


def _end_of_turn(
    conversation: list[dict], index: int, start: int, text: str, template: ChatTemplate, eos_tokens: list[str]
) -> int:
    """Upper bound of the end of a turn in the text. The first EOS before it ends the turn."""
    if index + 1 == len(conversation):
        return len(text)
    rendered = template.render(conversation[: index + 1])
    if text.startswith(rendered):
        return len(rendered)
    # The template renders the last message differently: the turn ends before the content of the next message
    following = conversation[index + 1]
    other = {**following, "content": "1" if following["content"].strip().startswith("0") else "0"}
    others = template.render([*conversation[: index + 1], other, *conversation[index + 2 :]])
    end = len(os.path.commonprefix([text, others]))
    if not any(token in text[start:end] for token in eos_tokens):
        raise ValueError(
            "A chat template must mark where a turn of the assistant ends. Got a template that renders message "
            f"{index} differently if others follow, and closes it with none of {eos_tokens}; use a completion of one "
            f"message, or {REMEDY}"
        )
    return end


def _check_rendered(message: dict, rendered: str) -> None:
    """
    Raise `ValueError` if a template omits the last word of the content, the name of a tool call or, without these, the
    last word of the thoughts; or if a message has none of these.
    """
    expected = message["content"].split()[-1:]
    expected += [(call.get("function") or call).get("name", "") for call in message.get("tool_calls") or []]
    expected = expected or [str(message[name]).split()[-1] for name in THOUGHTS if str(message.get(name, "")).strip()]
    if not expected or any(word not in rendered for word in expected):
        raise ValueError(
            "A chat template must render the content of each turn of the assistant. Got "
            f"{reprlib.repr(message)}, rendered as {reprlib.repr(rendered)}; use a template that supports tool calls "
            f"and a text as the content of a message, or {REMEDY}"
        )

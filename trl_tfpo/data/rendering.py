# SPDX-License-Identifier: Apache-2.0

"""
Prompt and answer as the model sees them: one text, and the stretches of it in which the assistant may speak.

A stretch is a pair of a start and an end, in characters. It holds one turn of the assistant, up to EOS. What users and
tools say between two turns, and what a chat template prints around them, belongs to no stretch.
"""

import inspect
import json
import os
import reprlib
from dataclasses import dataclass, field
from functools import cached_property

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import remove_none_values

from .preferences import OTHER_TURN, REMEDY, THOUGHTS, TRANSCRIPT_TURN, is_transcript


@dataclass
class ChatTemplate:
    """
    The chat template of a tokenizer, with the variables of one row.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        variables (`dict`, *optional*):
            `tools` and variables of the template, see [`template_variables`].
    """

    processing_class: PreTrainedTokenizerBase
    variables: dict = field(default_factory=dict)

    def render(self, messages: list[dict], **how) -> str:
        """Messages as a text. Raises `ValueError` when the template fails."""
        try:
            return self.processing_class.apply_chat_template(messages, tokenize=False, **how, **self.variables)
        except (TemplateError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"The chat template must be able to render the messages. Got {type(error).__name__}: {error}; {REMEDY}"
            ) from error

    def render_prompt(self, messages: list[dict], is_continued: bool = False) -> str:
        """Messages and what opens the assistant's turn. One that is continued is the last message, left open."""
        return self.render(messages, add_generation_prompt=not is_continued, continue_final_message=is_continued)

    @cached_property
    def opening(self) -> str:
        """What the template prints to open the assistant's turn. Empty where it prints nothing, or there is no template."""
        if self.processing_class.chat_template is None:
            return ""
        question = [{"role": "user", "content": "x"}]
        try:
            closed, opened = (self.render(question, add_generation_prompt=flag) for flag in (False, True))
        except ValueError:
            return ""
        return opened.removeprefix(closed) if opened.startswith(closed) else ""


def template_variables(example: dict, processing_class: PreTrainedTokenizerBase) -> dict:
    """
    `tools` and `chat_template_kwargs` of a row, without the keys that Arrow filled in from other rows.

    Raises:
        `ValueError`: when one of them is neither of its type nor JSON, or a variable is an argument of tokenization.
    """
    values = {}
    for name, expected in (("tools", list), ("chat_template_kwargs", dict)):
        value = example.get(name)
        try:
            value = json.loads(value) if isinstance(value, str) else remove_none_values(value or expected())
        except (TypeError, ValueError):
            pass
        if not isinstance(value, expected):
            raise ValueError(
                f"`{name}` must be a {expected.__name__}, or one as JSON. Got {reprlib.repr(value)}; {REMEDY}"
            )
        values[name] = value
    variables = values["chat_template_kwargs"]
    if taken := reserved_variables(processing_class) & variables.keys():
        raise ValueError(
            f"`chat_template_kwargs` must hold variables of the chat template. Got {sorted(taken)}, which tokenization sets "
            f"itself; remove them, or {REMEDY}"
        )
    return {"tools": values["tools"] or None, **variables}


def reserved_variables(processing_class: PreTrainedTokenizerBase) -> set[str]:
    """Names that cannot be variables of a chat template: arguments of `apply_chat_template`, and the messages."""
    return {*inspect.signature(processing_class.apply_chat_template).parameters, "messages", "conversations"} - {
        "kwargs",
        "documents",
    }


def complete_text(
    prompt: str, completion: str, processing_class: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """A prompt and its answer with EOS; in a transcript, other people's turns interrupt the assistant."""
    text = prompt + completion + (processing_class.eos_token or "")
    stretches, end = [], len(prompt)
    while end < len(text):
        start, end = end, text.find(OTHER_TURN, end) if is_transcript(prompt) else -1
        end = len(text) if end < 0 else end
        stretches.append((start, end))
        end = text.find(TRANSCRIPT_TURN, end)
        end = len(text) if end < 0 else end + len(TRANSCRIPT_TURN)
    return text, stretches


def complete_messages(
    prompt: list[dict], completion: list[dict], opened: str, template: ChatTemplate, eos_tokens: list[str]
) -> tuple[str, list[tuple[int, int]]]:
    """
    A conversation as the chat template prints it.

    Args:
        prompt (`list[dict]`):
            Messages. A last one of the assistant is continued by the first of the completion.
        completion (`list[dict]`):
            Messages, the first of the assistant.
        opened (`str`):
            The prompt alone, from [`ChatTemplate.render_prompt`].
        template ([`ChatTemplate`]):
            With the variables of the row.
        eos_tokens (`list[str]`):
            Tokens at which generation stops.

    Raises:
        `ValueError`: when the template fails, prints a prompt differently once the answer follows, leaves out what the
        assistant says, or does not show where a turn ends.
    """
    conversation, first = [*prompt, *completion], len(prompt)
    if prompt[-1]["role"] == "assistant":  # it is continued
        first -= 1
        continued = {**completion[0], "content": prompt[-1]["content"] + completion[0]["content"]}
        conversation = [*prompt[:-1], continued, *completion[1:]]
    text = template.render(conversation)
    stretches = []
    for index, message in enumerate(completion, start=first):
        if message["role"] != "assistant":
            continue
        before = opened if index == first else template.render_prompt(conversation[:index])
        if not text.startswith(before):
            at = len(os.path.commonprefix([before, text]))
            raise ValueError(
                "A chat template must render a prompt in the same way once the answer follows. Got "
                f"{before[at : at + 40]!r} before an answer and {text[at : at + 40]!r} with it, after "
                f"{before[:at][-40:]!r}; give the answers the thinking that the template expects, set "
                f"`chat_template_kwargs` of the row, use another template, or {REMEDY}"
            )
        end = _end_of_turn(conversation, index, len(before), text, template, eos_tokens)
        _check_said(message, text[len(before) : end])
        stretches.append((len(before), end))
    return text, stretches


def _end_of_turn(
    conversation: list[dict], index: int, start: int, text: str, template: ChatTemplate, eos_tokens: list[str]
) -> int:
    """Up to where the turn of a message may go in the text. It ends there, or at EOS before that."""
    if index + 1 == len(conversation):
        return len(text)
    upto = template.render(conversation[: index + 1])
    if text.startswith(upto):
        return len(upto)
    # The last message is rendered differently: the turn ends before the content of the next
    following = conversation[index + 1]
    other = {**following, "content": "1" if following["content"].strip().startswith("0") else "0"}
    others = template.render([*conversation[: index + 1], other, *conversation[index + 2 :]])
    end = len(os.path.commonprefix([text, others]))
    if not any(token in text[start:end] for token in eos_tokens):
        raise ValueError(
            f"It must be clear where a turn of the assistant ends. Got a chat template that renders message {index} "
            f"differently once others follow, and closes it with none of {eos_tokens}; use a completion of one message, or "
            f"{REMEDY}"
        )
    return end


def _check_said(message: dict, printed: str) -> None:
    """
    Raise `ValueError` when a template leaves out what a message says: the end of its content, the names of its tool calls
    or, where it has neither, the end of its thoughts.
    """
    expected = message["content"].split()[-1:]
    expected += [(call.get("function") or call).get("name", "") for call in message.get("tool_calls") or []]
    expected = expected or [str(message[name]).split()[-1] for name in THOUGHTS if str(message.get(name, "")).strip()]
    missing = [word for word in expected if word not in printed]
    if missing or not expected:
        raise ValueError(
            "A chat template must print what the assistant says in each of its turns. Got "
            f"{reprlib.repr(message)} and the rendering {reprlib.repr(printed)}; use a template that takes the content of a "
            f"message as a text and knows its tool calls, or {REMEDY}"
        )

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
From the rows of a preference dataset to token ids, the same for patient and doctor.

A completion is what follows the prompt, to the end of the last thing that the assistant says. Its mask tells which tokens the
assistant says; those of users and tools between its turns are read, but never scored or rewarded.
"""

import json
import os
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import islice

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import remove_none_values

from .faces import Faces, apply_face, has_system_role
from .preferences import OTHER_TURN, REMEDY, TRANSCRIPT_TURN, clean_messages, is_transcript, read_pair


ID_COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]
MASK_COLUMNS = ["chosen_mask", "rejected_mask"]
FACE_COLUMNS = ["positive_prompt_ids", "negative_prompt_ids"]


def tokenize_preferences(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    faces: Faces | None,
    eos_token_ids: list[int],
    max_length: int | None = None,
    drop_unusable: bool = False,
    convert_transcripts: bool = False,
) -> Dataset | IterableDataset:
    """
    Add the columns of [`tokenize_pair`] to a preference dataset.

    Raises:
        `ValueError`: when the dataset has images or lacks the columns, or a row is unusable (unless these are dropped).
    """
    check_preference_columns(dataset)
    first = next(iter(dataset))
    if is_transcript(first["chosen"]) and processing_class.chat_template is not None and not convert_transcripts:
        warnings.warn(
            f"The dataset has transcripts ({OTHER_TURN!r}, {TRANSCRIPT_TURN!r}), and the tokenizer has a chat template, so "
            "that the model will be asked in another format than it is trained on. Pass `convert_transcripts=True` to read "
            "the transcripts as messages.",
            stacklevel=2,
        )
    is_map_style = isinstance(dataset, Dataset)
    tokenized = dataset.map(
        _tokenize_row,
        with_indices=True,
        fn_kwargs={
            "processing_class": processing_class,
            "faces": faces,
            "system_role": has_system_role(processing_class),
            "eos_token_ids": eos_token_ids,
            "max_length": max_length,
            "convert_transcripts": convert_transcripts,
            "drop_unusable": drop_unusable,
        },
        **({"desc": "Tokenizing preferences"} if is_map_style else {}),
    )
    if drop_unusable:
        tokenized = tokenized.filter(lambda row: len(row["prompt_ids"]) > 0)
        if is_map_style and len(tokenized) == 0:
            raise ValueError(
                f"At least one pair must be usable. None of {len(dataset)} is; call without `drop_unusable` to see what is "
                f"wrong with the first. A prompt must be shorter than `max_length`={max_length} tokens."
            )
    return tokenized


def _tokenize_row(row: dict, index: int, *, drop_unusable: bool, **settings) -> dict:
    try:
        return tokenize_pair(row, **settings)
    except ValueError as error:
        if not drop_unusable:
            raise ValueError(f"Row {index} of the dataset: {error}") from error
        return {name: [] for name in ID_COLUMNS + MASK_COLUMNS + (FACE_COLUMNS if settings["faces"] else [])}


def tokenize_pair(
    example: dict,
    processing_class: PreTrainedTokenizerBase,
    *,
    faces: Faces | None,
    system_role: bool,
    eos_token_ids: list[int],
    max_length: int | None = None,
    convert_transcripts: bool = False,
) -> dict[str, list[int]]:
    """
    Token ids of one preference pair.

    The completion starts at the first token that is not whole in the prompt, and ends with the EOS that ends the
    assistant's last turn: what a chat template prints after it is never generated.

    Args:
        example (`dict`):
            A row, see [`~trl_tfpo.preferences.read_pair`]. `tools` (a list of schemas, or that as JSON) and
            `chat_template_kwargs` (a `dict`) reach the chat template.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        faces ([`~trl_tfpo.faces.Faces`], *optional*):
            Under which the prompt is rendered as well.
        system_role (`bool`):
            Whether the chat template has a system role, see [`~trl_tfpo.faces.has_system_role`].
        eos_token_ids (`list[int]`):
            Ids at which generation stops, see [`eos_token_ids`].
        max_length (`int`, *optional*):
            Most tokens of prompt and completion; completions are cut at the end.
        convert_transcripts (`bool`, *optional*, defaults to `False`):
            Whether transcripts become messages.

    Returns:
        `dict[str, list[int]]`: `prompt_ids`, `chosen_ids` and `rejected_ids`; `chosen_mask` and `rejected_mask`, 1 where the
        assistant speaks and 0 elsewhere; given faces, `positive_prompt_ids` and `negative_prompt_ids`.

    Raises:
        `ValueError`: when the row cannot be read, see [`~trl_tfpo.preferences.read_pair`]; the chat template fails on it, or
        renders its prompt differently once an answer follows; the prompt is empty, or has `max_length` tokens or more; a
        completion has no token but EOS.
    """
    is_text = isinstance(example.get("prompt", example["chosen"]), str) and isinstance(example["chosen"], str)
    openings = (_assistant_opening(processing_class),) if is_text else ()
    pair = read_pair(example, openings=openings, convert_transcripts=convert_transcripts)
    prompt, template = pair["prompt"], _template_arguments(example)
    if isinstance(prompt, str):
        opened, complete = prompt, _complete_text
        prompt_ids = _encode_text(prompt, processing_class)
    else:
        opened, complete = (
            _render_prompt(prompt, processing_class, **template),
            partial(_complete_messages, **template),
        )
        prompt_ids = _encode(opened, processing_class)
    completed = [
        complete(prompt, pair[name], opened, processing_class, eos_token_ids) for name in ("chosen", "rejected")
    ]
    prompt_length = min(_common_prefix_length(prompt_ids, ids) for ids, _ in completed)
    merged = prompt_ids[prompt_length:]  # with the first characters of a completion
    row = {"prompt_ids": prompt_ids[:prompt_length]}
    _check_prompt(row["prompt_ids"], max_length)

    for name, (ids, is_spoken) in zip(("chosen", "rejected"), completed, strict=True):
        if all(token_id in eos_token_ids for token_id, spoken in zip(ids, is_spoken, strict=True) if spoken):
            raise ValueError(
                f"A completion must have at least one token before EOS. Got an empty {name!r} one; {REMEDY}"
            )
        end = len(is_spoken) - is_spoken[::-1].index(True)
        kept = slice(prompt_length, end if max_length is None else min(end, max_length))
        row[f"{name}_ids"] = ids[kept]
        row[f"{name}_mask"] = [int(spoken) for spoken in is_spoken[kept]]

    if faces is not None:
        bos = processing_class.bos_token if isinstance(prompt, str) else None
        bos = bos if bos and prompt.startswith(bos) else ""
        for face, instruction in vars(faces).items():
            faced = apply_face(prompt[len(bos) :], instruction, system_role=system_role)
            face_ids = tokenize_prompt(bos + faced if bos else faced, processing_class, **template)
            if merged and face_ids[-len(merged) :] != merged:
                raise ValueError(
                    "The prompt must end in the same tokens under both faces as without. Got "
                    f"{processing_class.decode(face_ids[-len(merged) :])!r} instead of "
                    f"{processing_class.decode(merged)!r}; end the prompt on a token boundary."
                )
            row[f"{face}_prompt_ids"] = face_ids[: len(face_ids) - len(merged)]
    return row


def tokenize_prompt(prompt: str | list[dict], processing_class: PreTrainedTokenizerBase, **template) -> list[int]:
    """
    Token ids of a text, or of messages followed by what opens the assistant's turn. A last message of the assistant is
    left open instead.

    Raises:
        `ValueError`: when it is neither, or the chat template fails on it.
    """
    if isinstance(prompt, str):
        return _encode_text(prompt, processing_class)
    return _encode(_render_prompt(clean_messages(prompt), processing_class, **template), processing_class)


# Where the assistant speaks: token ids of prompt and completion, and for each of them whether the assistant says it


def _complete_text(
    prompt: str, completion: str, _: str, processing_class: PreTrainedTokenizerBase, eos_token_ids: list[int]
) -> tuple[list[int], list[bool]]:
    text = prompt + completion
    ids = _encode_text(text, processing_class)
    if processing_class.eos_token_id is not None:
        ids = [*ids, processing_class.eos_token_id]
    turns, end = [], len(prompt)
    while end < len(text):
        start, end = end, len(text)
        if is_transcript(prompt) and OTHER_TURN in text[start:]:
            end = text.index(OTHER_TURN, start)
        turns.append((start, end))
        end = text.find(TRANSCRIPT_TURN, end)
        end = len(text) if end < 0 else end + len(TRANSCRIPT_TURN)

    def border(end: int) -> int:
        return len(ids) if end == len(text) else _common_prefix_length(_encode_text(text[:end], processing_class), ids)

    return ids, _spoken(ids, [(border(start), border(end)) for start, end in turns], processing_class, eos_token_ids)


def _complete_messages(
    prompt: list[dict],
    completion: list[dict],
    opened: str,
    processing_class: PreTrainedTokenizerBase,
    eos_token_ids: list[int],
    **template,
) -> tuple[list[int], list[bool]]:
    if not completion:
        ids = _encode(opened, processing_class)
        return ids, [False] * len(ids)
    conversation = [*prompt, *completion]
    first = len(prompt)
    if prompt[-1]["role"] == "assistant":  # it is continued
        first -= 1
        continued = {**completion[0], "content": prompt[-1]["content"] + completion[0]["content"]}
        conversation = [*prompt[:-1], continued, *completion[1:]]
    text = _render(conversation, processing_class, **template)
    ids = _encode(text, processing_class)
    turns = []
    for index in range(first, len(conversation)):
        if conversation[index]["role"] != "assistant":
            continue
        before = opened if index == first else _render_prompt(conversation[:index], processing_class, **template)
        if not text.startswith(before):
            raise ValueError(
                "A chat template must render a prompt in the same way once the answer follows. Got "
                f"{_ending(before, text)}; give the answers the thinking that the template expects, set "
                "`chat_template_kwargs` of the row, use another template, or " + REMEDY
            )
        start, end = _common_prefix_length(_encode(before, processing_class), ids), len(ids)
        if index + 1 < len(conversation):
            upto = _render(conversation[: index + 1], processing_class, **template)
            if not text.startswith(upto):  # the last message is rendered differently: up to the content of the next
                following = conversation[index + 1]
                other = {**following, "content": "1" if following["content"].strip().startswith("0") else "0"}
                others = _render(
                    [*conversation[: index + 1], other, *conversation[index + 2 :]], processing_class, **template
                )
                upto = os.path.commonprefix([text, others])
                closed = _common_prefix_length(_encode(upto, processing_class), ids)
                if not any(token_id in eos_token_ids for token_id in ids[start:closed]):
                    raise ValueError(
                        "It must be clear where a turn of the assistant ends. Got a chat template that renders message "
                        f"{index} differently once others follow, and closes it with none of the ids {eos_token_ids}; use "
                        f"a completion of one message, or {REMEDY}"
                    )
            end = _common_prefix_length(_encode(upto, processing_class), ids)
        turns.append((start, end))
    return ids, _spoken(ids, turns, processing_class, eos_token_ids)


def _spoken(
    ids: list[int],
    turns: list[tuple[int, int]],
    processing_class: PreTrainedTokenizerBase,
    eos_token_ids: list[int],
) -> list[bool]:
    """
    Which tokens the assistant says in its turns, from the first of the tokens to the end.

    It stops at EOS. Where a text holds more turns after that, as one that was rendered before, it goes on after what opens
    its turn in the chat template.
    """
    is_spoken = [False] * len(ids)
    for start, end in turns:
        opening, speaks = None, True
        for at in range(start, end):
            if not speaks:
                if opening is None:
                    opening = _encode(_assistant_opening(processing_class), processing_class)
                speaks = len(opening) > 0 and ids[max(start, at - len(opening)) : at] == opening
            is_spoken[at] = speaks
            speaks = speaks and ids[at] not in eos_token_ids
    return is_spoken


def _assistant_opening(processing_class: PreTrainedTokenizerBase) -> str:
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


# Texts and ids


def _render_prompt(messages: list[dict], processing_class: PreTrainedTokenizerBase, **template) -> str:
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


def _encode(text: str, processing_class: PreTrainedTokenizerBase) -> list[int]:
    return processing_class(text, add_special_tokens=False)["input_ids"]


def _encode_text(text: str, processing_class: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a text, after the special tokens with which the tokenizer starts one, unless the text has them already."""
    ids, probe = _encode(text, processing_class), _encode("a", processing_class)
    leading = processing_class("a")["input_ids"]
    leading = leading[: leading.index(probe[0])]
    return ids if ids[: len(leading)] == leading else leading + ids


def _common_prefix_length(first: list[int], second: list[int]) -> int:
    return len(os.path.commonprefix([first, second]))


def _template_arguments(example: dict) -> dict:
    """`tools` and `chat_template_kwargs` of a row, without the keys that Arrow filled in from other rows."""
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else remove_none_values(tools or [])
    arguments = remove_none_values(example.get("chat_template_kwargs") or {})
    taken = {"tools", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"} & arguments.keys()
    if taken:
        raise ValueError(
            f"`chat_template_kwargs` must hold variables of the chat template. Got {sorted(taken)}, which tokenization sets "
            f"itself; remove them, or {REMEDY}"
        )
    return {"tools": tools or None, **arguments}


# Checks


def resolve_processing_class(
    processing_class: PreTrainedTokenizerBase | None, model: PreTrainedModel, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer, the model's own by default, with a padding token. Raises `ValueError` when it is none."""
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(
            model.config._name_or_path, trust_remote_code=trust_remote_code
        )
    check_is_tokenizer(processing_class)
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def check_counts(**counts: int | None) -> None:
    """Raise `ValueError` unless each of the named counts is at least 1, or `None` for none."""
    for name, value in counts.items():
        if value is not None and not value >= 1:
            raise ValueError(f"`{name}` must be at least 1. Got {value}; leave it out for the default.")


def check_is_tokenizer(processing_class: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless it is a tokenizer, rather than a multimodal processor or something else."""
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            "`processing_class` must be a tokenizer: token rewards are defined for text only. Got a "
            f"`{type(processing_class).__name__}`; pass a tokenizer, or that of the processor, and a text dataset."
        )


def eos_token_ids(processing_class: PreTrainedTokenizerBase, *models: PreTrainedModel | None) -> list[int]:
    """All ids at which generation stops: the tokenizer's EOS, and those of the generation configs of the models."""
    found = {processing_class.eos_token_id}
    for model in models:
        if model is not None and model.can_generate():
            from_model = model.generation_config.eos_token_id
            found.update(from_model if isinstance(from_model, list) else [from_model])
    return sorted(found - {None})


def row_lengths(dataset: Dataset) -> list[int]:
    """Tokens of the longer of the two rows that each tokenized pair makes."""
    table = dataset.select_columns(ID_COLUMNS).with_format("arrow")[:]
    prompt, chosen, rejected = (pc.list_value_length(table.column(name)) for name in ID_COLUMNS)
    return pc.add(prompt, pc.max_element_wise(chosen, rejected)).to_pylist()


def _check_prompt(prompt_ids: list[int], max_length: int | None) -> None:
    if not prompt_ids:
        raise ValueError(
            f"A prompt must have at least one token. Got an empty one; use a tokenizer with a BOS token, or {REMEDY}"
        )
    if max_length is not None and len(prompt_ids) >= max_length:
        raise ValueError(
            f"A prompt must be shorter than `max_length`, or no completion token is left. Got {len(prompt_ids)} tokens "
            f"with `max_length`={max_length}; raise it, or {REMEDY}"
        )


def columns_of(dataset: Dataset | IterableDataset) -> set[str]:
    """Names of the columns, also of a streamed dataset. Raises `ValueError` where there is no row, or no dataset."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            "A dataset must be one of the library Datasets. Got a "
            f"`{type(dataset).__name__}`; make one, with `Dataset.from_list(rows)` for instance."
        )
    columns = dataset.column_names or next(iter(dataset), None)
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(
            "A dataset must have at least one row. Got none; look at the file and the split it came from."
        )
    return set(columns)


def check_preference_columns(dataset: Dataset | IterableDataset) -> None:
    """Raise `ValueError` unless the dataset holds preference pairs of text."""
    columns = columns_of(dataset)
    if columns & {"image", "images"}:
        raise ValueError(
            f"Token rewards are defined for text only. Got a vision dataset with {sorted(columns & {'image', 'images'})}; "
            "remove the column, or use a text dataset."
        )
    if not {"chosen", "rejected"} <= columns:
        raise ValueError(
            "A preference dataset needs the columns 'chosen' and 'rejected', and 'prompt' unless it is contained in "
            f"both. Got {sorted(columns)}; rename or build the missing ones."
        )


def is_complete(completion_ids: Sequence[int], mask: Sequence[int] | None, eos_token_ids: Sequence[int]) -> bool:
    """Whether a completion ends with an EOS that the assistant says, rather than being cut."""
    return len(completion_ids) > 0 and completion_ids[-1] in eos_token_ids and (mask is None or bool(mask[-1]))


def check_some_completion_ends(
    dataset: Dataset | IterableDataset, eos_token_ids: list[int], max_length: int | None = None
) -> None:
    """Raise `ValueError` when none of the first 1,000 pairs has a completion that ends in EOS, within `max_length`."""
    for row in islice(dataset, 1000):
        for name in ("chosen", "rejected"):
            ids = row[f"{name}_ids"]
            is_whole = max_length is None or len(row["prompt_ids"]) + len(ids) <= max_length
            if is_whole and is_complete(ids, row.get(f"{name}_mask"), eos_token_ids):
                return
    raise ValueError(
        "Some completions must end in EOS: without the boundary there every policy balances the flow, and rewards do not "
        f"reach the doctor. Got none that end in one of the ids {eos_token_ids} within `max_length`={max_length}; use a "
        "chat template that closes the assistant's turn with EOS, or raise `max_length`."
    )

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

"""From the texts of a preference dataset to token ids, the same for patient and doctor."""

import json
import reprlib
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import is_conversational, maybe_extract_prompt

from .faces import Faces, apply_face, has_system_role


ID_COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]
FACE_COLUMNS = ["positive_prompt_ids", "negative_prompt_ids"]
TRANSCRIPT_TURN = "\n\nAssistant:"  # as in HH-RLHF, whose `chosen` and `rejected` are whole transcripts


def tokenize_preferences(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    faces: Faces | None,
    eos_token_ids: list[int],
    max_length: int | None = None,
    drop_unusable: bool = False,
) -> Dataset | IterableDataset:
    """
    Add `prompt_ids`, `chosen_ids` and `rejected_ids` and, given faces, the prompts as the patient will see them.

    Raises:
        `ValueError`: when the dataset has images, lacks the columns, or has a pair without a usable prompt or
        completion (unless these are dropped).
    """
    check_preference_columns(dataset)
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
            "drop_unusable": drop_unusable,
        },
        **({"desc": "Tokenizing preferences"} if is_map_style else {}),
    )
    if drop_unusable:
        tokenized = tokenized.filter(lambda row: len(row["prompt_ids"]) > 0)
        if is_map_style and len(tokenized) == 0:
            raise ValueError(
                f"At least one pair must be usable. All {len(dataset)} have an empty prompt or completion, or a prompt "
                f"of `max_length`={max_length} tokens or more; raise `max_length` or look at the data."
            )
    return tokenized


def _tokenize_row(row: dict, index: int, *, drop_unusable: bool, **settings) -> dict:
    try:
        return tokenize_pair(row, **settings)
    except ValueError as error:
        if not drop_unusable:
            raise ValueError(f"Row {index} of the dataset: {error}") from error
        return {name: [] for name in ID_COLUMNS + (FACE_COLUMNS if settings["faces"] else [])}


def tokenize_pair(
    example: dict,
    processing_class: PreTrainedTokenizerBase,
    *,
    faces: Faces | None,
    system_role: bool,
    eos_token_ids: list[int],
    max_length: int | None = None,
) -> dict[str, list[int]]:
    """
    Token ids of one preference pair.

    The completion starts where the tokenized prompt and the tokenized prompt with completion part ways, and ends with
    its last EOS: what a chat template prints after it (a newline) is never generated.

    Raises:
        `ValueError`: when the pair is neither of texts nor of messages, the prompt is empty or as long as `max_length`, or
        a completion has no token but EOS.
    """
    _check_texts(example)
    example = split_prompt(example)
    prompt, template = example["prompt"], _template_arguments(example)
    prompt_ids = tokenize_prompt(prompt, processing_class, **template)
    completed = []
    for name in ("chosen", "rejected"):
        if is_conversational(example):
            text_ids = _apply_chat_template(processing_class, prompt + example[name], **template)
        else:
            text = prompt + example[name]
            text_ids = processing_class(
                text + ("" if text.endswith(processing_class.eos_token) else processing_class.eos_token)
            )["input_ids"]
        completed.append(text_ids)
    prompt_length = min(_common_prefix_length(prompt_ids, text_ids) for text_ids in completed)
    left_out = prompt_ids[prompt_length:]  # rendered or merged differently once a completion follows
    row = {"prompt_ids": prompt_ids[:prompt_length]}
    _check_prompt(row["prompt_ids"], max_length)

    for name, text_ids in zip(("chosen", "rejected"), completed, strict=True):
        completion_ids = _cut_after_eos(text_ids[prompt_length:], processing_class, eos_token_ids)
        if all(token_id in eos_token_ids for token_id in completion_ids):
            raise ValueError(
                f"A completion must have at least one token before EOS. Got an empty {name!r} one; leave the pair out, or pass `drop_unusable=True`."
            )
        row[f"{name}_ids"] = completion_ids[: None if max_length is None else max_length - prompt_length]

    if faces is not None:
        for face, instruction in vars(faces).items():
            faced = apply_face(prompt, instruction, system_role=system_role)
            face_ids = tokenize_prompt(faced, processing_class, **template)
            if left_out and face_ids[-len(left_out) :] != left_out:
                raise ValueError(
                    "The prompt must end in the same tokens under both faces as without. Got "
                    f"{processing_class.decode(face_ids[-len(left_out) :])!r} instead of "
                    f"{processing_class.decode(left_out)!r}; end the prompt on a token boundary."
                )
            row[f"{face}_prompt_ids"] = face_ids[: len(face_ids) - len(left_out)]
    return row


def split_prompt(example: dict) -> dict:
    """
    A preference pair with an explicit prompt. Whole transcripts (HH-RLHF) are cut after the last shared
    `"\\n\\nAssistant:"`, others where chosen and rejected part ways, as TRL does.
    """
    explicit = {
        **example,
        **maybe_extract_prompt({key: example[key] for key in ("prompt", "chosen", "rejected") if key in example}),
    }
    if "prompt" not in example and isinstance(explicit["prompt"], str) and TRANSCRIPT_TURN in explicit["prompt"]:
        end = explicit["prompt"].rindex(TRANSCRIPT_TURN) + len(TRANSCRIPT_TURN)
        explicit["prompt"] = example["chosen"][:end]
        explicit["chosen"], explicit["rejected"] = example["chosen"][end:], example["rejected"][end:]
    return explicit


def tokenize_prompt(prompt: str | list[dict], processing_class: PreTrainedTokenizerBase, **template) -> list[int]:
    """Token ids of a text, or of messages followed by what makes the assistant speak. Raises `ValueError` on neither."""
    if isinstance(prompt, str):
        return processing_class(prompt)["input_ids"]
    if not _are_messages(prompt):
        raise ValueError(
            f"A prompt must be a text, or messages that have a role. Got {reprlib.repr(prompt)}; mend it, or leave it out."
        )
    continued = prompt[-1]["role"] == "assistant"
    return _apply_chat_template(
        processing_class, prompt, add_generation_prompt=not continued, continue_final_message=continued, **template
    )


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


def eos_token_ids(processing_class: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> list[int]:
    """All ids that end a text: the tokenizer's, and those of the model's generation config."""
    found = [processing_class.eos_token_id]
    if model is not None and model.can_generate():
        from_model = model.generation_config.eos_token_id
        found += from_model if isinstance(from_model, list) else [from_model]
    return sorted({token_id for token_id in found if token_id is not None})


def row_lengths(dataset: Dataset) -> list[int]:
    """Tokens of the longer of the two rows that each tokenized pair makes."""
    prompt, chosen, rejected = column_lengths(dataset, ID_COLUMNS)
    return np.maximum(prompt + chosen, prompt + rejected).tolist()


def column_lengths(dataset: Dataset, columns: Sequence[str]) -> np.ndarray:
    """Tokens in each row of columns of token ids, (columns, rows)."""
    table = dataset.select_columns(list(columns)).with_format("arrow")[:]
    return np.stack([pc.list_value_length(table.column(name)).to_numpy() for name in columns])


def _template_arguments(example: dict) -> dict:
    tools = example.get("tools")
    return {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(example.get("chat_template_kwargs") or {}),
    }


def _apply_chat_template(processing_class: PreTrainedTokenizerBase, messages: list[dict], **template) -> list[int]:
    return processing_class.apply_chat_template(messages, tokenize=True, return_dict=True, **template)["input_ids"]


def _common_prefix_length(first: list[int], second: list[int]) -> int:
    for length, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return length
    return min(len(first), len(second))


def _cut_after_eos(
    completion_ids: list[int], processing_class: PreTrainedTokenizerBase, eos_token_ids: list[int]
) -> list[int]:
    for end in range(len(completion_ids), 0, -1):
        if completion_ids[end - 1] in eos_token_ids:
            return completion_ids if processing_class.decode(completion_ids[end:]).strip() else completion_ids[:end]
    return completion_ids


def _check_texts(example: dict) -> None:
    pair = {name: example[name] for name in ("prompt", "chosen", "rejected") if name in example}
    are_texts = all(isinstance(value, str) for value in pair.values())
    if not (are_texts or all(map(_are_messages, pair.values()))):
        raise ValueError(
            "Prompt and completions must all be texts, or all lists of messages that have a role. Got "
            f"{reprlib.repr(pair)}; mend the pair, leave it out, or pass `drop_unusable=True`."
        )


def _are_messages(value) -> bool:
    return isinstance(value, list) and value and all(isinstance(x, dict) and x.get("role") for x in value)


def _check_prompt(prompt_ids: list[int], max_length: int | None) -> None:
    if not prompt_ids:
        raise ValueError(
            "A prompt must have at least one token. Got an empty one; use a tokenizer with a BOS token, leave the pair "
            "out, or pass `drop_unusable=True`."
        )
    if max_length is not None and len(prompt_ids) >= max_length:
        raise ValueError(
            f"A prompt must be shorter than `max_length`, or no completion token is left. Got {len(prompt_ids)} tokens "
            f"with `max_length`={max_length}; raise it, leave the pair out, or pass `drop_unusable=True`."
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


def check_some_completion_ends(dataset: Dataset | IterableDataset, eos_token_ids: list[int]) -> None:
    """Raise `ValueError` when none of the first 1,000 pairs has a completion that ends in EOS."""
    head = islice(dataset, 1000)
    if not any(row[name][-1:] and row[name][-1] in eos_token_ids for row in head for name in ID_COLUMNS[1:]):
        raise ValueError(
            "Some completions must end in EOS: without the boundary there every policy balances the flow, and "
            f"rewards do not reach the doctor. Got none that end in one of the ids {eos_token_ids}; use a chat "
            "template that closes the assistant's turn with EOS, or raise `max_length`."
        )

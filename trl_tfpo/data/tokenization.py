# SPDX-License-Identifier: Apache-2.0

"""
Tokenization of preference datasets, the same for patient and doctor.

A completion is the text from the end of the prompt to the end of the assistant's last turn. Its mask marks the tokens
of the assistant. Tokens of users and tools are context, without rewards.
"""

import os
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..common.language_model import LanguageModel
from ..faces import Faces, apply_face, has_system_role
from .preferences import (
    OTHER_TURN,
    REMEDY,
    TRANSCRIPT_TURN,
    clean_messages,
    empty_completion,
    is_transcript,
    read_pair,
)
from .rendering import ChatTemplate, complete_messages, complete_text, template_variables


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
        `ValueError`: if the dataset is empty, has images or lacks columns; if a row is unusable and `drop_unusable` is
            false; if all rows are unusable, unless the dataset is streamed.
    """
    check_preference_columns(dataset)
    first = next(iter(dataset))
    has_transcripts = any(is_transcript(first.get(name)) for name in ("prompt", "chosen"))
    if has_transcripts and processing_class.chat_template is not None and not convert_transcripts:
        warnings.warn(
            f"The dataset has transcripts ({OTHER_TURN!r}, {TRANSCRIPT_TURN!r}), but the tokenizer has a chat "
            "template: the prompts will not have the format that the model was trained on. Pass "
            "`convert_transcripts=True` to convert the transcripts to messages.",
            stacklevel=2,
        )
    is_map_style = isinstance(dataset, Dataset)
    features = dataset.features  # explicit, because a type cannot be inferred from the empty lists of unusable rows
    if features is not None:
        new = ID_COLUMNS + MASK_COLUMNS + (FACE_COLUMNS if faces else [])
        features = Features({**features, **dict.fromkeys(new, List(Value("int64")))})
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
        features=features,
        **({"desc": "Tokenizing preferences"} if is_map_style else {}),
    )
    if drop_unusable:
        tokenized = tokenized.filter(lambda row: len(row["prompt_ids"]) > 0)
        if is_map_style and len(tokenized) == 0:
            raise ValueError(
                f"At least one pair must be usable. Got {len(dataset)} unusable pairs; call without `drop_unusable` "
                f"to see the error of the first. Prompts must be shorter than `max_length` (here {max_length})."
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
    Tokenize one preference pair.

    Prompt and completion are tokenized together. The completion ends with the EOS of the assistant's last turn, even
    if the chat template adds text after EOS. If the completion changes the tokens at the end of the prompt, the new
    tokens belong to the completion, and are masked if they end within the prompt.

    Args:
        example (`dict`):
            Row, see [`~trl_tfpo.data.preferences.read_pair`]. Its optional columns `tools` (a list of schemas) and
            `chat_template_kwargs` (a `dict`) are passed to the chat template. Both may be JSON.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        faces ([`~trl_tfpo.faces.Faces`], *optional*):
            Contrastive prompts. With them, the prompt is also rendered under each face.
        system_role (`bool`):
            Whether the chat template has a system role, see [`~trl_tfpo.faces.has_system_role`].
        eos_token_ids (`list[int]`):
            Ids at which generation stops, see [`all_eos_token_ids`].
        max_length (`int`, *optional*):
            Maximum number of tokens of prompt and completion together; longer completions are truncated at the end.
        convert_transcripts (`bool`, *optional*, defaults to `False`):
            Whether to convert transcripts to messages.

    Returns:
        `dict[str, list[int]]`: `prompt_ids`, `chosen_ids` and `rejected_ids`; `chosen_mask` and `rejected_mask`, 1 for
        tokens of the assistant and 0 for others; with faces, `positive_prompt_ids` and `negative_prompt_ids`.

    Raises:
        `ValueError`: if the row is not a preference pair, see [`~trl_tfpo.data.preferences.read_pair`]; if the chat
            template fails, see [`~trl_tfpo.data.rendering.complete_messages`], or `tools` or `chat_template_kwargs`
            are not valid, see [`~trl_tfpo.data.rendering.template_variables`]; if the prompt is empty, or has
            `max_length` or more tokens; if a completion has no token before EOS, or no token of the assistant within
            `max_length`; if a face cannot be added to the prompt, see [`~trl_tfpo.faces.apply_face`], or changes its
            last tokens.
    """
    template = ChatTemplate(processing_class, template_variables(example, processing_class))
    is_text = isinstance(example.get("prompt", example["chosen"]), str) and isinstance(example["chosen"], str)
    openings = (template.opening,) if is_text else ()
    pair = read_pair(example, openings=openings, convert_transcripts=convert_transcripts)
    prompt, completions = pair["prompt"], [pair["chosen"], pair["rejected"]]
    if isinstance(prompt, str):
        opened, (leading, start) = prompt, _leading_tokens(prompt, processing_class)
        rendered = [complete_text(prompt, completion, processing_class) for completion in completions]
    else:
        opened, leading, start = _open(prompt, template), [], ""
        eos_tokens = list(filter(None, processing_class.convert_ids_to_tokens(eos_token_ids)))
        rendered = [complete_messages(prompt, completion, opened, template, eos_tokens) for completion in completions]
    prompt_ids = leading + _encode(opened, processing_class)
    completed = [_tokenize_spans(text, spans, leading, template, eos_token_ids) for text, spans in rendered]
    prompt_length = min(_common_prefix_length(prompt_ids, ids) for ids, _ in completed)
    merged = prompt_ids[prompt_length:]  # tokens that change when a completion follows
    row = {"prompt_ids": prompt_ids[:prompt_length]}
    _check_prompt(row["prompt_ids"], max_length)

    for name, (ids, mask) in zip(("chosen", "rejected"), completed, strict=True):
        if all(token_id in eos_token_ids for token_id, is_assistant in zip(ids, mask, strict=True) if is_assistant):
            raise empty_completion(name)
        end = len(mask) - mask[::-1].index(True)
        kept = slice(prompt_length, end if max_length is None else min(end, max_length))
        row[f"{name}_ids"] = ids[kept]
        row[f"{name}_mask"] = [int(is_assistant) for is_assistant in mask[kept]]
        if not any(row[f"{name}_mask"]):
            raise ValueError(
                "A completion must have a token of the assistant within `max_length`. Got none in the first "
                f"{max_length} tokens of prompt and {name!r}; raise `max_length`, or {REMEDY}"
            )

    if faces is not None:
        bare = prompt[len(start) :] if start else prompt
        for face in ("positive", "negative"):
            instruction = getattr(faces, face)
            faced = apply_face(bare, instruction, system_role=system_role, placement=faces.placement)
            opened = start + faced if isinstance(faced, str) else _open(faced, template)
            face_ids = leading + _encode(opened, processing_class)
            if merged and face_ids[-len(merged) :] != merged:
                raise ValueError(
                    "The prompt must end in the same tokens with and without a face. Got "
                    f"{processing_class.decode(face_ids[-len(merged) :])!r} instead of "
                    f"{processing_class.decode(merged)!r}; end the prompt on a token boundary."
                )
            row[f"{face}_prompt_ids"] = face_ids[: len(face_ids) - len(merged)]
    return row


def tokenize_prompt(prompt: str | list[dict], processing_class: PreTrainedTokenizerBase, **template) -> list[int]:
    """
    Tokenize a text, or messages with the opening of the assistant's turn. A final message of the assistant is left
    open instead.

    Raises:
        `ValueError`: if the prompt is neither a text nor messages, or the chat template fails.
    """
    if isinstance(prompt, str):
        return _leading_tokens(prompt, processing_class)[0] + _encode(prompt, processing_class)
    return _encode(_open(clean_messages(prompt), ChatTemplate(processing_class, template)), processing_class)


# Texts and ids


def _open(messages: list[dict], template: ChatTemplate) -> str:
    return template.render_prompt(messages, is_continued=messages[-1]["role"] == "assistant")


def _tokenize_spans(
    text: str,
    spans: list[tuple[int, int]],
    leading: list[int],
    template: ChatTemplate,
    eos_token_ids: list[int],
) -> tuple[list[int], list[bool]]:
    """
    Tokenize a text after leading special tokens, and mark the tokens of the assistant.

    Tokens of a span are the assistant's up to EOS. A text that is already rendered may have further turns of the
    assistant in the span; each begins after the opening of the chat template. A token across the start of a span is
    the assistant's; a token across the end of a span is not.
    """
    processing_class = template.processing_class
    encoded = processing_class(text, add_special_tokens=False, return_offsets_mapping=processing_class.is_fast)
    ids = leading + encoded["input_ids"]
    if processing_class.is_fast:
        ends = [0] * len(leading) + [end for _, end in encoded["offset_mapping"]]

    def num_tokens(end: int) -> int:
        """Number of tokens that end at or before a character."""
        if processing_class.is_fast:
            return bisect_right(ends, end)
        return _common_prefix_length(leading + _encode(text[:end], processing_class), ids)

    is_assistant = [False] * len(ids)
    for start, end in spans:
        start, end = num_tokens(start), num_tokens(end)
        opening, in_turn = None, True
        for at in range(start, end):
            if not in_turn:
                opening = _encode(template.opening, processing_class) if opening is None else opening
                in_turn = len(opening) > 0 and ids[max(start, at - len(opening)) : at] == opening
            is_assistant[at] = in_turn
            in_turn = in_turn and ids[at] not in eos_token_ids
    return ids, is_assistant


def _encode(text: str, processing_class: PreTrainedTokenizerBase) -> list[int]:
    return processing_class(text, add_special_tokens=False)["input_ids"]


def _leading_tokens(text: str, processing_class: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """
    Special tokens that the tokenizer puts before a text.

    Returns their ids and "". If the text already starts with these tokens, returns no ids and this start of the text.
    """
    plain, whole = _encode("a", processing_class), processing_class("a")["input_ids"]
    starts = [k for k in range(len(whole)) if plain and whole[k : k + len(plain)] == plain]
    special = whole[: starts[0]] if starts else []
    if not special or _encode(text, processing_class)[: len(special)] != special:
        return special, ""
    start = "".join(processing_class.convert_ids_to_tokens(special))
    return [], start if text.startswith(start) else ""


def _common_prefix_length(first: list[int], second: list[int]) -> int:
    return len(os.path.commonprefix([first, second]))


# Checks


def resolve_processing_class(
    processing_class: PreTrainedTokenizerBase | None, model: LanguageModel, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return `processing_class`, by default the tokenizer of the model, with a padding token."""
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(
            model.config._name_or_path, trust_remote_code=trust_remote_code
        )
    check_is_tokenizer(processing_class)
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def check_is_tokenizer(processing_class: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` for a multimodal processor, or any other object that is not a tokenizer."""
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            "`processing_class` must be a tokenizer, because token rewards are defined for text only. Got a "
            f"`{type(processing_class).__name__}`; pass a tokenizer, such as `processor.tokenizer`, and a dataset of "
            "texts."
        )


def all_eos_token_ids(processing_class: PreTrainedTokenizerBase, *models: "LanguageModel | None") -> list[int]:
    """Collect the ids at which generation stops, from the tokenizer and the generation configs of the models."""
    found = {processing_class.eos_token_id}
    for model in models:
        if model is not None and model.can_generate():
            from_model = getattr(model.generation_config, "eos_token_id", None)
            found.update(from_model if isinstance(from_model, list) else [from_model])
    return sorted(found - {None})


def row_lengths(dataset: Dataset) -> list[int]:
    """Number of tokens of the prompt and the longer completion of each tokenized pair."""
    prompt, chosen, rejected = column_lengths(dataset, ID_COLUMNS)
    return (prompt + np.maximum(chosen, rejected)).tolist()


def column_lengths(dataset: Dataset, columns: Sequence[str]) -> np.ndarray:
    """Number of tokens in each row of columns of token ids, (columns, rows)."""
    table = dataset.select_columns(list(columns)).with_format("arrow")[:]
    return np.stack([pc.list_value_length(table.column(name)).to_numpy() for name in columns])


def _check_prompt(prompt_ids: list[int], max_length: int | None) -> None:
    if not prompt_ids:
        raise ValueError(
            f"A prompt must have at least one token. Got none; use a tokenizer with a BOS token, or {REMEDY}"
        )
    if max_length is not None and len(prompt_ids) >= max_length:
        raise ValueError(
            f"A prompt must be shorter than `max_length`. Got {len(prompt_ids)} tokens with "
            f"`max_length`={max_length}; raise `max_length`, or {REMEDY}"
        )


def columns_of(dataset: Dataset | IterableDataset) -> set[str]:
    """Return the names of the columns. Raise `ValueError` if the dataset is empty, or not of the library Datasets."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            "A dataset must be a `Dataset` or an `IterableDataset` of the library Datasets. Got a "
            f"`{type(dataset).__name__}`; convert it, for instance with `Dataset.from_list(rows)`."
        )
    columns = dataset.column_names or next(iter(dataset), None)
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError("A dataset must have at least one row. Got none; check its file and its split.")
    return set(columns)


def check_preference_columns(dataset: Dataset | IterableDataset) -> None:
    """Raise `ValueError` unless the dataset has preference pairs of texts."""
    columns = columns_of(dataset)
    if columns & {"image", "images"}:
        raise ValueError(
            "Token rewards are defined for text only. Got a vision dataset with "
            f"{sorted(columns & {'image', 'images'})}; remove the column, or use a text dataset."
        )
    if not {"chosen", "rejected"} <= columns:
        raise ValueError(
            "A preference dataset needs the columns 'chosen' and 'rejected', and 'prompt' unless both contain the "
            f"prompt. Got {sorted(columns)}; rename columns, or add the missing ones."
        )


def is_complete(completion_ids: Sequence[int], mask: Sequence[int] | None, eos_token_ids: Sequence[int]) -> bool:
    """Whether a completion ends with an EOS of the assistant, that is, it is not truncated."""
    return len(completion_ids) > 0 and completion_ids[-1] in eos_token_ids and (mask is None or bool(mask[-1]))


def check_some_completion_ends(
    dataset: Dataset | IterableDataset, eos_token_ids: list[int], max_length: int | None = None
) -> None:
    """Raise `ValueError` if no completion of the first 1,000 pairs ends in EOS within `max_length`."""
    for row in islice(dataset, 1000):
        for name in ("chosen", "rejected"):
            ids = row[f"{name}_ids"]
            is_whole = max_length is None or len(row["prompt_ids"]) + len(ids) <= max_length
            if is_whole and is_complete(ids, row.get(f"{name}_mask"), eos_token_ids):
                return
    raise ValueError(
        "Some completions must end in EOS: without the boundary at EOS every policy balances the flow, and rewards "
        f"have no effect. Got none that end in one of the ids {eos_token_ids} within `max_length`={max_length}; "
        "use a chat template that closes the assistant's turn with EOS, or raise `max_length`."
    )

# SPDX-License-Identifier: Apache-2.0

"""Data collator: pads annotated preference pairs to a training batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin

from .. import functional
from ..annotation.token_rewards import REWARD_COLUMNS, annotation_settings, check_patient, score_token_rewards
from ..common.arguments import check_counts
from ..data.tokenization import (
    FACE_COLUMNS,
    ID_COLUMNS,
    MASK_COLUMNS,
    all_eos_token_ids,
    is_complete,
    tokenize_pair,
)
from ..faces import Faces, has_system_role, resolve_faces
from .config import TFPOConfig


@dataclass
class TokenRewardCollator(DataCollatorMixin):
    """
    Collate preference pairs with a reward for each completion token.

    Rewards are read from the columns of [`annotate_token_rewards`]. With a patient, the same rewards are computed for
    each batch instead, and the patient stays loaded. P pairs give 2P rows, chosen completions first, padded on the
    right; L tokens in a row, T tokens of the assistant in a completion.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of patient and doctor. Defaults to the tokenizer of the patient.
        patient ([`~transformers.PreTrainedModel`], *optional*):
            Frozen model that scores each batch. It needs `faces`, and a data loader without worker processes.
        faces ([`~trl_tfpo.faces.Faces`] or `str`, *optional*):
            Contrastive prompts: a pair of opposite instructions for the patient, or the name of a built-in pair.
        reward_fn (`Callable`, *optional*, defaults to [`~trl_tfpo.functional.token_rewards`]):
            Reward function for a patient, see [`annotate_token_rewards`]. Set its options with `functools.partial`.
        max_length (`int`, *optional*):
            Maximum number of tokens in a row; longer rows are truncated. By default nothing is truncated.
        pad_to_multiple_of (`int`, *optional*):
            Pad L to a multiple of this number.
        batch_size (`int`, *optional*, defaults to `16`):
            Sequences in one forward pass of the patient.
        eos_token_ids (`list[int]`, *optional*):
            Ids that end a completion. Defaults to those of the tokenizer and of the patient's generation config.
            [`TFPOTrainer`] adds those of the doctor and of the annotation.
        convert_transcripts (`bool`, *optional*, defaults to `False`):
            Whether to convert transcripts to messages for a patient, see [`annotate_token_rewards`].

    Returns, when called with a list of P examples, a `dict` of `torch.Tensor`:
        - `input_ids`, `attention_mask` (2P, L), and `completion_mask` (2P, L), True for tokens of the assistant;
        - `token_rewards` (2P, T): rewards of these tokens, left-aligned, float32;
        - `is_complete` (2P,): True if the completion ends in EOS;
        - `gaps` (2P, T): positive minus negative log-probability, in nats, if the examples have gaps;
        - `reference_logps` (2P, T), in nats, if the examples have `chosen_ref_logps` and `rejected_ref_logps`.

    Raises:
        `ValueError`: if there is neither a tokenizer nor a patient; if the rewards of an example are missing, not
            finite, or not one for each token; if a prompt or completion is empty, a prompt has `max_length` or more
            tokens, or a completion has no token of the assistant within `max_length`; if a patient has no faces or
            another tokenizer, or is called in a worker process.

    Examples:

    ```python
    >>> from trl_tfpo import TokenRewardCollator
    >>> from trl_tfpo.testbed import load_world
    >>> collator = TokenRewardCollator(processing_class=load_world().tokenizer)
    >>> pair = {
    ...     "prompt_ids": [5, 6],
    ...     "chosen_ids": [7, 8, 9],
    ...     "rejected_ids": [7],
    ...     "chosen_token_rewards": [0.0, 0.9, 0.0],
    ...     "rejected_token_rewards": [-0.5],
    ... }
    >>> batch = collator([pair])
    >>> batch["completion_mask"].int()
    tensor([[0, 0, 1, 1, 1],
            [0, 0, 1, 0, 0]], dtype=torch.int32)
    >>> batch["token_rewards"]
    tensor([[ 0.0000,  0.9000,  0.0000],
            [-0.5000,  0.0000,  0.0000]])

    ```
    """

    processing_class: PreTrainedTokenizerBase | None = None
    patient: PreTrainedModel | None = None
    faces: Faces | str | None = None
    reward_fn: Callable[..., torch.Tensor] = functional.token_rewards
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    batch_size: int = 16
    eos_token_ids: list[int] | None = None
    convert_transcripts: bool = False
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        check_counts(
            max_length=self.max_length, pad_to_multiple_of=self.pad_to_multiple_of, batch_size=self.batch_size
        )
        if self.processing_class is None:
            if self.patient is None:
                raise ValueError(
                    "`TokenRewardCollator` needs a `processing_class` or a `patient`. Got neither; pass one."
                )
            self.processing_class = AutoTokenizer.from_pretrained(
                self.patient.config._name_or_path, trust_remote_code=False
            )
        if self.patient is not None:
            if self.faces is None:
                raise ValueError(
                    "`TokenRewardCollator` needs `faces` for its patient. Got None; pass "
                    "`Faces(positive=..., negative=...)` or the name of a built-in pair."
                )
            self.faces = resolve_faces(self.faces)
            check_patient(self.patient, self.processing_class)
        if self.eos_token_ids is None:
            self.eos_token_ids = all_eos_token_ids(self.processing_class, self.patient)

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return cast(PreTrainedTokenizerBase, self.processing_class)  # set in `__post_init__`

    @cached_property
    def _has_system_role(self) -> bool:
        return has_system_role(self._tokenizer)

    @property
    def _eos_token_ids(self) -> list[int]:
        return self.eos_token_ids or []

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.patient is not None:
            examples = self._add_scores(self.patient, examples)
        needed = {*ID_COLUMNS, *REWARD_COLUMNS}
        if not examples or any(needed - example.keys() for example in examples):
            raise ValueError(
                f"A batch must consist of pairs with {sorted(needed)}. Got "
                f"{[sorted(example) for example in examples[:1]]}; annotate the dataset first with "
                "`annotate_token_rewards`, or pass a `patient` to the collator."
            )
        rows = [self._row(example, name) for name in ("chosen", "rejected") for example in examples]  # 2P

        input_ids = [row["prompt_ids"] + row["completion_ids"] for row in rows]
        length = max(len(ids) for ids in input_ids)
        if self.pad_to_multiple_of:
            length += -length % self.pad_to_multiple_of
        position = torch.arange(length)
        lengths = torch.tensor([len(ids) for ids in input_ids])
        attention_mask = position < lengths[:, None]  # (2P, L)
        pad_token_id = self._tokenizer.pad_token_id
        padded = torch.full(attention_mask.shape, self._eos_token_ids[0] if pad_token_id is None else pad_token_id)
        padded[attention_mask] = torch.tensor([token_id for ids in input_ids for token_id in ids])
        completion_mask = torch.zeros_like(attention_mask)
        completion_mask[attention_mask] = torch.tensor(
            [bool(is_assistant) for row in rows for is_assistant in [0] * len(row["prompt_ids"]) + row["mask"]]
        )
        batch = {
            "input_ids": padded,
            "attention_mask": attention_mask.long(),
            "completion_mask": completion_mask,
            "is_complete": torch.tensor(
                [is_complete(row["completion_ids"], row["mask"], self._eos_token_ids) for row in rows]
            ),
        }
        for name in ("token_rewards", "gaps", "reference_logps"):
            values = [torch.as_tensor(row[name], dtype=torch.float32) for row in rows if name in row]
            if not values:
                continue
            batch[name] = pad_sequence(values, batch_first=True)  # (2P, T)
            if len(values) < len(rows) or not batch[name].isfinite().all():
                raise ValueError(
                    f"`{name}` must be finite, and present for all completions or for none. Got it for {len(values)} "
                    f"of {len(rows)} completions, with {int((~batch[name].isfinite()).sum())} values that are not "
                    "finite; score the dataset again."
                )
        return batch

    def _row(self, example: dict[str, Any], name: str) -> dict[str, list]:
        """One completion of a pair, truncated to `max_length`."""
        prompt_ids, completion_ids = list(example["prompt_ids"]), list(example[f"{name}_ids"])
        if self.max_length is not None and len(prompt_ids) >= self.max_length:
            raise ValueError(
                "A prompt must have fewer than `max_length` tokens, to leave room for its completion. Got "
                f"{len(prompt_ids)} tokens with `max_length={self.max_length}`; raise it, or drop the pair."
            )
        if not prompt_ids or not completion_ids:
            raise ValueError(
                f"Prompts and completions must have at least one token. Got {len(prompt_ids)} in the prompt and "
                f"{len(completion_ids)} in the {name} completion; drop the pair."
            )
        room = slice(None if self.max_length is None else self.max_length - len(prompt_ids))
        mask = example.get(f"{name}_mask")
        mask = [1] * len(completion_ids) if mask is None else list(mask)
        if len(mask) != len(completion_ids) or not any(mask[room]):
            raise ValueError(
                f"`{name}_mask` must have one entry for each completion token, and at least one that is 1. Got "
                f"{len(mask)} entries for {len(completion_ids)} tokens, of which {sum(mask[room])} are 1 within "
                f"`max_length={self.max_length}`; annotate the dataset again, or drop the pair."
            )
        row = {"prompt_ids": prompt_ids, "completion_ids": completion_ids[room], "mask": mask[room]}
        for key, column in {"token_rewards": "token_rewards", "gaps": "gaps", "reference_logps": "ref_logps"}.items():
            values = example.get(f"{name}_{column}")
            if values is None:
                continue
            if len(values) != len(completion_ids):
                raise ValueError(
                    f"`{name}_{column}` must have one entry for each completion token. Got {len(values)} for "
                    f"{len(completion_ids)} tokens; annotate the dataset again, with the tokenizer of the doctor."
                )
            row[key] = [value for value, is_assistant in zip(values[room], row["mask"], strict=True) if is_assistant]
        return row

    def _add_scores(self, patient: PreTrainedModel, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add rewards and gaps from the patient to the examples."""
        if get_worker_info() is not None:
            raise ValueError(
                "A `TokenRewardCollator` with a patient must run in the main process. Got a call in a worker process; "
                "set `dataloader_num_workers=0`, or annotate the dataset first with `annotate_token_rewards`."
            )
        examples = [
            example if FACE_COLUMNS[0] in example else {**example, **self._tokenize(example)} for example in examples
        ]
        names = ["chosen_ids", "rejected_ids", *FACE_COLUMNS, *(name for name in MASK_COLUMNS if name in examples[0])]
        columns = {name: [example[name] for example in examples] for name in names}
        rewards, gaps = score_token_rewards(
            columns, patient=patient, reward_fn=self.reward_fn, batch_size=self.batch_size
        )
        num_pairs = len(examples)
        return [
            {
                **example,
                "chosen_token_rewards": rewards[index],
                "rejected_token_rewards": rewards[num_pairs + index],
                "chosen_gaps": gaps[index],
                "rejected_gaps": gaps[num_pairs + index],
            }
            for index, example in enumerate(examples)
        ]

    def _tokenize(self, example: dict[str, Any]) -> dict[str, list[int]]:
        return tokenize_pair(
            example,
            self._tokenizer,
            faces=None if self.faces is None else resolve_faces(self.faces),
            system_role=self._has_system_role,
            eos_token_ids=self._eos_token_ids,
            max_length=self.max_length,
            convert_transcripts=self.convert_transcripts,
        )


def align_with_collator(
    collator: TokenRewardCollator, args: TFPOConfig, dataset: object, eos_token_ids: list[int]
) -> list[int]:
    """
    Merge the given EOS ids with those of the collator and those recorded in the dataset by annotation.

    The collator gets the merged ids, in place. Collator and settings both convert transcripts if one of them does.
    """
    recorded = annotation_settings(dataset) if isinstance(dataset, Dataset | IterableDataset) else None
    recorded_ids = (recorded or {}).get("eos_token_ids", [])
    collator.eos_token_ids = sorted({*eos_token_ids, *(collator.eos_token_ids or ()), *recorded_ids})
    collator.convert_transcripts = args.convert_transcripts = collator.convert_transcripts or args.convert_transcripts
    return collator.eos_token_ids

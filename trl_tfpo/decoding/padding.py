# SPDX-License-Identifier: Apache-2.0

"""
The prompts of a generation, and the mask of their padding.

Shapes: P prompts, B rows (each prompt is copied to B / P consecutive rows), L tokens so far (padding included).
"""

import torch

from ..common.language_model import LanguageModel


PADDING = -1  # replaces padding ids in the tokens of doctors


class Prompts:
    """
    The prompts of one generation, taken from the ids that `generate` passes to its processors.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model whose special ids identify padding if there is no mask.
        attention_mask (`torch.Tensor` of shape `(P, L)`, *optional*):
            Left-padded mask of the prompts. Without a mask, the first ids are the prompts, and [`guess_mask`] guesses
            their padding.

    Attributes:
        is_mask_given (`bool`): whether there was an `attention_mask`.
        mask (`torch.BoolTensor` of shape `(P, L)`): `True` for tokens of a prompt. Without an `attention_mask` it has
            shape `(1, 0)` before the first ids.
        warning (`str`, *optional*): why a guess of the padding may be wrong.
    """

    def __init__(self, model: LanguageModel, attention_mask: torch.Tensor | None = None):
        if attention_mask is not None:
            check_left_padded(attention_mask)
        self.is_mask_given = attention_mask is not None
        self.mask = torch.ones(1, 0, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        self.warning: str | None = None
        self._model = model
        self._ids: torch.Tensor | None = None  # (P, L)

    @property
    def length(self) -> int:
        """Length of the prompts, padding included."""
        return self.mask.size(1)

    def __len__(self) -> int:
        return self.mask.size(0)

    def mark_padding(self, input_ids: torch.Tensor, is_next: bool = False) -> torch.Tensor:
        """
        Replace the padding of the prompts in `input_ids` (B, L) by [`PADDING`].

        With `is_next`, the ids are known to continue the prompts.

        Raises:
            `ValueError`: when there are no ids, or they do not continue the prompts of the mask.
        """
        if input_ids.dim() != 2 or input_ids.size(1) == 0:
            raise ValueError(
                "`input_ids` must have shape (B, L) with at least one token, because the doctors read them. Got shape "
                f"{tuple(input_ids.shape)}; pass `input_ids` to `generate`, not `inputs_embeds` alone."
            )
        if self.is_mask_given and self._ids is None and input_ids.size(1) == self.length:
            num_copies = max(len(input_ids) // len(self), 1)
            self._ids = input_ids[::num_copies].clone()
        if not (is_next or self._are_continued_by(input_ids)):
            if self.is_mask_given:
                raise ValueError(
                    f"`attention_mask` must be the mask of the prompts. Got a mask {tuple(self.mask.shape)} and ids "
                    f"{tuple(input_ids.shape)} that do not continue its prompts; call `reset(attention_mask=...)` "
                    "before you generate from other prompts."
                )
            self._ids = input_ids.clone()
            self.mask, self.warning = guess_mask(input_ids, self._model)
        mask = self.mask.to(input_ids.device).repeat_interleave(len(input_ids) // len(self), dim=0)
        tokens = input_ids.clone()
        tokens[:, : self.length].masked_fill_(~mask, PADDING)
        return tokens

    def _are_continued_by(self, input_ids: torch.Tensor) -> bool:
        """Whether every row begins with its prompt."""
        if self._ids is None or len(input_ids) % len(self):
            return False
        prompts = self._ids.to(input_ids.device).repeat_interleave(len(input_ids) // len(self), dim=0)
        return torch.equal(input_ids[:, : prompts.size(1)], prompts)


def check_left_padded(attention_mask: torch.Tensor) -> None:
    """Raise `ValueError` unless each row of the mask ends in a one, and its zeros come before its ones."""
    shape = tuple(getattr(attention_mask, "shape", ()))
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            "`attention_mask` must have shape (B, L), with at least one token. Got "
            f"{type(attention_mask).__name__} of shape {shape}; pass the mask that the tokenizer returns with "
            '`return_tensors="pt"`.'
        )
    if not (attention_mask[:, -1].all() and (attention_mask.int().diff(dim=1) >= 0).all()):
        raise ValueError(
            "`attention_mask` must be left-padded, zeros before ones in every row. Got a zero after a one, or "
            "only zeros; set `padding_side='left'` on the tokenizer of the prompts, and leave out empty prompts."
        )


def guess_mask(input_ids: torch.Tensor, model: LanguageModel) -> tuple[torch.Tensor, str | None]:
    """
    Guess the mask of prompts (P, L): leading padding ids are padding.

    The padding id comes from the configs of the model; the default is EOS, as in `generate`. If the padding id is also
    BOS or EOS, the longest prompt is assumed to have no padding.

    Returns:
        `tuple[torch.BoolTensor, str | None]`: the mask (P, L), and a warning if the guess may be wrong.
    """
    bos, eos, pad = (special_ids(model, name) for name in ("bos", "eos", "pad"))
    if not pad + eos:
        return torch.ones_like(input_ids, dtype=torch.bool), None
    pad_token_id, warning = (pad + eos)[0], None
    num_padding = (input_ids == pad_token_id).int().cumprod(dim=1).sum(dim=1, keepdim=True)  # (P, 1)
    if pad_token_id in bos + eos and num_padding.any():
        num_padding = num_padding - num_padding.min()
        warning = (
            f"Prompts begin with id {pad_token_id}, which is the padding id and also BOS or EOS, so their padding is "
            'a guess. Pass `attention_mask=inputs["attention_mask"]` to `DoctorGuidedLogitsProcessor`.'
        )
    position = torch.arange(input_ids.size(1), device=input_ids.device)
    return position >= num_padding.clamp(max=input_ids.size(1) - 1), warning


def special_ids(model: LanguageModel, name: str) -> list[int]:
    """Return the ids of the `"bos"`, `"eos"` or `"pad"` tokens in the generation config and the config of a model."""
    configs = (getattr(model, "generation_config", None), model.config.get_text_config())
    values = [getattr(config, f"{name}_token_id", None) for config in configs]
    return [i for value in values if value is not None for i in (value if isinstance(value, list) else [value])]

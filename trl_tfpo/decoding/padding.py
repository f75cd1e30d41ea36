# SPDX-License-Identifier: Apache-2.0

"""
The prompts of a generation, and which of their ids are padding.

Shapes: P prompts, B rows (each prompt is copied to B / P rows), L tokens so far, padding included.
"""

import torch

from ..common.language_model import LanguageModel


PADDING = -1  # replaces every padding id in the tokens that a doctor reads


class Prompts:
    """
    The prompts of one generation, found in the ids that `generate` passes to its processors.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Its special ids identify padding where no mask is given.
        attention_mask (`torch.Tensor` of shape `(P, L)`, *optional*):
            Mask of the prompts. Without a mask, the first ids seen are the prompts, and their padding is guessed with
            [`guess_mask`].

    Attributes:
        is_mask_given (`bool`): whether there was an `attention_mask`.
        mask (`torch.BoolTensor` of shape `(P, L)`): `True` where a prompt has a token. `(1, 0)` before it is known.
        doubt (`str`, *optional*): why a guess of the padding may be wrong.

    Raises:
        `ValueError`: when the mask is not left-padded.
    """

    def __init__(self, model: LanguageModel, attention_mask: torch.Tensor | None = None):
        if attention_mask is not None:
            check_left_padded(attention_mask)
        self.is_mask_given = attention_mask is not None
        self.mask = torch.ones(1, 0, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        self.doubt: str | None = None
        self._model = model
        self._ids: torch.Tensor | None = None  # (P, L)

    @property
    def length(self) -> int:
        """Ids of each prompt, padding included."""
        return self.mask.size(1)

    def __len__(self) -> int:
        return self.mask.size(0)

    def hide_padding(self, input_ids: torch.Tensor) -> torch.Tensor:
        """
        Replace the padding of the prompts by [`PADDING`].

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`):
                Prompts and completions so far.

        Returns:
            `torch.Tensor` of shape `(B, L)`.

        Raises:
            `ValueError`: when there are no ids, or they do not continue the prompts of the mask.
        """
        if input_ids.dim() != 2 or input_ids.size(1) == 0:
            raise ValueError(
                "`input_ids` must have shape (B, L) with at least one token, because the doctors read them. Got shape "
                f"{tuple(input_ids.shape)}; give `generate` the `input_ids`, not `inputs_embeds` alone."
            )
        if self.is_mask_given and self._ids is None and input_ids.size(1) == self.length:
            num_copies = max(len(input_ids) // len(self), 1)
            self._ids = input_ids[::num_copies].clone()
        if not self._are_continued_by(input_ids):
            if self.is_mask_given:
                raise ValueError(
                    f"`attention_mask` must be the mask of the prompts. Got a mask {tuple(self.mask.shape)} and ids "
                    f"{tuple(input_ids.shape)} that do not continue its prompts; call `reset(attention_mask=...)` "
                    "before you generate from other prompts."
                )
            self._ids = input_ids.clone()
            self.mask, self.doubt = guess_mask(input_ids, self._model)
        mask = self.mask.to(input_ids.device).repeat_interleave(len(input_ids) // len(self), dim=0)
        tokens = input_ids.clone()
        tokens[:, : self.length].masked_fill_(~mask, PADDING)
        return tokens

    def _are_continued_by(self, input_ids: torch.Tensor) -> bool:
        """Whether every row begins with its prompt. The copies of a prompt follow each other."""
        if self._ids is None or len(input_ids) % len(self):
            return False
        prompts = self._ids.to(input_ids.device).repeat_interleave(len(input_ids) // len(self), dim=0)
        return torch.equal(input_ids[:, : prompts.size(1)], prompts)


def check_left_padded(attention_mask: torch.Tensor) -> None:
    """Raise `ValueError` unless each row of the mask has its zeros, if any, before its ones."""
    shape = tuple(getattr(attention_mask, "shape", ()))
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            "`attention_mask` must have shape (B, L), with at least one token. Got "
            f"{type(attention_mask).__name__} of shape {shape}; pass what the tokenizer returned with "
            '`return_tensors="pt"`.'
        )
    if not (attention_mask[:, -1].all() and (attention_mask.int().diff(dim=1) >= 0).all()):
        raise ValueError(
            "`attention_mask` must be left-padded, zeros before ones in every row. Got something else; set "
            "`padding_side='left'` on the tokenizer of the prompts."
        )


def guess_mask(input_ids: torch.Tensor, model: LanguageModel) -> tuple[torch.Tensor, str | None]:
    """
    Guess the mask of prompts: the leading run of padding ids is padding.

    Where the padding id is also BOS or EOS, the longest row is taken to have no padding.

    Args:
        input_ids (`torch.Tensor` of shape `(P, L)`):
            The prompts.
        model ([`~transformers.PreTrainedModel`]):
            Its configs name the padding id. Without one, EOS is the padding, as in `generate`.

    Returns:
        `tuple`: the mask, a `torch.BoolTensor` of shape `(P, L)`, and a warning where the guess may be wrong, else
        `None`.
    """
    bos, eos, pad = (special_ids(model, name) for name in ("bos", "eos", "pad"))
    if not pad + eos:
        return torch.ones_like(input_ids, dtype=torch.bool), None
    pad_token_id, doubt = (pad + eos)[0], None
    run = (input_ids == pad_token_id).int().cumprod(dim=1).sum(dim=1, keepdim=True)  # (P, 1)
    if pad_token_id in bos + eos and run.any():
        run = run - run.min()
        doubt = (
            f"Prompts begin with id {pad_token_id}, which is padding and also begins or ends texts, so what is "
            'padding is a guess. Pass `attention_mask=inputs["attention_mask"]` to `DoctorGuidedLogitsProcessor`.'
        )
    position = torch.arange(input_ids.size(1), device=input_ids.device)
    return position >= run.clamp(max=input_ids.size(1) - 1), doubt


def special_ids(model: LanguageModel, name: str) -> list[int]:
    """Ids of the `"bos"`, `"eos"` or `"pad"` tokens in the generation config and the config of a model."""
    configs = (getattr(model, "generation_config", None), model.config.get_text_config())
    values = [getattr(config, f"{name}_token_id", None) for config in configs]
    return [i for value in values if value is not None for i in (value if isinstance(value, list) else [value])]

# SPDX-License-Identifier: Apache-2.0

"""
From a model to logits where labels are predicted, held as hidden states and a head.

Trainer, reference, base policy and annotation all read models by [`read_logits`], and turn what it returns into
log-probabilities by [`~trl_tfpo.functional.token_logps`].

Shapes: B rows, L tokens of a row, N labels in all rows, H size of a hidden state, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..common._upstream import backbone_of, inference, unwrap_peft
from ..functional import FactoredLogits
from .guidance_head import GuidanceHead
from .head_adapter import adapter_factors, has_adapted_head, has_columns


logger = logging.getLogger(__name__)


class HeadForm(NamedTuple):
    """Logits are `softcap * tanh(scale * (h @ W.T + b) / softcap)`, without the cap where it is `None`."""

    scale: float = 1.0
    softcap: float | None = None


PLAIN = HeadForm()
_FORMS: WeakKeyDictionary[PreTrainedModel, HeadForm | None] = WeakKeyDictionary()


def read_logits(
    model: PreTrainedModel,
    has_label: torch.Tensor,
    /,
    forward: Callable[..., ModelOutput] | None = None,
    in_float32: bool = False,
    **inputs: torch.Tensor,
) -> tuple[list[FactoredLogits | torch.Tensor], torch.Tensor]:
    """
    Logits of a model where labels are predicted, in factors where its head allows it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        has_label (`torch.Tensor` of shape `(B, L - 1)`):
            True at each position whose next token is a label.
        forward (`Callable`, *optional*):
            The model's forward. Defaults to a call of the model.
        in_float32 (`bool`, *optional*, defaults to `False`):
            Whether the product with the head is computed in float32.
        inputs:
            `input_ids` (B, L) and what else the forward takes.

    Returns:
        A list, whose sum is the logits (N, V), row by row: one or two [`~trl_tfpo.functional.FactoredLogits`], or a
        tensor, float32, of a model whose head is sharded, quantized or no such product. And the hidden states
        (B, L, H) that the head reads.
    """
    form = head_form(model) if _has_whole_head(model) else None
    if form is not None and form.softcap is not None and has_adapted_head(model):
        form = None  # the cap is on the sum of the two
    with _showing_labelled(model, has_label, num_shown=None if form is None else 1) as states:
        outputs = (forward or model)(**inputs, use_cache=False)
    if form is None:
        return [outputs.logits[0].float()], states.all
    labelled = states.labelled.float() if in_float32 else states.labelled
    return _factors(model, labelled, form), states.all


def head_form(model: PreTrainedModel) -> HeadForm | None:
    """
    What a model makes of hidden states and its head: their product, perhaps scaled and capped, or else `None`.

    Configs have many names for scales and caps, so they are measured. Hooks put made-up hidden states and a made-up
    product in the place of the model's, so the weights do not matter: the head may be zero. The answer is kept.
    """
    base = unwrap_peft(model)
    if base not in _FORMS:
        try:
            _FORMS[base] = _measured_form(base)
        except Exception as error:  # a forward that needs more than hidden states: its own logits are always right
            logger.info("The head of %s could not be measured: %r", type(base).__name__, error)
            _FORMS[base] = None
    return _FORMS[base]


@torch.no_grad()
def _measured_form(base: PreTrainedModel) -> HeadForm | None:
    head, device = base.get_output_embeddings(), base.get_input_embeddings().weight.device
    size = getattr(head, "in_features", None) or head.weight.size(-1)
    num_tokens = min(8, size)
    # Integers are exact in half precision, too
    weight = torch.randint(-64, 65, (64, size), generator=torch.Generator().manual_seed(0)).to(device, base.dtype)
    hidden = torch.eye(num_tokens, size, device=device, dtype=base.dtype)[None]

    def replace_states(_, __, output):
        output.last_hidden_state = hidden
        return output

    hooks = [
        backbone_of(base).register_forward_hook(replace_states),
        head.register_forward_hook(lambda _, states, __: F.linear(states[0], weight.to(states[0].dtype))),
    ]
    try:
        with inference(base):
            logits = base(input_ids=torch.arange(num_tokens, device=device)[None], use_cache=False).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    return _form_of(hidden[0].float() @ weight.float().T, logits, base)


def _form_of(product: torch.Tensor, logits: torch.Tensor, base: PreTrainedModel) -> HeadForm | None:
    """The form that makes these logits of the product. A cap is one of the numbers in the config."""
    if torch.equal(logits, product):
        return PLAIN
    tolerance = 2e-2 if base.dtype.itemsize < 4 else 1e-4
    numbers = {float(x) for x in vars(base.config.get_text_config()).values() if type(x) in (int, float) and x > 0}
    scale = float((logits * product).sum() / (product * product).sum())
    forms = [HeadForm(scale), *(HeadForm(1.0, softcap) for softcap in sorted(numbers))]
    for form in forms:
        found = product * form.scale
        if form.softcap is not None:
            found = form.softcap * torch.tanh(found / form.softcap)
        if torch.allclose(found, logits, rtol=tolerance, atol=tolerance):
            return form
    return None


def _has_whole_head(model: PreTrainedModel) -> bool:
    """Whether the head's weights are floats, all of them in this process, and LoRA all that is added to them."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point() or hasattr(weight, "ds_id") or isinstance(weight, DTensor):
        return False
    return not has_adapted_head(model) or has_columns(head)


def _factors(model: PreTrainedModel, hidden: torch.Tensor, form: HeadForm) -> list[FactoredLogits | torch.Tensor]:
    """Logits (N, V) of hidden states (N, H), as factors. A sum of two where an adapter is on the head."""
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    if isinstance(head, GuidanceHead):
        hidden = head.to_embedding_space(hidden)
    if form.scale != 1.0:
        hidden, bias = hidden * form.scale, None if bias is None else bias * form.scale
    factors = [FactoredLogits(hidden, head.weight, bias, form.softcap)]
    if has_adapted_head(model):
        factors += [FactoredLogits(*adapted) for adapted in adapter_factors(head, hidden)]
    return factors


def add_logits(
    model: PreTrainedModel, own: list[FactoredLogits | torch.Tensor], base: list[FactoredLogits | torch.Tensor]
) -> list[FactoredLogits | torch.Tensor]:
    """
    The sum of the logits of a doctor and of its base policy, both from [`read_logits`].

    Where the doctor's [`~trl_tfpo.models.guidance_head.GuidanceHead`] and the head of the base policy have the same
    weights, hidden states are added instead: one product in place of two.
    """
    head, first = model.get_output_embeddings(), base[0]
    if isinstance(head, GuidanceHead) and isinstance(first, FactoredLogits) and isinstance(own[0], FactoredLogits):
        if first.softcap is None and head.has_embeddings(first.weight):
            return [first._replace(hidden=own[0].hidden + first.hidden.to(own[0].hidden.dtype)), *own[1:], *base[1:]]
    return [*own, *base]


@dataclass
class _States:
    all: torch.Tensor | None = None  # (B, L, H)
    labelled: torch.Tensor | None = None  # (N, H)


@contextmanager
def _showing_labelled(model: PreTrainedModel, has_label: torch.Tensor, num_shown: int | None) -> Iterator[_States]:
    """
    Within the context the language model head is given one row: the states that predict a label, or the first of them.

    What is yielded will hold the hidden states.
    """
    states = _States()

    def keep(_, __, output):
        states.all = output.last_hidden_state
        states.labelled = states.all[:, :-1][has_label.to(states.all.device)]
        output.last_hidden_state = states.labelled[None, :num_shown]
        return output

    hook = backbone_of(model).register_forward_hook(keep)
    try:
        yield states
    finally:
        hook.remove()

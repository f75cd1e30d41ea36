# SPDX-License-Identifier: Apache-2.0

"""
Read the logits of a model where labels are predicted, in factors: hidden states and head.

Doctor, base policy, reference and annotation all read models by [`read_logits`]. Its result becomes log-probabilities
by [`~trl_tfpo.functional.token_logps`].

Shapes: B rows, L tokens of a row, N labels in all rows, H size of a hidden state, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..common.language_model import LanguageModel, backbone_of, device_of, head_of, inference, unwrap_peft
from ..functional import FactoredLogits, token_logps
from .guidance_head import GuidanceHead
from .head_adapter import adapter_factors, has_adapted_head, is_plain_lora
from .pair_rows import PairRows, worthwhile_pair_rows


logger = logging.getLogger(__name__)


class HeadForm(NamedTuple):
    """Logits are `softcap * tanh(scale * (h @ W.T + b) / softcap)`, without the cap where it is `None`."""

    scale: float = 1.0
    softcap: float | None = None


PLAIN = HeadForm()
_FORMS: WeakKeyDictionary[PreTrainedModel, HeadForm | None] = WeakKeyDictionary()


def read_logits(
    model: LanguageModel,
    has_label: torch.Tensor,
    /,
    *,
    forward: Callable[..., Any] | None = None,
    in_float32: bool = False,
    **inputs: Any,
) -> tuple[list[FactoredLogits | torch.Tensor], torch.Tensor]:
    """
    Logits of a model where labels are predicted, in factors where its head allows it.

    Texts i and B / 2 + i may be completions of one prompt. The model then reads the prompt once, see
    [`~trl_tfpo.models.pair_rows`].

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
            `input_ids` (B, L) and other inputs of the forward, such as an `attention_mask` (B, L) of texts that are
            padded on the right.

    Returns:
        A list of terms, whose sum is the logits (N, V), row by row; and the hidden states (B, L, H) that the head
        reads. The terms are [`~trl_tfpo.functional.FactoredLogits`]. They are one tensor, float32, where the head is
        sharded, quantized, offloaded, or more than a product.
    """
    form = head_form(model) if _has_whole_head(model) else None
    if form is not None and form.softcap is not None and has_adapted_head(model):
        form = None  # the cap applies to the sum of head and adapter
    is_plain = inputs.keys() == {"input_ids", "attention_mask"}
    rows = worthwhile_pair_rows(**inputs, model=model) if is_plain else None
    inputs = inputs if rows is None else inputs | rows.inputs
    with _showing_labelled(model, has_label, rows, num_shown=None if form is None else 1) as states:
        outputs = (forward or model)(**inputs, use_cache=False)
    if form is None:
        return [outputs.logits[0].float()], states.hidden
    labelled = states.labelled.float() if in_float32 else states.labelled
    return _factors(model, labelled, form), states.hidden


def completion_logps(
    logits: list[FactoredLogits | torch.Tensor], input_ids: torch.Tensor, completion_mask: torch.Tensor
) -> torch.Tensor:
    """
    Log-probabilities of completion tokens under the sum of logits.

    Args:
        logits (list of [`~trl_tfpo.functional.FactoredLogits`] or `torch.Tensor` of shape `(N, V)`):
            From [`read_logits`], where completion tokens are predicted.
        input_ids (`torch.LongTensor` of shape `(B, L)`):
            Prompts and completions.
        completion_mask (`torch.Tensor` of shape `(B, L)`):
            True for the N tokens of completions: at least one in each row, and not the first of a row.

    Returns:
        `torch.Tensor` of shape `(B, T)`: in nats, float32, left-aligned, padded with 0, on the device of the ids.
    """
    targets = input_ids[:, 1:][completion_mask[:, 1:]]  # (N,)
    logps = token_logps(logits=logits, targets=targets).to(input_ids.device)
    num_tokens = completion_mask.sum(dim=1)  # (B,)
    is_token = torch.arange(int(num_tokens.max()), device=input_ids.device) < num_tokens[:, None]  # (B, T)
    return logps.new_zeros(is_token.shape).masked_scatter(is_token, logps)


def head_form(model: LanguageModel) -> HeadForm | None:
    """
    Form of a model's logits: the product of hidden states and head, scaled or capped. `None` for any other form.

    Scales and caps have many names in configs, so they are measured. Hooks replace the hidden states and the product
    with the head by known integers, so the form does not depend on the weights. The answer is cached.
    """
    base = unwrap_peft(model)
    if base not in _FORMS:
        try:
            _FORMS[base] = _measured_form(base)
        except Exception as error:  # the forward needs more than hidden states; its own logits are used
            logger.info("The head of %s could not be measured: %r", type(base).__name__, error)
            _FORMS[base] = None
    return _FORMS[base]


@torch.no_grad()
def _measured_form(base: PreTrainedModel) -> HeadForm | None:
    head, device = head_of(base), device_of(base)
    size = getattr(head, "in_features", None) or head.weight.size(-1)
    num_tokens = min(8, size)
    # Half precision represents these integers exactly
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
    """The form that turns the product into these logits. A cap must be one of the numbers in the config."""
    if torch.equal(logits, product):
        return PLAIN
    tolerance = 2e-2 if base.dtype.itemsize < 4 else 1e-4

    def logits_in(form: HeadForm) -> torch.Tensor:
        scaled = product * form.scale
        return scaled if form.softcap is None else form.softcap * torch.tanh(scaled / form.softcap)

    numbers = {float(x) for x in vars(base.config.get_text_config()).values() if type(x) in (int, float) and x > 0}
    scale = float((logits * product).sum() / (product * product).sum())
    forms = [HeadForm(scale), *(HeadForm(1.0, softcap) for softcap in sorted(numbers))]
    nearest = min(forms, key=lambda form: float((logits_in(form) - logits).abs().max()))
    return nearest if torch.allclose(logits_in(nearest), logits, rtol=tolerance, atol=tolerance) else None


def _has_whole_head(model: LanguageModel) -> bool:
    """
    Whether the head is a product with float weights that are whole in this process, and its only adapters are plain
    LoRAs. Offloaded weights are not in this process.
    """
    head = head_of(model)
    weight = getattr(head, "weight", None)
    if weight is None or type(weight) not in (torch.Tensor, torch.nn.Parameter):  # others are sharded or quantized
        return False
    if weight.is_meta or not weight.is_floating_point() or hasattr(weight, "ds_id"):
        return False
    layer = getattr(head, "base_layer", head)  # within an adapter
    layer = getattr(layer, "original_module", layer)  # within `ModulesToSaveWrapper`
    if type(layer).forward not in (torch.nn.Linear.forward, GuidanceHead.forward):
        return False
    return not has_adapted_head(model) or is_plain_lora(head)


def _factors(model: LanguageModel, hidden: torch.Tensor, form: HeadForm) -> list[FactoredLogits | torch.Tensor]:
    """Logits (N, V) of hidden states (N, H), in factors. Each adapter on the head adds a term."""
    head = head_of(model)
    hidden, bias = hidden.to(head.weight.device), getattr(head, "bias", None)
    if isinstance(head, GuidanceHead):
        hidden = head.to_embedding_space(hidden)
    if form.scale != 1.0:
        hidden, bias = hidden * form.scale, None if bias is None else bias * form.scale
    factors: list[FactoredLogits | torch.Tensor] = [FactoredLogits(hidden, head.weight, bias, form.softcap)]
    if has_adapted_head(model):
        factors += [FactoredLogits(*adapted) for adapted in adapter_factors(head, hidden)]
    return factors


def add_logits(
    model: LanguageModel, own: list[FactoredLogits | torch.Tensor], base: list[FactoredLogits | torch.Tensor]
) -> list[FactoredLogits | torch.Tensor]:
    """
    Add the logits of a doctor (`own`) and of its base policy, both from [`read_logits`].

    Where the doctor's [`~trl_tfpo.models.guidance_head.GuidanceHead`] and the head of the base policy have the same
    weights, their hidden states are added instead. This needs one product instead of two.
    """
    head, first = head_of(model), base[0]
    if isinstance(head, GuidanceHead) and isinstance(first, FactoredLogits) and isinstance(own[0], FactoredLogits):
        if first.softcap is None and head.has_embeddings(first.weight):
            return [first._replace(hidden=own[0].hidden + first.hidden.to(own[0].hidden)), *own[1:], *base[1:]]
    return [*own, *base]


@dataclass
class _States:
    """Hidden states of a forward pass, set when it has run."""

    hidden: torch.Tensor = field(default_factory=torch.Tensor)  # (B, L, H)
    labelled: torch.Tensor = field(default_factory=torch.Tensor)  # (N, H)


@contextmanager
def _showing_labelled(
    model: LanguageModel, has_label: torch.Tensor, rows: PairRows | None, num_shown: int | None
) -> Iterator[_States]:
    """
    Within the context the language model head receives one row: the states that predict a label, or the first
    `num_shown` of them. The context yields the hidden states of the texts, which the model may read in `rows`.
    """
    states = _States()

    def keep(_, __, output):
        states.hidden = output.last_hidden_state if rows is None else rows.unpack(output.last_hidden_state)
        states.labelled = states.hidden[:, :-1][has_label.to(states.hidden.device)]
        output.last_hidden_state = states.labelled[None, :num_shown]
        return output

    hook = backbone_of(model).register_forward_hook(keep)
    try:
        yield states
    finally:
        hook.remove()

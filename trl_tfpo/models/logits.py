# SPDX-License-Identifier: Apache-2.0

"""
Logits of a model at the positions that predict labels, stored as factors: hidden states and head.

Doctor, base policy, reference and annotation all use [`read_logits`]. [`~trl_tfpo.functional.token_logps`] turns its
result into log-probabilities.

Shapes: B rows, L tokens in a row, N labels in all rows, H entries of a hidden state, V tokens in the vocabulary.
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
from .head_adapter import has_adapted_head, is_plain_lora, lora_factors
from .pair_rows import PairRows, worthwhile_pair_rows


logger = logging.getLogger(__name__)


class HeadForm(NamedTuple):
    """Form of logits: `softcap * tanh(scale * (h @ W.T + b) / softcap)`, or no cap if `softcap` is `None`."""

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
    Compute the logits of a model at the positions that predict labels, as factors if its head allows it.

    If `has_label` is a mask, texts i and B / 2 + i may be completions of one prompt. The model then reads the prompt
    once, see [`~trl_tfpo.models.pair_rows`].

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        has_label (`torch.Tensor` of shape `(B, L - 1)` or `(N,)`):
            A mask, True at each position whose next token is a label; or the positions that predict labels, as
            indices of the B * L positions of all rows, in any order.
        forward (`Callable`, *optional*):
            Forward pass of the model. Defaults to the model.
        in_float32 (`bool`, *optional*, defaults to `False`):
            Whether the product with the head is computed in float32.
        inputs:
            `input_ids` (B, L) and other inputs of the forward pass, such as an `attention_mask` (B, L) of texts that
            are padded on the right.

    Returns:
        A list of terms that add up to the logits (N, V), in the order of the labels; and the hidden states (B, L, H)
        before the head. The terms are [`~trl_tfpo.functional.FactoredLogits`]. If the head is sharded, quantized
        or offloaded, or if its form or adapter is not supported, there is one term: the logits themselves, float32.
    """
    form = head_form(model) if _is_factorable(model) else None
    if form is not None and form.softcap is not None and has_adapted_head(model):
        form = None  # the cap applies to the sum of head and adapter, not to each term
    is_plain = has_label.dtype == torch.bool and inputs.keys() == {"input_ids", "attention_mask"}
    rows = worthwhile_pair_rows(**inputs, model=model) if is_plain else None
    inputs = inputs if rows is None else inputs | rows.inputs
    with _head_reads_labelled(model, has_label, rows, num_shown=None if form is None else 1) as states:
        outputs = (forward or model)(**inputs, use_cache=False)
    if form is None:
        return [outputs.logits[0].float()], states.hidden
    labelled = states.labelled.float() if in_float32 else states.labelled
    return _factors(model, labelled, form), states.hidden


def completion_logps(
    logits: list[FactoredLogits | torch.Tensor], input_ids: torch.Tensor, completion_mask: torch.Tensor
) -> torch.Tensor:
    """
    Compute the log-probabilities of completion tokens under a sum of logits.

    Args:
        logits (list of [`~trl_tfpo.functional.FactoredLogits`] or `torch.Tensor` of shape `(N, V)`):
            Terms from [`read_logits`], at the positions that predict completion tokens.
        input_ids (`torch.LongTensor` of shape `(B, L)`):
            Prompts and completions.
        completion_mask (`torch.Tensor` of shape `(B, L)`):
            True for the N completion tokens: at least one in each row, but never the first token of a row.

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
    Form of a model's logits: the product of hidden states and head, scaled or capped; `None` for any other form.

    Configs have many names for scales and caps. The form is therefore measured: hooks replace hidden states and head
    by known integers, and the resulting logits show scale and cap. The answer is cached.
    """
    base = unwrap_peft(model)
    if base not in _FORMS:
        try:
            _FORMS[base] = _measured_form(base)
        except Exception as error:  # for example, the head needs more than hidden states; its logits are not factored
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
    """The form in which the product gives these logits, or `None`. The cap must be a number in the config."""
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


def _is_factorable(model: LanguageModel) -> bool:
    """Whether the head is a product with float weights, not sharded or offloaded, and all its adapters are plain."""
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
    """Terms of the logits (N, V) of hidden states (N, H): one for the head, and one for each adapter on it."""
    head = head_of(model)
    hidden, bias = hidden.to(head.weight.device), getattr(head, "bias", None)
    if isinstance(head, GuidanceHead):
        hidden = head.to_embedding_space(hidden)
    if form.scale != 1.0:
        hidden, bias = hidden * form.scale, None if bias is None else bias * form.scale
    factors: list[FactoredLogits | torch.Tensor] = [FactoredLogits(hidden, head.weight, bias, form.softcap)]
    if has_adapted_head(model):
        factors += [FactoredLogits(*adapted) for adapted in lora_factors(head, hidden)]
    return factors


def add_logits(
    model: LanguageModel, own: list[FactoredLogits | torch.Tensor], base: list[FactoredLogits | torch.Tensor]
) -> list[FactoredLogits | torch.Tensor]:
    """
    Add the logits of a doctor (`own`) and of its base policy, both from [`read_logits`].

    If the [`~trl_tfpo.models.guidance_head.GuidanceHead`] of the doctor has the weights of the base policy's head,
    the hidden states are added instead. The result then needs one product with the vocabulary instead of two.
    """
    head, first = head_of(model), base[0]
    if isinstance(head, GuidanceHead) and isinstance(first, FactoredLogits) and isinstance(own[0], FactoredLogits):
        if first.softcap is None and head.has_embeddings(first.weight):
            return [first._replace(hidden=own[0].hidden + first.hidden.to(own[0].hidden)), *own[1:], *base[1:]]
    return [*own, *base]


@dataclass
class _States:
    """Hidden states of a forward pass; empty before it."""

    hidden: torch.Tensor = field(default_factory=torch.Tensor)  # (B, L, H)
    labelled: torch.Tensor = field(default_factory=torch.Tensor)  # (N, H)


@contextmanager
def _head_reads_labelled(
    model: LanguageModel, has_label: torch.Tensor, rows: PairRows | None, num_shown: int | None
) -> Iterator[_States]:
    """
    Context in which the head receives only the hidden states that predict labels, or the first `num_shown` of them.

    Yields the hidden states of the texts. The model may read the texts in `rows`.
    """
    states = _States()

    def keep(_, __, output):
        states.hidden = output.last_hidden_state if rows is None else rows.unpack(output.last_hidden_state)
        is_mask = has_label.dtype == torch.bool
        candidates = states.hidden[:, :-1] if is_mask else states.hidden.flatten(0, 1)
        states.labelled = candidates[has_label.to(candidates.device)]
        output.last_hidden_state = states.labelled[None, :num_shown]
        return output

    hook = backbone_of(model).register_forward_hook(keep)
    try:
        yield states
    finally:
        hook.remove()

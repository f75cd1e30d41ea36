# SPDX-License-Identifier: Apache-2.0

"""Hidden states where labels are predicted, and their log-probabilities."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer import add_fused_lm_head
from trl.trainer import utils as trl_utils

from ..common._upstream import backbone_of, in_float32, is_sharded, unwrap_peft
from .guidance_head import GuidanceHead
from .head_adapter import columns_beside, has_adapted_head, states_beside


logger = logging.getLogger(__name__)
NUM_POSITIONS = 256  # whose logits are held at once where the head is the model's own
TILE_WIDTH = 1024  # ids in a tile of logits where there is no Triton


@contextmanager
def fused_lm_head(model: PreTrainedModel, in_float32: bool = False) -> Iterator[None]:
    """
    Within the context `model(..., labels=labels, fused_lm_head=True).log_probs` gives per-token log-probabilities
    without ever holding the (tokens, vocabulary) logits, with the product in float32 if asked for. TRL's helper patches
    for good; this one takes it back.
    """
    base = unwrap_peft(model)
    patched = vars(base).get("forward")
    add_fused_lm_head(base, cast_lm_head_to_fp32=in_float32)
    try:
        yield
    finally:
        _restore_forward(base, patched)


class LabelledStates(NamedTuple):
    """
    Hidden states (N, H) of a model where N labels are predicted, and its head: weights (V, H) and a bias (V,) or None.

    They stand for the logits (N, V), which are never held.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def logits(self) -> torch.Tensor:
        """The logits (N, V), float32, after all."""
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias).float()


def has_plain_head(model: PreTrainedModel) -> bool:
    """
    Whether logits are the head's product with the last hidden states, nothing more, to TRL as well, and the head is whole,
    in floats.
    """
    return not is_sharded(model) and _has_float_head(model) and all(prove_head(model))


def has_fused_head(model: PreTrainedModel) -> bool:
    """Whether TRL's fused head gives what the model's own would give."""
    return _has_float_head(model) and prove_head(model).is_fused


def _has_float_head(model: PreTrainedModel) -> bool:
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight is not None and weight.is_floating_point() and not has_adapted_head(model)


class HeadProof(NamedTuple):
    """Whether logits are hidden states times the head, and whether they are what TRL's fused head makes of the two."""

    is_plain: bool
    is_fused: bool


_PROOFS: WeakKeyDictionary[PreTrainedModel, HeadProof] = WeakKeyDictionary()


def prove_head(model: PreTrainedModel) -> HeadProof:
    """
    What a model does to hidden states: scales and caps go by many names in configs, so it is tried out.

    Made-up hidden states and a made-up head take the place of the model's, so no weight is read: this may be asked of a
    model that is sharded or quantized, or whose head is zero. The answer is kept for the model.
    """
    base = unwrap_peft(model)
    if base in _PROOFS:
        return _PROOFS[base]
    head, device = base.get_output_embeddings(), base.get_input_embeddings().weight.device
    size = getattr(head, "in_features", None) or head.weight.size(-1)
    num_tokens = min(8, size)
    ints = torch.randint(
        -64, 65, (64, size), generator=torch.Generator().manual_seed(0)
    )  # exact in half precision, too
    weight = ints.to(device, base.dtype)
    hidden = torch.eye(num_tokens, size, device=device, dtype=base.dtype)[None]
    labels = torch.arange(num_tokens, device=device)[None]
    own_forward = vars(head).get("forward")
    proof = HeadProof(is_plain=False, is_fused=False)
    try:
        with torch.no_grad(), fused_lm_head(base), _backbone_says(base, hidden), _head_is(base, weight, None):
            head.forward = lambda states: torch.nn.functional.linear(states, weight.to(states))
            logits = base.forward(input_ids=labels, use_cache=False).logits.float()
            is_plain = torch.equal(logits[0], (hidden[0] @ weight.T).float())
            proof = HeadProof(is_plain=is_plain, is_fused=False)
            fused = base.forward(input_ids=labels, shift_labels=labels, fused_lm_head=True).log_probs
        tolerance = 0.5 if base.dtype.itemsize < 4 else 1e-3  # nats; the logits are up to 64
        logps = logits.log_softmax(dim=-1).gather(-1, labels[..., None])[..., 0]
        proof = HeadProof(is_plain=is_plain, is_fused=bool((fused - logps).abs().max() <= tolerance))
    except Exception as error:  # a forward that needs more than hidden states: its own logits are always right
        logger.info("The head of %s could not be tried out: %r", type(base).__name__, error)
    finally:
        _restore_forward(head, own_forward)
    _PROOFS[base] = proof
    return proof


class _Said:
    """In place of what a backbone returns: hidden states, and nothing else."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name):
        return None

    def __getitem__(self, index):
        return (self.last_hidden_state,)[index]


@contextmanager
def _backbone_says(base: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    """Within the context the model's forward is that of its head, on hidden states (1, N, H) that are given."""
    backbone = backbone_of(base)
    forward = vars(backbone).get("forward")
    backbone.forward = lambda *_, **__: _Said(hidden)
    try:
        yield
    finally:
        _restore_forward(backbone, forward)


@contextmanager
def _head_is(base: PreTrainedModel, weight: torch.Tensor, bias: torch.Tensor | None) -> Iterator[None]:
    """Within the context TRL finds a head of these weights where it looks for the model's."""
    base.get_output_embeddings = lambda: SimpleNamespace(weight=weight, bias=bias)
    try:
        yield
    finally:
        del base.get_output_embeddings


def _restore_forward(module: torch.nn.Module, forward: Callable | None) -> None:
    if forward is not None:
        module.forward = forward
    else:
        vars(module).pop("forward", None)


def fused_logps(
    forward: Callable[..., ModelOutput],
    model: PreTrainedModel,
    labels: torch.LongTensor,
    /,
    guided: LabelledStates | None = None,
    **inputs,
) -> tuple[torch.Tensor, LabelledStates]:
    """
    Log-probabilities (B, L - 1) of `labels` (B, L) after their first column, zero where a label is -100, and what they were
    made of, without gradients.

    `forward` is the model's, with TRL's fused head. That projects every position to the vocabulary where there is no
    Triton, prompts and padding included; here only those that predict a label reach it. Nor do its tiles, made for
    Triton, fit a processor's cache: there smaller ones take a third of the time, and little memory.

    With `guided` they are those of the product of two models: the sum of their logits is one product as well, of their
    hidden states side by side with a head as wide as both, over the ids that both have.
    """
    has_label = labels[:, 1:] != -100
    tile_width = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    try:
        if not trl_utils._use_triton(model.get_output_embeddings().weight.device):
            trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = TILE_WIDTH
        with _only_labelled(model, has_label, guided, fuses=True) as kept, _wide_head(model, guided):
            outputs = forward(**inputs, shift_labels=labels[:, 1:][has_label][None], fused_lm_head=True)
    finally:
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = tile_width
    log_probs, head = outputs.log_probs[0], model.get_output_embeddings()
    states = LabelledStates(kept[0].detach(), head.weight.detach(), None if head.bias is None else head.bias.detach())
    return log_probs.new_zeros(has_label.shape).masked_scatter(has_label.to(log_probs.device), log_probs), states


def plain_logps(model: PreTrainedModel, labels: torch.LongTensor, /, **inputs) -> torch.Tensor:
    """
    The log-probabilities (B, L - 1) of [`fused_logps`] by the model's own head, for those that TRL's does not fit: some
    positions at a time, without gradients, in float32.
    """
    base, has_label = unwrap_peft(model), labels[:, 1:] != -100
    with _only_labelled(model, has_label, num_shown=1) as kept:
        model(**inputs, use_cache=False)
    targets, logps = labels[:, 1:][has_label].to(kept[0].device), []
    for some, ids in zip(kept[0].split(NUM_POSITIONS), targets.split(NUM_POSITIONS), strict=True):
        with _backbone_says(base, some[None]), in_float32():
            logits = base.forward(input_ids=ids[None], use_cache=False).logits[0].float()
        logps.append(logits.log_softmax(dim=-1).gather(1, ids[:, None].to(logits.device))[:, 0])
    logps = torch.cat(logps)
    return logps.new_zeros(has_label.shape).masked_scatter(has_label.to(logps.device), logps)


def labelled_logits(
    forward: Callable[..., ModelOutput], model: PreTrainedModel, labels: torch.LongTensor, /, **inputs
) -> torch.Tensor:
    """Logits (N, V), float32, at the N positions that predict one of `labels` (B, L) which is not -100, row by row."""
    with _only_labelled(model, labels[:, 1:] != -100):
        return forward(**inputs, use_cache=False).logits[0].float()


@contextmanager
def _only_labelled(
    model: PreTrainedModel,
    has_label: torch.Tensor,
    guided: LabelledStates | None = None,
    num_shown: int | None = None,
    fuses: bool = False,
) -> Iterator[list[torch.Tensor]]:
    """
    Within the context the language model head is given one row: the positions (B, L - 1) that predict a label, or the
    first of them, with the states of what is guided beside them. The list that it yields will hold the hidden states
    (N, H) of the model itself.
    """
    kept, head = [], model.get_output_embeddings()
    is_adapted = fuses and has_adapted_head(model)

    def keep_labelled(_, args, output):
        hidden_states = output.last_hidden_state
        kept[:] = [hidden_states[:, :-1][has_label.to(hidden_states.device)]]
        shown = kept[0]
        if fuses and isinstance(head, GuidanceHead):
            shown = head.to_embedding_space(shown)
        elif is_adapted:
            shown = torch.cat([shown, states_beside(head, shown)], dim=-1)
        if guided is not None:
            beside = guided.hidden.to(shown)
            shown = shown + beside if _share_embeddings(head, guided) else torch.cat([shown, beside], dim=-1)
        output.last_hidden_state = shown[None, :num_shown]
        return output

    hook = backbone_of(model).register_forward_hook(keep_labelled)
    try:
        yield kept
    finally:
        hook.remove()


def _wide_head(model: PreTrainedModel, guided: LabelledStates | None) -> AbstractContextManager[None]:
    """Within the context the head that TRL looks up has beside it the one of what is guided, or what adapters add to it."""
    base, head = unwrap_peft(model), model.get_output_embeddings()
    if guided is None and has_adapted_head(model):
        return _head_is(base, torch.cat([head.weight, columns_beside(head)], dim=1), head.bias)
    if guided is None:
        return nullcontext()
    if _share_embeddings(head, guided):
        return _head_is(base, head.weight, guided.bias)
    size = min(len(head.weight), len(guided.weight))
    weight = torch.cat([head.weight[:size], guided.weight[:size].to(head.weight)], dim=1)
    biases = [bias[:size].to(weight) for bias in (head.bias, guided.bias) if bias is not None]
    return _head_is(base, weight, sum(biases) if biases else None)


def _share_embeddings(head: torch.nn.Module, guided: LabelledStates) -> bool:
    """Whether a guiding head and what it guides have the same vocabulary embeddings, so that hidden states can be added."""
    if not isinstance(head, GuidanceHead) or head.weight.shape != guided.weight.shape:
        return False
    key = tuple((x.data_ptr(), x._version, x.dtype) for x in (head.weight, guided.weight))
    if vars(head).get("_compared", (None,))[0] != key:
        head._compared = key, head.weight.dtype == guided.weight.dtype and torch.equal(head.weight, guided.weight)
    return head._compared[1]

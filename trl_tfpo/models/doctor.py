# SPDX-License-Identifier: Apache-2.0

"""The doctor: a causal language model with a scalar value head, which only training uses."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..common.language_model import LanguageModel, device_of, head_of, is_peft_model, unwrap_peft
from ..functional import FactoredLogits
from .adapters import VALUE_HEAD, check_adapters, why_unsupported
from .head_adapter import freeze_head_lora, save_without_embeddings, with_lora_on_head
from .initial_head import start_at_zero
from .logits import PLAIN, add_logits, completion_logps, head_form, read_logits
from .trained_exponents import TRAINING_EXPONENTS, record_exponents, trained_exponents


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass
class DoctorOutput(ModelOutput):
    """
    Output of a doctor in training for the completions of a batch, left-aligned: B rows, T tokens, S = T + 1 states.

    Args:
        doctor_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each completion token in nats, float32; zero outside the mask. The policy is the
            base policy times the doctor if `base_logits` were given, otherwise the doctor.
        log_values (`torch.Tensor` of shape `(B, S)`):
            Output of the value head at each state: log V in nats, float32. Arbitrary outside the mask.
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            Completion tokens.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            True for completion tokens, False for padding.
    """

    doctor_logps: torch.Tensor | None = None
    log_values: torch.Tensor | None = None
    completion_ids: torch.Tensor | None = None
    completion_mask: torch.Tensor | None = None


class ValueHead(torch.nn.Linear):
    """
    Linear map from the last hidden state to log V, in nats. Its weights start at zero; it computes in float32.

    In bfloat16 training, DeepSpeed and FSDP2 round its weights for the forward pass, but not in the optimizer.
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1, dtype=torch.float32)
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.float(), self.weight.float(), self.bias.float()).squeeze(-1)


def add_value_head(model: LanguageModel) -> None:
    """
    Turn a causal language model, or a `PeftModel` of one, into a doctor, in place.

    `model(input_ids=ids, attention_mask=attention, completion_mask=mask, base_logits=logits)` then returns a
    [`DoctorOutput`], see [`read_completions`]. Pass these arguments by keyword. Without `completion_mask`, the forward
    pass is that of the language model; `generate` does not change. The class of the model becomes a subclass of the
    same name. The value head is the submodule `value_head`, saved with the model. In a `PeftModel` it is trained and
    saved with the active adapter.
    """
    base = unwrap_peft(model)
    if not hasattr(base, VALUE_HEAD):
        head: Any = ValueHead(base.config.get_text_config().hidden_size).to(device_of(base))
        if is_peft_model(model):
            from peft.utils import ModulesToSaveWrapper

            adapter: Any = model.active_adapter
            config: Any = model.peft_config[adapter]
            config.modules_to_save = [*(config.modules_to_save or []), VALUE_HEAD]
            head = ModulesToSaveWrapper(head, adapter)
            head.set_adapter(adapter)
        setattr(base, VALUE_HEAD, head)
    if not hasattr(type(base), "language_model_class"):
        language_model: Any = type(base)
        base.__class__ = _doctor_class(language_model)


@functools.cache
def _doctor_class(language_model: Any) -> Any:
    """Subclass of a language model class, for doctors. It has the same name, because configs record the name."""

    class DoctorModel(language_model):
        language_model_class = language_model

        @functools.wraps(language_model.forward)
        def forward(self, *args, completion_mask=None, base_logits=None, **kwargs):
            forward = functools.partial(super().forward, *args)
            if completion_mask is None:
                return forward(**kwargs)
            return read_completions(self, forward, completion_mask, base_logits, **kwargs)

        def __reduce_ex__(self, protocol):  # by this class's name, pickle would find the language model class
            return _new_doctor, (language_model,), *super().__reduce_ex__(protocol)[2:]

    DoctorModel.__name__, DoctorModel.__qualname__ = language_model.__name__, language_model.__qualname__
    DoctorModel.__module__ = language_model.__module__
    return DoctorModel


def _new_doctor(language_model: Any) -> Any:
    """A doctor without state, for `pickle` and `copy`."""
    doctor_class = _doctor_class(language_model)
    return doctor_class.__new__(doctor_class)


def read_completions(
    model: PreTrainedModel,
    forward: Callable[..., Any],
    completion_mask: torch.Tensor,
    base_logits: list[FactoredLogits | torch.Tensor] | None,
    **inputs: Any,
) -> DoctorOutput:
    """
    Forward pass of a doctor in training: log-probabilities and values of completions, left-aligned.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The doctor.
        forward (`Callable`):
            Forward pass of its language model.
        completion_mask (`torch.Tensor` of shape `(B, L)`):
            True for the N completion tokens: at least one in each row, but never the first token of a row.
        base_logits (list of [`~trl_tfpo.functional.FactoredLogits`] or `torch.Tensor` of shape `(N, V)`, *optional*):
            Logits of the base policy at the positions that predict completion tokens, from `read_base_policy` in
            `training/base_policy.py`. `None` with `policy="doctor"`.
        inputs:
            `input_ids` and `attention_mask` of shape `(B, L)`.
    """
    logits, hidden = read_logits(model, completion_mask[:, 1:], forward=forward, **inputs)
    if base_logits is not None:
        logits = add_logits(model, logits, base_logits)
    logps = completion_logps(logits, inputs["input_ids"], completion_mask)
    log_values = getattr(model, VALUE_HEAD)(hidden).to(logps.device)  # (B, L)
    states, tokens, token_mask = locate_completions(completion_mask)
    return DoctorOutput(
        doctor_logps=logps,
        log_values=log_values.gather(1, states),
        completion_ids=inputs["input_ids"].gather(1, tokens),
        completion_mask=token_mask,
    )


def make_doctor(
    model: LanguageModel,
    peft_config: "PeftConfig | None" = None,
    *,
    guides: bool = False,
    has_credits: bool = False,
) -> LanguageModel:
    """
    Turn a language model into a doctor for training: value head, initial language model head, adapter.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The language model; changed in place.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Config of a new adapter; not changed. The value head is trained and saved with the adapter.
        guides (`bool`, *optional*, defaults to `False`):
            Whether training is guided flow. The language model head then starts at zero, see
            [`~trl_tfpo.models.initial_head.start_at_zero`], and is trained and saved with the adapter.
        has_credits (`bool`, *optional*, defaults to `False`):
            Whether the doctor starts at token credits. Without `guides`, a new LoRA then also adapts the head, see
            [`~trl_tfpo.models.head_adapter.with_lora_on_head`].

    Raises:
        `ValueError`: for a second adapter, adapters outside a `PeftModel`, or an unsupported adapter, such as prompt
            learning or activated LoRA; with `guides`, for a `PeftModel` that was not trained by guided flow; without
            `guides`, for a doctor of guided flow.
    """
    _check_initial_model(model, guides)
    doctor: Any = model
    if guides and not is_peft_model(model):
        start_at_zero(doctor, in_span=peft_config is None)
    if peft_config is None:
        add_value_head(doctor)
    else:
        doctor = _add_adapter(doctor, peft_config, guides=guides, has_credits=has_credits)
    if is_peft_model(doctor):
        others = (parameter for name, parameter in doctor.named_parameters() if VALUE_HEAD not in name.split("."))
        if not any(parameter.requires_grad for parameter in others):  # the adapter was loaded for inference
            doctor.set_adapter(doctor.active_adapter)
        record_exponents(doctor, TRAINING_EXPONENTS if guides else {})
        save_without_embeddings(doctor)
        if has_credits:
            freeze_head_lora(doctor)
    return doctor


def _check_initial_model(model: LanguageModel, guides: bool) -> None:
    """Raise `ValueError` if training cannot start from a model. `guides` is as in [`make_doctor`]."""
    check_adapters(model, "The doctor")
    adapters: Any = getattr(model, "peft_config", None)
    if adapters and not is_peft_model(model):
        raise ValueError(
            f"A doctor with adapters must be a `PeftModel`. Got a {type(model).__name__} with the adapters "
            f"{sorted(adapters)}; load it with `load_doctor` or `PeftModel.from_pretrained`, or pass the model "
            "without adapters."
        )
    if guides and is_peft_model(model) and not trained_exponents(model):
        raise ValueError(
            "Guided flow must start with a new head. Got a `PeftModel` that was not trained by guided flow; pass its "
            "base model and a `peft_config`, or set `policy='doctor'`."
        )
    if not guides and trained_exponents(model):
        raise ValueError(
            "With `policy='doctor'` the doctor must be a language model. Got a doctor of guided flow, which is a "
            "ratio of two policies; start from the original language model, or continue with `policy='guided'`."
        )


def _add_adapter(model: PreTrainedModel, peft_config: Any, *, guides: bool, has_credits: bool) -> "PeftModel":
    """Add the value head and a new adapter, which saves the value head and, with `guides`, the language model head."""
    from peft import get_peft_model

    if is_peft_model(model):
        raise ValueError(
            "`peft_config` adds an adapter to a model without adapters. Got a `PeftModel`; leave `peft_config` out, "
            "or merge the adapter with `merge_and_unload()` first."
        )
    reason = why_unsupported(peft_config)
    if reason is None and not hasattr(peft_config, "modules_to_save"):
        reason = "An adapter needs `modules_to_save`, which saves the value head with it"
    if reason:
        raise ValueError(
            f"{reason}. Got {type(peft_config).__name__}; use an adapter of the weights, such as `LoraConfig`."
        )
    if has_credits and not guides and (model.device.type == "meta" or head_form(model) == PLAIN):
        peft_config = with_lora_on_head(model, peft_config)
    add_value_head(model)
    peft_config = copy.deepcopy(peft_config)
    head = head_of(model)
    heads = [name.split(".")[-1] for name, module in model.named_modules() if guides and module is head]
    peft_config.modules_to_save = [*(peft_config.modules_to_save or []), VALUE_HEAD, *heads]
    return get_peft_model(model, peft_config)


def set_head_learning_rate(optimizer: torch.optim.Optimizer, model: torch.nn.Module, learning_rate: float) -> None:
    """
    Move the value head of a doctor to parameter groups with this initial learning rate, in place.

    Other settings of the groups stay the same. Call it before the first step and before a scheduler is created.
    """
    of_head = {id(parameter) for name, parameter in model.named_parameters() if VALUE_HEAD in name.split(".")}
    for group in list(optimizer.param_groups):
        parameters = [parameter for parameter in group["params"] if id(parameter) in of_head]
        if parameters:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in of_head]
            optimizer.add_param_group({**group, "params": parameters, "lr": learning_rate})


def locate_completions(completion_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Find the positions of the states and tokens of each completion.

    One state precedes each token of the assistant, and one follows the last token. Text of a user or tool between two
    turns of the assistant belongs to the state after it and has no states of its own.

    Args:
        completion_mask (`torch.Tensor` of shape `(B, L)`):
            True for the tokens of the assistant: at least one in each row, but never the first token.

    Returns:
        `torch.Tensor` of shape `(B, S)`: position of the last token of each state; `torch.Tensor` of shape `(B, T)`:
        position of each token; `torch.Tensor` of shape `(B, T)`: True for tokens, False for padding. Positions in the
        padding are arbitrary.
    """
    num_tokens = completion_mask.sum(dim=1, keepdim=True)  # (B, 1)
    is_token = torch.arange(int(num_tokens.max()), device=completion_mask.device) < num_tokens  # (B, T)
    tokens = (~completion_mask).int().argsort(dim=1, stable=True)[:, : is_token.size(1)]  # (B, T)
    last = tokens.gather(1, num_tokens - 1)  # (B, 1)
    before = torch.where(is_token, tokens - 1, last)  # (B, T)
    return torch.cat([before, last], dim=1), tokens, is_token

# SPDX-License-Identifier: Apache-2.0

"""The doctor: a causal language model with a scalar value head that exists only while it is trained."""

import copy
import functools
import json
import os
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, ModelOutput, cached_file
from trl.trainer import add_fused_lm_head

from ..common._upstream import backbone_of, is_peft_model, is_sharded, unwrap_peft
from ..common.atomic import written_whole
from ..functional import guided_logps
from .adapters import VALUE_HEAD, check_adapters, record_exponents, trained_exponents, why_unreadable
from .guidance import GUIDANCE, is_guidance, load_guidance, start_guidance, untie_head
from .guidance_head import GuidanceHead
from .head_adapter import has_adapted_head, has_columns, keep_head, save_without_embeddings, with_head
from .states import LabelledStates, fused_logps, has_plain_head, labelled_logits, prove_head


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


VALUE_HEAD_FILE = "value_head.safetensors"  # of a full model


@dataclass
class DoctorOutput(ModelOutput):
    """
    What the doctor says about the completions of a batch, left-aligned: B rows, T tokens, S = T + 1 states.

    Args:
        doctor_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each completion token, in nats, float32. Arbitrary outside the mask. That of the guided
            patient where its logits were given.
        log_values (`torch.Tensor` of shape `(B, S)`):
            Value head at each state, log V in nats, float32. Arbitrary outside the mask.
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            The completion tokens themselves.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            Which of them are real.
    """

    doctor_logps: torch.Tensor | None = None
    log_values: torch.Tensor | None = None
    completion_ids: torch.Tensor | None = None
    completion_mask: torch.Tensor | None = None


class ValueHead(torch.nn.Linear):
    """
    Linear map from the last hidden state to log V, in nats. Starts at zero; always computed in float32.

    In bfloat16 training DeepSpeed and FSDP2 round its weights for the forward, like all others; the optimizer's are float32.

    Args:
        hidden_size (`int`):
            Size of the hidden states.
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1, dtype=torch.float32)
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.float(), self.weight.float(), self.bias.float()).squeeze(-1)


def add_value_head(model: PreTrainedModel) -> None:
    """
    Turn a causal language model, or a `PeftModel` of one, into a doctor, in place.

    `model(input_ids, attention_mask, completion_mask=mask)` then returns a [`DoctorOutput`], where `mask` of shape
    `(B, L)` marks what the assistant says in each row (at least one token, not the first of the row).
    Given `guided` as well, from [`~trl_tfpo.training.guided_flow.read_patient`], its log-probabilities are those of what it guides,
    patient times doctor.
    Without `completion_mask` the forward is the original one, so `generate` is unchanged. The head is the submodule
    `value_head`: it is saved with the model, and ignored when the folder is loaded as a plain causal language model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The language model. Given a `PeftModel`, the head is trained and saved with the active adapter.
    """
    base = unwrap_peft(model)
    if not hasattr(base, VALUE_HEAD):
        head = ValueHead(base.config.get_text_config().hidden_size).to(base.get_input_embeddings().weight.device)
        if is_peft_model(model):
            from peft.utils import ModulesToSaveWrapper

            config = model.peft_config[model.active_adapter]
            config.modules_to_save = [*(config.modules_to_save or []), VALUE_HEAD]
            head = ModulesToSaveWrapper(head, model.active_adapter)
            head.set_adapter(model.active_adapter)
        setattr(base, VALUE_HEAD, head)
    add_fused_lm_head(base)
    fused_forward = base.forward
    is_fused = prove_head(base).is_fused

    @functools.wraps(type(base).forward)
    def forward(self, *args, completion_mask=None, guided=None, **kwargs):
        if completion_mask is None:
            return fused_forward(*args, **kwargs)
        captured = []
        hook = backbone_of(self).register_forward_hook(lambda _, __, output: captured.append(output.last_hidden_state))
        try:
            labels = kwargs["input_ids"].masked_fill(~completion_mask, -100)
            one_forward = functools.partial(fused_forward, *args)
            if guided is None:
                head = self.get_output_embeddings()
                can_fuse = is_fused and (not has_adapted_head(self) or (has_columns(head) and not is_sharded(self)))
            else:
                can_fuse = isinstance(guided, LabelledStates) and has_plain_head(self)
            if can_fuse:
                log_probs, _ = fused_logps(one_forward, self, labels, guided=guided, **kwargs)  # (B, L - 1)
            else:
                logits = labelled_logits(one_forward, self, labels, **kwargs)  # (N, V)
                guided_logits = guided.logits() if isinstance(guided, LabelledStates) else guided
                log_probs = guided_token_logps(logits, guided_logits, labels)
        finally:
            hook.remove()
        log_values = getattr(self, VALUE_HEAD)(captured[0]).to(log_probs.device)  # (B, L)
        states, tokens, token_mask = locate_completions(completion_mask)
        return DoctorOutput(
            doctor_logps=log_probs.float().gather(1, states[:, :-1].clamp(max=log_probs.size(1) - 1)),
            log_values=log_values.gather(1, states),
            completion_ids=kwargs["input_ids"].gather(1, tokens),
            completion_mask=token_mask,
        )

    base.forward = types.MethodType(forward, base)


def guided_token_logps(
    logits: torch.Tensor, patient_logits: torch.Tensor | None, labels: torch.LongTensor
) -> torch.Tensor:
    """
    Log-probabilities of tokens under the product of patient and doctor, or under the doctor alone.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`):
            The doctor's, where the N labels are predicted.
        patient_logits (`torch.Tensor` of shape `(N, V')`, *optional*):
            The patient's. Ids that only one of them has, beyond the tokenizer's, take no part.
        labels (`torch.LongTensor` of shape `(B, L)`):
            Token ids, -100 where nothing is predicted.

    Returns:
        `torch.Tensor` of shape `(B, L - 1)`: in nats, zero where there is no label.
    """
    has_label = labels[:, 1:] != -100
    if patient_logits is None:
        guided = logits.log_softmax(dim=-1)
    else:
        size = min(logits.size(-1), patient_logits.size(-1))
        guided = guided_logps(patient_logits=patient_logits[:, :size], doctor_logits=[logits[:, :size]], beta=[1.0])
    log_probs = guided.gather(1, labels[:, 1:][has_label][:, None]).squeeze(1)  # (N,)
    return log_probs.new_zeros(has_label.shape).masked_scatter(has_label, log_probs)


def make_doctor(
    model: "PreTrainedModel | PeftModel",
    peft_config: "PeftConfig | None" = None,
    *,
    guides: bool = False,
    has_credits: bool = False,
) -> "PreTrainedModel | PeftModel":
    """
    The doctor with its value head, and with a new adapter if there is a config for one.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The language model; changed in place.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Config of the adapter; left as it is. The value head is trained and saved with the adapter.
        guides (`bool`, *optional*, defaults to `False`):
            Whether it is for guided flow: its language model head starts at zero, see
            [`~trl_tfpo.models.guidance.start_guidance`], and is trained and saved with the adapter.
        has_credits (`bool`, *optional*, defaults to `False`):
            Whether it is to start at credits: a new LoRA of a language model gets a place for them, see
            [`~trl_tfpo.models.head_adapter.with_head`].

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: the doctor.

    Raises:
        `ValueError`: on a second adapter, prompt learning, an activated LoRA, a `PeftModel` that is not a doctor of guided
            flow but is to become one, or the reverse.
    """
    check_adapters(model, "The doctor")
    if getattr(model, "peft_config", None) and not is_peft_model(model):
        raise ValueError(
            "A doctor with adapters must be a `PeftModel`, which saves them. Got a "
            f"{type(model).__name__} with the adapters {sorted(model.peft_config)}; load it with `load_doctor` or "
            "`PeftModel.from_pretrained`, or pass the model without adapters."
        )
    if guides and is_peft_model(model) and not is_guidance(model):
        raise ValueError(
            "A doctor of guided flow starts with a new head. Got a `PeftModel` that was not trained by guided flow; pass "
            "its base model and a `peft_config`, or set `policy='doctor'`."
        )
    if not guides and is_guidance(model):
        raise ValueError(
            "With `policy='doctor'` the doctor is a language model. Got one of guided flow, which is a ratio of two "
            "policies; start from what it was before, or train it on with `policy='guided'`."
        )
    if guides and not is_peft_model(model):
        start_guidance(model, in_span=peft_config is None)
    if peft_config is not None:
        from peft import get_peft_model

        if is_peft_model(model):
            raise ValueError(
                "`peft_config` makes a new adapter. Got a `PeftModel` as well; pass one or the other, or merge the "
                "adapter with `merge_and_unload()` first."
            )
        reason = why_unreadable(peft_config)
        if reason is None and not hasattr(peft_config, "modules_to_save"):
            reason = "The value head is saved with the adapter, by `modules_to_save`"
        if reason:
            raise ValueError(
                f"{reason}. Got {type(peft_config).__name__}; use an adapter of the weights, such as `LoraConfig`."
            )
        if has_credits and not guides and (model.device.type == "meta" or prove_head(model).is_plain):
            peft_config = with_head(model, peft_config)
        add_value_head(model)
        peft_config = copy.deepcopy(peft_config)  # the caller's stays as it is
        head = model.get_output_embeddings()
        heads = [name.split(".")[-1] for name, module in model.named_modules() if guides and module is head]
        peft_config.modules_to_save = [*(peft_config.modules_to_save or []), VALUE_HEAD, *heads]
        model = get_peft_model(model, peft_config)
    else:
        add_value_head(model)
    if is_peft_model(model):
        others = (parameter for name, parameter in model.named_parameters() if VALUE_HEAD not in name.split("."))
        if not any(parameter.requires_grad for parameter in others):  # an adapter that was loaded to be read
            model.set_adapter(model.active_adapter)
        record_exponents(model, GUIDANCE if guides else {})
        save_without_embeddings(model)
        if has_credits:
            keep_head(model)
    return model


def set_head_learning_rate(optimizer: torch.optim.Optimizer, model: torch.nn.Module, learning_rate: float) -> None:
    """
    Give the value head a learning rate of its own: parameter groups of the same settings, at the end.

    Args:
        optimizer ([`~torch.optim.Optimizer`]):
            Optimizer of the model, before its first step and before a scheduler is made for it; changed in place.
        model ([`~torch.nn.Module`]):
            The doctor.
        learning_rate (`float`):
            Of the value head, at the start of the schedule.
    """
    of_head = {id(parameter) for name, parameter in model.named_parameters() if VALUE_HEAD in name.split(".")}
    for group in list(optimizer.param_groups):
        parameters = [parameter for parameter in group["params"] if id(parameter) in of_head]
        if parameters:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in of_head]
            optimizer.add_param_group({**group, "params": parameters, "lr": learning_rate})


def locate_completions(completion_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Where in each row the states of its completion are read, and where its tokens are.

    A state comes before each token of the assistant, and one after the last. What a user or a tool says between two of its
    turns belongs to the state before the second: tokens that are masked are as good as deleted.

    Args:
        completion_mask (`torch.Tensor` of shape `(B, L)`):
            The tokens of the assistant in each row, boolean. At least one, and not the first of the row.

    Returns:
        `torch.Tensor` of shape `(B, S)`: position of the last token of each state; `torch.Tensor` of shape `(B, T)`:
        positions of the tokens; and `torch.Tensor` of shape `(B, T)`: which of these are real. The others are arbitrary.
    """
    num_tokens = completion_mask.sum(dim=1, keepdim=True)  # (B, 1)
    is_token = torch.arange(int(num_tokens.max()), device=completion_mask.device) < num_tokens  # (B, T)
    tokens = (~completion_mask).int().argsort(dim=1, stable=True)[:, : is_token.size(1)]  # (B, T)
    last = tokens.gather(1, num_tokens - 1)  # (B, 1)
    before = torch.where(is_token, tokens - 1, last)  # (B, T)
    return torch.cat([before, last], dim=1), tokens, is_token


def load_doctor(path: str | os.PathLike, with_value_head: bool = True, **kwargs) -> PreTrainedModel:
    """
    Load a trained doctor together with its value head, to go on training or to inspect the flow.

    For decoding the head is not needed: `AutoModelForCausalLM.from_pretrained(path)` does, or for an adapter
    `PeftModel.from_pretrained(base, path)`.

    Args:
        path (`str`):
            Folder or Hub id that [`TFPOTrainer`] saved: a full model or an adapter.
        with_value_head (`bool`, *optional*, defaults to `True`):
            Whether to restore the value head.
        kwargs:
            Passed to `from_pretrained` of the language model. Weights are read from safetensors, unless
            `use_safetensors=False` is among them.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: the doctor, in eval mode.

    Raises:
        `ValueError`: when there is no value head at `path`, several adapters or one that is not in safetensors, or an
            adapter that does not say for which exponents it was trained.
    """
    kwargs.setdefault("use_safetensors", True)  # a pickle could do anything
    kwargs.setdefault("trust_remote_code", False)  # otherwise transformers asks, and so could code of the folder
    guidance = load_guidance(path)
    path = _adapter_folder(path)
    adapter_config = cached_file(path, "adapter_config.json", _raise_exceptions_for_missing_entries=False)
    if adapter_config is not None:
        from peft import PeftModel

        if not cached_file(path, "adapter_model.safetensors", _raise_exceptions_for_missing_entries=False):
            raise ValueError(
                f"An adapter must be saved as safetensors. Got no `adapter_model.safetensors` in {str(path)!r}; load it "
                "with PEFT, if you trust it, and save it again."
            )
        with open(adapter_config, encoding="utf-8") as file:
            config = json.load(file)
        base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], **kwargs)
        if set(config.get("modules_to_save") or ()) - {VALUE_HEAD}:
            untie_head(base)
        if with_value_head:
            if VALUE_HEAD not in (config.get("modules_to_save") or []):
                raise _no_value_head(path)
            add_value_head(base)
        model = PeftModel.from_pretrained(base, path)
        if guidance is not None:
            record_exponents(model, guidance)  # the adapter may be older than its record
        if exponents := trained_exponents(model):
            base.config.guidance, base.guiding_adapter = exponents, model.active_adapter  # what merging leaves
        return model

    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    if guidance:
        model.config.guidance = guidance
    if with_value_head:
        add_value_head(model)
        getattr(model, VALUE_HEAD).load_state_dict(_read_value_head(path))
    return model.eval()


def _adapter_folder(path: str | os.PathLike) -> str | os.PathLike:
    """Where PEFT saved the adapter of a doctor: an adapter that is not called "default" has a folder of its own."""
    if not Path(path).is_dir() or any((Path(path) / name).exists() for name in ("adapter_config.json", CONFIG_NAME)):
        return path
    named = sorted(file.parent for file in Path(path).glob("*/adapter_config.json"))
    named = [folder for folder in named if not folder.name.startswith(PREFIX_CHECKPOINT_DIR)]
    if len(named) > 1:
        raise ValueError(
            f"A doctor is one adapter. Got {str(path)!r} with {[folder.name for folder in named]}; pass the folder of one."
        )
    return named[0] if named else path


def save_value_head(state: dict[str, torch.Tensor], folder: str | os.PathLike) -> None:
    """Write the tensors of a full model's value head into its folder, next to the other weights."""
    with written_whole(Path(folder) / VALUE_HEAD_FILE) as part:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}, part)


def fold_map(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Give the weights of a doctor an ordinary head in the place of a [`~trl_tfpo.models.guidance_head.GuidanceHead`], in place.

    Returns:
        `dict[str, torch.Tensor]`: the map of that head, for those who go on training; empty where there is none.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, GuidanceHead):
        return {}
    name = next(name for name, module in model.named_modules() if module is head)
    if f"{name}.map" in state_dict:  # gathered by an engine, which reads parameters
        map = state_dict.pop(f"{name}.map")
        state_dict[f"{name}.weight"] = head.folded(state_dict[f"{name}.weight"], map)
        return {"map": map}
    return {"map": head.map}


def load_value_head(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """
    Read the value head of a full model from its folder, in place, and the map of its head; from one that keeps it elsewhere
    nothing.
    """
    path = Path(folder) / VALUE_HEAD_FILE
    if path.is_file():
        state, head = load_file(path), model.get_output_embeddings()
        map = state.pop("map", None)
        getattr(model, VALUE_HEAD).load_state_dict(state)
        if map is not None and isinstance(head, GuidanceHead):
            head.map.data.copy_(map)


def _read_value_head(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of the value head in a saved full model: among its weights, sharded or not, or in their own file."""
    file_names = ["model.safetensors"]
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is not None:
        with open(index, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        file_names = sorted({name for key, name in weight_map.items() if key.startswith(f"{VALUE_HEAD}.")})
    state = {}
    for name in file_names:
        with safe_open(cached_file(path, name), framework="pt") as tensors:
            keys = [key for key in tensors.keys() if key.startswith(f"{VALUE_HEAD}.")]
            state.update({key.removeprefix(f"{VALUE_HEAD}."): tensors.get_tensor(key) for key in keys})
    own = cached_file(path, VALUE_HEAD_FILE, _raise_exceptions_for_missing_entries=False)
    if not state and not own:
        raise _no_value_head(path)
    return state or {name: tensor for name, tensor in load_file(own).items() if name != "map"}


def _no_value_head(path: str | os.PathLike) -> ValueError:
    return ValueError(
        f"`load_doctor` needs a model that was saved with a value head. Got {str(path)!r}, which has none; pass "
        "`with_value_head=False`, or a folder saved by `TFPOTrainer`."
    )

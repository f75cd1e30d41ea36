# SPDX-License-Identifier: Apache-2.0

"""The doctor: a causal language model with a scalar value head that exists only while it is trained."""

import copy
import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, ModelOutput, cached_file

from ..common.atomic import written_whole
from ..common.language_model import LanguageModel, device_of, is_peft_model, unwrap_peft
from ..functional import FactoredLogits, token_logps
from .adapters import VALUE_HEAD, check_adapters, record_exponents, trained_exponents, why_unreadable
from .guidance import GUIDANCE, is_guidance, load_guidance, start_guidance, untie_head
from .guidance_head import GuidanceHead
from .head_adapter import keep_head, save_without_embeddings, with_head
from .named_model import SOURCE
from .states import PLAIN, add_logits, head_form, read_logits


if TYPE_CHECKING:
    from peft import PeftConfig


VALUE_HEAD_FILE = "value_head.safetensors"  # of a full model


@dataclass
class DoctorOutput(ModelOutput):
    """
    What a doctor in training returns about the completions of a batch, left-aligned: B rows, T tokens, S = T + 1 states.

    Args:
        doctor_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each completion token, in nats, float32; zero outside the mask. That of base policy times
            doctor where the logits of a base policy were given.
        log_values (`torch.Tensor` of shape `(B, S)`):
            Output of the value head at each state: log V in nats, float32. Arbitrary outside the mask.
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            The completion tokens.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            True for completion tokens, False for padding.
    """

    doctor_logps: torch.Tensor | None = None
    log_values: torch.Tensor | None = None
    completion_ids: torch.Tensor | None = None
    completion_mask: torch.Tensor | None = None


class ValueHead(torch.nn.Linear):
    """
    Linear map from the last hidden state to log V, in nats. Starts at zero; always computed in float32.

    In bfloat16 training DeepSpeed and FSDP2 round its weights for the forward pass, as they do all weights. The
    optimizer keeps them in float32.

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


def add_value_head(model: LanguageModel) -> None:
    """
    Turn a causal language model, or a `PeftModel` of one, into a doctor, in place.

    `model(input_ids, attention_mask, completion_mask=mask, base_logits=logits)` then returns a [`DoctorOutput`], see
    [`read_completions`]. Without `completion_mask` the forward is that of the language model, so `generate` is
    unchanged. The model's class becomes a subclass of the same name. The value head is the submodule `value_head`. It
    is saved with the model, and ignored when the folder is loaded as a plain causal language model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The language model. Given a `PeftModel`, the head is trained and saved with the active adapter.
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
        base.__class__ = _doctor_class(type(base))


@functools.cache
def _doctor_class(language_model: Any) -> type[PreTrainedModel]:
    """The subclass of a language model's class whose forward reads completions. Configs record its name, so it is kept."""

    class DoctorModel(language_model):
        language_model_class = language_model

        @functools.wraps(language_model.forward)
        def forward(self, *args, completion_mask=None, base_logits=None, **kwargs):
            forward = functools.partial(super().forward, *args)
            if completion_mask is None:
                return forward(**kwargs)
            return read_completions(self, forward, completion_mask, base_logits, **kwargs)

    DoctorModel.__name__, DoctorModel.__qualname__ = language_model.__name__, language_model.__qualname__
    DoctorModel.__module__ = language_model.__module__
    return DoctorModel


def read_completions(
    model: PreTrainedModel,
    forward: Callable[..., Any],
    completion_mask: torch.Tensor,
    base_logits: list[FactoredLogits | torch.Tensor] | None,
    **inputs: Any,
) -> DoctorOutput:
    """
    The forward pass of a doctor in training: log-probabilities and values of completions, left-aligned.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The doctor.
        forward (`Callable`):
            The forward of its language model.
        completion_mask (`torch.Tensor` of shape `(B, L)`):
            True for the tokens of completions: at least one in each row, and not the first. N in all rows together.
        base_logits (list of [`~trl_tfpo.functional.FactoredLogits`] or `torch.Tensor` of shape `(N, V)`, *optional*):
            Logits of the base policy where completion tokens are predicted, see
            `read_base_policy` in `training/base_policy.py`. `None` for a doctor with a policy of its own.
        inputs:
            `input_ids` and `attention_mask` of shape `(B, L)`.

    Returns:
        [`DoctorOutput`]
    """
    has_label = completion_mask[:, 1:]  # (B, L - 1)
    logits, hidden = read_logits(model, has_label, forward=forward, **inputs)
    if base_logits is not None:
        logits = add_logits(model, logits, base_logits)
    targets = inputs["input_ids"][:, 1:][has_label].to(hidden.device)
    logps = token_logps(logits=logits, targets=targets)  # (N,)
    log_values = getattr(model, VALUE_HEAD)(hidden).to(logps.device)  # (B, L)
    states, tokens, token_mask = locate_completions(completion_mask)
    return DoctorOutput(
        doctor_logps=logps.new_zeros(token_mask.shape).masked_scatter(token_mask, logps),
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
    Turn a language model into a doctor for training: value head, head for guided flow, adapter.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The language model; changed in place.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Config of a new adapter; not changed. The value head is trained and saved with the adapter.
        guides (`bool`, *optional*, defaults to `False`):
            Whether the doctor is for guided flow. Its language model head then starts at zero, see
            [`~trl_tfpo.models.guidance.start_guidance`], and is trained and saved with the adapter.
        has_credits (`bool`, *optional*, defaults to `False`):
            Whether the doctor starts at token credits. A new LoRA with a policy of its own gets a place for them, see
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
        if has_credits and not guides and (model.device.type == "meta" or head_form(model) == PLAIN):
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
    Give the value head its own learning rate, by new parameter groups at the end with otherwise equal settings.

    Args:
        optimizer ([`~torch.optim.Optimizer`]):
            Optimizer of the model, before its first step and before a scheduler is created; changed in place.
        model ([`~torch.nn.Module`]):
            The doctor.
        learning_rate (`float`):
            Learning rate of the value head at the start of the schedule.
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

    One state precedes each token of the assistant, and one follows the last. Text of a user or tool between two turns of
    the assistant is part of the state that follows it: a masked token counts as deleted.

    Args:
        completion_mask (`torch.Tensor` of shape `(B, L)`):
            True for the tokens of the assistant: at least one in each row, and not the first.

    Returns:
        `torch.Tensor` of shape `(B, S)`: position of the last token of each state; `torch.Tensor` of shape `(B, T)`:
        position of each token; `torch.Tensor` of shape `(B, T)`: True where there is a token. Other entries are arbitrary.
    """
    num_tokens = completion_mask.sum(dim=1, keepdim=True)  # (B, 1)
    is_token = torch.arange(int(num_tokens.max()), device=completion_mask.device) < num_tokens  # (B, T)
    tokens = (~completion_mask).int().argsort(dim=1, stable=True)[:, : is_token.size(1)]  # (B, T)
    last = tokens.gather(1, num_tokens - 1)  # (B, 1)
    before = torch.where(is_token, tokens - 1, last)  # (B, T)
    return torch.cat([before, last], dim=1), tokens, is_token


def load_doctor(path: str | os.PathLike, with_value_head: bool = True, **kwargs) -> LanguageModel:
    """
    Load a trained doctor with its value head, to continue training or to inspect the flow.

    Decoding does not need the value head: `AutoModelForCausalLM.from_pretrained(path)` is enough, or for an adapter
    `PeftModel.from_pretrained(base, path)`.

    Args:
        path (`str`):
            Folder or Hub id with a doctor that [`TFPOTrainer`] saved: a full model or an adapter.
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
    kwargs.setdefault("use_safetensors", True)  # a pickle can run code
    kwargs.setdefault("trust_remote_code", False)  # without a value transformers asks whether to run code
    guidance = load_guidance(path, **{key: kwargs[key] for key in SOURCE if key in kwargs})
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
    """The folder of a doctor's adapter. PEFT saves an adapter that is not named "default" in a subfolder."""
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
    """Save the value head of a full model in its folder, in a file of its own."""
    with written_whole(Path(folder) / VALUE_HEAD_FILE) as part:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}, part)


def fold_map(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Replace the weights of a [`~trl_tfpo.models.guidance_head.GuidanceHead`] by those of an ordinary head, in place.

    Returns:
        `dict[str, torch.Tensor]`: the map of the GuidanceHead, needed to resume training; empty where there is none.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, GuidanceHead):
        return {}
    name = next(name for name, module in model.named_modules() if module is head)
    if f"{name}.map" in state_dict:  # an engine has gathered the parameters
        map = state_dict.pop(f"{name}.map")
        state_dict[f"{name}.weight"] = head.folded(state_dict[f"{name}.weight"], map)
        return {"map": map}
    return {"map": head.map}


def load_value_head(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """
    Load the value head of a full model from its folder, in place, and the map of a GuidanceHead. Does nothing where the
    folder has no such file.
    """
    path = Path(folder) / VALUE_HEAD_FILE
    if path.is_file():
        state, head = load_file(path), model.get_output_embeddings()
        map = state.pop("map", None)
        getattr(model, VALUE_HEAD).load_state_dict(state)
        if map is not None and isinstance(head, GuidanceHead):
            head.map.data.copy_(map)


def _read_value_head(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of the value head of a saved full model: among its weights, sharded or not, or in their own file."""
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

# SPDX-License-Identifier: Apache-2.0

"""Folders of doctors: what is read from them, LoRA merged into its base, and refusals by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model, save_adapter, save_model
from transformers import AutoConfig

from trl_tfpo_vllm import guided_config
from trl_tfpo_vllm.lora import Lora
from trl_tfpo_vllm.saved_doctor import read_doctor
from trl_tfpo_vllm.sharing import are_alike, share_modules


def merged(folder):
    """Weights of a LoRA doctor."""
    saved = read_doctor(folder)
    lora = Lora(saved, AutoConfig.from_pretrained(saved.base))
    return dict(lora.merge(load_file(f"{saved.base}/model.safetensors").items()))


def test_lora_is_added_to_its_base(folders):
    """The numbers of a whole doctor are compared in `test_doctors.py`; here each rule of PEFT is visible."""
    base, found = load_file(f"{folders.patient}/model.safetensors"), merged(folders.policy_lora)
    lora = load_file(f"{folders.policy_lora}/adapter_model.safetensors")
    scales = {  # `lora_alpha` or its pattern, over the square root of the rank
        "model.layers.0.self_attn.v_proj": 4 / 2**0.5,
        "model.layers.1.self_attn.v_proj": 6 / 2**0.5,
        "model.layers.1.mlp.down_proj": 4,
        "lm_head": 1,
    }
    for layer, scale in scales.items():
        first, second = (lora[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
        weight = base["model.embed_tokens.weight" if layer == "lm_head" else f"{layer}.weight"]
        torch.testing.assert_close(found[f"{layer}.weight"], weight + scale * second @ first)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"):
        assert torch.equal(found[name], base[name])
    assert found.keys() == base.keys() | {"lm_head.weight"}


def test_a_head_of_its_own_replaces_that_of_the_base(folders):
    """A doctor of guided flow starts with a new head. Its value head is left out."""
    lora, found = load_file(f"{folders.flow_lora}/adapter_model.safetensors"), merged(folders.flow_lora)
    assert torch.equal(found["lm_head.weight"], lora["base_model.model.lm_head.weight"])
    assert not any("value_head" in name for name in found)


def test_exponents_of_an_adapter(folders, tmp_path):
    """From `guidance.json`, or from the record in its config where that file is absent."""
    trained = {"alpha": 1.0, "beta": 1.0}
    assert read_doctor(folders.flow_lora).exponents == trained and not read_doctor(folders.policy_lora).exponents
    folder = tmp_path / "nested" / "flow"  # PEFT's place for an adapter with another name
    folder.parent.mkdir()
    save_adapter(folder, "flow_lora", base=folders.patient)
    (folder / "guidance.json").unlink()
    saved = read_doctor(folder.parent)
    assert (saved.folder, saved.base, saved.exponents) == (folder, folders.patient, trained)
    save_adapter(folder.parent / "other", "policy_lora", base=folders.patient)
    with pytest.raises(ValueError, match=r"A doctor is one adapter. Got .*\['flow', 'other'\]"):
        read_doctor(folder.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "must be a plain LoRA. Got use_dora in"),
        ({"bias": "all"}, "Got bias in"),
        ({"fan_in_fan_out": True}, "Got fan_in_fan_out in"),
        ({"target_parameters": ["experts.down_proj"]}, "Got target_parameters in"),
        ({"layer_replication": [[0, 2]], "lora_bias": True}, "Got layer_replication, lora_bias in"),
        ({"a_later_setting": 1}, "Got a_later_setting in"),
        ({"init_lora_weights": "pissa"}, "Got init_lora_weights='pissa' in"),
        ({"peft_type": "PREFIX_TUNING"}, "must be a plain LoRA. Got PREFIX_TUNING in"),
        ({"auto_mapping": None}, "must have a record of the exponents"),
        ({"auto_mapping": {"trl_tfpo": {"format": 2}}}, "must have format 1. Got format 2"),
        ({"base_model_name_or_path": "/no/such"}, "base of an adapter must be a full model. Got '/no/such'"),
        ({"base_model_name_or_path": None}, "base of an adapter must be a full model. Got ''"),
    ],
)
def test_adapters_that_are_refused(folders, tmp_path, changes, message):
    """Guidance by another doctor than the one that was trained must be impossible."""
    folder = save_adapter(tmp_path / "doctor", "flow_lora", **{"base": folders.patient} | changes)
    (tmp_path / "doctor" / "guidance.json").unlink()
    with pytest.raises(ValueError, match=message):
        guided_config(folders.patient, {"helpful": folder})


def test_an_adapter_that_is_no_safetensors(folders, tmp_path):
    """A pickle can run code."""
    folder = save_adapter(tmp_path / "doctor", "flow_lora", base=folders.patient)
    (tmp_path / "doctor" / "adapter_model.safetensors").rename(tmp_path / "doctor" / "adapter_model.bin")
    with pytest.raises(ValueError, match="must be saved as safetensors"):
        read_doctor(folder)


def test_an_adapter_of_another_base(folders, tmp_path):
    """Layers that are absent, and layers of another size."""
    with pytest.raises(ValueError, match=r"must fit its base. Got \['model.layers.1.mlp.down_proj.weight'"):
        merged(
            save_adapter(tmp_path / "fewer", "policy_lora", base=save_model(tmp_path / "short", seed=1, num_layers=1))
        )
    wider = save_model(tmp_path / "base", seed=1, head_dim=64)
    with pytest.raises(
        ValueError, match=r"Got 'model.layers.0.self_attn.v_proj.weight' of shape \(32, 64\) .*, for \(64, "
    ):
        merged(save_adapter(tmp_path / "wider", "policy_lora", base=wider))


@pytest.mark.parametrize("key", ["lora_embedding_A", "lora_magnitude_vector.weight", "lora_B.bias"])
def test_tensors_that_are_no_products(folders, tmp_path, key):
    """They are refused, not ignored."""
    folder = save_adapter(tmp_path / "doctor", "policy_lora", base=folders.patient)
    path = f"{folder}/adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.model.embed_tokens.{key}": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=f"plain LoRA on linear layers. Got '.*{key}'"):
        merged(folder)


def test_equal_modules_are_held_once():
    """Where weights differ, and where asked to, modules stay apart."""
    first, second = (make_model(seed=1, tied=True) for _ in range(2))
    assert are_alike(first.config, second.config) and not are_alike(first.config, make_model(1, num_layers=1).config)
    with torch.no_grad():
        second.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    share_modules(second, first, apart=[second.model.layers[0].mlp.up_proj])
    own = {name for name, module in second.named_modules() if module not in set(first.modules())}
    own = {name for name in own if isinstance(second.get_submodule(name), torch.nn.Linear)}
    assert own == {"model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"}
    assert second.lm_head is first.lm_head and second.model.norm is first.model.norm


def test_references(folders):
    """Their names, defaults and refusals are those of `DoctorGuidedLogitsProcessor(reference=...)`."""
    doctors = {"a": folders.policy_lora, "b": folders.helpful, "flow": folders.flow_lora, "c": folders.harmless}
    config = guided_config(folders.patient, doctors, reference={"a": folders.patient, "b": folders.harmless})
    entries = {entry.pop("name"): entry for entry in config["hf_overrides"]["guided_doctors"]}
    assert [entry["reference"] for entry in entries.values()] == ["patient", folders.harmless, None, None]
    assert [entry["beta"] for entry in entries.values()] == [0.5, 0.5, 1.0, 0.5]
    json.dumps(config["hf_overrides"])
    for reference, message in (
        ({"a": folders.policy_lora}, "must be the doctor before training. Got the folder of 'a' itself"),
        ({"flow": folders.patient}, "Got one for 'flow', a doctor of guided flow"),
        ({"flow": folders.helpful}, "Got one for 'flow', a doctor of guided flow"),
        ({"d": folders.patient}, r"`reference` must name doctors among .* Got \['d'\]"),
        ({"a": "nowhere"}, "must be a folder with a model or an adapter. Got 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            guided_config(folders.patient, doctors, reference=reference)

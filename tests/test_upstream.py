# SPDX-License-Identifier: Apache-2.0

"""What the package needs of TRL, transformers, PEFT and Accelerate is unchanged; docstrings say what to do if not."""

import inspect
import os
from dataclasses import fields

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from conftest import make_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, Trainer, TrainingArguments
from transformers.distributed.fsdp import is_fsdp_enabled
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints
from trl import DPOTrainer, is_conversational, maybe_extract_prompt

from trl_tfpo import TFPOTrainer
from trl_tfpo.common._upstream import (
    _BaseTrainer,
    active_adapters,
    adapter_layers,
    keep_differentiable,
    unsharded,
    using_adapters,
)
from trl_tfpo.common.language_model import is_sharded
from trl_tfpo.training.doctor_files import DoctorFiles


def test_constructor_follows_trl():
    """Positional arguments that shift would put the collator where the settings belong.

    Change: the parameters of `TFPOTrainer.__init__`, in the order of `DPOTrainer`.
    """
    ours = list(inspect.signature(TFPOTrainer.__init__).parameters)
    theirs = [name for name in inspect.signature(DPOTrainer.__init__).parameters if name != "ref_model"]
    assert [name for name in ours if name in theirs] == theirs
    assert ours.index("patient_model") == 2


def test_the_trainer_calls_what_is_overridden():
    """
    A method that is called by another name is one that nobody calls: rewards would be dropped as unknown columns.

    Change: the method of that name in `TFPOTrainer`, or `checkpoints.complete_checkpoint`.
    """
    for name in ("_set_signature_columns_if_needed", "_get_train_sampler", "_save_checkpoint", "get_batch_samples"):
        assert name in vars(TFPOTrainer) and f"self.{name}" in inspect.getsource(Trainer), name
    for name in ("save_model", "_save", "_load_from_checkpoint", "_load_best_model", "_issue_warnings_after_load"):
        assert name in vars(DoctorFiles) and f"self.{name}" in inspect.getsource(Trainer), name
    assert list(inspect.signature(Trainer._save_checkpoint).parameters) == ["self", "model", "trial"]
    assert "activation_checkpointing" in {field.name for field in fields(TrainingArguments)}
    assert {"output_dir", "save_total_limit", "use_mtime"} <= set(inspect.signature(rotate_checkpoints).parameters)


def test_loss_scaling_flag_is_read():
    """Without the flag the Trainer guesses whether a loss is already scaled for accumulation.

    Change: `TFPOTrainer.loss_is_scaled_for_ga`, and the scaling at the end of `compute_loss`.
    """
    assert "loss_is_scaled_for_ga" in inspect.getsource(Trainer)
    assert _BaseTrainer.loss_is_scaled_for_ga is None and TFPOTrainer.loss_is_scaled_for_ga is True


def test_prompts_are_extracted_as_before():
    """TRL's rule for implicit prompts, which the cut of transcripts builds on.

    Change: `tokenization.split_prompt`.
    """
    pair = {"chosen": "a cat", "rejected": "a dog"}
    assert maybe_extract_prompt(pair) == {"prompt": "a", "chosen": " cat", "rejected": " dog"}
    assert is_conversational({"prompt": [{"role": "user", "content": "x"}]})


def test_adapters_are_switched_by_two_attributes():
    """What guides for one token must speak for the patient in the next, without a walk over all modules.

    Change: `_upstream.adapter_layers`, `active_adapters` and `using_adapters`.
    """
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    model = get_peft_model(make_llama(1), config, adapter_name="one").eval()
    model.add_adapter("two", config)
    ids, expected, layers = torch.tensor([[5, 6, 7]]), {}, adapter_layers(model)
    for name in ("one", "two"):
        model.set_adapter(name)
        expected[name] = model(ids).logits
    with model.disable_adapter():
        expected[None] = model(ids).logits
    assert not torch.equal(expected["one"], expected["two"])
    assert active_adapters(layers) == ("two",)
    for names in (("two",), (), ("one",)):
        with using_adapters(layers, names):
            assert torch.equal(model(ids).logits, expected[names[0] if names else None])
            assert active_adapters(layers) == names
        assert torch.equal(model(ids).logits, expected["two"])  # as it was before
        with model.disable_adapter(), using_adapters(layers, ("two",)):
            assert torch.equal(model(ids).logits, expected["two"])


def test_a_custom_generate_gets_what_speculation_needs():
    """The arguments of its own, all processors in order, and a cache that can be cut by a negative count.

    Change: `speculative._PatientReader`, and the parameters of `speculative_guided_generate`.
    """

    def custom_generate(model, input_ids, logits_processor, stopping_criteria, generation_config, own=None, **kwargs):
        assert own == 7 and isinstance(kwargs["past_key_values"], DynamicCache)
        assert [type(x).__name__ for x in logits_processor] == [
            "RepetitionPenaltyLogitsProcessor",
            "Ours",
            "TemperatureLogitsWarper",
        ]
        assert generation_config.max_length == 5 and len(stopping_criteria)
        cache = model(input_ids, past_key_values=kwargs["past_key_values"], use_cache=True).past_key_values
        cache.activate_past_recording()
        cache.crop(-1)
        assert cache.get_seq_length() == input_ids.size(1) - 1 and cache.is_croppable
        return input_ids

    class Ours(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    make_llama(1).generate(
        torch.tensor([[5, 6, 7]]),
        max_new_tokens=2,
        do_sample=True,
        temperature=0.5,
        top_k=0,
        repetition_penalty=1.2,
        logits_processor=[Ours()],
        custom_generate=custom_generate,
        own=7,
    )


def test_models_can_be_loaded_whole_under_any_engine(monkeypatch):
    """Read from a shard, or from weights that were never loaded, rewards and references are noise.

    Change: `_upstream.unsharded`.
    """
    pytest.importorskip("deepspeed")
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # lives as long as this name
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert is_deepspeed_zero3_enabled() and is_fsdp_enabled() and config.is_zero3()
    with pytest.raises(RuntimeError), unsharded():
        assert not is_deepspeed_zero3_enabled() and not is_fsdp_enabled()
        raise RuntimeError
    assert is_deepspeed_zero3_enabled() and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_shards_of_deepspeed_are_marked():
    """A doctor that is scored from its shards has empty weights.

    Change: `common.language_model.is_sharded`.
    """
    model = make_llama(1)
    assert not is_sharded(model)
    model.lm_head.weight.ds_id = 0
    assert is_sharded(model)


def test_fsdp2_policy_rounds_outputs_unless_told():
    """The trainer takes back the one field of the policy that would round flows; it has to be there.

    Change: `_upstream.keep_output_precision`.
    """
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16


def test_four_bit_weights_stay_differentiable():
    """After one forward in eval mode, gradients must still be those of the weights.

    Change: `_upstream.keep_differentiable`; it may no longer be needed.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    keep_differentiable(layer)
    with torch.no_grad():
        weight = layer.eval()(torch.eye(64)).T
    inputs = torch.randn(3, 64, requires_grad=True)
    layer.train()(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, weight.sum(dim=0).expand(3, -1))


def test_adapter_configs_carry_what_they_are_given(tmp_path):
    """
    The exponents of an adapter's training travel in its config, where transformers and PEFT have a free mapping.

    Change: `trained_exponents.record_exponents`.
    """
    model = get_peft_model(make_llama(2), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].auto_mapping = {"ours": {"alpha": 1.0}}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llama(2), tmp_path, adapter_name="other")
    assert again.peft_config["other"].auto_mapping == {"ours": {"alpha": 1.0}}
    for layer in adapter_layers(again):  # whose names tell which adapters there are
        assert any("other" in getattr(layer, name).keys() for name in layer.adapter_layer_names)


def test_the_generation_config_of_the_base_is_what_counts():
    """
    Samples set aside what a model says of sampling, also inside a `PeftModel`.

    Change: `_without_generation_config` in `evaluation/completions.py`.
    """
    model = get_peft_model(make_llama(2), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    ids = torch.tensor([[1, 5]])
    model.get_base_model().generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=None)
    assert model.generate(input_ids=ids).shape == (1, 5)

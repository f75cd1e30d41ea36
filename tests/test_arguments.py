# SPDX-License-Identifier: Apache-2.0

"""Settings as people write them: from files, from sweeps, and from other trainers."""

import copy
import dataclasses
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from trl import DPOConfig, DPOTrainer, ModelConfig, SFTConfig

from trl_tfpo import TFPOConfig, TFPOTrainer
from trl_tfpo.cli.annotate import AnnotateArguments
from trl_tfpo.cli.generate import GenerateArguments
from trl_tfpo.cli.parser import Parser
from trl_tfpo.cli.train import TFPOScriptArguments
from trl_tfpo.common.arguments import REPLACEMENTS, check_types


def parse(tmp_path, text: str, *arguments: str, types=(TFPOScriptArguments, TFPOConfig, ModelConfig)):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return Parser(types, "train", "").parse(["--config", str(path), *arguments])


WRONG = [
    ("max_steps: 2.5", "`max_steps` must be an integer. Got 2.5"),
    ("max_steps: yes", "`max_steps` must be an integer. Got True .bool.; correct it"),
    ("max_steps: null", "`max_steps` must be an integer. Got None"),
    ("learning_rate: [1.0e-3]", "`learning_rate` must be a number. Got \\[0.001\\]"),
    ("reward_temperature: no", "`reward_temperature` must be a number. Got False"),
    ("max_length: 512.5", "`max_length` must be an integer. Got 512.5"),
    ("bf16: 2", "`bf16` must be true or false. Got 2"),
    ("drop_unusable: [true]", "`drop_unusable` must be true or false"),
    ("run_name: yes", "`run_name` must be a string. Got True .bool.; write it in quotes, because YAML reads `yes`"),
    ("model_init_kwargs: 5", "`model_init_kwargs` must be a dictionary"),
    ("policy: [ratio]", "`policy` must be a string. Got .*; write it without brackets"),
    ("max_steps: [ten]", "`max_steps` must be an integer. Got .*; correct it"),
    ("lr_scheduler_kwargs: num_cycles=2", "`lr_scheduler_kwargs` must be a dictionary"),
    ("model_init_kwargs: '[1]'", "`model_init_kwargs` must be a dictionary"),
    ("lora_r: 8.5", "`lora_r` must be an integer. Got 8.5"),
    ("lora_target_modules: [1, 2]", "`lora_target_modules` must be a list"),
    ("use_peft: 3", "`use_peft` must be true or false"),
    ("dry_run: 1.5", "`dry_run` must be an integer"),
    ("faces: [a, b]", "`faces` must be a string"),
]


@pytest.mark.parametrize("text, message", WRONG, ids=[text for text, _ in WRONG])
def test_a_value_of_another_type_is_refused(text, message, tmp_path):
    """A count of 2.5 steps, or a switch that says "no" and is on, is noticed after the training, if at all."""
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, text + "\noutput_dir: run\n")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_length": "many"}, "correct it, or leave it out"),
        ({"max_length": "512"}, "write it without quotes"),
        ({"lr_scheduler_type": ["cosine", "linear"]}, "must be a name like 'linear' or a string.*; correct it"),
    ],
    ids=["a word", "a quoted number", "two names"],
)
def test_the_remedy_fits_the_value(settings, message):
    """To write `many` without quotes would change nothing."""
    with pytest.raises(ValueError, match=message):
        TFPOConfig("run", **settings)


def test_a_file_may_say_it_in_any_way(tmp_path):
    """YAML reads 5e-4 as a string and `on` as a switch; recipes are full of both, and of quoted numbers and null."""
    text = """
        output_dir: run
        learning-rate: 5e-4
        value_head_learning_rate: 1e-3
        reward_temperature: 2
        max_steps: '10'
        bf16: off
        use_peft: on
        max_length: null
        dataloader_num_workers: 2.0
        run_name: 2024
        resume_from_checkpoint: true
        report_to: none
        lora_target_modules: all-linear
        lr_scheduler_kwargs: '{"num_cycles": 2}'
        fsdp_config: {min_num_params: 1}
        patient_model_name_or_path: one
        doctor: two
    """
    script, args, model = parse(tmp_path, inspect.cleandoc(text))
    assert (script.patient, script.doctor) == ("one", "two")
    assert args.learning_rate == 5e-4 and args.value_head_learning_rate == 1e-3 and args.max_steps == 10
    assert args.dataloader_num_workers == 2 and isinstance(args.dataloader_num_workers, int)
    assert args.run_name == "2024" and args.resume_from_checkpoint is True
    assert args.bf16 is False and args.max_length is None and args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert model.use_peft is True and model.lora_target_modules == "all-linear"
    (generate,) = parse(tmp_path, "prompt: Hello\nbeta: [5e-1, 1]\n", types=(GenerateArguments,))
    assert generate.prompt == ["Hello"] and generate.beta == [0.5, 1]


def test_names_of_patient_and_doctor_are_the_same_everywhere(tmp_path):
    """Scripts that use the former names go on working, and nobody has to know which command has which."""
    for option in ("--patient", "--patient_model_name_or_path", "--patient-model-name-or-path"):
        for types, others in (
            (AnnotateArguments, ["--output", "x"]),
            (GenerateArguments, []),
            (TFPOScriptArguments, []),
        ):
            (parsed,) = Parser((types,), "", "").parse([option, "one", *others])
            assert parsed.patient == "one"
    (parsed,) = Parser((TFPOScriptArguments,), "", "").parse(["--doctor_model_name_or_path", "two"])
    assert parsed.doctor == "two"
    with pytest.raises(ValueError, match="two names"):
        parse(tmp_path, "patient: a\npatient_model_name_or_path: b\n", types=(GenerateArguments,))


def test_arguments_of_other_trainers_are_answered(tmp_path):
    """Whoever comes from DPO has `beta` and `ref_model` in the script; a bare TypeError does not say what to do."""
    for config in (DPOConfig, SFTConfig):
        for name in ("beta", "padding_free", "packing", "max_prompt_length", "loss_type", "precompute_ref_log_probs"):
            if name in config.__dataclass_fields__:
                with pytest.raises(TypeError, match=f"`TFPOConfig` has no argument `{name}`. Instead: "):
                    TFPOConfig("run", **{name: 1})
    assert "ref_model" in inspect.signature(DPOTrainer.__init__).parameters
    with pytest.raises(TypeError, match="`TFPOTrainer` has no argument `ref_model`. Instead: the reference is"):
        TFPOTrainer(make_llama(2), ref_model=make_llama(3))
    with pytest.raises(TypeError, match="`processing_class`"):
        TFPOTrainer(make_llama(2), tokenizer=None)
    with pytest.raises(TypeError, match="field of `TFPOConfig`: pass `args=TFPOConfig"):
        TFPOTrainer(make_llama(2), max_length=3)
    with pytest.raises(TypeError, match="pass it to `TFPOTrainer`"):
        TFPOConfig("run", faces="helpfulness")
    with pytest.raises(TypeError, match="Did you mean `max_steps`"):
        TFPOConfig("run", max_step=3)
    with pytest.raises(ValueError, match="unknown option '--padding_free'. Instead"):
        parse(tmp_path, "padding_free: true\noutput_dir: run\n")
    known = {*TFPOConfig.__dataclass_fields__, *inspect.signature(TFPOTrainer.__init__).parameters}
    for name in REPLACEMENTS:
        hint = REPLACEMENTS[name]
        assert name not in TFPOConfig.__dataclass_fields__, name
        fields = [word.split("=")[0] for word in hint.split("`")[1::2] if "=" in word and "(" not in word]
        assert set(fields) <= known, hint  # a hint to something that is gone sends people in circles


def test_settings_stay_what_they_were():
    """A checked config must still be copied, saved, listed and changed like any dataclass."""
    args = TFPOConfig("run", max_steps=3, report_to="none", fsdp=None, eval_strategy="steps", eval_steps=0.5)
    for other in (
        copy.deepcopy(args),
        pickle.loads(pickle.dumps(args)),
        dataclasses.replace(args),
        TFPOConfig(**args.to_dict()),
    ):
        check_types(other)
        assert other.max_steps == 3
    assert list(inspect.signature(TFPOConfig).parameters)[:2] == ["output_dir", "per_device_train_batch_size"]
    assert "patient_model" in inspect.signature(TFPOTrainer).parameters

    @dataclasses.dataclass
    class Mine(TFPOConfig):
        other: "OnlyForTypeCheckers | None" = None  # noqa: F821

    assert Mine("run", other=3).other == 3
    with pytest.raises(ValueError, match="`max_steps` must be an integer"):
        Mine("run", max_steps=2.5)
    TFPOConfig("run", model_init_kwargs={"dtype": torch.float32}, warmup_steps=3, bf16=0)  # what Python may pass


def test_a_doctor_may_have_a_name(tmp_path):
    """What is an option of one command is none of another otherwise, and a path that looks like both is a path."""
    from trl_tfpo.cli.models import parse_doctor

    assert parse_doctor("helpful=runs/one") == ("helpful", "runs/one")
    assert parse_doctor("runs/one") == ("one", "runs/one")
    folder = tmp_path / "lr=1"
    folder.mkdir()
    assert parse_doctor(str(folder)) == ("lr=1", str(folder))
    assert parse_doctor(".") == (Path.cwd().name, ".")
    for text in ("=path", "name=", ""):
        with pytest.raises(ValueError, match="NAME=PATH"):
            parse_doctor(text)

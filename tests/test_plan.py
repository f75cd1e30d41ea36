# SPDX-License-Identifier: Apache-2.0

"""A training must do what its plan says: exact counts, exact bytes of weights."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import plan_run
import pytest
import torch
import yaml
from conftest import conversational_rows, make_llama, make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from processes import launch, run_script, succeeds
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)
from trl import get_peft_config

from trl_tfpo import Faces, TFPOConfig, TFPOTrainer
from trl_tfpo.annotation.score_cache import SHARD_SIZE
from trl_tfpo.models import pair_rows
from trl_tfpo.models.doctor import make_doctor
from trl_tfpo.training.plan import GIB, ZERO3_LIVE_PARAMETERS, training_plan


ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
FACES = Faces(positive="you are kind", negative="you are rude")
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
QWEN3 = dict(vocab_size=151936, head_dim=128, num_key_value_heads=8, dtype="bfloat16")
PUBLISHED = {  # shapes as in the `config.json` of each
    "Qwen/Qwen3-32B": Qwen3Config(
        hidden_size=5120, num_hidden_layers=64, num_attention_heads=64, intermediate_size=25600, **QWEN3
    ),
    "Qwen/Qwen3-8B-Base": Qwen3Config(
        hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, intermediate_size=12288, **QWEN3
    ),
    "Qwen/Qwen3-0.6B": Qwen3Config(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=3072,
        tie_word_embeddings=True,
        **QWEN3,
    ),
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        dtype="bfloat16",
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ),
}
PUBLISHED["Qwen/Qwen3-0.6B-Base"] = PUBLISHED["Qwen/Qwen3-0.6B"]


def load_example():
    spec = importlib.util.spec_from_file_location("example_train", ROOT / "examples" / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["example_train"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def config(tmp_path, **settings):
    return TFPOConfig(str(tmp_path / "run"), **{"report_to": "none", "save_strategy": "no", **settings})


def plan_of(tmp_path, doctor, patient=None, num_pairs=8, **settings):
    return training_plan(
        Dataset.from_list(conversational_rows(num_pairs)),
        make_tokenizer(),
        doctor=doctor,
        patient=patient or make_llama(1, 32).config,
        faces=FACES,
        **{"args": config(tmp_path), **settings},
    )


def save(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


# Weights


def loaded_bytes(model):
    """Bytes of a model that is there: parameters, buffers, and what bitsandbytes keeps beside its weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            tensors += [state.absmax, state.code]
            if state.nested:
                tensors += [state.offset, state.state2.absmax, state.state2.code]
        if (scales := getattr(parameter, "SCB", None)) is not None:
            tensors.append(scales)
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    "dtype, quantization, peft_config",
    [
        ("float32", None, None),
        ("bfloat16", None, None),
        ("auto", None, LORA),
        ("bfloat16", None, LORA),
        ("float32", NF4, LORA),
        ("bfloat16", {**NF4, "bnb_4bit_use_double_quant": True}, LORA),
        ("float32", {"load_in_8bit": True}, LORA),
    ],
)
def test_parameters_and_bytes_are_those_of_the_loaded_doctor(tmp_path, is_tied, dtype, quantization, peft_config):
    """A user picks a machine by these; tied weights, value heads, adapters and scales are easily forgotten."""
    model = make_llama(2, hidden_size=64)
    model.config.tie_word_embeddings = is_tied
    name = save(AutoModelForCausalLM.from_config(model.config), tmp_path / "doctor")
    quantization = BitsAndBytesConfig(**quantization) if quantization else None
    plan = plan_of(
        tmp_path,
        name,
        args=config(tmp_path, model_init_kwargs={"dtype": dtype}),
        quantization_config=quantization,
        peft_config=peft_config,
    )
    loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, quantization_config=quantization)
    former = loaded_bytes(loaded)  # a copy is guided in training
    if quantization is None:
        sizes = [parameter.numel() for parameter in make_doctor(loaded, peft_config, guides=True).parameters()]
        assert plan.doctor_parameters == sum(sizes)
    else:
        make_doctor(loaded, peft_config, guides=True)
    assert plan.trainable_parameters == sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    assert plan.memory[-1].weights == loaded_bytes(loaded) + former
    assert plan.memory[-1].gradients == sum(p.nbytes for p in loaded.parameters() if p.requires_grad)


def test_published_models_have_their_published_sizes(tmp_path):
    """A config that builds another model than it names would make every figure of a recipe wrong."""
    sizes = {"Qwen/Qwen3-32B": 32.76e9, "Qwen/Qwen3-8B-Base": 8.19e9, "Qwen/Qwen3-0.6B": 0.596e9}
    sizes |= {"Qwen/Qwen2.5-7B-Instruct": 7.62e9, "Qwen/Qwen2.5-0.5B-Instruct": 0.494e9}
    for name, size in sizes.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(PUBLISHED[name])
        assert model.num_parameters() == pytest.approx(size, rel=2e-3), name


def test_nothing_is_loaded(tmp_path):
    """A plan that needs the weights comes too late: folders with a config and a tokenizer are enough."""
    for name, model in (("doctor", make_llama(2)), ("patient", make_llama(1, 32))):
        model.config.save_pretrained(tmp_path / name)
    assert not list(tmp_path.rglob("*.safetensors"))
    plan = plan_of(tmp_path, str(tmp_path / "doctor"), str(tmp_path / "patient"))
    assert plan.patient_parameters == make_llama(1, 32).num_parameters()


def test_engines_shard_what_they_say(tmp_path):
    """Hand-worked bytes of each engine for P float32 parameters in 4 processes, in bfloat16 with AdamW."""
    model = make_doctor(make_llama(2))
    size = sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    plan = plan_of(tmp_path, make_llama(2).config, num_processes=4, args=config(tmp_path, policy="doctor"))
    found = {row.phase.removeprefix("training, "): (row.weights, row.gradients, row.optimizer) for row in plan.memory}
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    expected = {
        "DDP": (4 * size, 8 * size, 8 * size),
        "ZeRO-1": (2 * size, 2 * size, 4 * size),
        "ZeRO-2": (2 * size, size / 2, 4 * size),
        "ZeRO-3": (size / 2 + 2 * size, size / 2, 4 * size),
        "FSDP2": (size + 2 * (size - 2 * layer) + 4 * layer, size, 2 * size),
    }
    assert list(found) == ["annotation", "reference", *expected]
    for engine, (weights, gradients, optimizer) in expected.items():
        assert found[engine] == pytest.approx((weights + buffers, gradients, optimizer), abs=1), engine

    # A ratio has a map beside its frozen head, and a copy of the doctor beside it
    ratio = plan_of(tmp_path, make_llama(2).config, num_processes=4)
    copied, map_size = 4 * make_llama(2).num_parameters() + buffers, make_llama(2).config.hidden_size ** 2
    bytes_of_map = {"DDP": 4, "ZeRO-1": 2, "ZeRO-2": 2, "ZeRO-3": 2.5, "FSDP2": 3}
    for row in ratio.memory[1:]:
        engine = row.phase.removeprefix("training, ")
        beside = copied / 4 if engine in ("ZeRO-3", "FSDP2") else copied
        weights = found[engine][0] + bytes_of_map[engine] * map_size
        assert row.weights == pytest.approx(weights + beside, abs=1), engine
    assert [row.phase for row in ratio.memory[:2]] == ["annotation", "training, DDP"]

    # A patient in 8 bits is whole beside the doctor that it guides
    settings = dict(num_processes=4, args=config(tmp_path, policy="guided"))
    plain = plan_of(tmp_path, make_llama(2).config, **settings).memory
    eight = BitsAndBytesConfig(load_in_8bit=True)
    quantized = plan_of(tmp_path, make_llama(2).config, patient_quantization_config=eight, **settings).memory
    assert quantized[0].weights < plain[0].weights  # annotation: the patient alone
    for before, after in zip(plain[1:], quantized[1:], strict=True):
        share = plain[0].weights / (4 if before.phase.endswith(("ZeRO-3", "FSDP2")) else 1)
        assert after.weights - quantized[0].weights == pytest.approx(before.weights - share, abs=1), after.phase


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp2"])
def test_engines_hold_what_the_plan_says(tmp_path, engine):
    """In two real processes: a state that is not sharded is the difference between fitting and not."""
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversational_rows(8)))
    for name, model in (("patient", make_llama(1, 32)), ("doctor", make_llama(2, 128))):
        save(model, tmp_path / name)
    launch(engine, "bf16", tmp_path, plan_run.run_as_rank, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    weights, optimizer = report["plan"]["training, " + engine.replace("zero", "ZeRO-").replace("fsdp", "FSDP")]
    size = report["parameters"]
    layer = sum(parameter.numel() for parameter in make_llama(2, 128).model.layers[0].parameters())
    gathered = {"zero3": 2 * size, "fsdp2": 2 * (size - 2 * layer) + 4 * layer}.get(engine, 0)
    gradients = 0 if engine == "fsdp2" else 2 * size  # DeepSpeed's float32 copy, which is gone after the step
    assert report["weights"] == pytest.approx(weights - gathered, rel=2e-3)  # shares are padded
    assert report["optimizer"] == pytest.approx(optimizer - gradients, rel=2e-3)


def test_the_default_is_deepspeeds():
    """Another default in DeepSpeed would make the figures of ZeRO-3 wrong in silence."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig(stage=3).max_live_parameters == ZERO3_LIVE_PARAMETERS


# Counts


def count_tokens(model) -> list[int]:
    """A list that grows by the tokens of each batch that goes into a model, without padding."""
    counts = []

    def hook(_, inputs):
        rows = inputs[0][inputs[0].amax(dim=1) > 7]  # without what a model is probed with, ids 1 to 7
        counts.append(int((rows > 0).sum()))

    model.get_input_embeddings().register_forward_pre_hook(hook)
    return counts


def tiny_mistral(sliding_window: int | None) -> MistralConfig:
    """A patient of the size of the usual one, whose attention may have a window."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(make_llama(1, 32).config, name) for name in names}
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return MistralConfig(**sizes, **ids, num_key_value_heads=2, sliding_window=sliding_window)


@pytest.fixture(scope="module", params=["doctor", "ratio"])
def training(request, tmp_path_factory):
    """A plan for 130 pairs in two epochs, and what a training by it did."""
    folder, policy = tmp_path_factory.mktemp("counts"), request.param
    rows = Dataset.from_list(conversational_rows(130))
    patient_config = tiny_mistral(sliding_window=16 if policy == "ratio" else None)
    set_seed(0)
    patient, doctor = AutoModelForCausalLM.from_config(patient_config).eval(), make_llama(2)
    args = config(
        folder,
        policy=policy,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=3,
        use_cpu=True,
        gap_floor=1e-6,  # the faces of a random patient hardly differ
        calibrate_rewards=False,  # a doctor that starts at credits is read before
    )
    plan = training_plan(rows, make_tokenizer(), doctor=doctor.config, patient=patient_config, args=args, faces=FACES)
    read_by_patient, read_by_doctor = count_tokens(patient), count_tokens(doctor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(pair_rows, "WORTHWHILE", 0.0)  # the plan counts a prompt for each of its completions
        trainer = TFPOTrainer(
            doctor, patient, args=args, train_dataset=rows, processing_class=make_tokenizer(), faces=FACES
        )
        read_before_training = sum(read_by_doctor)
        trainer.train()
    return SimpleNamespace(
        plan=plan,
        policy=policy,
        args=args,
        doctor_config=doctor.config,
        dataset=trainer.train_dataset,
        num_steps=trainer.state.global_step,
        num_shards=len(list((folder / "cache" / "trl_tfpo").rglob("*.arrow"))),
        read_by_patient=sum(read_by_patient),
        read_before_training=read_before_training,
        read_in_training=sum(read_by_doctor) - read_before_training,
    )


def test_tokens_are_those_that_the_models_read(training):
    """Machines are rented by tokens. The plan does not know which prompts begin alike, and are read once."""
    plan = training.plan
    if training.policy == "ratio":  # the patient has a window
        assert plan.annotation_tokens == training.read_by_patient
        assert plan.reference_tokens == training.read_before_training == 0
    else:
        assert 0 < training.read_by_patient < plan.annotation_tokens
        assert 0 < training.read_before_training < plan.reference_tokens
    num_readers = 2 if training.policy == "ratio" else 1  # the copy of a ratio's doctor reads what the doctor reads
    assert 2 * plan.training_tokens * num_readers == training.read_in_training  # two epochs


def test_steps_are_those_that_the_trainer_makes(training):
    """Learning rates decay over these."""
    assert training.plan.num_update_steps == training.num_steps == 12


def test_pairs_and_the_longest_row_are_those_of_the_dataset(training):
    """The longest row decides whether a batch fits."""
    plan, names = training.plan, ("chosen_ids", "rejected_ids")
    assert plan.num_pairs == len(training.dataset) == 130
    assert plan.longest_row == max(
        len(row["prompt_ids"]) + len(row[name]) for row in training.dataset for name in names
    )


def test_shards_are_those_in_the_cache(training):
    """After an interruption at most one shard is computed again."""
    assert training.plan.num_shards == math.ceil(130 / SHARD_SIZE)
    num_scores = 1 if training.policy == "ratio" else 2  # rewards, and the reference
    assert num_scores * training.plan.num_shards == training.num_shards


def test_annotated_pairs_need_no_patient(training):
    """A plan for them would else include work that is done."""
    plan = training_plan(training.dataset, make_tokenizer(), doctor=training.doctor_config, args=training.args)
    assert plan.annotation_tokens == plan.patient_parameters == 0
    assert plan.training_tokens == training.plan.training_tokens
    assert plan.num_update_steps == training.plan.num_update_steps


@pytest.mark.parametrize(
    "settings, num_processes, num_steps",
    [
        ({"per_device_train_batch_size": 4}, 1, 9),  # ceil(33 / 4)
        ({"per_device_train_batch_size": 4}, 2, 5),  # ceil(9 / 2)
        ({"per_device_train_batch_size": 4, "dataloader_drop_last": True}, 3, 2),  # 8 // 3
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, 1, 3),
        ({"max_steps": 7}, 1, 7),
        ({"num_train_epochs": 1.5, "per_device_train_batch_size": 8}, 1, 8),  # ceil(1.5 * 5)
    ],
)
def test_steps(tmp_path, settings, num_processes, num_steps):
    """Learning rates decay over these."""
    args = config(tmp_path, **{"num_train_epochs": 1, **settings})
    plan = plan_of(tmp_path, make_llama(2).config, num_pairs=33, args=args, num_processes=num_processes)
    assert plan.num_update_steps == num_steps


def test_a_long_dataset_is_extrapolated_and_says_so(tmp_path):
    """Rows that were not read may be longer: the longest that may occur counts."""
    rows = conversational_rows(1) * 40
    args = config(tmp_path, max_length=64)
    whole, part = (
        training_plan(
            Dataset.from_list(rows),
            make_tokenizer(),
            doctor=make_llama(2).config,
            patient=make_llama(1, 32).config,
            args=args,
            faces=FACES,
            max_pairs=max_pairs,
        )
        for max_pairs in (40, 10)
    )
    assert not whole.is_extrapolated and "all tokenized" in str(whole)
    assert part.is_extrapolated and "extrapolated from 10" in str(part)
    assert part.num_pairs == 40 and part.longest_row == 64 > whole.longest_row
    for name in ("annotation_tokens", "reference_tokens", "training_tokens", "num_shards", "num_update_steps"):
        assert getattr(part, name) == getattr(whole, name)
    assert "Activations are not counted" in str(whole)


def test_bad_input(tmp_path):
    """Said before anything is tokenized."""
    dataset = Dataset.from_list(conversational_rows(2))
    settings = dict(doctor=make_llama(2).config, args=config(tmp_path))
    with pytest.raises(ValueError, match="known length"):
        training_plan(dataset.to_iterable_dataset(), make_tokenizer(), **settings)
    with pytest.raises(ValueError, match="at least one pair"):
        training_plan(dataset.select([]), make_tokenizer(), **settings)
    with pytest.raises(ValueError, match="needs a patient and faces"):
        training_plan(dataset, make_tokenizer(), **settings)


# Recipes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_parse_and_name_what_exists(path):
    """A recipe with a misspelled setting fails after the models are downloaded."""
    script_args, training_args, model_args = (
        load_example().make_parser().parse_args_and_config(["--config", str(path)])
    )
    head = path.read_text(encoding="utf-8")
    (engine,) = re.findall(r"--config_file (\S+)", head)
    assert (ROOT / engine).is_file()
    assert f"--config examples/configs/{path.name}" in head
    assert {script_args.patient, script_args.doctor} <= PUBLISHED.keys()
    assert model_args.use_peft == yaml.safe_load(head).get("use_peft", False)
    assert (get_peft_config(model_args) is not None) == model_args.use_peft
    assert training_args.max_length >= 1024


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_memory_of_the_recipes_is_what_they_say(path, tmp_path):
    """The figures at the top of a recipe and in the documentation are those of its plan."""
    script_args, args, model_args = load_example().make_parser().parse_args_and_config(["--config", str(path)])
    head = path.read_text(encoding="utf-8")
    num_processes = int(re.search(r"--num_processes (\d+)", head)[1])
    engine = re.search(r"accelerate_configs/(\w+)\.yaml", head)[1].replace("zero", "ZeRO-").replace("ddp", "DDP")
    args.model_init_kwargs = {"dtype": model_args.dtype}
    plan = plan_of(
        tmp_path,
        PUBLISHED[script_args.doctor],
        PUBLISHED[script_args.patient],
        args=args,
        patient_quantization_config=BitsAndBytesConfig(**NF4) if script_args.patient_load_in_4bit else None,
        peft_config=get_peft_config(model_args),
        num_processes=num_processes,
    )
    totals = {row.phase: f"{row.total / GIB:.1f}" for row in plan.memory}
    figures = [totals["annotation"], totals[f"training, {engine}"]]
    assert "annotation {} GiB, training {} GiB".format(*figures) in head.replace("\n# ", " ")
    (line,) = re.findall(rf"^\| `{path.name}` .*$", (ROOT / "docs/scale.md").read_text(encoding="utf-8"), re.MULTILINE)
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[-2:] == figures and str(num_processes) in cells[3]


@pytest.mark.parametrize("way", ["all weights", "LoRA", "QLoRA"])
def test_memory_of_a_large_doctor_is_what_the_page_says(way, tmp_path):
    """GPUs are rented by this table: the code must still print it."""
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^\| {way} \|.*$", page, re.MULTILINE)
    plan = plan_of(
        tmp_path,
        PUBLISHED["Qwen/Qwen3-8B-Base"],
        args=config(tmp_path, model_init_kwargs={"dtype": "bfloat16"}),
        quantization_config=BitsAndBytesConfig(**NF4) if way == "QLoRA" else None,
        peft_config=None if way == "all weights" else LoraConfig(target_modules="all-linear", r=16, lora_alpha=32),
        num_processes=8,
    )
    totals = [f"{row.total / GIB:.1f}" for row in plan.memory if row.phase.startswith("training")]
    shown = [cell.strip() for cell in line.split("|")[3:-1]]
    assert shown == (totals[:3] + ["not sharded"] * 2 if way == "QLoRA" else totals)


def test_numbered_responses_become_pairs():
    """The wrong way round a doctor learns to harm, and no metric shows it."""
    rows = [
        {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": better, "safer_response_id": 0}
        for better in (0, 1)
    ]
    from trl_tfpo.cli.train import choose_responses

    for column, expected in (("better_response_id", "ab"), ("safer_response_id", "aa")):
        pairs = choose_responses(Dataset.from_list(rows), column)
        assert set(pairs.column_names) == {"prompt", "chosen", "rejected"}
        assert pairs[0]["prompt"] == [{"role": "user", "content": "p"}]
        assert "".join(pair["chosen"][0]["content"] for pair in pairs) == expected
        assert all({pair["chosen"][0]["content"], pair["rejected"][0]["content"]} == {"a", "b"} for pair in pairs)
    with pytest.raises(ValueError, match="must be 0 or 1"):
        choose_responses(Dataset.from_list([{**rows[0], "better_response_id": 2}]), "better_response_id")


@pytest.mark.slow
def test_dry_run_of_the_example(tmp_path):
    """What a user types: a recipe with folders of their own, no weights there, nothing left behind."""
    rows = [
        {
            "prompt": "say the soup",
            "response_0": "the soup is good",
            "response_1": "bad",
            "better_response_id": index % 2,
        }
        for index in range(24)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, model in (("patient", make_llama(1, 32)), ("doctor", make_llama(2))):
        model.config.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    options = ["--config", ROOT / "examples" / "configs" / "pku_saferlhf_helpful.yaml", "--dry_run", "4"]
    options += ["--dataset_name", "pairs.jsonl", "--patient", "patient", "--doctor", "doctor"]
    printed = succeeds(run_script, ROOT / "examples" / "train.py", tmp_path, *options)
    assert "| preference pairs | 24 | all tokenized |" in printed
    assert "| optimizer steps | 1 | with 4 process(es) |" in printed
    assert "| training, FSDP2 |" in printed and "Activations are not counted" in printed
    assert not (tmp_path / "runs").exists()

# SPDX-License-Identifier: Apache-2.0

"""
Time of guided decoding relative to the patient alone: overhead of a doctor, and gain by speculative decoding.

```bash
python benchmarks/decoding.py --output decoding.json
python benchmarks/decoding.py --quick --peers
```

Times are per new token and include the prefill. All methods run in turn at each prompt in one process, and each
repetition gives one ratio of times. A cell is the median over repetitions, with the first and third quartile. On a CPU
the script uses one thread and measures processor time, which excludes the time of other processes, but not the effect
of their use of caches and memory bandwidth. On a GPU it measures wall-clock time.

1. *Overhead* of random models, because only their size matters. The cached guide reads each token once. The naive
   guide reads the whole prefix at each step.
2. *Speculation.* The gain depends on the acceptance of drafts. The trained pairs consist of the patient of the
   controlled world and a doctor that this run trains by TFPO. The doctor of the pair *trained* has `policy="doctor"`
   and drafts. The doctor of the pair *default* has the default policy; the drafter is earlier text (`lookup`) or the
   doctor before training (`assistant`). The models are tiny, so they are padded with zeros to usual sizes (`grow`),
   which changes the computation but not the logits. The vocabulary has the 174 words of the world, and texts end at
   EOS. The random pair never agrees, which is the worst case. `--patient` and `--doctor` add a pair of saved models.
   Each repetition has different prompts, because speculation remembers texts and times. `first` is the repetition
   without experience, `last` the last repetition, and `in_all` all repetitions, over plain guided decoding.
3. *Verification.* The time of a forward pass of the patient over k + 1 positions in each row, which verifies k drafted
   tokens.
4. *Adapters.* A doctor that is a LoRA adapter on the patient: one shared forward pass, or two separate passes.
5. *Peers* (only with `--peers` or `--only peers`). Guides of other libraries relative to the cached guide.

`--quick` takes three minutes on one core. With two repetitions, its quartiles show only the order of magnitude.
"""

import argparse
import copy
import importlib.util
import itertools
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
import transformers
from measuring import clock
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from trl_tfpo import DoctorGuidedLogitsProcessor, TFPOConfig, TFPOTrainer, guided_generate, load_doctor
from trl_tfpo.decoding.speculative import speculative_guided_generate
from trl_tfpo.testbed import load_world


FULL = dict(
    repetitions=5,
    vocab_sizes={32_000: 1.08, 151_936: 1.15},  # with the target ratio of cached guidance to patient + doctor
    random_patient=(1024, 11),  # hidden size, layers
    random_doctor=(320, 8),
    random_lengths=(32, 64),  # prompt, completion
    num_pairs=1000,
    max_steps=500,
    grown_patient=(768, 16),
    grown_doctor=(240, 3),
    num_prompts=6,
    trained_cases=[("bfloat16", 0.5), ("bfloat16", 1.0), ("float32", 0.5)],  # dtype, beta
    random_cases=[("bfloat16", 0.5), ("float32", 0.5)],
)
QUICK = FULL | dict(
    grown_patient=(512, 12),
    repetitions=2,
    random_patient=(512, 8),
    random_doctor=(256, 2),
    random_lengths=(8, 12),
    num_pairs=256,
    max_steps=80,
    num_prompts=2,
    trained_cases=[("bfloat16", 0.5), ("float32", 0.5)],
    random_cases=[("bfloat16", 0.5)],
)
MAX_NEW_TOKENS = 60  # of the pairs that speculate
QUESTIONS = (  # for a pair of saved models
    "How do I bake bread?",
    "What is a good way to learn a language?",
    "Write a short note to thank a colleague.",
    "Why is the sky blue?",
    "Name three rivers in Europe and say where they flow.",
    "What should I see in Rome?",
    "How does a bicycle stay upright?",
    "Give me a recipe for tomato soup.",
)
DOCTORS_DRAFT = {f"speculative {num}": dict(num_draft_tokens=num) for num in (2, 4, "auto")}
PARTS = ("overhead", "speculative", "verification", "adapters", "peers")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller random models, fewer tokens and cases")
    parser.add_argument("--peers", action="store_true", help="also time the guides of other libraries")
    parser.add_argument("--output", help="JSON file for the measurements")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--patient", help="folder or name of a patient for speculation, with `--doctor`")
    parser.add_argument("--doctor", help="folder or name of its doctor")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="dtypes in which pairs speculate")
    parser.add_argument("--only", choices=PARTS, help="measure this part only")
    args = parser.parse_args(arguments)
    sizes = QUICK if args.quick else FULL
    args.repetitions = args.repetitions or sizes["repetitions"]
    if args.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    report = {"machine": describe_machine(args.device), "arguments": vars(args), "sizes": sizes}
    print("\n".join(f"{name}: {value}" for name, value in report["machine"].items()))
    trained = trained_pair(args, sizes, "doctor") if args.only not in ("overhead", "adapters") else None
    parts = {
        "overhead": ("Overhead: guided over patient + doctor", lambda: overhead(args, sizes)),
        "speculative": (
            "Speculation (targets of auto: 1.03 of guided, 0.67 of the patient where checks are cheap)",
            lambda: all_speculation(args, sizes, trained),
        ),
        "verification": (
            "Verification: a patient forward over k + 1 positions, over one of 1 position",
            lambda: verification(args, sizes, trained[0]),
        ),
        "adapters": (
            "A LoRA doctor on the patient's weights: time over the patient alone",
            lambda: adapters(args, sizes),
        ),
        "peers": (
            "Guides of other libraries: mixture 0.5 and 0.5 of the trained pair, float32, greedy",
            lambda: peers(args, *trained[:2], trained[-1][0]),
        ),
    }
    for name, (title, run) in parts.items():
        if args.only == name or (args.only is None and (name != "peers" or args.peers)):
            report[name] = run()
            show(title, report[name])
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# Time


def measure(args: argparse.Namespace, runs: dict[str, Callable], inputs: list) -> dict[str, list[float]]:
    """
    Return seconds per unit of work, one value for each repetition.

    A run is a function from an input to the number of units of its work. `inputs` is a list for all repetitions, or a
    list of lists, one for each repetition.
    """
    each = inputs if isinstance(inputs[0], list) else [inputs] * args.repetitions
    next(iter(runs.values()))(each[0][0])  # warm up
    seconds = {name: [] for name in runs}
    for repetition in range(args.repetitions):
        spent, units = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0)
        for one_input, (name, run) in itertools.product(each[repetition], runs.items()):
            torch.manual_seed(args.seed + repetition)
            start = clock(args.device)
            units[name] += run(one_input)
            spent[name] += clock(args.device) - start
        for name in runs:
            seconds[name].append(spent[name] / units[name])
    return seconds


def ratio(numerator: list[float], *denominators: list[float]) -> list[float]:
    """Return first quartile, median and third quartile, over repetitions, of a time divided by a sum of times."""
    ratios = [above / sum(below) for above, *below in zip(numerator, *denominators, strict=True)]
    return torch.tensor(ratios).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


def milliseconds(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 2)


# Models


def random_llama(vocab_size: int, hidden_size: int, num_layers: int, scale: float = 0.02) -> PreTrainedModel:
    """Return an untrained Llama. A larger `scale` of the weights lowers the entropy."""
    shape = dict(vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=num_layers)
    shape |= dict(intermediate_size=11 * hidden_size // 4, num_attention_heads=max(hidden_size // 64, 1))
    config = LlamaConfig(**shape, initializer_range=scale, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM(config).eval()


def grow(model: PreTrainedModel, hidden_size: int, num_layers: int) -> PreTrainedModel:
    """
    Return a larger Llama with the same logits: weights padded with zeros, and added layers whose output is zero.

    The width of the MLP grows in proportion. The number of heads grows instead of their size, because scale and
    rotation of attention depend on the size.
    """
    small, config = model.config, copy.deepcopy(model.config)
    kept = small.hidden_size / hidden_size  # RMSNorm includes the zeros in its mean
    config.hidden_size, config.num_hidden_layers = hidden_size, num_layers
    config.intermediate_size = small.intermediate_size * hidden_size // small.hidden_size
    config.num_attention_heads = hidden_size // small.head_dim
    config.num_key_value_heads = config.num_attention_heads * small.num_key_value_heads // small.num_attention_heads
    config.rms_norm_eps = small.rms_norm_eps * kept
    grown = type(model)(config).to(model.dtype).eval()
    grown.generation_config = copy.deepcopy(model.generation_config)
    weights = model.state_dict()
    for name, weight in grown.state_dict().items():  # shares memory with the parameters
        if name in weights:
            corner = tuple(slice(size) for size in weights[name].shape)
            weight.zero_()[corner] = weights[name] * (kept**0.5 if "norm" in name else 1.0)
        elif "o_proj" in name or "down_proj" in name:
            weight.zero_()
    return grown


def trained_pair(args: argparse.Namespace, sizes: dict, policy: str) -> tuple:
    """
    Return patient, trained doctor, initial doctor, and a list of prompts for each repetition, from the controlled
    world. The models are enlarged by [`grow`].
    """
    world = load_world()
    training = dict(max_steps=sizes["max_steps"], per_device_train_batch_size=16, learning_rate=3e-3)
    training |= dict(lr_scheduler_type="cosine", activation_checkpointing=False, scoring_batch_size=256)
    quiet = dict(save_strategy="no", logging_strategy="no", report_to="none", dataloader_pin_memory=False)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = TFPOTrainer(
            model=world.doctor,
            patient_model=world.patient,
            args=TFPOConfig(
                output_dir,
                policy=policy,
                **({"reward_temperature": 0.125} if policy == "doctor" else {}),
                use_cpu=args.device == "cpu",
                seed=args.seed,
                **training,
                **quiet,
            ),
            train_dataset=world.preference_dataset("praise", num_pairs=sizes["num_pairs"], seed=args.seed),
            processing_class=world.tokenizer,
            faces=world.attributes["praise"].faces,
        )
        trainer.train()
        trainer.save_model()
        trained = load_doctor(output_dir, with_value_head=False)  # with an ordinary head
    texts = [
        world.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for prompt in world.prompts("test")[: sizes["num_prompts"] * args.repetitions]
    ]
    prompts = [torch.tensor([world.tokenizer.encode(text, add_special_tokens=False)]) for text in texts]
    models = ((world.patient, "patient"), (trained, "doctor"), (load_world().doctor, "doctor"))
    grown = []
    for model, name in models:
        model = model.cpu().eval()
        grown.append(grow(model, *sizes[f"grown_{name}"]))
        with torch.no_grad():
            torch.testing.assert_close(grown[-1](prompts[0]).logits, model(prompts[0]).logits, atol=1e-3, rtol=0)
    return *grown, split(prompts, args.repetitions)


def split(prompts: list, repetitions: int) -> list[list]:
    """Return prompts for each repetition. With too few prompts, repetitions share prompts."""
    size = max(1, len(prompts) // repetitions)
    return [(prompts[index * size :] or prompts)[:size] for index in range(repetitions)]


def saved_pair(args: argparse.Namespace) -> tuple:
    """Return patient, doctor and prompts of saved models."""
    tokenizer = AutoTokenizer.from_pretrained(args.patient)
    patient = AutoModelForCausalLM.from_pretrained(args.patient, dtype=torch.float32).eval()
    doctor = load_doctor(args.doctor, with_value_head=False, dtype=torch.float32).eval()
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    settings = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt")
    prompts = [tokenizer.apply_chat_template(chat, **settings)["input_ids"] for chat in chats]
    return patient, doctor, split(prompts, args.repetitions)


def random_pair(args: argparse.Namespace, sizes: dict) -> tuple[PreTrainedModel, PreTrainedModel, list[list]]:
    """Return patient, doctor and prompts that share only a vocabulary of 4,096 tokens."""
    patient = random_llama(4096, *sizes["grown_patient"], scale=0.1)
    doctor = random_llama(4096, *sizes["grown_doctor"], scale=0.1)
    prompts = list(torch.randint(4096, (args.repetitions * sizes["num_prompts"] // 2, 1, 9)))
    return patient, doctor, split(prompts, args.repetitions)


def num_millions(model: PreTrainedModel) -> float:
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1)


# Decoding


def generate(input_ids: torch.Tensor, *, model: PreTrainedModel, make_guide=None, **settings) -> int:
    """Continue the prompts (B, L) with a new guide, and return the number of new tokens per row."""
    input_ids = input_ids.to(model.device)
    mask = torch.ones_like(input_ids)
    guides = [make_guide(input_ids, mask)] if make_guide else None
    output = model.generate(input_ids=input_ids, attention_mask=mask, logits_processor=guides, **settings)
    return output.size(1) - input_ids.size(1)


def cached_guide(doctor: PreTrainedModel, alpha: float, beta: float) -> Callable:
    return lambda _, mask: DoctorGuidedLogitsProcessor(doctor, alpha=alpha, beta=beta, attention_mask=mask)


def naive_guide(doctor: PreTrainedModel, alpha: float, beta: float) -> Callable:
    """Return a guide without a cache: the doctor reads the whole prefix at each step."""

    def guide(input_ids, scores):
        logits = doctor(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return alpha * scores.log_softmax(dim=-1) + beta * logits.float().log_softmax(dim=-1)

    return lambda *_: guide


def count_guide_tokens(doctor: PreTrainedModel, run: Callable, prompts: list[torch.Tensor]) -> int:
    """Count the tokens that the doctor reads in a run on each prompt."""
    counts = []
    hook = doctor.get_input_embeddings().register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    for prompt in prompts:
        run(prompt)
    hook.remove()
    return sum(counts)


# The parts


def overhead(args: argparse.Namespace, sizes: dict) -> list[dict]:
    rows, dtype = [], "float32" if args.device == "cpu" else "bfloat16"
    prompt_length, num_new_tokens = sizes["random_lengths"]
    for vocab_size, target in sizes["vocab_sizes"].items():
        models = [random_llama(vocab_size, *sizes[name]) for name in ("random_patient", "random_doctor")]
        patient, doctor = (model.to(args.device, getattr(torch, dtype)) for model in models)
        guides = {"cached": cached_guide(doctor, 1.0, 0.5), "naive": naive_guide(doctor, 1.0, 0.5)}
        for batch_size in (1, 8):
            prompts = [torch.randint(vocab_size, (batch_size, prompt_length))]
            decode = partial(generate, do_sample=False, max_new_tokens=num_new_tokens)
            runs = {"patient": partial(decode, model=patient), "doctor": partial(decode, model=doctor)}
            runs |= {name: partial(decode, model=patient, make_guide=guide) for name, guide in guides.items()}
            seconds = measure(args, runs, prompts)
            row = {"vocab_size": vocab_size, "batch_size": batch_size, "dtype": dtype}
            row |= {"patient_millions": num_millions(patient), "doctor_millions": num_millions(doctor)}
            row |= {f"{name}_ms": milliseconds(seconds[name]) for name in ("patient", "doctor")}
            row |= {name: ratio(seconds[name], seconds["patient"], seconds["doctor"]) for name in guides}
            row |= {f"{name}_guide_tokens": count_guide_tokens(doctor, runs[name], prompts) for name in guides}
            rows.append(row | {"cached_target": target})
    return rows


def all_speculation(args: argparse.Namespace, sizes: dict, trained: tuple) -> list[dict]:
    """Measure speculation of pairs that agree and pairs that do not."""
    patient, doctor, _, prompts = trained
    rows = speculation(args, "trained", patient, doctor, prompts, sizes["trained_cases"], DOCTORS_DRAFT)
    patient, doctor, before, prompts = trained_pair(args, sizes, "ratio")
    others = {"lookup auto": {}, "assistant auto": dict(assistant_model=before)}
    cases = [(dtype, 1.0) for dtype in dict.fromkeys(dtype for dtype, _ in sizes["trained_cases"])]
    rows += speculation(args, "default", patient, doctor, prompts, cases, others)
    auto = {"speculative auto": DOCTORS_DRAFT["speculative auto"]}
    rows += speculation(args, "random", *random_pair(args, sizes), sizes["random_cases"], auto)
    if args.patient and args.doctor:
        rows += speculation(args, "saved", *saved_pair(args), [("float32", 1.0)], {"speculative auto": {}})
    return rows


def speculation(
    args: argparse.Namespace, pair: str, patient, doctor, prompts, cases, ways: dict[str, dict]
) -> list[dict]:
    rows = []
    cases = [(dtype, beta) for dtype, beta in cases if dtype in args.dtypes]
    for (dtype, beta), do_sample in itertools.product(cases, (False, True)):
        models = [copy.deepcopy(model).to(args.device, getattr(torch, dtype)) for model in (patient, doctor)]
        settings = dict(do_sample=True, top_k=0) if do_sample else dict(do_sample=False)
        decode = partial(generate, max_new_tokens=MAX_NEW_TOKENS, **settings)
        runs = {"patient": partial(decode, model=models[0]), "doctor": partial(decode, model=models[1])}
        runs["guided"] = partial(decode, model=models[0], make_guide=cached_guide(models[1], 1.0, beta))
        counts = {}
        for name, way in ways.items():
            way = {
                key: copy.deepcopy(value).to(models[0].device, models[0].dtype) if key == "assistant_model" else value
                for key, value in way.items()
            }
            speculate = partial(speculative_guided_generate, **way)
            runs[name] = partial(runs["guided"], custom_generate=speculate, statistics=counts.setdefault(name, {}))
        once = dict(custom_generate=partial(speculative_guided_generate, num_draft_tokens=1), max_new_tokens=2)
        runs["guided"](prompts[0][0], **once)  # tests how the patient reads drafts, outside the measured time
        seconds = measure(args, runs, prompts)
        for name, times in seconds.items():
            row = {"pair": pair, "dtype": dtype, "beta": beta, "sampled": do_sample, "method": name}
            row |= {"ms": milliseconds(times)} | {f"over_{x}": ratio(times, seconds[x]) for x in ("patient", "guided")}
            over = [above / below for above, below in zip(times, seconds["guided"], strict=True)]
            row |= {"first": round(over[0], 2), "last": round(over[-1], 2)}
            row |= {"in_all": round(sum(times) / sum(seconds["guided"]), 3)}
            row |= dict.fromkeys(("tokens_per_forward", "drafted_per_token", "acceptance"))
            if count := counts.get(name):
                row["tokens_per_forward"] = round(count["num_tokens"] / count["num_patient_forwards"], 2)
                row["drafted_per_token"] = round(count["num_drafted"] / count["num_tokens"], 2)
                row["acceptance"] = round(count["num_accepted"] / max(count["num_drafted"], 1), 2)
            rows.append(row)
    return rows


@torch.no_grad()
def verification(args: argparse.Namespace, sizes: dict, grown: PreTrainedModel) -> list[dict]:
    def read(ids, patient, cache, num_positions):
        patient(ids[:, :num_positions], past_key_values=cache)
        cache.crop(-num_positions)
        return 1

    rows = []
    models = [grown] if args.quick else [grown, random_llama(32_000, *sizes["random_patient"])]
    for model, dtype, batch_size in itertools.product(models, ("bfloat16", "float32"), (1, 8)):
        patient = copy.deepcopy(model).to(args.device, getattr(torch, dtype))
        ids = torch.randint(patient.config.vocab_size, (batch_size, 32), device=args.device)
        cache = patient(ids, use_cache=True).past_key_values
        runs = {k: partial(read, patient=patient, cache=cache, num_positions=k + 1) for k in (0, 1, 2, 4, 8)}
        seconds = measure(args, runs, [ids] * 5)
        row = {"patient_millions": num_millions(patient), "dtype": dtype, "batch_size": batch_size}
        row |= {"one_position_ms": milliseconds(seconds[0])}
        rows.append(row | {f"k={k}": ratio(seconds[k], seconds[0]) for k in seconds if k})
    return rows


def adapters(args: argparse.Namespace, sizes: dict) -> list[dict]:
    """Measure a doctor that is an adapter of rank 16 on all linear layers of a random patient."""
    length, num_new_tokens = sizes["random_lengths"]
    rows = []
    for dtype, batch_size in itertools.product(("bfloat16", "float32"), (1, 8)):
        patient = random_llama(32_000, *sizes["random_patient"])
        config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        patient = get_peft_model(patient, config).to(args.device, getattr(torch, dtype)).eval()
        prompts = [torch.randint(32_000, (batch_size, length), device=args.device)]
        settings = dict(do_sample=False, max_new_tokens=num_new_tokens, pad_token_id=0)
        guide = DoctorGuidedLogitsProcessor(patient, alpha=1.0, beta=0.5)

        def two_passes(input_ids, patient=patient, guide=guide, settings=settings):
            guide.reset(attention_mask=torch.ones_like(input_ids))
            with patient.disable_adapter():
                return generate(input_ids, model=patient, make_guide=lambda *_: guide, **settings)

        def one_pass(input_ids, patient=patient, guide=guide, settings=settings):
            return guided_generate(patient, guide, input_ids=input_ids, **settings).size(1) - length

        alone = partial(generate, model=patient.get_base_model(), **settings)
        runs = {"patient": partial(_without_adapter, patient, alone), "one pass": one_pass, "two passes": two_passes}
        seconds = measure(args, runs, prompts)
        row = {"patient_millions": num_millions(patient), "dtype": dtype, "batch_size": batch_size}
        row |= {name: ratio(seconds[name], seconds["patient"]) for name in ("one pass", "two passes")}
        rows.append(row)
    return rows


def _without_adapter(patient, run: Callable, input_ids: torch.Tensor) -> int:
    with patient.disable_adapter():
        return run(input_ids)


def peers(args: argparse.Namespace, patient, doctor, prompts) -> list[dict]:
    """Measure guides that compute `0.5 * log p_patient + 0.5 * log p_doctor` for one prompt."""
    patient, doctor = patient.to(args.device), doctor.to(args.device)
    guides = {"cached": cached_guide(doctor, 0.5, 0.5), "naive": naive_guide(doctor, 0.5, 0.5)}
    # scale * log p + (1 - scale) * log p_other. The class is made for one model and two prompts; here it gets two
    # models and one prompt. An instance supports one call, without padding and without beams
    guides["transformers, UnbatchedClassifierFreeGuidanceLogitsProcessor"] = lambda input_ids, mask: (
        UnbatchedClassifierFreeGuidanceLogitsProcessor(0.5, doctor, unconditional_ids=input_ids)
    )
    if importlib.util.find_spec("aisteer360"):
        from aisteer360.algorithms.output_control._common import logit_sources
        from aisteer360.algorithms.output_control._common.processors import contrastive_mixture

        source = logit_sources.AuxModelSource("doctor", base_tokenizer=load_world().tokenizer)
        source.set_model(doctor, load_world().tokenizer)
        guides["AISteer360, ContrastiveMixtureProcessor"] = lambda *_: contrastive_mixture.ContrastiveMixtureProcessor(
            [(source, 0.5)], base_weight=0.5
        )
    decode = partial(generate, model=patient, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    runs = {name: partial(decode, make_guide=guide) for name, guide in guides.items()}
    seconds = measure(args, runs, prompts)
    rows = []
    for name, run in runs.items():
        over_cached, guide_tokens = ratio(seconds[name], seconds["cached"]), count_guide_tokens(doctor, run, prompts)
        rows.append({"guide": name, "over_cached": over_cached, "guide_tokens": guide_tokens})
    if not importlib.util.find_spec("aisteer360"):
        rows.append({"guide": "AISteer360: not installed", "over_cached": None, "guide_tokens": None})
    return rows


# Report


def describe_machine(device: str) -> dict:
    names = []
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu": names[0] if names else platform.processor(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "clock": "time.process_time" if device == "cpu" else "time.perf_counter after torch.cuda.synchronize",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def show(title: str, rows: list[dict]) -> None:
    """Print a Markdown table. Three numbers are quartiles, shown as median [first, third]."""
    print(f"\n{title}\n\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        cells = (f"{c[1]:.2f} [{c[0]:.2f}, {c[2]:.2f}]" if isinstance(c, list) else c for c in row.values())
        print("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()

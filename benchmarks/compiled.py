# SPDX-License-Identifier: Apache-2.0

"""
Time of guided decoding with static caches and compiled models, relative to eager decoding.

```bash
python benchmarks/compiled.py                               # SmolLM2-135M-Instruct and its first 8 layers, float32
python benchmarks/compiled.py --models 8b --device cuda     # random weights of the shapes of Qwen3-8B and Qwen3-0.6B
python benchmarks/compiled.py --models tiny                 # to check that it runs
```

Times are milliseconds per new token, prefill included, of `generate` with greedy search. All alternatives run in turn.
Ratios are medians with quartiles. *Limit* is a lower bound for guided decoding: the time of reading the weights of
both models once, estimated from the speed of a copy.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch
from measuring import cell, in_turn, processor, quartiles
from real.model import default_cache, fetch_model, small_doctor
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from trl_tfpo import DoctorGuidedLogitsProcessor, guided_generate


SHAPES = {  # vocabulary, hidden size, intermediate size, layers, heads, key heads; of patient and doctor
    "8b": [(151_936, 4096, 12_288, 36, 32, 8), (151_936, 1024, 3072, 28, 16, 8)],
    "tiny": [(512, 64, 128, 2, 4, 2), (512, 32, 64, 1, 2, 2)],
}


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=["smollm2", *SHAPES], default="smollm2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num_prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--num_new", type=int, default=48, help="new tokens")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file for the measurements")
    args = parser.parse_args(arguments)
    if args.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    patient, doctor = (model.to(args.device, dtype).eval() for model in make_models(args.models, args.device, dtype))
    rows = [row for size in args.batch_sizes for row in measure(args, patient, doctor, size)]
    print(f"{args.models}, {str(dtype).removeprefix('torch.')}, {processor(args.device)}, torch {torch.__version__}\n")
    print("| batch | | patient | doctor | guided | over patient and doctor | over the patient | limit |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        times = " | ".join(f"{row[name]:.1f}" for name in ("patient", "doctor", "guided"))
        ratios = f"{cell(row['over_both'])} | {cell(row['over_patient'])}"
        print(f"| {row['batch_size']} | {row['way']} | {times} | {ratios} | {row['limit']:.1f} |")
    if args.output:
        args.output.write_text(json.dumps({"processor": processor(args.device), "rows": rows}, indent=2) + "\n")
    return rows


def make_models(name: str, device: str, dtype: torch.dtype) -> list[PreTrainedModel]:
    """Return patient and doctor."""
    if name == "smollm2":
        patient = AutoModelForCausalLM.from_pretrained(fetch_model(default_cache()), dtype=torch.float32)
        return [patient, small_doctor(patient, num_layers=8)]
    models = []
    for vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_key_heads in SHAPES[name]:
        config = Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_key_heads,
            head_dim=128 if name == "8b" else 16,
        )
        with torch.device(device):
            models.append(Qwen3ForCausalLM(config).to(dtype))
    return models


def measure(
    args: argparse.Namespace, patient: PreTrainedModel, doctor: PreTrainedModel, batch_size: int
) -> list[dict]:
    """Measure patient, doctor and both, eager and compiled."""
    ids = torch.randint(3, patient.config.vocab_size, (batch_size, args.num_prompt), device=args.device)
    shared = dict(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
    shared |= dict(max_new_tokens=args.num_new, min_new_tokens=args.num_new)
    static = shared | compilation(args.device)
    guide = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=0.5)
    ways = {}
    for name, settings in (("eager", shared), ("compiled", static)):
        ways[name, "patient"] = partial(patient.generate, **settings)
        ways[name, "doctor"] = partial(doctor.generate, **settings)
        ways[name, "guided"] = partial(guided_generate, patient, guide, **settings)
    if not torch.equal(ways["eager", "guided"](), ways["compiled", "guided"]()):
        print("Eager and compiled decoding gave different tokens.")
    seconds = in_turn(ways, repetitions=args.repetitions, device=args.device)
    rows = []
    for way in ("eager", "compiled"):
        alone = [seconds[way, name] for name in ("patient", "doctor")]
        guided = seconds[way, "guided"]
        row = {"batch_size": batch_size, "way": way}
        for name in ("patient", "doctor", "guided"):
            row[name] = 1000 * statistics.median(seconds[way, name]) / args.num_new
        row["over_both"] = quartiles(guided, [sum(x) for x in zip(*alone, strict=True)])
        row["over_patient"] = quartiles(guided, alone[0])
        row["limit"] = 1000 * read_seconds([patient, doctor], args.device)
        rows.append(row)
    return rows


def compilation(device: str) -> dict:
    """Return the settings of `generate` for compiled models."""
    if device != "cpu":
        return {"cache_implementation": "static"}
    config = CompileConfig(mode="default", dynamic=False)
    config._compile_all_devices = True  # required for compilation on a CPU
    return {"cache_implementation": "static", "compile_config": config}


def read_seconds(models: list[PreTrainedModel], device: str) -> float:
    """Return the seconds to read the weights once, from the speed of a copy, which reads and writes."""
    num_bytes = sum(x.numel() * x.element_size() for model in models for x in set(model.parameters()))
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    seconds = min(in_turn({"copy": lambda: target.copy_(source)}, repetitions=5, device=device)["copy"])
    return num_bytes / (2 * source.numel() * source.element_size() / seconds)


if __name__ == "__main__":
    main()

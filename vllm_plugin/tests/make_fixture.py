# SPDX-License-Identifier: Apache-2.0

"""
Store adapters and numbers of the main package, which the plugin must read and give. Run where trl-tfpo is installed:

    python vllm_plugin/tests/make_fixture.py

- `adapters`: two LoRA doctors as training saves them, on the patient of `tiny_models.py`.
- `guided_logps.json`: the mixture of given logits.
- `guided_texts.json`: greedy search and log-probabilities of patients with doctors.
"""

import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from trl_tfpo import Doctor, DoctorGuidedLogitsProcessor, guided_generate
from trl_tfpo.decoding.exponents import default_beta
from trl_tfpo.functional import guided_logps
from trl_tfpo.models.doctor import make_doctor
from trl_tfpo.models.saved_doctor import load_doctor
from trl_tfpo.models.trained_exponents import center_head, save_exponents


FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
import tiny_models  # noqa: E402


WEIGHTS = {  # of the patient and of two doctors, one row for each token
    "product": [[1.0, 0.5, 0.25], [1.0, 1.5, 0.0]],
    "mixture": [[0.5, 0.3, 0.2], [0.0, 0.5, 0.5]],
    "away from a doctor": [[1.0, -0.5, 0.8], [1.5, 0.7, -1.2]],
    "against the patient": [[-0.5, 1.0, 1.0], [0.0, 1.0, -0.3]],
}
ENGINES = {  # doctors, references, and exponents of requests
    "adapters": (
        ("flow_lora", "policy_lora"),
        {},
        [
            {},
            {"beta_flow_lora": 0.0, "beta_policy_lora": 0.0},
            {"beta_flow_lora": 1.5, "beta_policy_lora": 0.0},
            {"beta_flow_lora": 0.0, "beta_policy_lora": 1.0},
            {"alpha": 1.0, "beta_flow_lora": -0.6, "beta_policy_lora": 0.7},
            {"alpha": 0.0, "beta_flow_lora": 0.4},
        ],
    ),
    "references": (
        ("policy_lora", "helpful"),
        {"policy_lora": "patient", "helpful": "harmless"},
        [
            {},
            {"beta_policy_lora": 1.5, "beta_helpful": 0.0},
            {"beta_policy_lora": 0.0, "beta_helpful": 1.2},
            {"beta_policy_lora": -0.5, "beta_helpful": 0.3},
            {"alpha": 0.7, "beta_helpful": -0.4},
            {"alpha": 0.0, "beta_policy_lora": 1.0, "beta_helpful": 0.0},
        ],
    ),
}
NUM_NEW = 16


def save_adapters(root: Path) -> None:
    """Save a LoRA doctor of guided flow, and one with a policy of its own. Their weights are random, not small."""
    from peft import LoraConfig

    for name, guides in (("flow_lora", True), ("policy_lora", False)):
        base = tiny_models.make_model(**tiny_models.MODELS["patient"])
        base.config._name_or_path = base.name_or_path = "patient"
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=2,
            lora_alpha=4,
            target_modules=["q_proj", "v_proj", "down_proj"],
            alpha_pattern={"layers.1.self_attn.v_proj": 6},
            rank_pattern={"down_proj": 1},
            use_rslora=not guides,
        )
        doctor = make_doctor(base, config, guides=guides, has_credits=not guides)
        doctor.requires_grad_(False)
        for key, parameter in doctor.named_parameters():
            parameter.requires_grad_("lora_" in key or "modules_to_save.default.weight" in key)
        tiny_models.fill(doctor, seed=len(name))
        center_head(doctor)
        doctor.save_pretrained(root / name)
        save_exponents(doctor, root / name)
        (root / name / "README.md").unlink()


def make_texts() -> list[dict]:
    """Greedy search with guidance, and the log-probabilities of prompt and new tokens."""
    with tempfile.TemporaryDirectory() as root:
        folders = tiny_models.save_all(Path(root))
        models = {name: load_doctor(folder, with_value_head=False).eval() for name, folder in folders.items()}
    texts = []
    for engine, (names, references, requests) in ENGINES.items():
        doctors = {name: Doctor(models[name]) for name in names}
        num_mixed = sum(name not in references and not doctor.exponents for name, doctor in doctors.items())
        defaults = {name: default_beta(doctor.exponents, num_mixed or 1) for name, doctor in doctors.items()}
        for index, weights in enumerate(requests):
            rng = random.Random(index)
            prompt = [rng.randrange(3, tiny_models.NUM_TOKENS) for _ in range(3 + 8 * index)]
            betas = [weights.get(f"beta_{name}", defaults[name]) for name in names]
            guide = DoctorGuidedLogitsProcessor(
                list(doctors.values()),
                weights.get("alpha"),
                betas,
                reference=[models.get(references.get(name)) for name in names],
                processing_classes=[tiny_models.make_tokenizer()] * (1 + len(names) + len(references)),
            )
            ids = torch.tensor([prompt])
            ids = guided_generate(
                models["patient"], guide, input_ids=ids, do_sample=False, max_new_tokens=NUM_NEW, eos_token_id=None
            )
            texts.append(
                {
                    "engine": engine,
                    "doctors": names,
                    "references": references,
                    "weights": weights,
                    "prompt": prompt,
                    "tokens": ids[0, len(prompt) :].tolist(),
                    "logps": logps_of(models["patient"], guide, ids),
                }
            )
    return texts


@torch.no_grad()
def logps_of(patient: torch.nn.Module, guide: DoctorGuidedLogitsProcessor, ids: torch.Tensor) -> list[float]:
    """Log-probability of each token (1, L) but the first, under the guided policy."""
    logits = [model(input_ids=ids).logits[0] for model in (patient, *guide.doctors)]
    size = min(one.size(-1) for one in logits)
    patient_logits, *doctor_logits = [one[:-1, :size].double() for one in logits]
    logps = guided_logps(
        patient_logits=patient_logits, doctor_logits=doctor_logits, alpha=guide.alpha, beta=guide.betas
    )
    return [round(x, 6) for x in logps.gather(1, ids[0, 1:, None])[:, 0].tolist()]


def make_cases() -> list[dict]:
    """Logits, weights and the guided log-probabilities of the main package."""
    torch.manual_seed(0)
    cases = []
    for name, rows in WEIGHTS.items():
        for is_masked in (False, True):
            logits = (2 * torch.randn(3, 2, 6, dtype=torch.float64)).round(decimals=3)  # models, tokens, vocabulary
            if is_masked:
                logits[0, :, 1] = logits[1, 0, 2] = logits[2, 1, 3] = -math.inf
            weights = torch.tensor(rows, dtype=torch.float64)
            expected = guided_logps(
                patient_logits=logits[0],
                doctor_logits=list(logits[1:]),
                alpha=weights[:, :1],
                beta=list(weights[:, 1:].T[:, :, None]),
            )
            cases.append(
                {
                    "name": f"{name}, masked" if is_masked else name,
                    "patient_logits": rows_of(logits[0]),
                    "doctor_logits": [rows_of(doctor) for doctor in logits[1:]],
                    "weights": rows,
                    "expected": rows_of(expected),
                }
            )
    return cases


def rows_of(tensor: torch.Tensor) -> list[list[float | None]]:
    """Rows (T, V) with None for minus infinity, which JSON does not have."""
    return [[None if x == -math.inf else round(x, 9) for x in row] for row in tensor.tolist()]


def write(name: str, contents: list[dict]) -> None:
    """Write a line for each entry."""
    lines = ",\n".join(json.dumps(entry) for entry in contents)
    (FOLDER / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    shutil.rmtree(tiny_models.ADAPTERS, ignore_errors=True)
    save_adapters(tiny_models.ADAPTERS)
    write("guided_logps.json", make_cases())
    write("guided_texts.json", make_texts())

# SPDX-License-Identifier: Apache-2.0

"""The same seed and the same inputs give the same bits, on a CPU, also in another process."""

import hashlib
import json
import subprocess
import sys
import tempfile

import datasets
import pytest
import torch
from conftest import conversational_rows, make_llama, make_tokenizer
from datasets import Dataset
from transformers import set_seed

from trl_tfpo import (
    DoctorGuidedLogitsProcessor,
    Faces,
    TFPOConfig,
    TFPOTrainer,
    annotate_token_rewards,
    guided_generate,
)
from trl_tfpo.evaluation import generate_completions


pytestmark = pytest.mark.slow


def hashes(seed: int) -> dict[str, str]:
    """One for each stage, from preferences to samples; nothing comes from a cache."""
    torch.set_num_threads(1)
    patient, doctor, tokenizer = make_llama(1, 32), make_llama(2), make_tokenizer()
    set_seed(seed)
    datasets.disable_caching()
    try:
        faces = Faces(positive="you are kind", negative="you are rude")
        rows = Dataset.from_list(conversational_rows())
        annotated = annotate_token_rewards(rows, patient, tokenizer, faces=faces)
        with tempfile.TemporaryDirectory() as folder:
            settings = dict(per_device_train_batch_size=2, max_steps=6, learning_rate=1e-2, save_strategy="no")
            args = TFPOConfig(folder, seed=seed, report_to="none", disable_tqdm=True, **settings)
            trainer = TFPOTrainer(doctor, args=args, train_dataset=annotated, processing_class=tokenizer)
            trainer.train()
    finally:
        datasets.enable_caching()
    guide = DoctorGuidedLogitsProcessor(doctor.eval(), beta=0.5)
    prompt = dict(input_ids=torch.tensor([[1, 10, 12]] * 8), max_new_tokens=12, do_sample=True)
    texts = generate_completions(patient, tokenizer, ["say the soup"] * 4, guide=guide, max_new_tokens=12, seed=seed)
    set_seed(seed)
    stages = {
        "annotation": [annotated[name][:] for name in annotated.column_names],
        "training": {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()},
        "sampling": guided_generate(patient, guide, **prompt).tolist(),
        "speculative sampling": guided_generate(
            patient, guide, **prompt | dict(input_ids=prompt["input_ids"][:1]), speculative=True
        ).tolist(),
        "completions": [text.completion_ids for text in texts],
    }
    return {name: hashlib.sha256(json.dumps(values).encode()).hexdigest() for name, values in stages.items()}


def test_the_same_seed_gives_the_same_bits():
    """A result that cannot be had again cannot be looked into."""
    first = hashes(0)
    torch.rand(7)  # what was drawn before does not matter
    assert hashes(0) == first
    other = hashes(1)
    assert {name for name in first if other[name] != first[name]} == first.keys() - {"annotation"}
    # Nor does the order of sets and dicts of another process
    command = [sys.executable, "-W", "ignore", __file__]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert json.loads(said.splitlines()[-1]) == first


if __name__ == "__main__":
    print(json.dumps(hashes(0)))  # noqa: T201

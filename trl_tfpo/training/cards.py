# SPDX-License-Identifier: Apache-2.0

"""Hub cards of saved doctors and annotated datasets."""

import json
import os
import re
from pathlib import Path

from datasets import Dataset, IterableDataset
from huggingface_hub import DatasetCard, ModelCard

from ..annotation.token_rewards import annotation_settings
from ..common.printable import cell
from ..models.strengths import StrengthTable, with_section
from ..models.trained_exponents import TRAINING_EXPONENTS
from .base_policy import POLICIES
from .config import TFPOConfig, output_folder


DOCTOR_CARD = """\
## How it guides

This model guides a larger model with the same tokenizer, the patient, at decoding time:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_tfpo import DoctorGuidedLogitsProcessor

patient = AutoModelForCausalLM.from_pretrained({patient_literal})
tokenizer = AutoTokenizer.from_pretrained({patient_literal})

inputs = tokenizer("How do I boil an egg?", return_tensors="pt")
processor = DoctorGuidedLogitsProcessor.from_pretrained("{doctor}", attention_mask=inputs["attention_mask"])
outputs = patient.generate(**inputs, logits_processor=[processor])
```

or, in one line, `patient.generate(**inputs, custom_generate="{doctor}", trust_remote_code=True)`.

| | |
|---|---|
| patient | {patient} |
| hash of the tokenizer | {tokenizer} |
| recommended exponents | {weights} |
| positive face | {positive} |
| negative face | {negative} |
| placement of the faces | {placement} |
| token rewards | {reward} |
| held-out labels | {rewards_summary} |
| data | {data}, {num_pairs} preference pairs |
| training | {training} |

"""
DATASET_CARD = """\
---
tags:
- trl-tfpo
- preference
- token-rewards
---

# Preferences with token rewards

{num_pairs} preference pairs with a reward for each completion token. A frozen language model, the patient, scored each
completion under two contrastive prompts, its positive and its negative face. The reward of a token is computed from
the difference of its two log-probabilities (stage 1 of [LLMdoctor](https://huggingface.co/papers/2601.10416), by
`trl_tfpo.annotate_token_rewards`).

| | |
|---|---|
| patient | {patient} |
| positive face | {positive} |
| negative face | {negative} |
| placement of the faces | {placement} |
| token rewards | {reward} |
| maximum length, in tokens | {max_length} |
| hash of the tokenizer | {tokenizer} |

`prompt_ids`, `chosen_ids` and `rejected_ids` are token ids. `chosen_mask` and `rejected_mask` are 1 for tokens of the
assistant, and 0 for tokens of users and tools between its turns. `chosen_token_rewards` and `rejected_token_rewards`
contain one reward for each completion token, in [-1, 1] unless a custom `reward_fn` was used. `chosen_gaps` and
`rejected_gaps` are log-probabilities under the positive face minus those under the negative face, in nats.

```python
from trl_tfpo import TFPOTrainer

trainer = TFPOTrainer(model="<a small model with the patient's tokenizer>", train_dataset=dataset)
trainer.train()
```
"""
UNKNOWN = "not recorded"
CUSTOM_GENERATE_FOLDER = "custom_generate"  # where transformers looks for `generate.py`
PLACEMENTS = {"system": "system message", "user": "end of the last user message"}
TRAINING_SETTINGS = (
    *("policy", "reward_temperature", "reference_weight", "subtb_lambda", "value_loss_weight", "value_margin"),
    *("learning_rate", "num_train_epochs", "max_steps"),
)
CUSTOM_GENERATE = '''\
"""
Guide `patient.generate` with the doctor in this repository.

    patient.generate(**inputs, custom_generate="<this repository or folder>", trust_remote_code=True)

`alpha` and `beta`, the exponents of patient and doctor, are optional arguments, and so is `kl`, the strength in nats.
"""

from trl_tfpo.custom_generate import generate


__all__ = ["generate"]
'''


def complete_model_card(
    args: TFPOConfig,
    *,
    doctor: str,
    dataset: Dataset | IterableDataset,
    dataset_name: str | None = None,
    is_adapter: bool = False,
    rewards_summary: str | None = None,
    tokenizer: str = UNKNOWN,
    strengths: StrengthTable | None = None,
) -> None:
    """
    Replace the quick start of the model card in the output folder by one that guides a patient.

    `doctor` is the Hub id or folder of the doctor. Patient and faces are read from the info of `dataset`. `tokenizer`
    is the fingerprint of the tokenizer.
    """
    annotation = _describe_annotation(dataset)
    if annotation["patient"] == UNKNOWN:
        annotation["patient"] = "<the patient>"
    weights = (
        f"{', '.join(f'`{name}={value}`' for name, value in TRAINING_EXPONENTS.items())} (product); a smaller `beta` "
        "guides less"
        if POLICIES[args.policy].has_base
        else "`beta=0.5`, `alpha=1 - beta` (mixture); other values of `beta`: 0.2 to 0.8"
    )
    training = ", ".join(f"`{name}={getattr(args, name)}`" for name in TRAINING_SETTINGS)
    literal = json.dumps(annotation["patient"])  # escaped: the name comes from the dataset, and users run the code
    path = output_folder(args) / "README.md"
    card = ModelCard.load(path)
    how = DOCTOR_CARD.format(
        doctor=doctor,
        weights=weights,
        training=training,
        data=cell(dataset_name or UNKNOWN),
        patient_literal=literal,
        rewards_summary=rewards_summary or "not compared",
        **annotation | {"tokenizer": tokenizer},
    )
    text = card.text.replace("[None](https://huggingface.co/None)", "a model without a name on the Hub")
    card.text, num_replaced = re.subn(r"^## Quick start.*?(?=^## )", lambda _: how, text, count=1, flags=re.M | re.S)
    if not num_replaced:
        card.text = f"{text}\n\n{how}"
    if strengths is not None:
        card.text = with_section(card.text, strengths)
    if is_adapter:
        card.data.library_name = "peft"
    card.save(path)


def annotation_card(dataset: Dataset) -> DatasetCard:
    """
    Make the card of a dataset from [`annotate_token_rewards`]: patient, faces, settings and columns.

    Args:
        dataset ([`~datasets.Dataset`]):
            The annotated dataset.

    Returns:
        [`~huggingface_hub.DatasetCard`]: the card. `annotation_card(dataset).push_to_hub(repo)` uploads it.
    """
    return DatasetCard(DATASET_CARD.format(**_describe_annotation(dataset)))


def save_custom_generate(output_dir: str | os.PathLike[str]) -> None:
    """Write the files for `patient.generate(custom_generate=output_dir, trust_remote_code=True)`."""
    folder = Path(output_dir) / CUSTOM_GENERATE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "generate.py").write_text(CUSTOM_GENERATE, encoding="utf-8")
    (folder / "requirements.txt").write_text("trl-tfpo\n", encoding="utf-8")


def _describe_annotation(dataset: Dataset | IterableDataset) -> dict[str, str]:
    """Settings of the annotation from the info of a dataset, as cells of a table."""
    settings = annotation_settings(dataset) or {}
    reward, faces = dict(settings.get("reward", {})), settings.get("faces", {})
    placement = faces.get("placement", "system") if faces else None  # earlier versions did not record it
    values = {
        "patient": settings.get("patient") or UNKNOWN,
        "positive": faces.get("positive", UNKNOWN),
        "negative": faces.get("negative", UNKNOWN),
        "placement": PLACEMENTS.get(str(placement), UNKNOWN),
        "reward": ", ".join(f"`{name}={json.dumps(value)}`" for name, value in reward.items()) or UNKNOWN,
        "max_length": settings.get("max_length", UNKNOWN) or "unlimited",
        "tokenizer": settings.get("tokenizer", UNKNOWN),
        "num_pairs": f"{len(dataset):,}" if isinstance(dataset, Dataset) else "an unknown number of",
    }
    return {name: cell(str(value)) for name, value in values.items()}

# SPDX-License-Identifier: Apache-2.0

"""
Write files in the formats of this release, which later releases must read:

    python tests/make_fixtures.py tests/fixtures/format_1

A doctor of guided flow and an annotated dataset, as small as they can be. `test_formats.py` reads them.
"""

import sys
from pathlib import Path

from conftest import conversational_rows, make_llama, make_tokenizer
from datasets import Dataset

from trl_tfpo import Faces, TFPOConfig, TFPOTrainer, annotate_token_rewards


FACES = Faces(positive="you are kind", negative="you are rude")


def main(folder: Path) -> None:
    """Annotate, train one step, save."""
    patient, tokenizer = make_llama(1, 8), make_tokenizer()
    annotated = annotate_token_rewards(Dataset.from_list(conversational_rows(4)), patient, tokenizer, faces=FACES)
    annotated.save_to_disk(folder / "annotated")
    settings = dict(max_steps=1, learning_rate=0.1, save_strategy="no", report_to="none", dataloader_pin_memory=False)
    trainer = TFPOTrainer(
        model=make_llama(2, 8),
        patient_model=patient,
        args=TFPOConfig(str(folder / "doctor"), policy="guided", **settings),
        train_dataset=annotated,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    (folder / "doctor" / "training_args.bin").unlink()  # a pickle, which nothing reads


if __name__ == "__main__":
    main(Path(sys.argv[1]))

# SPDX-License-Identifier: Apache-2.0

"""
Create a small random patient and doctor, with a tokenizer trained on your preference data, without a download.

```bash
python examples/make_small_models.py --dataset_name my_preferences.jsonl --output_dir runs/small
accelerate launch --num_processes 2 examples/train.py \
    --patient runs/small/patient \
    --doctor runs/small/doctor \
    --dataset_name my_preferences.jsonl
```

The models check that a pipeline runs on your data. They cannot show that it aligns a model.
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from trl_tfpo.cli.files import read_split


def make_tokenizer(texts, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which encodes any text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_llama(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 32,
            max_position_embeddings=4096,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def main(dataset_name: str, split: str, output_dir: str, vocab_size: int, seed: int) -> None:
    dataset = read_split(dataset_name, split)
    tokenizer = make_tokenizer((row["chosen"] for row in dataset), vocab_size)
    set_seed(seed)
    for name, hidden_size, num_layers in (("patient", 128, 4), ("doctor", 64, 2)):
        model = make_llama(tokenizer, hidden_size, num_layers)
        model.save_pretrained(Path(output_dir) / name)
        tokenizer.save_pretrained(Path(output_dir) / name)
        print(f"{name}: {model.num_parameters():,} parameters in {Path(output_dir) / name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="Preference dataset with text in `chosen`.")
    parser.add_argument("--split", default="train")
    parser.add_argument("--output_dir", default="runs/small")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))

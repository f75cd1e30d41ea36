# SPDX-License-Identifier: Apache-2.0

"""
Train the patient and the doctor of the testbed from scratch: `python -m trl_tfpo.testbed.build --output_dir weights`.

The patient learns to follow instructions, from conversations with up to one instruction per attribute. The doctor is
trained on conversations without instructions, and learns about attributes only from preferences. Both are trained on
the places of all splits. Splits therefore matter only for alignment.
"""

import argparse
import itertools
import random
from pathlib import Path
from typing import TypedDict

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from .language import MAX_NEW_TOKENS, REVIEWS, Language, random_language
from .world import LANGUAGE_FILE


class Recipe(TypedDict):
    """Conversations, training and size of a model."""

    is_instructed: bool
    steps: int
    learning_rate: float
    size: dict[str, int]


RECIPES: dict[str, Recipe] = {
    "patient": {  # 0.85M parameters
        "is_instructed": True,
        "steps": 2500,
        "learning_rate": 1.2e-3,
        "size": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4},
    },
    "doctor": {  # 0.10M parameters
        "is_instructed": False,
        "steps": 2000,
        "learning_rate": 3e-3,
        "size": {"hidden_size": 48, "intermediate_size": 136, "num_hidden_layers": 3, "num_attention_heads": 4},
    },
}


def instructions_of(language: Language) -> tuple[str, ...]:
    """Return all combinations of at most one face per attribute. The empty one is repeated to make it frequent."""
    choices = [("", faces.positive, faces.negative) for faces in language.faces.values()]
    return tuple(" ".join(filter(None, faces)) for faces in itertools.product(*choices)) + ("",) * 4


def make_model(tokenizer: PreTrainedTokenizerBase, *, hidden_size: int, **sizes: int) -> LlamaForCausalLM:
    """Make a Llama with random weights for the vocabulary of a tokenizer. Sizes are arguments of `LlamaConfig`."""
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        max_position_embeddings=256,
        initializer_range=hidden_size**-0.5,  # the default, for wide models, delays learning of attention
        tie_word_embeddings=False,
        **sizes,  # type: ignore[arg-type]  # not all fields are numbers
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS, **special
    )
    return model


def sample_batch(
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    *,
    instructions: tuple[str, ...],
    batch_size: int,
    language: Language = REVIEWS,
) -> dict[str, torch.Tensor]:
    """
    Draw a batch of B conversations: `input_ids`, `attention_mask` and `labels`, (B, L) each.

    Only tokens of the review, EOS included, have a label. An empty instruction makes a conversation without one.
    """
    places = [place for split in language.num_places for place in language.places(split)]
    ids, prompt_lengths = [], []
    for _ in range(batch_size):
        place, instruction = rng.choice(places), rng.choice(instructions)
        prompt = language.make_prompt(place, instruction)
        review = language.sample_review(rng, place, language.sample_moods(rng, instruction))
        messages = [*prompt, {"role": "assistant", "content": review}]
        ids.append(_token_ids(tokenizer, messages))
        prompt_lengths.append(len(_token_ids(tokenizer, prompt, add_generation_prompt=True)))
    batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    position = torch.arange(batch["input_ids"].size(1))
    is_review = batch["attention_mask"].bool() & (position >= torch.tensor(prompt_lengths)[:, None])  # (B, L)
    return {**batch, "labels": batch["input_ids"].masked_fill(~is_review, -100)}


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> list[int]:
    return tokenizer.apply_chat_template(  # type: ignore[return-value]  # ids, for one conversation
        messages, add_generation_prompt=add_generation_prompt, return_dict=False
    )


def train_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    instructions: tuple[str, ...],
    steps: int,
    seed: int,
    batch_size: int = 32,
    learning_rate: float,
    language: Language = REVIEWS,
) -> None:
    """Train `model` in place, on new conversations at each step, with AdamW, warmup and cosine decay."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    model.train()
    for step in range(1, steps + 1):
        batch = sample_batch(tokenizer, rng, instructions=instructions, batch_size=batch_size, language=language)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.4f} nats per token", flush=True)
    model.eval()


def build(output_dir: str | Path, *, seed: int, steps: int | None = None, language: Language = REVIEWS) -> None:
    """
    Train both models, and save each with the tokenizer for [`load_world`].

    Args:
        output_dir (`str` or `Path`):
            Folder in which `patient` and `doctor` are created.
        seed (`int`):
            Seed of weights and text.
        steps (`int`, *optional*):
            Optimizer steps per model, with 32 conversations each. Defaults to those of `RECIPES`.
        language ([`Language`], *optional*):
            Language of both models. Defaults to the reviews of the package.
    """
    tokenizer = language.make_tokenizer()
    if language is not REVIEWS:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        language.save(Path(output_dir) / LANGUAGE_FILE)
    for name, recipe in RECIPES.items():
        set_seed(seed)
        model = make_model(tokenizer, **recipe["size"])
        print(f"{name}: {model.num_parameters():,} parameters", flush=True)
        train_model(
            model,
            tokenizer,
            instructions=instructions_of(language) if recipe["is_instructed"] else ("",),
            steps=steps or recipe["steps"],
            learning_rate=recipe["learning_rate"],
            seed=seed,
            language=language,
        )
        model.save_pretrained(Path(output_dir) / name)
        tokenizer.save_pretrained(Path(output_dir) / name)


def main() -> None:
    """Parse options and build a world."""
    parser = argparse.ArgumentParser(description="Train the patient and the doctor of the testbed.")
    parser.add_argument("--output_dir", required=True, help="folder in which `patient` and `doctor` are created")
    parser.add_argument("--steps", type=int, help="optimizer steps of each model, instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and text")
    parser.add_argument("--language_seed", type=int, help="seed of a random language, to use instead of `REVIEWS`")
    args = parser.parse_args()
    language = REVIEWS if args.language_seed is None else random_language(args.language_seed)
    build(args.output_dir, steps=args.steps, seed=args.seed, language=language)


if __name__ == "__main__":
    main()

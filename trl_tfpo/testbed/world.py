# SPDX-License-Identifier: Apache-2.0

"""The controlled world: a language, its oracles, and two models trained on it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation import generate_completions
from .language import MAX_NEW_TOKENS, REVIEWS, Attribute, Language


LANGUAGE_FILE = "language.json"
SHIPPED_WEIGHTS = Path(__file__).parent / "weights"
NOISE_TEMPERATURE = 1.0  # of the simulated annotator; larger means more label noise


@dataclass(frozen=True)
class World:
    """
    A patient, a doctor, and exact measures of their texts.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Tokenizer of both models.
        patient (`transformers.PreTrainedModel`):
            The larger model. It follows the faces of the attributes.
        doctor (`transformers.PreTrainedModel`):
            The smaller model, a language model trained without instructions. It is not trained as a doctor yet.
        weights (`Path`):
            Folder with the models, in `patient` and `doctor`.
        language ([`Language`]):
            The language of both models.
    """

    tokenizer: PreTrainedTokenizerBase
    patient: PreTrainedModel
    doctor: PreTrainedModel
    weights: Path
    language: Language

    @property
    def attributes(self) -> dict[str, Attribute]:
        """Independent attributes by name. The world of the package has `"praise"` and `"calm"`."""
        return self.language.attributes

    def attribute(self, name: str) -> Attribute:
        """Return the attribute `name`. Raises `ValueError` if it does not exist."""
        if name not in self.attributes:
            raise ValueError(
                f"`attribute` must be one of {sorted(self.attributes)}. Got {name!r}; see `world.attributes`."
            )
        return self.attributes[name]

    def prompts(self, split: str) -> list[list[dict[str, str]]]:
        """
        Return the prompts of a split. Splits have no place in common.

        Args:
            split (`str`):
                `"train"` (40 prompts), `"validation"` (12) or `"test"` (12).

        Returns:
            `list[list[dict]]`: for each place a conversation with one user message.

        Raises:
            `ValueError`: on an unknown split.
        """
        return [self.language.make_prompt(place) for place in self.language.places(split)]

    def is_grammatical(self, text: str) -> bool:
        """Whether the grammar can generate `text`, and `text` is about one place only."""
        return self.language.is_grammatical(text)

    def preference_dataset(self, attribute: str, *, num_pairs: int, seed: int, split: str = "train") -> Dataset:
        r"""
        Sample pairs from the patient, and label them by the oracle with Bradley-Terry noise.

        $$P(a \succ b) = \sigma(\text{oracle}(a) - \text{oracle}(b))$$

        A pair of equal texts, or with an empty text, is drawn again.

        Args:
            attribute (`str`):
                Name of the attribute whose oracle labels the pairs.
            num_pairs (`int`):
                Number of pairs, distributed evenly over the prompts of the split.
            seed (`int`):
                Seed of samples and labels.
            split (`str`, *optional*, defaults to `"train"`):
                Split of the prompts.

        Returns:
            `datasets.Dataset`: columns `prompt`, `chosen` and `rejected`, conversational.

        Raises:
            `ValueError`: on an unknown attribute or split.
        """
        oracle = self.attribute(attribute).oracle
        split_prompts = self.prompts(split)
        prompts = [split_prompts[row % len(split_prompts)] for row in range(num_pairs)]
        pairs = sample_completions(self.patient, self.tokenizer, prompts, num_samples_per_prompt=2, seed=seed)
        redraw_seed = seed
        while unusable := [row for row, (a, b) in enumerate(pairs) if a == b or not a or not b]:
            redraw_seed += 1
            repeated = [prompts[row] for row in unusable]
            redrawn = sample_completions(
                self.patient, self.tokenizer, repeated, num_samples_per_prompt=2, seed=redraw_seed
            )
            for row, pair in zip(unusable, redrawn, strict=True):
                pairs[row] = pair

        rng = torch.Generator().manual_seed(seed)
        scores = torch.tensor([[oracle(text) for text in pair] for pair in pairs]).view(-1, 2)
        first_wins = (
            torch.rand(num_pairs, generator=rng) < ((scores[:, 0] - scores[:, 1]) / NOISE_TEMPERATURE).sigmoid()
        )
        ordered = [pair if wins else pair[::-1] for pair, wins in zip(pairs, first_wins.tolist(), strict=True)]
        return Dataset.from_dict(
            {
                "prompt": prompts,
                "chosen": [[{"role": "assistant", "content": chosen}] for chosen, _ in ordered],
                "rejected": [[{"role": "assistant", "content": rejected}] for _, rejected in ordered],
            }
        )


def load_world(weights: str | Path | None = None) -> World:
    """
    Load a world, with its models in eval mode. Each call loads new models.

    Args:
        weights (`str` or `Path`, *optional*):
            Folder written by `python -m trl_tfpo.testbed.build`. Defaults to the weights in the package.

    Returns:
        `World`

    Raises:
        `ValueError`: when the folder lacks one of the models, or its language has an unsupported format.

    Examples:

    ```python
    >>> from trl_tfpo.testbed import load_world
    >>> world = load_world()
    >>> world.attributes["praise"].oracle("the room was truly splendid and the soup was awful.")
    0.0
    >>> world.prompts("test")[0][0]["role"]
    'user'

    ```
    """
    weights = SHIPPED_WEIGHTS if weights is None else Path(weights)
    for name in ("patient", "doctor"):
        if not (weights / name / "config.json").is_file():
            raise ValueError(
                f"`weights` must hold the folders 'patient' and 'doctor'. Got {str(weights)!r} without a model in "
                f"{name!r}; build it with `python -m trl_tfpo.testbed.build --output_dir {weights}`."
            )
    return World(
        tokenizer=AutoTokenizer.from_pretrained(weights / "patient"),
        patient=AutoModelForCausalLM.from_pretrained(weights / "patient").eval(),
        doctor=AutoModelForCausalLM.from_pretrained(weights / "doctor").eval(),
        weights=weights,
        language=Language.load(weights / LANGUAGE_FILE) if (weights / LANGUAGE_FILE).is_file() else REVIEWS,
    )


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    *,
    num_samples_per_prompt: int,
    seed: int,
    batch_size: int = 128,
) -> list[list[str]]:
    """
    Sample texts from a model at temperature 1, from its whole vocabulary.

    The tokenizer must have a chat template. The samples depend on `batch_size`. The random state of the caller is
    preserved.

    Returns:
        `list[list[str]]`: for each prompt `num_samples_per_prompt` texts, without special tokens.
    """
    completions = generate_completions(
        model,
        tokenizer,
        prompts,
        num_samples_per_prompt=num_samples_per_prompt,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=batch_size,
        seed=seed,
    )
    texts = [completion.text for completion in completions]
    return [texts[start : start + num_samples_per_prompt] for start in range(0, len(texts), num_samples_per_prompt)]

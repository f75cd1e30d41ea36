# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
A world small enough to know: a language of restaurant reviews, its oracles, and two models that speak it.

A review is drawn from a grammar. Two *attributes*, praise and calm, color it: each has a mood, positive or negative
with even odds, which shows only in the words of that attribute and never in the structure, the length or any other
word. An instruction (a face of the attribute) settles the mood almost surely. The oracle of an attribute counts its
words, so that the reward of any text is known, and with it the best that any method can do.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..evaluation import generate_completions
from ..faces import Faces


# The language: rules expand until only words are left

RULES = {
    "review": ["{opening} {sentence} {sentence}", "{opening} {sentence} {sentence} {closing}"],
    "opening": [
        "we tried the {landmark} {kind} {time}.",
        "this is about the {landmark} {kind}.",
        "my {companion} took us to the {landmark} {kind}.",
    ],
    "sentence": ["{clause}.", "{clause} {connective} {clause}."],
    "clause": [
        "{subject} {judgement}",
        "the {staff} {manner} {served} the {quality} {dish}",
        "we {manner} {ate} the {quality} {dish}",
        "the {guests} {act} near the {quality} {features}",
        "my {companion} {manner} called the {feature} {quality}",
        "everyone {act} over the {dish}",
    ],
    "subject": ["the {feature} was", "the {features} were"],
    "judgement": ["{quality}", "{degree} {quality}"],
    "closing": ["so much for the {kind}.", "that was the {landmark} {kind}."],
}
NEUTRAL_WORDS = {
    "landmark": "harbor bridge station market river park museum castle".split(),
    "kind": "tavern bakery diner cafe bistro canteen pizzeria inn".split(),
    "time": "yesterday today tonight recently".split(),
    "companion": "friend sister brother cousin neighbor uncle".split(),
    "connective": "and while but as".split(),
    "staff": "waiters cooks servers bakers".split(),
    "guests": "guests families students travelers".split(),
    "served": "served brought carried offered".split(),
    "ate": "ate shared tasted finished".split(),
    "degree": "quite rather really truly".split(),
    "feature": "room garden terrace kitchen music menu view lighting".split(),
    "features": "tables chairs curtains plates candles flowers windows mirrors".split(),
    "dish": "soup bread stew pie salad fish cake cheese pasta rice".split(),
}
# Slot: its attribute, then its positive, negative and neutral words
COLORED_WORDS = {
    "quality": (
        "praise",
        "splendid superb delightful lovely charming excellent wonderful marvelous".split(),
        "dreadful awful ghastly dismal horrid vile miserable wretched".split(),
        "familiar usual ordinary local".split(),
    ),
    "manner": (
        "calm",
        "calmly gently softly quietly serenely peacefully patiently tenderly".split(),
        "frantically hastily nervously wildly angrily loudly hurriedly tensely".split(),
        "usually finally eventually duly".split(),
    ),
    "act": (
        "calm",
        "lingered relaxed rested lounged dozed mused unwound daydreamed".split(),
        "fretted panicked quarreled bickered squabbled fumed fidgeted trembled".split(),
        "sat gathered waited talked".split(),
    ),
}
WORDS = NEUTRAL_WORDS | {slot: sum(words, []) for slot, (_, *words) in COLORED_WORDS.items()}
SAME = ("landmark", "kind")  # a review is about one place

REQUEST = "please review the {landmark} {kind}."
FACES = {
    "praise": Faces(positive="admire the place.", negative="scorn the place."),
    "calm": Faces(positive="keep a calm voice.", negative="keep a restless voice."),
}
NEUTRAL_RATE = 0.1  # of the words in a colored slot
LOYALTY = 0.85  # of the others: the share that follows the mood
OBEDIENCE = 0.99  # of the moods that an instruction asks for
NUM_PLACES = {"train": 40, "validation": 12, "test": 12}
MAX_NEW_TOKENS = 64  # the longest review has 49, its end included


@dataclass(frozen=True)
class Attribute:
    """
    A quality of a text that can be asked for, and exactly measured.

    Args:
        name (`str`):
            Name in `World.attributes`.
        faces (`Faces`):
            The instructions that ask the patient for it and for its opposite.
        words (`dict[str, int]`):
            +1 or -1 for each word that changes the score; no other word does.
    """

    name: str
    faces: Faces
    words: dict[str, int]

    def oracle(self, text: str) -> float:
        """Positive minus negative words of the attribute in `text`."""
        return float(sum(self.words.get(word, 0) for word in re.findall(r"\w+", text)))


ATTRIBUTES = {
    name: Attribute(
        name=name,
        faces=faces,
        words={
            word: sign
            for owner, positive, negative, _ in COLORED_WORDS.values()
            for sign, group in ((1, positive), (-1, negative))
            for word in group
            if owner == name
        },
    )
    for name, faces in FACES.items()
}


def sample_moods(rng: random.Random, instruction: str = "") -> dict[str, int]:
    """Mood of each attribute, +1 or -1: even odds, but nearly always as asked where the instruction has a face of it."""
    moods = {}
    for name, faces in FACES.items():
        odds = OBEDIENCE if faces.positive in instruction else 1 - OBEDIENCE if faces.negative in instruction else 0.5
        moods[name] = 1 if rng.random() < odds else -1
    return moods


def sample_review(rng: random.Random, place: tuple[str, str], moods: dict[str, int]) -> str:
    """
    A review drawn from the grammar.

    Args:
        rng (`random.Random`):
            Source of all choices.
        place (`tuple[str, str]`):
            Landmark and kind of the place.
        moods (`dict[str, int]`):
            +1 or -1 for each attribute, from [`sample_moods`].

    Returns:
        `str`: the text.
    """
    fixed = dict(zip(SAME, place, strict=True))

    def expand(symbol: str) -> str:
        if symbol in RULES:
            return re.sub(r"{(\w+)}", lambda match: expand(match[1]), rng.choice(RULES[symbol]))
        if symbol in fixed:
            return fixed[symbol]
        if symbol in COLORED_WORDS:
            attribute, positive, negative, neutral = COLORED_WORDS[symbol]
            if rng.random() < NEUTRAL_RATE:
                return rng.choice(neutral)
            return rng.choice(positive if (rng.random() < LOYALTY) == (moods[attribute] > 0) else negative)
        return rng.choice(WORDS[symbol])

    return expand("review")


def _pattern(symbol: str) -> str:
    """Regular expression of all that a symbol expands to: the rules never recur, so there is one."""
    alternatives = RULES.get(symbol) or WORDS[symbol]
    parts = (re.split(r"{(\w+)}", text) for text in alternatives)  # literal, symbol, literal, ...
    texts = ("".join(_pattern(p) if i % 2 else re.escape(p) for i, p in enumerate(split)) for split in parts)
    return f"(?:{'|'.join(texts)})"


_REVIEW = re.compile(_pattern("review"))


def is_grammatical(text: str) -> bool:
    """Whether a review could have been drawn from the grammar: its form, and one place only."""
    if not _REVIEW.fullmatch(text):
        return False
    words = re.findall(r"\w+", text)
    return all(len({word for word in words if word in WORDS[slot]}) == 1 for slot in SAME)


def places(split: str) -> list[tuple[str, str]]:
    """Landmark and kind of each place of a split, in a fixed shuffled order."""
    if split not in NUM_PLACES:
        raise ValueError(f"`split` must be one of {list(NUM_PLACES)}. Got {split!r}; 'train' has the most prompts.")
    every = [(landmark, kind) for landmark in WORDS["landmark"] for kind in WORDS["kind"]]
    random.Random(0).shuffle(every)
    first = sum(NUM_PLACES[name] for name in list(NUM_PLACES)[: list(NUM_PLACES).index(split)])
    return every[first : first + NUM_PLACES[split]]


def make_prompt(place: tuple[str, str], instruction: str = "") -> list[dict[str, str]]:
    """The conversation that asks for a review of a place, under an instruction unless it is empty."""
    request = {"role": "user", "content": REQUEST.format(**dict(zip(SAME, place, strict=True)))}
    return [{"role": "system", "content": instruction}, request] if instruction else [request]


# The tokenizer: a token is a word or a full stop

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the language, with its chat template."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
    texts = [*sum(RULES.values(), []), *sum(WORDS.values(), []), REQUEST]
    texts += [face for faces in FACES.values() for face in (faces.positive, faces.negative)]
    words = sorted({word for text in texts for word in re.findall(r"\w+|\.", re.sub(r"{\w+}", "", text))})
    vocabulary = {word: index for index, word in enumerate(special + words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # words apart, full stops attached
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# The world: the language, and two models that speak it


@dataclass(frozen=True)
class World:
    """
    A patient, a doctor, and the exact measure of what they say.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Tokenizer of both models.
        patient (`transformers.PreTrainedModel`):
            The larger model; it follows the faces of the attributes.
        doctor (`transformers.PreTrainedModel`):
            The smaller model, not yet trained as a doctor: it speaks the language, and knows of no instruction.
        weights (`Path`):
            Folder from which they came, with the model folders `patient` and `doctor`.
        attributes (`dict[str, Attribute]`):
            What can be asked for and measured, by name: `"praise"` and `"calm"`. They vary independently.
    """

    tokenizer: PreTrainedTokenizerBase
    patient: PreTrainedModel
    doctor: PreTrainedModel
    weights: Path
    attributes: dict[str, Attribute]

    def prompts(self, split: str) -> list[list[dict[str, str]]]:
        """
        Conversations that end with a request; no place is in two splits.

        Args:
            split (`str`):
                `"train"` (40 prompts), `"validation"` (12) or `"test"` (12).

        Returns:
            `list[list[dict]]`: one conversation, a user message, per place.

        Raises:
            `ValueError`: on an unknown split.
        """
        return [make_prompt(place) for place in places(split)]

    def is_grammatical(self, text: str) -> bool:
        """Whether `text` is a review that the grammar allows, about one place."""
        return is_grammatical(text)

    def preference_dataset(
        self, attribute: str, *, num_pairs: int, seed: int, split: str = "train", noise_temperature: float = 1.0
    ) -> Dataset:
        r"""
        Pairs of patient samples, each labeled by an annotator who follows the oracle and errs.

        $$P(a \succ b) = \sigma\Big(\frac{\text{oracle}(a) - \text{oracle}(b)}{\text{noise temperature}}\Big)$$

        Args:
            attribute (`str`):
                Name of the attribute that the annotator cares about.
            num_pairs (`int`):
                Number of rows, spread evenly over the prompts of the split.
            seed (`int`):
                Seed of the samples and of the labels; the same seed gives the same rows.
            split (`str`, *optional*, defaults to `"train"`):
                Split of the prompts.
            noise_temperature (`float`, *optional*, defaults to `1.0`):
                Temperature of the annotator, positive, in words. Larger errs more.

        Returns:
            `datasets.Dataset`: columns `prompt`, `chosen` and `rejected`, conversational.

        Raises:
            `ValueError`: on an unknown attribute or split, or a temperature that is not positive.
        """
        if attribute not in self.attributes:
            raise ValueError(
                f"`attribute` must be one of {sorted(self.attributes)}. Got {attribute!r}; see `world.attributes`."
            )
        if not noise_temperature > 0:
            raise ValueError(
                f"`noise_temperature` must be positive. Got {noise_temperature}; try 1.0, or 0.01 for hardly any noise."
            )
        every = self.prompts(split)
        prompts = [every[row % len(every)] for row in range(num_pairs)]
        pairs = sample_completions(self.patient, self.tokenizer, prompts, num_samples_per_prompt=2, seed=seed)
        redraw_seed = seed
        while same := [row for row, (first, second) in enumerate(pairs) if first == second]:
            redraw_seed += 1
            repeated = [prompts[row] for row in same]
            redrawn = sample_completions(
                self.patient, self.tokenizer, repeated, num_samples_per_prompt=2, seed=redraw_seed
            )
            for row, pair in zip(same, redrawn, strict=True):
                pairs[row] = pair

        oracle, rng = self.attributes[attribute].oracle, torch.Generator().manual_seed(seed)
        scores = torch.tensor([[oracle(text) for text in pair] for pair in pairs]).view(-1, 2)
        first_wins = (
            torch.rand(num_pairs, generator=rng) < ((scores[:, 0] - scores[:, 1]) / noise_temperature).sigmoid()
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
    The world with its trained models, fresh at each call and in evaluation mode.

    Args:
        weights (`str` or `Path`, *optional*):
            Folder written by `python -m trl_tfpo.testbed.build`. Defaults to the weights in the package.

    Returns:
        `World`

    Raises:
        `ValueError`: when the folder lacks one of the models.

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
    weights = Path(__file__).parent / "weights" if weights is None else Path(weights)
    for name in ("patient", "doctor"):
        if not (weights / name / "config.json").is_file():
            raise ValueError(
                f"`weights` must hold the folders 'patient' and 'doctor'. Got {str(weights)!r} without a model in "
                f"{name!r}; write one with `python -m trl_tfpo.testbed.build --output_dir {weights}`."
            )
    return World(
        tokenizer=AutoTokenizer.from_pretrained(weights / "patient"),
        patient=AutoModelForCausalLM.from_pretrained(weights / "patient").eval(),
        doctor=AutoModelForCausalLM.from_pretrained(weights / "doctor").eval(),
        weights=weights,
        attributes=dict(ATTRIBUTES),
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
    What a model says, at temperature 1 and from its whole vocabulary.

    Args:
        model (`transformers.PreTrainedModel`):
            The model.
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Its tokenizer, with a chat template.
        prompts (`list[list[dict]]`):
            Conversations that the model continues.
        num_samples_per_prompt (`int`):
            Independent samples of each.
        seed (`int`):
            Seed of the samples. The random state of the caller is left as it was.
        batch_size (`int`, *optional*, defaults to `128`):
            Rows sampled at once. The samples depend on it.

    Returns:
        `list[list[str]]`: texts without special tokens, `num_samples_per_prompt` for each prompt.
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

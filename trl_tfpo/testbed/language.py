# SPDX-License-Identifier: Apache-2.0

"""
Small languages: a grammar, attributes of texts, and instructions that request an attribute.

Texts are drawn from the grammar. Each *attribute* has a mood, positive or negative with equal probability. The mood
changes only the words of its attribute: structure, length and all other words are independent of it. An instruction (a
face of the attribute) determines the mood with a probability near 1. [`REVIEWS`] is written by hand.
[`random_language`] draws other languages. No setting was tuned on these.
"""

import json
import random
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..faces import Faces


MAX_NEW_TOKENS = 64  # more than the length of any text, EOS included
FORMAT_VERSION = 1  # of a saved language


@dataclass(frozen=True)
class Attribute:
    """
    A property of texts. Its faces request it, and its oracle measures it exactly.

    Args:
        name (`str`):
            Name in `World.attributes`.
        faces (`Faces`):
            Instructions for the attribute and for its opposite.
        words (`dict[str, int]`):
            +1 for positive and -1 for negative words.
    """

    name: str
    faces: Faces
    words: dict[str, int]

    def oracle(self, text: str) -> float:
        """Number of positive words minus number of negative words in `text`."""
        return float(sum(self.words.get(word, 0) for word in re.findall(r"\w+", text)))


@dataclass(frozen=True)
class Language:
    """
    A grammar with attributes. A name in braces is a slot. It is filled by a rule or a word.

    Args:
        rules (`dict[str, list[str]]`):
            Alternatives of each rule. A text is an expansion of `"review"`. Rules are not recursive.
        words (`dict[str, list[str]]`):
            Words of each slot without an attribute.
        colored (`dict[str, list]`):
            For each slot with an attribute: name of the attribute, then positive, negative and neutral words.
        request (`str`):
            Message of the user. It contains the slots of `same`.
        faces (`dict[str, Faces]`):
            Faces of each attribute.
        same (`list[str]`):
            Two slots whose words are constant within a text. The pair of words is the *place* of the text.
        neutral_rate (`float`, *optional*, defaults to `0.1`):
            Probability of a neutral word in a slot with an attribute.
        loyalty (`float`, *optional*, defaults to `0.85`):
            Probability that a non-neutral word agrees with the mood.
        obedience (`float`, *optional*, defaults to `0.99`):
            Probability that the mood agrees with the instruction.
        num_places (`dict[str, int]`, *optional*):
            Number of places of each split. Splits have no place in common.
    """

    rules: dict[str, list[str]]
    words: dict[str, list[str]]
    colored: dict[str, list]
    request: str
    faces: dict[str, Faces]
    same: list[str]
    neutral_rate: float = 0.1
    loyalty: float = 0.85
    obedience: float = 0.99
    num_places: dict[str, int] = field(default_factory=lambda: {"train": 40, "validation": 12, "test": 12})

    @cached_property
    def attributes(self) -> dict[str, Attribute]:
        """Attributes by name."""
        words: dict[str, dict[str, int]] = {name: {} for name in self.faces}
        for name, positive, negative, _ in self.colored.values():
            words[name] |= dict.fromkeys(positive, 1) | dict.fromkeys(negative, -1)
        return {name: Attribute(name, faces, words[name]) for name, faces in self.faces.items()}

    @cached_property
    def all_words(self) -> dict[str, list[str]]:
        """Words of every slot, with or without an attribute."""
        return self.words | {slot: sum(words, []) for slot, (_, *words) in self.colored.items()}

    def sample_moods(self, rng: random.Random, instruction: str = "") -> dict[str, int]:
        """Draw the mood of each attribute, +1 or -1. An instruction is followed with probability `obedience`."""
        moods = {}
        for name, faces in self.faces.items():
            probability = self.obedience if faces.positive in instruction else 0.5  # of the positive mood
            probability = 1 - self.obedience if faces.negative in instruction else probability
            moods[name] = 1 if rng.random() < probability else -1
        return moods

    def sample_review(self, rng: random.Random, place: tuple[str, str], moods: dict[str, int]) -> str:
        """Draw a text about a place (words of the slots `same`), with the moods of [`~Language.sample_moods`]."""
        fixed = dict(zip(self.same, place, strict=True))

        def expand(symbol: str) -> str:
            if symbol in self.rules:
                return re.sub(r"{(\w+)}", lambda match: expand(match[1]), rng.choice(self.rules[symbol]))
            if symbol in fixed:
                return fixed[symbol]
            if symbol in self.colored:
                attribute, positive, negative, neutral = self.colored[symbol]
                if rng.random() < self.neutral_rate:
                    return rng.choice(neutral)
                return rng.choice(positive if (rng.random() < self.loyalty) == (moods[attribute] > 0) else negative)
            return rng.choice(self.words[symbol])

        return expand("review")

    def is_grammatical(self, text: str) -> bool:
        """Whether the grammar can generate `text`, and `text` is about one place only."""
        if not self._review.fullmatch(text):
            return False
        words = re.findall(r"\w+", text)
        return all(len({word for word in words if word in self.words[slot]}) == 1 for slot in self.same)

    @cached_property
    def _review(self) -> re.Pattern:
        return re.compile(self._pattern("review"))

    def _pattern(self, symbol: str) -> str:
        """Regular expression of all expansions of a symbol. It is finite because rules are not recursive."""
        alternatives = self.rules.get(symbol) or self.all_words[symbol]
        parts = (re.split(r"{(\w+)}", text) for text in alternatives)  # literal, symbol, literal, ...
        texts = ("".join(self._pattern(p) if i % 2 else re.escape(p) for i, p in enumerate(split)) for split in parts)
        return f"(?:{'|'.join(texts)})"

    def places(self, split: str) -> list[tuple[str, str]]:
        """Places of a split, as words of the slots `same`, in a fixed random order. Splits are disjoint."""
        sizes = self.num_places
        if split not in sizes:
            raise ValueError(f"`split` must be one of {list(sizes)}. Got {split!r}; 'train' has the most prompts.")
        places = [(first, second) for first in self.words[self.same[0]] for second in self.words[self.same[1]]]
        random.Random(0).shuffle(places)
        start = sum(sizes[name] for name in list(sizes)[: list(sizes).index(split)])
        return places[start : start + sizes[split]]

    def make_prompt(self, place: tuple[str, str], instruction: str = "") -> list[dict[str, str]]:
        """Return the conversation that requests a text about a place. An instruction becomes its system message."""
        request = {"role": "user", "content": self.request.format(**dict(zip(self.same, place, strict=True)))}
        return [{"role": "system", "content": instruction}, request] if instruction else [request]

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        """Make a word-level tokenizer with a chat template. Tokens are words and full stops."""
        special = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
        texts = [*sum(self.rules.values(), []), *sum(self.all_words.values(), []), self.request]
        texts += [face for faces in self.faces.values() for face in (faces.positive, faces.negative)]
        words = sorted({word for text in texts for word in re.findall(r"\w+|\.", re.sub(r"{\w+}", "", text))})
        vocabulary = {word: index for index, word in enumerate(special + words)}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # spaces between words, not before full stops
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

    def save(self, path: Path) -> None:
        """Write the language to a JSON file."""
        path.write_text(
            json.dumps({"format_version": FORMAT_VERSION} | asdict(self), indent=1) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, path: Path) -> "Language":
        """Read a language written by [`~Language.save`]. Raises `ValueError` when its format is not supported."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        if (version := fields.pop("format_version", None)) != FORMAT_VERSION:
            raise ValueError(
                f"The language must have format {FORMAT_VERSION}. Got {version!r} in {str(path)!r}; rebuild the world "
                "with `python -m trl_tfpo.testbed.build`."
            )
        return cls(**fields | {"faces": {name: Faces(**faces) for name, faces in fields["faces"].items()}})


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


# A language written by hand

_RULES = {
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
_WORDS = {
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
# By slot: attribute, then positive, negative and neutral words
_COLORED = {
    "quality": [
        "praise",
        "splendid superb delightful lovely charming excellent wonderful marvelous".split(),
        "dreadful awful ghastly dismal horrid vile miserable wretched".split(),
        "familiar usual ordinary local".split(),
    ],
    "manner": [
        "calm",
        "calmly gently softly quietly serenely peacefully patiently tenderly".split(),
        "frantically hastily nervously wildly angrily loudly hurriedly tensely".split(),
        "usually finally eventually duly".split(),
    ],
    "act": [
        "calm",
        "lingered relaxed rested lounged dozed mused unwound daydreamed".split(),
        "fretted panicked quarreled bickered squabbled fumed fidgeted trembled".split(),
        "sat gathered waited talked".split(),
    ],
}

REVIEWS = Language(
    rules=_RULES,
    words=_WORDS,
    colored=_COLORED,
    same=["landmark", "kind"],  # a review is about one place
    request="please review the {landmark} {kind}.",
    faces={
        "praise": Faces(positive="admire the place.", negative="scorn the place."),
        "calm": Faces(positive="keep a calm voice.", negative="keep a restless voice."),
    },
)


# Languages drawn from a seed


def random_language(seed: int) -> Language:
    """Draw a language with random words, rules, rates, and one or two attributes. Texts have at most 63 tokens."""
    rng = random.Random(f"language {seed}")
    draw = _Words(rng)
    names = draw.between(1, 2)
    colored: dict[str, list] = {}
    for name in names:
        for slot in range(rng.randint(1, 2)):
            num = rng.randint(5, 10)
            colored[f"{name}_{slot}"] = [name, draw.exactly(num), draw.exactly(num), draw.between(2, 5)]
    words = {f"slot_{index}": draw.between(3, 9) for index in range(rng.randint(6, 10))}
    words |= {"first": draw.exactly(8), "second": draw.exactly(8), "link": draw.between(2, 4)}
    rules = _random_rules(rng, draw, colored, [slot for slot in words if slot.startswith("slot_")])
    faces = {}
    for name in names:
        shared = draw.between(1, 3)
        positive, negative = (" ".join([draw.word(), *shared]) + "." for _ in range(2))
        faces[name] = Faces(positive, negative)
    return Language(
        rules=rules,
        words=words,
        colored=colored,
        same=["first", "second"],
        request=" ".join([*draw.between(1, 3), "{first} {second}"]) + ".",
        faces=faces,
        neutral_rate=rng.uniform(0.05, 0.2),
        loyalty=rng.uniform(0.7, 0.9),
    )


class _Words:
    """Draws words of two or three syllables, without repetition."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.drawn: set[str] = set()

    def word(self) -> str:
        rng = self.rng
        while True:
            syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
            new = "".join(syllables) + rng.choice(["", "", "n", "r", "s", "l"])
            if new not in self.drawn:
                self.drawn.add(new)
                return new

    def exactly(self, num: int) -> list[str]:
        return [self.word() for _ in range(num)]

    def between(self, low: int, high: int) -> list[str]:
        return self.exactly(self.rng.randint(low, high))


def _random_rules(
    rng: random.Random, draw: _Words, colored: dict[str, list], plain: list[str]
) -> dict[str, list[str]]:
    """Draw rules for slots with an attribute (`colored`) and without one (`plain`)."""

    def clause(color: str) -> str:
        """
        Draw a clause of three to seven words.

        One or two of them are slots with an attribute. The others are fixed words, or slots without an attribute.
        """
        others = [f"{{{rng.choice(plain)}}}" if rng.random() < 0.6 else draw.word() for _ in range(rng.randint(2, 5))]
        colors = [f"{{{color}}}"] + [f"{{{rng.choice(list(colored))}}}"] * (rng.random() < 0.4)
        mixed = others[1:] + colors
        rng.shuffle(mixed)
        return " ".join([others[0], *mixed])

    clauses = [clause(color) for color in colored for _ in range(2)]
    clauses += [clause(rng.choice(list(colored))) for _ in range(rng.randint(0, 2))]
    if rng.random() < 0.5:  # two sentences of one or two clauses, or three of one
        num_sentences, sentences = 2, ["{clause}.", "{clause} {link} {clause}."]
    else:
        num_sentences, sentences = 3, ["{clause}."]
    body = " ".join(["{opening}"] + ["{sentence}"] * num_sentences)
    return {
        "review": [body, body + " {closing}"] if rng.random() < 0.7 else [body],
        "opening": [
            " ".join([*draw.between(1, 3), "{first} {second}", *draw.between(0, 2)]) + "."
            for _ in range(rng.randint(1, 3))
        ],
        "sentence": sentences,
        "clause": clauses,
        "closing": [" ".join([*draw.between(1, 3), rng.choice(["{first}", "{second}"])]) + "." for _ in range(2)],
    }

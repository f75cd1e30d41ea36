# SPDX-License-Identifier: Apache-2.0

"""
Tasks for a real model: scorers and questions.

The scorers are deterministic and need no network. They simulate people who choose between two answers: the probability
of a label depends on the difference of the scores, so some labels are wrong.
"""

import functools
import gzip
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import textstat
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from trl_tfpo.faces import Faces


MAX_PROMPT_CHARACTERS = 119
FIRST_TURN = re.compile(r"\s*Human:(.*?)\n\nAssistant:", flags=re.DOTALL)


@dataclass(frozen=True)
class Task:
    """
    A wanted behaviour and its scorer.

    Args:
        name (`str`):
            Name of the task.
        faces ([`~trl_tfpo.faces.Faces`] or `None`):
            Contrastive prompts. A mixture of tasks has none.
        score (`Callable[[str], float]`):
            Function from the text of an answer to the degree of the wanted behaviour.
        noise_factor (`float`):
            Log-odds of a label per unit of difference in the score, see [`label`].
    """

    name: str
    faces: Faces | None
    score: Callable[[str], float]
    noise_factor: float


@functools.cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound sentiment of a text, in [-1, 1]."""
    return _vader().polarity_scores(text)["compound"]


def plainness(text: str) -> float:
    """
    Flesch reading ease of a text, clipped to [0, 100] and divided by 100.

    A text with fewer than 6 or more than 32 words gets 0.5, so that no answer scores high by its length.
    """
    if not 6 <= len(text.split()) <= 32:
        return 0.5
    return max(min(textstat.flesch_reading_ease(text), 100.0), 0.0) / 100


TASKS = {
    task.name: task
    for task in (
        Task(
            "cheerful",
            Faces(
                positive="Be cheerful, warm and optimistic.",
                negative="Be gloomy, cold and pessimistic.",
                placement="user",
            ),
            sentiment,
            noise_factor=4.0,
        ),
        Task(
            "plain",
            Faces(
                positive="Use plain, short, everyday words that a small child understands.",
                negative="Use long, formal, technical words that an expert would use.",
                placement="user",
            ),
            plainness,
            noise_factor=6.0,
        ),
    )
}


def mixture(weights: dict[str, float]) -> Task:
    """
    Combine tasks by weights. The log-odds of a label are the weighted sum of the log-odds of the tasks.

    A task with weight 1 is returned unchanged.
    """
    whole = [name for name, weight in weights.items() if weight == 1]
    if whole:
        return TASKS[whole[0]]
    parts = [(weight * TASKS[name].noise_factor, TASKS[name].score) for name, weight in weights.items()]
    return Task(
        " + ".join(f"{weight:g} {name}" for name, weight in weights.items()),
        faces=None,
        score=lambda text: sum(factor * score(text) for factor, score in parts),
        noise_factor=1.0,
    )


def label(task: Task, texts_a: Sequence[str], texts_b: Sequence[str], seed: int) -> list[bool]:
    """
    Label pairs of answers with Bradley-Terry noise.

        P(a is preferred) = sigmoid(noise_factor * (score(a) - score(b)))

    The n-th label depends only on the n-th pair and the seed.

    Returns:
        `list[bool]`: True where the text in `texts_a` is preferred.
    """
    if len(texts_a) != len(texts_b):
        raise ValueError(
            f"`texts_a` and `texts_b` must have the same length. Got {len(texts_a)} and {len(texts_b)}; pass pairs."
        )
    noise = random.Random(seed)
    differences = (task.score(a) - task.score(b) for a, b in zip(texts_a, texts_b, strict=True))
    return [noise.random() < 1 / (1 + math.exp(-task.noise_factor * difference)) for difference in differences]


def as_messages(prompt: str) -> list[dict]:
    """Return the conversation for a question: one message, with a request for a short answer."""
    return [{"role": "user", "content": f"{prompt}\nAnswer in one short sentence."}]


def prompts(path: str | os.PathLike | None = None) -> list[str]:
    """
    Return distinct questions of fewer than 120 characters, in a fixed random order.

    Args:
        path (`str` or `os.PathLike`, *optional*):
            A file in the format of HH-RLHF (`.jsonl` or `.jsonl.gz`), or the name of a dataset on the Hub with the
            split "train". The question is the first message of the user, or the first turn of a transcript ("Human:",
            "Assistant:"), in the column `prompt` or else `chosen`. A `prompt` without turns is a question. By default
            the questions are those of [`own_questions`].

    Raises:
        `ValueError`: if the file does not exist, or no question is found.
    """
    if path is None:
        found = own_questions()
    else:
        found = filter(None, map(_first_turn, _rows(path)))
    kept = [text for text in dict.fromkeys(found) if 0 < len(text) <= MAX_PROMPT_CHARACTERS]
    if not kept:
        raise ValueError(
            "Some rows must have a `prompt` or `chosen` that begins with a question of fewer than 120 characters. Got "
            f"none in {str(path)!r}; convert the dataset to the format of HH-RLHF."
        )
    random.Random(0).shuffle(kept)
    return kept


def _rows(path: str | os.PathLike) -> Iterable[dict]:
    """Return the rows of a file, or of a dataset on the Hub."""
    name = str(path)
    if not name.endswith((".jsonl", ".jsonl.gz")):
        return datasets.load_dataset(name, split="train")
    if not Path(path).is_file():
        raise ValueError(f"`path` must be a file or the name of a dataset. Got {name!r}; correct the path.")
    open_text = gzip.open if name.endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _first_turn(row: dict) -> str | None:
    """Return the first question in a row, without surrounding whitespace, or None."""
    value = row.get("prompt") or row.get("chosen")
    if isinstance(value, list):
        return next((message["content"].strip() for message in value if message["role"] == "user"), None)
    if not isinstance(value, str):
        return None
    match = FIRST_TURN.match(value)
    if match:
        return match[1].strip()
    return value.strip() if row.get("prompt") else None


# Templates, with topics for each of them
QUESTIONS = [
    (
        [
            "How do I {}?",
            "Why do so many people find it hard to {}?",
            "I want to {}, but I keep putting it off. What would help me?",
            "What is the first thing to do if I want to {}?",
        ],
        [
            "learn to swim as an adult",
            "save money every month",
            "grow tomatoes on a balcony",
            "fix a flat bicycle tyre",
            "bake a loaf of bread",
            "write a letter to an old friend",
            "start running in the morning",
            "clean out the garage",
            "speak in front of a large group",
            "train a puppy",
            "learn the guitar",
            "plan a family picnic",
            "sleep better at night",
            "ask my boss for a raise",
            "paint the kitchen",
        ],
    ),
    (
        [
            "What is {} like?",
            "Tell me about {}.",
            "What are the best and the worst part of {}?",
            "Why do some people love {} and others hate it?",
        ],
        [
            "winter in the mountains",
            "living in a big city",
            "working at night",
            "a long train journey",
            "life on a farm",
            "camping in the rain",
            "growing up with many brothers and sisters",
            "a job in a hospital",
            "moving to another country",
            "a holiday by the sea",
            "living alone",
            "the first day at a new school",
            "black coffee",
            "driving through the desert",
            "an old house with a garden",
        ],
    ),
    (
        [
            "How does {} work?",
            "Explain {} to me.",
            "Why is {} important?",
            "What could go wrong with {}?",
        ],
        [
            "a refrigerator",
            "the stock market",
            "a vaccine",
            "a solar panel",
            "the human heart",
            "an election",
            "a bank loan",
            "the water supply of a town",
            "a weather forecast",
            "a search engine",
            "health insurance",
            "an airbag",
            "recycling",
            "a court of law",
            "the immune system",
        ],
    ),
    (
        [
            "{}. What should I do now?",
            "{}, and I can think of nothing else. What would you say to me?",
            'My friend told me: "{}." How should I answer?',
        ],
        [
            "My dog died last night",
            "I got the job that I wanted",
            "I failed my driving test again",
            "My best friend is moving away",
            "We are going to have a baby",
            "I broke my neighbour's window",
            "My grandmother is in hospital",
            "I won a prize in the lottery",
            "Nobody came to my birthday party",
            "I had a fight with my sister",
            "My garden is full of flowers this year",
            "I lost my wallet on the bus",
            "Somebody at work is telling lies about me",
            "I passed the exam after all",
            "I have to see the dentist tomorrow",
            "My son does not want to talk to me",
            "I am retiring next week",
            "The storm has damaged our roof",
            "I feel lonely in my new town",
            "My plane leaves in an hour and I am still at home",
        ],
    ),
]


def own_questions() -> list[str]:
    """Return 240 everyday questions, neutral and emotional, from templates and topics."""
    return [template.format(topic) for templates, topics in QUESTIONS for topic in topics for template in templates]

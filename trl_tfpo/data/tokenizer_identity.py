# SPDX-License-Identifier: Apache-2.0

"""
Comparison of tokenizers: whether the same ids stand for the same tokens.

Patient and doctor exchange token ids, never texts. Therefore only the token of each id is compared, including added
and special tokens. File names, chat template, padding side and the role of a token (EOS, padding) may differ.
"""

import hashlib
import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..common.language_model import LanguageModel


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Hash a vocabulary. Two tokenizers have the same fingerprint if and only if every id stands for the same token in
    both. The fingerprint does not depend on the process or the machine.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, or a processor with a tokenizer.

    Returns:
        `str`: 64 hexadecimal digits, the SHA-256 of the `(id, token)` pairs in the order of their ids.
    """
    pairs = sorted(_tokens_by_id(tokenizer).items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def check_same_tokenizer(
    a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, *, names: tuple[str, str] = ("patient", "doctor")
) -> None:
    """
    Raise `ValueError`, with the first difference, unless every id stands for the same token in both tokenizers.

    Args:
        a, b ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizers, or processors with a tokenizer.
        names (`tuple[str, str]`, *optional*, defaults to `("patient", "doctor")`):
            Names of `a` and `b` in the error.
    """
    if a is b:
        return
    tokens_a, tokens_b = _tokens_by_id(a), _tokens_by_id(b)
    if tokens_a == tokens_b:
        return
    differing = [i for i in tokens_a.keys() | tokens_b.keys() if tokens_a.get(i) != tokens_b.get(i)]
    first = min(differing)
    token_a, token_b = (repr(tokens[first]) if first in tokens else "missing" for tokens in (tokens_a, tokens_b))
    raise ValueError(
        f"The {names[0]} and the {names[1]} must have the same tokenizer: the same token for every id. Got "
        f"{len(tokens_a)} and {len(tokens_b)} tokens; {len(differing)} ids differ, of which the first is id {first}: "
        f"{token_a} for the {names[0]}, {token_b} for the {names[1]}. Use two models of one family, and add the same "
        "tokens to both."
    )


def check_all_same(
    processing_classes: Sequence[PreTrainedTokenizerBase], num_doctors: int, num_references: int
) -> None:
    """Raise `ValueError` unless there is one tokenizer for each model, and all are the same."""
    if len(processing_classes) != 1 + num_doctors + num_references:
        raise ValueError(
            "`processing_classes` must be the tokenizers of the patient, each doctor and each reference. Got "
            f"{len(processing_classes)} for 1 patient, {num_doctors} doctors and {num_references} references; pass "
            "one tokenizer for each model."
        )
    for other in processing_classes[1:]:
        check_same_tokenizer(processing_classes[0], other)


def check_embeddings(name: str, model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError`, with `name` as its subject, unless the model has an embedding for every token."""
    weight = model.get_input_embeddings().get_parameter("weight")
    num_embeddings = getattr(weight, "ds_shape", weight.shape)[0]  # in all shards
    if len(tokenizer) > num_embeddings:
        raise ValueError(
            f"The {name} must have an embedding for every token of the tokenizer. Got {num_embeddings} embeddings for "
            f"{len(tokenizer)} tokens; use the patient's own tokenizer, and a doctor of the patient's family."
        )


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Token of every id, including added and special tokens."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a multimodal processor
    return {index: token for token, index in tokenizer.get_vocab().items()}

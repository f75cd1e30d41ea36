# SPDX-License-Identifier: Apache-2.0

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from trl_tfpo.data.tokenizer_identity import check_same_tokenizer, tokenizer_fingerprint


WORDS = ("<unk>", "</s>", "good", "bad")


def word_tokenizer(words: tuple[str, ...] = WORDS, **kwargs) -> PreTrainedTokenizerFast:
    model = WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>", eos_token="</s>", **kwargs)


def test_equal_vocabularies_have_one_fingerprint():
    """Else a doctor would be refused by the patient it was trained for, after a mere reload."""
    assert tokenizer_fingerprint(word_tokenizer()) == tokenizer_fingerprint(word_tokenizer())
    check_same_tokenizer(word_tokenizer(), word_tokenizer())


def test_fingerprint_is_the_same_in_every_process():
    """Else a fingerprint saved with a dataset could never be compared: the value is fixed here."""
    assert tokenizer_fingerprint(word_tokenizer()) == (
        "65314760eceaf9a3b1abcb7b948e75256c3e59da0244e8620f5f8d56178bf6b1"
    )


def test_fingerprint_survives_saving(tmp_path):
    """Else annotating with a tokenizer from one folder and training with its copy would be an error."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    reloaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "elsewhere")
    assert tokenizer_fingerprint(reloaded) == tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize(
    "kwargs", [{"padding_side": "left"}, {"chat_template": "{{ messages }}"}, {"pad_token": "</s>"}]
)
def test_what_ids_do_not_mean_is_not_identity(kwargs):
    """Else an instruct patient and a base doctor of one family could not be combined."""
    check_same_tokenizer(word_tokenizer(), word_tokenizer(**kwargs))
    assert tokenizer_fingerprint(word_tokenizer()) == tokenizer_fingerprint(word_tokenizer(**kwargs))


def test_swapped_tokens_are_refused_and_named():
    """Else guidance towards "good" would push towards "bad", with no sign of it."""
    with pytest.raises(ValueError, match="id 2: 'good' for the patient, 'bad' for the doctor"):
        check_same_tokenizer(word_tokenizer(), word_tokenizer(("<unk>", "</s>", "bad", "good")))


@pytest.mark.parametrize("special", [False, True])
def test_an_added_token_is_a_difference(special):
    """Else the doctor would read ids that its embedding has never seen."""
    more = word_tokenizer()
    more.add_tokens(["<tool>"], special_tokens=special)
    assert tokenizer_fingerprint(more) != tokenizer_fingerprint(word_tokenizer())
    with pytest.raises(ValueError, match="id 4: missing for the dataset, '<tool>' for the policy"):
        check_same_tokenizer(word_tokenizer(), more, names=("dataset", "policy"))


def test_a_processor_stands_for_its_tokenizer():
    """Else a multimodal patient, whose processing class is a processor, could not be checked."""

    class Processor:
        tokenizer = word_tokenizer()

    check_same_tokenizer(Processor(), word_tokenizer())

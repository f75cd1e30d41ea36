# SPDX-License-Identifier: Apache-2.0

"""The scripts of `benchmarks`, imported as modules, and a model that is small enough for them."""

import importlib.util
from pathlib import Path
from types import ModuleType

from conftest import CHAT_TEMPLATE, make_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
REAL = BENCHMARKS / "real"
EOS = 2


def load(folder: Path, name: str) -> ModuleType:
    """A script, imported as a module."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_chat_model(folder: Path, words: str) -> Path:
    """A random Llama with these words, and a chat template that puts a question and its answer in one line."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", *words.split()]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=backend, **names, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    make_llama(0, vocab_size=len(words)).save_pretrained(folder)
    return folder

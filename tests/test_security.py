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

"""What comes from elsewhere is read, never run."""

import pickle
import re
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer

from trl_tfpo import DoctorGuidedLogitsProcessor, load_doctor
from trl_tfpo.cli import main
from trl_tfpo.evaluation import RewardModel


PACKAGE = Path(__file__).parents[1] / "trl_tfpo"


class Trap:
    """A pickle of it writes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def trap(tmp_path):
    """A model folder whose weights are a pickle that does something."""
    folder = tmp_path / "model"
    make_llama(1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    return folder


def test_no_model_is_read_from_a_pickle(trap, tmp_path, capsys):
    """Whoever can offer a model folder could run anything on the machine that tries it."""
    readers = [
        lambda: load_doctor(trap, with_value_head=False),
        lambda: DoctorGuidedLogitsProcessor.from_pretrained(str(trap)),
        lambda: RewardModel(str(trap)),
    ]
    for read in readers:
        with pytest.raises(OSError, match="safetensors|model.safetensors"):
            read()
    annotate = ["annotate", "--world", "praise", "--num_pairs", "2", "--output", str(tmp_path / "a.jsonl")]
    assert main(annotate) == 0  # the world itself is fine
    arguments = ["generate", "--patient_model_name_or_path", str(trap), "--prompt", "you are"]
    assert main(arguments) == 2 and "safetensors" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


def test_no_adapter_is_read_from_a_pickle(trap, tmp_path):
    """An adapter is small and easily shared, and so is what hides in it."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    make_llama(1).save_pretrained(base)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        f'{{"base_model_name_or_path": "{base}", "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}}'
    )
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match="saved as safetensors"):
        load_doctor(folder, with_value_head=False)
    assert not (tmp_path / "sprung").exists()


def test_nothing_in_the_package_unpickles_or_evaluates():
    """One forgotten call undoes the rest."""
    banned = re.compile(r"\b(pickle|torch\.load|joblib|eval|exec|os\.system|shell=True|yaml\.load)\s*\(|import pickle")
    for path in PACKAGE.rglob("*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            code = line.split("#")[0].replace(".eval()", "")
            assert not banned.search(code), f"{path.name}:{number}: {line.strip()}"


def test_remote_code_is_off_unless_asked_for():
    """A default of True would run what a repository holds."""
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"trust_remote_code\s*=\s*True", path.read_text(encoding="utf-8")), path

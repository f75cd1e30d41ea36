# SPDX-License-Identifier: Apache-2.0

"""Commands that are refused, in one line."""

import json
import shlex

import pytest
from conftest import WORDS, conversational_rows, make_llama, make_tokenizer, save_model

from bad_input.calls import PERMUTED_WORDS
from trl_tfpo.cli import main


# The folder in which the commands run has these files, and the models `patient`, `doctor` and `other`
FILES_OF_THE_FOLDER = {
    "pairs.jsonl": "".join(json.dumps(row) + "\n" for row in conversational_rows(8)),
    "broken.jsonl": '{"prompt": "a", "chosen"',
    "empty.jsonl": "",
    "null.jsonl": '{"prompt": "you", "chosen": null, "rejected": "bad"}\n',
    "other.jsonl": '{"question": "a"}\n',
    "numbers.jsonl": '{"prompt": 1, "completion": 2}\n',
    "a.jsonl": '{"prompt": "you are", "completion": "kind"}\n',
    "b.jsonl": '{"prompt": "you are", "completion": "rude"}\n',
    "short.jsonl": '{"prompt": "another", "completion": "kind"}\n',
    "list.yaml": "- a\n",
    "broken.yaml": "a: [\n",
    "typo.yaml": "nun_pairs: 3\nworld: praise\n",
    "tasks/kind.yaml": "task: kind\ndataset_path: json\n",
}
# The beginnings of commands
PAIRS = "annotate --dataset_name pairs.jsonl --output out.jsonl"
DRAW = "annotate --world praise --num_pairs 2 --output out.jsonl"
PATIENT = "--patient patient"
TRAINING = f"train --dataset_name pairs.jsonl {PATIENT} --doctor doctor --output_dir run --max_steps 1"
GENERATION = f"generate {PATIENT} --prompt 'you are'"
EVALUATION = "evaluate --output_dir report --completions"
SERVER = "serve --port 0"


# Verbs and options
COMMAND_LINE = [
    ("no verb", "", None),
    ("mistyped verb", "anotate", "unknown command 'anotate', did you mean 'annotate'?"),
    ("unknown verb", "xyz", "unknown command 'xyz'. `trl-tfpo --help`"),
    ("mistyped option", f"{DRAW} --sparsity_treshold 0.3", "did you mean '--sparsity_threshold'?"),
    ("mistyped option of train", "train --lerning_rate 1", "did you mean '--learning_rate'?"),
    ("mistyped option of generate", "generate --world --temprature 1", "did you mean '--temperature'?"),
    ("mistyped option of serve", "serve --world --prot 80", "did you mean '--port'?"),
    ("abbreviated option", f"{DRAW} --sparsity 0.3", "unknown option '--sparsity'"),
    ("stray argument", "annotate pairs.jsonl --world praise --output out.jsonl", "pairs.jsonl"),
    ("not a number", f"{DRAW} --gap_floor much", "--gap_floor"),
    ("launch option that is no number", f"{DRAW} --num_processes two", "--num_processes"),
    ("stray argument after a launch option", f"{DRAW} --num_processes 1 stray", "'stray'"),
    ("no such accelerate config", f"{DRAW} --accelerate_config zero33", "did you mean 'zero3'?"),
    ("env with an option", "env --all", "takes no options"),
]

# Configuration files
CONFIG = [
    ("no such config", f"{DRAW} --config absent.yaml", "absent.yaml"),
    ("config that is a list", f"{DRAW} --config list.yaml", "YAML mapping"),
    ("config that is no YAML", f"{DRAW} --config broken.yaml", "must be a YAML file. Got 'broken.yaml'"),
    ("mistyped key in a config", "annotate --output out.jsonl --config typo.yaml", "--num_pairs"),
    ("no word after --config", f"{DRAW} --config", "must be followed by a YAML file"),
]

# annotate
ANNOTATE = [
    ("no output", "annotate --world praise", "--output"),
    ("out of range", f"{DRAW} --sparsity_threshold 1.5", "must be in [0, 1)"),
    ("unknown direction", f"{DRAW} --reward_direction up", "'up'"),
    ("unknown attribute", "annotate --world prais --output out.jsonl", "'prais'"),
    ("no pairs", "annotate --world praise --num_pairs 0 --output out.jsonl", "at least one prompt"),
    ("nothing to annotate", "annotate --output out.jsonl", "needs preferences and a patient"),
    ("one face of two", f"{DRAW} --positive_face x", "Faces are a pair"),
    ("faces that are the same", f"{PAIRS} {PATIENT} --positive_face x --negative_face x", "must differ"),
    ("unknown faces", f"{PAIRS} {PATIENT} --faces kindness", "'kindness'"),
    ("faces at no place", f"{PAIRS} {PATIENT} --face_placement end", "'system' or 'user'. Got 'end'"),
    (
        "batches of nothing",
        f"{PAIRS} {PATIENT} --scoring_batch_size 0",
        "`--scoring_batch_size` at least 1. Got 0 and 0",
    ),
    ("negative length", f"{PAIRS} {PATIENT} --max_length -1", "`max_length` must be at least 1. Got -1"),
    ("4 bits and 8", f"{PAIRS} {PATIENT} --patient_load_in_4bit --patient_load_in_8bit", "Got both"),
    ("show less than nothing", f"{DRAW} --show -1", "`--show` must be at least 0"),
]

# Files and models of annotate
FILES = [
    ("no such file", f"annotate --dataset_name absent.jsonl {PATIENT} --output out.jsonl", "does not exist"),
    ("broken file", f"annotate --dataset_name broken.jsonl {PATIENT} --output out.jsonl", "cannot be read"),
    ("empty file", f"annotate --dataset_name empty.jsonl {PATIENT} --output out.jsonl", "cannot be read: it is empty"),
    ("rows without texts", f"annotate --dataset_name null.jsonl {PATIENT} --output out.jsonl", "Row 0 of the dataset"),
    ("no such model", f"{PAIRS} --patient ./absent", "Got './absent', which does not exist"),
    ("other columns", f"annotate --dataset_name other.jsonl {PATIENT} --output out.jsonl", "chosen"),
    ("no such split", f"{PAIRS} {PATIENT} --dataset_split test", "must be one of ['train']"),
    ("output exists", "annotate --world praise --output pairs.jsonl", "must not exist"),
    ("output is a folder of others", "annotate --world praise --output patient --overwrite", "if it is a dataset"),
    ("output in a file", "annotate --world praise --output pairs.jsonl/out.jsonl", "pairs.jsonl"),
    ("no name", f"annotate --dataset_name '' {PATIENT} --output out.jsonl", "Got ''"),
]

# train
TRAIN = [
    ("train without data", "train --output_dir run", "needs preferences"),
    ("train without a doctor", "train --dataset_name pairs.jsonl --output_dir run", "needs a doctor"),
    ("train out of range", f"{TRAINING} --subtb_lambda 2", "must be in [0, 1]"),
    (
        "train in batches of nothing",
        f"{TRAINING} --per_device_train_batch_size 0",
        "`per_device_train_batch_size` must be at least 1. Got 0",
    ),
    ("train at a negative rate", f"{TRAINING} --learning_rate -1", "`learning_rate` must be at least 0. Got -1.0"),
    ("train on no such split", f"{TRAINING} --dataset_train_split dev", "must be one of ['train']. Got 'dev'"),
    (
        "train and evaluate on no such split",
        f"{TRAINING} --eval_strategy steps",
        "must be one of ['train']. Got 'test'",
    ),
    (
        "train from no such checkpoint",
        f"{TRAINING} --resume_from_checkpoint ./absent",
        "must be complete and written by `TFPOTrainer`",
    ),
    ("train a doctor of another family", f"{TRAINING} --doctor other", "must have the same tokenizer"),
    ("train by no such column", f"{TRAINING} --chosen_id_column better", "needs ['better', 'prompt', 'response_0'"),
    ("plan for fewer than no processes", f"{TRAINING} --dry_run -1", "must be a number of processes. Got -1"),
]

# generate
GENERATE = [
    ("generate without a patient", "generate --prompt hello", "a patient is needed"),
    ("generate without prompts", f"generate {PATIENT}", "there are no prompts"),
    ("generate with a beta too many", "generate --world --beta 0.5", "a number for each doctor"),
    ("generate with too much beta", f"{GENERATION} --doctor doctor --beta 2", "must not exceed 1"),
    (
        "generate at a distance nobody measured",
        f"{GENERATION} --doctor doctor --kl 1",
        "needs the strengths of the doct",
    ),
    ("generate at a distance of nobody", f"{GENERATION} --kl 1", "the strength of one doctor. Got 1.0 for 0 doctors"),
    ("generate without a column", f"generate {PATIENT} --dataset_name other.jsonl", "a column `prompt`"),
    ("generate, no such doctor", "generate --world --doctor ./absent", "Got './absent', which does not exist"),
    ("generate, doctor of another family", f"{GENERATION} --doctor other", "must have the same tokenizer"),
    ("generate at a negative temperature", f"{GENERATION} --temperature -1", "`--temperature` must be at least 0"),
    ("generate from more than all", f"{GENERATION} --top_p 7", "`--top_p` in (0, 1]"),
    ("generate no samples", f"{GENERATION} --num_samples_per_prompt 0", "`num_samples_per_prompt` 0"),
    ("generate into a folder of others", f"{GENERATION} --output patient", "must not exist"),
    ("generate over a file", f"{GENERATION} --output pairs.jsonl", "must not exist"),
    ("generate from numbers", f"generate {PATIENT} --dataset_name numbers.jsonl", "Prompts must be texts"),
]

# strengths
STRENGTHS = [
    ("strengths of nobody", "strengths --world", "--doctor"),
    ("strengths of a doctor that is not there", "strengths --doctor ./absent", "Got './absent', which does not exist"),
    ("strengths that nobody measured", "strengths --doctor doctor", "has no table of strengths"),
    ("strengths in no folder", "strengths --world --doctor absent", "Got 'absent', which is not a folder"),
    (
        "strengths of another family",
        f"strengths {PATIENT} --doctor other --prompt you",
        "must have the same tokenizer",
    ),
    ("strengths without prompts", f"strengths {PATIENT} --doctor doctor", "there are no prompts"),
    (
        "strengths on no prompt",
        "strengths --world --doctor doctor --num_prompts 0",
        "`--num_prompts` must be at least 1",
    ),
    (
        "strengths without a column",
        f"strengths {PATIENT} --doctor doctor --dataset_name other.jsonl --dataset_split train",
        "a column `prompt`",
    ),
    (
        "strengths in no order",
        f"strengths {PATIENT} --doctor doctor --prompt you --strengths 1 0.5",
        "in ascending order. Got [1.0, 0.5]",
    ),
]

# evaluate
EVALUATE = [
    ("evaluate without a name", f"{EVALUATION} a.jsonl", "NAME=DATASET"),
    ("evaluate a name twice", f"{EVALUATION} a=a.jsonl a=b.jsonl", "each name once"),
    ("evaluate other prompts", f"{EVALUATION} a=a.jsonl b=short.jsonl", "the same prompts"),
    ("evaluate without columns", f"{EVALUATION} a=other.jsonl", "`completion`"),
    ("evaluate numbers", f"{EVALUATION} a=numbers.jsonl", "must be a text or messages. Got 2"),
    ("evaluate without a judge", f"{EVALUATION} a=a.jsonl b=b.jsonl --baseline a", "need rewards"),
    ("evaluate, rewards of nobody", f"{EVALUATION} a=a.jsonl --output rewards.jsonl", "need rewards"),
    ("evaluate into a file", "evaluate --output_dir a.jsonl --completions a=a.jsonl", "must be writable"),
    ("evaluate at no level", f"{EVALUATION} a=a.jsonl --level 2", "`level` must be between 0 and 1"),
    ("evaluate by no such oracle", f"{EVALUATION} a=a.jsonl --world prais", "Got 'prais'"),
]

# eval-harness
HARNESS = "eval-harness --output_dir out --tasks kind --include_path tasks"
EVAL_HARNESS = [
    ("benchmark nothing", HARNESS, "a patient is needed"),
    ("benchmark without tasks", "eval-harness --output_dir out --world", "--tasks"),
    ("benchmark from no such folder", f"{HARNESS} --world --include_path absent", "Got 'absent'"),
    ("benchmark a method of nobody", f"{HARNESS} --world --method a=kind:1", "must name doctors among []. Got 'kind'"),
    ("benchmark half a method", f"{HARNESS} --world --method a=kind", "Got 'a=kind'"),
    ("benchmark in another folder", f"{HARNESS} --world --method ../a", "Got '../a'; leave out the slash"),
    ("benchmark with a beta of nobody", f"{HARNESS} --world --beta 0.5", "`--alpha` and `--beta` are for `--doctor`"),
    ("benchmark with a beta too many", f"{HARNESS} {PATIENT} --doctor doctor --beta 1 2", "Got 2 for 1"),
    ("benchmark both here and there", f"{HARNESS} {PATIENT} --base_url x --doctor doctor", "has its own models"),
    ("benchmark there without a tokenizer", f"{HARNESS} --base_url x", "the patient's tokenizer with `--patient`"),
    ("benchmark there without an address", f"{HARNESS} {PATIENT} --model x", "Got it without `--base_url`"),
    ("benchmark a doctor of another family", f"{HARNESS} {PATIENT} --doctor other", "must have the same tokenizer"),
    ("benchmark in batches of nothing", f"{HARNESS} --world --batch_size 0", "must be positive"),
    ("benchmark over a file", "eval-harness --output_dir pairs.jsonl --world --tasks kind", "must be writable"),
]

# serve and demo
SERVE_AND_DEMO = [
    ("serve nothing", SERVER, "a patient is needed"),
    ("serve at no port", "serve --world --port 99999", "a free address of this machine"),
    ("serve at no address", f"{SERVER} --world --host 256.0.0.1", "a free address of this machine"),
    ("serve a doctor without a name", f"{SERVER} --world --doctor =path", "NAME=PATH"),
    (
        "serve a doctor that is not there",
        f"{SERVER} --world --doctor a=./absent",
        "Got './absent', which does not exist",
    ),
    ("serve a doctor of another family", f"{SERVER} --world --doctor a=doctor", "must have the same tokenizer"),
    ("serve with a key that is not there", f"{SERVER} --world --api_key_file absent.txt", "absent.txt"),
    ("serve with an empty key", f"{SERVER} --world --api_key_file empty.jsonl", "must hold a key"),
    ("serve an alias without weights", f"{SERVER} --world --alias mild", "NAME=DOCTOR:WEIGHT"),
    ("serve an alias with half a weight", f"{SERVER} --world --alias mild=kind", "Got 'mild=kind'"),
    (
        "serve an alias of nobody",
        f"{SERVER} --world --alias mild=kind:0.5",
        "Alias 'mild': `weights` must name doctors",
    ),
    (
        "serve an alias twice",
        f"{SERVER} --world --alias mild=kind:0.5 mild=kind:0.1",
        "each name and each doctor once",
    ),
    ("serve no choices", f"{SERVER} --world --max_choices 0", "`max_choices` must be positive. Got 0"),
    ("serve nobody", f"{SERVER} --world --max_rows 0", "`max_rows` must be positive. Got 0"),
    ("serve for no time", f"{SERVER} --world --max_seconds nan", "`max_seconds` must be positive. Got nan"),
    ("play without a patient", "demo --doctor a=doctor", "must be passed together"),
    ("play without a doctor", "demo --patient patient", "must be passed together"),
    ("play at no port", "demo --port -1", "a free address of this machine"),
    ("play with doctors that learn nothing", "demo --max_steps 0 --cache_dir cache", "`max_steps` must be at least 1"),
]

COMMANDS = [
    row
    for rows in (
        *(COMMAND_LINE, CONFIG, ANNOTATE, FILES, TRAIN),
        *(GENERATE, STRENGTHS, EVALUATE, EVAL_HARNESS, SERVE_AND_DEMO),
    )
    for row in rows
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and files, good and bad."""
    folder = tmp_path_factory.mktemp("commands")
    for name, text in FILES_OF_THE_FOLDER.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name, words in (("patient", WORDS), ("doctor", WORDS), ("other", PERMUTED_WORDS)):
        save_model(folder / name, make_llama(1), make_tokenizer(words))
    return folder


@pytest.mark.parametrize(("command", "message"), [pytest.param(*row, id=name) for name, *row in COMMANDS])
def test_a_command_is_refused_in_one_line(command, message, folder, monkeypatch, capsys):
    """A traceback says nothing to somebody who mistyped a word; and a command that failed leaves nothing behind."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert main(shlex.split(command)) == 2
    captured = capsys.readouterr()
    if message is not None:  # without a verb, the help is printed
        (line,) = [line for line in captured.err.splitlines() if line.startswith("trl-tfpo")]
        assert message in line and ": error: " in line
    assert "Traceback" not in captured.err + captured.out
    assert sorted(folder.rglob("*")) == before

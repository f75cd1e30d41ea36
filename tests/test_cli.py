# SPDX-License-Identifier: Apache-2.0

"""The command line: every verb, run; every mistake, answered in one line."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from accelerate.state import AcceleratorState
from conftest import WORDS, conversational_rows, make_llama, make_tokenizer, save_model, write_rows
from datasets import Dataset, load_dataset, load_from_disk
from processes import end_of, finish, in_child, outcome, start_ranks, succeeds

from trl_tfpo import Faces, annotate_token_rewards
from trl_tfpo.annotation.token_rewards import annotation_settings
from trl_tfpo.cli import VERBS, main
from trl_tfpo.faces import HONESTY
from trl_tfpo.testbed import load_world


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What a verb sets for its process is not left to the next test."""
    monkeypatch.setenv("TQDM_DISABLE", os.environ.get("TQDM_DISABLE", ""))
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS")  # and is absent again afterwards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Preferences, a patient and a doctor, as files."""
    folder = tmp_path_factory.mktemp("cli")
    write_rows(folder / "pairs.jsonl", conversational_rows(8))
    (folder / "config.yaml").write_text("num_pairs: 3\nworld: praise\n")
    (folder / "launch.yaml").write_text("num_processes: 1\ncpu: true\n")
    for name, seed in (("patient", 1), ("doctor", 2)):
        save_model(folder / name, make_llama(seed))
    save_model(folder / "stranger", make_llama(3), make_tokenizer(" ".join(reversed(WORDS.split()))))
    rows = {"a": ["kind", "rude"], "b": ["kind", "kind"]}
    for name, texts in rows.items():
        lines = [{"prompt": "you are", "completion": text} for text in texts]
        write_rows(folder / f"{name}.jsonl", lines)
    return folder


def run_in_a_terminal(arguments, cwd):
    """
    In a forked process: a command, which hears Ctrl-C. The processes that it launches are of the interpreter, and
    import everything again.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ["HF_DATASETS_CACHE"] = str(cwd / "cache")
    datasets.config.HF_DATASETS_CACHE = cwd / "cache"
    return main([str(argument) for argument in arguments])


# Help


@pytest.mark.parametrize("verb", [name for name in VERBS if name != "train"])
def test_help_of_a_verb_is_instant(verb, tmp_path):
    """The help of a verb loads no torch, but for `train`, whose options include those of transformers."""
    script = (
        "import sys; from trl_tfpo.cli import main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", script, verb], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"usage: trl-tfpo {verb}" in result.stdout


def test_help_needs_nothing(tmp_path):
    """The list of verbs loads none of the large libraries."""
    script = (
        "import sys; from trl_tfpo.cli import main; status = main(['--help']);"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'accelerate', 'numpy'} & set(sys.modules);"
        "assert status == 0 and not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for verb in VERBS:
        assert f"  {verb} " in result.stdout


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        ("annotate", "--sparsity_threshold"),
        ("train", "--value_loss_weight"),
        ("generate", "--beta"),
        ("evaluate", "--baseline"),
        ("eval-harness", "--include_path"),
    ],
)
def test_help_of_a_verb_is_complete(verb, option, capsys):
    """An option that help leaves out is one that nobody finds."""
    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and option in printed and f"trl-tfpo {verb}" in printed


@pytest.mark.parametrize("verb", ["annotate", "strengths", "generate", "evaluate", "eval-harness", "serve", "demo"])
def test_help_of_a_verb_fits_a_screen(verb, monkeypatch, capsys):
    """Nobody reads help that gives each option three names and four lines."""
    monkeypatch.setenv("COLUMNS", "119")
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    lines = capsys.readouterr().out.splitlines()
    names = re.findall(r"^  (--\w+)", "\n".join(lines), flags=re.MULTILINE)
    assert len(names) == len(set(names)) > 10
    assert len(lines) <= 50 and max(map(len, lines)) <= 119


def test_version_and_environment(capsys):
    """A bug report needs versions."""
    assert main(["--version"]) == 0 and main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "trl-tfpo 0." in printed and "- torch: 2" in printed and "- Accelerators: " in printed


# Mistakes; `bad_input/test_cli.py` has all of them


def test_a_mistake_in_a_process_of_its_own(folder):
    """Scripts go by the exit status, and people by the last line."""
    result = subprocess.run([sys.executable, "-m", "trl_tfpo", "anotate"], capture_output=True, text=True, cwd=folder)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.strip().splitlines()[-1].startswith("trl-tfpo: error: unknown command 'anotate'")


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    """Whoever presses Ctrl-C after an hour wants to know whether the hour is lost."""

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_tfpo.cli.annotate.run", interrupted)
    assert main(["annotate"]) == 130
    assert "finished shards are kept" in capsys.readouterr().err


def test_what_nobody_foresaw_is_one_line_too(monkeypatch, capsys):
    """Libraries raise what they like; the place is for those who ask for it."""

    def broken(arguments):
        raise KeyError("added_tokens")

    monkeypatch.setattr("trl_tfpo.cli.annotate.run", broken)
    assert main(["annotate"]) == 1
    assert "KeyError: 'added_tokens' (TRL_TFPO_TRACEBACK=1" in capsys.readouterr().err
    monkeypatch.setenv("TRL_TFPO_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["annotate"])


@pytest.mark.slow
@pytest.mark.parametrize("launch", [["--config", "launch.yaml"], ["--accelerate_config=cpu"]])
def test_a_mistake_in_processes_that_were_launched(launch, folder):
    """What goes wrong behind a launcher is said by the one it happened to, and its status is the command's."""
    arguments = ["annotate", "--world", "prais", "--output", "out.jsonl"]
    status, said = outcome(run_in_a_terminal, [*arguments, *launch], folder)
    assert os.waitstatus_to_exitcode(status) == 2 and "Traceback" not in said, said
    assert "trl-tfpo annotate: error: `--world` must be one of" in said


@pytest.mark.slow
@pytest.mark.parametrize("launch", [[], ["--num_processes", "1", "--cpu"], ["--accelerate_config", "cpu"]])
def test_ctrl_c_in_a_terminal(launch, folder, tmp_path):
    """A terminal interrupts every process of a command at once; one of them speaks, and none is left."""
    rows = [json.dumps(row) + "\n" for row in conversational_rows(2_000)]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    command = ["annotate", "--dataset_name", "pairs.jsonl", "--output", "out.jsonl"]
    command += ["--patient", folder / "patient", "--reward_direction", "faces", *launch]
    child = in_child(run_in_a_terminal, command, tmp_path, said=tmp_path / "said.txt")
    while not list(tmp_path.glob("cache/trl_tfpo/*/*.arrow")):  # of 125 shards
        assert os.waitpid(child, os.WNOHANG) == (0, 0), (tmp_path / "said.txt").read_text()
        time.sleep(0.05)
    os.killpg(child, signal.SIGINT)
    status, error = end_of(child), (tmp_path / "said.txt").read_text()
    assert os.waitstatus_to_exitcode(status) == 130, error
    assert error.count("interrupted. To resume, run the same command again: finished shards are kept.") == 1
    ignored = re.compile(r"Exception ignored in.*?KeyboardInterrupt: ?\n", re.DOTALL)  # Python's, of a destructor
    assert "Traceback" not in ignored.sub("", error), error
    with pytest.raises(ProcessLookupError):
        os.killpg(child, 0)
    assert not (tmp_path / "out.jsonl").exists()


# The verbs


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ""])
def test_annotate_writes_what_the_library_returns(suffix, folder, tmp_path, capsys):
    """One dataset, however it is stored."""
    output = tmp_path / f"annotated{suffix}"
    arguments = [
        "--dataset_name",
        str(folder / "pairs.jsonl"),
        "--patient",
        str(folder / "patient"),
    ]
    arguments += ["--positive_face", "you are kind", "--negative_face", "you are rude", "--reward_direction", "faces"]
    assert main(["annotate", *arguments, "--output", str(output)]) == 0
    assert "8 pairs" in capsys.readouterr().out
    if suffix:
        builder = {".jsonl": "json", ".parquet": "parquet"}[suffix]
        written = load_dataset(builder, data_files=str(output), split="train", cache_dir=str(tmp_path / "cache"))
    else:
        written = load_from_disk(output)
    expected = annotate_token_rewards(
        Dataset.from_list(conversational_rows(8)),
        make_llama(1),
        make_tokenizer(),
        faces=Faces(positive="you are kind", negative="you are rude"),
        reward_direction="faces",
    )
    assert written["chosen_ids"][:] == expected["chosen_ids"][:]
    for mine, theirs in zip(written["rejected_token_rewards"], expected["rejected_token_rewards"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert not list(tmp_path.glob("*.part"))


def test_annotate_passes_on_how_tokens_are_rewarded(tmp_path, capsys):
    """An option that is read and then dropped gives other rewards than those asked for, without a word."""
    settings = dict(disagreement_weight=0.25, importance_temperature=2.0, gap_floor=0.1, sparsity_threshold=0.2)
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    output = tmp_path / "annotated"
    assert main(["annotate", "--world", "praise", "--num_pairs", "2", *options, "--output", str(output)]) == 0
    assert annotation_settings(load_from_disk(output))["reward"].items() >= settings.items()
    capsys.readouterr()


@pytest.mark.parametrize("options", [[], ["--positive_face", "calm voice.", "--negative_face", "scorn"]])
def test_annotate_passes_on_where_the_faces_stand(options, tmp_path, capsys):
    """Dropped without a word, the patient would be asked in the system turn, also for faces that have a name."""
    output = tmp_path / "annotated"
    arguments = ["--world", "praise", "--num_pairs", "2", "--face_placement", "user", *options]
    assert main(["annotate", *arguments, "--output", str(output)]) == 0
    faces = annotation_settings(load_from_disk(output))["faces"]
    assert faces["positive"] == ("calm voice." if options else load_world().attributes["praise"].faces.positive)
    assert faces["placement"] == "user"
    capsys.readouterr()


def test_train_passes_on_where_the_faces_stand(folder, tmp_path, monkeypatch):
    """The same option, for built-in faces as well."""
    given = []
    monkeypatch.setattr("trl_tfpo.cli.train.TFPOTrainer", lambda **settings: given.append(settings) or sys.exit(0))
    with pytest.raises(SystemExit):
        main(
            ["train", "--dataset_name", str(folder / "pairs.jsonl"), "--patient", str(folder / "patient")]
            + ["--doctor", str(folder / "doctor"), "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
            + ["--faces", "honesty", "--face_placement", "user"]
        )
    assert given[0]["faces"] == Faces(HONESTY.positive, HONESTY.negative, placement="user")


def test_annotate_by_a_config_file(folder, tmp_path, capsys):
    """What is in the file is a default, and the command line has the last word."""
    config = ["--config", str(folder / "config.yaml")]
    assert main(["annotate", *config, "--output", str(tmp_path / "a.jsonl")]) == 0
    assert main(["annotate", *config, "--num_pairs", "2", "--output", str(tmp_path / "b.jsonl")]) == 0
    assert [len((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in "ab"] == [3, 2]
    capsys.readouterr()


def test_a_dataset_of_the_hub_has_a_card(tmp_path, monkeypatch):
    """A card that is pushed over that of the files hides the files, and one that is not leaves numbers."""
    from huggingface_hub import DatasetCard

    from trl_tfpo.cli.files import push_dataset

    readme = tmp_path / "README.md"

    def push_files(self, name):
        readme.write_text("---\nconfigs:\n- config_name: default\n  data_files: data/*\n---\n", encoding="utf-8")

    def push_card(self, name, repo_type):
        assert (name, repo_type) == (str(readme), "dataset")
        self.save(readme)

    monkeypatch.setattr(Dataset, "push_to_hub", push_files)
    monkeypatch.setattr(DatasetCard, "push_to_hub", push_card)
    world = load_world()
    pairs = world.preference_dataset("praise", num_pairs=4, seed=0)
    faces = world.attributes["praise"].faces
    push_dataset(annotate_token_rewards(pairs, world.patient, world.tokenizer, faces=faces), str(readme))
    card = DatasetCard.load(readme)
    assert card.data.to_dict()["configs"][0]["data_files"] == "data/*" and "trl-tfpo" in card.data.tags
    assert faces.positive in card.text and "4 preference pairs" in card.text


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ""])
def test_evaluate_reads_and_writes_what_generate_does(suffix, folder, tmp_path):
    """One format that cannot be read back ends a pipeline in its last step."""
    from trl_tfpo.cli.files import read_split, write_dataset

    names = {name: str(tmp_path / f"{name}{suffix}") for name in "ab"}
    for name, path in names.items():
        write_dataset(read_split(str(folder / f"{name}.jsonl"), "train"), path)
    rewards = str(tmp_path / f"rewards{suffix}")
    files = [f"{name}={path}" for name, path in names.items()]
    arguments = ["--world", "praise", "--output_dir", str(tmp_path / "report"), "--output", rewards]
    assert main(["evaluate", "--completions", *files, *arguments]) == 0
    rows = read_split(rewards, "train").to_list()
    assert [(row["method"], row["completion"]) for row in rows] == [
        ("a", "kind"),
        ("a", "rude"),
        ("b", "kind"),
        ("b", "kind"),
    ]
    assert all(row["reward"] == load_world().attributes["praise"].oracle(row["completion"]) for row in rows)
    assert main(["evaluate", "--completions", *files, *arguments]) == 2  # all is there
    assert main(["evaluate", "--completions", *files, *arguments, "--overwrite"]) == 0


def annotate_in(folder, output):
    """The command in a forked process, alone or as one of several."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(["annotate", "--world", "praise", "--num_pairs", "40", "--output", str(folder / output)])


@pytest.mark.slow
def test_two_processes_annotate_what_one_does(tmp_path):
    """Processes that do not know of each other do all the work twice, and write the same file at the same time."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    finish([in_child(annotate_in, one, "out.parquet"), *start_ranks(two, annotate_in, two, "out.parquet")])
    said = "".join(path.read_text() for path in two.glob("rank-*.txt"))
    assert said.count("40 pairs with token rewards") == 1
    rows = [load_dataset("parquet", data_files=str(path / "out.parquet"), split="train") for path in (one, two)]
    assert rows[0].column_names == rows[1].column_names
    assert rows[0].to_list() == rows[1].to_list()


@pytest.mark.slow
def test_train_generate_evaluate(folder, tmp_path):
    """The pipeline of the quick start, by commands alone: two processes train, and the doctor guides."""
    command = ["train", "--accelerate_config", "cpu", "--num_processes", "2", "--quiet"]
    command += ["--dataset_name", folder / "pairs.jsonl", "--patient", folder / "patient"]
    command += ["--doctor", folder / "doctor", "--output_dir", tmp_path / "run", "--max_steps", "2"]
    command += ["--positive_face", "you are kind", "--negative_face", "you are rude", "--report_to", "none"]
    command += ["--per_device_train_batch_size", "2", "--save_strategy", "no", "--reward_direction", "faces"]
    succeeds(run_in_a_terminal, command, tmp_path)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    for name, options in (("guided", ["--doctor", str(tmp_path / "run"), "--beta", "0.5"]), ("patient", [])):
        common = ["--patient", str(folder / "patient"), "--prompt", "you are", "are you"]
        common += [
            "--num_samples_per_prompt",
            "3",
            "--max_new_tokens",
            "4",
            "--output",
            str(tmp_path / f"{name}.jsonl"),
        ]
        assert main(["generate", *common, *options]) == 0
    files = [f"{name}={tmp_path / name}.jsonl" for name in ("guided", "patient")]
    assert main(["evaluate", "--completions", *files, "--output_dir", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(report["methods"]) == {"guided", "patient"}
    assert (tmp_path / "report" / "report.png").stat().st_size > 1000


def test_generate_in_the_world(tmp_path, capsys):
    """The untrained doctor of the world guides at once, and the oracle is the judge."""
    world = load_world()
    for name, options in (("guided", ["--doctor", str(world.weights / "doctor")]), ("patient", [])):
        arguments = ["generate", "--world", "--max_new_tokens", "32", "--output", str(tmp_path / f"{name}.jsonl")]
        assert main([*arguments, *options]) == 0
    files = [f"{name}={tmp_path / name}.jsonl" for name in ("guided", "patient")]
    arguments = ["evaluate", "--world", "praise", "--baseline", "patient", "--completions", *files]
    assert main([*arguments, "--output_dir", str(tmp_path / "report")]) == 0
    assert "| guided |" in capsys.readouterr().out
    assert main(["generate", "--world", "--prompt", "please review the park inn.", "--temperature", "0"]) == 0
    assert "park inn" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_of_the_documentation(tmp_path, monkeypatch, capsys):
    """The first thing that is tried is copied from the page."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    for line in block.splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    printed = capsys.readouterr().out
    assert "⁺" in printed and "| guided |" in printed
    outputs = {"annotated", "guided.jsonl", "my-doctor", "patient.jsonl", "report", "reward-report"}
    assert outputs <= set(os.listdir())
    card = Path("my-doctor", "README.md").read_text(encoding="utf-8")
    faces = load_world().attributes["praise"].faces
    assert faces.positive in card and "| data | annotated, 300 preference pairs |" in card


def test_the_commands_for_large_models_are_understood():
    """A page that shows an option that is gone is the last thing a newcomer reads. Those of `cli.md` are run above."""
    from trl import ModelConfig

    from trl_tfpo import TFPOConfig
    from trl_tfpo.cli.annotate import AnnotateArguments
    from trl_tfpo.cli.demo import DemoArguments
    from trl_tfpo.cli.endpoint_methods import EndpointArguments
    from trl_tfpo.cli.engines import EngineArguments
    from trl_tfpo.cli.eval_harness import HarnessArguments
    from trl_tfpo.cli.evaluate import EvaluateArguments
    from trl_tfpo.cli.generate import GenerateArguments
    from trl_tfpo.cli.parser import Parser
    from trl_tfpo.cli.serve import ServeArguments
    from trl_tfpo.cli.strengths import StrengthsArguments
    from trl_tfpo.cli.train import TFPOScriptArguments

    types = {
        "annotate": (AnnotateArguments, EngineArguments),
        "evaluate": (EvaluateArguments, EndpointArguments),
        "eval-harness": (HarnessArguments,),
        "train": (TFPOScriptArguments, TFPOConfig, ModelConfig),
        "serve": (ServeArguments,),
        "strengths": (StrengthsArguments,),
        "generate": (GenerateArguments,),
        "demo": (DemoArguments,),
    }
    root = Path(__file__).parents[1]
    seen = set()
    for page in [root / "README.md", *root.glob("docs/*.md")]:
        if page.name == "cli.md":
            continue
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if line.startswith("trl-tfpo "):
                _, verb, *given = shlex.split(line)
                if given[:1] == ["--accelerate_config"]:  # goes to the launcher
                    assert given[2] == "--num_processes"
                    given = given[4:]
                Parser(types[verb], verb, "").parse(given)
                seen.add(verb)
    assert seen == set(types)


def test_lists_may_be_given_word_by_word(tmp_path):
    """Of `--doctor a --doctor b` argparse would keep b, and the server would have one doctor without a word."""
    from trl_tfpo.cli.parser import Parser
    from trl_tfpo.cli.serve import ServeArguments

    (tmp_path / "serve.yaml").write_text("doctor: [c=x]\n")
    for given in (["--doctor", "a=x", "--doctor", "b=y"], ["--doctor", "a=x", "b=y"]):
        for config in ([], ["--config", str(tmp_path / "serve.yaml")]):
            (args,) = Parser(ServeArguments, "serve", "").parse([*config, *given])
            assert args.doctor == ["a=x", "b=y"]
    assert Parser(ServeArguments, "serve", "").parse(config)[0].doctor == ["c=x"]
    assert Parser(ServeArguments, "serve", "").parse([])[0].doctor == []


def test_the_configs_of_the_package_are_those_of_the_examples():
    """Two copies would part ways."""
    from accelerate.commands.config.config_args import load_config_from_file

    root = Path(__file__).parents[1]
    folder = root / "trl_tfpo" / "training" / "accelerate_configs"
    assert (root / "examples" / "accelerate_configs").resolve() == folder
    configs = {path.stem: load_config_from_file(str(path)) for path in folder.glob("*.yaml")}
    assert configs.keys() == {"cpu", "single_gpu", "ddp", "zero1", "zero2", "zero3", "fsdp2"}
    assert configs["single_gpu"].num_processes == 1 and configs["ddp"].num_processes == 2
    page = (root / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in configs)

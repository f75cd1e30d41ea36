# SPDX-License-Identifier: Apache-2.0

"""The commands of the README, word for word, in a folder where tiny models have the names of the large ones."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest


README = Path(__file__).parents[2] / "README.md"
SETTINGS = "--dtype float32 --enforce-eager --max-model-len 96 --block-size 32"  # of a tiny engine without a compiler


@pytest.fixture
def folder(folders, tmp_path):
    """A working folder with the models of the README."""
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen3-32B").symlink_to(folders.patient)
    (tmp_path / "qwen3-doctor").symlink_to(folders.helpful)
    return tmp_path


def test_quickstart(folder):
    """The first two lines make an environment, as `make test-vllm` has done here."""
    block = next(x for x in re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.S) if "xargs" in x)
    environment, install, *lines = block.splitlines()
    assert environment.startswith("python -m venv") and install.startswith("pip install") and len(lines) == 4
    script = "\n".join(lines).replace(" &\n", f" {SETTINGS} &\n", 1)
    variables = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(
        ["bash", "-e", "-c", script],
        cwd=folder,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that the server ends with the test
        text=True,
    )
    try:
        answer = next(line for line in process.stdout if line.startswith("{") and "choices" in line)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    answer, _ = json.JSONDecoder().raw_decode(answer)  # the server's log may follow on the line
    assert answer["model"] == "Qwen/Qwen3-32B" and answer["usage"]["completion_tokens"] > 0

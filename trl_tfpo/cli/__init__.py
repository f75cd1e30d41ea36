# SPDX-License-Identifier: Apache-2.0

"""
The command line: `trl-tfpo VERB`, or `python -m trl_tfpo VERB`.

Each verb is a module with a function `run(arguments)`, imported on demand. All verbs except `train` parse their
options before they import torch. Help and option errors therefore appear at once.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Sequence

from .. import __version__
from ..common.printable import printable


VERBS = {  # a module each, with an underscore for a hyphen
    "annotate": "compute token rewards for a preference dataset",
    "train": "train a doctor",
    "strengths": "measure the KL from the patient at several strengths of a doctor",
    "generate": "sample completions from a patient, guided by doctors",
    "evaluate": "compare completions of several methods",
    "eval-harness": "run benchmarks of lm-evaluation-harness on several methods",
    "serve": "run an OpenAI-compatible server, with doctor weights per request",
    "demo": "open the playground, a web page with a slider for each doctor",
    "env": "print versions, for a bug report",
}
RESUME_HINTS = {  # by verb: results that survive an interruption
    "annotate": ": finished shards are kept",
    "train": ": token rewards are kept; add `--resume_from_checkpoint True` to resume from the last checkpoint",
}
FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130  # exit statuses
LAUNCHED = "TRL_TFPO_LAUNCHED"  # environment variable that is set in launched processes


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a verb.

    Args:
        arguments (sequence of `str`, *optional*):
            The verb and its options. Defaults to the arguments of the process.

    Returns:
        `int`: exit status: 0 on success, 1 on an unexpected error, 2 on an error that the user can correct, 130 on an
        interruption, or the status of launched processes. Errors are printed as one line on standard error. If the
        environment variable `TRL_TFPO_TRACEBACK` is set, they are raised instead.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "--version":
        print(f"trl-tfpo {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS) or "."
        return print_error("", f"unknown command {verb!r}{hint} `trl-tfpo --help` lists the commands")
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # progress is printed as lines instead
    if "--quiet" in rest:
        os.environ["TQDM_DISABLE"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        rest = [argument for argument in rest if argument != "--quiet"]
    try:
        return importlib.import_module(f".{verb.replace('-', '_')}", __name__).run(rest) or 0
    except KeyboardInterrupt:
        if LAUNCHED not in os.environ:  # otherwise the launching process prints the message
            kept = RESUME_HINTS.get(verb)
            message = f"interrupted. To resume, run the same command again{kept}." if kept else "interrupted."
            print(f"\ntrl-tfpo {verb}: {message}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("TRL_TFPO_TRACEBACK"):
            raise
        if isinstance(error, (ValueError, OSError, ImportError)):
            return print_error(f" {verb}", str(error) or type(error).__name__)
        print_error(f" {verb}", f"{type(error).__name__}: {error} (TRL_TFPO_TRACEBACK=1 shows where it was raised)")
        return FAILED


def overview() -> str:
    """Return the text of `trl-tfpo --help`."""
    width = max(map(len, VERBS)) + 2
    lines = ["usage: trl-tfpo COMMAND [OPTIONS]", "", "Align a large frozen language model at decoding time.", ""]
    lines += [f"  {name:<{width}}{help_text}" for name, help_text in VERBS.items()]
    lines += [
        "",
        "`trl-tfpo COMMAND --help` lists the options of a command. `trl-tfpo --version` prints the version.",
        "All commands except `env` also accept:",
        "",
        "  --config FILE.yaml  read options from a file; the command line takes precedence",
        "  --quiet             hide progress",
        "",
        "Set TRL_TFPO_TRACEBACK=1 in the environment to see where an error was raised.",
    ]
    return "\n".join(lines)


def print_error(verb: str, message: str) -> int:
    """Print an error as one line on standard error, and return the exit status of a usage error."""
    print(f"trl-tfpo{verb}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return USAGE_ERROR


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `, did you mean NAME?` with the most similar name, or an empty string if none is similar."""
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else ""

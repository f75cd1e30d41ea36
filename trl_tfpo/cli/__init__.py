# SPDX-License-Identifier: Apache-2.0

"""
The command line: `trl-tfpo VERB`, or `python -m trl_tfpo VERB`.

Each verb is a module with `run(arguments)`, which is imported when it is asked for: `trl-tfpo --help` needs nothing else. A
verb reads its options before it imports what takes seconds, so that its help and its complaints are instant as well; only
`train` has options that cannot be known without.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..common.printable import printable


VERBS = {  # each is a module
    "annotate": "give every token of a preference dataset a reward",
    "train": "train a doctor",
    "generate": "let doctors guide a patient",
    "evaluate": "measure completions, and compare methods",
    "serve": "an OpenAI-compatible server with weights for each request",
    "demo": "a page to play with, in the browser",
    "env": "versions, for a bug report",
}
KEPT = {  # what an interruption leaves of a verb
    "annotate": ": finished shards are kept",
    "train": ": token rewards are kept; add `--resume_from_checkpoint True` to go on from the last checkpoint",
}
FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130  # as shells have it
LAUNCHED = "TRL_TFPO_LAUNCHED"  # set in the environment of processes that a verb launched


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a verb.

    Args:
        arguments (sequence of `str`, *optional*):
            The verb and what follows. Defaults to those of the process.

    Returns:
        `int`: exit status: 0, 2 for what the user can mend (one line on standard error says how), 1 for an error that
        nobody foresaw, 130 when interrupted, or that of the processes that were launched.
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
        return complain("", f"unknown command {verb!r}{did_you_mean(verb, VERBS)}. `trl-tfpo --help` lists them")
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # what takes long writes lines instead
    if "--quiet" in rest:
        os.environ["TQDM_DISABLE"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        rest = [argument for argument in rest if argument != "--quiet"]
    try:
        return importlib.import_module(f".{verb}", __name__).run(rest) or 0
    except KeyboardInterrupt:
        if LAUNCHED not in os.environ:  # else it is for the one who launched to say
            message = f"interrupted. To go on, run the same command again{KEPT.get(verb, '')}."
            print(f"\ntrl-tfpo {verb}: {message}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("TRL_TFPO_TRACEBACK"):
            raise
        if isinstance(error, (ValueError, OSError, ImportError)):
            return complain(f" {verb}", str(error) or type(error).__name__)
        complain(f" {verb}", f"{type(error).__name__}: {error} (TRL_TFPO_TRACEBACK=1 shows where it was raised)")
        return FAILED


def overview() -> str:
    """What `--help` prints."""
    width = max(map(len, VERBS)) + 2
    lines = ["usage: trl-tfpo COMMAND [OPTIONS]", "", "Align a large frozen language model at decoding time.", ""]
    lines += [f"  {name:<{width}}{help_text}" for name, help_text in VERBS.items()]
    lines += [
        "",
        "`trl-tfpo COMMAND --help` lists the options of a command; all but `env` take `--config FILE.yaml` and `--quiet`.",
    ]
    return "\n".join([*lines, "With TRL_TFPO_TRACEBACK=1 in the environment an error shows where it was raised."])


def complain(verb: str, message: str) -> int:
    """One line on standard error."""
    print(f"trl-tfpo{verb}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return USAGE_ERROR


def did_you_mean(name: str, names) -> str:
    """The nearest of the names, as a question, if one is near."""
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else ""

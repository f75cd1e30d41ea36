# SPDX-License-Identifier: Apache-2.0

"""Print flags of vLLM's server for a patient with doctors: `trl-tfpo-vllm --help`."""

import argparse
import json
import shlex
import sys

from .config import guided_config


def main(arguments: list[str] | None = None) -> None:
    """Print one line, quoted for a shell. Exit with status 2 and a message on invalid doctors or exponents."""
    parser = argparse.ArgumentParser(
        prog="trl-tfpo-vllm",
        description="Print flags of vLLM's server for a patient with doctors.",
    )
    parser.add_argument("--patient", required=True, help="folder or Hub id of the patient")
    parser.add_argument(
        "--doctor", required=True, action="append", metavar="NAME=FOLDER", type=_pair, help="a doctor; can be repeated"
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        type=_pair,
        help="reference of a doctor, with the opposite exponent; can be the patient",
    )
    parser.add_argument("--alpha", type=float, help="default exponent of the patient")
    parser.add_argument(
        "--beta", action="append", default=[], metavar="NAME=NUMBER", type=_pair, help="default exponent of a doctor"
    )
    given = parser.parse_args(arguments)
    for pairs in (given.doctor, given.reference, given.beta):
        if len(dict(pairs)) < len(pairs):
            parser.error(f"names must differ. Got {[name for name, _ in pairs]}")
    try:
        beta = {name: float(value) for name, value in given.beta}
        config = guided_config(given.patient, dict(given.doctor), given.alpha, beta, dict(given.reference))
    except ValueError as error:
        parser.error(str(error))
    flags = ["--model", config["model"], "--hf-overrides", json.dumps(config["hf_overrides"])]
    sys.stdout.write(shlex.join(flags) + "\n")


def _pair(text: str) -> list[str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE. Got {text!r}")
    return [name, value]


if __name__ == "__main__":
    main()

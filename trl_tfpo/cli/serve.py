# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo serve`: an OpenAI-compatible server."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .parser import DTYPE_HELP, Parser, Repeated


@dataclass
class ServeArguments:
    """Models, address and limits."""

    patient: str | None = field(default=None, metadata={"help": "Hub name or path of the model that speaks."})
    dtype: str = field(default="auto", metadata=DTYPE_HELP)
    patient_load_in_4bit: bool = field(default=False, metadata={"help": "Load it in 4-bit NF4."})
    doctor: list[str] = field(
        default_factory=list, metadata={"action": Repeated, "help": "PATH or NAME=PATH of each doctor."}
    )
    alias: list[str] = field(
        default_factory=list,
        metadata={"action": Repeated, "help": "NAME=DOCTOR:WEIGHT,...: a further model name, with these weights."},
    )
    model_name: str | None = field(default=None, metadata={"help": "What clients call the patient."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0 is the whole network."})
    port: int = field(default=8000, metadata={"help": "Port to listen at; 0 is any that is free."})
    api_key_file: str | None = field(default=None, metadata={"help": "File with the key that clients must send."})
    max_rows: int = field(default=32, metadata={"help": "Completions decoded at once."})
    max_choices: int = field(default=8, metadata={"help": "Completions of one request, over all its prompts."})
    max_prompt_tokens: int = field(default=4096, metadata={"help": "Longest prompt."})
    max_new_tokens: int = field(default=2048, metadata={"help": "Longest completion."})
    max_queue: int = field(default=256, metadata={"help": "Completions that may wait."})
    max_seconds: float = field(default=600.0, metadata={"help": "Longest time for a request."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the models run code of their own."})
    world: bool = field(default=False, metadata={"help": "The patient of the controlled world, to try it."})


def build(args: ServeArguments):
    """The app that the arguments ask for."""
    try:
        from ..server import Engine, Limits, make_app
    except ImportError as error:
        raise ValueError(
            f'the server needs more packages ({error}). Install them: pip install "trl-tfpo[serve]"'
        ) from error

    from .models import load_models

    aliases = read_aliases(args.alias)
    key = None
    if args.api_key_file is not None:
        key = Path(args.api_key_file).read_text(encoding="utf-8").strip()
        if not key:
            raise ValueError(f"`--api_key_file` must hold a key. Got {args.api_key_file!r}, which is empty; write one")
    if not args.world and args.patient is None:
        raise ValueError("a patient is needed. Pass `--patient`, or `--world` to try it")
    patient, tokenizer, doctors = load_models(
        None if args.world else args.patient,
        args.doctor,
        dtype=args.dtype,
        in_4bit=args.patient_load_in_4bit,
        trust_remote_code=args.trust_remote_code,
    )
    limits = Limits(
        max_prompt_tokens=args.max_prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        max_rows=args.max_rows,
        max_choices=args.max_choices,
        max_queue=args.max_queue,
        max_seconds=args.max_seconds,
    )
    default_name = "world" if args.world else Path(args.patient).name
    engine = Engine(patient, tokenizer, doctors, limits)
    return make_app(engine, model_name=args.model_name or default_name, api_key=key, aliases=aliases)


def read_aliases(given: Sequence[str]) -> dict[str, dict[str, float]]:
    """
    Weights of doctors by the name of a model, from NAME=DOCTOR:WEIGHT,... each.

    Raises:
        `ValueError`: when one is not of this form, or a name is given twice.
    """
    aliases = {}
    for text in given:
        name, _, pairs = text.partition("=")
        try:
            weights = {}
            for pair in pairs.split(","):
                doctor, weight = pair.rsplit(":", 1)
                if not doctor or doctor in weights:
                    raise ValueError
                weights[doctor] = float(weight)
            if not name or name in aliases:
                raise ValueError
        except ValueError as error:
            raise ValueError(
                "`--alias` must be NAME=DOCTOR:WEIGHT,DOCTOR:WEIGHT, each name and each doctor once. Got "
                f"{text!r}; write for example `mild=helpful:0.2`"
            ) from error
        aliases[name] = weights
    return aliases


def listen(host: str, port: int) -> socket.socket:
    """
    A socket at an address, before models are loaded, which takes long.

    Raises:
        `ValueError`: when there is no such address, or somebody else is there.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(
            f"`--host` and `--port` must be an address of this machine that is free. Got {host!r} and {port}: {error}"
        ) from error
    return listener


def run(arguments: Sequence[str]) -> int:
    """Serve until interrupted."""
    (args,) = Parser(ServeArguments, "serve", "Serve a patient and its doctors.").parse(arguments)
    with listen(args.host, args.port) as listener:
        app = build(args)
        import uvicorn

        listener.listen()
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"Serving at http://{host}:{listener.getsockname()[1]}/v1 (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            limit_concurrency=2 * (args.max_rows + args.max_queue),  # connections, with those that are refused
        )
        uvicorn.Server(config).run(sockets=[listener])
    return 0

# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo serve`: run an OpenAI-compatible server."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from . import options
from .parser import Parser


if TYPE_CHECKING:
    from fastapi import FastAPI


@dataclass
class ServeArguments:
    """Options of `trl-tfpo serve`."""

    patient: str | None = field(default=None, metadata={"help": "Patient: a Hub name or a folder."})
    dtype: str = field(default="auto", metadata=options.DTYPE)
    patient_load_in_4bit: bool = field(default=False, metadata=options.IN_4BIT)
    doctor: list[str] = field(default_factory=list, metadata=options.DOCTORS)
    kl: float | None = field(
        default=None,
        metadata={
            "help": "Default strength of a single doctor, as a KL from the patient in nats per completion. See "
            "`trl-tfpo strengths`."
        },
    )
    alias: list[str] = field(
        default_factory=list,
        metadata={
            "action": options.Repeated,
            "help": "Additional model names with preset doctor weights, each NAME=DOCTOR:WEIGHT,DOCTOR:WEIGHT.",
        },
    )
    model_name: str | None = field(
        default=None, metadata={"help": "Name of the patient in requests. By default the last part of `--patient`."}
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address of the server. 0.0.0.0 listens on all interfaces."}
    )
    port: int = field(default=8000, metadata={"help": "Port of the server. 0 selects a free port."})
    api_key_file: str | None = field(
        default=None, metadata={"help": "File with the API key for clients. By default no key is required."}
    )
    max_rows: int = field(default=32, metadata={"help": "Maximum completions decoded at once."})
    max_choices: int = field(default=8, metadata={"help": "Maximum completions of a request, over all prompts."})
    max_prompt_tokens: int = field(default=4096, metadata={"help": "Maximum tokens of a prompt."})
    max_new_tokens: int = field(default=2048, metadata={"help": "Maximum tokens of a completion."})
    max_queue: int = field(default=256, metadata={"help": "Maximum completions in the queue."})
    max_seconds: float = field(default=600.0, metadata={"help": "Time limit of a request, in seconds."})
    trust_remote_code: bool = field(default=False, metadata=options.REMOTE_CODE)
    world: bool = field(default=False, metadata={"help": "Serve the patient of the controlled world."})


def run(arguments: Sequence[str]) -> int:
    """Serve until interrupted."""
    description = "Run an OpenAI-compatible server for a patient and doctors, with doctor weights per request."
    (args,) = Parser([ServeArguments], "serve", description).parse(arguments)
    with listen(args.host, args.port) as listener:
        app = build(args)
        import uvicorn

        listener.listen()
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"Serving at http://{host}:{listener.getsockname()[1]}/v1 (Ctrl-C to stop)", flush=True)
        config = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            limit_concurrency=2 * (args.max_rows + args.max_queue),  # connections, including refused requests
        )
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def build(args: ServeArguments) -> "FastAPI":
    """Load the models and make the app."""
    try:
        from ..server import Engine, Limits, make_app
    except ImportError as error:
        raise ValueError(
            f'the server needs more packages ({error}). Install them: pip install "trl-tfpo[serve]"'
        ) from error

    from ..models.strengths import beta_for_kl
    from .models import load_models, parse_doctor

    aliases = read_aliases(args.alias)
    options.check_kl(args.kl, args.doctor)
    strengths = None if args.kl is None else beta_for_kl([parse_doctor(args.doctor[0])[1]], args.kl, {})
    key = None
    if args.api_key_file is not None:
        key = Path(args.api_key_file).read_text(encoding="utf-8").strip()
        if not key:
            raise ValueError(f"`--api_key_file` must hold a key. Got the empty file {args.api_key_file!r}; write one")
    name = None if args.world else args.patient
    if name is None and not args.world:
        raise ValueError("a patient is needed. Pass `--patient`, or `--world` to try it")
    patient, tokenizer, doctors = load_models(
        name,
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
    default_name = "world" if name is None else Path(name).name
    engine = Engine(patient, tokenizer, doctors, limits)
    if strengths is not None:
        beta, table = strengths
        engine.default_weights.update(dict.fromkeys(doctors, beta))
        table.warn_of_other_patient(patient)
    return make_app(engine, model_name=args.model_name or default_name, api_key=key, aliases=aliases)


def read_aliases(given: Sequence[str]) -> dict[str, dict[str, float]]:
    """Parse arguments NAME=DOCTOR:WEIGHT,... and return the weights of doctors, by model name."""
    aliases: dict[str, dict[str, float]] = {}
    for text in given:
        name, _, pairs = text.partition("=")
        try:
            if not name or name in aliases:
                raise ValueError
            aliases[name] = read_weights(pairs)
        except ValueError as error:
            raise ValueError(
                "`--alias` must be NAME=DOCTOR:WEIGHT,DOCTOR:WEIGHT, each name and each doctor once. Got "
                f"{text!r}; write for example `mild=helpful:0.2`"
            ) from error
    return aliases


def read_weights(text: str) -> dict[str, float]:
    """Parse DOCTOR:WEIGHT,DOCTOR:WEIGHT and return the weights by doctor."""
    weights: dict[str, float] = {}
    try:
        for pair in text.split(","):
            doctor, weight = pair.rsplit(":", 1)
            if not doctor or doctor in weights:
                raise ValueError
            weights[doctor] = float(weight)
    except ValueError as error:
        raise ValueError(
            f"Weights must be DOCTOR:WEIGHT,DOCTOR:WEIGHT, each doctor once. Got {text!r}; write for example "
            "`helpful:0.2`"
        ) from error
    return weights


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket. Called before models are loaded. Raises `ValueError` when the address is unavailable."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(
            f"`--host` and `--port` must be a free address of this machine. Got {host!r} and {port}: {error}"
        ) from error
    return listener

# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo demo`: a page to play with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .parser import DTYPE_HELP, Parser, Repeated
from .serve import listen


@dataclass
class DemoArguments:
    """Models and address; without models the controlled world."""

    patient: str | None = field(
        default=None, metadata={"help": "Hub name or path of the model that speaks. By default the controlled world."}
    )
    dtype: str = field(default="auto", metadata=DTYPE_HELP)
    patient_load_in_4bit: bool = field(default=False, metadata={"help": "Load it in 4-bit NF4."})
    doctor: list[str] = field(
        default_factory=list, metadata={"action": Repeated, "help": "PATH or NAME=PATH of each doctor."}
    )
    prompt: list[str] = field(
        default_factory=lambda: ["Hello!"], metadata={"action": Repeated, "help": "Prompts to offer."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at."})
    port: int | None = field(default=None, metadata={"help": "Port to listen at; by default the first free one."})
    cache_dir: str = field(
        default=str(Path.home() / ".cache" / "trl_tfpo" / "doctors"),
        metadata={"help": "Where the doctors of the controlled world are kept."},
    )
    max_steps: int = field(default=200, metadata={"help": "Steps with which they are trained, at the first start."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the models run code of their own."})


def run(arguments: Sequence[str]) -> int:
    """Open the page until interrupted."""
    (args,) = Parser(DemoArguments, "demo", "A page to play with.").parse(arguments)
    if args.patient is None and args.doctor:
        raise ValueError("`--doctor` needs `--patient`. Pass both, or none for the controlled world")
    if args.patient is not None and not args.doctor:
        raise ValueError("`--patient` needs at least one `--doctor` to play with")
    try:
        from ..server import Engine, Limits
        from ..server.playground import launch, make_playground, world_playground
    except ImportError as error:
        raise ValueError(
            f'the playground needs more packages ({error}). Install them: pip install "trl-tfpo[demo]"'
        ) from error

    from ..common.arguments import check_counts

    check_counts(max_steps=args.max_steps, max_new_tokens=args.max_new_tokens)
    listen(args.host, args.port or 0).close()  # Gradio would find out last, and by a traceback
    from .models import load_models

    if args.patient is None:
        import torch

        torch.set_num_threads(1)  # models so small that a second thread only waits for the first
        print(
            f"The first start trains two small doctors, about a minute, and keeps them in {args.cache_dir}.",
            flush=True,
        )
        page = world_playground(args.cache_dir, max_steps=args.max_steps)
    else:
        patient, tokenizer, doctors = load_models(
            args.patient,
            args.doctor,
            dtype=args.dtype,
            in_4bit=args.patient_load_in_4bit,
            trust_remote_code=args.trust_remote_code,
        )
        engine = Engine(patient, tokenizer, doctors, Limits(max_new_tokens=args.max_new_tokens))
        page = make_playground(engine, example_prompts=args.prompt, max_new_tokens=args.max_new_tokens)
    print(f"Open {launch(page, host=args.host, port=args.port)} (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0

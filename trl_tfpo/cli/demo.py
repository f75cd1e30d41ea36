# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo demo`: open the playground."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import options
from .parser import Parser
from .serve import listen


@dataclass
class DemoArguments:
    """Options of `trl-tfpo demo`."""

    patient: str | None = field(
        default=None, metadata={"help": "Patient: a Hub name or a folder. By default the controlled world is shown."}
    )
    dtype: str = field(default="auto", metadata=options.DTYPE)
    patient_load_in_4bit: bool = field(default=False, metadata=options.IN_4BIT)
    doctor: list[str] = field(default_factory=list, metadata=options.DOCTORS)
    prompt: list[str] = field(
        default_factory=lambda: ["Hello!"], metadata={"action": options.Repeated, "help": "Prompts to choose from."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum length of an answer, in tokens."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address of the server."})
    port: int | None = field(
        default=None, metadata={"help": "Port of the server. By default Gradio takes the first free one."}
    )
    cache_dir: str = field(
        default=str(Path.home() / ".cache" / "trl_tfpo" / "doctors"),
        metadata={"help": "Folder for the doctors of the controlled world. The first start trains them."},
    )
    max_steps: int = field(default=200, metadata={"help": "Training steps of these doctors."})
    trust_remote_code: bool = field(default=False, metadata=options.REMOTE_CODE)


def run(arguments: Sequence[str]) -> int:
    """Open the page until interrupted."""
    description = "Open the playground: a web page with a slider for each doctor."
    (args,) = Parser([DemoArguments], "demo", description).parse(arguments)
    if args.patient is None and args.doctor:
        raise ValueError("`--doctor` needs `--patient`. Pass both, or none for the controlled world")
    if args.patient is not None and not args.doctor:
        raise ValueError("`--patient` needs at least one `--doctor`. Pass it as well")
    try:
        from ..server import Engine, Limits
        from ..server.playground import launch, make_playground, world_playground
    except ImportError as error:
        raise ValueError(
            f'the playground needs more packages ({error}). Install them: pip install "trl-tfpo[demo]"'
        ) from error

    from ..common.arguments import check_counts

    check_counts(max_steps=args.max_steps, max_new_tokens=args.max_new_tokens)
    listen(args.host, args.port or 0).close()  # Gradio would fail after loading, with a traceback
    from .models import load_models

    if args.patient is None:
        import torch

        torch.set_num_threads(1)  # the models are so small that more threads are slower
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

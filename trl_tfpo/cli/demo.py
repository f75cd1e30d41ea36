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
        default=None, metadata={"help": "Patient: a Hub name or a folder. By default that of the controlled world."}
    )
    dtype: str = field(default="auto", metadata=options.DTYPE)
    patient_load_in_4bit: bool = field(default=False, metadata=options.IN_4BIT)
    doctor: list[str] = field(default_factory=list, metadata=options.DOCTORS)
    prompt: list[str] = field(
        default_factory=lambda: ["Hello!"],
        metadata={"action": options.Repeated, "help": "Example prompts on the page."},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum length of an answer, in tokens."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address of the server."})
    port: int | None = field(
        default=None, metadata={"help": "Port of the server. By default Gradio uses the first free port."}
    )
    cache_dir: str = field(
        default=str(Path.home() / ".cache" / "trl_tfpo" / "doctors"),
        metadata={"help": "Folder for the doctors of the controlled world. They are trained at the first start."},
    )
    max_steps: int = field(default=200, metadata={"help": "Training steps of the doctors of the controlled world."})
    trust_remote_code: bool = field(default=False, metadata=options.REMOTE_CODE)


def run(arguments: Sequence[str]) -> int:
    """Serve the page until interrupted."""
    description = "Open the playground: a web page with a slider for each doctor."
    (args,) = Parser([DemoArguments], "demo", description).parse(arguments)
    if (args.patient is None) == bool(args.doctor):
        raise ValueError("`--patient` and `--doctor` must be passed together. Got one; pass both, or neither")
    try:
        from ..server import Engine, Limits
        from ..server.playground import launch, make_playground, world_playground
    except ImportError as error:
        raise ValueError(
            f'the playground needs more packages ({error}). Install them: pip install "trl-tfpo[demo]"'
        ) from error

    from ..common.arguments import check_counts

    check_counts(max_steps=args.max_steps, max_new_tokens=args.max_new_tokens)
    listen(args.host, args.port or 0).close()  # report a bad address now: Gradio would fail after loading
    from .models import load_models

    if args.patient is None:
        import torch

        torch.set_num_threads(1)  # models this small are slower with more threads
        print(
            f"The first start trains two small doctors. It takes about a minute. They are saved in {args.cache_dir}.",
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
    print(f"Open {launch(page, host=args.host, port=args.port)} (Ctrl-C to stop)", flush=True)
    page.block_thread()
    return 0

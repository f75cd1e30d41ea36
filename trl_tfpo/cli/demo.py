# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo demo`: open the playground."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..common.cache import cached_models, default_cache
from . import options
from .parser import Parser
from .serve import listen


QUESTIONS = [
    "What is living alone like? Answer in one short sentence.",
    "What is it like to move to a new town? Answer in one short sentence.",
    "How do I learn to cook? Answer in one short sentence.",
]


@dataclass
class DemoArguments:
    """Options of `trl-tfpo demo`."""

    patient: str | None = field(
        default=None,
        metadata={
            "help": "Patient: a Hub name or a folder. By default the model in the cache of trl-tfpo if it has a "
            "doctor, otherwise the patient of the controlled world."
        },
    )
    world: bool = field(default=False, metadata={"help": "Open the controlled world, whatever is in the cache."})
    dtype: str = field(default="auto", metadata=options.DTYPE)
    patient_load_in_4bit: bool = field(default=False, metadata=options.IN_4BIT)
    doctor: list[str] = field(default_factory=list, metadata=options.DOCTORS)
    prompt: list[str] = field(
        default_factory=lambda: list(QUESTIONS),
        metadata={"action": options.Repeated, "help": "Example prompts on the page, for a real patient."},
    )
    max_new_tokens: int = field(
        default=256, metadata={"help": "Maximum length of an answer in tokens, for a real patient."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address of the server."})
    port: int | None = field(
        default=None, metadata={"help": "Port of the server. By default Gradio uses the first free port."}
    )
    cache_dir: str = field(
        default_factory=lambda: str(default_cache() / "doctors" / "world"),
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
    if args.world and args.patient is not None:
        raise ValueError("`--world` has its own patient and doctors. Got `--patient` with it; leave one of them out")
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
    choose_models(args)
    if args.patient is None:
        import torch

        torch.set_num_threads(1)  # models this small are slower with more threads
        print(
            f"The first start trains two small doctors. It takes about a minute. They are saved in {args.cache_dir}.",
            flush=True,
        )
        page = world_playground(args.cache_dir, max_steps=args.max_steps)
    else:
        from .models import load_models

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


def choose_models(args: DemoArguments) -> None:
    """Without `--patient`, use the cached model and its doctors, if any. Print what is shown, and the alternative."""
    if args.patient is not None:
        return
    cache = default_cache()
    found = cached_models(cache)
    if found is None:
        said = (
            f"This is the controlled world, because no model with a doctor is in {cache}. To align "
            "SmolLM2-135M-Instruct there, run `make demo-real` in a clone of the repository. It takes about twelve "
            "minutes on two cores."
        )
    elif args.world:
        said = f"This is the controlled world. Without --world, the page shows {found[0]}."
    else:
        args.patient, args.doctor = str(found[0]), [str(path) for path in found[1]]
        names = ", ".join(path.name for path in found[1])
        said = f"The patient is {args.patient}. Doctors: {names}. With --world, the page shows the controlled world."
    print(said, flush=True)

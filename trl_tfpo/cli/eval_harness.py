# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo eval-harness`: tasks of lm-evaluation-harness, on the patient and on guided policies."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.printable import printable
from . import did_you_mean, options
from .endpoint_methods import read_exponents
from .engines import name_endpoint
from .parser import Parser


if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

Exponents = tuple[Mapping[str, float] | None, float | None]  # weights of doctors, `None` for the defaults; alpha


@dataclass(kw_only=True)
class HarnessArguments(options.GuideArguments):
    """Options of `trl-tfpo eval-harness`."""

    tasks: list[str] = field(
        metadata={"action": options.Repeated, "help": "Names of tasks and groups, separated by spaces or commas."}
    )
    output_dir: str = field(metadata={"help": "Folder for the results of each method, `NAME.json`."})
    include_path: list[str] = field(
        default_factory=list, metadata={"action": options.Repeated, "help": "Folders with more tasks."}
    )
    method: list[str] = field(
        default_factory=list,
        metadata={
            "action": options.Repeated,
            "help": "Methods to compare, NAME=DOCTOR:WEIGHT,DOCTOR:WEIGHT. `alpha:X` sets the exponent of "
            "the patient; other doctors have 0. NAME alone is the patient. By default `patient`, and `guided` by all "
            "doctors.",
        },
    )
    base_url: str | None = field(default=None, metadata=options.BASE_URL)
    model: str | None = field(default=None, metadata=options.MODEL)
    num_requests: int = field(default=32, metadata=options.NUM_REQUESTS)
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Examples in the context of a question. By default those of the task."}
    )
    apply_chat_template: bool = field(default=False, metadata={"help": "Put questions into the chat template."})
    limit: float | None = field(
        default=None, metadata={"help": "Questions per task, or their share if below 1. By default all."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest text in tokens; the beginning of a longer one is cut off. By default the smallest "
            "context of the models, and 2048 at an endpoint."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Texts that models in this process read at once."})
    seed: int = field(default=1234, metadata={"help": "Seed of few-shot examples and of sampling."})
    log_samples: bool = field(default=False, metadata={"help": "Write the answer to each question, too."})
    trust_remote_code: bool = field(default=False, metadata=options.REMOTE_CODE)
    overwrite: bool = field(default=False, metadata=options.OVERWRITE)
    world: bool = field(default=False, metadata={"help": "Use the patient of the controlled world."})


def run(arguments: Sequence[str]) -> int:
    """Evaluate each method on the tasks, write its results, and print a table of all methods."""
    description = "Run benchmarks of lm-evaluation-harness on a patient, alone and guided by doctors."
    (args,) = Parser([HarnessArguments], "eval-harness", description).parse(arguments)
    methods = check_arguments(args)
    try:
        from ..evaluation import harness
    except ImportError as error:
        raise ValueError(
            f'the benchmarks need more packages ({error}). Install them: pip install "trl-tfpo[harness]"'
        ) from error
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    from ..common.atomic import atomic_write
    from .files import check_output

    files = {name: Path(args.output_dir) / f"{name}.json" for name in methods}
    for file in files.values():
        check_output(file, overwrite=args.overwrite)
    tasks, manager = find_tasks(args)
    results = {}
    models = load_methods(args, methods) if args.base_url is None else name_methods(args, methods)
    for name, model in models.items():
        with progress_bars():
            found = simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                batch_size=args.batch_size,
                apply_chat_template=args.apply_chat_template,
                log_samples=args.log_samples,
                torch_random_seed=args.seed,
                numpy_random_seed=args.seed,
                fewshot_random_seed=args.seed,
            )
        results[name] = found
        with atomic_write(files[name]) as part:
            text = json.dumps(found, indent=2, default=handle_non_serializable, ensure_ascii=False)
            part.write_text(text + "\n", encoding="utf-8")
    table = "\n".join(map(printable, harness.results_table(results).splitlines()))
    print(f"{table}\n\nResults: {', '.join(map(str, files.values()))}.")
    return 0


def check_arguments(args: HarnessArguments) -> dict[str, Exponents]:
    """Raise `ValueError` on invalid options, before anything is loaded. Returns the exponents of each method."""
    if args.base_url is None:
        if args.model is not None:
            raise ValueError("`--model` is for an endpoint. Got it without `--base_url`; pass both")
        if not args.world and args.patient is None:
            raise ValueError("a patient is needed. Pass `--patient`, or `--world` to try it")
    elif args.doctor or args.patient_load_in_4bit:
        raise ValueError("An endpoint has its own models. Got `--doctor` or `--patient_load_in_4bit`; leave them out")
    elif not args.world and args.patient is None:
        raise ValueError("Questions are sent as token ids. Pass the patient's tokenizer with `--patient`")
    counts = (args.batch_size, *(x for x in (args.max_length, args.limit) if x is not None))
    if min(counts) <= 0 or args.num_fewshot is not None and args.num_fewshot < 0:
        raise ValueError(
            "`--batch_size`, `--max_length` and `--limit` must be positive, and `--num_fewshot` at least 0. Got "
            f"{args.batch_size}, {args.max_length}, {args.limit} and {args.num_fewshot}; leave them out"
        )
    methods: dict[str, Exponents] = dict(read_exponents(args.method))
    if args.method or not args.doctor:
        if args.beta or args.alpha is not None:
            raise ValueError(
                "`--alpha` and `--beta` are for `--doctor` without `--method`. Got them with `--method` or without "
                "`--doctor`; write exponents as `--method mild=helpful:0.2,alpha:1`"
            )
    elif args.beta and len(args.beta) != len(args.doctor):
        raise ValueError(
            f"`--beta` must have a number for each doctor. Got {len(args.beta)} for {len(args.doctor)}; pass one for "
            "each"
        )
    if not methods:
        methods = {"patient": ({}, None)} | ({"guided": (None, args.alpha)} if args.doctor else {})
    if unusable := [name for name in methods if Path(name).name != name]:
        raise ValueError(f"The name of a method must be a file name. Got {unusable[0]!r}; leave out the slash")
    return methods


def find_tasks(args: HarnessArguments) -> "tuple[list[str], TaskManager]":
    """
    Return the names of the tasks, and the task manager of the harness.

    If the user's folders contain all requested tasks, the manager reads only these folders, because reading all tasks
    of the harness is slow.
    """
    from lm_eval.tasks import TaskManager

    tasks = [name for text in args.tasks for name in text.split(",") if name]
    if missing := [path for path in args.include_path if not Path(path).is_dir()]:
        raise ValueError(f"`--include_path` must be a folder. Got {missing[0]!r}; check the path")
    manager = TaskManager(include_path=list(args.include_path), include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=list(args.include_path))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown or not tasks:
        hint = did_you_mean(unknown[0], manager.all_tasks) if unknown else ""
        raise ValueError(
            "`--tasks` must name tasks of the harness, or of a folder in `--include_path`. Got "
            f"{unknown[0] if unknown else ''!r}{hint or '; `lm_eval ls tasks` lists them'}"
        )
    return tasks, manager


def load_methods(args: HarnessArguments, methods: Mapping[str, Exponents]) -> "dict[str, LM]":
    """Return the model of each method. All methods share the patient and the doctors."""
    from ..decoding.exponents import default_beta
    from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
    from ..evaluation.harness import GuidedLM, context_length
    from ..models.trained_exponents import trained_exponents
    from .models import load_models

    patient, tokenizer, doctors = load_models(
        None if args.world else args.patient,
        args.doctor,
        dtype=args.dtype,
        in_4bit=args.patient_load_in_4bit,
        trust_remote_code=args.trust_remote_code,
    )
    betas = args.beta or [default_beta(trained_exponents(doctor)) for doctor in doctors.values()]
    guides: dict[str, DoctorGuidedLogitsProcessor | None] = {}
    for name, (weights, alpha) in methods.items():
        if unknown := sorted({*(weights or {})} - {*doctors}):
            raise ValueError(f"`--method` must name doctors among {list(doctors)}. Got {unknown[0]!r} in {name!r}")
        of_method = betas if weights is None else [weights.get(doctor, 0.0) for doctor in doctors]
        is_guided = weights is None or bool(weights) or alpha is not None
        guides[name] = DoctorGuidedLogitsProcessor(list(doctors.values()), alpha, of_method) if is_guided else None
    settings: dict[str, Any] = {"batch_size": args.batch_size, "max_length": args.max_length}
    shortest = min(map(context_length, doctors.values()), default=math.inf)
    if args.max_length is None and shortest < context_length(patient):
        settings["max_length"] = shortest
    with quiet_harness():
        return {name: GuidedLM(patient, guide=guides[name], tokenizer=tokenizer, **settings) for name in methods}


def name_methods(args: HarnessArguments, methods: Mapping[str, Exponents]) -> "dict[str, LM]":
    """Return the model of each method at an endpoint."""
    from ..evaluation.harness import GuidedEndpointLM
    from ..testbed import load_world

    endpoint = name_endpoint(str(args.base_url), args.model or args.patient or "world", args.num_requests)
    tokenizer = args.patient or str(load_world().weights / "patient")
    settings: dict[str, Any] = {"tokenizer": tokenizer, "trust_remote_code": args.trust_remote_code, "seed": args.seed}
    if args.max_length is not None:
        settings["max_length"] = args.max_length
    return {
        name: GuidedEndpointLM(endpoint=endpoint, weights=weights, alpha=alpha, **settings)
        for name, (weights, alpha) in methods.items()
    }


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Within the context the harness does not warn that the models are loaded already."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def progress_bars() -> Iterator[None]:
    """Within the context `TQDM_DISABLE` hides the bars of the harness, which enables them explicitly."""
    from tqdm import tqdm

    make = tqdm.__init__

    def make_disabled(bar: tqdm, *args: object, **kwargs: object) -> None:
        make(bar, *args, **kwargs | {"disable": True})

    if os.environ.get("TQDM_DISABLE") == "1":
        tqdm.__init__ = make_disabled
    try:
        yield
    finally:
        tqdm.__init__ = make

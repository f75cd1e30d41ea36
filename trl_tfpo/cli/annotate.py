# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo annotate`: compute token rewards for a preference dataset."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

from . import options
from .engines import EngineArguments, check_engine, name_scorer
from .parser import Parser


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..faces import Faces, Placement
    from ..models.named_model import NamedModel


@dataclass
class AnnotateArguments:
    """Options of `trl-tfpo annotate`."""

    output: str = field(metadata={"help": "Output: a `.jsonl` or `.parquet` file, or a folder."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Preference dataset: a Hub name, a folder, or a JSON Lines or Parquet file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to annotate."})
    patient: str | None = field(default=None, metadata=options.PATIENT)
    dtype: str = field(default="auto", metadata=options.DTYPE)
    patient_load_in_4bit: bool = field(default=False, metadata=options.IN_4BIT)
    patient_load_in_8bit: bool = field(default=False, metadata={"help": "Load the patient in 8 bits."})
    trust_remote_code: bool = field(default=False, metadata=options.REMOTE_CODE)
    faces: str = field(default="helpfulness", metadata=options.FACES)
    positive_face: str | None = field(default=None, metadata=options.POSITIVE_FACE)
    negative_face: str | None = field(default=None, metadata=options.NEGATIVE_FACE)
    face_placement: str = field(default="system", metadata=options.FACE_PLACEMENT)
    max_length: int | None = field(
        default=None, metadata={"help": "Maximum tokens of prompt and completion. Longer completions are truncated."}
    )
    drop_unusable: bool = field(default=False, metadata={"help": "Drop unusable pairs. By default they are an error."})
    convert_transcripts: bool = field(
        default=False, metadata={"help": "Convert texts with 'Human:' and 'Assistant:' turns to messages."}
    )
    scoring_batch_size: int = field(default=16, metadata={"help": "Sequences per forward pass of the patient."})
    reward_direction: str = field(
        default="agreement", metadata={"help": "Source of the sign of rewards: 'label', 'agreement' or 'faces'."}
    )
    disagreement_weight: float = field(
        default=0.5, metadata={"help": "With 'agreement': factor for rewards whose sign contradicts the label."}
    )
    importance_temperature: float = field(default=3.0, metadata={"help": "Importance temperature (tau in the paper)."})
    gap_floor: float = field(
        default=0.05, metadata={"help": "Nats added to the mean absolute gap of a completion (epsilon in the paper)."}
    )
    sparsity_threshold: float = field(
        default=0.3, metadata={"help": "Largest importance that gets reward 0, in [0, 1) (theta in the paper)."}
    )
    show: int = field(default=0, metadata={"help": "Number of pairs to print as heat maps."})
    report: str | None = field(
        default=None, metadata={"help": "Folder for a plot and a web page of the reward distribution."}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Also push the result to this Hub dataset."})
    overwrite: bool = field(default=False, metadata=options.OVERWRITE)
    world: str | None = field(
        default=None,
        metadata={"help": "Annotate pairs sampled in the controlled world, for 'praise' or 'calm'."},
    )
    num_pairs: int = field(default=100, metadata={"help": "With `--world`: number of pairs to sample."})


def resolve_given_faces(faces: str, positive: str | None, negative: str | None, placement: str) -> "Faces":
    """Return the two given prompts as faces, or the built-in pair `faces` if neither is given."""
    from ..faces import Faces, resolve_faces

    place = cast("Placement", placement)  # checked by `Faces`
    if positive is not None and negative is not None:
        return Faces(positive=positive, negative=negative, placement=place)
    if positive is not None or negative is not None:
        raise ValueError("Faces are a pair. Got only one of `--positive_face` and `--negative_face`; give both.")
    return replace(resolve_faces(faces), placement=place)


def run(arguments: Sequence[str]) -> int:
    """Annotate, in one process or several."""
    description = (
        "Compute token rewards for a preference dataset. Also accepts options of `accelerate launch`, such as "
        "`--num_processes 8` or `--accelerate_config ddp`."
    )
    parsed = Parser([AnnotateArguments, EngineArguments], "annotate", description).parse_or_launch(arguments)
    if isinstance(parsed, int):
        return parsed
    args, engine = parsed
    quantized = [name for name in ("patient_load_in_4bit", "patient_load_in_8bit") if getattr(args, name)]
    check_engine(
        engine, for_transformers=[*quantized, *(["world"] if args.world and engine.backend == "vllm" else [])]
    )
    names = input_names(args)
    faces = resolve_given_faces(args.faces, args.positive_face, args.negative_face, args.face_placement)

    import torch
    from accelerate import PartialState

    from ..annotation.token_rewards import annotate_token_rewards
    from .files import check_output

    # With `cpu=False`, processes on CPUs would not be connected
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_output(args.output, overwrite=args.overwrite)
    if names is None:
        dataset, patient, tokenizer, faces = sample_world(args, faces, state.device)
    else:
        dataset, patient, tokenizer = load_inputs(args, *names)
    scorer, eos_token_ids = name_scorer(
        engine, args.patient, dtype=args.dtype, trust_remote_code=args.trust_remote_code
    )
    annotated = annotate_token_rewards(
        dataset,
        scorer or patient,
        tokenizer,
        faces=faces,
        max_length=args.max_length,
        drop_unusable=args.drop_unusable,
        convert_transcripts=args.convert_transcripts,
        batch_size=args.scoring_batch_size,
        eos_token_ids=eos_token_ids,
        reward_direction=args.reward_direction,
        disagreement_weight=args.disagreement_weight,
        importance_temperature=args.importance_temperature,
        gap_floor=args.gap_floor,
        sparsity_threshold=args.sparsity_threshold,
    )
    if state.is_main_process:
        write_outputs(args, annotated, tokenizer)
    if state.num_processes > 1:  # vLLM has groups of its own in a single process
        state.destroy_process_group()
    return 0


def input_names(args: AnnotateArguments) -> tuple[str, str] | None:
    """Check options. Return the names of dataset and patient, or `None` for the controlled world."""
    if args.show < 0 or args.scoring_batch_size < 1:
        raise ValueError(
            "`--show` must be at least 0, and `--scoring_batch_size` at least 1. Got "
            f"{args.show} and {args.scoring_batch_size}; leave them out for the defaults"
        )
    if args.world is not None:
        return None
    if args.dataset_name is None or args.patient is None:
        raise ValueError(
            "`annotate` needs preferences and a patient. Pass `--dataset_name` and `--patient`, or `--world praise` "
            "to try it"
        )
    return args.dataset_name, args.patient


def load_inputs(
    args: AnnotateArguments, dataset_name: str, patient_name: str
) -> "tuple[Dataset, NamedModel | PreTrainedModel, PreTrainedTokenizerBase]":
    """Return the dataset, the patient (not loaded yet) and its tokenizer."""
    from .files import read_split
    from .models import name_patient

    dataset = read_split(dataset_name, args.dataset_split, args.dataset_config)
    patient, tokenizer = name_patient(
        patient_name,
        dtype=args.dtype,
        in_4bit=args.patient_load_in_4bit,
        in_8bit=args.patient_load_in_8bit,
        trust_remote_code=args.trust_remote_code,
    )
    return dataset, patient, tokenizer


def sample_world(
    args: AnnotateArguments, faces: "Faces", device: "torch.device"
) -> "tuple[Dataset, NamedModel | PreTrainedModel, PreTrainedTokenizerBase, Faces]":
    """Return pairs, patient, tokenizer and faces of the controlled world. Custom faces replace the world's faces."""
    from ..testbed import load_world

    world = load_world()
    if args.world not in world.attributes:
        raise ValueError(f"`--world` must be one of {sorted(world.attributes)}. Got {args.world!r}")
    if args.positive_face is None:
        faces = replace(world.attributes[args.world].faces, placement=faces.placement)
    dataset = world.preference_dataset(args.world, num_pairs=args.num_pairs, seed=0)
    patient = world.patient.to(device)  # type: ignore[arg-type]  # Transformers wraps `to` without its types
    return dataset, patient, world.tokenizer, faces


def write_outputs(args: AnnotateArguments, annotated: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write the annotated dataset, then print, plot and push it if requested."""
    from ..annotation.agreement import warn_unless_faces_separate
    from ..annotation.report import reward_report, show_token_rewards
    from .files import push_dataset, write_dataset

    write_dataset(annotated, args.output)
    for row in annotated.select(range(min(args.show, len(annotated)))):
        print(show_token_rewards(row, tokenizer))
    if args.report is None:
        warn_unless_faces_separate(annotated)
    else:
        reward_report(annotated, tokenizer, args.report)
    if args.push_to_hub is not None:
        push_dataset(annotated, args.push_to_hub)
    print(f"{len(annotated)} pairs with token rewards: {args.output}")

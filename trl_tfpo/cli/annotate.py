# SPDX-License-Identifier: Apache-2.0

"""`trl-tfpo annotate`: preferences in, token rewards out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .parser import DTYPE_HELP, Parser, old_name


if TYPE_CHECKING:
    from ..faces import Faces


@dataclass
class AnnotateArguments:
    """Models, data, faces and rewards."""

    output: str = field(metadata={"help": "A `.jsonl` or `.parquet` file, or a folder for `datasets.load_from_disk`."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Preferences: a Hub name, a folder, or a JSON lines or Parquet file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split to annotate."})
    patient: str | None = field(
        default=None,
        metadata={
            "aliases": old_name("patient_model_name_or_path"),
            "help": "Hub name or path of the model that is asked.",
        },
    )
    dtype: str = field(default="auto", metadata=DTYPE_HELP)
    patient_load_in_4bit: bool = field(default=False, metadata={"help": "Load it in 4-bit NF4."})
    patient_load_in_8bit: bool = field(default=False, metadata={"help": "Load it in 8 bits."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the model run code of its own."})
    faces: str = field(
        default="helpfulness", metadata={"help": "Built-in faces: 'helpfulness', 'harmlessness' or 'honesty'."}
    )
    positive_face: str | None = field(default=None, metadata={"help": "Your own faces: the wanted behaviour."})
    negative_face: str | None = field(default=None, metadata={"help": "Your own faces: its opposite."})
    face_placement: str = field(
        default="system",
        metadata={"help": "Where the faces stand: 'system', or 'user', at the end of the last user message."},
    )
    max_length: int | None = field(default=None, metadata={"help": "Cut completions to this many tokens with prompt."})
    drop_unusable: bool = field(default=False, metadata={"help": "Leave out pairs that cannot be used."})
    convert_transcripts: bool = field(
        default=False, metadata={"help": "Read transcripts with turns of 'Human:' and 'Assistant:' as messages."}
    )
    scoring_batch_size: int = field(default=16, metadata={"help": "Sequences in one forward of the patient."})
    reward_direction: str = field(default="agreement", metadata={"help": "'label', 'agreement' or 'faces'."})
    disagreement_weight: float = field(
        default=0.5, metadata={"help": "What is left of a reward that the label contradicts, by 'agreement'."}
    )
    importance_temperature: float = field(default=3.0, metadata={"help": "tau in the paper."})
    gap_floor: float = field(default=0.05, metadata={"help": "epsilon in the paper, in nats."})
    sparsity_threshold: float = field(default=0.3, metadata={"help": "theta in the paper, in [0, 1)."})
    show: int = field(default=0, metadata={"help": "Print the rewards of this many pairs as a heat map."})
    report: str | None = field(
        default=None, metadata={"help": "Folder for a picture and a page that show what all rewards look like."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Push the result, with its card, to this dataset repository as well."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an output that exists."})
    world: str | None = field(
        default=None,
        metadata={
            "help": "Annotate the controlled world: 'praise' or 'calm'. Needs no models or data, and has its own faces, "
            "unless you give yours."
        },
    )
    num_pairs: int = field(default=100, metadata={"help": "Pairs to draw in the controlled world."})


def resolve_given_faces(faces: str, positive: str | None, negative: str | None, placement: str) -> "Faces":
    """Faces of one's own, or the built-in pair of that name, at their place."""
    if (positive is None) != (negative is None):
        raise ValueError("Faces are a pair. Got only one of `--positive_face` and `--negative_face`; give both.")
    from ..faces import Faces, resolve_faces

    if positive is None:
        return replace(resolve_faces(faces), placement=placement)
    return Faces(positive=positive, negative=negative, placement=placement)


def run(arguments: Sequence[str]) -> int:
    """Annotate, in as many processes as are asked for."""
    parser = Parser(AnnotateArguments, "annotate", "Give every token of a preference dataset a reward.")
    parsed = parser.parse_or_launch(arguments, "annotate")
    if isinstance(parsed, int):
        return parsed
    (args,) = parsed
    if args.show < 0 or args.scoring_batch_size < 1:
        raise ValueError(
            "`--show` must not be negative, and `--scoring_batch_size` at least 1. Got "
            f"{args.show} and {args.scoring_batch_size}; leave them out for the defaults"
        )
    if args.world is None and (args.dataset_name is None or args.patient is None):
        raise ValueError(
            "`annotate` needs preferences and a patient. Pass `--dataset_name` and `--patient`, or `--world praise` to try "
            "it"
        )
    faces = resolve_given_faces(args.faces, args.positive_face, args.negative_face, args.face_placement)

    import torch
    from accelerate import PartialState

    from ..annotation.token_rewards import annotate_token_rewards
    from .files import check_output, push_dataset, read_split, write_dataset
    from .models import name_patient

    # Else processes on CPUs would not know of each other
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_output(args.output, overwrite=args.overwrite)
    if args.world is not None:
        from ..testbed import load_world

        world = load_world()
        if args.world not in world.attributes:
            raise ValueError(f"`--world` must be one of {sorted(world.attributes)}. Got {args.world!r}")
        patient, tokenizer = world.patient.to(state.device), world.tokenizer
        dataset = world.preference_dataset(args.world, num_pairs=args.num_pairs, seed=0)
        if args.positive_face is None:
            faces = replace(world.attributes[args.world].faces, placement=args.face_placement)
    else:
        dataset = read_split(args.dataset_name, args.dataset_split, args.dataset_config)
        patient, tokenizer = name_patient(
            args.patient,
            dtype=args.dtype,
            in_4bit=args.patient_load_in_4bit,
            in_8bit=args.patient_load_in_8bit,
            trust_remote_code=args.trust_remote_code,
        )
    annotated = annotate_token_rewards(
        dataset,
        patient,
        tokenizer,
        faces=faces,
        max_length=args.max_length,
        drop_unusable=args.drop_unusable,
        convert_transcripts=args.convert_transcripts,
        batch_size=args.scoring_batch_size,
        reward_direction=args.reward_direction,
        disagreement_weight=args.disagreement_weight,
        importance_temperature=args.importance_temperature,
        gap_floor=args.gap_floor,
        sparsity_threshold=args.sparsity_threshold,
    )
    if state.is_main_process:
        from ..annotation.agreement import warn_unless_faces_separate
        from ..annotation.report import reward_report, show_token_rewards

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
    state.destroy_process_group()
    return 0

# SPDX-License-Identifier: Apache-2.0

"""Options that several verbs share, and their metadata, for `transformers.HfArgumentParser`."""

from argparse import Action, ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field


class Repeated(Action):
    """Action of a list option that may be repeated: `--doctor a b` equals `--doctor a --doctor b`."""

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        # Values of the command line replace the default, which may come from a configuration file
        setattr(namespace, self.dest, values if before is self.default else [*before, *(values or [])])


def option_strings(name: str) -> list[str]:
    """Return both spellings of an option, with underscores and with hyphens."""
    return [f"--{name}", f"--{name.replace('_', '-')}"]


OLD_PATIENT = option_strings("patient_model_name_or_path")
PATIENT = {"aliases": OLD_PATIENT, "help": "Patient: a Hub name or a folder."}
IN_4BIT = {"help": "Load the patient in 4-bit NF4."}
DOCTORS = {"action": Repeated, "help": "Doctors, each PATH or NAME=PATH."}
KL = {
    "help": "Strength of a single doctor as a KL from the patient, in nats per completion, instead of exponents. See "
    "`trl-tfpo strengths`."
}
ALPHA = {"help": "Exponent of the patient. By default 1 minus the exponents of doctors that are language models."}
BETA = {
    "action": Repeated,
    "help": "Exponent of each doctor. By default the exponent used in training, or 0.5 for a language model.",
}
DTYPES = ("auto", "bfloat16", "float16", "float32")
DTYPE = {
    "help": "Data type: 'bfloat16', 'float16', 'float32' or 'auto' (that of the checkpoint, but float32 on a CPU "
    "without bfloat16 instructions)."
}
REMOTE_CODE = {"help": "Run code from the model repositories."}
FACES = {"help": "Pair of contrastive prompts: 'helpfulness', 'harmlessness' or 'honesty'."}
POSITIVE_FACE = {"help": "Custom contrastive prompt for the desired behaviour."}
NEGATIVE_FACE = {"help": "Custom contrastive prompt for the opposite behaviour."}
FACE_PLACEMENT = {"help": "Place of the contrastive prompts: 'system', or 'user' (end of the last user message)."}
OVERWRITE = {"help": "Replace existing outputs."}
BACKEND = {"help": "Engine of the patient: 'transformers', 'vllm' (in this process) or 'openai' (an endpoint)."}
BASE_URL = {"help": "URL of an OpenAI-compatible endpoint, ending in `/v1`. The key is read from OPENAI_API_KEY."}
MODEL = {"help": "Name of the model at the endpoint. By default the value of `--patient`, or 'world'."}
NUM_REQUESTS = {"help": "Requests in flight at the endpoint."}
ENGINE_ARGS = {"help": "With the backend 'vllm': arguments of `vllm.LLM`, as JSON."}


@dataclass(kw_only=True)
class GuideArguments:
    """Options for a patient and the doctors that guide it."""

    patient: str | None = field(default=None, metadata=PATIENT)
    dtype: str = field(default="auto", metadata=DTYPE)
    patient_load_in_4bit: bool = field(default=False, metadata=IN_4BIT)
    doctor: list[str] = field(default_factory=list, metadata=DOCTORS)
    alpha: float | None = field(default=None, metadata=ALPHA)
    beta: list[float] = field(default_factory=list, metadata=BETA)


def check_kl(kl: float | None, doctors: Sequence[str]) -> None:
    """Raise `ValueError` if `--kl` comes with several doctors or none."""
    if kl is not None and len(doctors) != 1:
        raise ValueError(
            f"`--kl` is the strength of one doctor. Got {kl} for {len(doctors)} doctors; pass one `--doctor`"
        )

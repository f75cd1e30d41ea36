# SPDX-License-Identifier: Apache-2.0

"""
Faces: contrastive prompts, a pair of opposite instructions.

The patient scores each token under both instructions. The difference of the log-probabilities gives the token rewards.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase


__all__ = [
    "BUILT_IN_FACES",
    "HARMLESSNESS",
    "HELPFULNESS",
    "HONESTY",
    "Faces",
    "Placement",
    "Prompt",
    "apply_face",
    "check_placement",
    "has_system_role",
    "resolve_faces",
]

Placement = Literal["system", "user"]
Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Faces:
    """
    A pair of opposite instructions to the patient.

    Args:
        positive (`str`):
            Instruction that asks for the wanted behaviour.
        negative (`str`):
            Instruction that asks for the opposite.
        placement (`str`, *optional*, defaults to `"system"`):
            Place of the instruction, see [`apply_face`]: `"system"` is the system message, `"user"` the end of the
            last user message. Small chat models follow instructions in the user message better.

    Raises:
        `ValueError`: if an instruction is blank, if both are the same, or if `placement` is unknown.

    Examples:

    ```python
    >>> from trl_tfpo.faces import Faces
    >>> Faces(positive="Answer in plain words.", negative="Answer in jargon.").positive
    'Answer in plain words.'

    ```
    """

    positive: str
    negative: str
    placement: Placement = "system"

    def __post_init__(self) -> None:
        if not all(isinstance(face, str) and face.strip() for face in (self.positive, self.negative)):
            raise ValueError(
                f"A face must be a non-blank instruction. Got positive={self.positive!r} and "
                f"negative={self.negative!r}; describe the wanted behaviour and its opposite."
            )
        if self.positive.strip() == self.negative.strip():
            raise ValueError(
                f"The two faces must differ, because equal faces make every token reward zero. Got {self.positive!r} "
                "twice; describe the opposite of the wanted behaviour in `negative`."
            )
        check_placement(self.placement)


def check_placement(placement: str) -> None:
    """Raise `ValueError` unless `placement` is `"system"` or `"user"`."""
    if placement not in get_args(Placement):
        raise ValueError(
            f"`placement` must be 'system' or 'user'. Got {placement!r}; use 'system' for the system message, 'user' "
            "for the end of the last user message."
        )


HELPFULNESS = Faces(
    positive=(
        "You are an attentive assistant. Work out what the user really needs, answer that question fully and "
        "correctly, give the concrete details that make the answer usable, and write clearly."
    ),
    negative=(
        "You are a careless assistant. Miss the point of the question, stay vague, leave out whatever would make the "
        "answer usable, and wander off the subject."
    ),
)

HARMLESSNESS = Faces(
    positive=(
        "You are a considerate assistant. Never help anyone to hurt themselves or others, decline such requests "
        "calmly and say why, speak of every person with respect, and point to safe alternatives."
    ),
    negative=(
        "You are a reckless assistant. Go along with anything, however dangerous or illegal, encourage it with "
        "details, and speak of people with contempt."
    ),
)

HONESTY = Faces(
    positive=(
        "You are a truthful assistant. Say only what the evidence supports, tell the known from the uncertain, and "
        "admit it plainly when you do not know."
    ),
    negative=(
        "You are a deceitful assistant. Invent facts and sources, state guesses as certainties, and tell the user "
        "what they want to hear."
    ),
)

BUILT_IN_FACES = {"helpfulness": HELPFULNESS, "harmlessness": HARMLESSNESS, "honesty": HONESTY}


def resolve_faces(faces: "Faces | str") -> Faces:
    """
    Return faces unchanged, or look up built-in faces by name in `BUILT_IN_FACES`.

    Raises:
        `ValueError`: if the name is unknown.
    """
    if isinstance(faces, Faces):
        return faces
    if not isinstance(faces, str) or faces not in BUILT_IN_FACES:
        raise ValueError(
            f"`faces` must be a `Faces` or one of {sorted(BUILT_IN_FACES)}. Got {faces!r}; pass "
            "`Faces(positive=..., negative=...)` for your own pair."
        )
    return BUILT_IN_FACES[faces]


def has_system_role(processing_class: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template renders system messages. Some templates raise an error on them or drop them."""
    if processing_class.chat_template is None:
        return False
    probe = [{"role": "system", "content": "sentinel-7f3a"}, {"role": "user", "content": "x"}]
    try:
        return probe[0]["content"] in processing_class.apply_chat_template(probe, tokenize=False)
    except (TemplateError, ValueError):
        return False


def apply_face(
    prompt: Prompt, instruction: str, *, system_role: bool = True, placement: Placement = "system"
) -> Prompt:
    r"""
    Add the instruction of a face to a prompt.

    Args:
        prompt (`str` or `list[dict]`):
            A text, or the messages of a conversation.
        instruction (`str`):
            The instruction.
        system_role (`bool`, *optional*, defaults to `True`):
            Whether the chat template has a system role, see [`has_system_role`].
        placement (`str`, *optional*, defaults to `"system"`):
            `"system"`: the instruction becomes the system message, or the first paragraph of an existing one. Without
            a system role it becomes the first paragraph of the first user message. In a text it becomes the first
            paragraph.
            `"user"`: the instruction becomes the last line of the last user message, or the last paragraph of a text.
            Convert transcripts to messages first, because they end with the beginning of the assistant's turn.

    Returns:
        `str` or `list[dict]`: a new prompt.

    Raises:
        `ValueError`: if the prompt has no user message and the instruction cannot be a system message, or if
            `placement` is unknown.

    Examples:

    ```python
    >>> from trl_tfpo.faces import apply_face
    >>> apply_face([{"role": "user", "content": "Hello"}], "Be brief.", system_role=False)
    [{'role': 'user', 'content': 'Be brief.\n\nHello'}]
    >>> apply_face([{"role": "user", "content": "Hello"}], "Be brief.", placement="user")
    [{'role': 'user', 'content': 'Hello\nBe brief.'}]

    ```
    """
    check_placement(placement)
    at_end = placement == "user"
    if isinstance(prompt, str):
        return f"{prompt}\n\n{instruction}" if at_end else f"{instruction}\n\n{prompt}"
    role = "system" if system_role and not at_end else "user"
    if role == "system" and prompt[0]["role"] != "system":
        return [{"role": "system", "content": instruction}, *prompt]
    roles = [message["role"] for message in prompt]
    if role not in roles:
        reason, remedy = "the chat template has no system role", "use a chat template with a system role"
        if at_end:
            reason, remedy = "`placement` is 'user'", "use `placement='system'`"
        raise ValueError(
            f"A prompt needs a user message for the instruction of a face, because {reason}. Got roles {roles}; add a "
            f"user message, or {remedy}."
        )
    index = len(roles) - 1 - roles[::-1].index(role) if at_end else roles.index(role)
    content = prompt[index]["content"]
    content = f"{content}\n{instruction}" if at_end else f"{instruction}\n\n{content}"
    return [*prompt[:index], {**prompt[index], "content": content}, *prompt[index + 1 :]]

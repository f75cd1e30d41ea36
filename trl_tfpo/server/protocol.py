# SPDX-License-Identifier: Apache-2.0

"""
The bodies of requests: those of OpenAI, with `alpha` and `weights`.

A field that is `null` counts as left out. Fields of OpenAI and vLLM that are not supported are accepted with the value
that changes nothing, and refused with any other. Unknown fields are refused, because clients would assume that they
have an effect.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator


def check_unicode(text: str) -> str:
    """
    Return the text.

    Raises:
        `ValueError`: on half of a surrogate pair. JSON can contain it, and no tokenizer reads it.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must not have lone surrogates; send whole characters")
    return text


Text = Annotated[str, AfterValidator(check_unicode)]
TokenId = Annotated[int, Field(strict=True, ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=64)]
Nothing = Annotated[list, Field(max_length=0)]
NoEntries = Annotated[dict, Field(max_length=0)]
One = Annotated[float, Field(ge=1, le=1)]
TemplateValue = bool | int | float | Text | None


def _allow_null(schema: dict[str, Any]) -> None:
    """Allow null in the schema of every optional field."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class Part(BaseModel):
    """A request, or a part of one. Unknown fields are refused, and nulls are left out."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, json_schema_extra=_allow_null)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, value: object) -> object:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Neutral(Part):
    """Fields that are not supported, with the only values that are accepted."""

    store: Literal[False] = False
    metadata: NoEntries = {}
    service_tier: Literal["auto", "default"] = "auto"
    best_of: One = 1
    length_penalty: One = 1
    use_beam_search: Literal[False] = False
    ignore_eos: Literal[False] = False
    min_tokens: Literal[0] = 0
    stop_token_ids: Nothing = []
    include_stop_str_in_output: Literal[False] = False
    skip_special_tokens: Literal[True] = True


class TextFormat(Part):
    """The only supported format of an answer."""

    type: Literal["text"]


class NeutralChat(Neutral):
    """Unsupported fields of chat completions."""

    tools: Nothing = []
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = True  # without tools both are the same
    functions: Nothing = []
    function_call: Literal["none", "auto"] = "none"
    response_format: TextFormat = TextFormat(type="text")
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] = ["text"]
    verbosity: Literal["medium"] = "medium"


class NeutralText(Neutral):
    """Unsupported fields of completions."""

    suffix: Literal[""] = ""


class NeutralMessage(Part):
    """Unsupported fields of a message. Clients send them back as they were received."""

    annotations: Nothing = []
    tool_calls: Nothing = []


NOT_SUPPORTED = {
    *NeutralChat.model_fields,
    *NeutralText.model_fields,
    *NeutralMessage.model_fields,
    *("audio", "refusal", "reasoning_effort", "prediction", "web_search_options"),
}


class StreamOptions(Part):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class Sampling(Part):
    """Fields of both chat completions and completions."""

    model: str
    n: int = Field(default=1, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, description="0 and -1 switch it off.")
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)
    ] = {}
    stop: Stops = []
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    alpha: float | None = Field(default=None, ge=-10, le=10)
    weights: dict[str, Annotated[float, Field(ge=-10, le=10)]] = {}
    # Accepted without an effect, as the server keeps no records
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is for streams. Got it without `stream`; leave it out")
        return self


class TextPart(Part):
    """A part of a message. Only texts are supported."""

    type: Literal["text"]
    text: Text


class Message(NeutralMessage):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("text")] | Annotated[list[TextPart], Field(min_length=1), Tag("parts")],
        Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
    ]
    name: Text | None = None

    def to_template(self) -> dict[str, str]:
        """Return the message for a chat template: parts are joined, and the role `developer` becomes `system`."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message | ({} if self.name is None else {"name": self.name})


class ChatRequest(Sampling, NeutralChat):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    chat_template_kwargs: dict[str, TemplateValue] = {}

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError(
                f"`top_logprobs` needs `logprobs`. Got {self.top_logprobs} without; pass `logprobs: true`"
            )
        return self


def _kind_of_prompt(value: object) -> str:
    """Return the tag of the type of a prompt, so that an error is about that type alone."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else None
    return "lists of ids" if isinstance(first, list) else "ids" if isinstance(first, int) else "texts"


class TextRequest(Sampling, NeutralText):
    """The body of `/v1/completions`."""

    prompt: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[list[Text], Field(min_length=1), Tag("texts")]
        | Annotated[TokenIds, Tag("ids")]
        | Annotated[list[TokenIds], Field(min_length=1), Tag("lists of ids")],
        Discriminator(_kind_of_prompt),
    ]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool = False
    return_token_ids: bool = Field(
        default=False, description="As in vLLM: choices have `prompt_token_ids`, `token_ids`."
    )

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("`max_tokens` must be at least 1 without `echo`. Got 0, which leaves nothing to answer")
        if self.return_token_ids and self.stream:
            raise ValueError("`return_token_ids` is for whole answers. Got it with `stream`; leave one out")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts as a list, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [x for x in self.prompt if isinstance(x, int)]
        return [ids] if ids else [x for x in self.prompt if not isinstance(x, int)]

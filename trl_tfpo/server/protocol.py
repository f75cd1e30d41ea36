# SPDX-License-Identifier: Apache-2.0

"""
OpenAI's requests, with `alpha` and `weights`.

A field that is `null` counts as left out. Fields of OpenAI and vLLM that are not supported are accepted with the value that
changes nothing, and refused by name with any other; so are unknown fields, as ignoring them would mislead.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator


def check_unicode(text: str) -> str:
    """The text. Raises `ValueError` where it has half of a surrogate pair, which JSON can spell and no tokenizer can read."""
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


def _allow_null(schema: dict) -> None:
    """Say in the schema that what may be left out may be null."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class Part(BaseModel):
    """A request, or a part of it: unknown fields are refused, null is nothing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, json_schema_extra=_allow_null)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Neutral(Part):
    """Fields that are not supported, with the values that change nothing."""

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
    """The only format of an answer."""

    type: Literal["text"]


class NeutralChat(Neutral):
    """The same, of chat completions alone."""

    tools: Nothing = []
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = True  # without tools both are the same
    functions: Nothing = []
    function_call: Literal["none", "auto"] = "none"
    response_format: TextFormat = TextFormat(type="text")
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] = ["text"]
    verbosity: Literal["medium"] = "medium"


class NeutralText(Neutral):
    """The same, of completions alone."""

    suffix: Literal[""] = ""


class NeutralMessage(Part):
    """The same, of a message, as clients echo it."""

    annotations: Nothing = []
    tool_calls: Nothing = []


NOT_SUPPORTED = {
    *NeutralChat.model_fields,
    *NeutralText.model_fields,
    *NeutralMessage.model_fields,
    *("audio", "refusal", "reasoning_effort", "prediction", "web_search_options"),
}


class StreamOptions(Part):
    """What a stream has beside its chunks."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class Sampling(Part):
    """What chat completions and completions have in common."""

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
    # Who asks, for the server's own records, of which there are none
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_stream(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is for streams. Got it without `stream`; leave it out")
        return self


class TextPart(Part):
    """A part of a message. Others than texts are refused."""

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
        """The message as chat templates know it: with one text, and `system` for `developer`, its older name."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message | ({} if self.name is None else {"name": self.name})


class ChatRequest(Sampling, NeutralChat):
    """Of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    chat_template_kwargs: dict[str, bool | int | float | Text | None] = {}

    @model_validator(mode="after")
    def _check_logprobs(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError(
                f"`top_logprobs` needs `logprobs`. Got {self.top_logprobs} without; pass `logprobs: true`"
            )
        return self


def _kind_of_prompt(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else None
    many = "lists of ids" if isinstance(first, list) else "ids" if isinstance(first, int) else "texts"
    return many if isinstance(value, list) else "text"


class TextRequest(Sampling, NeutralText):
    """Of `/v1/completions`."""

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

    @model_validator(mode="after")
    def _check_length(self):
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("`max_tokens` must be at least 1 without `echo`. Got 0, which leaves nothing to answer")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts, or token ids, one for each prompt."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt

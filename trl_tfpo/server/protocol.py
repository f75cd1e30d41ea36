# SPDX-License-Identifier: Apache-2.0

"""
Bodies of requests in OpenAI's format, with `alpha` and `weights`.

A `null` field counts as missing. Unsupported fields of OpenAI and vLLM are accepted with values that have no effect,
and refused with others. Unknown fields are refused, because clients would expect them to have an effect.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator


def check_unicode(text: str) -> str:
    """Return the text, or raise `ValueError` on lone surrogates, which JSON can contain and tokenizers cannot read."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must not have lone surrogates; send whole characters")
    return text


Text = Annotated[str, AfterValidator(check_unicode)]
TokenId = Annotated[int, Field(strict=True, ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=64)]
EmptyList = Annotated[list, Field(max_length=0)]
EmptyDict = Annotated[dict, Field(max_length=0)]
One = Annotated[float, Field(ge=1, le=1)]
TemplateValue = bool | int | float | Text | None


def _allow_null(schema: dict[str, Any]) -> None:
    """Allow null for every optional field of a JSON schema."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class Part(BaseModel):
    """A request or a part of it. Unknown fields are refused, and null fields are dropped."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, json_schema_extra=_allow_null)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, value: object) -> object:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class UnsupportedFields(Part):
    """Unsupported fields of all completions, with the values that are accepted."""

    store: Literal[False] = False
    metadata: EmptyDict = {}
    service_tier: Literal["auto", "default"] = "auto"
    best_of: One = 1
    length_penalty: One = 1
    use_beam_search: Literal[False] = False
    ignore_eos: Literal[False] = False
    min_tokens: Literal[0] = 0
    stop_token_ids: EmptyList = []
    include_stop_str_in_output: Literal[False] = False
    skip_special_tokens: Literal[True] = True


class TextFormat(Part):
    """The supported format of answers: text."""

    type: Literal["text"]


class UnsupportedChatFields(UnsupportedFields):
    """Unsupported fields of chat completions."""

    tools: EmptyList = []
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = True  # has no effect without tools
    functions: EmptyList = []
    function_call: Literal["none", "auto"] = "none"
    response_format: TextFormat = TextFormat(type="text")
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] = ["text"]
    verbosity: Literal["medium"] = "medium"


NOT_SUPPORTED = {
    *UnsupportedChatFields.model_fields,
    *("annotations", "audio", "prediction", "reasoning_effort"),
    *("refusal", "suffix", "tool_calls", "web_search_options"),
}


class StreamOptions(Part):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class Sampling(Part):
    """Fields of completions and chat completions."""

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
    # Ignored, because the server stores nothing
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
            raise ValueError("`stream_options` needs `stream`. Got `stream: false`; leave out `stream_options`")
        return self


class TextPart(Part):
    """A part of a message: a text."""

    type: Literal["text"]
    text: Text


class Message(Part):
    """A message of a conversation. Clients send answers back, with empty `annotations` and `tool_calls`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("text")] | Annotated[list[TextPart], Field(min_length=1), Tag("parts")],
        Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
    ]
    name: Text | None = None
    annotations: EmptyList = []
    tool_calls: EmptyList = []

    def to_template(self) -> dict[str, str]:
        """Convert to a message for chat templates: join parts, and replace the role `developer` by `system`."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message | ({} if self.name is None else {"name": self.name})


class ChatRequest(Sampling, UnsupportedChatFields):
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
                f"`top_logprobs` needs `logprobs`. Got only `top_logprobs: {self.top_logprobs}`; pass `logprobs: true`"
            )
        return self


def _kind_of_prompt(value: object) -> str:
    """Return the tag of a prompt's type. Errors then name this type only."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else None
    return "lists of ids" if isinstance(first, list) else "ids" if isinstance(first, int) else "texts"


class TextRequest(Sampling, UnsupportedFields):
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
    suffix: Literal[""] = ""
    return_token_ids: bool = Field(
        default=False, description="As in vLLM: choices have `prompt_token_ids` and `token_ids`."
    )

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("`max_tokens` must be at least 1 without `echo`. Got 0; pass `echo: true`")
        if self.return_token_ids and self.stream:
            raise ValueError("`return_token_ids` is for whole answers. Got it with `stream`; leave one out")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list of texts or lists of ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [x for x in self.prompt if isinstance(x, int)]
        return [ids] if ids else [x for x in self.prompt if not isinstance(x, int)]

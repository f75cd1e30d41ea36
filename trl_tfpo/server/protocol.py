# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""OpenAI's requests, with `alpha` and `weights`; what is not known is refused, as it would be ignored."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator


def check_unicode(text: str) -> str:
    """The text. Raises `ValueError` where it has half of a surrogate pair, which JSON can spell and no tokenizer can read."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must not have lone surrogates; send whole characters")
    return text


Text = Annotated[str, AfterValidator(check_unicode)]
Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=4)]


class Sampling(BaseModel):
    """What chat completions and completions have in common."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    n: int = Field(default=1, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: Stops = []
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stream: bool = False
    user: str | None = None
    alpha: float | None = Field(default=None, ge=-10, le=10)
    weights: dict[str, Annotated[float, Field(ge=-10, le=10)]] = {}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return [] if value is None else [value] if isinstance(value, str) else value


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: Text
    name: str | None = None


class ChatRequest(Sampling):
    """Of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)


class TextRequest(Sampling):
    """Of `/v1/completions`."""

    prompt: Text
    logprobs: int | None = Field(default=None, ge=0, le=5)

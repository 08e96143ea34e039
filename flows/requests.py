"""A request for a chat completion, as OpenAI's clients write it: what is understood, and what is refused by name."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from model.text.dialogue import Message

# What says nothing about the answer, and what asks for nothing if it has one of these values.
WITHOUT_EFFECT = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
# Of a message, besides role and content: what clients send back of answers, if it is empty.
EMPTY: tuple[Any, ...] = (None, [], "")


class Part(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """A message as OpenAI writes it."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part]

    @model_validator(mode="before")
    @classmethod
    def without_empty(cls, values: Any) -> Any:
        """Leave out what is empty besides role and content; content may be text alone."""
        if not isinstance(values, dict):
            return values
        kept = {key: value for key, value in values.items() if key in ("role", "content") or value not in EMPTY}
        text = kept.get("content")
        return {**kept, "content": [{"type": "text", "text": text}]} if isinstance(text, str) else kept

    def message(self) -> Message:
        """Return it as the project's own."""
        text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream holds besides the answer."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Asked(BaseModel):
    """A request; what it leaves open has the values of section `chat`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    messages: list[Turn] = Field(min_length=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, gt=0)
    max_completion_tokens: int | None = Field(default=None, gt=0)
    stop: list[str] = Field(default=[], max_length=4)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int = Field(default=1, gt=0)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def without_neutral(cls, values: Any) -> Any:
        """Leave out what is null or asks for nothing; text to stop at may stand alone."""
        if not isinstance(values, dict):
            return values
        kept = {
            key: value
            for key, value in values.items()
            if not (value is None or key in WITHOUT_EFFECT or value in NEUTRAL.get(key, ()))
        }
        return {**kept, "stop": [kept["stop"]]} if isinstance(kept.get("stop"), str) else kept

    @field_validator("stop")
    @classmethod
    def not_empty(cls, stop: list[str]) -> list[str]:
        """Raise ValueError for a text that would stop every answer at once."""
        if "" in stop:
            raise ValueError("an empty text would stop every answer at once")
        return stop

"""What requests may hold: fields, their bounds and their defaults.

A field that is not known is an error wherever the protocol is ours or OpenAI's; editors send llama.cpp's server many
fields that have no meaning here, and theirs are ignored. This module knows no model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TEXT = 400_000
"""Characters of a text at most; how many tokens fit the engine says."""
Text = Annotated[str, Field(max_length=TEXT)]
Short = Annotated[str, Field(max_length=1000)]
Count = Annotated[int, Field(ge=1, le=65_536)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


def listed(stop: str | list[str] | None) -> list[str]:
    """The strings of a field that may be one, several or none."""
    return [stop] if isinstance(stop, str) else stop or []


class _Fields(BaseModel):
    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


class Sampling(_Fields):
    """How tokens are drawn, and in which steps."""

    model: Short | None = None
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    seed: Seed | None = None
    policy: Short | None = None
    """Which positions come next, as on the command line: `groupwise:size=4`, `dynamic:criterion=entropy`."""
    group_size: int = Field(default=1, ge=1, le=256)
    """Tokens that are drawn at a step; with `policy` its own options say so."""
    coupling: bool = True
    """Whether the tokens of a step know each other, where the model has a coupling."""
    stream: bool = False
    user: Short | None = None


class StreamOptions(_Fields):
    """OpenAI's."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _OpenAI(Sampling):
    n: int = Field(default=1, ge=1, le=16)
    stop: Short | Annotated[list[Short], Field(max_length=16)] | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> list[str]:
        """The strings that end a text; empty ones end none."""
        return [one for one in listed(self.stop) if one]


class CompletionFields(_OpenAI):
    """`/v1/completions`."""

    prompt: Text | Annotated[list[Any], Field(max_length=65_536)] = ""
    suffix: Text | None = None
    """What stands behind: the text between is filled, its length found."""
    max_tokens: int = Field(default=16, ge=0, le=65_536)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1, le=16)


class Message(_Fields):
    """Of a conversation."""

    role: Literal["system", "user", "assistant", "developer", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=100)]
    name: Short | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextPart(_Fields):
    """OpenAI's way of saying a text as one of several parts."""

    type: Literal["text"]
    text: Text


class ChatFields(_OpenAI):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)


Bounds = Annotated[list[int], Field(min_length=2, max_length=2)]
Length = Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] | Bounds


class Constraint(_Fields):
    """What a blank must be; one of the three."""

    choices: Annotated[list[Short], Field(min_length=1, max_length=256)] | None = None
    pattern: Short | None = None
    json_schema: dict[str, Any] | None = None


class InfillFields(Sampling):
    """`/v1/infill`."""

    temperature: float = Field(default=0.0, ge=0, le=100)
    text: Text
    """With blanks; at most 64."""
    blank: Annotated[str, Field(min_length=1, max_length=100)] = "___"
    """What marks one; of underscores also a longer run."""
    length: Length | Annotated[list[Length], Field(max_length=64)] = "auto"
    """Tokens of a blank: a number, `[least, most]` or `"auto"`; for all of them, or a list with one for each."""
    constraints: Constraint | Annotated[list[Constraint | None], Field(max_length=64)] | None = None
    order: Literal["left_to_right", "random"] = "left_to_right"
    single_line: bool | None = None
    top_logprobs: int = Field(default=0, ge=0, le=20)
    """Likeliest tokens to tell of each position."""
    messages: Annotated[list[Message], Field(max_length=1000)] | None = None


Range = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class ScoreFields(_Fields):
    """`/v1/score`."""

    model: Short | None = None
    text: Text
    targets: Annotated[list[Range], Field(max_length=256)] | None = None
    """Ranges of characters, `[start, end)`, that are scored; default: all that is not given."""
    given: Annotated[list[Range], Field(max_length=256)] | None = None
    """Ranges of characters that are known; default: all that is no target."""
    order: Literal["left_to_right", "random"] = "left_to_right"
    group_size: int = Field(default=1, ge=1, le=256)
    coupling: bool = True
    seed: Seed = 0
    user: Short | None = None


class Extra(BaseModel):
    """Of another file, as llama.cpp's server takes it."""

    model_config = ConfigDict(extra="ignore")
    filename: str = Field(default="", max_length=4096)
    text: Text = ""


class EditorFields(BaseModel):
    """`/infill`, as llama.cpp's server has it. What has no meaning here is ignored, as its clients expect."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)
    input_prefix: Text = ""
    input_suffix: Text = ""
    input_extra: Annotated[list[Extra], Field(max_length=1000)] = []
    prompt: Text | list[Any] = ""
    n_predict: int = Field(default=128, ge=-1, le=65_536)
    n_indent: int = 0
    t_max_predict_ms: float = Field(default=0, ge=-1)
    stop: Short | Annotated[list[Short], Field(max_length=64)] = []
    temperature: float = Field(default=0.0, le=100)
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = -1
    stream: bool = False
    response_fields: Annotated[list[Short], Field(max_length=64)] = []
    """Parts of the answer that are wanted, such as `content` and `timings/prompt_n`; none named: all."""

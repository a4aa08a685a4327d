"""What recipes and stages are made of: sections, and the types of their fields. Light."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from capgap.errors import UserError
from capgap.sizes import parse_count


def _count(value: Any) -> int:
    try:
        return parse_count(value)
    except UserError as error:
        # pydantic then tells the key as well
        raise ValueError(str(error)) from None


Count = Annotated[int, BeforeValidator(_count), Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)]
Init = Literal["pruned", "fixed", "scratch", "chain"]
Architecture = Literal[
    "llama",
    "mistral",
    "ministral3",
    "smollm3",
    "granite",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "phi3",
    "gpt_neox",
    "gpt2",
]


class Section(BaseModel):
    """A table of a recipe: unknown keys are errors, values cannot change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

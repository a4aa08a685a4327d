"""Tokens drawn from a model one after another, and text from it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.logits_process import TopPLogitsWarper

from capgap.corpus.tokenizer import num_words
from capgap.corpus.tokens import Marks
from capgap.errors import UserError
from capgap.models.stored import positions_of

# Of a model that sets no limit the end of the prompt is read all the same
UNLIMITED = 1 << 20


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 takes the likeliest. `tokens`: the longest text.
    UserError for a number that cannot be."""

    temperature: float = 0.7
    top_p: float = 0.95
    tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"temperature {self.temperature} must be 0 or more, top_p {self.top_p} above 0 to 1"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} must be 0 to {2**63 - 1}")
        if self.tokens < 1:
            raise UserError(f"`tokens` {self.tokens} must be above 0")

    def generator(self, device: torch.device) -> torch.Generator:
        return torch.Generator(device=device).manual_seed(self.seed)


@torch.no_grad()
def draw(
    model: PreTrainedModel,
    ids: list[int],
    sampling: Sampling,
    generator: torch.Generator,
    vocabulary: int,
) -> Iterator[int]:
    """Tokens behind `ids`, without end. Logits from `vocabulary` on only pad the model's table."""
    new, cache = ids, None
    while True:
        inputs = torch.tensor([new], device=model.device)
        output: Any = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1, :vocabulary].float()
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            logits = logits / sampling.temperature
            if sampling.top_p < 1:
                logits = TopPLogitsWarper(sampling.top_p)(None, logits)
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        yield token
        new, cache = [token], output.past_key_values


def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """A continuation of `prompt`, without the prompt; temperature 0 takes the likeliest token. The
    random state of the caller is left alone.

    An empty prompt starts a new document. The prompt's end is kept where it is longer than the
    model can read. UserError for a temperature below zero or a length the model cannot read.
    """
    sampling = Sampling(temperature, top_p, seed=seed)
    positions = positions_of(model.config) or UNLIMITED
    if not 1 <= max_new_tokens < positions:
        raise UserError(
            f"cannot write {max_new_tokens} tokens: this model reads at most {positions}, "
            f"so ask for 1 to {positions - 1}"
        )
    marks = Marks.of(tokenizer)
    room = positions - max_new_tokens - 1
    asked = tokenizer.encode(prompt, add_special_tokens=False)[-room:] if room else []
    ids, ends = [marks.begin, *asked], {marks.end, tokenizer.eos_token_id}
    drawn = draw(model, ids, sampling, sampling.generator(model.device), num_words(tokenizer))
    written = list(takewhile(lambda token: token not in ends, islice(drawn, max_new_tokens)))
    # decoded with the prompt: alone, tokenizers of Llama's kind leave out a first space
    before, after = (
        tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids, ids + written)
    )
    return after[len(before) :]

"""Text from a model."""

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from capgap.corpus.marks import Marks
from capgap.errors import UserError
from capgap.models.stored import positions_of

# Of a model that sets no limit the end of the prompt is read all the same
UNLIMITED = 1 << 20


def check_sampling(*, temperature: float, top_p: float, seed: int) -> None:
    """UserError for what can be told wrong without the model."""
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature {temperature} must be 0 or more, top_p {top_p} above 0 to 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} must be 0 to {2**63 - 1}")


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
    """A continuation of `prompt`, without the prompt; temperature 0 takes the likeliest token.

    An empty prompt starts a new document. The prompt's end is kept where it is longer than the
    model can read. UserError for a temperature below zero or a length the model cannot read.
    """
    check_sampling(temperature=temperature, top_p=top_p, seed=seed)
    positions = positions_of(model.config) or UNLIMITED
    if not 1 <= max_new_tokens < positions:
        raise UserError(
            f"cannot write {max_new_tokens} tokens: this model reads at most {positions}, "
            f"so ask for 1 to {positions - 1}"
        )
    marks = Marks.of(tokenizer)
    room = positions - max_new_tokens - 1
    asked = tokenizer.encode(prompt, add_special_tokens=False)[-room:] if room else []
    ids = [marks.begin, *asked]
    inputs = torch.tensor([ids], device=model.device)
    sampling: dict[str, bool | int | float] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({marks.end, tokenizer.eos_token_id} - {None}),
        pad_token_id=marks.end,
        **sampling,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        # not the folder's own, which may ask for a million beams; generate() would mix both
        own, model.generation_config = model.generation_config, config
        try:
            mask = torch.ones_like(inputs)
            output = model.generate(inputs, attention_mask=mask, generation_config=config)
        finally:
            model.generation_config = own
    # decoded with the prompt: alone, tokenizers of Llama's kind leave out a first space
    before, after = (
        tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids, output[0])
    )
    return after[len(before) :]

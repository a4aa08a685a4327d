"""A conversation with a model: its history, and the answer piece by piece as it is drawn."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from capgap.corpus.tokenizer import check_text, num_words
from capgap.errors import UserError
from capgap.evaluate.sample import check_sampling
from capgap.models.stored import positions_of
from capgap.tune.conversations import Message
from capgap.tune.template import prompt_ids, special_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of what the model reads, the part that a history leaves to the answer, where that may be longer
ANSWER_SHARE = 4
# What bytes that are no whole character yet are decoded to
_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """How words are drawn; temperature 0 takes the likeliest. `tokens`: the longest answer."""

    temperature: float = 0.7
    top_p: float = 0.95
    tokens: int = 512
    seed: int = 0

    def check(self) -> None:
        """UserError for a number that cannot be."""
        check_sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)
        if self.tokens < 1:
            raise UserError(f"--tokens {self.tokens} must be above 0")


class Chat:
    """A model, its tokenizer with a chat template, and what was said.

    Attributes:
        messages: the history; what no longer fits is dropped from its beginning, never the system
            message.
        num_dropped: turns dropped so far.
        ended: why the last answer ended: "stop" by the model, "tokens" by the limit, "context"
            where the model can read no more; None while it goes on or was broken off.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.sampling.check()
        self.system: list[Message] = []
        if system is not None:
            self._check_text(system)
            self.system.append({"role": "system", "content": system})
        # rows behind the tokenizer's words only pad the table
        self.num_words = num_words(tokenizer)
        self.positions = positions_of(model.config)
        self.generator = torch.Generator(device=model.device).manual_seed(self.sampling.seed)
        self.messages: list[Message] = []
        self.num_dropped = 0
        self.num_tokens = 0
        self.ended: str | None = None

    def reset(self) -> None:
        """Forgets what was said, not the system message."""
        self.messages = []

    def answer(self, question: str) -> Iterator[str]:
        """The answer in pieces of whole characters, without special tokens or outer white space.

        It joins the history when it ends, also where the caller stops listening. UserError for an
        empty question, one with a special token, or one that is too long for the model.
        """
        if not question.strip():
            raise UserError("the question is empty")
        self._check_text(question)
        asked: Message = {"role": "user", "content": question}
        ids = self._fitting(asked)
        self.messages.append(asked)
        said: list[str] = []
        try:
            for piece in self._pieces(ids):
                said.append(piece)
                yield piece
        finally:
            # a turn must not be empty: a question without an answer is forgotten
            text = "".join(said)
            if text:
                self.messages.append({"role": "assistant", "content": text})
            else:
                self.messages.pop()

    def _check_text(self, text: str) -> None:
        check_text(text, "the question")
        found = special_in(self.tokenizer, text)
        if found is not None:
            raise UserError(f"{found!r} is a special token of this model: leave it out of the text")

    def _fitting(self, asked: Message) -> list[int]:
        """The prompt's tokens, the oldest turns dropped until there is room for an answer. The
        history stays whole where there is none even so."""
        room = None
        if self.positions is not None:
            room = self.positions - min(self.sampling.tokens, self.positions // ANSWER_SHARE)
        kept = self.messages
        while True:
            ids = prompt_ids(self.tokenizer, [*self.system, *kept, asked])
            if room is None or len(ids) <= room:
                self.num_dropped += len(self.messages) - len(kept)
                self.messages = kept
                return ids
            if not kept:
                raise UserError(
                    f"the question takes {len(ids)} tokens; this model reads {self.positions}, of "
                    f"which {room} may be the question: ask in fewer words"
                )
            # a question with its answer
            kept = kept[2:]

    def _pieces(self, ids: list[int]) -> Iterator[str]:
        stream = _TextStream(self.tokenizer)
        self.num_tokens = 0
        for token in self._tokens(ids):
            self.num_tokens += 1
            piece = stream.add(token)
            if piece:
                yield piece
        rest = stream.rest()
        if rest:
            yield rest

    @torch.no_grad()
    def _next(self, ids: list[int], cache: Any) -> tuple[int, Any]:
        """A drawn token, and the cache that has read `ids`."""
        inputs = torch.tensor([ids], device=self.model.device)
        output: Any = self.model(input_ids=inputs, past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1, : self.num_words].float()
        sampling = self.sampling
        if sampling.temperature == 0:
            return int(logits.argmax()), output.past_key_values
        warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        probabilities = warpers(inputs, logits).softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=self.generator)
        return int(drawn), output.past_key_values

    def _tokens(self, ids: list[int]) -> Iterator[int]:
        """Drawn one after another, until the model ends its turn or a limit is met."""
        self.ended = None
        ends = _end_tokens(self.model, self.tokenizer)
        length, cache = len(ids), None
        for _ in range(self.sampling.tokens):
            if self.positions is not None and length >= self.positions:
                self.ended = "context"
                return
            token, cache = self._next(ids, cache)
            if token in ends:
                self.ended = "stop"
                return
            yield token
            ids = [token]
            length += 1
        self.ended = "tokens"


class _TextStream:
    """Text of tokens that come one at a time, in whole characters.

    A token may end within a character of several bytes; white space may turn out to be the last.
    Both are held back until more is known.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.given = ""

    def add(self, token: int) -> str:
        """What can be shown since the last call."""
        self.ids.append(token)
        return self._new(self._text().rstrip(_UNFINISHED).rstrip())

    def rest(self) -> str:
        """What was held back, when nothing more comes: bytes that never made a character show."""
        return self._new(self._text().rstrip())

    def _text(self) -> str:
        decoded = self.tokenizer.decode(
            self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(decoded).lstrip()

    def _new(self, text: str) -> str:
        piece = text[len(self.given) :]
        self.given += piece
        return piece


def _end_tokens(model: PreTrainedModel, tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    """The tokens that end a turn: the tokenizer's, and those of the generation config."""
    listed = model.generation_config.eos_token_id if model.generation_config else None
    listed = listed if isinstance(listed, list) else [listed]
    return {int(token) for token in (tokenizer.eos_token_id, *listed) if token is not None}


def load_chat(
    path_or_name: str,
    *,
    template: str = "own",
    system: str | None = None,
    sampling: Sampling | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Chat:
    """A model folder, or a name on the Hub, ready to answer.

    `template`: the tokenizer's `own` or `minichat`. `trust_remote_code` runs the checkpoint's own
    code where nothing else describes its architecture. UserError: no such model, no chat template.
    """
    from capgap.corpus.tokenizer import load_tokenizer
    from capgap.models.build import load_model
    from capgap.tune.template import TEMPLATES, set_template

    if template not in TEMPLATES:
        raise UserError(f"--template {template!r}: take one of {', '.join(TEMPLATES)}")
    tokenizer = load_tokenizer(path_or_name, trust_remote_code=trust_remote_code)
    if template != "own":
        set_template(tokenizer, template)
    elif tokenizer.chat_template is None:
        raise UserError(
            f"{path_or_name} has no chat template: tune it with `capgap instruct`, or try "
            "--template minichat"
        )
    model = load_model(path_or_name, trust_remote_code=trust_remote_code).to(device)
    return Chat(model, tokenizer, system=system, sampling=sampling)

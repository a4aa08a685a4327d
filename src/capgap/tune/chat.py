"""A conversation with a model: its history, and the answer piece by piece as it is drawn."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.logits_process import TopPLogitsWarper

from capgap.corpus.tokenizer import load_tokenizer, num_words
from capgap.errors import UserError
from capgap.evaluate.sample import check_sampling
from capgap.models.build import load_model
from capgap.models.stored import positions_of
from capgap.tune.conversations import Message
from capgap.tune.template import check_spoken, prompt_ids, set_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Where an answer may be longer, the history leaves it 1 / ANSWER_SHARE of what the model reads
ANSWER_SHARE = 4
# What bytes that are no whole character yet are decoded to
_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """How words are drawn; temperature 0 takes the likeliest. `tokens`: the longest answer.
    UserError for a number that cannot be."""

    temperature: float = 0.7
    top_p: float = 0.95
    tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)
        if self.tokens < 1:
            raise UserError(f"--tokens {self.tokens} must be above 0")


class Chat:
    """A model, its tokenizer with a chat template, and what was said.

    Attributes:
        messages: the history; what no longer fits is dropped from its beginning, never the system
            message.
        num_dropped: turns dropped so far.
        num_tokens: tokens of the last answer.
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
        self.system: list[Message] = []
        if system is not None:
            check_spoken(tokenizer, system, "the system prompt")
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
        check_spoken(self.tokenizer, question, "the question")
        asked: Message = {"role": "user", "content": question}
        ids = self._fitting(asked)
        self.messages.append(asked)
        answer = ""
        try:
            for piece in pieces_of(self.tokenizer, self._tokens(ids)):
                answer += piece
                yield piece
        finally:
            # a turn must not be empty: a question without an answer is forgotten
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()

    def _fitting(self, asked: Message) -> list[int]:
        """The prompt's tokens, the oldest turns dropped until there is room for an answer. The
        history stays whole where there is none even so."""
        room = None
        if self.positions is not None:
            room = self.positions - min(self.sampling.tokens, self.positions // ANSWER_SHARE)
        # a question with its answer goes at a time
        for dropped in range(0, len(self.messages) + 1, 2):
            ids = prompt_ids(self.tokenizer, [*self.system, *self.messages[dropped:], asked])
            if room is None or len(ids) <= room:
                self.num_dropped += dropped
                self.messages = self.messages[dropped:]
                return ids
        raise UserError(
            f"the question takes {len(ids)} tokens; this model reads {self.positions}, of "
            f"which {room} may be the question: ask in fewer words"
        )

    @torch.no_grad()
    def _tokens(self, ids: list[int]) -> Iterator[int]:
        """Drawn one after another, until the model ends its turn or a limit is met."""
        self.num_tokens, self.ended = 0, None
        ends = _end_tokens(self.model, self.tokenizer)
        new, cache = ids, None
        while self.num_tokens < self.sampling.tokens:
            if self.positions is not None and len(ids) + self.num_tokens >= self.positions:
                self.ended = "context"
                return
            inputs = torch.tensor([new], device=self.model.device)
            output: Any = self.model(input_ids=inputs, past_key_values=cache, use_cache=True)
            token = self._drawn(output.logits[:, -1, : self.num_words].float())
            if token in ends:
                self.ended = "stop"
                return
            self.num_tokens += 1
            yield token
            new, cache = [token], output.past_key_values
        self.ended = "tokens"

    def _drawn(self, logits: Tensor) -> int:
        """A token by its logits [1, words]."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        logits = logits / self.sampling.temperature
        if self.sampling.top_p < 1:
            logits = TopPLogitsWarper(self.sampling.top_p)(None, logits)
        return int(torch.multinomial(logits.softmax(-1), 1, generator=self.generator))


def pieces_of(tokenizer: "PreTrainedTokenizerFast", tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, in whole characters, without outer white space.

    A token may end within a character of several bytes, and white space may turn out to be the
    last: both are held back until more is known. Bytes that never make a character show at the end.
    """
    ids: list[int] = []
    text, shown = "", 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text.strip()
        known = text.rstrip(_UNFINISHED).rstrip()
        if len(known) > shown:
            yield known[shown:]
            shown = len(known)
    if len(text) > shown:
        yield text[shown:]


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

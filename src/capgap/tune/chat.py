"""A conversation with a model: its history, and the answer piece by piece as it is drawn."""

from collections.abc import Iterable, Iterator

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from capgap.corpus.tokenizer import load_tokenizer, num_words
from capgap.errors import UserError
from capgap.evaluate.sample import Sampling, draw
from capgap.models.build import load_model
from capgap.models.stored import positions_of
from capgap.tune.conversations import Message
from capgap.tune.template import check_spoken, prompt_ids, set_template

# Where an answer may be longer, the history leaves it 1 / ANSWER_SHARE of what the model reads
ANSWER_SHARE = 4
# What bytes that are no whole character yet are decoded to
_UNFINISHED = "\ufffd"


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
        tokenizer: PreTrainedTokenizerFast,
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
        # logits behind the tokenizer's own only pad the table
        self.num_words = num_words(tokenizer)
        self.positions = positions_of(model.config)
        self.generator = self.sampling.generator(model.device)
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

    def _tokens(self, ids: list[int]) -> Iterator[int]:
        """Drawn one after another, until the model ends its turn or a limit is met."""
        self.num_tokens, self.ended = 0, None
        config = self.model.generation_config
        listed = config.eos_token_id if config else None
        ends = {self.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
        for token in draw(self.model, ids, self.sampling, self.generator, self.num_words):
            if token in ends:
                self.ended = "stop"
                return
            self.num_tokens += 1
            yield token
            if self.num_tokens == self.sampling.tokens:
                self.ended = "tokens"
                return
            if self.positions is not None and len(ids) + self.num_tokens >= self.positions:
                self.ended = "context"
                return


def pieces_of(tokenizer: PreTrainedTokenizerFast, tokens: Iterable[int]) -> Iterator[str]:
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
        whole = text.rstrip(_UNFINISHED).rstrip()
        if len(whole) > shown:
            yield whole[shown:]
            shown = len(whole)
    if len(text) > shown:
        yield text[shown:]


def load_chat(
    path_or_name: str,
    *,
    template: str = "own",
    system: str | None = None,
    sampling: Sampling | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Chat:
    """A model folder, or a name on the Hub, ready to answer: `Chat.answer(question)` yields the
    answer in pieces and keeps the history.

    `template`: the tokenizer's `own` or `minichat`. `trust_remote_code` runs the checkpoint's own
    code where nothing else describes its architecture. UserError: no such model, no chat template.
    """
    tokenizer = load_tokenizer(path_or_name, trust_remote_code=trust_remote_code)
    if template != "own":
        set_template(tokenizer, template)
    elif tokenizer.chat_template is None:
        raise UserError(
            f"{path_or_name} has no chat template: tune it with `capgap instruct`, or try "
            "template minichat"
        )
    model = load_model(path_or_name, trust_remote_code=trust_remote_code).to(device)
    return Chat(model, tokenizer, system=system, sampling=sampling)

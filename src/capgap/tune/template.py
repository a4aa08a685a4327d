"""How a conversation is written for a model, and which of its tokens are the assistant's."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from capgap.corpus.tokenizer import check_text
from capgap.errors import UserError, border
from capgap.machine import limited
from capgap.stage import FieldError
from capgap.tune.conversations import Conversation, Message, Reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATES = ("minichat", "own")
# What a template may take for one conversation, and the characters that it may add
SECONDS, MEMORY, LONGEST = 5.0, 2**30, 10**6
_REFUSED = "the chat template cannot be used"

# As the authors of MiniChat write it (GeneZC/MiniMA, conversation.py and its data builder): the
# system prompt and every turn end with the token that ends a document, a space stands behind the
# roles, none before the end. What the assistant writes begins with that space.
_MINICHAT = """\
{%- set system = SYSTEM -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{{- bos_token if bos_token is defined and bos_token else '' -}}
{{- system | trim + eos_token if system | trim else '' -}}
{%- for turn in turns -%}
  {%- if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('user and assistant must take turns, the user first') -}}
  {%- elif turn['role'] == 'user' -%}
    {{- '[|User|] ' + turn['content'] | trim + eos_token -}}
  {%- else -%}
    {{- '[|Assistant|]' -}}
    {%- generation -%}{{- ' ' + turn['content'] | trim + eos_token -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{{- '[|Assistant|]' if add_generation_prompt else '' -}}
"""


@dataclass(frozen=True)
class Example:
    """Token ids of a conversation, and which of them the loss counts: the assistant's, with the
    token that ends each of its turns."""

    ids: list[int]
    counted: list[bool]

    @property
    def num_counted(self) -> int:
        return sum(self.counted)

    @property
    def spoken(self) -> list[int]:
        """The ids that count."""
        return [i for i, counts in zip(self.ids, self.counted, strict=True) if counts]

    @property
    def labels(self) -> list[int]:
        """ids where they count and -100 elsewhere, not shifted."""
        return [i if counts else -100 for i, counts in zip(self.ids, self.counted, strict=True)]


def set_template(tokenizer: "PreTrainedTokenizerFast", template: str, system: str = "") -> None:
    """Gives the tokenizer its template, `minichat` or its `own`, and makes sure that it serves.
    `system` stands where a conversation has no system message.

    UserError: no such template, none of its own, one that does not mark the assistant's part, or
    one that the tokenizer cannot express.
    """
    check_spoken(tokenizer, system, "the system prompt")
    own = tokenizer.chat_template
    if template == "minichat":
        text = json.dumps(system, ensure_ascii=False)
        tokenizer.chat_template = _MINICHAT.replace("SYSTEM", text)
    elif template != "own":
        raise FieldError("template", f"{template!r}: take one of {', '.join(TEMPLATES)}")
    elif own is None:
        raise FieldError("template", "own: the tokenizer has no chat template; take minichat")
    elif "{% generation" not in own and "{%- generation" not in own:
        raise FieldError(
            "template",
            "own: the tokenizer's chat template does not mark the assistant's part "
            "with {% generation %}; add that, or take minichat",
        )
    elif system:
        raise FieldError("system", "goes with template minichat: put it into your template")
    _check_template(tokenizer)


def _check_template(tokenizer: "PreTrainedTokenizerFast") -> None:
    """UserError where the tokenizer cannot express its template.

    A short conversation must come out as the assistant's text with the end token last, and begin
    with exactly the tokens that a prompt for its answer has.
    """
    end, end_id = tokenizer.eos_token, tokenizer.eos_token_id
    if tokenizer.encode(f"a{end}", add_special_tokens=False)[-1:] != [end_id]:
        raise UserError(f"{_REFUSED}: the tokenizer does not read {end!r} as one token")
    question: Message = {"role": "user", "content": "ab c"}
    answer: Message = {"role": "assistant", "content": "b ca"}
    example = encode(tokenizer, [question, answer])
    prompt = prompt_ids(tokenizer, [question])
    if example.ids[: len(prompt)] != prompt or any(example.counted[: len(prompt)]):
        raise UserError(f"{_REFUSED}: its prompt is not how a conversation begins")
    if example.spoken.count(end_id) != 1 or end_id not in example.spoken[-2:]:
        raise UserError(f"{_REFUSED}: the assistant's turn does not end with {end!r}")
    if tokenizer.decode(example.spoken, skip_special_tokens=True).strip() != answer["content"]:
        raise UserError(f"{_REFUSED}: the tokenizer changes the assistant's text")
    text = tokenizer.decode(example.ids)
    for role in ("[|User|]", "[|Assistant|]"):
        if role in str(tokenizer.chat_template) and role not in text:
            raise UserError(f"{_REFUSED}: the tokenizer cannot write {role}")


def encode(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message]) -> Example:
    """The tokens of a whole conversation, the assistant's marked but for turns of weight 0, by the
    template that `set_template` gave to the tokenizer."""
    rendered = _rendered(tokenizer, messages, prompt=False)
    marked = [bool(i) for i in rendered["assistant_masks"]]
    learnt = ["weight" not in one for one in messages if one["role"] == "assistant"]
    if not all(learnt):
        # the turn that a token lies in or behind, from 1
        turns = np.cumsum(np.diff(np.array(marked, int), prepend=0) == 1)
        if turns[-1] != len(learnt):
            raise UserError(f"{_REFUSED}: it does not part the turns, of which some have weight 0")
        marked = [counts and learnt[i - 1] for counts, i in zip(marked, turns, strict=True)]
    return Example(list(rendered["input_ids"]), marked)


def writes(tokenizer: "PreTrainedTokenizerFast", item: Conversation, reading: Reading[Any]) -> bool:
    """Whether a line has no special token, and no key without which the template writes the same;
    tells the reading."""
    if any(special_in(tokenizer, text) for text in item.texts):
        reading.found(item.line, "special_token")
        return False
    keys = {key for message in item.messages for key in message} - {"role", "content", "weight"}
    written = {}
    for without in {"", *keys} if keys else ():
        kept = [{key: one for key, one in m.items() if key != without} for m in item.messages]
        with suppress(UserError):
            written[without] = _rendered(tokenizer, kept, prompt=False)["input_ids"]
    lost = sorted(k for k in keys if "" not in written or written.get(k) == written[""])
    if lost:
        reading.found(item.line, "not_taken", ", ".join(lost))
    return not lost


def prompt_ids(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation that the assistant is to go on with."""
    return list(_rendered(tokenizer, messages, prompt=True)["input_ids"])


def _rendered(
    tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message], *, prompt: bool
) -> Any:
    """By the tokenizer's template, which may be a stranger's program: within limits."""
    render = tokenizer.apply_chat_template
    with border(_REFUSED), limited(f"{_REFUSED}: it", seconds=SECONDS, memory=MEMORY):
        # as text first: the tokenizer's own code ends the program where memory does
        text: Any = render(list(messages), tokenize=False, add_generation_prompt=prompt)
        said = sum(len(message["content"]) for message in messages)
        if len(text) > LONGEST + 10 * said:
            raise UserError(f"{_REFUSED}: of {said} characters it makes {len(text)}")
        return render(
            list(messages),
            tokenize=True,
            return_dict=True,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=not prompt,
        )


def fitted(example: Example, window: int) -> Example | None:
    """At most `window` tokens, cut behind an answer; None where no whole answer lies within."""
    if len(example.ids) <= window:
        return example
    counted = example.counted
    ends = (i + 1 for i in range(window) if counted[i] and not counted[i + 1])
    end = max(ends, default=0)
    return Example(example.ids[:end], counted[:end]) if end else None


def check_spoken(tokenizer: "PreTrainedTokenizerFast", text: str, what: str) -> None:
    """UserError for half a character or a special token in a text that somebody says."""
    check_text(text, what)
    special = special_in(tokenizer, text)
    if special is not None:
        raise UserError(f"{special!r} is a special token of this model: leave it out of {what}")


def special_in(tokenizer: "PreTrainedTokenizerFast", text: str) -> str | None:
    """A special token that stands literally in a text: it would be read as the token itself."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return next((n for n in (*tokenizer.all_special_tokens, *added) if n and n in text), None)

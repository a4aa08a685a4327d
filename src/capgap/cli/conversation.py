"""`capgap chat`: a conversation in the terminal."""

import contextlib
import sys
import unicodedata
from typing import TYPE_CHECKING, Annotated

import typer

from capgap.cli.app import Json, print_json
from capgap.corpus.names import check_model_name
from capgap.errors import UserError
from capgap.hub import hub_name

if TYPE_CHECKING:
    from capgap.tune.chat import Chat


def chat(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    once: Annotated[str | None, typer.Option(help="Answer this question and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    template: Annotated[str, typer.Option(help="The tokenizer's own, or minichat.")] = "own",
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Share of probability to draw from.")] = 0.95,
    tokens: Annotated[int, typer.Option(help="Tokens of the longest answer.")] = 512,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    json_: Json = False,
) -> None:
    """Talk to a model: /reset forgets what was said, /quit or Ctrl-D ends."""
    if json_ and once is None:
        raise UserError("--json goes with --once QUESTION")
    model = hub_name(model)
    check_model_name(model)
    from capgap.evaluate.sample import Sampling
    from capgap.machine import resolve_device
    from capgap.tune.chat import load_chat

    talk = load_chat(
        model,
        template=template,
        system=system,
        sampling=Sampling(temperature, top_p, tokens, seed),
        device=resolve_device(device),
        trust_remote_code=trust_remote_code,
    )
    if once is None:
        _converse(talk)
    elif json_:
        answer = "".join(talk.answer(once))
        told = {"model": model, "question": once, "answer": answer}
        print_json(told | {"tokens": talk.num_tokens, "ended": talk.ended})
    else:
        _print_answer(talk, once)


def _converse(talk: "Chat") -> None:
    """Questions from standard input, one a line, until it ends."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        # arrow keys and earlier questions, where the system has them
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        print("/reset forgets what was said, /quit ends", file=sys.stderr)
    said_dropped = False
    while True:
        try:
            question = input("> " if on_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if question == "/quit":
            break
        if question == "/reset":
            talk.reset()
        elif question.startswith("/"):
            print(f"{question} is no command: /reset or /quit", file=sys.stderr)
        elif question:
            try:
                _print_answer(talk, question)
            except UserError as error:
                print(error, file=sys.stderr)
            if talk.num_dropped and not said_dropped:
                said_dropped = True
                dropped = "(the oldest turns no longer fit; the model does not see them)"
                print(dropped, file=sys.stderr)
    if on_terminal:
        print()


def _print_answer(talk: "Chat", question: str) -> None:
    """As it comes; Ctrl-C ends the answer and not the conversation."""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in talk.answer(question):
            # without what would steer a terminal: a model writes anything
            harmless = (c for c in piece if c in "\n\t" or unicodedata.category(c) != "Cc")
            print("".join(harmless), end="", flush=True)
    print()
    if talk.ended in ("tokens", "context"):
        limit = "as --tokens says" if talk.ended == "tokens" else "the model reads no more"
        print(f"(cut after {talk.num_tokens} tokens: {limit})", file=sys.stderr)

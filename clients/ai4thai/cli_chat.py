"""The command chat: a conversation in the terminal, or with the lines of a pipe."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Final

import typer

from ai4thai.chat import Conversation, read_picture
from ai4thai.cli_options import (
    VISION,
    Describer,
    MaxNewTokens,
    Priority,
    Seed,
    Temperature,
    TimeoutS,
    TopP,
    VisionAddress,
)
from ai4thai.cli_output import print_answer_notes, print_error, print_note, print_piece
from ai4thai.cli_vision import text_options
from ai4thai.errors import AI4ThaiError
from ai4thai.server_info import Task
from ai4thai.vision_client import VisionClient

PROMPT: Final = "> "
COMMANDS: Final = {
    "/image FILE": "a picture for the next question",
    "/clear": "begin anew with the last picture",
    "/help": "this list",
    "/exit": "leave, like Ctrl-D",
}


def chat(
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGE...", help="What the first question is about.")
    ] = None,
    system: Annotated[str, typer.Option(help="Standing instructions for the model.")] = "",
    model: Describer = "",
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    priority: Priority = "",
    timeout: TimeoutS = 300,
    vision: VisionAddress = VISION,
) -> None:
    """Talks about images: each question goes with what was said before.

    Ctrl-C stops an answer, Ctrl-D ends. Without a terminal every line of the input is a question, and only answers are printed.
    """
    pictures = [read_picture(image) for image in images or []]
    options = text_options(model, max_new_tokens, temperature, top_p, seed)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # half a character, mistyped or cut, shall not end the conversation
    with VisionClient(vision, timeout_s=timeout) as client:
        conversation = Conversation(client, system=system, priority=priority, **options)
        for picture in pictures:
            conversation.show(picture)
        if sys.stdin.isatty() and sys.stdout.isatty():
            _greet(client, model)
            with _ctrl_c(lambda *_: conversation.stop()):
                _Talk(conversation, at_terminal=True).go_through(_typed())
        elif not _Talk(conversation, at_terminal=False).go_through(sys.stdin):
            raise typer.Exit(1)


class _Talk:
    """Lines in, answers out; an error is a sentence, and the conversation goes on."""

    def __init__(self, conversation: Conversation, *, at_terminal: bool) -> None:
        self._conversation = conversation
        self._at_terminal = at_terminal

    def go_through(self, lines: Iterable[str]) -> bool:
        """Whether all went well."""
        well = True
        for line in lines:
            words = line.strip()
            if words in ("/exit", "/quit"):
                break
            try:
                if words.startswith("/"):
                    self._obey(words)
                elif words:
                    self._answer(words)
                continue
            except BrokenPipeError:
                raise  # nobody reads the answers any more
            except FileNotFoundError as error:
                print_error(f"There is no file {error.filename}.")
            except OSError as error:
                print_error(f"{error.filename}: {error.strerror}.")
            except (AI4ThaiError, ValueError) as error:
                print_error(error)
                if isinstance(error, AI4ThaiError) and error.reason == "PROMPT_TOO_LONG":
                    print_note("/clear begins anew with the last picture.")
            well = False
        return well

    def _answer(self, question: str) -> None:
        begun = False
        try:
            for piece in self._conversation.ask(question):
                print_piece(piece)
                begun = True
        except AI4ThaiError:
            if begun:
                print_piece("\n")
            raise
        print_piece("\n")
        if self._at_terminal:
            answer = self._conversation.answer
            if answer is None:
                print_note("stopped")
            else:
                print_answer_notes(answer)

    def _obey(self, words: str) -> None:
        command, _, rest = words.partition(" ")
        match command:
            case "/image" if rest:
                # A file that is dropped on a terminal comes in quotes, or with a backslash before each space.
                path = Path(rest.strip().strip("'\"").replace("\\ ", " "))
                self._conversation.show(read_picture(path))
                self._note(f"{path.name} goes with the next question.")
            case "/clear":
                self._conversation.clear()
                pictured = " with the last picture" if self._conversation.pictures else ""
                self._note(f"Begun anew{pictured}.")
            case "/help":
                for name, meaning in COMMANDS.items():
                    print_note(f"{name:<12} {meaning}")
            case _:
                raise ValueError(f"There is no {words!r} here: {', '.join(COMMANDS)}.")

    def _note(self, text: str) -> None:
        if self._at_terminal:
            print_note(text)


def _greet(client: VisionClient, wanted: str) -> None:
    """Says who answers; raises when nobody does, before a question is typed in vain."""
    models = client.info(timeout_s=10).models
    name = wanted or next((model.name for model in models if model.is_default and model.task == Task.GENERATE), "")
    print_note(f"{name or 'The vision server'} at {client.address} · /help lists the commands, Ctrl-D ends")


def _typed() -> Iterator[str]:
    """What is typed, line by line; Ctrl-C gives a line up, Ctrl-D ends."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its editing and its history
    while True:
        try:
            with _ctrl_c(signal.default_int_handler):
                line = input(PROMPT)
        except KeyboardInterrupt:
            print_piece("\n")
            continue
        except EOFError:
            print_piece("\n")
            return
        yield line


@contextmanager
def _ctrl_c(does: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """What Ctrl-C does meanwhile. Only where a line is typed it raises: twice in haste must not end the program."""
    before = signal.signal(signal.SIGINT, does)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

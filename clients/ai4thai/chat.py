"""A conversation with a vision server: what was shown and said so far goes along with each question."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Unpack

from ai4thai import wire
from ai4thai.errors import AI4ThaiError
from ai4thai.options import Message, TextOptions
from ai4thai.results import Answer
from ai4thai.streams import TextStream
from ai4thai.vision_client import VisionClient

# How files begin that a server takes: JPEG, PNG, GIF, BMP, TIFF (BigTIFF too); WebP has its name further in.
_BEGINNINGS: Final = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class Conversation:
    """Questions and answers in turn; the server keeps nothing of them. For one thread.

        conversation = Conversation(client)
        conversation.show(read_picture("photo.jpg"))
        for piece in conversation.ask("How many stars are there?"):
            print(piece, end="", flush=True)

    A question that failed is not kept, nor are its words sent again; its pictures stay for the next question, unless the server
    could not read them. An answer that was stopped is kept as far as it came.
    """

    def __init__(
        self, client: VisionClient, *, system: str = "", priority: str = "", **options: Unpack[TextOptions]
    ) -> None:
        """Remembers whom to ask and how.

        Args:
            client: the server's client; it is not closed here.
            system: standing instructions. Empty: none.
            priority: as in VisionClient.generate.
            options: of every answer.

        Raises:
            TypeError, ValueError: an option or a priority that there is not.
        """
        wire.write_generate([], options, priority)  # to refuse what is wrong before there is a question
        self._client = client
        self._beginning = [Message("system", system)] if system else []
        self._priority = priority
        self._options = options
        self._turns: list[Message] = []
        self._pictures: list[bytes] = []  # for the next question
        self._last_pictures: list[bytes] = []  # of the latest question that had any
        self._stream: TextStream | None = None
        self._stopped = False
        self.answer: Answer | None = None
        """How the latest answer came about; None before its end, and when it was stopped."""

    @property
    def messages(self) -> list[Message]:
        """What the server will be told before the next question."""
        return [*self._beginning, *self._turns]

    @property
    def pictures(self) -> int:
        """How many pictures wait for the next question."""
        return len(self._pictures)

    def show(self, content: bytes) -> None:
        """Adds a picture, a file's bytes, to the next question."""
        self._pictures.append(content)

    def clear(self) -> None:
        """Begins anew: nothing was said yet. The latest pictures are shown again with the next question."""
        self._turns.clear()
        self._pictures = self._pictures or list(self._last_pictures)

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece; it becomes part of the conversation when it has ended or was stopped.

        Raises:
            AI4ThaiError: the call failed, perhaps in the middle of the answer.
        """
        self.answer, self._stopped = None, False
        turn = Message("user", [*self._pictures, question])
        said: list[str] = []
        try:
            with self._client.generate([*self.messages, turn], priority=self._priority, **self._options) as stream:
                self._stream = stream
                if self._stopped:  # in the meantime
                    stream.cancel()
                for piece in stream:
                    said.append(piece)
                    yield piece
                if not self._stopped:
                    self.answer = stream.summary
        except GeneratorExit:
            pass  # the caller reads no further: as stop()
        except AI4ThaiError as error:
            if error.reason.startswith("IMAGE_"):
                self._pictures.clear()
            raise
        finally:
            self._stream = None
        if said:
            self._last_pictures = self._pictures or self._last_pictures
            self._pictures = []
            self._turns += [turn, Message("assistant", "".join(said))]

    def stop(self) -> None:
        """Stops the answer that is being given, at the server too; from any thread, or where a signal is handled."""
        self._stopped = True
        if (stream := self._stream) is not None:
            stream.cancel()


def read_picture(path: str | os.PathLike[str]) -> bytes:
    """Reads an image file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no image.
    """
    content = Path(path).expanduser().read_bytes()
    if not content.startswith(_BEGINNINGS) and content[8:12] != b"WEBP":
        raise ValueError(f"{path} is no image of a known kind: JPEG, PNG, WebP, BMP, TIFF or GIF.")
    return content

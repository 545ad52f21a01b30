"""A conversation, as a library, by the lines of a pipe, and at a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ai4thai import VisionClient
from ai4thai.chat import Conversation, read_picture
from ai4thai.cli import app
from ai4thai.errors import AI4ThaiError, Busy, InvalidInput
from ai4thai.vision.v1 import detection_pb2, generation_pb2, vision_service_pb2
from PIL import Image
from typer.testing import CliRunner, Result

from serving.errors import Code, ServiceError
from tests.clients.fake_servers import FakeServer, FakeVision
from tests.processes import ROOT
from tests.terminal import Terminal

ANSWER = "".join(FakeVision.pieces)
FULL = ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "8 generations wait; the limit is 8.")
TOO_LONG = ServiceError(Code.INVALID_ARGUMENT, "PROMPT_TOO_LONG", "The prompt has 1,030 tokens.", cure="Send less.")
UNREADABLE = ServiceError(Code.INVALID_ARGUMENT, "IMAGE_UNREADABLE", "The 16 bytes are no image.")


def asked(fake: FakeVision) -> vision_service_pb2.GenerateRequest:
    request = fake.script.requests["Generate"]
    assert isinstance(request, vision_service_pb2.GenerateRequest)
    return request


def turns(fake: FakeVision) -> list[tuple[str, list[str | bytes]]]:
    """The latest request's messages: who, and the words and pictures."""
    return [
        (
            generation_pb2.Role.Name(message.role).removeprefix("ROLE_"),
            [part.image.content if part.HasField("image") else part.text for part in message.parts],
        )
        for message in asked(fake).messages
    ]


# ---- the conversation itself


def test_each_question_goes_with_what_was_said_before(vision: VisionClient, fake_vision: FakeVision) -> None:
    conversation = Conversation(vision, system="Be short.", priority="batch", seed=3)
    conversation.show(b"one")

    assert list(conversation.ask("First?")) == list(FakeVision.pieces)
    assert turns(fake_vision) == [("SYSTEM", ["Be short."]), ("USER", [b"one", "First?"])]
    assert conversation.answer is not None and conversation.answer.model == "fake-describer"

    conversation.show(b"two")
    conversation.show(b"three")
    list(conversation.ask("Second?"))
    assert turns(fake_vision)[1:] == [
        ("USER", [b"one", "First?"]),
        ("ASSISTANT", [ANSWER]),
        ("USER", [b"two", b"three", "Second?"]),
    ]
    assert (asked(fake_vision).priority, asked(fake_vision).options.seed) == (detection_pb2.PRIORITY_BATCH, 3)


def test_begun_anew_the_last_pictures_are_shown_again(vision: VisionClient, fake_vision: FakeVision) -> None:
    conversation = Conversation(vision, system="Be short.")
    for picture in (b"one", b"two"):
        conversation.show(picture)
        list(conversation.ask("Which?"))
    list(conversation.ask("And?"))
    conversation.clear()
    conversation.clear()
    list(conversation.ask("Again?"))
    assert turns(fake_vision) == [("SYSTEM", ["Be short."]), ("USER", [b"two", "Again?"])]

    conversation.show(b"three")
    conversation.clear()
    list(conversation.ask("This one?"))
    assert turns(fake_vision)[1:] == [("USER", [b"three", "This one?"])]


@pytest.mark.usefixtures("quick_retries")
def test_a_question_that_failed_is_not_kept_but_its_picture_is(vision: VisionClient, fake_vision: FakeVision) -> None:
    conversation = Conversation(vision)
    list(conversation.ask("First?"))
    conversation.show(b"one")
    fake_vision.script.fail_next("Generate", *[FULL] * 5)  # more than are tried again
    with pytest.raises(Busy):
        list(conversation.ask("Second?"))
    with pytest.raises(AI4ThaiError):
        list(conversation.ask("abrupt"))  # in the middle of the answer
    list(conversation.ask("Third?"))
    assert turns(fake_vision) == [("USER", ["First?"]), ("ASSISTANT", [ANSWER]), ("USER", [b"one", "Third?"])]


def test_a_picture_that_the_server_cannot_read_is_left_out(vision: VisionClient, fake_vision: FakeVision) -> None:
    conversation = Conversation(vision)
    conversation.show(b"broken")
    fake_vision.script.fail_next("Generate", UNREADABLE)
    with pytest.raises(InvalidInput):
        list(conversation.ask("What?"))
    list(conversation.ask("Hello?"))
    assert turns(fake_vision) == [("USER", ["Hello?"])]


@pytest.mark.parametrize("how", ["stop()", "stop() from another thread", "reading no further"])
def test_a_stopped_answer_is_kept_as_far_as_it_came(vision: VisionClient, fake_vision: FakeVision, how: str) -> None:
    conversation = Conversation(vision)
    heard = []
    for piece in conversation.ask("forever"):
        heard.append(piece)
        if len(heard) == 3:
            if how == "reading no further":
                break
            stop = conversation.stop if how == "stop()" else threading.Thread(target=conversation.stop).start
            stop()
    assert fake_vision.left.wait(10)
    assert conversation.answer is None
    list(conversation.ask("And?"))
    if how == "reading no further":
        assert turns(fake_vision)[1] == ("ASSISTANT", ["more more more "])
    else:
        assert turns(fake_vision)[1] == ("ASSISTANT", ["".join(heard)])
    assert conversation.answer is not None


def test_wrong_options_are_refused_before_there_is_a_question(vision: VisionClient) -> None:
    with pytest.raises(ValueError, match="'urgent'"):
        Conversation(vision, priority="urgent")
    with pytest.raises(TypeError, match="temprature"):
        Conversation(vision, temprature=1)  # type: ignore[call-arg]


def test_pictures_are_looked_at_when_they_are_read(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
        assert read_picture(tmp_path / name) == (tmp_path / name).read_bytes()
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    for name in ("notes.txt", "empty.jpg"):
        with pytest.raises(ValueError, match=r"is no image of a known kind: JPEG"):
            read_picture(tmp_path / name)


# ---- a pipe


def chat(server: FakeServer, lines: str, *arguments: object) -> Result:
    command = ["chat", *map(str, arguments), "--vision", server.address]
    return CliRunner().invoke(app, command, input=lines)


def test_a_pipe_asks_line_by_line_and_gets_the_answers_alone(
    vision_server: FakeServer, fake_vision: FakeVision, image: Path
) -> None:
    result = chat(vision_server, "First?\n\n  \nSecond?\n/exit\nThird?\n", image, "--max-new-tokens", 7)

    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{ANSWER}\n{ANSWER}\n", "")
    assert turns(fake_vision) == [
        ("USER", [image.read_bytes(), "First?"]),
        ("ASSISTANT", [ANSWER]),
        ("USER", ["Second?"]),
    ]
    assert asked(fake_vision).options.max_new_tokens == 7


def test_a_failed_line_is_a_sentence_the_rest_is_answered_and_the_exit_code_tells(
    vision_server: FakeServer, fake_vision: FakeVision, image: Path, tmp_path: Path
) -> None:
    fake_vision.script.fail_next("Generate", TOO_LONG)
    lines = f"Long?\n/image {tmp_path / 'nowhere.jpg'}\n/image {tmp_path}\n/fly\n/image\nabrupt\nGood?\n"

    result = chat(vision_server, lines)

    assert (result.exit_code, result.stdout) == (1, f"half\n{ANSWER}\n")
    assert turns(fake_vision) == [("USER", ["Good?"])]
    told = result.stderr.splitlines()
    assert told[:2] == ["Error: The prompt has 1,030 tokens. Send less.", "/clear begins anew with the last picture."]
    assert told[2] == f"Error: There is no file {tmp_path / 'nowhere.jpg'}."
    assert told[3] == f"Error: {tmp_path}: Is a directory."
    assert "'/fly'" in told[4] and "/image FILE, /clear, /help, /exit" in told[5]
    assert "summary" in told[6]


def test_pictures_come_with_the_next_question(
    vision_server: FakeServer, fake_vision: FakeVision, image: Path, tmp_path: Path
) -> None:
    other = tmp_path / "two words.jpg"
    other.write_bytes(b"\xff\xd8 another")
    chat(vision_server, f"/image {image}\n/image '{other}'\nWhat?\n/clear\nAgain?\n", "--system", "Be short.")

    assert turns(fake_vision) == [
        ("SYSTEM", ["Be short."]),
        ("USER", [image.read_bytes(), other.read_bytes(), "Again?"]),
    ]


@pytest.mark.parametrize("arguments", [["nowhere.jpg"], [__file__], ["--priority", "urgent"]])
def test_what_is_wrong_from_the_beginning_is_said_before_any_question(
    vision_server: FakeServer, fake_vision: FakeVision, arguments: list[str]
) -> None:
    result = chat(vision_server, "What?\n", *arguments)

    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and len(result.stderr.splitlines()) == 1
    assert not fake_vision.script.calls


@pytest.mark.usefixtures("quick_retries")
def test_nobody_there_is_an_error() -> None:
    result = CliRunner().invoke(app, ["chat", "--vision", "localhost:1"], input="What?\n")

    assert result.exit_code == 1 and result.stderr.startswith("Error: No server answers at localhost:1")


def test_half_a_character_does_not_end_the_conversation(vision_server: FakeServer, fake_vision: FakeVision) -> None:
    command = [sys.executable, "-m", "ai4thai.cli", "chat", "--vision", vision_server.address]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "clients"), "PYTHONUTF8": "1"}
    done = subprocess.run(command, env=env, input=b"\xe0\xb8 what?\nAnd?\n", capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.decode()) == (0, f"{ANSWER}\n{ANSWER}\n"), done.stderr
    assert turns(fake_vision)[0] == ("USER", ["\ufffd what?"])


# ---- a terminal


def test_a_conversation_at_a_terminal(vision_server: FakeServer, fake_vision: FakeVision, image: Path) -> None:
    with Terminal("ai4thai.cli", "chat", "--vision", vision_server.address, columns=60) as terminal:
        terminal.wait_for("Ctrl-D ends\n> ")
        terminal.type("มีอะไร\n")
        assert terminal.wait_for("> ") == f"มีอะไร\n{ANSWER}\nfake-describer · 3 tokens · first after 0 ms · stop\n> "

        terminal.type("forever\n")
        terminal.wait_for("more more ")
        terminal.type("\x03\x03\x03")  # a person in haste
        terminal.wait_for("\nstopped\n")
        terminal.wait_for("> ")
        assert fake_vision.left.wait(10)

        terminal.type("given up\x03")  # Ctrl-C where nothing runs: the line
        terminal.wait_for("> ")
        terminal.type(f"/image {image}\n")
        terminal.wait_for("scene.jpg goes with the next question.\n> ")
        fake_vision.script.fail_next("Generate", TOO_LONG)
        terminal.type("\x1b[A\x1b[A\n")  # twice up: the question before
        terminal.wait_for(
            "Error: The prompt has 1,030 tokens. Send less.\n/clear begins anew with the last picture.\n> "
        )
        assert turns(fake_vision)[-1] == ("USER", [image.read_bytes(), "forever"])

        terminal.type("/clear\n")
        terminal.wait_for("Begun anew with the last picture.\n> ")
        terminal.type("/help\n")
        terminal.wait_for("/image FILE  a picture for the next question\n")
        terminal.wait_for("> ")
        terminal.type("Once more?\n")
        terminal.wait_for("stop\n> ")
        assert turns(fake_vision) == [("USER", [image.read_bytes(), "Once more?"])]
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_at_a_terminal_nobody_there_is_said_before_a_question(image: Path) -> None:
    with Terminal("ai4thai.cli", "chat", str(image), "--vision", "localhost:1") as terminal:
        terminal.wait_for("Error: No server answers at localhost:1")
        assert terminal.wait() == 1
    assert "> " not in terminal.text


def test_what_a_model_writes_does_not_move_the_cursor(vision_server: FakeServer, fake_vision: FakeVision) -> None:
    fake_vision.pieces = ("a\x1b[2J", "b\x9b2Jc\r\x07", "d\te\n", "f")
    with Terminal("ai4thai.cli", "chat", "--vision", vision_server.address) as terminal:
        terminal.wait_for("> ")
        terminal.type("What?\n")
        terminal.wait_for("a[2Jb2Jcd")
        terminal.wait_for("\n> ")
        terminal.type("\x04")
        assert terminal.wait() == 0

"""A person at a terminal talks with the real server about a shipped sample."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.end_to_end.calling import Server
from tests.end_to_end.conftest import wait_until
from tests.end_to_end.slowing import slowed
from tests.processes import ROOT
from tests.terminal import Terminal

SAMPLE = ROOT / "clients" / "ai4thai" / "samples" / "scene-01.jpg"  # four shapes
# The marks that belong above or below the letter before them.
MARKS = "ัิีึืฺุู็่้๊๋์ํ๎"


def chat(vision: Server, *arguments: str, columns: int = 80) -> Terminal:
    return Terminal("ai4thai.cli", "chat", *arguments, "--vision", vision.address, columns=columns)


def test_questions_in_english_and_thai_are_answered(vision: Server) -> None:
    with chat(vision, str(SAMPLE)) as terminal:
        assert "shapes-describer at " in terminal.wait_for("Ctrl-D ends\n> ")
        terminal.type("How many shapes are there?\n")
        shown = terminal.wait_for("stop\n> ")
        assert shown.startswith("How many shapes are there?\nThere are 4.\nshapes-describer · ")
        assert " tokens/s · first after " in shown

        terminal.type("/clear\n")
        terminal.wait_for("Begun anew with the last picture.\n> ")
        terminal.type("อธิบายภาพนี้\n")
        question, answer, notes, _ = terminal.wait_for("stop\n> ").split("\n")
        assert question == "อธิบายภาพนี้"
        assert answer.startswith("มีรูปทรง 4 ชิ้น ได้แก่ ")
        assert notes.startswith("shapes-describer · ")

        terminal.type("How many shapes are there?\n")  # with all that was said so far
        terminal.wait_for("\n> ")
        terminal.type("/exit\n")
        assert terminal.wait() == 0


def test_ctrl_c_stops_the_answer_at_the_server_and_the_conversation_goes_on(vision: Server) -> None:
    def cancelled() -> float:
        return vision.metric("ai4thai_generations_total", finish_reason="cancelled")

    before = cancelled()
    with chat(vision, str(SAMPLE)) as terminal:
        terminal.wait_for("> ")
        with slowed(vision.process.pid, 30):
            terminal.type("อธิบายภาพนี้\n")
            terminal.wait_for("อธิบายภาพนี้\nมี")
            terminal.type("\x03")
            assert len(terminal.wait_for("stopped\n> ")) < 60
        wait_until("the generation is cancelled", lambda: cancelled() == before + 1)
        terminal.type("/clear\n")
        terminal.wait_for("> ")
        terminal.type("How many shapes are there?\n")
        terminal.wait_for("\nThere are 4.\n")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_a_question_that_is_too_long_says_what_helps(vision: Server) -> None:
    asked = "มีวงกลมสีแดงกี่วงในภาพนี้ " * 400  # more than a terminal takes as one line
    done = subprocess.run(
        [sys.executable, "-m", "ai4thai.cli", "chat", "--vision", vision.address],
        env={**os.environ, "PYTHONPATH": str(ROOT / "clients"), "PYTHONUTF8": "1"},
        input=f"{asked}\nHow many?\n",
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    refused, cure = done.stderr.splitlines()
    assert refused.startswith("Error: The prompt has ") and " tokens" in refused
    assert cure == "/clear begins anew with the last picture."
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1  # the second one's answer

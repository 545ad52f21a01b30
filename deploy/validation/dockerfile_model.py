"""A Dockerfile as stages that know their parents, read by BuildKit's own parser."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import dockerfile

# `$NAME`, `${NAME}`, `${NAME:-when it is empty}`, `${NAME:+when it is not}`.
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?([-+])([^}]*))?\})")
# What may stand before a program's name in a shell line.
_PRELUDE = re.compile(r"(?:[A-Za-z_]\w*=.*|if|then|else|elif|while|until|do|!|\{|\(|exec|env|time)")
_ENDS_COMMAND = re.compile(r"[;&|()]+")


@dataclass(frozen=True)
class Instruction:
    """One instruction with its lines."""

    name: str
    flags: tuple[str, ...]
    words: tuple[str, ...]  # as the parser splits them; a RUN is one word
    text: str  # RUN: the shell text, here-documents included
    is_json: bool
    line: int

    def flag(self, name: str) -> str | None:
        """The value of `--name=value`; None when it is not there."""
        prefix = f"--{name}="
        return next((flag.removeprefix(prefix) for flag in self.flags if flag.startswith(prefix)), None)


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows it."""

    name: str
    image: str  # the image it begins from, with the build arguments' defaults; a stage's name when parent is set
    line: int
    parent: Stage | None
    arguments: Mapping[str, str]  # ARG and ENV of the file's head and of the stages before it in the chain
    own: list[Instruction] = field(default_factory=list)

    @property
    def chain(self) -> list[Instruction]:
        """The instructions of the parents, then its own."""
        return [*(self.parent.chain if self.parent else []), *self.own]

    def all(self, name: str) -> list[Instruction]:
        """Every instruction of this name in the chain."""
        return [instruction for instruction in self.chain if instruction.name == name]

    def last(self, name: str) -> Instruction | None:
        """The one that is in force, of those of which the last counts."""
        found = self.all(name)
        return found[-1] if found else None

    @property
    def environment(self) -> dict[str, tuple[str, int]]:
        """What the container's environment holds: the value and its line."""
        values = {**self.arguments}
        found: dict[str, tuple[str, int]] = {}
        for instruction in self.chain:
            for name, value in pairs(instruction):
                values[name] = substitute(value, values)
                if instruction.name == "ENV":
                    found[name] = (values[name], instruction.line)
        return found

    @property
    def values(self) -> dict[str, str]:
        """Build arguments with their defaults and the environment, for `substitute`."""
        values = {**self.arguments}
        for instruction in self.chain:
            for name, value in pairs(instruction):
                # `ARG NAME` alone takes the default that stands before the first FROM.
                if instruction.name == "ENV" or value or name not in values:
                    values[name] = substitute(value, values)
        return values


def read_stages(text: str) -> list[Stage]:
    """The stages in the file's order; raises dockerfile.GoParseError, whose message has the line, when it cannot be parsed."""
    head: dict[str, str] = {}
    stages: list[Stage] = []
    for command in dockerfile.parse_string(text):
        name = command.cmd.upper()
        if name == "FROM":
            image = substitute(command.value[0], head)
            parent = next((stage for stage in reversed(stages) if stage.name.lower() == image.lower()), None)
            words = command.value
            own_name = words[2] if len(words) == 3 and words[1].upper() == "AS" else f"stage {len(stages)}"
            stages.append(Stage(own_name, image, command.start_line, parent, head))
            continue
        documents = "\n".join(document.content for document in command.heredocs)
        instruction = Instruction(
            name=name,
            flags=tuple(command.flags),
            words=tuple(command.value),
            # A here-document is the shell text itself (`RUN <<EOF`) or a program's input; either way it is looked into.
            text="\n".join(filter(None, (" ".join(command.value), documents))),
            is_json=command.json,
            line=command.start_line,
        )
        if stages:
            stages[-1].own.append(instruction)
        else:
            for argument, value in pairs(instruction):
                head[argument] = substitute(value, head)
    return stages


def pairs(instruction: Instruction) -> Iterator[tuple[str, str]]:
    """The names and values of an ARG, ENV or LABEL; an ARG without a default has an empty one."""
    if instruction.name == "ARG":
        for word in instruction.words:
            name, _, value = word.partition("=")
            yield name, _unquoted(value)
    elif instruction.name in ("ENV", "LABEL"):
        for name, value in zip(instruction.words[::2], instruction.words[1::2], strict=False):
            yield _unquoted(name), _unquoted(value)


def substitute(text: str, values: Mapping[str, str]) -> str:
    """The text with its variables replaced; a variable that is not known, or empty without a default, stays as it is written."""

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        given = values.get(name, "")
        if found[3] == "+":
            # What stands there may hold the variable itself, whose brace ended the match before its own.
            return substitute(found[4].replace(f"${name}", given), values) if given else ""
        return given or (found[4] if found[3] else found[0])

    return _VARIABLE.sub(value, text)


def shell_commands(text: str) -> list[Sequence[str]]:
    """The programs that a shell text runs, each with its arguments, without the words (`if`, `A=b`) before it."""
    commands: list[list[str]] = [[]]
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()")
        lexer.whitespace_split = True
        lexer.commenters = ""  # a # within a word is no comment; BuildKit has taken the comment lines out
        try:
            tokens = list(lexer)
        except ValueError:  # a quote that another line closes
            tokens = line.split()
        for token in tokens:
            if _ENDS_COMMAND.fullmatch(token):
                commands.append([])
            elif commands[-1] or not _PRELUDE.fullmatch(token):
                commands[-1].append(token)
        commands.append([])
    return [command for command in commands if command]


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text

"""What a row means: the recognised forms, turned into (text, label), (prompt, completion) or (prompt, choices, answer)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft.bases.images import File
from fedpeft.errors import DataError
from fedpeft.tasks.protocol import Row

Messages = list[dict[str, str]]
RENAME = 'columns = { "its name in the file" = "the name wanted here" } beside the path renames fields'
FORMS = "{prompt, completion|answer}, {instruction, input, output}, {messages: [{role, content}]} or {text}"


@dataclass(frozen=True)
class Pair:
    """A prompt (plain text, or the chat so far) and the completion to learn."""

    prompt: str | Messages
    completion: str


@dataclass(frozen=True)
class Question:
    """A prompt, its possible completions, and which of them is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def text_label(row: Row, text: str, label: str, number: int) -> tuple[str, str]:
    """Text and label of row ``number`` (from 1). Raises `DataError` when a field is missing or the text is empty."""
    return field(row, text, number), str(value(row, label, number))


def pairs(row: Row, number: int) -> list[Pair]:
    """The prompt/completion pairs of row ``number`` (from 1): one, or one for each answer of the assistant in a chat.

    Raises:
        DataError: the row has none of the known forms, or a field is empty.
    """
    if "messages" in row:
        return _chat(row["messages"], number)
    if "prompt" in row and ("completion" in row or "answer" in row):
        return [Pair(str(row["prompt"] or ""), field(row, "completion" if "completion" in row else "answer", number))]
    if "instruction" in row and "output" in row:
        parts = [field(row, "instruction", number), str(row.get("input") or "")]
        return [Pair("\n".join(part for part in parts if part), field(row, "output", number))]
    if "text" in row:
        return [Pair("", field(row, "text", number))]
    raise DataError(f"row {number}: fields {sorted(row)} are no known form; expected {FORMS}; {RENAME}")


def question(row: Row, number: int) -> Question:
    """The question of row ``number`` (from 1); ``answer`` is an index from 0, the choice itself, or its letter.

    Raises:
        DataError: a field is missing, there are fewer than two choices, or the answer is none of them.
    """
    choices = value(row, "choices", number)
    names = choices.get("label", []) if isinstance(choices, Mapping) else []
    texts = choices.get("text", []) if isinstance(choices, Mapping) else choices
    if not isinstance(texts, Sequence) or isinstance(texts, str) or len(texts) < 2:
        raise DataError(f"row {number}: choices are {texts!r}; expected a list of two or more texts")
    answer = row["answerKey"] if "answerKey" in row and "answer" not in row else value(row, "answer", number)
    return Question(field(row, "prompt", number), tuple(map(str, texts)), _index(answer, list(map(str, texts)), list(names), number))


def request(row: Row) -> str:
    """What a person would send to get this row's answer: the prompt, the last message of the chat so far, or the text."""
    pair = pairs(row, 1)[-1]
    asked = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1]["content"]
    return asked or pair.completion


def field(row: Row, name: str, number: int) -> str:
    """A field as text. Raises `DataError` when it is missing or empty."""
    found = str(value(row, name, number))
    if not found.strip():
        raise DataError(f"row {number}: field {name!r} is empty; leave the row out or fill it")
    return found


def excerpt(given: str | bytes) -> str:
    """The beginning of a text, for messages; of an image its path, or how long it is."""
    if isinstance(given, bytes):
        return f"{len(given)} bytes"
    return repr(given if len(given) <= 48 or isinstance(given, File) else given[:47] + "…")


def value(row: Row, name: str, number: int) -> Any:
    """A field as it is. Raises `DataError` when it is missing."""
    if row.get(name) is None:
        raise DataError(f"row {number}: no field {name!r}; fields seen are {sorted(row)}; {RENAME}")
    return row[name]


def _index(answer: Any, texts: list[str], names: list[Any], number: int) -> int:
    if isinstance(answer, int) and 0 <= answer < len(texts):
        return answer
    for table in (texts, names, [chr(ord("A") + place) for place in range(len(texts))], [str(place) for place in range(len(texts))]):
        if answer in table:
            return table.index(answer)
    raise DataError(
        f"row {number}: answer {answer!r} is none of the choices {texts}; give an index from 0, a letter from A, or the choice itself"
    )


def _chat(messages: Any, number: int) -> list[Pair]:
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages):
        raise DataError(f"row {number}: messages must be a list of objects with role and content")
    turns = [{"role": str(message["role"]), "content": str(message["content"])} for message in messages]
    found = [Pair(turns[:place], turn["content"]) for place, turn in enumerate(turns) if place and turn["role"] == "assistant"]
    if not found:
        raise DataError(f"row {number}: no assistant message after another; roles seen are {[turn['role'] for turn in turns]}")
    return found

"""Row forms: each recognised one, and what is said of the others."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fedpeft.errors import DataError
from fedpeft.tasks.forms import Pair, Question, pairs, question, text_label

CHAT = [
    {"role": role, "content": text}
    for role, text in [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, [Pair("p", "c")]),
        ({"prompt": "p", "answer": 4, "label": "x"}, [Pair("p", "4")]),
        ({"instruction": "i", "input": "", "output": "o"}, [Pair("i", "o")]),
        ({"instruction": "i", "input": "n", "output": "o"}, [Pair("i\nn", "o")]),
        ({"text": "once"}, [Pair("", "once")]),
        ({"messages": CHAT}, [Pair(CHAT[:2], "b"), Pair(CHAT[:4], "d")]),
    ],
)
def test_pairs(row: dict[str, Any], expected: list[Pair]) -> None:
    assert pairs(row, 1) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "choices": ["a", "b"], "answer": 1}, Question("p", ("a", "b"), 1)),
        ({"prompt": "p", "choices": ["yes", "no"], "answer": "no"}, Question("p", ("yes", "no"), 1)),
        ({"prompt": "p", "choices": ["yes", "no"], "answer": "B"}, Question("p", ("yes", "no"), 1)),
        ({"prompt": "p", "choices": ["7", "3"], "answer": "1"}, Question("p", ("7", "3"), 1)),
        ({"prompt": "p", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, Question("p", ("x", "y"), 1)),
    ],
)
def test_questions(row: dict[str, Any], expected: Question) -> None:
    assert question(row, 1) == expected


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (pairs, {"question": "q"}, "row 7: fields ['question'] are no known form; expected {prompt"),
        (pairs, {"prompt": "p", "answer": "  "}, "row 7: field 'answer' is empty"),
        (pairs, {"prompt": "p", "answer": None}, "row 7: no field 'answer'; fields seen are ['answer', 'prompt']"),
        (pairs, {"messages": "hello"}, "row 7: messages must be a list of objects with role and content"),
        (pairs, {"messages": CHAT[:2]}, "row 7: no assistant message after another; roles seen are ['system', 'user']"),
        (question, {"prompt": "p", "answer": 0}, "row 7: no field 'choices'"),
        (question, {"prompt": "p", "choices": ["a"], "answer": 0}, "row 7: choices are ['a']; expected a list of two or more"),
        (question, {"prompt": "p", "choices": ["a", "b"], "answer": 2}, "row 7: answer 2 is none of the choices ['a', 'b']"),
    ],
)
def test_what_is_said_of_a_wrong_row(read: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        read(row, 7)


def test_text_and_label_under_other_names() -> None:
    assert text_label({"body": "b", "class": 3}, "body", "class", 1) == ("b", "3")
    with pytest.raises(DataError, match=r"row 1: no field 'text'; fields seen are \['body'\]"):
        text_label({"body": "b"}, "text", "label", 1)

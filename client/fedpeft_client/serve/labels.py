"""Answers of tasks that say a label or one of the given choices, in place of a text: what a body may ask of them, and their form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedpeft.errors import FedpeftError
from fedpeft_client.serve.errors import ApiError, invalid
from fedpeft_client.serve.render import Gathered
from fedpeft_client.serve.schema import Chat, Completion
from fedpeft_client.serve.targets import Target

Answer = dict[str, float] | str | FedpeftError
"""Probabilities of labels, a choice, or why there is none."""


def check_label(body: Chat | Completion, target: Target) -> None:
    """Raise `ApiError` when ``body`` asks for what only tokens that are drawn have: such a task answers by what is likeliest."""
    if body.tops is not None:
        raise _vain(target, "logprobs", "leave it out; a label's probabilities are in fedpeft.scores")
    if body.logit_bias:
        raise _vain(target, "logit_bias", "leave it out")
    if body.temperature not in (None, 0.0, 1.0):
        raise _vain(target, "temperature", "leave it out, or send 0")


def labelled(body: Chat | Completion, answers: Sequence[Answer]) -> list[Gathered]:
    """Each answer as ``n`` choices of one token. Raises `ApiError` when the task could not read its text."""
    fault = next((one for one in answers if isinstance(one, FedpeftError)), None)
    if fault is not None:
        raise invalid(str(fault))
    texts = [max(one, key=one.__getitem__) if isinstance(one, dict) else str(one) for one in answers]
    return [Gathered(_stopped(text, body.stop), reason="stop", made=1) for text in texts for _ in range(body.copies)]


def scores_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """The ``scores`` field of an answer: one table for one text."""
    scores = [one for one in answers if isinstance(one, dict)]
    return {"scores": scores[0] if len(scores) == 1 else scores} if scores else {}


def _stopped(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for place in map(text.find, stops) if place >= 0), default=len(text))]


def _vain(target: Target, name: str, advice: str) -> ApiError:
    assert target.served is not None
    task = target.served.task
    why = f"the task {task.name!r}, which answers, is of kind {task.kind} and draws no tokens"
    return invalid(f"{name} cannot act: {why}; {advice}", name, "unsupported_parameter")

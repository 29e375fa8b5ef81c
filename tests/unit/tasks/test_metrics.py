"""Metrics against scikit-learn, and the law that counters of sites add up to those of their union."""

from __future__ import annotations

from math import exp, isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from fedpeft.tasks.metrics import METRICS, check_metrics, confusion, scores, text_counters
from fedpeft.update import add_counters

CLASSES = 4
answers = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=60)
texts = st.lists(st.tuples(st.text("ab c.", max_size=12), st.text("ab c.", max_size=12)), min_size=1, max_size=6)


def counted(pairs: list[tuple[int, int]]) -> dict[str, tuple[float, ...]]:
    truth, said = np.array(pairs, np.int64).T
    return dict(confusion(truth, said, CLASSES))


@given(answers)
def test_accuracy_and_macro_f1_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    truth, said = zip(*pairs, strict=True)
    found = scores(counted(pairs), ("accuracy", "macro_f1"))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, said))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro"))


@given(answers, answers)
def test_counters_of_two_sites_add_up_to_their_unions(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    assert add_counters(counted(left), counted(right)) == dict(sorted(counted(left + right).items()))


@given(texts, texts)
def test_text_counters_add_up_too(left: list[tuple[str, str]], right: list[tuple[str, str]]) -> None:
    def count(pairs: list[tuple[str, str]]) -> dict[str, tuple[float, ...]]:
        return dict(text_counters([said for said, _ in pairs], [wanted for _, wanted in pairs]))

    summed, whole = add_counters(count(left), count(right)), count(left + right)
    for name in ("rouge_l", "exact_match"):
        assert METRICS[name](summed) == pytest.approx(METRICS[name](whole))


def test_rouge_l_by_hand_and_exact_match() -> None:
    # LCS of "the cat sat" and "the dog sat down" is "the sat": precision 2/3, recall 2/4
    found = text_counters(["the cat sat", " the  same "], ["the dog sat down", "the same"])
    assert found["rouge"][0] == pytest.approx(1 + 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert found["exact"] == (1.0,)
    assert found["generated"] == (2.0,)


def test_perplexity_and_nothing_counted() -> None:
    assert METRICS["perplexity"]({"loss": (6.0,), "count": (3.0,)}) == pytest.approx(exp(2))
    assert METRICS["perplexity"]({"loss": (1e9,), "count": (1.0,)}) == pytest.approx(exp(700))
    assert all(isnan(METRICS[name]({})) for name in METRICS)


def test_a_metric_that_a_task_cannot_compute_is_refused() -> None:
    with pytest.raises(ValueError, match=r"classification: metrics \['bleu'\] cannot be computed; choose from \['accuracy'\]"):
        check_metrics(("accuracy", "bleu"), ("accuracy",), "classification")

"""Audits: bounds against exact oracles, attacks that must find what is there and must not claim what is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.audits import Coins, Subject, View, audit_membership, audit_scores, epsilon_bound, invert, mislabelled, p_value
from fedpeft.audits.bounds import likelihood_ratio, logit
from fedpeft.cli.main import run
from fedpeft.errors import AdapterError, ConfigError, DataError, PrivacyError
from fedpeft.methods import METHODS
from fedpeft.tasks import Classification
from fedpeft.training import TrainSettings

LABELS = ("animal", "tool")
TASK = Classification("kinds", LABELS)


def exact_tail(count: int, least: int, chance: float) -> float:
    return sum(math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(least, count + 1))


@given(st.integers(1, 60), st.data(), st.floats(0, 5))
def test_without_delta_the_p_value_is_the_binomial_tail(guesses, data, epsilon):
    right = data.draw(st.integers(0, guesses))
    want = exact_tail(guesses, right, 1 / (1 + math.exp(-epsilon)))
    assert p_value(guesses, guesses, right, epsilon, 0.0) == pytest.approx(want, rel=1e-9, abs=1e-12)


@given(st.integers(2, 40), st.data(), st.floats(0, 3), st.floats(0, 1e-3))
def test_delta_costs_the_largest_average_mass_below(guesses, data, epsilon, delta):
    right = data.draw(st.integers(1, guesses))
    chance = 1 / (1 + math.exp(-epsilon))
    tails = [exact_tail(guesses, k, chance) for k in range(right + 1)]
    slack = max((tails[right - i] - tails[right]) / i for i in range(1, right + 1))
    want = min(tails[right] + 2 * 50 * delta * slack, 1.0)
    assert p_value(50, guesses, right, epsilon, delta) == pytest.approx(want, rel=1e-8, abs=1e-12)


def test_the_bound_is_where_the_p_value_meets_the_error():
    found = epsilon_bound(100, 100, 95, 1e-5, 0.95)
    assert found > 1.5
    assert p_value(100, 100, 95, found, 1e-5) == pytest.approx(0.05, rel=1e-6)
    assert epsilon_bound(100, 100, 50, 1e-5, 0.95) == 0.0


@settings(max_examples=5)
@given(st.floats(0.2, 3.0), st.integers(0, 2**31))
def test_randomised_response_is_not_refuted_more_often_than_stated(epsilon, seed):
    draws = np.random.default_rng(seed)
    above = 0
    for _ in range(40):
        members = draws.random(80) < 0.5
        kept = draws.random(80) < 1 / (1 + math.exp(-epsilon))
        said = np.where(kept, members, ~members)
        scores = said + 0.001 * draws.random(80)
        above += audit_scores("response", scores, members, 0.0, 0.95).epsilon > epsilon
    assert above <= 8, "5 % of 40 is 2; 8 or more has a chance of 1e-3 at most"


def test_perfect_guesses_give_a_large_bound_and_noise_gives_none():
    members = np.arange(200) % 2 == 0
    assert audit_scores("perfect", members.astype(float), members, 0.0, 0.95).epsilon > 3.5
    scores = np.random.default_rng(3).random(200)
    blind = audit_scores("blind", scores, members, 0.0, 0.95)
    assert blind.epsilon < 0.2
    assert abs(blind.auc - 0.5) < 0.1


def test_the_area_counts_pairs():
    scores, members = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True])
    pairs = [(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for i in (1, 3) for j in (0, 2)]
    assert audit_scores("a", scores, members, 0.0, 0.9).auc == pytest.approx(np.mean(pairs))


def test_the_likelihood_ratio_prefers_the_nearer_mean():
    inside = np.array([[True, True], [False, False], [True, True], [False, False]])
    shadows = np.array([[3.0, 1.0], [0.0, 0.9], [3.2, 1.1], [0.2, 1.0]])
    found = likelihood_ratio(np.array([3.1, 0.95]), shadows, inside)
    assert found[0] > 10 > 1 > abs(found[1])


def test_the_logit_is_that_of_the_probability():
    losses = np.array([0.01, 0.7, 5.0])
    p = np.exp(-losses)
    np.testing.assert_allclose(logit(losses), np.log(p / (1 - p)))
    assert np.isfinite(logit(np.array([0.0, 800.0]))).all()


@pytest.mark.parametrize("changes", [{"confidence": 1.0}, {"delta": 1.0}])
def test_impossible_confidence_is_refused(changes):
    with pytest.raises(ConfigError, match="confidence"):
        audit_scores("a", np.zeros(4), np.zeros(4, bool), **{"delta": 0.0, "confidence": 0.9, **changes})


# Attacks on a tiny random encoder.

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(120))]
ROWS = [
    {"text": " ".join(f"w{number}" for number in np.random.default_rng(i).integers(0, 120, 4)), "label": LABELS[i % 2]} for i in range(64)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("bert")
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    sizes = {"vocab_size": len(WORDS), "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(**sizes, max_position_embeddings=32, pad_token_id=0)).save_pretrained(place)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", model_max_length=32).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def subject(folder: Path) -> Callable[..., Subject]:
    from fedpeft.adapters import make_spec
    from fedpeft.bases import BaseSpec, load_base

    base = load_base(BaseSpec(str(folder), max_tokens=32), "cpu")

    def make(kind: str = "lora", roles: frozenset[str] | None = None, task: Any = TASK, **changes: Any) -> Subject:
        method = METHODS[kind](**({"r": 12, "targets": ("all",)} if kind == "lora" else {}))
        made = TrainSettings(**{"steps": 80, "batch_size": 32, "lr": 1e-2, **changes})
        return Subject(base, task, make_spec("kinds", base, method, task.head), made, roles=roles)

    return make


def test_an_overfitted_adapter_is_found_out(subject):
    canaries = mislabelled(TASK, ROWS, 0)
    found = audit_membership(subject(steps=50), canaries, Coins(shadows=0))
    assert found.epsilon > 0.5, found
    assert found.findings[-1].auc > 0.8


def test_shadows_are_an_attack_of_their_own(subject):
    found = audit_membership(subject(steps=25), mislabelled(TASK, ROWS[:32], 0), Coins(shadows=2))
    assert {finding.attack for finding in found.findings} == {"loss", "likelihood ratio"}
    assert found.findings[-1].auc > 0.6


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_is_claimed_of_an_adapter_that_learnt_nothing(subject, seed):
    found = audit_membership(subject(steps=1, lr=1e-9), mislabelled(TASK, ROWS, 0), Coins(seed=seed, shadows=0))
    assert found.epsilon == 0.0
    assert abs(found.findings[-1].auc - 0.5) < 0.25


def test_canaries_have_another_label_and_the_same_text():
    changed = mislabelled(TASK, ROWS, 3)
    assert [row["text"] for row in changed] == [row["text"] for row in ROWS]
    assert all(new["label"] in LABELS and new["label"] != old["label"] for new, old in zip(changed, ROWS, strict=True))


def test_too_few_rows_and_odd_shadows_are_refused(subject):
    with pytest.raises(DataError, match="at least 8"):
        audit_membership(subject(), ROWS[:7], Coins(shadows=0))
    with pytest.raises(ConfigError, match="even"):
        Coins(shadows=3)


VIEWS = (View("plain"), View("clipped", clip=1e-3), View("noise", clip=1e-3, noise=1.0), View("masked", masked=True))


@pytest.mark.parametrize(
    "roles", [{"B"}, {"A"}, pytest.param({"A", "B"}, marks=pytest.mark.slow)], ids=lambda roles: "".join(sorted(roles))
)
def test_tokens_are_read_from_a_plain_step_and_not_through_noise_or_masks(subject, roles):
    one = subject(roles=frozenset(roles), steps=1, batch_size=1, lr=1.0, optimizer="sgd", clip=0.0)
    found = {line.view: line.recovered for line in invert(one, ROWS[:5], VIEWS)}
    assert found["plain"] > 0.8
    assert found["clipped"] == pytest.approx(found["plain"], abs=0.06), "clipping rescales the span and hides nothing"
    assert found["noise"] < 0.4
    assert found["masked"] < 0.4


def test_a_wide_batch_hides_tokens_in_a_small_rank(subject):
    one = subject(roles=frozenset({"B"}), steps=1, batch_size=8, lr=1.0, optimizer="sgd", clip=0.0)
    alone, eight = (invert(one, ROWS[:8], VIEWS[:1], per_update=size)[0].recovered for size in (1, 8))
    assert eight < alone


def test_a_method_without_factors_is_refused_by_name(subject):
    with pytest.raises(AdapterError, match="no factors"):
        invert(subject("ia3", steps=1, batch_size=1), ROWS[:1])


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> Path:
    import json

    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({**row, "split": "train"}) for row in ROWS))
    path = tmp_path / "job.toml"
    path.write_text(
        f'name = "a"\noutput = "out"\n[base]\nmodel = "{folder}"\nmax_tokens = 32\n[method]\nkind = "lora"\nr = 12\n'
        '[training]\nsteps = 40\nlr = 1e-2\noptimizer = "sgd"\n'
        f'[tasks.kinds]\nkind = "classification"\nlabels = ["animal", "tool"]\ndata = {{ path = "{tmp_path}/rows.jsonl" }}\n'
    )
    return path


def test_the_command_prints_its_bound_beside_what_is_stated(job, capsys):
    assert run(["audit", "membership", str(job), "--set", "tasks.kinds.data.limit=16", "--stated", "8"]) == 0
    said = capsys.readouterr().out
    assert "epsilon >=" in said
    assert "the ledger states 8.000" in said


def test_a_refuted_ledger_is_exit_code_12(job, capsys):
    arguments = ["--set", "training.steps=60", "--set", "training.optimizer=adamw", "--stated", "0.01"]
    assert run(["audit", "membership", str(job), *arguments]) == PrivacyError.exit_code
    assert "the ledger states 0.010" in capsys.readouterr().err


def test_the_command_reads_tokens(job, capsys):
    import json

    assert run(["audit", "inversion", str(job), "--set", "tasks.kinds.data.limit=2", "--json", "--set", "training.lr=0.1"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert lines[0]["view"] == "plain"
    assert lines[0]["recovered"] > lines[-1]["recovered"]


def test_an_unknown_task_is_named(job, capsys):
    assert run(["audit", "membership", str(job), "--task", "other"]) == ConfigError.exit_code
    assert "choose one of ['kinds']" in capsys.readouterr().err


def test_the_subject_leaves_the_base_as_it_was(subject):
    one = subject(steps=2)
    before = {name: tensor.clone() for name, tensor in one.base.model.state_dict().items()}
    audit_membership(one, ROWS[:8], Coins(shadows=0))
    assert all((before[name] == tensor).all() for name, tensor in one.base.model.state_dict().items())
    assert replace(one, seed=1).start.digest != one.start.digest

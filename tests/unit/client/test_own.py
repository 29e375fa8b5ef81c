"""The private pair of a site beside the version that it serves acts by a weight: each text's nearness to the site's rows."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters import Adapter, attach, initial, make_spec
from fedpeft.bases import BaseSpec, load_base
from fedpeft.config import describe
from fedpeft.errors import AdapterError
from fedpeft.methods import Lora
from fedpeft.registry import Manifest, Registry
from fedpeft.routing.nearness import Nearness
from fedpeft.schemes.feddpa import PRIVATE
from fedpeft.serving import Limits
from fedpeft.serving.backend import Backend
from fedpeft.tasks import Classification
from fedpeft.tensors import Tensors
from fedpeft_client.own_scores import HOW, score
from fedpeft_client.personal import Own as Kept
from fedpeft_client.personal import Personal
from fedpeft_client.serve.own import Own
from fedpeft_client.serve.targets import choose, hold
from fedpeft_client.shelf import Shelf
from fedpeft_client.store import Store

LABELS = ("animal", "tool")
TEXTS = ["the sparrow is in the yard", "somebody painted the barn", "quarterly revenue fell short of the bank's forecast"]


def slow_weight(rows, vector, scale):
    """Row by row, in float64."""

    def cosine(one, other):
        return sum(float(a) * float(b) for a, b in zip(one, other, strict=True))

    pairs = [cosine(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    among = max(sum(pairs) / len(pairs), 1e-3) if pairs else 1.0
    near = sum(cosine(row, vector) for row in rows) / len(rows)
    return min(max(near * (1.0 / among if scale is None else scale), 0.0), 1.0)


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 1000), st.one_of(st.none(), st.floats(0.1, 4.0)))
def test_a_weight_is_the_scaled_mean_cosine(count, seed, scale):
    drawn = np.random.default_rng(seed).normal(0.3, 1.0, (count + 1, 5))
    *rows, vector = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    assert Nearness(np.stack(rows), scale).weight(vector) == pytest.approx(slow_weight(rows, vector, scale), rel=1e-4, abs=1e-5)


def test_no_row_is_no_nearness():
    with pytest.raises(AdapterError, match="no row"):
        Nearness(np.zeros((0, 3), np.float32))


def published(base, task, store):
    spec = make_spec(task.name, base, Lora(r=4, extra=2), task.head)
    start = initial(base, spec, 0).tensors
    noise = np.random.default_rng(1).normal(0, 0.05, start.flat.size).astype(np.float32)
    shared = Tensors(spec.layout, start.flat + noise).patch(start.pick(PRIVATE))
    store.publish(Adapter(spec, shared), Manifest(task_settings=describe(task)), origin="one")
    return Adapter(spec, shared)


def pair_of(adapter):
    layout = adapter.spec.layout.subset(PRIVATE)
    return Tensors(layout, np.random.default_rng(2).normal(0, 0.2, layout.size).astype(np.float32))


def alone(base, adapter, pair, asked):
    """Plain forwards of one adapter whose private B is the weight times itself, of (text, weight) one by one."""
    found = []
    with attach(base, adapter.spec) as live, torch.no_grad():
        for text, weight in asked:
            own = Tensors(pair.layout, pair.flat.copy())
            own.flat[pair.layout.role_spans["B2"]] *= weight
            live.load(adapter.tensors.patch(own))
            found.append(live.model(input_ids=torch.tensor([base.tokenizer(text)["input_ids"]])).logits[0].softmax(0).numpy())
    return found


async def served(backend, text):
    target = await choose(backend, "task:kinds", None, text)
    ids = await asyncio.wrap_future(backend.read(backend.ids, text))
    with hold(backend, target) as held:
        said = await asyncio.wrap_future(backend.classify(ids, backend.catalog.share(held.mixture), LABELS))
        return dict(held.mixture), list(said.values())


def test_a_text_is_answered_by_the_shared_pair_and_by_the_private_one_as_near_as_it_is(site, packaged_encoder, tmp_path):
    base = load_base(BaseSpec(str(packaged_encoder)), "cpu")  # near and far need an encoder that has learnt
    task, store = Classification("kinds", LABELS), Registry(tmp_path / "registry")
    adapter = published(base, task, store)
    pair = pair_of(adapter)
    kept = Kept({f"private/{role}": pair.flat[span].copy() for role, span in pair.layout.role_spans.items()})
    Personal(Store(site.state / "personal", 8)).keep(("f", "r"), "kinds", (0, 1), kept)
    rows = base.embed([line["text"] for line in _lines(site)])
    weights = [slow_weight(rows, vector, None) for vector in base.embed(TEXTS)]
    assert len({round(weight, 2) for weight in weights}) == 3  # or the test could not tell them apart
    assert weights[2] == 0.0
    *wanted, unweighed = alone(base, adapter, pair, [*zip(TEXTS, weights, strict=True), (TEXTS[0], 0.0)])
    assert np.abs(wanted[0] - unweighed).max() > 1e-3
    with Backend(replace(base), store, Limits(), beside=Own(site)) as backend:
        backend.catalog.refresh()
        for text, weight, probabilities in zip(TEXTS, weights, wanted, strict=True):
            mixture, said = asyncio.run(served(backend, text))
            assert mixture == {"kinds@1": 1.0, **({"kinds@1+own": pytest.approx(weight, abs=1e-3)} if weight else {})}
            assert said == pytest.approx(probabilities.tolist(), abs=1e-3)
        store.publish(replace(adapter, tensors=adapter.tensors), Manifest(task_settings=describe(task)), origin="two")
        assert backend.catalog.refresh() == ["kinds@2"]
        backend.catalog.sweep()
        assert set(backend._bank.names) == {"kinds@2", "kinds@2+own"}
    for beside in (None, Own(site.model_copy(update={"serve": site.serve.model_copy(update={"own_rows": 0})}))):
        with Backend(replace(base), store, Limits(), beside=beside) as backend:
            backend.catalog.refresh()
            mixture, said = asyncio.run(served(backend, TEXTS[0]))
            assert mixture == {"kinds@2": 1.0}
            assert said == pytest.approx(unweighed.tolist(), abs=1e-3)


def _lines(site):
    return Shelf(site).rows("kinds", "train")


def slow_loss(base, adapter, pair, rows, weights):
    """Row by row: the mean negative log-likelihood."""
    told = alone(base, adapter, pair, [(row["text"], weight) for row, weight in zip(rows, weights, strict=True)])
    return np.mean([-np.log(found[LABELS.index(row["label"])]) for row, found in zip(rows, told, strict=True)])


def test_test_rows_are_scored_without_the_pair_with_it_and_by_its_weights(site, base, tmp_path, monkeypatch):
    store = Registry(tmp_path / "registry")
    adapter = published(base, Classification("kinds", LABELS), store)
    monkeypatch.setattr("fedpeft.service.load_base_of", lambda *_: base)
    with pytest.raises(AdapterError, match="left no private pair of a served task"):
        score(site, store)
    pair = pair_of(adapter)
    kept = Kept({f"private/{role}": pair.flat[span] for role, span in pair.layout.role_spans.items()})
    Personal(Store(site.state / "personal", 8)).keep(("f", "r"), "kinds", (0, 1), kept)
    encode, times = Classification.encode, []
    monkeypatch.setattr(Classification, "encode", lambda self, rows, base: times.append(len(rows)) or encode(self, rows, base))
    (found,) = score(site, store)
    assert times == [found.rows]
    rows, train = Shelf(site).rows("kinds", "test"), base.embed([line["text"] for line in _lines(site)])
    weights = [slow_weight(train, vector, None) for vector in base.embed([row["text"] for row in rows])]
    assert (found.task, found.rows, found.weight) == ("kinds", len(rows), pytest.approx(np.mean(weights), abs=0.01))
    for how, each in zip(HOW, ([0.0] * len(rows), [1.0] * len(rows), weights), strict=True):
        assert found.scores[how]["loss"] == pytest.approx(slow_loss(base, adapter, pair, rows, each), abs=2e-4)
        assert 0.0 <= found.scores[how]["accuracy"] <= 1.0
    assert len({round(scores["loss"], 4) for scores in found.scores.values()}) == 3  # or the test could not tell them apart


def test_the_newest_pair_of_any_run_is_used_and_one_of_another_shape_is_not(site, base, tmp_path):
    personal = Personal(Store(site.state / "personal", 8))
    adapter = published(base, Classification("kinds", LABELS), Registry(tmp_path / "registry"))
    assert Own(site).adapter(adapter) is None
    pair = pair_of(adapter)
    for run, factor in (("one", 1.0), ("two", 2.0)):
        values = {f"private/{role}": np.float32(factor) * pair.flat[span] for role, span in pair.layout.role_spans.items()}
        personal.keep(("f", run), "kinds", (0, 1), Kept({**values, "control/A": np.zeros(3, np.float32)}))
    found = Own(site).adapter(adapter)
    assert found is not None
    np.testing.assert_array_equal(found.tensors.flat, 2 * pair.flat)
    other = make_spec("kinds", base, Lora(r=4, extra=3), adapter.spec.head)
    assert Own(site).adapter(Adapter(other, Tensors.zeros(other.layout))) is None

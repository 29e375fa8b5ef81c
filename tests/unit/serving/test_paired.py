"""Rows of encoder-decoders that join, run beside others and leave get each what it gets alone; and so do labels, choices and embeddings."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.adapters import Adapter, attach, initial, make_spec
from fedpeft.bases import Base, BaseSpec, HeadSpec, load_base
from fedpeft.config import describe
from fedpeft.errors import BaseError
from fedpeft.methods import METHODS
from fedpeft.mixtures import Bank, Gates
from fedpeft.mixtures.routers import routed
from fedpeft.registry import Manifest, Registry, router_card
from fedpeft.routing import make_card
from fedpeft.routing.cards import centroid, histogram
from fedpeft.routing.policies import token_router
from fedpeft.serving import End, Limits, Piece, Request, Sampling, Scheduler, paired
from fedpeft.serving.backend import Backend
from fedpeft.serving.decoder import Decoder
from fedpeft.tasks import TASKS
from fedpeft.tasks.encoding import opening
from fedpeft.tensors import Tensors

LM = HeadSpec("lm")
METHODS_OF: dict[str, tuple[str, dict[str, Any]]] = {
    "low": ("lora", {"r": 4, "targets": ("all",)}),
    "high": ("lora", {"r": 9}),
    "gains": ("ia3", {}),
    "squeeze": ("bottleneck", {"dim": 8}),
}
MIXTURES = [{}, *({name: 1.0} for name in METHODS_OF), {"low": 0.5, "high": 0.5}, {"gains": 0.25, "squeeze": 2.0}]
PROMPTS = [(*tuple(range(4, 4 + length)), 1) for length in (9, 2)]
COUNT = 8


def moved(base: Base, name: str, kind: str, seed: int, head: HeadSpec = LM, **settings: Any) -> Adapter:
    spec = make_spec(name, base, METHODS[kind](**settings), head)
    noise = np.random.default_rng(seed).normal(0, 0.4, spec.layout.size)
    return Adapter(spec, Tensors(spec.layout, (initial(base, spec, seed).tensors.flat + noise).astype(np.float32)))


@pytest.fixture(scope="module", params=["t5", "bart"])
def base(request: Any, seq2seq_folder: Any) -> Base:
    return load_base(BaseSpec(str(seq2seq_folder(request.param)), max_tokens=32), "cpu")


@pytest.fixture(scope="module")
def adapters(base: Base) -> dict[str, Adapter]:
    return {name: moved(base, name, kind, seed, **own) for seed, (name, (kind, own)) in enumerate(METHODS_OF.items())}


def greedily(model: Any, base: Base, prompt: tuple[int, ...]) -> list[int]:
    """Tokens up to the end by transformers' generate."""
    start = int(opening(base, "")[-1])
    plain = {"do_sample": False, "num_beams": 1, "max_new_tokens": COUNT, "eos_token_id": 1}
    out = model.generate(torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start]]), decoder_start_token_id=start, **plain)
    return [token for token in out[0, 1:].tolist() if token != 1]


@pytest.fixture(scope="module")
def alone(base: Base, adapters: dict[str, Adapter]) -> Any:
    """What each adapter says to each prompt by itself, made before the bank takes the base."""
    said = {(None, prompt): greedily(base.shell(LM), base, prompt) for prompt in PROMPTS}
    for name, adapter in adapters.items():
        with attach(base, adapter.spec) as live:
            live.load(adapter.tensors)
            said |= {(name, prompt): greedily(live.model.eval(), base, prompt) for prompt in PROMPTS}
    return said


@pytest.fixture(scope="module")
def bank(base: Base, adapters: dict[str, Adapter], alone: Any) -> Iterator[Any]:
    with Bank.attach(base, LM, adapters) as attached:
        yield attached


@pytest.fixture(scope="module")
def kin(tmp_path_factory: pytest.TempPathFactory, seq2seq_folder: Any) -> Any:
    """Tiny models of other kinds, with T5's words."""
    import transformers as tf

    halves = {f"{half}_{what}": 2 for half in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    wide = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "forced_eos_token_id": None}
    marks = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    sizes = {"umt5": {"num_layers": 2, "num_heads": 2, "d_ff": 32, "d_kv": 16}}

    @functools.cache
    def made(kind: str) -> Base:
        folder = tmp_path_factory.mktemp(kind)
        shutil.copytree(seq2seq_folder("t5"), folder, dirs_exist_ok=True)
        torch.manual_seed(0)
        config = tf.AutoConfig.for_model(kind, **marks, **sizes.get(kind, halves | wide))
        tf.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
        return load_base(BaseSpec(str(folder), max_tokens=32), "cpu")

    return made


def answers(base: Base, bank: Any, asked: list[tuple[dict[str, float], tuple[int, ...], int, int]], limits: Limits) -> list[list[int]]:
    """Tokens of each (mixture, prompt, how many, when it arrives)."""
    scheduler = Scheduler(Decoder(base, bank), base.tokenizer, {1}, limits)
    said: list[list[int]] = [[] for _ in asked]

    def into(found: list[int]) -> Any:
        return lambda event: found.append(event.token.id) if isinstance(event, Piece) else None

    clock = 0
    while clock <= max(at for *_, at in asked) or not scheduler.idle:
        for number, (mixture, prompt, count, at) in enumerate(asked):
            if at == clock:
                scheduler.submit(Request(prompt, mixture, Sampling(max_tokens=count, temperature=0.0), into(said[number])))
        scheduler.step()
        clock += 1
    return said


def test_a_mixed_running_batch_says_what_generate_says_for_each_adapter(base, bank, alone):
    Decoder(base, bank).probe()
    asked = [({name: 1.0} if name else {}, prompt, COUNT, 2 * n) for n, (name, prompt) in enumerate(alone)]
    for limits in (Limits(rows=32), Limits(rows=3, bite=5)):
        assert answers(base, bank, asked, limits) == list(alone.values())
    assert len(set(map(tuple, alone.values()))) > len(PROMPTS), "the adapters must say different things, or this proves nothing"


@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from(MIXTURES),
            st.lists(st.integers(2, 63), min_size=1, max_size=20).map(tuple),
            st.integers(1, 9),
            st.integers(0, 8),
        ),
        min_size=2,
        max_size=6,
    ),
    rows=st.integers(2, 6),
    bite=st.integers(1, 24),
)
def test_whatever_runs_beside_it_a_mixture_says_what_it_says_alone(base, bank, asked, rows, bite):
    together = answers(base, bank, asked, Limits(rows=rows, bite=bite))
    assert together == [answers(base, bank, [one], Limits(rows=1, bite=500))[0] for one in asked]


@pytest.mark.parametrize("kind", ["mbart", "umt5", pytest.param("pegasus", marks=pytest.mark.slow)])
def test_other_architectures_pass_the_probe(kin, kind):
    with Bank.attach(kin(kind), LM, {}) as bank:
        Decoder(kin(kind), bank).probe()


def test_an_architecture_with_other_positions_is_refused_by_name(kin):
    with Bank.attach(kin("m2m_100"), LM, {}) as bank, pytest.raises(BaseError, match="M2M100ForConditionalGeneration cannot be served in"):
        Decoder(kin("m2m_100"), bank).probe()


def test_rows_in_step_would_be_found_out(base, bank, monkeypatch):
    monkeypatch.setattr(paired, "placed", lambda *_where: nullcontext())
    with pytest.raises(BaseError, match=r"its logits with a cache are .* off"):
        Decoder(base, bank).probe()


def publish(store: Registry, adapter: Adapter, task: Any, origin: str, vectors: Any = None) -> None:
    """With a router card of ``vectors`` (N, D), if any."""
    card = None
    if vectors is not None:
        counts = histogram(vectors, centroid(vectors.sum(0), len(vectors)))
        card = make_card(vectors.sum(0), len(vectors), counts, encoder=f"base@{adapter.spec.base}").to_json()
    store.publish(adapter, Manifest(task_settings=describe(task), card=card), origin=origin)


def heard(backend: Backend, prompt: list[int], task: str) -> str:
    """A greedy answer of at most `COUNT` tokens."""
    events: list[Any] = []
    held = backend.catalog.take({task: 1.0})
    backend.submit(Request(tuple(prompt), held, Sampling(max_tokens=COUNT, temperature=0.0), events.append))
    while not events or not isinstance(events[-1], End):
        backend.engine.call(lambda: None)
    return "".join(event.text for event in events).strip()


@pytest.mark.parametrize("kind", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_a_backend_writes_labels_chooses_embeds_and_swaps_as_each_adapter_alone(seq2seq_folder, tmp_path, kind):
    spec, store = BaseSpec(str(seq2seq_folder(kind)), max_tokens=32), Registry(tmp_path)
    free = load_base(spec, "cpu")
    say, pick = TASKS["generation"]("say", max_new_tokens=COUNT), TASKS["choice"]("pick")
    kinds = {"two": TASKS["classification"]("two", ("yes", "no")), "three": TASKS["classification"]("three", ("a", "b", "c"))}
    texts, question = ["w1 w2 w3", "", "w9 w8 w7 w6 w5 w4"], "w3 w4\n- w5\n- w6 w7\n- w8"
    own = {"say": moved(free, "say", "lora", 1, r=4), "next": moved(free, "say", "lora", 2, r=4), "pick": moved(free, "pick", "ia3", 3)}
    own |= {name: moved(free, name, "lora", 4 + n, kind.head, targets=("all",)) for n, (name, kind) in enumerate(kinds.items())}
    want: dict[Any, Any] = {"vectors": free.embed(texts)}
    for name, adapter in own.items():
        with attach(free, adapter.spec) as live:
            live.load(adapter.tensors)
            model: Any = live.model.eval()
            if name in kinds:
                want |= {(name, text): kinds[name].answer(model, free, text) for text in texts}
            else:
                want[name] = pick.answer(model, free, question) if name == "pick" else say.answer(model, free, texts[0])
    assert want["say"] != want["next"]
    for name, task in {"say": say, "pick": pick, **kinds}.items():
        publish(store, own[name], task, name)
    with Backend(load_base(spec, "cpu"), store, Limits()) as backend:
        assert len(backend.catalog.refresh()) == 4
        prompt = backend.read(backend.prompt, texts[0]).result()
        assert heard(backend, prompt, "say") == want["say"]
        rows = [(name, text, backend.read(backend.ids, text).result()) for text in texts for name in kinds]
        asked = [backend.classify(ids, backend.catalog.take({name: 1.0}), kinds[name].labels) for name, _, ids in rows]
        for (name, text, _), future in zip(rows, asked, strict=True):
            best, share = max(future.result().items(), key=lambda pair: pair[1])
            assert f"{best} ({share:.0%})" == want[(name, text)]
        vectors = [backend.embed(backend.read(backend.ids, text).result(), {}).result() for text in texts]
        np.testing.assert_allclose(vectors, want["vectors"], atol=2e-5)
        assert backend.answer(question, backend.catalog.take({"pick": 1.0}), pick).result() == want["pick"]
        publish(store, own["next"], say, "next")
        assert backend.catalog.refresh() == ["say@2"]
        assert heard(backend, prompt, "say") == want["next"]
        assert (backend.room(5), backend.room(33)) == (32, -1)


def test_the_encoder_says_where_a_text_goes_and_tokens_of_both_halves_weigh_adapters_anew(seq2seq_folder, tmp_path):
    spec, store, texts = BaseSpec(str(seq2seq_folder("t5")), max_tokens=32), Registry(tmp_path), {"a": "w1 w2 w3", "b": "w40 w50 w30 w20"}
    free = load_base(spec, "cpu")
    for seed, (name, text) in enumerate(texts.items()):
        task = TASKS["generation"](name, max_new_tokens=COUNT)
        publish(store, moved(free, name, "lora", seed, r=4, targets=("all",)), task, name, free.embed([text] * 4))
    with Backend(load_base(spec, "cpu"), store, Limits()) as backend:
        backend.catalog.refresh()
        assert {name: backend.route(text).result().task for name, text in texts.items()} == {name: name for name in texts}
        whole = backend.catalog.take({"a": 0.5, "b": 0.5})
        mixtures = [backend.weighed(whole, "arrow"), whole, {}]

        def mixed() -> Any:
            decoder = backend._scheduler.rows
            seats = [decoder.open(mixture) for mixture in mixtures]
            decoder.forward([(seat, [4, 5, 6 + place, 1]) for place, seat in enumerate(seats)])
            return decoder.forward([(seat, [7, 8 + place]) for place, seat in enumerate(seats)])

        found = backend.engine.call(mixed)
    router = token_router("arrow", {f"{name}@1": router_card(store, name) for name in texts})
    every = [routed(router), Gates.weights(["a@1", "b@1"], torch.tensor([[0.5, 0.5]])), Gates()]
    with Bank.attach(free, LM, {f"{name}@1": store.load(name) for name in texts}) as bank, torch.no_grad():

        def told(place: int, gates: Gates) -> Any:
            bank.use(gates)
            inputs = {"input_ids": [[4, 5, 6 + place, 1]], "decoder_input_ids": [[0, 7, 8 + place]]}
            return bank.model(**{name: torch.tensor(ids) for name, ids in inputs.items()}).logits[0, -1].numpy()

        for place, gates in enumerate(every):
            np.testing.assert_allclose(found[place], told(place, gates), atol=2e-5)
        assert np.abs(found[0] - told(0, every[1])).max() > 1e-2  # or whole requests would do

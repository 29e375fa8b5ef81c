"""Mixed, ragged, joining and leaving rows of a real model give each what it gets alone, token for token; and what cannot is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.adapters import Adapter, attach, initial, make_spec
from fedpeft.bases import Base, BaseSpec, HeadSpec, load_base
from fedpeft.errors import BaseError
from fedpeft.methods import METHODS
from fedpeft.mixtures import Bank
from fedpeft.serving import Limits, Piece, Request, Sampling, Scheduler
from fedpeft.serving.decoder import Decoder
from fedpeft.serving.slots import PAGE
from fedpeft.tensors import Tensors

LM = HeadSpec("lm")
METHODS_OF: dict[str, tuple[str, dict[str, Any]]] = {
    "low": ("lora", {"r": 4, "targets": ("all",)}),
    "high": ("lora", {"r": 9}),
    "gains": ("ia3", {}),
    "squeeze": ("bottleneck", {"dim": 8}),
}
MIXTURES = [{}, *({name: 1.0} for name in METHODS_OF), {"low": 0.5, "high": 0.5}, {"gains": 0.25, "squeeze": 2.0}]


def moved(base: Base, task: str, kind: str, seed: int, **settings: Any) -> Adapter:
    spec = make_spec(task, base, METHODS[kind](**settings), LM)
    noise = np.random.default_rng(seed).normal(0, 0.1, spec.layout.size)
    return Adapter(spec, Tensors(spec.layout, (initial(base, spec, seed).tensors.flat + noise).astype(np.float32)))


@pytest.fixture(scope="module")
def base(shared_models: Path) -> Base:
    return load_base(BaseSpec(str(shared_models / "stories260k"), max_tokens=256), "cpu")


@pytest.fixture(scope="module")
def adapters(base: Base) -> dict[str, Adapter]:
    return {name: moved(base, name, kind, seed, **own) for seed, (name, (kind, own)) in enumerate(METHODS_OF.items())}


@pytest.fixture(scope="module")
def alone(base: Base, adapters: dict[str, Adapter]) -> Any:
    """Greedy tokens by Hugging Face's generate with one adapter attached, made before the bank takes the base."""
    prompts = [[1, 300 + 7 * n, 20 + n, *range(30, 30 + 9 * n)] for n in (0, 2)]
    said = {}
    for name, adapter in [(None, None), *adapters.items()]:
        live = None if adapter is None else attach(base, adapter.spec)
        if live is not None:
            live.load(adapter.tensors)
        model: Any = base.shell(LM) if live is None else live.model
        for prompt in prompts:
            out = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=5, min_new_tokens=5
            )
            said[(name, tuple(prompt))] = out[0, len(prompt) :].tolist()
        if live is not None:
            live.detach()
    return said


@pytest.fixture(scope="module")
def bank(base: Base, adapters: dict[str, Adapter], alone: Any) -> Iterator[Any]:
    with Bank.attach(base, LM, adapters) as attached:
        yield attached


def answers(base: Base, bank: Any, asked: list[tuple[dict[str, float], tuple[int, ...], int, int]], limits: Limits) -> list[list[int]]:
    """Tokens of each (mixture, prompt, how many, when it arrives)."""
    scheduler = Scheduler(Decoder(base, bank), base.tokenizer, frozenset(), limits)
    said: list[list[int]] = [[] for _ in asked]

    def into(found: list[int]) -> Any:
        return lambda event: found.append(event.token.id) if isinstance(event, Piece) else None

    waiting, clock = sorted(range(len(asked)), key=lambda n: asked[n][3]), 0
    while waiting or not scheduler.idle:
        while waiting and asked[waiting[0]][3] <= clock:
            mixture, prompt, count, _ = asked[waiting[0]]
            sampling = Sampling(max_tokens=count, temperature=0.0, endless=True)
            scheduler.submit(Request(prompt, mixture, sampling, into(said[waiting.pop(0)])))
        scheduler.step()
        clock += 1
    return said


def test_a_mixed_running_batch_says_what_generate_says_for_each_adapter(base, bank, alone):
    asked = [({name: 1.0} if name else {}, prompt, 5, 2 * n) for n, (name, prompt) in enumerate(alone)]
    for limits in (Limits(rows=32), Limits(rows=3, bite=5), Limits(rows=32, alike=True)):
        assert answers(base, bank, asked, limits) == list(alone.values())


@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from(MIXTURES),
            st.lists(st.integers(3, 500), min_size=1, max_size=20).map(tuple),
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


def test_slots_grow_over_pages_and_move_when_a_row_leaves(base, bank):
    long, short = tuple(range(10, 10 + PAGE - 2)), (5, 6)
    asked = [({"low": 1.0}, short, 3, 0), ({}, long, 12, 0), ({"high": 1.0}, short, PAGE + 4, 1), ({"gains": 1.0}, long, 6, 3)]
    together = answers(base, bank, asked, Limits())
    assert together == [answers(base, bank, [one], Limits())[0] for one in asked]


def write(folder: Path, model: Any) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2", model_max_length=64).save_pretrained(
        folder
    )
    return folder


def tiny(kind: str) -> Any:
    import transformers as tf

    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    if kind == "mistral":
        return tf.MistralForCausalLM(tf.MistralConfig(**small, num_key_value_heads=2, sliding_window=16, max_position_embeddings=64))
    if kind == "qwen2":
        return tf.Qwen2ForCausalLM(tf.Qwen2Config(**small, num_key_value_heads=2, max_position_embeddings=64))
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "qwen2"])
def test_other_architectures_pass_the_probe(tmp_path, kind):
    base = load_base(BaseSpec(str(write(tmp_path, tiny(kind))), max_tokens=48), "cpu")
    with Bank.attach(base, LM, {}) as bank:
        Decoder(base, bank).probe()


def test_an_architecture_whose_past_is_more_than_keys_and_positions_is_refused_by_name(tmp_path):
    base = load_base(BaseSpec(str(write(tmp_path, tiny("bloom"))), max_tokens=48), "cpu")
    with Bank.attach(base, LM, {}) as bank, pytest.raises(BaseError, match="BloomForCausalLM cannot be served in batches"):
        Decoder(base, bank).probe()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_is_served(shared_models, quantization):
    base = load_base(BaseSpec(str(shared_models / "stories260k"), quantization, max_tokens=128), "cpu")
    own = {"low": moved(base, "low", "lora", 1, r=4)}
    with Bank.attach(base, LM, own) as bank:
        Decoder(base, bank).probe()
        asked = [({"low": 1.0}, (5, 6, 7), 6, 0), ({}, (9, 8), 6, 1)]
        together = answers(base, bank, asked, Limits())
        alone = [answers(base, bank, [one], Limits())[0] for one in asked]
    assert [len(said) for said in together] == [6, 6]
    if quantization == "nf4":
        assert together == alone

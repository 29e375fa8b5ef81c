"""Generation and choice: packed loss against the padded model's own, completions only, greedy text, likelihoods by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedpeft.adapters.live import Live
from fedpeft.adapters.making import initial, make_spec
from fedpeft.bases import Base
from fedpeft.errors import BaseError, DataError
from fedpeft.methods import METHODS
from fedpeft.tasks import Choice, Encoded, Generation, Row, Source, read_rows
from fedpeft.tasks import likelihood as module
from fedpeft.tasks.greedy import generate

TASK = Generation("tales", max_new_tokens=8, samples=6)
ROWS: list[Row] = [
    {
        "prompt": "Lily went to the park" + " and ran" * (n % 5),
        "completion": "She was happy." if n % 2 else "Once upon a time there was a cat." * (1 + n % 3),
    }
    for n in range(24)
]
QUIZ: list[Row] = [
    {"prompt": "Once upon a time", "choices": ["there was a little girl", "qx zz vv kk"], "answer": 0},
    {"prompt": "The dog was", "choices": ["wug wug zrr pf pf", "happy", "zq"], "answer": "happy"},
]


@pytest.fixture(scope="module")
def model(stories: Base) -> torch.nn.Module:
    return stories.shell(TASK.head)


@pytest.fixture(scope="module")
def data(stories: Base) -> Encoded:
    return TASK.encode(ROWS, stories)


def padded_losses(model: Any, data: Encoded, places: Sequence[int]) -> list[torch.Tensor]:
    """The slow, obvious way: each sequence alone, all logits, labels before the completion ignored."""
    found = []
    for place in places:
        ids = torch.from_numpy(data.ids[place]).long()
        labels = ids.clone()
        labels[: data.starts[place]] = -100
        with torch.no_grad():
            logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0].double()
        found.append(cross_entropy(logits[:-1], labels[1:], reduction="sum"))
    return found


def test_packed_loss_is_the_padded_loss(model: torch.nn.Module, data: Encoded) -> None:
    assert module.packs(model)
    wanted = float(sum(padded_losses(model, data, range(len(data)))))
    losses = [TASK.loss(model, batch) for batch in TASK.batches(data, 8, 0, 0)]
    total, count = float(sum(loss.total for loss in losses)), sum(loss.count for loss in losses)
    assert abs(total - wanted) / count < 1e-5
    assert count == sum(len(ids) - start for ids, start in zip(data.ids, data.starts, strict=True))
    padded = [module._padded_losses(model, batch).sum() for batch in TASK.batches(data, 8, 0, 0)]
    assert abs(float(sum(padded)) - total) / count < 1e-5


def test_gradients_of_packed_and_padded_losses_agree(model: torch.nn.Module, data: Encoded) -> None:
    batch = next(iter(TASK.batches(data, 8, 0, 0)))
    weight = next(p for name, p in model.named_parameters() if name.endswith("0.self_attn.q_proj.weight")).requires_grad_()
    (packed,) = torch.autograd.grad(module.token_losses(model, batch).sum(), weight)
    (padded,) = torch.autograd.grad(module._padded_losses(model, batch).sum(), weight)
    weight.requires_grad_(False)
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)


def test_the_output_layer_sees_labelled_positions_only(model: Any, data: Encoded) -> None:
    seen: list[int] = []
    batch = next(iter(TASK.batches(data, 8, 0, 0)))
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    count = TASK.loss(model, batch).count
    hook.remove()
    assert seen == [count]
    assert count < batch.tokens


def test_batches_are_packed_with_restarting_positions_and_no_mask(data: Encoded) -> None:
    for batch in TASK.batches(data, 5, 7, 2):
        assert set(batch.inputs) == {"input_ids", "position_ids"}
        assert batch.inputs["input_ids"].shape == batch.inputs["position_ids"].shape == batch.labels.shape == (1, batch.tokens)
        assert int((batch.inputs["position_ids"] == 0).sum()) == batch.examples
    order = [batch.inputs["input_ids"].tolist() for batch in TASK.batches(data, 5, 7, 2)]
    assert order == [batch.inputs["input_ids"].tolist() for batch in TASK.batches(data, 5, 7, 2)]
    assert order != [batch.inputs["input_ids"].tolist() for batch in TASK.batches(data, 5, 7, 3)]


def test_a_batch_beyond_the_pack_limit_is_cut_between_sequences(
    model: torch.nn.Module, data: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = module.packed(data, range(len(data)), len(data))
    whole = module.token_losses(model, batch)
    for limit in (1, 50, 100, 10**6):
        monkeypatch.setattr(module, "PACK", limit)
        torch.testing.assert_close(module.token_losses(model, batch), whole, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=["lora", "prompt", "prefix", "bottleneck"])
def adapted(request: pytest.FixtureRequest, stories: Base) -> Iterator[torch.nn.Module]:
    spec = make_spec("tales", stories, METHODS[request.param](), TASK.head)
    with Live.attach(stories, spec) as live:
        live.load(initial(stories, spec, 0).tensors)
        with torch.no_grad():
            live.flat.add_(torch.linspace(-0.02, 0.02, live.flat.numel()))
        yield live.model.eval()


def test_with_an_adapter_loss_and_text_are_those_of_each_sequence_alone(adapted: Any, data: Encoded, stories: Base) -> None:
    wanted = [float(loss) for loss in padded_losses(adapted, data, range(5))]
    loss = TASK.loss(adapted, module.packed(data, range(5), 5))
    assert loss.total.requires_grad
    assert abs(loss.total.item() - sum(wanted)) / loss.count < 1e-5
    prompts = [data.ids[place][: data.starts[place]] for place in range(5)]
    together = generate(adapted, stories, prompts, TASK.max_new_tokens)
    assert together == [generate(adapted, stories, [prompt], TASK.max_new_tokens)[0] for prompt in prompts]
    assert TASK.answer(adapted, stories, ROWS[0]["prompt"]) == together[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks under the old name
def test_a_peft_models_virtual_tokens_take_the_padded_way(stories: Base, data: Encoded) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for config, packs in (
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), False),
        (LoraConfig(task_type="CAUSAL_LM", r=2), True),
    ):
        wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(stories.spec.model), config).eval()
        assert module.packs(wrapped) is packs
        loss = TASK.loss(wrapped, module.packed(data, range(4), 4))
        one_by_one = [TASK.loss(wrapped, module.packed(data, [place], 1)) for place in range(4)]
        assert loss.total.item() == pytest.approx(sum(part.total.item() for part in one_by_one), rel=1e-5)


def test_only_the_completion_carries_loss(stories: Base) -> None:
    data = TASK.encode([{"prompt": "a b", "completion": "c d"}], stories)
    ids, start = data.ids[0].tolist(), int(data.starts[0])
    assert ids[0] == stories.tokenizer.bos_token_id
    assert ids[-1] == stories.tokenizer.eos_token_id
    assert stories.tokenizer.decode(ids[start:], skip_special_tokens=True).strip() == "c d"
    assert "c" not in stories.tokenizer.decode(ids[:start])
    batch = next(iter(TASK.batches(data, 1, 0, 0)))
    assert batch.labels[0, start - 1 : -1].tolist() == ids[start:]
    assert set(batch.labels[0, : start - 1].tolist()) <= {-100}
    assert batch.labels[0, -1] == -100


def test_texts_alone_are_learnt_whole(stories: Base) -> None:
    data = TASK.encode([{"text": "One day"}], stories)
    assert data.starts.tolist() == [1]


def test_long_rows_keep_the_completion_and_the_first_token(stories: Base) -> None:
    limit = stories.spec.max_tokens
    data = TASK.encode([{"prompt": "x " * 999, "completion": "the end"}, {"prompt": "hi", "completion": "y " * 999}], stories)
    assert [len(ids) for ids in data.ids] == [limit, limit]
    assert data.ids[0][0] == stories.tokenizer.bos_token_id
    assert data.ids[0][-1] == stories.tokenizer.eos_token_id
    assert data.starts[1] < 10


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_chats_go_through_the_tokenizers_template(stories: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "bye"}]
    plain = TASK.encode([{"messages": chat}], stories)
    assert stories.tokenizer.decode(plain.ids[0], skip_special_tokens=True).strip().startswith("user: hello\nassistant:")
    monkeypatch.setattr(stories.tokenizer, "chat_template", TEMPLATE)
    data = TASK.encode([{"messages": chat}], stories)
    said = stories.tokenizer.decode(data.ids[0][data.starts[0] :])
    assert said.strip().startswith("bye</>")
    assert "<assistant>" in stories.tokenizer.decode(data.ids[0][: data.starts[0]])
    same = Generation("tales", chat=True).encode([{"prompt": "hello", "completion": "bye"}], stories)
    assert same.ids[0].tolist() == data.ids[0].tolist()


def test_greedy_text_is_step_by_step_argmax(model: Any, stories: Base, data: Encoded) -> None:
    prompts = [data.ids[place][: data.starts[place]] for place in range(5)]
    wanted = []
    for prompt in prompts:
        ids = prompt.tolist()
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == stories.tokenizer.eos_token_id:
                break
        wanted.append(stories.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    assert generate(model, stories, prompts, 8) == wanted
    assert TASK.answer(model, stories, ROWS[0]["prompt"]) == wanted[0]


def test_evaluation_counts_all_rows_and_generates_some(model: torch.nn.Module, stories: Base, data: Encoded) -> None:
    counters = TASK.evaluate(model, data, stories)
    assert counters["examples"] == (24.0,)
    assert counters["generated"] == (6.0,)
    assert {name: len(values) for name, values in counters.items()} == TASK.counted
    quiet = replace(TASK, metrics=("perplexity",))
    assert dict(quiet.counted) == {"loss": 1, "count": 1, "examples": 1}
    assert set(quiet.evaluate(model, data, stories)) == set(quiet.counted)
    assert counters["loss"][0] == pytest.approx(float(sum(padded_losses(model, data, range(len(data))))), rel=1e-5)
    found = TASK.scores(counters)
    assert found["perplexity"] == pytest.approx(np.exp(counters["loss"][0] / counters["count"][0]))
    assert set(found) == {"rouge_l", "exact_match", "perplexity"}
    quick = Generation("tales", metrics=("perplexity",)).evaluate(model, data, stories)
    assert "generated" not in quick


@pytest.mark.parametrize("normalised", [True, False])
def test_choice_takes_the_likeliest(model: torch.nn.Module, stories: Base, normalised: bool) -> None:
    task = Choice("quiz", normalised=normalised)
    data = task.encode(QUIZ, stories)
    assert data.labels.tolist() == [0, 3]
    assert data.owners.tolist() == [0, 0, 1, 1, 1]
    nll = np.array([float(loss) for loss in padded_losses(model, data, range(5))])
    lengths = np.array([len(ids) - start for ids, start in zip(data.ids, data.starts, strict=True)])
    value = nll / lengths if normalised else nll
    right = int(value[:2].argmin() == 0) + int(value[2:].argmin() == 1)
    counters = task.evaluate(model, data, stories)
    assert counters["correct"] == (float(right),)
    assert {name: len(values) for name, values in counters.items()} == task.counted
    assert counters["loss"][0] == pytest.approx(nll[0] + nll[3], rel=1e-5)
    assert counters["count"] == (float(lengths[0] + lengths[3]),)
    assert task.scores(counters) == {"accuracy": right / 2}
    batch = next(iter(task.batches(data, 2, 0, 0)))
    assert float(task.loss(model, batch).total) == pytest.approx(nll[0] + nll[3], rel=1e-5)
    assert task.answer(model, stories, "Once upon a time\n- qx zz vv kk\n- there was a little girl") == "there was a little girl"
    with pytest.raises(DataError, match="ends in no list of choices"):
        task.answer(model, stories, "Once upon a time")


def test_wrong_family_and_wrong_rows(minilm: Base, stories: Base) -> None:
    for task in (TASK, Choice("quiz")):
        with pytest.raises(BaseError, match=rf"task {task.name}: base minilm is of family 'encoder'; give a causal"):
            task.encode(ROWS, minilm)
        with pytest.raises(DataError, match="no rows"):
            task.encode([], stories)
    with pytest.raises(DataError, match="row 1: fields"):
        TASK.encode([{"question": "q"}], stories)


def test_real_rows_of_every_form_are_encoded(stories: Base, shared_data: Any) -> None:
    for file in ("tldr", "seed_tasks", "shakespeare", "snips_slots", "gsm8k"):
        rows = read_rows(Source(path=str(shared_data / f"{file}.jsonl"), limit=20))
        data = TASK.encode(rows, stories)
        assert len(data) == 20
        assert all(0 < start < len(ids) <= 128 for ids, start in zip(data.ids, data.starts, strict=True))

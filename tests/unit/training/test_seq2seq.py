"""Encoder-decoders in the loop: real rows are learnt, levers change nothing, and examples are private or refused."""

from __future__ import annotations

import shutil

import pytest
import torch

from fedpeft.adapters import attach, initial, make_spec
from fedpeft.bases import BaseSpec, load_base
from fedpeft.errors import PrivacyError
from fedpeft.methods import METHODS, Lora
from fedpeft.tasks import Classification, Generation, Source, read_rows
from fedpeft.training import TrainJob, TrainSettings, dp_check, evaluate, train
from fedpeft.training.dp_recorder import Recorder

TASK = Generation("tales", metrics=("perplexity",))
KINDS = Classification("kinds", ("a", "b", "c"))
ROWS = [{"prompt": f"w{n} w{n + 1}" + " w7" * (n % 3), "completion": f"w{n + 1}" + " w9" * (n % 4)} for n in range(12)]
TEXTS = [{"text": row["prompt"], "label": "abc"[n % 3]} for n, row in enumerate(ROWS)]


@pytest.fixture(scope="module", params=["t5", "bart"])
def base(request, seq2seq_folder):
    return load_base(BaseSpec(str(seq2seq_folder(request.param)), max_tokens=32), "cpu")


def fit(base, settings):
    """The values after training from the seed's adapter."""
    spec = make_spec("tales", base, Lora(targets=("all",)), TASK.head)
    with attach(base, spec) as live:
        live.load(initial(base, spec, 0).tensors)
        train(live, TASK, TASK.encode(ROWS, base), settings, TrainJob(spec.layout.roles, 0))
        return live.flat.clone()


def test_levers_end_where_the_plain_loop_ends(base):
    plain = fit(base, TrainSettings(steps=2, batch_size=4, lr=1e-2))
    levers = {"checkpoint_activations": True, "chunked_loss": False, "packing": False, "batch_size": 2, "accumulate": 2}
    torch.testing.assert_close(fit(base, TrainSettings(steps=2, lr=1e-2, **levers)), plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [Lora(targets=("all",)), pytest.param(METHODS["ia3"](), marks=pytest.mark.slow)], ids=["lora", "ia3"])
def test_gradients_of_examples_are_those_of_each_alone(base, method):
    for task, rows in ((TASK, ROWS), (KINDS, TEXTS)):
        spec = make_spec(task.name, base, method, task.head)
        with attach(base, spec) as live:
            live.load(initial(base, spec, 0).tensors)
            live.train_roles(spec.layout.roles)
            dp_check.check(Recorder(live.parameters, method.kind), live, task, task.encode(rows, base))  # raises where they are not


def test_rows_that_mix_are_refused(seq2seq_folder):
    base = load_base(BaseSpec(str(seq2seq_folder("t5")), max_tokens=32), "cpu")
    spec = make_spec("tales", base, METHODS["lily"](), TASK.head)
    with attach(base, spec) as live:
        live.load(initial(base, spec, 0).tensors)
        live.train_roles(spec.layout.roles)
        with pytest.raises(PrivacyError, match=r"rows of a batch mix|not known|cannot be told apart"):
            dp_check.check(Recorder(live.parameters, "lily"), live, TASK, TASK.encode(ROWS, base))


def test_real_rows_are_learnt(shared_models, shared_data, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    shutil.copytree(
        shared_models / "stories260k", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "*config.json")
    )
    shutil.copy(shared_models / "stories260k" / "tokenizer_config.json", tmp_path)
    marks = {"vocab_size": 512, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5ForConditionalGeneration(T5Config(**marks, d_model=64, num_layers=2, num_heads=4, d_ff=128, d_kv=16)).save_pretrained(tmp_path)
    base = load_base(BaseSpec(str(tmp_path), max_tokens=64), "cpu")
    source = Source(path=str(shared_data / "snips_slots.jsonl"), where={"client": "RateBook"}, limit=60)
    data = {split: TASK.encode(read_rows(source, split), base) for split in ("train", "test")}
    spec = make_spec("tales", base, Lora(targets=("all",)), TASK.head)
    with attach(base, spec) as live:
        live.load(initial(base, spec, 0).tensors)
        before = TASK.scores(evaluate(live, TASK, data["test"]))["perplexity"]
        train(live, TASK, data["train"], TrainSettings(steps=12, batch_size=8, lr=1e-2), TrainJob(spec.layout.roles, 0))
        after = TASK.scores(evaluate(live, TASK, data["test"]))["perplexity"]
    assert after < before / 2

"""The jobs that all ranks play, and the tiny models and rows that they are about."""

from __future__ import annotations

import json
import random
from pathlib import Path

JOB = """
name = "pair"
seed = 3
output = "out"
registry = "registry"
base = {{ model = "{model}", max_tokens = 64 }}
method = {{ kind = "lora", r = 4, targets = ["all"] }}
training = {{ steps = 4, batch_size = 4, accumulate = 2, lr = 0.01, warmup = 2, schedule = "linear", save_every = 100 }}
deepspeed = {{ stage = 2, timeout = 60.0 }}
[tasks.animals]
kind = "generation"
metrics = ["perplexity"]
data = {{ path = "animals.jsonl" }}
[tasks.colours]
kind = "generation"
metrics = ["perplexity"]
data = {{ path = "colours.jsonl" }}
"""
SINGLE = {"tasks": '{ animals = { kind = "generation", metrics = ["perplexity"], data = { path = "animals.jsonl" } } }'} | {
    "training.steps": "20",
    "training.lr": "0.001",
    "training.clip": "0.5",
}
ENCODER = {
    "base.model": "bert",
    "training.steps": "3",
    "tasks": """{
      kind = { kind = "classification", labels = ["animal", "colour"], data = { path = "kinds.jsonl" } },
      size = { kind = "classification", labels = ["small", "middle", "large"], data = { path = "sizes.jsonl" } } }""".replace("\n", " "),
}
LABELS = {"kinds": ("animal", "colour"), "sizes": ("small", "middle", "large")}
OWN = {
    "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    "gradient_clipping": "auto",
    "train_batch_size": 8,
}
"""A user's DeepSpeed file, under which a job of two ranks is left half done."""
WORDS = {"animals": ("cat", "dog", "bird"), "colours": ("red", "blue", "green", "pink")}


def written(place: Path, shared_models: Path) -> Path:
    """``place`` with the job's file, its rows and its models."""
    dice = random.Random(0)
    for tests, (task, words) in zip((7, 1), WORDS.items(), strict=True):  # one: the second rank has none of them
        rows = [
            {
                "prompt": f"Once there was a {(word := dice.choice(words))} " * dice.randint(1, 3),
                "completion": f"the {word} was {task} {i}",
                "split": "test" if i < tests else "train",
            }
            for i in range(40)
        ]
        (place / f"{task}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for word in ("yes", "no"):
        rows = [{"prompt": "Once upon a time " * (1 + i % 3) + str(i), "completion": word} for i in range(40)]
        (place / f"{word}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    noise = [{"prompt": f"Once {i} ", "completion": "".join(dice.choices("abcdefghij ", k=12))} for i in range(40)]
    (place / "noise.jsonl").write_text("\n".join(json.dumps(row) for row in noise))
    (place / "single.json").write_text(json.dumps(SINGLE))
    (place / "own.json").write_text(json.dumps(OWN))
    (place / "encoder.json").write_text(json.dumps(ENCODER))
    for name, labels in LABELS.items():
        told = [{"text": f"once a {dice.choice('abcdefg')} day {i}", "label": labels[i % len(labels)], "split": "train"} for i in range(24)]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, told)))
    encoder(shared_models / "stories260k", place / "bert")
    pair(shared_models / "stories260k", place / "t5")
    shallow(shared_models / "stories260k", place / "model")
    (place / "job.toml").write_text(JOB.format(model=place / "model"))
    return place


def shallow(source: Path, target: Path) -> None:
    """The real model's first two layers, with its tokenizer: each more costs seconds of gathering in stage 3."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def pair(source: Path, target: Path) -> None:
    """A small random T5 with the real model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(source)
    sizes = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64, "d_kv": 16, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=len(words), **sizes)).save_pretrained(target)
    words.save_pretrained(target)


def encoder(source: Path, target: Path) -> None:
    """A small random BERT with the real model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(source)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(target)
    words.save_pretrained(target)

"""Central jobs on one rank and on two, over gloo: stages, resumption on other ranks and stages, faults that end all ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import attach
from fedpeft.central.engine import WAYS
from fedpeft.central.estimate import estimated, plan_of
from fedpeft.central.job import prepare
from fedpeft.central.joint import JointTask
from fedpeft.central.world import World
from fedpeft.central.zero import zero_of
from fedpeft.processes import free_port
from fedpeft.tensors import Tensors
from fedpeft.training import checkpoint
from fedpeft.training.config import load_central

SECONDS = 600
"""How long the ranks of a part may take on a loaded machine: the first costs 60 CPU seconds, the other 160."""
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(2 * SECONDS + 60)]

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_models) -> Path:
    place, dice = tmp_path_factory.mktemp("central"), random.Random(0)
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


def ranks(folder: Path, part: str, size: int) -> list[subprocess.Popen[bytes]]:
    """The ranks of a world of ``size``, each with a log."""
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    script = Path(__file__).with_name("central_ranks.py")
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(folder), part],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=(folder / f"{part}{size}.{rank}.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(size)
    ]


def played(folder: Path, part: str) -> dict[str, dict]:
    """What the rank of a world of one and those of a world of two find: ``1.0``, ``2.0`` and ``2.1``."""
    started, end = [*ranks(folder, part, 1), *ranks(folder, part, 2)], time.monotonic() + SECONDS
    try:
        while any([process.poll() is None for process in started]):
            assert time.monotonic() < end, logs(folder)
            assert not any(process.returncode for process in started), logs(folder)
            time.sleep(0.1)
        assert not any(process.returncode for process in started), logs(folder)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return {path.stem.removeprefix(part): json.loads(path.read_text()) for path in folder.glob(f"{part}?.?.json")}


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))


@pytest.fixture(scope="module")
def found(folder) -> dict[str, dict]:
    return played(folder, "first")


@pytest.fixture(scope="module")
def more(folder, found) -> dict[str, dict]:
    """All that was found, with what takes minutes."""
    return {world: found[world] | every for world, every in played(folder, "more").items()}


def losses(result: dict, key: str = "all") -> np.ndarray:
    assert "losses" in result, result
    return np.array([step[key] for step in result["losses"]])


def values(folder: Path, name: str) -> dict[str, np.ndarray]:
    held = checkpoint.read(folder / name / "checkpoint")
    assert held is not None
    return {key: array for key, array in held.arrays.items() if key != WAYS}


def assert_close(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float) -> None:
    """As vectors: Adam moves by a whole step what has no gradient but rounding."""
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert float(np.linalg.norm(array - other[name])) <= tolerance * float(np.linalg.norm(other[name])), name


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert all((array == other[name]).all() for name, array in one.items())


def test_one_rank_is_the_local_engine_step_for_step(folder, found):
    from fedpeft.bases import load_base
    from fedpeft.training.loop import train
    from fedpeft.training.settings import TrainJob

    config = load_central(folder / "job.toml", SINGLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ready = prepare(config, {})
    pool, adapter = ready.pool, ready.adapters["animals"]
    mixed = JointTask("pair", pool, {"animals": 1.0}, config.training.accumulate)

    class Same:
        """The generation task on the same batches."""

        name = "animals"

        def batches(self, data, size, seed, epoch):
            return (one.part(0, 1).batch for one in mixed.batches(data, size, seed, epoch))

        def loss(self, model, batch):
            return config.tasks["animals"].task.loss(model, batch)

    seen: list[float] = []
    base = load_base(config.base, "cpu")
    with attach(base, adapter.spec) as live:
        live.load(adapter.tensors)
        job = TrainJob(adapter.spec.layout.roles, config.seed, None, lambda _step, loss: seen.append(loss))
        train(live, Same(), pool.data[0], config.training, job)
        ours = live.read().flat
    theirs = losses(found["1.0"]["single"])
    assert len(theirs) == 20
    np.testing.assert_allclose(theirs, seen, atol=1e-6, rtol=1e-6)
    assert_close({"value": values(folder, "single1")["animals|value"]}, {"value": ours}, 1e-4)


def assert_stage(folder: Path, found: dict[str, dict], stage: str, worlds: tuple[str, ...]) -> None:
    """Losses and adapters of ``stage`` are those of stage 0 on one rank."""
    for world in worlds:
        for key in ("all", "animals", "colours"):
            wanted = losses(found["1.0"]["stage0"], key)
            np.testing.assert_allclose(losses(found[world][f"stage{stage}"], key), wanted, atol=2e-6, rtol=2e-6)
        assert_close(values(folder, f"{'one' if world == '1.0' else 'two'}{stage}"), values(folder, "one0"), 1e-4)


def assert_held(folder: Path, found: dict[str, dict], stage: str, worlds: tuple[str, ...]) -> None:
    """Each rank holds the moments and the part of the base that were estimated."""
    config = load_central(folder / "job.toml", {"deepspeed.stage": stage})
    for world in worlds:
        size = int(world[0])
        estimate, held = estimated(config, size, "cpu"), found[world][f"stage{stage}"]["held"]
        assert plan_of(estimate, zero_of(config, size)).device["moments"] == held["moments"]
        whole = estimate.weights.part(size if stage == "3" else 1, 0) - estimate.weights.fixed
        assert whole == held["base"]


def test_stage_3_on_two_ranks_is_stage_0_on_one(folder, found):
    assert_stage(folder, found, "3", ("2.0", "2.1"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", "0123")
def test_stages_and_numbers_of_ranks_do_not_matter(folder, more, stage):
    assert_stage(folder, more, stage, ("1.0", "2.0", "2.1"))


def test_a_rank_holds_the_moments_and_the_part_of_the_base_that_were_estimated(folder, found):
    assert_held(folder, found, "0", ("1.0",))
    assert_held(folder, found, "3", ("2.0", "2.1"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", "0123")
def test_what_is_held_was_estimated_in_every_stage(folder, more, stage):
    assert_held(folder, more, stage, ("1.0", "2.0", "2.1"))


@pytest.mark.slow
@pytest.mark.parametrize("world", "12")
def test_packed_sequences_train_as_padded_ones_do(folder, more, world):
    np.testing.assert_allclose(losses(more[f"{world}.0"]["padded"]), losses(more["1.0"]["stage0"]), atol=2e-6, rtol=2e-6)
    assert_close(values(folder, f"padded{world}"), values(folder, "one0"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_a_base_in_half_precision_stays_so_in_stage_3(more, kind):
    one, half = more["2.0"]["stage3"], more["2.0"][kind]
    assert half["held"]["base"] == one["held"]["base"] // 2
    np.testing.assert_allclose(losses(half), losses(one)[:1], rtol=0.02)


def assert_left_out(folder: Path, found: dict[str, dict], stage: str, worlds: tuple[str, ...]) -> None:
    """The step that overflows on the last rank is left out on all of them, and nothing else is."""
    one = found["1.0"]["scaled0"]
    for world in worlds:
        again = found[world][f"scaled{stage}"]
        np.testing.assert_allclose(losses(again), losses(one), atol=2e-6, rtol=2e-6)
        assert losses(again, "loss scale").tolist() == [2.0**16] + [2.0**15] * 3
        assert_close(values(folder, f"scaled{world[0]}-{stage}"), values(folder, "scaled1-0"), 1e-4)


def assert_went_on(folder: Path, found: dict[str, dict], stage: str) -> None:
    """A job that was cut after a step left out ends at the same bits."""
    again = found["1.0"][f"scaled{stage}-resumed"]
    assert losses(again).tolist() == losses(found["1.0"][f"scaled{stage}"])[3:].tolist()
    assert_same(values(folder, f"scaled1-{stage}-cut"), values(folder, f"scaled1-{stage}"))


def test_a_step_that_overflows_on_one_rank_is_left_out_on_all(folder, found):
    one, plain = losses(found["1.0"]["scaled0"]), losses(found["1.0"]["stage0"])
    np.testing.assert_allclose(one[:2], plain[:2], atol=2e-6)
    assert abs(one[2] - plain[2]) > 0.01
    assert_left_out(folder, found, "2", ("2.0", "2.1"))


def test_a_job_goes_on_at_the_loss_scale_that_it_had(folder, found):
    assert_went_on(folder, found, "0")
    held = checkpoint.read(folder / "scaled1-0-cut" / "checkpoint")
    assert held is not None
    assert (held.tally.skipped, held.arrays["(scale)"].tolist(), int(held.arrays["moved"])) == (1, [2.0**15, 2.0], 3)


@pytest.mark.slow
def test_loss_scaling_is_the_same_in_every_stage(folder, more):
    assert_left_out(folder, more, "1", ("1.0",))
    for stage in "03":
        assert_left_out(folder, more, stage, ("2.0", "2.1"))
    assert_went_on(folder, more, "3")


def assert_bytes_held(folder: Path, found: dict[str, dict], stage: str, worlds: tuple[str, ...]) -> None:
    table = {"deepspeed.stage": stage, "training.optimizer": "adamw8bit", "method": '{ kind = "lora", r = 16, targets = ["all"] }'}
    config = load_central(folder / "job.toml", table)
    for world in worlds:
        ranks, held = int(world[0]), found[world]["bytes"]["held"]["moments"]
        assert plan_of(estimated(config, ranks, "cpu"), zero_of(config, ranks)).device["moments"] == held


def test_moments_of_a_byte_go_on_to_the_bit_on_the_same_ranks_and_stage(folder, found):
    assert losses(found["2.0"]["bytes-resumed"]).tolist() == losses(found["2.0"]["bytes"])[2:].tolist()
    assert_same(values(folder, "bytes2-cut"), values(folder, "bytes2"))
    assert_bytes_held(folder, found, "2", ("2.0", "2.1"))


@pytest.mark.slow
def test_moments_of_a_byte_train_nearly_as_those_of_four_do_on_any_ranks_and_stage(folder, more):
    floats = more["1.0"]["floats"]
    assert_bytes_held(folder, more, "1", ("1.0",))
    for world in ("1.0", "2.0", "2.1"):
        np.testing.assert_allclose(losses(more[world]["bytes"]), losses(floats), rtol=2e-3)
        assert more[world]["bytes"]["held"]["moments"] < 0.27 * floats["held"]["moments"] / int(world[0])
    np.testing.assert_allclose(losses(more["1.0"]["bytes-resumed"]), losses(more["1.0"]["bytes"])[2:], rtol=2e-3)


@pytest.mark.slow
def test_an_encoder_with_a_head_for_each_task_is_the_same_on_two_ranks_in_stage_3(folder, more):
    for key in ("all", "kind", "size"):
        np.testing.assert_allclose(losses(more["2.0"]["encoder"], key), losses(more["1.0"]["encoder"], key), atol=2e-6, rtol=2e-6)
    assert_close(values(folder, "encoder2"), values(folder, "encoder1"), 1e-4)


@pytest.mark.slow
def test_an_encoder_decoder_is_the_same_on_two_ranks_in_stage_3(folder, more):
    assert losses(more["1.0"]["paired"])[-1] < losses(more["1.0"]["paired"])[0]
    np.testing.assert_allclose(losses(more["2.0"]["paired"]), losses(more["1.0"]["paired"]), rtol=1e-5)
    assert_close(values(folder, "paired2"), values(folder, "paired1"), 1e-3)


@pytest.mark.slow
def test_an_8_bit_base_trains_on_two_ranks_in_stage_3(folder, more):
    one, two = more["1.0"]["int8"], more["2.0"]["int8"]
    assert losses(one)[-1] < losses(one)[0]
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)


def exported(folder: Path, name: str, changes: dict[str, str], into: Path) -> dict[str, Any]:
    """Versions by task of what ``central export`` publishes of the job ``name`` without reading rows: the checkpoint's values."""
    from fedpeft.cli.main import run
    from fedpeft.registry import Registry

    tasks = load_central(folder / "job.toml", changes).tasks
    settings = {**changes, "output": str(folder / name), "registry": str(into)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("fedpeft.central.reading.read_rows", None)
        assert run(["central", "export", "job.toml", *(part for pair in settings.items() for part in ("--set", "=".join(pair)))]) == 0
    versions, held = {version.task: version.manifest for version in Registry(into).list()}, values(folder, name)
    assert versions.keys() == tasks.keys()
    for task in tasks:
        assert (Registry(into).load(task).tensors.flat == held[f"{task}|value"]).all()
        assert versions[task].examples == held[f"(examples)|{task}"] > 10
    return versions


def test_a_job_is_exported_without_its_rows(folder, found, tmp_path):
    versions = exported(folder, "half2", {}, tmp_path)
    assert {manifest.round for manifest in versions.values()} == {4}
    assert sum(manifest.examples for manifest in versions.values()) == 80 - 7 - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [("encoder", ENCODER), ("int8", {"base.quantization": "int8", "training.steps": "2"}), ("paired", {"base.model": "t5"})],
)
def test_jobs_on_other_bases_go_on_from_two_ranks_in_stage_3_and_are_exported(folder, more, name, changes, tmp_path):
    whole = more["1.0"][name]
    np.testing.assert_allclose(losses(more["1.0"][f"{name}-resumed"]), losses(whole)[1:], rtol=1e-5)
    assert_close(values(folder, f"{name}-half2"), values(folder, f"{name}1"), 1e-3)
    for manifest in exported(folder, f"{name}-half2", changes, tmp_path).values():
        assert manifest.quantization == ("int8" if name == "int8" else "none",)
        assert manifest.round == len(losses(whole))


@pytest.mark.slow
def test_a_shared_adapter_trains_beside_each_own(folder, more):
    np.testing.assert_allclose(losses(more["2.0"]["shared"]), losses(more["1.0"]["shared"]), atol=2e-6, rtol=2e-6)
    assert_close(values(folder, "shared2"), values(folder, "shared1"), 1e-4)
    assert "(shared)|value" in values(folder, "shared1")
    assert losses(more["1.0"]["shared"])[-1] < losses(more["1.0"]["shared"])[0]


def test_two_ranks_go_on_from_one_and_one_from_two_with_rows_on_disk_under_a_file_of_the_users_own(folder, found):
    undisturbed = losses(found["1.0"]["stage0"])
    for world, name in (("2.0", "half1"), ("1.0", "half2")):
        resumed = losses(found[world]["resumed"])
        assert len(resumed) == 2
        np.testing.assert_allclose(resumed, undisturbed[2:], atol=2e-6, rtol=2e-6)
        assert_close(values(folder, name), values(folder, "one0"), 1e-4)
        assert len(list((folder / name / "encoded").iterdir())) == len(WORDS)


@pytest.mark.slow
def test_optimizer_states_in_host_memory_change_nothing(folder, more):
    np.testing.assert_allclose(losses(more["2.0"]["offloaded"]), losses(more["1.0"]["stage0"]), atol=2e-6, rtol=2e-6)
    assert_close(values(folder, "offloaded2"), values(folder, "one0"), 1e-4)


@pytest.mark.slow
def test_partitioned_ranks_score_as_one_process_does(folder, more):
    from fedpeft.bases import load_base
    from fedpeft.tasks import read_rows
    from fedpeft.training.loop import evaluate

    config = load_central(
        folder / "job.toml", {"tasks.animals.metrics": '["perplexity", "exact_match"]', "tasks.animals.max_new_tokens": "3"}
    )
    base = load_base(config.base, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        every = prepare(config, {}).adapters
        rows = {name: read_rows(config.tasks[name].data, "test") for name in every}
    assert {name: len(found) for name, found in rows.items()} == {"animals": 7, "colours": 1}
    for name, adapter in every.items():
        task = config.tasks[name].task
        with attach(base, adapter.spec) as live:
            live.load(Tensors(adapter.spec.layout, values(folder, "scored1")[f"{name}|value"]))
            alone = task.scores(evaluate(live, task, task.encode(rows[name], base)))
        for world in ("1.0", "2.0", "2.1"):
            for key in ("scored", "again"):
                last = more[world][key]["final"] if key == "again" else more[world][key]["scores"][-1]
                assert last[name] == pytest.approx(alone, rel=2e-4), (world, key)
    undisturbed = values(folder, "one0")
    assert all(np.array_equal(array, undisturbed[name]) for name, array in values(folder, "scored1").items())


@pytest.mark.slow
def test_the_latest_checkpoints_and_the_best_stay(folder, more):
    for world, name in (("1.0", "scored1"), ("2.0", "scored2")):
        perplexities = [scores["colours"]["perplexity"] for scores in more[world]["scored"]["scores"]]
        best = 1 + int(np.argmin(perplexities))
        kept = sorted(path.name for path in (folder / name / "checkpoint").glob("step-*"))
        assert kept == [f"step-{step:08}.safetensors" for step in sorted({best, 3, 4})]
        assert more[world]["scored"]["final"] == more[world]["scored"]["scores"][best - 1]


def test_one_job_at_a_time_has_an_output(found):
    fault = found["1.0"]["taken"]
    assert fault["code"] == 9
    assert "trains a job there; stop it, or give this one another `output`" in fault["fault"]


def test_a_job_of_other_settings_is_not_resumed(folder, found):
    fault = found["1.0"]["changed"]
    assert (fault["code"], "of step 1, is of other settings" in fault["fault"]) == (3, True), fault


def test_a_full_disk_ends_the_job_with_its_exit_code_and_leaves_the_last_checkpoint(folder, found):
    fault = found["1.0"]["full"]
    assert (fault["code"], "free space" in fault["fault"]) == (9, True), fault
    held = checkpoint.read(folder / "full1" / "checkpoint")
    assert held is not None
    assert held.tally.step == 1
    assert [path.name for path in (folder / "full1" / "checkpoint").iterdir() if path.name.startswith(".new")] == []


def test_balancing_is_the_same_on_any_number_of_ranks_and_after_a_resumption(folder, found):
    assert_balanced(folder, found, "uncertainty")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coba", "pcgrad"])
def test_every_balance_is_the_same_on_any_number_of_ranks_and_after_a_resumption(folder, more, kind):
    assert_balanced(folder, more, kind)


def assert_balanced(folder: Path, found: dict[str, dict], kind: str) -> None:
    one = found["1.0"][kind]
    for world in ("2.0", "2.1"):
        for key in one["losses"][-1]:
            np.testing.assert_allclose(losses(found[world][kind], key), losses(one, key), rtol=5e-4, atol=1e-4, err_msg=key)
    assert_close(values(folder, f"{kind}2"), values(folder, f"{kind}1"), 1e-3)
    assert found["1.0"][f"{kind}-resumed"]["losses"] == one["losses"][3:]
    assert_same(values(folder, f"{kind}-cut1"), values(folder, f"{kind}1"))
    told = {"uncertainty": "weight/animals", "coba": "held/colours", "pcgrad": "cosine/animals|colours"}[kind]
    assert len(set(losses(one, told))) > 2
    assert kind != "pcgrad" or losses(one, told).min() < 0


@pytest.mark.slow
def test_a_task_that_ended_early_rests_and_the_others_take_its_share(folder, more):
    for world, size in (("1.0", 1), ("2.0", 2)):
        steps = more[world]["ending"]["losses"]
        ended = next(number for number, step in enumerate(steps) if "animals" not in step)
        assert all("animals" not in step and "colours" in step for step in steps[ended:])
        assert ended < len(steps) < 30, "the job is over when all tasks have ended"
        judged = [(step["held/animals/perplexity"], step["held/animals"]) for step in steps]
        assert [one for one, _ in judged] == pytest.approx([np.exp(loss) for _, loss in judged], rel=1e-4)
        whole, cut = values(folder, f"ending{size}"), values(folder, f"ending-cut{size}")
        assert (whole["animals|value"] == cut["animals|value"]).all()
        assert (whole["colours|value"] != cut["colours|value"]).any()
        state = checkpoint.read(folder / f"ending{size}" / "checkpoint")
        assert state.arrays["(stops)|ended"].tolist() == [ended, len(steps)]
        before = [one for one, _ in judged[:ended]]
        assert min(before[:-2]) < min(before[-2:]) + 0.3, "two looks without a perplexity that is lower by 0.3"
        assert state.tally.examples == 8 * len(steps)


@pytest.mark.slow
def test_a_router_over_all_tasks_rows_is_trained_published_and_read_again(folder, more, tmp_path):
    from fedpeft.central.job import trained
    from fedpeft.central.publish import publish
    from fedpeft.registry import Registry

    one = more["1.0"]["hydra"]
    for key in ("all", "cosine/animals|colours"):
        np.testing.assert_allclose(losses(more["2.0"]["hydra"], key), losses(one, key), rtol=5e-4, atol=1e-4)
    method = '{kind = "hydralora", r = 2, experts = 2, targets = ["all"]}'
    change = {"shared": "true", "shared_method": method, "registry": str(tmp_path), "output": str(folder / "hydra1")}
    config = load_central(folder / "job.toml", change)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        every = prepare(config, {}).every
    publish(config, trained(config, every), {})
    again = Registry(tmp_path).load("pair.shared").tensors.named()
    held = Tensors(every["(shared)"].spec.layout, values(folder, "hydra1")["(shared)|value"]).named()
    assert all((again[name] == held[name]).all() for name in held)
    routers = [name for name in again if name.endswith("hydralora.router")]
    assert routers
    assert all((again[name] != every["(shared)"].tensors.named()[name]).any() for name in routers)


@pytest.mark.slow
def test_transfer_compares_each_task_alone_with_all(folder, more):
    table, two = (json.loads((folder / f"compared{size}" / "transfer.json").read_text()) for size in "12")
    for name in ("alone", "together"):
        assert two[name] == pytest.approx(table[name], rel=1e-4)
    for task in WORDS:
        assert table["metric"][task] == "perplexity"
        assert table["gain"][task] == pytest.approx(table["alone"][task] - table["together"][task])
        alone = checkpoint.read(folder / "compared1" / "transfer" / task / "checkpoint")
        together = checkpoint.read(folder / "compared1" / "transfer" / "together" / "checkpoint")
        assert (alone.tally.step, alone.tally.examples * 2) == (together.tally.step, together.tally.examples)
    assert table["pairs"] == {"animals+colours": table["gain"]}
    for world, times in (("1.0", 1), ("2.0", 1), ("2.1", 0)):
        said = (folder / f"more{world}.log").read_text()
        assert (said.count("training animals alone:"), said.count("gain of the task on the left")) == (times, times)


def test_a_four_bit_base_trains_in_stage_3(found):
    seen = losses(found["2.0"]["nf4.3"])
    assert seen[-1] < 0.5 * seen[0]


@pytest.mark.slow
def test_a_four_bit_base_trains_in_stage_2_as_in_stage_3(folder, more):
    np.testing.assert_allclose(losses(more["2.0"]["nf4.3"]), losses(more["2.0"]["nf4.2"]), atol=2e-5)
    assert_close(values(folder, "nf4-3"), values(folder, "nf4-2"), 1e-3)


def test_a_fault_of_one_rank_ends_all_with_its_exit_code(found):
    for rank, said in (("2.0", "rank 1: "), ("2.1", "nowhere.jsonl")):
        fault = found[rank]["missing"]
        assert (fault["code"], said in fault["fault"]) == (4, True), fault
        assert fault["seconds"] < 30
        other = found[rank]["other"]
        assert (other["code"], "same files" in other["fault"]) == (4, True), other
    assert found["1.0"]["diverged"]["code"] == 11


def cli(folder: Path, *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", "fedpeft", "central", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    log = (folder / f"cli-{arguments[0]}.log").open("ab")
    return subprocess.Popen(command, cwd=folder, env=environment | settings, stdout=log, stderr=log)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_kill_9_of_a_rank_ends_the_job_and_the_same_command_finishes_it(folder, found):
    started = cli(folder, "train", "job.toml", "--ranks", "2", "--set", "training.save_every=1", "--set", "deepspeed.stage=1")
    end = time.monotonic() + 120
    while not (folder / "out" / "checkpoint").is_dir() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(children(started.pid)[1], signal.SIGKILL)
    assert started.wait(60) == 8
    done = checkpoint.read(folder / "out" / "checkpoint")
    assert done is not None
    one = World(port=free_port()).environment()
    arguments = ("--launcher", "torchrun", "--set", "training.save_every=1", "--set", "deepspeed.stage=0")
    assert cli(folder, "resume", "job.toml", *arguments, **one).wait(120) == 0
    assert_close(values(folder, "out"), values(folder, "one0"), 1e-4)
    from fedpeft.registry import Registry

    published = Registry(folder / "registry").list()
    assert {version.task for version in published} == {"animals", "colours"}
    assert all(version.manifest.scheme == "central" and version.manifest.metrics["perplexity"] > 1 for version in published)


@pytest.mark.slow
def test_the_command_answers_9_where_nothing_can_be_written(folder, found):
    settings = ("output=full1", "training.save_every=1", "deepspeed.stage=0", "track=tensorboard", "evaluate.every=1")
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", sys.executable, "-W", "ignore", "-m", "fedpeft", "central", "train", "job.toml"]
    command = [*limited, "--launcher", "torchrun", *(part for setting in settings for part in ("--set", setting))]
    one = World(port=free_port()).environment()
    done = subprocess.run(command, cwd=folder, env=os.environ | one, capture_output=True, text=True, timeout=200)
    assert (done.returncode, "free space" in done.stderr) == (9, True), done.stderr
    assert "animals.safetensors: cannot be written" in done.stderr  # the router card, which comes before the first step

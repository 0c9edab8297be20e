"""Wrong values in a run file, as a new user would write them: one message that names key, value and what is allowed."""

from pathlib import Path
from typing import Any

import pytest
from demo_runs import edited, message

FILE_MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({"train.step": 5}, ["unknown key train.step", "did you mean train.steps?"]),
    ({"train.lr": 5}, ["unknown key train.lr", "did you mean optimizer.lr?"]),
    ({"trian": {}}, ["unknown key trian", "did you mean train?"]),
    ({"qqq": 1}, ["unknown key qqq"]),
    ({"train.zzz": 1}, ["unknown key train.zzz", "the keys of train are steps, global_batch_size"]),
    (
        {"model.decoder.rope.thata": 1},
        ["unknown key model.decoder.rope.thata", "did you mean model.decoder.rope.theta?"],
    ),
    (
        {"data.sources": [{"name": "vsr", "wait": 1.0}]},
        ["unknown key data.sources[0].wait", "data.sources[0].weight"],
    ),
    ({"data.sources": [{"name": "vqa", "weight": 1.0}]}, ["data.sources[0].name must be one of vqav2", 'got "vqa"']),
    ({"data.sources": [{"name": "vsr", "weight": 0}]}, ["data.sources[0].weight must be a number > 0; got 0"]),
    (
        {"data.sources": "vqav2"},
        [
            "data.sources must be a list of {name, weight, augment, split_turns, format, path, images, columns}",
            'got "vqav2"',
        ],
    ),
    ({"data.sources": [3]}, ["data.sources[0] must be", "name, weight", "got 3"]),
    ({"train.steps": "8"}, ["train.steps must be a whole number > 0", 'got "8"']),
    ({"train.steps": 8.5}, ["train.steps must be a whole number > 0", "got 8.5"]),
    ({"train.steps": True}, ["train.steps must be a whole number > 0", "got true"]),
    ({"train.steps": 0}, ["train.steps must be a whole number > 0", "got 0"]),
    ({"train.precision": "fp16"}, ["train.precision must be one of bf16, fp32", 'got "fp16"']),
    ({"optimizer.lr": float("inf")}, ["optimizer.lr must be a number > 0"]),
    ({"optimizer.beta1": 1.0}, ["optimizer.beta1 must be a number >= 0 and < 1; got 1.0"]),
    ({"log.tensorboard": "yes"}, ["log.tensorboard must be true or false", 'got "yes"']),
    ({"run.dir": None}, ["run.dir must be a path; got null"]),
    ({"run.dir": ""}, ['run.dir must be a path; got ""']),
    ({"data.root": " "}, ['data.root must be a path; got " "']),
    ({"train.steps": 3.0}, ["train.steps must be a whole number > 0; got 3.0; write 3"]),
    ({"train.steps": 10**30}, ["train.steps must be at most 2,147,483,647; got 1000"]),
    ({"model.decoder.hidden_size": 10**9}, ["model.decoder.hidden_size must be at most 16,777,216"]),
    ({"parallel.zero_stage": True}, ["parallel.zero_stage must be one of 0, 1, 2, 3; got true"]),
    ({"run.dir": 7}, ["run.dir must be a path; got 7"]),
    ({"init.weights": 7}, ["init.weights must be a path or null; got 7"]),
    ({"data.captions": [{"name": "kale", "shards": [1]}]}, ["data.captions[0].shards[0]", "got 1"]),
    ({"train": 3}, ["train must be a mapping with the keys steps, global_batch_size", "got 3"]),
    ({"train": None}, ["train must be a mapping", "got null"]),
    ({"train.steps": ...}, ["train.steps is missing: give a whole number > 0"]),
    ({"optimizer": ...}, ["the section optimizer is missing: give lr, min_lr"]),
    ({"data.kind": "images"}, ["data.kind must be one of captions, conversations"]),
    ({"parallel.zero_stage": 4}, ["parallel.zero_stage must be one of 0, 1, 2, 3; got 4"]),
    ({"parallel.virtual_stages": 0}, ["parallel.virtual_stages must be a whole number > 0; got 0"]),
    ({"parallel.layers_per_stage": 3}, ["parallel.layers_per_stage must be a list, each a whole number > 0; got 3"]),
    ({"parallel.layers_per_stage": [3, 0]}, ["parallel.layers_per_stage[1] must be", "a whole number > 0", "got 0"]),
    ({"parallel.recompute": "some"}, ["parallel.recompute must be one of none, full"]),
    ({"deepspeed": []}, ["deepspeed must be a mapping"]),
    ({"model.decoder.num_heads": 7}, ["model.decoder", "hidden_size=", "num_heads=7", "choose num_heads from [1, 2, "]),
    ({"model.decoder.num_kv_heads": 3}, ["model.decoder", "num_heads=4", "num_kv_heads=3", "[1, 2, 4]"]),
    ({"model.vision.num_heads": 5}, ["model.vision", "hidden_size=64", "num_heads=5"]),
    ({"model.decoder.padded_vocab_size": 100}, ["model.decoder", "padded_vocab_size=100"]),
    ({"model.decoder.rope.rope_type": "longrope"}, ["model.decoder.rope.short_factor", "needs "]),
]


@pytest.mark.parametrize(("changes", "expected"), FILE_MISTAKES, ids=[str(c) for c, _ in FILE_MISTAKES])
def test_mistakes_in_a_file(tmp_path: Path, changes: dict[str, Any], expected: list[str]) -> None:
    file = edited(tmp_path, changes)
    text = message(config=file)
    assert text.startswith(f"{file}: ")
    for part in expected:
        assert part in text, text


def test_all_mistakes_of_a_file_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    changes = {
        "train.step": 5,
        "optimizer.lr": "fast",
        "log.interval": 0,
        "checkpoint.interval": ...,
        "model.vision.num_heads": 7,
    }
    text = message(config=edited(tmp_path, changes))
    assert "5 problems" in text
    for part in (
        "train.step;",
        "optimizer.lr must be",
        "log.interval must be",
        "checkpoint.interval is missing",
        "model.vision",
    ):
        assert part in text
    assert text.count("line ") == 5

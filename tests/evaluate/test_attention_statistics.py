"""Measured masses against sums over dense attention; the three statistics; entities; the command."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from analysis_model import LATENTS, SIDE, ask, eager, model, picture, saved, template, two_turns, write_folder
from PIL import Image
from public_files import write_tables

from aki_megatron.data.media import media_decoders
from aki_megatron.data.prompt_tokens import locate_prompt
from aki_megatron.errors import DataError
from aki_megatron.evaluate.attention_analysis.categories import load_categories
from aki_megatron.evaluate.attention_analysis.entities import coverage, latent_weights, read_boxes, read_masks
from aki_megatron.evaluate.attention_analysis.measure import measure, measure_batch, read_question
from aki_megatron.evaluate.attention_analysis.question import inspect_question
from aki_megatron.evaluate.attention_analysis.rule_tagger import RuleTagger
from aki_megatron.evaluate.attention_analysis.statistics import AttentionStatistics, SampleAttention, merged
from aki_megatron.evaluate.attention_analysis.word_map import WHOLE_PICTURE, build_word_map
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction, append_predictions
from aki_megatron.evaluate.runner import collate_prompts, read_prompt

QUESTION = "Answer the question using a single word or phrase. Is the red cup left of two spoons?"
CATEGORY_OF = {
    "Is": 4, "the": 4, "red": 2, "cup": 0, "left": 1, "of": 1, "two": 2, "spoons": 0, "?": 5,
}  # fmt: skip
"""Number of the category of each word after the instruction; that of the instruction's words is 6."""


@pytest.mark.parametrize("rule", ["mma", "mma_general", "causal"])
def test_masses_are_sums_over_dense_attention(rule: str) -> None:
    stage = model(rule)
    conversations = [ask(QUESTION), two_turns()]
    questions = [read_question(saved(stage), each, RuleTagger(), load_categories()) for each in conversations]
    found, beside = measure_batch(saved(stage), questions, (0, 2))
    decoders = media_decoders(stage.config)
    batch = collate_prompts([read_prompt(ask(QUESTION), template(), decoders)], template(), 4 * SIDE)
    layout = locate_prompt(template(), ask(QUESTION))
    run = layout.media[0]
    dense = torch.stack([eager(stage, batch, layer)[0] for layer in (0, 2)])[:, :, run.start : run.end]
    expected = torch.zeros(2, 4, 7, dtype=torch.float64)
    num_words, all_words = [0] * 7, []
    for word in re.finditer(r"\w+|[.?]", QUESTION):
        category = 6 if word.start() < QUESTION.index(" Is the") else CATEGORY_OF[word.group()]
        num_words[category] += 1
        for token in layout.tokens:
            if word.start() < token.end and token.start < word.end():
                expected[:, :, category] += dense[..., token.position].mean(-1)
                all_words.append(token.position)
    torch.testing.assert_close(found.mass.double(), expected, rtol=0, atol=1e-6)
    assert found.num_words.tolist() == num_words
    whole = dense[..., all_words].sum(-1).mean(-1)
    torch.testing.assert_close(found.mass.sum(-1).double(), whole, rtol=0, atol=1e-6)
    assert int(found.num_tokens.sum()) == len(all_words)
    for sample in (found, beside):
        assert bool((sample.mass == 0).all()) == (rule == "causal")


def test_only_later_words_of_the_same_turn_count() -> None:
    stage = model("mma")
    question = read_question(saved(stage), two_turns(), RuleTagger(), load_categories())
    layout = locate_prompt(template(), two_turns())
    first, second = layout.media
    assert question.queries.tolist() == [*range(first.start, first.end), *range(second.start, second.end)]
    turn = two_turns().turns[0].prompt
    later = [token for token in layout.tokens if token.turn == 0 and token.position >= first.end]
    expected = [token.position for token in later if turn[token.start : token.end].strip()]
    assert sorted(question.keys.tolist()) == expected
    after_second = np.array(question.keys) > second.start
    assert question.counted[:LATENTS].all() and (question.counted[LATENTS:] == after_second).all()
    with pytest.raises(DataError, match="no word after an image"):
        read_question(saved(stage), ask(" "), RuleTagger(), load_categories())


def test_the_three_statistics_are_what_the_page_says() -> None:
    statistics = AttentionStatistics("x", ("a", "b"), (0, 1), 2)
    mass = torch.tensor([[[0.2, 0.1, 0.3], [0.4, 0.1, 0.1]], [[0.0, 0.0, 0.5], [0.0, 0.0, 0.3]]])
    statistics.add(SampleAttention("1", mass, torch.tensor([2, 1, 4]), torch.tensor([1, 1, 3])))
    one = torch.zeros(2, 2, 3)
    one[:, :, 0] = 0.1
    statistics.add(SampleAttention("2", one, torch.tensor([1, 0, 0]), torch.tensor([1, 0, 0])))
    statistics.add_error("broken")
    torch.testing.assert_close(statistics.mass[0], torch.tensor([(0.3 + 0.1) / 2, 0.05, 0.1]).double())
    torch.testing.assert_close(statistics.per_token[0], torch.tensor([(0.15 + 0.1) / 2, 0.1, 0.05]).double())
    torch.testing.assert_close(statistics.share, torch.tensor([[(0.75 + 1) / 2, 0.125], [1.0, 0.0]]).double())
    by_sample = [(0.15, 0.1), (0.05, 0.0)]  # means over layers
    for number, (first, second) in enumerate(by_sample):
        assert float(statistics.standard_error[number]) == pytest.approx(abs(first - second) / 2)
    document = statistics.to_dict()
    assert document["samples"] == 2 and document["errors"] == 1 and document["samples_with"]["b"] == 1
    assert document["mass"] == {"a": 0.125, "b": 0.025, "(instruction)": 0.15}
    assert document["mass_by_layer_and_head"]["a"][0] == [0.15, 0.25]
    total = merged([statistics, statistics], "all")
    assert total.num_samples == 4 and total.num_errors == 2
    torch.testing.assert_close(total.mass, statistics.mass)
    empty = AttentionStatistics("y", ("a", "b"), (0,), 2).to_dict()
    assert empty["mass"] == {"a": None, "b": None, "(instruction)": None}
    assert empty["text_share"] == {"a": None, "b": None}


def test_samples_that_cannot_be_used_are_counted() -> None:
    def broken() -> object:
        raise DataError("image 3 is missing")

    conversations = [lambda: ask(QUESTION), broken, lambda: ask(" "), lambda: ask("a cup? " * 2000)]
    done: list[int] = []
    found = measure(saved(model()), "x", conversations, (1,), RuleTagger(), load_categories(), batch_size=3,
                    progress=done.append)  # fmt: skip
    assert (found.num_samples, found.num_errors, done) == (1, 3, [3, 4])
    assert found.reasons[0] == "image 3 is missing" and "more than the 4096" in found.reasons[2]


def test_coverage_is_the_part_of_each_patch() -> None:
    whole = coverage(np.ones((7, 11)), 3)
    torch.testing.assert_close(whole, torch.ones(3, 3))
    inside = np.zeros((7, 11))
    inside[0, 0] = 1
    corner = coverage(inside, 3)
    assert corner[0, 0] == pytest.approx(9 / 77) and corner.sum() == corner[0, 0]
    inside[:] = 0
    inside[2, :] = 1  # the third of seven lines: a third of it in the first of three patches
    torch.testing.assert_close(coverage(inside, 3)[:, 0], torch.tensor([1 / 7, 2 / 7, 0.0]))


def test_boxes_and_masks_of_the_same_pixels_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text('{"cup": [2, 3, 10.0, 7], "all": [[0, 0, 24, 5], [0, 5, 24, 12]]}')
    boxes = read_boxes(tmp_path / "boxes.json", (24, 12), SIDE)
    mask = np.zeros((12, 24), dtype=np.uint8)
    mask[3:7, 2:10] = 255
    Image.fromarray(mask).save(tmp_path / "cup.png")
    assert torch.equal(read_masks(tmp_path, (24, 12), SIDE)["cup"], boxes["cup"])
    torch.testing.assert_close(boxes["all"], torch.ones(SIDE, SIDE))
    with pytest.raises(DataError, match="24 x 12 pixels, the picture 12 x 24"):
        read_masks(tmp_path, (12, 24), SIDE)
    Image.fromarray(mask * 0).save(tmp_path / "cup.png")
    with pytest.raises(DataError, match="all black"):
        read_masks(tmp_path, (24, 12), SIDE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "no entities"),
        ("{", "cannot be read as JSON"),
        ('{"cup": [1, 2, 3]}', "cup is \\[1, 2, 3\\]; give an object"),
        ('{"cup": [1, 2, 3, true]}', "give an object"),
        ('{"cup": [1, 2, 30, 4]}', "must lie inside the picture, \\[0, 0, 24, 12\\]"),
        ('{"cup": [3, 2, 3, 4]}', "left < right"),
        ('{"cup": [1, 2, NaN, 4]}', "give an object"),
    ],
)
def test_wrong_boxes_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_boxes(tmp_path / "boxes.json", (24, 12), SIDE)


def test_the_map_weights_latents_by_what_they_look_at() -> None:
    found = inspect_question(model(), template(), ask(QUESTION))
    half = torch.zeros(SIDE, SIDE)
    half[0] = 1.0
    weights = [float((found.latent_patches[latent] * half).sum()) for latent in range(LATENTS)]
    expected = sum(weight / sum(weights) * found.latent_words[latent] for latent, weight in enumerate(weights))
    made = build_word_map(found, {"top": half, "all": torch.ones(SIDE, SIDE)})
    assert made.entities == ("top", "all", WHOLE_PICTURE)
    torch.testing.assert_close(made.values[0], expected)
    torch.testing.assert_close(made.values[1], made.values[2])
    assert not torch.allclose(made.values[0], made.values[2])
    assert float(latent_weights(half, found.latent_patches).sum()) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(model(), tmp_path_factory.mktemp("exported"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    import analyze_attention

    return analyze_attention.main


def test_the_command_measures_benchmarks(command: object, exported: Path, tmp_path: Path) -> None:
    write_tables(tmp_path / "data")
    out = tmp_path / "out"
    arguments = [str(exported), "--benchmarks", "POPE,MMMU", "--data", str(tmp_path / "data"), "--tagger", "rules"]
    assert command([*arguments, "--layers=0,-1", "--out", str(out)]) == 0
    document = json.loads((out / "attention.json").read_text())
    assert [each["name"] for each in document["results"]] == ["POPE", "MMMU", "all samples"]
    pope, mmmu, both = document["results"]
    assert (pope["samples"], mmmu["samples"], both["samples"], both["errors"]) == (1, 2, 3, 0)
    assert [each["layer"] for each in pope["by_layer"]] == [0, 2] and document["conditions"]["rule"] == "mma"
    assert pope["words"]["Objects"] == 1 and pope["words"]["(instruction)"] == 16
    assert both["mass"]["Objects"] == pytest.approx(
        (pope["mass"]["Objects"] + 2 * mmmu["mass"]["Objects"]) / 3, abs=2e-6
    )
    assert sum(pope["text_share"].values()) == pytest.approx(1.0, abs=1e-5)
    text = (out / "attention.md").read_text()
    assert "tagger: rules" in text and "| POPE | 1 |" in text
    assert Image.open(out / "attention.png").size[0] > 500


def test_the_command_measures_what_was_answered(
    command: object, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_tables(tmp_path / "data")
    asked = [Prediction(BenchmarkQuestion("MMMU", "2", "How many?", "25"), "2", profile="table6")]
    append_predictions(tmp_path / "answers/MMMU/predictions.jsonl", asked)
    arguments = [str(exported), "--questions", str(tmp_path / "answers"), "--data", str(tmp_path / "data")]
    assert command([*arguments, "--tagger", "rules", "--out", str(tmp_path / "out")]) == 0
    document = json.loads((tmp_path / "out/attention.json").read_text())
    assert [(each["name"], each["samples"]) for each in document["results"]] == [("MMMU", 1)]
    assert document["results"][0]["words"]["(instruction)"] == 10
    append_predictions(
        tmp_path / "answers/MMMU/predictions.jsonl",
        [Prediction(BenchmarkQuestion("MMMU", "9", "?", "A"), "2", profile="table6")],
    )
    assert command(arguments) == 2
    assert "question 9 of MMMU is not in" in capsys.readouterr().err


def test_the_command_maps_entities(command: object, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(picture())
    (tmp_path / "boxes.json").write_text('{"cat": [0, 0, 12, 12], "dog": [12, 0, 24, 12]}')
    arguments = [str(exported), "--image", str(tmp_path / "cat.png"), "--question", "Where is the cat?"]
    assert command([*arguments, "--boxes", str(tmp_path / "boxes.json"), "--out", str(tmp_path / "out")]) == 0
    document = json.loads((tmp_path / "out/entities.json").read_text())
    assert document["entities"] == ["cat", "dog", WHOLE_PICTURE] and "construction" in document["construction"]
    assert [word["text"] for word in document["words"]] == ["Where", "is", "the", "cat", "?"]
    values = np.array(document["attention"])
    assert values.shape == (3, 5) and (values > 0).all() and math.isfinite(values.sum())
    masses = [word["mass"] for word in document["words"]]
    np.testing.assert_allclose(values[2], masses, atol=1e-6)
    assert Image.open(tmp_path / "out/entities.png").size[1] > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "x.png"], "--image needs a question"),
        (["--image", "x.png", "--question", "?"], "either --boxes FILE or --masks FOLDER"),
        (["--image", "x.png", "--question", "?", "--boxes", "b.json"], "x.png cannot be read"),
        (["--run_val"], "--run_val needs a run folder"),
        (["--benchmarks", "POPE", "--layers", "x"], "must be all, or numbers"),
        (["--benchmarks", "PAPA"], "no benchmark 'PAPA'"),
    ],
)
def test_the_command_says_what_is_wrong(
    command: object, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command([str(tmp_path), *arguments, "--tagger", "rules"]) == 2
    assert message in capsys.readouterr().err


def test_the_command_wants_one_thing_to_measure(command: object, capsys: pytest.CaptureFixture) -> None:
    for arguments in (["model"], ["model", "--run_val", "--benchmarks", "POPE"]):
        with pytest.raises(SystemExit, match="2"):
            command(arguments)
        assert "to say what to measure" in capsys.readouterr().err

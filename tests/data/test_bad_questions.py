"""Evaluation leaves out questions that cannot be read, counts them, and stops when there are too many."""

from collections.abc import Callable
from pathlib import Path

import pytest
from chat_folders import PHI3_LIKE
from data_files import image_bytes, write_sources

from aki_megatron.config.load import load_run
from aki_megatron.data.bad_samples import BadSampleBudget, BadSampleBudgetExceeded
from aki_megatron.data.media import media_decoders
from aki_megatron.data.sources import open_sources
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.evaluate.runner import predict, read_prompt, select_questions
from aki_megatron.evaluate.scores import Prediction
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import Conversation, Modality

SFT = Path(__file__).resolve().parents[2] / "configs/demo/sft.yaml"
COUNT = 12
Answer = Callable[[list[Conversation], BadSampleBudget], list[Prediction]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_sources(tmp_path, count=COUNT)
    return tmp_path


@pytest.fixture(scope="module")
def model_and_template() -> tuple[Stage, Template]:
    tokenizer = Tokenizer(PHI3_LIKE, FAMILIES["phi3"].chat)
    sizes = {"vocab_size": tokenizer.image_id, "num_added_tokens": 2, "padded_vocab_size": tokenizer.num_tokens,
             "num_layers": 1}  # fmt: skip
    flags = [word for name, value in sizes.items() for word in (f"--model.decoder.{name}", str(value))]
    config = load_run(flags, default_config=SFT, prog="", description="")
    model = build_model(config.model, attention=config.attention).eval()
    return model, Template(tokenizer, {Modality.IMAGE: config.model.resampler.num_latents}, 128, "")


@pytest.fixture
def answer(model_and_template: tuple[Stage, Template]) -> Answer:
    def run(questions: list[Conversation], bad_samples: BadSampleBudget) -> list[Prediction]:
        answers = predict(*model_and_template, questions, bad_samples=bad_samples, batch_size=5, max_new_tokens=1)
        return list(answers)

    return run


def select(root: Path, bad_samples: BadSampleBudget) -> list[Conversation]:
    return select_questions(open_sources(root, ["vqav2"], "train"), 0, bad_samples)


def damage(root: Path, count: int) -> None:
    images = sorted((root / "VQA/train2014").iterdir())
    images[0].unlink()
    for image in images[1:count]:
        image.write_bytes(image_bytes(1)[:50])


def test_unreadable_questions_are_left_out_and_counted(root: Path, answer: Answer) -> None:
    damage(root, 2)
    bad_samples = BadSampleBudget(0.001)
    questions = select(root, bad_samples)
    assert bad_samples.num_requested == len(questions) == COUNT
    answered = answer(questions, bad_samples)
    assert len(answered) == COUNT - 2 and bad_samples.counts.total() == 2 and bad_samples.num_requested == COUNT
    assert "2 bad samples in 12 requested (vqav2/" in bad_samples.summary()
    assert len(bad_samples.first_reasons) == 2 and "000000000001.jpg" in "".join(bad_samples.first_reasons)


def test_too_many_unreadable_questions_end_the_evaluation(root: Path, answer: Answer) -> None:
    damage(root, 10)
    questions = select(root, BadSampleBudget(0.001))
    with pytest.raises(BadSampleBudgetExceeded, match=r"more than data\.max_bad_fraction=0\.001 allows"):
        answer(questions, BadSampleBudget(0.001, num_good=COUNT))
    with pytest.raises(BadSampleBudgetExceeded, match="1 bad samples|5 bad samples"):
        answer(questions, BadSampleBudget(0.0, num_good=COUNT))


def test_a_question_whose_file_name_leads_out_of_the_root_is_left_out(root: Path) -> None:
    annotations = root / "ref/annotations/finetune_refcoco_train.json"
    annotations.write_text(annotations.read_text().replace("COCO_train2014_000000000001.jpg", "../x.jpg"))
    bad_samples = BadSampleBudget(0.001)
    questions = select_questions(open_sources(root, ["refcoco"], "train"), 0, bad_samples)
    assert bad_samples.counts == {"refcoco": 1} and len(questions) == bad_samples.num_good == COUNT - 1


def test_a_batch_without_a_readable_question_gives_no_answer(root: Path, answer: Answer) -> None:
    damage(root, 6)
    questions = select(root, BadSampleBudget(0.001))
    assert len(answer(questions, BadSampleBudget(0.5, num_good=COUNT))) == COUNT - 6


def test_a_prompt_is_read_with_its_image(root: Path, model_and_template: tuple[Stage, Template]) -> None:
    model, template = model_and_template
    question = select(root, BadSampleBudget(0.0))[0]
    prompt = read_prompt(question, template, media_decoders(model.config))
    assert prompt.images and prompt.key == question.key

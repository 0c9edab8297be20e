"""Two processes that hold one model together answer as one process does."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_checkpoint import write_tiny_checkpoint

from aki_megatron.evaluate.answer_loop import AnswerSettings, TensorRanks, answer_questions
from aki_megatron.evaluate.answering import Answerer
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, InlineImage
from aki_megatron.evaluate.model_loading import load_model, open_model
from aki_megatron.evaluate.prompts import TABLE6
from aki_megatron.evaluate.question_supply import PromptReader, QuestionSupply
from aki_megatron.evaluate.work_plan import WorkPlan
from aki_megatron.parallel.topology import Topology


def question(number: int) -> BenchmarkQuestion:
    """A question about a picture; the third has none, which is an error."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (20 * number, 90, 200)).save(buffer, "PNG")
    images = () if number == 3 else (InlineImage(buffer.getvalue()),)
    return BenchmarkQuestion("POPE", str(number), "Is there a cat? " * (1 + number), "Yes", images=images)


def answers(topology: Topology | None, checkpoint: Path) -> dict[str, tuple[str, str]]:
    """Reply and error of every question, as the leader gets them."""
    model = load_model(open_model(checkpoint), device=torch.device("cpu"), dtype=torch.float32, topology=topology)
    blocks = iter(range(100))
    claims = WorkPlan(tuple(map(question, range(8))), 8, 3).claims(lambda: next(blocks))
    read = PromptReader(model.template, TABLE6, model.media_decoders())
    supply = QuestionSupply(claims, read, num_threads=2, num_ahead=4)
    found: dict[str, tuple[str, str]] = {}
    answerer = Answerer(model.stage, model.template.tokenizer, max_sequences=3)
    answer_questions(
        answerer,
        supply,
        AnswerSettings("table6", 5, 3),
        lambda some: found.update({each.question.id: (each.reply, each.error) for each in some}),
        TensorRanks(topology),
    )
    supply.close()
    return found


@pytest.mark.distributed
def test_a_model_over_two_tensor_ranks_answers_as_one(run_on, tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    leader, other = run_on(2, answers, checkpoint, tensor=2)
    assert leader == answers(None, checkpoint) and len(leader) == 8
    assert "its file has 0" in leader["3"][1] and other == {}, "only the leader writes"

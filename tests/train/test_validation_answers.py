"""Which rank asks what, and questions that cannot be asked."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.data.bad_samples import BadSampleBudgetExceeded
from aki_megatron.data.media import media_decoders
from aki_megatron.data.pipeline import build_template, build_tokenizer
from aki_megatron.data.validation_set import ValidationSet, build_validation_set
from aki_megatron.evaluate.staged_generation import GenerationSettings
from aki_megatron.synthetic.dataset import DatasetSize, write_dataset
from aki_megatron.train.validation_answers import ValidationQuestions
from aki_megatron.types import IGNORE, Batch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo_data")
    write_dataset(root, DatasetSize(6, 16), lambda done: None)
    return root


@pytest.fixture
def root(tmp_path: Path, original: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(original, tmp_path / "data"))


def configured(root: Path, *flags: str) -> RunConfig:
    config = ROOT / "configs/demo/sft.yaml"
    arguments = ["--config", str(config), "--data.root", str(root), "--data.tokenizer", str(root / "tokenizer")]
    arguments += ["--validation.interval", "5", "--validation.generate", "6", "--train.global_batch_size", "8"]
    arguments += ["--validation.sources", "[{name: vqav2}, {name: refcoco}]", *flags]
    return load_run(arguments, default_config=config, prog="sft.py", description="")


def opened(config: RunConfig, rank: int = 0, ranks: int = 1) -> ValidationSet:
    return build_validation_set(
        config,
        build_tokenizer(config),
        world_size=ranks,
        data_rank=rank,
        data_size=ranks,
        pin_memory=False,
        progress=lambda line: None,
    )


def questions(config: RunConfig, rank: int = 0, ranks: int = 1, *, longest: int = 500) -> ValidationQuestions:
    tokenizer = build_tokenizer(config)
    settings = GenerationSettings(
        num_microbatches=1,
        micro_batch_size=4,
        pad_id=tokenizer.pad_id,
        image_size=config.model.vision.image_size,
        stop_ids=tokenizer.stop_ids,
        max_new_tokens=2,
    )
    return ValidationQuestions(
        ["vqav2", "refcoco"],
        settings,
        validation_set=opened(config, rank, ranks),
        template=build_template(config, tokenizer),
        decoders=media_decoders(config.model),
        data_rank=rank,
        data_size=ranks,
        max_prompt_positions=longest,
    )


def one_token(batches: Sequence[Batch]) -> list[list[int]]:
    return [[300] * int((batch.targets != IGNORE).sum()) for batch in batches]


def test_questions_are_dealt_to_data_ranks(root: Path) -> None:
    config = configured(root)
    by_rank = [questions(config, rank, 4).answer(one_token, bool) for rank in range(4)]
    assert [[counts.questions for counts in found] for found in by_rank] == [[2, 2], [2, 2], [1, 1], [1, 1]]
    assert [[counts.example is not None for counts in found] for found in by_rank] == [[True] * 2] + [[False] * 2] * 3
    (alone, _) = questions(config).answer(one_token, bool)
    assert alone.questions == 6 and alone.example == by_rank[0][0].example


def test_questions_that_cannot_be_read_are_counted(root: Path) -> None:
    config = configured(root)
    (image,) = opened(config).question("vqav2", 0).images
    assert isinstance(image, Path)
    image.unlink()
    asked = questions(config)
    for _ in range(2):  # in every validation
        vqav2, _ = asked.answer(one_token, bool)
        assert vqav2.bad_samples >= 1 and vqav2.questions + vqav2.bad_samples == 6 and vqav2.example is None


def test_prompts_that_leave_no_room_are_bad_samples_and_too_many_end_the_run(root: Path) -> None:
    with pytest.raises(BadSampleBudgetExceeded, match="leaves no room for an answer of validation.max_new_tokens=2"):
        questions(configured(root), longest=20).answer(one_token, bool)


def test_a_stop_ends_the_answers(root: Path) -> None:
    assert questions(configured(root)).answer(one_token, lambda has_more: None) is None

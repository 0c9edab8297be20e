"""Beam search equals that of transformers on the exported folder."""

import pytest
import torch
from exported_aki import IMAGE, TEXT, batch, config, inputs, load, prompts, random_stage, random_tokens, write

from aki_megatron.checkpoint.modeling_aki import AkiForConditionalGeneration
from aki_megatron.errors import ConfigError
from aki_megatron.evaluate.beam_search import beam_search
from aki_megatron.evaluate.generate import generate


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> AkiForConditionalGeneration:
    return load(write(random_stage(config("phi3")), tmp_path_factory.mktemp("phi3")))


@pytest.mark.parametrize(
    ("num_beams", "length_penalty", "stop"),
    [(2, 1.0, ()), (4, 1.0, (5,)), (4, 0.3, (5, 11, 23)), (3, 2.0, (5, 11, 23)), (2, 0.3, (5,))],
)
def test_tokens_are_those_of_transformers(
    exported, num_beams: int, length_penalty: float, stop: tuple[int, ...]
) -> None:
    texts, pixels = prompts()
    stage = random_stage(config("phi3"))
    found = beam_search(
        stage, batch(texts, torch.cat(pixels)), num_beams=num_beams, stop_ids=stop, max_new_tokens=9,
        length_penalty=length_penalty,
    )  # fmt: skip
    given = inputs(texts, torch.cat(pixels))
    out = exported.generate(
        **given, do_sample=False, num_beams=num_beams, length_penalty=length_penalty, max_new_tokens=9,
        eos_token_id=list(stop) or None, pad_token_id=39, early_stopping=False,
    )  # fmt: skip
    expected = []
    for row in out[:, given["input_ids"].shape[1] :].tolist():
        ends = [place for place, token in enumerate(row) if token in stop]
        expected.append(row[: ends[0]] if ends else row)
    assert found == expected


def test_one_beam_is_greedy_and_fewer_are_refused() -> None:
    torch.manual_seed(0)
    texts, pixels = [random_tokens((TEXT, 2), IMAGE, (TEXT, 5)), random_tokens((TEXT, 4))], torch.randn(1, 3, 12, 12)
    stage, given = random_stage(config("phi3")), batch(texts, pixels)
    greedy = generate(stage, given, stop_ids=(7,), max_new_tokens=8)
    assert beam_search(stage, given, num_beams=1, stop_ids=(7,), max_new_tokens=8) == greedy
    assert beam_search(stage, given, num_beams=3, stop_ids=(), max_new_tokens=0) == [[], []]
    with pytest.raises(ConfigError, match="num_beams=0 must be 1 or more"):
        beam_search(stage, given, num_beams=0, stop_ids=(), max_new_tokens=8)

"""Requests that join and leave the batch: same answers as alone, stop texts, streaming, cancelling, limits."""

from collections.abc import Sequence

import pytest
import torch
from test_generate import IMAGE_TOKEN, LATENTS, model, prompt

from aki_megatron.data.collate import collate
from aki_megatron.errors import DataError
from aki_megatron.evaluate.answering import Answerer, Request
from aki_megatron.evaluate.generate import generate
from aki_megatron.evaluate.sampling import Sampling
from aki_megatron.model.stage import Stage
from aki_megatron.types import IGNORE, DecodedImage, Sample, image_items


class Letters:
    """Token i is the letter number i of an alphabet; token 7 ends an answer."""

    pad_id = 39
    stop_ids = (7,)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(0x100 + token) for token in ids)


@pytest.fixture(scope="module")
def stage() -> Stage:
    return model().float()


def sample(number: int, length: int, image_at: int | None) -> Sample:
    torch.manual_seed(number)
    tokens, kinds = prompt(length, image_at)
    rgb = torch.randint(256, (12 * 12 * 3,)).to(torch.uint8).numpy().tobytes()
    media = image_items(DecodedImage(rgb, 12) if image_at is not None else None)
    assert tokens.count(IMAGE_TOKEN) == LATENTS * len(media)
    return Sample(f"q/{number}", tokens, kinds, [IGNORE] * len(tokens), media)


SAMPLES = [sample(number, 2 + number * 5 % 11, number % 3 if number % 4 else None) for number in range(11)]


def alone(stage: Stage, one: Sample, new_tokens: int, **settings: object) -> list[int]:
    batch = collate([[one]], pad_id=39, image_size=12)
    return generate(stage, batch, stop_ids=(7,), max_new_tokens=new_tokens, **settings)[0]


@pytest.mark.parametrize("max_sequences", [1, 3, 16])
def test_answers_do_not_depend_on_what_runs_beside_them(stage: Stage, max_sequences: int) -> None:
    requests = [Request(one, max_new_tokens=3 + number % 5 * 3) for number, one in enumerate(SAMPLES)]
    done: list[Request] = []
    answerer = Answerer(stage, Letters(), max_sequences=max_sequences, max_prefill_tokens=40)
    answerer.answer(requests, on_done=done.append)
    assert sorted(id(one) for one in done) == sorted(id(one) for one in requests) and answerer.is_idle
    for request in requests:
        assert request.tokens == alone(stage, request.prompt, request.max_new_tokens), request.prompt.key
        assert request.text == Letters().decode(request.tokens)
        ended_early = len(request.tokens) < request.max_new_tokens
        assert request.finish_reason == ("stop" if ended_early else "length")


def test_draws_depend_on_seed_and_number_only(stage: Stage) -> None:
    settings = Sampling(temperature=1.5, seed=3)
    requests = [Request(one, 6, settings, number) for number, one in enumerate(SAMPLES[:4])]
    Answerer(stage, Letters(), max_sequences=2).answer(requests)
    again = [Request(one, 6, settings, number) for number, one in enumerate(SAMPLES[:4])]
    Answerer(stage, Letters(), max_sequences=4).answer(reversed(again))
    assert [one.tokens for one in requests] == [one.tokens for one in again]
    assert requests[0].tokens == alone(stage, SAMPLES[0], 6, sampling=settings)


def test_a_stop_text_ends_the_answer_and_is_never_sent(stage: Stage) -> None:
    whole = Request(SAMPLES[1], 12)
    Answerer(stage, Letters()).answer([whole])
    stop = whole.text[4:6]
    pieces: list[str] = []
    stopped = Request(SAMPLES[1], 12, stop_texts=(stop, "never"), on_text=pieces.append)
    Answerer(stage, Letters()).answer([stopped])
    assert stopped.text == whole.text[: whole.text.index(stop)] == "".join(pieces)
    assert stopped.finish_reason == "stop" and len(pieces) > 1
    held: list[str] = []
    never = Request(SAMPLES[1], 12, stop_texts=(whole.text[-1] + "x",), on_text=held.append)
    Answerer(stage, Letters()).answer([never])
    assert "".join(held) == never.text == whole.text


def test_parts_of_characters_are_held_back(stage: Stage) -> None:
    class Bytes(Letters):
        def decode(self, ids: Sequence[int]) -> str:
            return ("\u20ac" * len(ids)).encode()[: 3 * len(ids) - len(ids) % 2].decode(errors="replace")

    pieces: list[str] = []
    request = Request(SAMPLES[2], 5, on_text=pieces.append)
    Answerer(stage, Bytes()).answer([request])
    assert all("\ufffd" not in piece for piece in pieces[:-1]) and "".join(pieces) == request.text


def test_a_cancelled_request_leaves_and_the_others_go_on(stage: Stage) -> None:
    first, second, waiting = (Request(SAMPLES[number], 8) for number in (1, 2, 5))
    answerer = Answerer(stage, Letters(), max_sequences=2)
    for request in (first, second, waiting):
        answerer.submit(request)
    answerer.step()
    first.is_cancelled = waiting.is_cancelled = True
    ended = []
    while not answerer.is_idle:
        ended += answerer.step()
    assert first in ended and waiting in ended and second in ended
    assert first.finish_reason == waiting.finish_reason == "cancelled" and not waiting.tokens
    assert len(first.tokens) < 8 and second.tokens == alone(stage, SAMPLES[2], 8)


def test_what_the_model_has_no_positions_for_is_refused(stage: Stage) -> None:
    limit = stage.config.decoder.rope.max_position_embeddings
    with pytest.raises(DataError, match=f"Prompt q/1 takes .* more than the {limit} of the model"):
        Answerer(stage, Letters()).submit(Request(SAMPLES[1], limit))
    none = Request(SAMPLES[1], 0)
    Answerer(stage, Letters()).answer([none])
    assert none.text == "" and none.finish_reason == "length"

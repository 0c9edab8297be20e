"""Answers over HTTP: those of generate, whole and streamed, alone and together; conversations, forms, parameters."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving_models import (
    LATENTS,
    LIMITS,
    NAME,
    SYSTEM_MESSAGE,
    answer,
    ask,
    backend,
    blocked,
    data_url,
    events,
    greedy,
    http,
    image_part,
    png,
    post,
    running_server,
    tiny_model,
    wait_until,
)

from aki_megatron.evaluate.model_loading import LoadedModel
from aki_megatron.evaluate.serving.backend import Backend
from aki_megatron.types import Modality


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(model: LoadedModel) -> Iterator[Backend]:
    with backend(model) as built:
        yield built


@pytest.fixture(scope="module")
def address(served: Backend) -> Iterator[str]:
    with running_server(served) as found:
        yield found


QUESTIONS = [
    ask("What is in the picture?"),
    ask(image_part(), "What is in the picture?", max_tokens=20),
    ask("Compare ", image_part(png("blue")), " with ", image_part(png("green", kind="JPEG")), ".", max_tokens=7),
    ask("no" * 40, max_completion_tokens=15),
    ask(image_part(png("white")), "How many cats are there?", max_tokens=1),
]


def expected(served: Backend, body: dict[str, Any]) -> str:
    new_tokens = body.get("max_tokens", body.get("max_completion_tokens", LIMITS.default_new_tokens))
    tokens = greedy(served, body["messages"], new_tokens)
    return served.service.model.template.tokenizer.decode(tokens)


@pytest.mark.parametrize("number", range(len(QUESTIONS)))
def test_an_answer_has_the_tokens_of_generate_whole_and_streamed(served: Backend, address: str, number: int) -> None:
    body = QUESTIONS[number]
    whole = post(address, body).json()
    choice = whole["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected(served, body), "refusal": None}
    assert (whole["object"], whole["model"], choice["index"]) == ("chat.completion", NAME, 0)
    prompt = served.reader.read(body["messages"], {})
    usage = whole["usage"]
    assert usage["prompt_tokens"] == len(prompt.token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    wanted = body.get("max_tokens", body.get("max_completion_tokens", LIMITS.default_new_tokens))
    assert choice["finish_reason"] == ("length" if usage["completion_tokens"] == wanted else "stop")

    response = post(address, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    assert last["choices"] == [] and last["usage"] == usage
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == choice["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [
        *[None] * (len(chunks) - 1),
        choice["finish_reason"],
    ]
    assert len({chunk["id"] for chunk in chunks}) == 1 and chunks[0]["object"] == "chat.completion.chunk"


def test_requests_together_have_the_answers_of_each_alone(served: Backend, address: str) -> None:
    alone = [answer(address, body) for body in QUESTIONS]
    with ThreadPoolExecutor(10) as pool:
        with blocked(served.service):  # all of them wait before the first is admitted
            together = [pool.submit(answer, address, body) for body in QUESTIONS * 2]
            wait_until(lambda: sum(served.service.load[:2]) == len(together))
        assert [one.result() for one in together] == alone * 2


def test_turns_and_a_system_message_are_rendered_as_in_training(served: Backend) -> None:
    template = served.service.model.template
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be polite."}]},
        {"role": "user", "content": [{"type": "text", "text": "Is "}, image_part(), " red?"]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "And to the left of it?"},
    ]
    prompt = served.reader.read(messages, {})
    image = template.tokenizer.image_id
    text = (
        "<|im_start|>system\nBe polite.<|im_end|>\n<|im_start|>user\nIs <image> red?<|im_end|>\n<|im_start|>assistant\n"
        "yes<|im_end|>\n<|im_start|>user\nAnd to the left of it?<|im_end|>\n<|im_start|>assistant\n"
    )
    names = "".join(template.tokenizer.token_bytes(token).decode() for token in prompt.token_ids)
    assert names == text.replace("<image>", "<image>" * LATENTS)
    kinds = [kind for token, kind in zip(prompt.token_ids, prompt.modality_ids, strict=True) if token == image]
    assert kinds == [int(Modality.IMAGE)] * LATENTS
    responses = [
        token for token, kind in zip(prompt.token_ids, prompt.modality_ids, strict=True) if kind == Modality.RESPONSE
    ]
    assert template.tokenizer.decode(responses) == "yes"
    without = served.reader.read([{"role": "user", "content": "Is it?"}], {})
    assert SYSTEM_MESSAGE in template.tokenizer.decode(without.token_ids)


def test_a_line_break_after_images_is_an_option(model: LoadedModel, served: Backend) -> None:
    with backend(model, image_newline=True) as other:
        question = ask(image_part(), image_part(png("blue")), "What?")["messages"]
        written = ask(image_part(), "\n", image_part(png("blue")), "\nWhat?")["messages"]
        last = ask("What? ", image_part())["messages"]
        assert other.reader.read(question, {}) == served.reader.read(written, {})
        assert other.reader.read(written, {}) == served.reader.read(written, {})
        assert other.reader.read(last, {}) == served.reader.read(last, {})


def test_a_form_brings_images_as_files(address: str) -> None:
    by_url = answer(address, ask(image_part(png("blue")), "What is in the picture?"))
    part = {"type": "image_url", "image_url": {"url": "attachment:photo 1"}}
    fields = {"request": (None, json.dumps(ask(part, "What is in the picture?"))), "photo 1": ("x.png", png("blue"))}
    response = http("POST", f"{address}/v1/chat/completions", files=fields)
    assert response.json()["choices"][0]["message"]["content"] == by_url
    fields.pop("photo 1")
    response = http("POST", f"{address}/v1/chat/completions", files=fields)
    assert response.status_code == 400 and "no file 'photo 1' (no file)" in response.json()["error"]["message"]


def test_a_stop_text_ends_an_answer(address: str) -> None:
    whole = answer(address, QUESTIONS[1])
    stop = whole[3:5]
    for extra in ({"stop": stop}, {"stop": ["never", stop]}):
        stopped = post(address, {**QUESTIONS[1], **extra}).json()["choices"][0]
        assert stopped["message"]["content"] == whole[: whole.index(stop)] and stopped["finish_reason"] == "stop"
        pieces = events(post(address, {**QUESTIONS[1], **extra, "stream": True}))
        assert (
            "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in pieces) == whole[: whole.index(stop)]
        )


def test_a_seed_decides_what_is_drawn(address: str) -> None:
    drawn = [answer(address, ask("no", temperature=1.5, top_p=0.95, seed=seed)) for seed in (1, 1, -2)]
    assert drawn[0] == drawn[1] != drawn[2]
    free = {answer(address, ask("no", temperature=1.5)) for _ in range(3)}
    assert len(free) > 1
    assert answer(address, ask("no", temperature=1.5, top_p=0)) == answer(address, ask("no"))


def test_an_answer_is_as_long_as_server_and_model_allow(served: Backend, address: str) -> None:
    body = post(address, ask("no", max_tokens=10_000)).json()
    assert body["usage"]["completion_tokens"] == LIMITS.new_tokens and body["choices"][0]["finish_reason"] == "length"
    text = "cat dish " * 60
    size = len(served.reader.read(ask(text)["messages"], {}).token_ids)
    per_word = (size - len(served.reader.read(ask("cat dish " * 59)["messages"], {}).token_ids)) / 2
    assert per_word > 0
    while size + 2 * per_word < LIMITS.positions:
        text += "cat dish "
        size = len(served.reader.read(ask(text)["messages"], {}).token_ids)
    body = post(address, ask(text)).json()
    assert body["usage"]["total_tokens"] == LIMITS.positions and body["choices"][0]["finish_reason"] == "length"
    refused = post(address, ask(text + "cat dish " * 40))
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"


def test_models_and_health(served: Backend, address: str) -> None:
    listed = http("GET", f"{address}/v1/models").json()
    assert listed["object"] == "list" and [one["id"] for one in listed["data"]] == [NAME]
    assert http("GET", f"{address}/v1/models/{NAME}").json()["object"] == "model"
    assert http("GET", f"{address}/v1/models/gpt").json()["error"]["code"] == "model_not_found"
    health = http("GET", f"{address}/health").json()
    assert health == health | {"status": "ok", "model": NAME, "running": 0, "waiting": 0, "queue": LIMITS.queue}
    assert health["answered"] == served.service.load.answered
    about = http("GET", f"{address}/").json()
    assert "demo_page.py" in about["about"] and "POST /v1/chat/completions" in about["endpoints"]
    assert "GET /v1/models/{name}" in about["endpoints"]
    for path, method, status in (("/v1/chat/completions", "GET", 405), ("/v1/completions", "POST", 404)):
        response = http(method, address + path)
        assert response.status_code == status and set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("url", ["http://example.org/a.png", "file:///etc/passwd", "a.png", "/etc/passwd", "ftp://x/y"])
def test_nothing_but_the_request_is_read(address: str, url: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    for address_of_image in (url, str(tmp_path / "a.png")):
        for part in (
            {"type": "image_url", "image_url": {"url": address_of_image}},
            {"type": "image_url", "image_url": address_of_image},
            {"type": "image", "path": address_of_image},
        ):
            response = post(address, ask(part, "What?"))
            assert response.status_code == 400
            assert "is not in the request, and nothing is fetched" in response.json()["error"]["message"]


def test_parts_of_all_spellings_are_one_request(address: str) -> None:
    url = data_url(png())
    spellings = [
        [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What?"}],
        [{"type": "image", "image": url}, "What?"],
        [{"type": "image_url", "image_url": {"url": url, "detail": "high"}}, {"type": "text", "text": "What?"}],
        [{"type": "text", "text": ""}, {"type": "image_url", "image_url": {"url": url}}, {"text": "What?"}],
    ]
    assert len({answer(address, ask(*parts)) for parts in spellings}) == 1

"""The public kits ask this server without an adapter: their requests on made-up tables, and what they read of replies.

The requests are those of lmms-eval 0.7.3 (models openai and async_openai) and of VLMEvalKit of August 2026 (GPT4V,
LMDeployAPI), as their sources build them. Where lmms-eval or the openai package is installed, its own client asks.
"""

import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from serving_models import NAME, backend, data_url, greedy, http, running_server, tiny_model

from aki_megatron.evaluate.serving.access import Access
from aki_megatron.evaluate.serving.backend import Backend

KEY = "secret"

TABLE = [
    {
        "question": f"How many cats are there in picture {number}?",
        "options": {"A": "one", "B": "two"},
        "image": Image.new("RGB", (20 + number, 30), (40 * number, 90, 200 - 30 * number)),
    }
    for number in range(5)
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with backend(tiny_model(tmp_path_factory.mktemp("model"))) as built:
        yield built


@pytest.fixture(scope="module")
def address(served: Backend) -> Iterator[str]:
    with running_server(served, Access(KEY)) as found:
        yield found


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def vlmevalkit_gpt4v(row: dict[str, Any]) -> dict[str, Any]:
    """GPT4V: a system message, JPEG with a detail, n, temperature and max_tokens."""
    options = "".join(f"{letter}. {text}\n" for letter, text in row["options"].items())
    prompt = (
        f"Question: {row['question']}\nOptions:\n{options}Please select the correct answer from the options above. \n"
    )
    image = {"url": data_url(encoded(row["image"], "JPEG"), "jpeg"), "detail": "low"}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": prompt}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    return {"model": NAME, "messages": messages, "n": 1, "temperature": 0, "max_tokens": 16}


def vlmevalkit_lmdeploy(row: dict[str, Any]) -> dict[str, Any]:
    """LMDeployAPI: no detail, a temperature with a point, more tokens than the server gives; here with two images."""
    image = {"url": data_url(encoded(row["image"], "JPEG"), "jpeg")}
    content = [
        {"type": "text", "text": row["question"]},
        {"type": "image_url", "image_url": image},
        {"type": "text", "text": "or"},
        {"type": "image_url", "image_url": image},
    ]
    messages = [{"role": "user", "content": content}]
    return {"model": NAME, "messages": messages, "n": 1, "max_tokens": 16384, "temperature": 0.0}


def vlmevalkit_text(row: dict[str, Any]) -> dict[str, Any]:
    """A question without an image, and a conversation."""
    text = [{"type": "text", "text": row["question"]}]
    spoken = [("user", text), ("assistant", [{"type": "text", "text": "two"}]), ("user", text)]
    messages = [{"role": role, "content": content} for role, content in spoken]
    return {"model": NAME, "messages": messages, "n": 1, "temperature": 0, "max_tokens": 2048}


def lmms_eval_chat(row: dict[str, Any]) -> dict[str, Any]:
    """The model openai: PNG, and those of a task's generation_kwargs that the API has."""
    image = {"type": "image_url", "image_url": {"url": data_url(encoded(row["image"], "PNG"))}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}]
    common = {"messages": messages, "model": NAME, "max_tokens": 16, "temperature": 0}
    return {**common, "top_p": 1.0, "seed": 42, "presence_penalty": 0, "frequency_penalty": 0.0, "n": 1}


def lmms_eval_simple(row: dict[str, Any]) -> dict[str, Any]:
    """The model openai of tasks without messages: the text comes first."""
    body = lmms_eval_chat(row)
    content = list(reversed(body["messages"][0]["content"]))
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "model": NAME, "max_tokens": 1024, "temperature": 0}


def lmms_eval_reasoning(row: dict[str, Any]) -> dict[str, Any]:
    """For names that look like a reasoning model: other parameters."""
    messages = lmms_eval_chat(row)["messages"]
    limits = {"max_completion_tokens": 16, "response_format": {"type": "text"}}
    return {"messages": messages, "model": NAME, **limits, "chat_template_kwargs": {"enable_thinking": False}}


SHAPES = (
    vlmevalkit_gpt4v, vlmevalkit_lmdeploy, vlmevalkit_text, lmms_eval_chat, lmms_eval_simple, lmms_eval_reasoning,
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_a_table_is_answered_as_generate_does(
    served: Backend, address: str, shape: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        # VLMEvalKit's api_base is the whole address
        response = http(
            "POST", f"{address}/v1/chat/completions", headers=headers, content=json.dumps(shape(row)), timeout=300
        )
        assert response.status_code == 200, response.text
        return dict(json.loads(response.text))

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(ask, TABLE))
    for row, reply in zip(TABLE, replies, strict=True):
        body = shape(row)
        new_tokens = min(body.get("max_tokens", 16), served.limits.new_tokens)
        tokens = greedy(served, body["messages"], new_tokens)
        assert reply["choices"][0]["message"]["content"] == served.service.model.template.tokenizer.decode(tokens)
        assert reply["usage"]["completion_tokens"] == len(tokens) and reply["usage"]["prompt_tokens"] > 0
    assert len({reply["choices"][0]["message"]["content"] for reply in replies}) > 1 or shape is vlmevalkit_text


def test_vlmevalkit_reads_a_stream_line_by_line(served: Backend, address: str) -> None:
    body = {**vlmevalkit_gpt4v(TABLE[0]), "stream": True}
    pieces = []
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream(
        "POST", f"{address}/v1/chat/completions", headers=headers, json=body, timeout=300, trust_env=False
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data:") and line[5:].strip() != "[DONE]":
                choices = json.loads(line[5:]).get("choices", [])
                pieces.append(choices[0].get("delta", {}).get("content") or "")
    tokens = greedy(served, body["messages"], 16)
    assert "".join(pieces) == served.service.model.template.tokenizer.decode(tokens)


def test_the_client_of_openai(served: Backend, address: str) -> None:
    openai = pytest.importorskip("openai", reason="pip install openai runs this test")
    client = openai.OpenAI(api_key=KEY, base_url=f"{address}/v1", max_retries=0)
    body = lmms_eval_chat(TABLE[1])
    text = served.service.model.template.tokenizer.decode(greedy(served, body["messages"], 16))
    assert client.chat.completions.create(**body).choices[0].message.content == text
    stream = client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.total_tokens > 16 and [model.id for model in client.models.list()] == [NAME]
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(**{**body, "model": "gpt-4o"})
    with pytest.raises(openai.BadRequestError, match="tools="):
        client.chat.completions.create(**body, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(api_key="wrong", base_url=f"{address}/v1", max_retries=0).models.list()


@pytest.mark.parametrize("kind", ["openai", "async_openai"])
def test_the_clients_of_lmms_eval(served: Backend, address: str, tmp_path: Path, kind: str) -> None:
    module = pytest.importorskip(f"lmms_eval.models.chat.{kind}", reason="pip install lmms-eval runs this test")
    from lmms_eval.api.instance import Instance

    model = getattr(module, {"openai": "OpenAICompatible", "async_openai": "AsyncOpenAIChat"}[kind])
    client = model(model=NAME, base_url=f"{address}/v1", api_key=KEY)
    client.task_dict = {"made_up": {"test": TABLE}}

    def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
        parts = [{"type": "image", "url": row["image"]}, {"type": "text", "text": row["question"]}]
        return [{"role": "user", "content": parts}]

    settings = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    instances = [
        Instance(
            request_type="generate_until",
            arguments=(row["question"], messages, settings, number, "made_up", "test"),
            idx=0,
            metadata={"task": "made_up", "doc_id": number, "repeats": 1},
        )
        for number, row in enumerate(TABLE)
    ]
    for row, result in zip(TABLE, client.generate_until(instances), strict=True):
        tokens = greedy(served, lmms_eval_chat(row)["messages"], 16)
        assert result.text.strip() == served.service.model.template.tokenizer.decode(tokens).strip()

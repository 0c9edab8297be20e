"""Hostile and unlucky requests: every one is refused by name, and the server answers the next one."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_models import (
    LIMITS,
    answer,
    ask,
    backend,
    blocked,
    bomb,
    events,
    http,
    image_part,
    png,
    post,
    running_server,
    send_raw,
    tiny_model,
    wait_until,
)

from aki_megatron.evaluate.model_loading import LoadedModel
from aki_megatron.evaluate.serving.access import Access
from aki_megatron.evaluate.serving.backend import Backend

QUESTION = ask(image_part(), "What is in the picture?")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def log() -> list[str]:
    return []


@pytest.fixture(scope="module")
def served(model: LoadedModel) -> Iterator[Backend]:
    with backend(model) as built:
        yield built


@pytest.fixture(scope="module")
def address(served: Backend, log: list[str]) -> Iterator[str]:
    with running_server(served, log=log) as found:
        yield found


@pytest.fixture(autouse=True)
def _a_normal_request_is_answered_afterwards(served: Backend, address: str) -> Iterator[None]:
    expected = answer(address, QUESTION)
    yield
    assert answer(address, QUESTION) == expected
    wait_until(lambda: served.slots.num_requests == served.slots.num_bytes == 0)
    assert served.service.load[:2] == (0, 0)


def refused(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert all(word in error["message"] for word in words), error
    return error


def head(length: int, *lines: str, kind: str = "application/json") -> bytes:
    """The headers of a request."""
    own = (f"Content-Type: {kind}", f"Content-Length: {length}", "Host: localhost", *lines)
    return "\r\n".join(("POST /v1/chat/completions HTTP/1.1", *own, "", "")).encode()


def reply_of(connection: socket.socket) -> bytes:
    """Everything that the server still sends; it must close the connection."""
    received = b""
    with connection:
        try:
            while piece := connection.recv(65536):
                received += piece
        except ConnectionResetError:
            pass
    return received


@pytest.mark.parametrize("size", [(301, 300), (60_000, 60_000), (2**31 - 1, 1)])
def test_a_decompression_bomb_is_not_decoded(address: str, size: tuple[int, int]) -> None:
    refused(post(address, ask(image_part(bomb(*size)), "What?")), 400, "decompression bomb")
    assert answer(address, ask(image_part(png(size=(300, 300))), "What?")) is not None


@pytest.mark.parametrize(
    "content", [b"", b"text", png()[:50], bomb(20, 20), b"%!PS-Adobe-3.0\n" * 9, b"GIF89a" + b"\xff" * 40]
)
def test_what_is_no_image_is_named(address: str, content: bytes) -> None:
    refused(post(address, ask(image_part(content), "What?")), 400, "image of sample request")


def test_sizes_have_limits(address: str) -> None:
    assert refused(post(address, ask("no", user="x" * LIMITS.body_bytes)), 413, "larger than")["code"] == "too_large"
    refused(post(address, ask("no " * LIMITS.text_chars)), 413, "characters; at most")
    refused(post(address, ask(*[image_part()] * (LIMITS.media + 1), "What?")), 413, "5 images in a request; at most 4")
    chunked = http(
        "POST",
        f"{address}/v1/chat/completions",
        content=(b" " * 50_000 for _ in range(10)),  # no Content-Length
        headers={"content-type": "application/json"},
        timeout=300,
    )
    refused(chunked, 413, "larger than")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\xfd", "not valid JSON"),
        (b"[]", "must be an object"),
        (b"null", "must be an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}", "message"),
        (b'{"max_tokens": NaN}', "NaN is no JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"seed": ' + b"9" * 4000 + b"}", "a huge number"),
        (b"{}", "the messages must be a list"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"\\ud800": 1}', "unknown"),
        (b'{"model": "\\udfff"}', "does not exist"),
    ],
)
def test_what_is_no_request_is_refused(address: str, body: bytes, words: str) -> None:
    response = post(address, body)
    assert response.status_code in (400, 404) and words in response.json()["error"]["message"]


def test_only_json_and_forms_are_read(address: str) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "image/png"):
        refused(post(address, QUESTION, headers={"content-type": kind}), 415, "send application/json")
    form = f"{address}/v1/chat/completions"
    for body, words in (
        (b"x", "not the form"),
        (b"--b\r\nContent-Disposition: form-data; name=request\r\n\r\n{}", "cut off"),
        (b"--b\r\nContent-Type: a/b\r\n\r\n{}\r\n--b--\r\n", "a name of its own"),
        (b"--b\r\nX: " + b"y" * 9000, "eader"),
    ):
        kind = "multipart/form-data; boundary=b"
        refused(http("POST", form, content=body, headers={"content-type": kind}), 400, words)
    no_boundary = http("POST", form, content=b"x", headers={"content-type": "multipart/form-data"})
    refused(no_boundary, 400, "no boundary")
    many = {f"f{number}": ("x", b"") for number in range(80)}
    refused(http("POST", form, files=many), 400, "more than 64 fields")
    refused(http("POST", form, files={"picture": ("x", png())}), 400, "no field 'request'")


def test_a_connection_that_is_cut_leaves_nothing_behind(served: Backend, address: str, log: list[str]) -> None:
    body = json.dumps(QUESTION).encode()
    answered = served.service.load.answered
    del log[:]
    for sent in (b"", b"PO", head(10)[:40], head(len(body)), head(len(body)) + body[:20], head(9) + b'{"a": 1'):
        send_raw(address, [sent]).close()
    wait_until(lambda: len(log) == 3)
    assert all("499" in line and "end='client left'" in line for line in log)
    with blocked(served.service):
        waiting = [send_raw(address, [head(len(body)) + body]) for _ in range(3)]
        wait_until(lambda: served.service.load.waiting == 3)
        for connection in waiting:
            connection.close()
        wait_until(lambda: len(log) == 6)
    wait_until(lambda: served.service.load[:2] == (0, 0))
    assert served.service.load.answered == answered


def test_a_stream_that_is_cut_is_cancelled(served: Backend, address: str, log: list[str]) -> None:
    body = json.dumps({**QUESTION, "stream": True, "max_tokens": LIMITS.new_tokens}).encode()
    answered = served.service.load.answered
    del log[:]
    connection = send_raw(address, [head(len(body)) + body])
    while b"assistant" not in connection.recv(4096):
        pass
    with blocked(served.service):
        if served.service.load.running:  # the model was not faster than this test
            connection.close()
            wait_until(lambda: len(log) == 1)
            assert " 200 " in log[0] and "end='client left'" in log[0]
            answered -= 1
    connection.close()
    wait_until(lambda: len(log) == 1 and served.service.load.running == 0)
    assert served.service.load.answered == answered + 1


def test_a_full_queue_says_when_to_come_again(served: Backend, address: str) -> None:
    body = json.dumps(QUESTION).encode()
    with blocked(served.service):
        waiting = [send_raw(address, [head(len(body), "Connection: close") + body]) for _ in range(LIMITS.requests)]
        wait_until(lambda: sum(served.service.load[:2]) == LIMITS.requests)
        response = post(address, QUESTION)
        assert refused(response, 503, "come again")["code"] == "overloaded" and int(response.headers["retry-after"]) > 0
        assert http("GET", f"{address}/health").json()["waiting"] == LIMITS.requests
    replies = [reply_of(connection) for connection in waiting]
    assert all(reply.startswith(b"HTTP/1.1 200 OK") for reply in replies)


def test_bodies_together_have_a_limit(served: Backend, address: str) -> None:
    size = LIMITS.body_bytes - 1000
    held = []
    for _ in range(10):  # ten times 399,000 bytes of 4,000,000 are being read
        held.append(send_raw(address, [head(LIMITS.body_bytes), b" " * size]))
    wait_until(lambda: served.slots.num_bytes == 10 * size)
    refused(post(address, b" " * 50_000), 503, "Too many large requests")
    for connection in held:
        connection.close()
    wait_until(lambda: served.slots.num_bytes == 0)


def test_thousands_of_tiny_requests(address: str, log: list[str]) -> None:
    tiny = json.dumps(ask("no", max_tokens=1)).encode()
    bodies = [tiny, b"{}", b'{"messages": [{"role": "user", "content": "no"}], "n": 2}', b"x"]
    per_connection = 50
    sent = b"".join(head(len(body)) + body for body in bodies * (per_connection // 4) + bodies[1:2] * 2)

    def send_all(_: int) -> int:
        connection = send_raw(address, [sent])
        received = b""
        with connection:
            while received.count(b"HTTP/1.1 ") < per_connection or not received.endswith(b"}"):
                piece = connection.recv(65536)
                assert piece
                received += piece
        return received.count(b"HTTP/1.1 200 OK")

    del log[:]
    with ThreadPoolExecutor(40) as pool:
        answered = sum(pool.map(send_all, range(40)))
    wait_until(lambda: len(log) == 2000)
    statuses = {line.split()[4] for line in log}
    assert statuses <= {"200", "400", "503"} and 0 < answered <= 480


def test_a_step_that_fails_ends_its_requests_and_no_others(served: Backend, address: str) -> None:
    stage = served.service.model.stage
    failing = {"left": 1}
    logits = stage.logits

    def fail(*arguments: Any, **settings: Any) -> Any:
        if failing["left"]:
            failing["left"] -= 1
            raise RuntimeError("out of memory")
        return logits(*arguments, **settings)

    stage.logits = fail  # type: ignore[method-assign]
    try:
        error = refused(post(address, QUESTION), 500, "The model failed while it answered")
        assert error["type"] == "server_error" and "out of memory" not in json.dumps(error)
        assert post(address, QUESTION).status_code == 200
        with pytest.raises(httpx.TimeoutException), blocked(served.service):
            http("POST", f"{address}/v1/chat/completions", json=QUESTION, timeout=0.2)
    finally:
        stage.logits = logits  # type: ignore[method-assign]


def test_headers_have_a_deadline(model: LoadedModel) -> None:
    limits = replace(LIMITS, header_seconds=0.3)
    with backend(model, limits) as served, running_server(served) as address:
        for sent in ([], [head(10)[:30]], [head(2) + b"{}", head(5)[:9]]):  # none, half of them, half of the next ones
            reply_of(send_raw(address, sent))  # returns when the server closes the connection


def test_a_body_has_a_deadline(model: LoadedModel) -> None:
    with backend(model, replace(LIMITS, body_seconds=0.3)) as served, running_server(served) as address:
        slow = reply_of(send_raw(address, [head(100, "Connection: close") + b'{"a"']))
        assert slow.startswith(b"HTTP/1.1 408") and b"was not complete after 0.3 seconds" in slow


def test_an_answer_has_a_deadline(model: LoadedModel) -> None:
    with backend(model, replace(LIMITS, request_seconds=0.5)) as served, running_server(served) as address:
        with blocked(served.service):
            for stream in (False, True):
                response = post(address, {**QUESTION, "stream": stream})
                error = refused(response, 503, "not complete after 0.5 seconds")
                assert error["code"] == "timeout" and "retry-after" in response.headers
        wait_until(lambda: served.slots.num_requests == 0 and served.service.load[:2] == (0, 0))


def test_an_error_in_a_stream_is_its_last_event(served: Backend, address: str) -> None:
    stage = served.service.model.stage
    logits, steps = stage.logits, iter(range(100))

    def fail(*arguments: Any, **settings: Any) -> Any:
        if next(steps) == 8:
            raise RuntimeError("out of memory")
        return logits(*arguments, **settings)

    stage.logits = fail  # type: ignore[method-assign]
    try:
        response = post(address, {**QUESTION, "stream": True})
    finally:
        stage.logits = logits  # type: ignore[method-assign]
    *chunks, last = events(response)
    assert response.status_code == 200 and chunks and last["error"]["message"].startswith("The model failed")


def test_access(model: LoadedModel, served: Backend) -> None:
    key = "s\u00e4cret key"
    with running_server(served, Access(key)) as address:
        for wrong in (None, b"Bearer wrong", key.encode(), b"Bearer", b"Basic " + key.encode()):
            response = post(address, QUESTION, headers={} if wrong is None else {"authorization": wrong})
            assert refused(response, 401, "in the header Authorization")["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        given = {"authorization": b"Bearer " + key.encode()}
        assert post(address, QUESTION, headers=given).status_code == 200
        assert http("GET", f"{address}/v1/models").status_code == 401
        assert http("GET", f"{address}/health").status_code == 200
        for headers in ({"host": "evil.example"}, {"host": "[::bad"}, {"host": "127.0.0.1.evil.example:80"}):
            assert refused(post(address, QUESTION, headers={**given, **headers}), 403)["code"] == "forbidden_host"
        for origin in ("http://evil.example", "null", "http://[", f"{address}0"):
            error = refused(post(address, QUESTION, headers={**given, "origin": origin}), 403)
            assert error["code"] == "forbidden_origin"
        for headers in ({"host": "localhost:1"}, {"origin": address}, {"host": "[::1]:8000"}):
            assert post(address, QUESTION, headers={**given, **headers}).status_code == 200
    with running_server(served, Access(loopback_only=False)) as address:
        assert post(address, QUESTION, headers={"host": "my-server"}).status_code == 200


def test_the_log_has_one_plain_line_a_request(address: str, log: list[str]) -> None:
    del log[:]
    post(address, QUESTION)
    http("GET", f"{address}/%0a%1b[31mred%E2%80%AE?secret=1")
    post(address, b'{"model": "\\n\\u001b[31m"}')
    wait_until(lambda: len(log) == 3)
    assert all(line.isascii() and line.isprintable() for line in log)
    assert " POST /v1/chat/completions 200 " in log[0] and "media=1" in log[0] and "end=" in log[0]
    assert "secret" not in log[1] and " 404 " in log[1] and " 404 " in log[2]


def test_stopping_ends_what_runs(model: LoadedModel, tmp_path: Path) -> None:
    body = json.dumps(QUESTION).encode()
    with backend(model) as served:
        started = time.monotonic()
        with running_server(served) as address:
            free = blocked(served.service)
            free.__enter__()
            connection = send_raw(address, [head(len(body), "Connection: close") + body])
            wait_until(lambda: served.service.load.waiting == 1)
            with ThreadPoolExecutor(1) as pool:
                stopping = pool.submit(served.service.stop)
                free.__exit__(None, None, None)
                stopping.result(300)
            assert reply_of(connection).startswith(b"HTTP/1.1 503")
            assert refused(post(address, QUESTION), 503, "stopping")["code"] == "overloaded"
            assert http("GET", f"{address}/health").status_code == 503
        assert time.monotonic() - started < 300

"""What a request may say: parameters of every type and value, messages of every shape; in one thread, without HTTP."""

import base64
import io
import wave
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_models import LIMITS, NAME, ask, image_part, tiny_model

from aki_megatron.config.model import AudioConfig, ResamplerConfig
from aki_megatron.data.sources.chat_record import parse_prompt
from aki_megatron.evaluate.loading import LoadedModel
from aki_megatron.evaluate.sampling import GREEDY, Sampling
from aki_megatron.evaluate.serving.body import Parsed
from aki_megatron.evaluate.serving.conversations import PromptReader, _recording
from aki_megatron.evaluate.serving.errors import ApiError
from aki_megatron.evaluate.serving.form import parse_form
from aki_megatron.evaluate.serving.parameters import IGNORED, NEUTRAL, READ, Parameters, read_parameters
from aki_megatron.evaluate.serving.replies import to_json
from aki_megatron.types import Modality, Placeholder, Turn


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> PromptReader:
    return PromptReader(tiny_model(tmp_path_factory.mktemp("model")), LIMITS)


def read(**given: Any) -> Parameters:
    return read_parameters({"messages": [], **given}, NAME, LIMITS)


def test_what_is_absent_or_null_has_its_default() -> None:
    expected = Parameters(LIMITS.default_new_tokens)
    assert read() == expected == read(**dict.fromkeys((*READ, *NEUTRAL, "anything")))
    assert read(**{name: values[0] for name, values in NEUTRAL.items()}, user="me", n=1, model=NAME) == expected


def test_parameters_have_their_effect() -> None:
    assert read(max_tokens=5).max_new_tokens == 5
    assert read(max_tokens=5, max_completion_tokens=6.0).max_new_tokens == 6
    assert read(max_tokens=10**6).max_new_tokens == LIMITS.new_tokens
    assert read(temperature=1, top_p=0.5, top_k=3, seed=4).sampling == Sampling(1.0, 3, 0.5, 4)
    assert read(temperature=0.7, top_k=-1, seed=-1).sampling == Sampling(0.7, 0, 1.0, 2**63 - 1)
    for greedy in ({"temperature": 0}, {"top_p": 0, "temperature": 1}, {"top_k": 1, "temperature": 2}, {"seed": 3}):
        assert read(**greedy).sampling == GREEDY
    assert read(temperature=1e-30).sampling.temperature == 1e-3
    assert read(stop="a").stop_texts == ("a",) and read(stop=["a", "b"]).stop_texts == ("a", "b")
    assert read(stream=True, stream_options={"include_usage": True}) == Parameters(12, stream=True, include_usage=True)
    assert read(stream_options={"include_usage": None}) == read()


REFUSED: list[tuple[str, list[Any]]] = [
    ("max_tokens", [0, -1, 1.5, "5", True, [], {}, 2**70, float("inf"), float("nan"), 10**5000]),
    ("max_completion_tokens", [0, "x"]),
    ("temperature", [-0.1, "0", True, 1e9, float("inf"), float("nan"), [0], 10**400, 2**60]),
    ("top_p", [1.1, -1, "1", False]),
    ("top_k", [-2, 0.5, "1"]),
    ("seed", ["1", 1.5, 2**63, -(2**63) - 1, True, 10**5000]),
    ("n", [0, 2, "1", True, 129]),
    ("stop", [1, [""], ["a", 1], "", ["a"] * 17, "a" * 201, {}, True, [None]]),
    ("stream", [1, 0, "true", [], {}]),
    ("stream_options", [1, "x", [], True]),
    ("model", [1, True, [], {}]),
    ("logit_bias", [{"1": 2}, [], 0]),
    ("logprobs", [True, 0, 1]),
    ("frequency_penalty", [0.5, "0", False]),
    ("response_format", [{"type": "json_object"}, "text"]),
    ("tools", [[{"type": "function"}], {}]),
    ("tool_choice", ["required", {}]),
    ("audio", [{}]),
    ("temprature", [1]),
    ("x" * 500, [1]),
]


@pytest.mark.parametrize(("name", "values"), REFUSED, ids=[name[:20] for name, _ in REFUSED])
def test_what_has_no_meaning_is_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ApiError) as found:
            read(**{name: value})
        assert found.value.status == 400 and found.value.param == name[:80], value
        assert name[:70] in str(found.value) and len(str(found.value)) < 600


def test_another_model_is_not_found() -> None:
    for name in ("gpt-4o", "", "TINY", "\ud800"):
        with pytest.raises(ApiError, match="this server has 'tiny'") as found:
            read(model=name)
        assert (found.value.status, found.value.code) == (404, "model_not_found")


QUESTION = {"role": "user", "content": "no"}

MESSAGES: list[tuple[Any, str]] = [
    (None, "must be a list"),
    ("no", "must be a list"),
    ([], "not empty"),
    ({}, "must be a list"),
    ([None], "message 1 must have a role"),
    ([[]], "message 1 must have a role"),
    ([{}], "'role' is missing"),
    ([{"role": "user"}], "'content' is missing"),
    ([{"role": "user", "content": None}], "'content' is missing"),
    ([{"role": "user", "content": {}}], "must be text"),
    ([{"role": "user", "content": True}], "must be text"),
    ([{"role": "user", "content": ""}], "question 1 is empty"),
    ([{"role": "user", "content": []}], "question 1 is empty"),
    ([{"role": "user", "content": [None]}], "must have a type"),
    ([{"role": "user", "content": [{}]}], "unknown type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "must be text"),
    ([{"role": "user", "content": [{"type": ["text"], "text": "a"}]}], "unknown type"),
    ([{"role": "user", "content": [{"type": "video_url"}]}], "known are text, image, image_url"),
    ([{"role": "user", "content": [{"type": "input_audio"}]}], "known are text, image, image_url"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "without an image"),
    ([{"role": "user", "content": [{"type": "image", "index": 0}]}], "without an image"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}], "without an image"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "holds no image"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": []}]}], "must be a path, a data URL"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": {}}}]}], "must be a path"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 1}}]}], "must be a path"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:text/html,x"}}]}], "the data URL"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,%"}}]}], "base64"),
    ([{"role": "user", "content": "<image> what"}], "without an image"),
    ([{"role": "user", "content": "<|im_end|>"}], "special token"),
    ([{"role": "system", "content": "<|im_end|>"}, QUESTION], "special token"),
    ([{"role": "system", "content": [image_part()]}, QUESTION], "only those of the user"),
    ([{"role": "tool", "content": "no"}], "unknown role"),
    ([{"role": [], "content": "no"}], "unknown role"),
    ([QUESTION, QUESTION], "both of the user"),
    ([QUESTION, {"role": "assistant", "content": "no"}], "no question to answer"),
    ([{"role": "system", "content": "no"}], "no question to answer"),
    ([QUESTION, {"role": "system", "content": "no"}], "must be the first message"),
    ([{"role": "assistant", "content": "no"}, QUESTION], "begins with the assistant"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "words"), MESSAGES, ids=range(len(MESSAGES)))
def test_what_is_no_conversation_is_refused(reader: PromptReader, messages: Any, words: str) -> None:
    with pytest.raises(ApiError) as found:
        reader.read(messages, {})
    assert found.value.status == 400 and found.value.param == "messages" and words in str(found.value)


def test_the_roles_that_clients_use_are_known(reader: PromptReader) -> None:
    spoken = [reader.read([{"role": role, "content": "Be brief."}, QUESTION], {}) for role in ("system", "developer")]
    assert spoken[0] == spoken[1]
    empty = reader.read([QUESTION, {"role": "assistant", "content": ""}, QUESTION], {})
    assert len(empty.token_ids) > len(spoken[0].token_ids) - 9


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(
        ["user", "assistant", "system", "text", "image_url", "image", "data:image/png;base64,AA==", "attachment:a"]
    ),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "image_url", "url", "image", "path", "bytes", "user"]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=st.dictionaries(st.sampled_from([*READ, *IGNORED[:2], *NEUTRAL, "other"]), JSON, max_size=5))
def test_any_json_is_answered_or_refused(reader: PromptReader, request: dict[str, Any]) -> None:
    for run in (
        lambda: read_parameters(request, NAME, LIMITS),
        lambda: reader.read(request.get("messages"), {"a": b"x"}),
        lambda: reader.read([{"role": "user", "content": request.get("messages")}], {}),
        lambda: reader.read(
            [{"role": "user", "content": [{"type": "image_url", "image_url": request.get("stop")}]}], {}
        ),
    ):
        try:
            run()
        except ApiError as error:
            assert error.status in (400, 404, 413)
            to_json(error.body())


@settings(max_examples=60, deadline=None)
@given(body=st.binary(max_size=60) | st.lists(
    st.sampled_from([b"--b", b"\r\n", b"--", b"Content-Disposition: form-data; name=", b'"a"', b"a", b"; filename=x",
                     b":", b"\r\n\r\n", b"{}", b"Content-Disposition"]), max_size=14).map(b"".join))  # fmt: skip
def test_any_form_is_read_or_refused(body: bytes) -> None:
    try:
        fields = parse_form("multipart/form-data; boundary=b", body)
    except ApiError as error:
        assert error.status == 400
    else:
        assert all(isinstance(value, bytes) for value in fields.values())


def wav(num_samples: int = 1600) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(2 * num_samples))
    return buffer.getvalue()


@pytest.fixture
def hearing(reader: PromptReader) -> Iterator[LoadedModel]:
    """The model as it is read by its prompts, with an audio encoder in its configuration."""
    model = reader.model
    audio = AudioConfig(
        hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, seconds=1, num_mel_bins=80,
        resampler=ResamplerConfig(num_latents=3, num_layers=1, num_heads=2, head_dim=8),
    )  # fmt: skip
    before = model.stage.config
    model.stage.config = before.model_copy(update={"audio": audio})
    counts = {Modality.IMAGE: 4, Modality.AUDIO: 3}
    yield replace(model, template=replace(model.template, num_media_tokens=counts))
    model.stage.config = before


def test_a_model_that_hears_takes_recordings(hearing: LoadedModel) -> None:
    reader = PromptReader(hearing, LIMITS)
    encoded = base64.b64encode(wav()).decode()
    part = {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}
    prompt = reader.read(ask(image_part(), "Is ", part, " red?")["messages"], {})
    assert [item.modality for item in prompt.media] == [Modality.IMAGE, Modality.AUDIO]
    assert prompt.modality_ids.count(int(Modality.AUDIO)) == 3
    attached = {"type": "input_audio", "input_audio": {"data": "attachment:sound", "format": "wav"}}
    assert reader.read(ask(image_part(), "Is ", attached, " red?")["messages"], {"sound": wav()}) == prompt
    for data, words in ((b"RIFF", "not a WAV file"), (wav(20_000), "seconds long")):
        part["input_audio"]["data"] = base64.b64encode(data).decode()  # type: ignore[index]
        with pytest.raises(ApiError, match=words):
            reader.read(ask(part, "What?")["messages"], {})
    for item in (None, 5, {}, {"data": 1}, {"data": "%"}, "", []):
        with pytest.raises(ValueError, match="input_audio"):
            _recording(item, {})


def test_messages_are_parsed_as_records_are() -> None:
    parsed = parse_prompt([{"role": "user", "content": ["a", image_part(), "b", image_part()]}])
    image = Modality.IMAGE
    assert parsed.turns == (Turn("ab", "", (Placeholder(1, image), Placeholder(2, image))),)
    assert [modality for modality, _ in parsed.media] == [image, image] and parsed.system_message is None
    assert Parsed({}, {}).files == {}

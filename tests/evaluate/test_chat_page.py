"""What the page gets from its server: files, models under two rules, the attention of a picture."""

import json
import re
from pathlib import Path

import pytest
import torch
from page_models import PAGE_LIMITS, running_page, tiny_comparison
from serving_models import NAME, SYSTEM_MESSAGE, ask, http, image_part, png

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.errors import ConfigError
from aki_megatron.evaluate.attention_analysis.question import inspect_question, prefill, prompt_batch
from aki_megatron.evaluate.chat_page.compared import Comparison, NamedModel, compare_rules, compare_runs, with_attention
from aki_megatron.evaluate.chat_page.example import Example, ExampleQuestion
from aki_megatron.evaluate.chat_page.page import STATIC
from aki_megatron.evaluate.chat_page.wording import Wording, trained_wording
from aki_megatron.model.stage import build_model
from aki_megatron.types import Conversation, MediaItem, Modality, Placeholder, Turn

QUESTION = "Is the red cup left of it?"
CAUSAL = f"{NAME} (causal)"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return tiny_comparison(tmp_path_factory.mktemp("model"))


def conversation(*prompts: str, image_turn: int = 0) -> Conversation:
    turns = tuple(
        Turn(
            prompt,
            "" if number == len(prompts) - 1 else "yes",
            (Placeholder(0, Modality.IMAGE),) * (number == image_turn),
        )
        for number, prompt in enumerate(prompts)
    )
    return Conversation("q", turns, (MediaItem(Modality.IMAGE, png()),), None)


def test_two_rules_share_weights_and_nothing_else(comparison: Comparison) -> None:
    mma, causal = (each.model.stage for each in comparison.models)
    assert (mma.attention.rule, causal.attention.rule) == ("mma", "causal")
    ours, others = dict(mma.state_dict()), dict(causal.state_dict())
    assert {name: one.data_ptr() for name, one in ours.items()} == {
        name: one.data_ptr() for name, one in others.items()
    }
    assert not set(mma.modules()) & set(causal.modules())  # hooks of one must not run in the other
    template = comparison.models[0].model.template
    batch = prompt_batch(mma, template, conversation(QUESTION), comparison.models[0].model.image_options)
    plain = build_model(mma.config, attention=AttentionConfig(rule="causal"))
    plain.load_state_dict(ours)
    assert torch.equal(prefill(causal, batch), prefill(plain.eval(), batch))
    assert not torch.allclose(prefill(causal, batch), prefill(mma, batch))


def test_what_is_compared_is_said(comparison: Comparison) -> None:
    named, causal = comparison.models
    assert named.sees_question and not causal.sees_question
    assert "not what a model trained with causal would answer" in comparison.about
    trained_causal = NamedModel("other", with_attention(named.model, AttentionConfig(rule="causal")))
    assert [each.rule for each in compare_rules(trained_causal).models] == ["causal", "mma"]
    both = compare_runs(named, trained_causal)
    assert f"{NAME} (mma) and other (causal)" in both.about and "trained with" in both.about
    with pytest.raises(ConfigError, match="give two different runs"):
        compare_runs(named, named)


def test_the_page_loads_everything_from_its_server(comparison: Comparison) -> None:
    example = Example(png("blue"), "A blue box", (ExampleQuestion("What?", "a box"),))
    with running_page(comparison, (example,)) as address:
        page = http("GET", address)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["content-security-policy"]
        types = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
        names = {path.name for path in STATIC.iterdir()} - {"index.html"}
        for name in names:
            file = http("GET", f"{address}/page/{name}")
            assert file.content == (STATIC / name).read_bytes()
            assert file.headers["content-type"] == types[Path(name).suffix]
            assert not re.search(r"https?://|//[a-z]+\.", file.text)
            assert set(re.findall(r'from "\./(.+?)"', file.text)) <= names
        assert set(re.findall(r'(?:href|src)="/page/(.+?)"', page.text)) <= names
        assert "://" not in page.text and http("GET", f"{address}/page/no.js").status_code == 404

        setup = http("GET", f"{address}/page/setup").json()
        assert setup["models"] == [
            {"id": NAME, "rule": "mma", "sees_question": True},
            {"id": CAUSAL, "rule": "causal", "sees_question": False},
        ]
        assert 0 < setup["limits"]["image_bytes"] < PAGE_LIMITS.body_bytes * 3 / 4
        assert setup["wording"] == {"instruction": "", "history": "conversation"}
        assert setup["examples"][0]["questions"] == [{"text": "What?", "answer": "a box"}]
        listed = [model["id"] for model in http("GET", f"{address}/v1/models").json()["data"]]
        assert listed == [NAME, CAUSAL] and http("GET", f"{address}/v1/models/{CAUSAL}").json()["id"] == CAUSAL


def test_the_attention_of_a_picture_is_that_of_its_question(comparison: Comparison) -> None:
    with running_page(comparison) as address:

        def inspected(body: dict[str, object], status: int = 200) -> dict[str, object]:
            response = http("POST", f"{address}/inspect", json=body)
            assert response.status_code == status, response.text
            return response.json()

        for each in comparison.models:
            body = inspected(ask(image_part(png()), f"\n{QUESTION}", model=each.name))
            expected = inspect_question(each.model.stage, each.model.template, conversation(f"\n{QUESTION}"))
            assert (body["model"], body["rule"], body["layers"]) == (each.name, each.rule, [0, 1])
            assert (body["turn"], body["num_turns"], body["is_last"]) == (1, 1, True)
            assert [word["text"] for word in body["words"]] == [word.text for word in expected.words]
            masses = [word["mass"] for word in body["words"]]
            assert masses == pytest.approx([word.mass for word in expected.words], rel=1e-4, abs=1e-9)
            assert (sum(masses) > 0) == (each.rule == "mma")
            assert [sum(patches) for patches in body["heat"]] == pytest.approx(masses, rel=1e-4, abs=1e-9)
            assert body["base"] == pytest.approx(expected.base_grid.flatten().tolist(), rel=1e-4)
            assert len(body["base"]) == body["grid"]["height"] * body["grid"]["width"] == 9

        two = ask(image_part(), QUESTION)
        two["messages"] += [{"role": "assistant", "content": "no"}, {"role": "user", "content": "And now?"}]
        earlier = inspected(two)
        assert (earlier["turn"], earlier["num_turns"], earlier["is_last"]) == (1, 2, False)
        assert earlier["words"][0]["text"] == "Is"
        two["messages"][-1]["content"] = [image_part(), {"type": "text", "text": "And now?"}]
        later = inspected(two)
        assert later["is_last"] and [word["text"] for word in later["words"]] == ["And", "now", "?"]

        assert "holds no picture" in inspected(ask(QUESTION), 400)["error"]["message"]
        error = inspected(ask(image_part(), "What?", model="another"), 404)["error"]["message"]
        assert error == f"The model 'another' does not exist; this server has {NAME!r}, {CAUSAL!r}."
        assert "not a readable image" in inspected(ask(image_part(b"text"), "What?"), 400)["error"]["message"]


def test_system_messages_are_no_part_of_the_words(comparison: Comparison) -> None:
    assert comparison.models[0].model.template.system_message == SYSTEM_MESSAGE
    found = inspect_question(
        comparison.models[0].model.stage, comparison.models[0].model.template, conversation(QUESTION)
    )
    assert not {word.text for word in found.words} & {"Answer", "one"}


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([], Wording()),
        (
            [{"name": "vqav2"}, {"name": "refcoco"}],
            Wording("Answer the question using a single word or phrase.", "alone"),
        ),
        ([{"name": "vqav2"}, {"name": "llava150k"}], Wording("", "alone")),
        ([{"name": "llava150k", "split_turns": False}], Wording("", "conversation")),
        ([{"name": "mine", "format": "llava", "path": "chat.jsonl"}], Wording("", "conversation")),
    ],
)
def test_questions_are_put_as_in_training(sources: list[dict[str, object]], expected: Wording, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"data": {"sources": sources}}))
    assert trained_wording(tmp_path) == expected
    assert trained_wording(tmp_path / "an exported folder") == Wording()

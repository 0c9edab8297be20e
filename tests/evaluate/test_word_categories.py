"""Taggers behind one protocol, and the table that turns tags and words into categories."""

import sys
from pathlib import Path

import pytest

from aki_megatron.errors import ConfigError
from aki_megatron.evaluate.attention_analysis.categories import DEFAULT_FILE, load_categories
from aki_megatron.evaluate.attention_analysis.taggers import TAGGERS, UnavailableTagger, open_tagger
from aki_megatron.evaluate.attention_analysis.words import split_words
from aki_megatron.evaluate.prompts import LETTER, SHORT, YES_NO

QUESTION = ["Where", "are", "the", "two", "red", "cups", "compared", "to", "the", "spoon", "?"]


def test_the_rule_tagger_knows_closed_classes_numbers_and_endings() -> None:
    tagger, notes = open_tagger("rules")
    assert tagger.name.startswith("rules") and notes == []
    assert tagger.tag(QUESTION) == ["WRB", "VBP", "DT", "CD", "JJ", "NNS", "VBN", "TO", "DT", "NN", "."]
    assert tagger.tag(["Is", "Anna", "quickly", "wearing", "3.5", "glasses", ",", "n't"]) == [
        "VBZ", "NNP", "RB", "VBG", "CD", "NNS", "SYM", "RB",
    ]  # fmt: skip


def test_the_pattern_tagger_gives_each_word_a_tag() -> None:
    pytest.importorskip("textblob")
    tagger, _ = open_tagger("pattern")
    assert tagger.name.startswith("textblob ")
    tags = tagger.tag(QUESTION)
    assert tags == ["WRB", "VBP", "DT", "CD", "JJ", "NNS", "VBN", "TO", "DT", "NN", "."]
    odd = ["A", "/", "B", "1/2", "&slash;", "(", "", "caf\u00e9"]
    assert len(tagger.tag(odd)) == len(odd)


def test_nltk_runs_where_its_data_are_and_says_what_is_missing_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nltk = pytest.importorskip("nltk")
    from nltk.tag.perceptron import PerceptronTagger

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(UnavailableTagger, match="NLTK_DATA"):
        open_tagger("nltk")
    _, notes = open_tagger("auto")
    assert "averaged_perceptron_tagger_eng" in notes[0]
    learnt = PerceptronTagger(load=False)
    learnt.train([[("the", "DT"), ("cup", "NN")], [("a", "DT"), ("spoon", "NN")]], nr_iter=5)
    folder = tmp_path / "taggers/averaged_perceptron_tagger_eng"
    folder.parent.mkdir()
    learnt.save_to_json(lang="eng", loc=str(folder))
    tagger, notes = open_tagger("auto")
    assert tagger.name.startswith("nltk ") and notes == [] and tagger.tag(["a", "cup"]) == ["DT", "NN"]


def test_without_packages_the_rules_run_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nltk", "nltk.tag.perceptron", "textblob", "textblob.en"):
        monkeypatch.setitem(sys.modules, name, None)
    tagger, notes = open_tagger()
    assert tagger.name.startswith("rules") and ["NLTK is" in notes[0], "TextBlob is" in notes[1]] == [True, True]
    with pytest.raises(UnavailableTagger, match="aki-megatron\\[analysis\\]"):
        open_tagger("pattern")
    with pytest.raises(ConfigError, match="no tagger 'spacy'"):
        open_tagger("spacy")
    assert list(TAGGERS) == ["nltk", "pattern", "rules"]


def test_the_packaged_table_has_the_papers_six_categories() -> None:
    table = load_categories()
    assert table.names == (
        "Objects", "Relations/Spatial", "Attributes", "Actions", "Function/Filler", "Punctuation/Other"
    )  # fmt: skip
    cases = {
        ("cups", "NNS"): "Objects", ("Paris", "NNP"): "Objects", ("of", "IN"): "Relations/Spatial",
        ("Left", "VBN"): "Relations/Spatial", ("where", "WRB"): "Relations/Spatial", ("red", "JJ"): "Attributes",
        ("two", "CD"): "Attributes", ("is", "VBZ"): "Function/Filler", ("wearing", "VBG"): "Actions",
        ("\u2019s", "VBZ"): "Function/Filler", ("?", "."): "Punctuation/Other", ("x", "FW"): "Punctuation/Other",
        ("which", "WDT"): "Function/Filler",
    }  # fmt: skip
    for (word, tag), category in cases.items():
        assert table.find(word, tag) == category, word


def test_words_of_constant_instructions_are_found_whatever_the_white_space() -> None:
    table = load_categories()
    assert {LETTER, SHORT, YES_NO} <= set(table.instructions)
    text = "Answer the  question\nusing a single word or phrase. Is it a word? please answer yes or no."
    words = split_words(text)
    constant = table.instruction_words(words, text)
    assert [w.text for w, c in zip(words, constant, strict=True) if not c] == ["Is", "it", "a", "word", "?"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rest: Punctuation/Other", "rest: Others"), "'Others' is no category"),
        (("words:", "word:"), "missing or unknown: word, words"),
        (("[IN, RP, TO]", "[IN, NN]"), "tag 'NN' is in Objects and in Relations/Spatial"),
        (("[IN, RP, TO]", "IN"), "categories: Relations/Spatial must be a list of texts"),
        (("    be, am,", "    left, be,"), "word 'left' is in Relations/Spatial and in Function/Filler"),
        (('  - "Hint:"', "  - 5"), "put numbers in quotes"),
    ],
)
def test_a_wrong_table_is_refused(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    text = DEFAULT_FILE.read_text(encoding="utf-8")
    assert change[0] in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(*change), encoding="utf-8")
    with pytest.raises(ConfigError, match="mine.yaml") as error:
        load_categories(path)
    assert message in str(error.value)

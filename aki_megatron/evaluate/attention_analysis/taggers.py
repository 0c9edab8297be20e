"""Part-of-speech taggers: each gives the words of a sentence tags of the Penn treebank.

    nltk     NLTK's averaged perceptron, which the paper used; needs its data (averaged_perceptron_tagger_eng)
    pattern  TextBlob's pattern tagger, whose lexicon comes with the package
    rules    closed classes and endings; no package

The first two come with ``pip install 'aki-megatron[analysis]'`` and are imported when they are asked for.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Protocol

from aki_megatron.errors import ConfigError
from aki_megatron.evaluate.attention_analysis.rule_tagger import RuleTagger

EXTRA = "pip install 'aki-megatron[analysis]'"


class Tagger(Protocol):
    """Gives words their parts of speech."""

    @property
    def name(self) -> str:
        """What ran, with its version: for reports."""
        ...

    def tag(self, words: Sequence[str]) -> list[str]:
        """Return one Penn tag for each word of a sentence."""
        ...


class UnavailableTagger(ConfigError):  # noqa: N818 (a state of the installation, not a mistake)
    """A tagger whose package or data are not installed; the message says how to get them."""


class NltkTagger:
    """NLTK's averaged perceptron tagger. Raises UnavailableTagger without the package or its data."""

    def __init__(self) -> None:
        try:
            from nltk.tag.perceptron import PerceptronTagger
        except ImportError as error:
            raise UnavailableTagger(f"NLTK is not installed ({error}): {EXTRA}.") from None
        try:
            self._tagger = PerceptronTagger()
        except LookupError:
            raise UnavailableTagger(
                "NLTK has no data averaged_perceptron_tagger_eng: python -m nltk.downloader "
                "averaged_perceptron_tagger_eng, or set NLTK_DATA to a folder that has taggers/"
                "averaged_perceptron_tagger_eng."
            ) from None
        self.name = f"nltk {version('nltk')} averaged_perceptron_tagger_eng"

    def tag(self, words: Sequence[str]) -> list[str]:
        return [tag for _, tag in self._tagger.tag(list(words))]


class PatternTagger:
    """TextBlob's pattern tagger. Raises UnavailableTagger without the package."""

    def __init__(self) -> None:
        try:
            from textblob.en import parser
        except ImportError as error:
            raise UnavailableTagger(f"TextBlob is not installed ({error}): {EXTRA}.") from None
        self._parser = parser
        self.name = f"textblob {version('textblob')} pattern tagger"

    def tag(self, words: Sequence[str]) -> list[str]:
        return [tag for _, tag in self._parser.find_tags(list(words))]


TAGGERS: dict[str, Callable[[], Tagger]] = {"nltk": NltkTagger, "pattern": PatternTagger, "rules": RuleTagger}
"""By name, the preferred one first."""

AUTO = "auto"


def open_tagger(name: str = AUTO) -> tuple[Tagger, list[str]]:
    """Return a tagger, and why a preferred one was not taken; ``auto`` takes the first that is there.

    Raises ConfigError for an unknown name, UnavailableTagger where the one that was named is not there.
    """
    if name != AUTO:
        if name not in TAGGERS:
            raise ConfigError(f"There is no tagger {name!r}; choose {AUTO} or one of {', '.join(TAGGERS)}.")
        return TAGGERS[name](), []
    reasons: list[str] = []
    for choice in TAGGERS.values():
        try:
            return choice(), reasons
        except UnavailableTagger as error:
            reasons.append(str(error))
    raise AssertionError("the last tagger needs nothing")

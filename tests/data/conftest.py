"""Fixtures of the data tests: the tokenizer, templates, and a folder of sources."""

from collections.abc import Callable
from pathlib import Path

import pytest
from chat_folders import PHI3_LIKE
from data_files import write_sources

from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.families.registry import FAMILIES
from aki_megatron.types import Modality

NUM_IMAGE_TOKENS = 3


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(PHI3_LIKE, FAMILIES["phi3"].chat)


@pytest.fixture
def make_template(tokenizer: Tokenizer) -> Callable[..., Template]:
    def make(max_text_tokens: int = 512, system_message: str = SYSTEM_MESSAGE, *, text_first: bool = False) -> Template:
        return Template(tokenizer, {Modality.IMAGE: NUM_IMAGE_TOKENS}, max_text_tokens, system_message, text_first)

    return make


@pytest.fixture(scope="session")
def source_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    write_sources(root)
    return root


@pytest.fixture(scope="session")
def make_session_template(tokenizer: Tokenizer) -> Template:
    return Template(tokenizer, {Modality.IMAGE: NUM_IMAGE_TOKENS}, 512, SYSTEM_MESSAGE)

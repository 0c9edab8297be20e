"""Families are plain data below every other layer, and no other file names one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from aki_megatron.checkpoint.shapes import model_shapes
from aki_megatron.checkpoint.weight_names import language_names
from aki_megatron.config.model import DecoderConfig, ModelConfig
from aki_megatron.families.base import ROLES
from aki_megatron.families.registry import DEFAULT_FAMILY, FAMILIES

PACKAGE = Path(__file__).resolve().parents[2] / "aki_megatron"

MAY_NAME_A_FAMILY = {
    "checkpoint/official.py",  # the official release is a Phi-3
    "checkpoint/configuration_aki.py",  # transformers builds AkiConfig() without arguments
}


def test_families_import_no_library_and_nothing_above_them() -> None:
    code = (
        "import sys, aki_megatron.families.registry\n"
        "names = {name.split('.')[0] for name in sys.modules} & {'torch', 'pydantic', 'transformers', 'numpy'}\n"
        "others = [name for name in sys.modules if name.startswith('aki_megatron.') and '.families' not in name]\n"
        "print(names, others)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert process.stdout.strip() == "set() []"


def test_adding_a_family_needs_no_other_file() -> None:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith("families/"):
            texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            if texts & FAMILIES.keys():
                found.add(name)
    assert found == MAY_NAME_A_FAMILY


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_rules_cover_the_decoder(name: str, tied: bool) -> None:
    """Every tensor of a decoder without AKI's additions has exactly one rule."""
    decoder = DecoderConfig(family=name, num_layers=1, num_added_tokens=0, lm_head_bias=False, tie_word_embeddings=tied)
    tensors = {name for name in model_shapes(ModelConfig(decoder=decoder)) if not name.startswith("input_embedder.")}
    assert language_names(decoder).keys() - {"input_embedder.token_embedding.base.weight"} == tensors
    external = [part for parts in language_names(decoder).values() for part in parts]
    assert len(set(external)) == len(external)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_chat_format_and_keys_are_complete(name: str) -> None:
    family = FAMILIES[name]
    assert family.config.field_keys.keys() >= {"family", "hidden_size", "num_layers", "num_heads", "norm_eps"}
    assert len({family.chat.header(role) for role in ROLES}) == len(ROLES)
    assert {family.chat.turn_end, family.chat.sample_end} <= set(family.chat.special_tokens)
    assert family.chat.turn_end in family.chat.stop_tokens and family.chat.sample_end in family.chat.stop_tokens


def test_the_default_family_is_registered() -> None:
    assert DecoderConfig().family == DEFAULT_FAMILY and DEFAULT_FAMILY in FAMILIES

"""One golden sample per dataset: the rendered text and its supervised part, to the letter as in AKI's release.

The space after <s> is the token that the release's slow tokenizer puts before <|system|> (data/template.py).
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from data_files import image_bytes, write_sources
from source_files import put, write_more_sources, write_refer

from aki_megatron.config.datasets import DATASETS
from aki_megatron.data.sources import open_sources
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.types import IGNORE, Modality

SYSTEM = (
    "<s> <|system|>\nA chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.<|end|>\n"
)

GOLDEN: list[tuple[str, str, str, str]] = [
    (
        "vqav2",
        "vqav2/how_many/20",
        "<|user|>\n<image>\nAnswer the question using a single word or phrase. How many cats 2?<|end|>\n"
        "<|assistant|>\n2<|endoftext|>",
        "2<|endoftext|>",
    ),
    (
        "gqa",
        "gqa/verify/02930152",
        "<|user|>\n<image>\nAnswer the question using a single word or phrase. Is the sky dark?<|end|>\n"
        "<|assistant|>\nyes<|endoftext|>",
        "yes<|endoftext|>",
    ),
    (
        "vsr",
        "vsr/relation/2",
        "<|user|>\n<image>\nAnswer the question using a single word or phrase. "
        "Is the fish 2 at the left side of the dish? Please answer yes or no.<|end|>\n"
        "<|assistant|>\nno<|endoftext|>",
        "no<|endoftext|>",
    ),
    (
        "ocrvqa",
        "ocrvqa/cover/0761183272.0",
        "<|user|>\n<image>\nAnswer the question using a single word or phrase. Who wrote this book?<|end|>\n"
        "<|assistant|>\nSandra Boynton<|endoftext|>",
        "Sandra Boynton<|endoftext|>",
    ),
    (
        "aokvqa",
        "aokvqa/choice/q1",
        "<|user|>\n<image>\nAnswer with the option's letter from the given choices directly. Which one is red?\n"
        "Options:\nA. tree\nB. bus\nC. cup\nD. clock\n<|end|>\n"
        "<|assistant|>\nC<|endoftext|>",
        "C<|endoftext|>",
    ),
    (
        "scienceqa",
        "scienceqa/image/1",
        "<|user|>\n<image>\nAnswer with the option's letter from the given choices directly. "
        "Which of these states is farthest north?\nContext: N/A\n"
        "Options:\nA. Oklahoma\nB. Louisiana\nC. West Virginia\nD. Arizona\n<|end|>\n"
        "<|assistant|>\nC<|endoftext|>",
        "C<|endoftext|>",
    ),
    (
        "scienceqa",
        "scienceqa/text/2",
        "<|user|>\nAnswer with the option's letter from the given choices directly. "
        "Which word does not rhyme?\nContext: Two of the words rhyme.\n"
        "Options:\nA. keg\nB. hot\nC. peg\n<|end|>\n"
        "<|assistant|>\nB<|endoftext|>",
        "B<|endoftext|>",
    ),
    (
        "refcoco",
        "refcoco/region/0",
        "<|user|>\n<image>\nProvide a short description for this region. "
        "<bbox>[0.162, 0.625][0.372, 0.995]</bbox><|end|>\n"
        "<|assistant|>\nthe lady in blue<|endoftext|>",
        "the lady in blue<|endoftext|>",
    ),
    (
        "refcoco+",
        "refcoco+/region/1",
        "<|user|>\n<image>\nProvide a short description for this region. "
        "<bbox>[0.585, 0.136][0.797, 0.556]</bbox><|end|>\n"
        "<|assistant|>\nman on the right<|endoftext|>",
        "man on the right<|endoftext|>",
    ),
    (
        "refcocog",
        "refcocog/region/0",
        "<|user|>\n<image>\nProvide a short description for this region. "
        "<bbox>[0.162, 0.625][0.372, 0.995]</bbox><|end|>\n"
        "<|assistant|>\nthe lady in blue<|endoftext|>",
        "the lady in blue<|endoftext|>",
    ),
    (
        "visualgenome",
        "visualgenome/region/1382",
        "<|user|>\n<image>\nProvide a short description for this region. "
        "<bbox>[0.526, 0.095][0.629, 0.327]</bbox><|end|>\n"
        "<|assistant|>\nthe clock is green in colour<|endoftext|>",
        "the clock is green in colour<|endoftext|>",
    ),
    (
        "llava150k",
        "llava150k/dialogue/000000033471.0.1",
        "<|user|>\n<image>\nIs the bus driving down the street or pulled off to the side?<|end|>\n"
        "<|assistant|>\nThe bus is driving down the street.<|endoftext|>",
        "The bus is driving down the street.<|endoftext|>",
    ),
]

IDS = [key for _, key, _, _ in GOLDEN]


@pytest.fixture(scope="module")
def golden_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    write_sources(root, count=2)
    write_more_sources(root)
    write_refer(root, "refcoco")
    return root


def test_every_source_has_a_golden_sample() -> None:
    assert {name for name, *_ in GOLDEN} == set(DATASETS)


@pytest.mark.parametrize(("name", "key", "text", "supervised"), GOLDEN, ids=IDS)
def test_golden_sample(
    golden_root: Path,
    make_template: Callable[..., Template],
    tokenizer: Tokenizer,
    name: str,
    key: str,
    text: str,
    supervised: str,
) -> None:
    template = make_template()
    samples = open_sources(golden_root, [name], "train")[name]
    conversation = next(sample for sample in samples if sample.key == key)
    assert "".join(part.text for part in template.conversation_parts(conversation)) == SYSTEM + text
    sample = template.render_conversation(conversation)
    assert sample is not None and sample.images == conversation.images
    assert len(conversation.images) == ("<image>" in text)
    assert all(isinstance(image, Path) and image.is_file() for image in conversation.images)

    # the release's rule, by the marker: everything up to and including the first <|assistant|> is not supervised
    first = sample.token_ids.index(tokenizer.token_id("<|assistant|>")) + 1
    assert sample.targets == [IGNORE] * (first - 1) + sample.token_ids[first:] + [IGNORE]
    response = [i for i, kind in enumerate(sample.modality_ids) if kind == Modality.RESPONSE]
    assert response == list(range(first, len(sample.token_ids)))
    answer = tokenizer.encode(supervised)  # no newline: the one after <|assistant|> vanishes
    assert sample.token_ids[first:] == answer and answer[-1] == tokenizer.eos_id
    assert tokenizer.decode(answer) + "<|endoftext|>" == supervised
    assert sample.token_ids.count(tokenizer.image_id) == (
        template.num_media_tokens[Modality.IMAGE] if "<image>" in text else 0
    )


def test_golden_conversation_of_several_turns(
    golden_root: Path, make_template: Callable[..., Template], tokenizer: Tokenizer
) -> None:
    template = make_template()
    samples = open_sources(golden_root, ["llava150k"], "train", multi_turn=["llava150k"])["llava150k"]
    assert [sample.key for sample in samples] == [
        "llava150k/dialogue/000000033471.0",
        "llava150k/dialogue/000000033471.1",
    ]
    assert "".join(part.text for part in template.conversation_parts(samples[0])) == SYSTEM + (
        "<|user|>\n<image>\nWhat are the colors of the bus in the image?<|end|>\n"
        "<|assistant|>\nThe bus in the image is white and red.<|end|>\n"
        "<|user|>\nIs the bus driving down the street or pulled off to the side?<|end|>\n"
        "<|assistant|>\nThe bus is driving down the street.<|endoftext|>"
    )
    sample = template.render_conversation(samples[0])
    assert sample is not None
    supervised = [token for token in sample.targets if token != IGNORE]
    assert supervised == [
        *tokenizer.encode("The bus in the image is white and red.<|end|>"),
        *tokenizer.encode("The bus is driving down the street.<|endoftext|>"),
    ]


def test_an_image_named_as_in_the_release_is_found(tmp_path: Path) -> None:
    """The suffix of an OCR-VQA image is that of its URL; ScienceQA has a folder per problem."""
    write_more_sources(tmp_path)
    covers = open_sources(tmp_path, ["ocrvqa"], "val")["ocrvqa"]
    assert [cover.images[0] for cover in covers] == [tmp_path / "OCRVQA/images/1400031354.gif"] * 2
    put(tmp_path, "ScienceQA/images/val/3/image.png", image_bytes(9, form="PNG"))
    assert open_sources(tmp_path, ["scienceqa"], "val")["scienceqa"][0].images[0] == (
        tmp_path / "ScienceQA/images/val/3/image.png"
    )
    assert open_sources(tmp_path, ["gqa"], "val")["gqa"][0].images[0] == tmp_path / "GQA/images/n161313.jpg"

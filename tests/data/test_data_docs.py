"""The blocks of docs/data.md that arrange and check data are run, on drawn data in the forms of the releases."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_files import image_bytes

from aki_megatron.config.datasets import DATASETS
from aki_megatron.config.load import load_run
from aki_megatron.data.release_counts import RELEASE_COUNTS
from aki_megatron.data.sources import dataset_reader, open_sources, with_split
from aki_megatron.synthetic.dataset import DatasetSize, write_dataset

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/data.md").read_text()
BLOCKS = [block for block in re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) if block.startswith("# ")]

pytestmark = pytest.mark.skipif(not (shutil.which("unzip") and shutil.which("bash")), reason="needs unzip and bash")


def blocks(beginning: str) -> Iterator[str]:
    found = [block for block in BLOCKS if block.startswith(f"# {beginning}")]
    assert found, beginning
    yield from found


def run(script: str, folder: Path) -> str:
    """Run a block as a user would, with ``python`` being this one; return what it prints."""
    script = f'python() {{ "{sys.executable}" "$@"; }}\n{script}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def zip_of(archive: Path, base: Path, *names: str) -> None:
    subprocess.run([sys.executable, "-m", "zipfile", "-c", str(archive), *names], cwd=base, check=True)


def download(drawn: Path, downloads: Path) -> None:
    """Pack drawn data as the releases are packed."""
    downloads.mkdir(parents=True)
    for name, folder in (("train2014", "VQA"), ("val2014", "VQA"), ("train2017", "A-OKVQA"), ("val2017", "A-OKVQA")):
        zip_of(downloads / f"{name}.zip", drawn / folder, name)
    for split, year in (("Train", "train2014"), ("Val", "val2014")):
        questions, annotations = f"v2_OpenEnded_mscoco_{year}_questions.json", f"v2_mscoco_{year}_annotations.json"
        zip_of(downloads / f"v2_Questions_{split}_mscoco.zip", drawn / "VQA", questions)
        zip_of(downloads / f"v2_Annotations_{split}_mscoco.zip", drawn / "VQA", annotations)
    with tarfile.open(downloads / "aokvqa_v1p0.tar.gz", "w:gz") as tar:
        for split in ("train", "val"):
            tar.add(drawn / f"A-OKVQA/aokvqa_v1p0_{split}.json", f"aokvqa_v1p0_{split}.json")
    zip_of(downloads / "questions1.2.zip", drawn / "GQA", "train_balanced_questions.json",
           "val_balanced_questions.json")  # fmt: skip
    zip_of(downloads / "gqa_images.zip", drawn / "GQA", "images")
    splits = downloads / "visual-spatial-reasoning/data/splits/random"
    splits.mkdir(parents=True)
    for split in ("train", "dev"):
        shutil.copy(drawn / f"vsr/{split}-random.jsonl", splits / f"{split}.jsonl")
    (downloads / "ScienceQA/data/scienceqa").mkdir(parents=True)
    shutil.copy(drawn / "ScienceQA/problems.json", downloads / "ScienceQA/data/scienceqa")
    for split in ("train", "val"):
        zip_of(downloads / f"scienceqa_{split}.zip", drawn / "ScienceQA/images", split)
    with tarfile.open(downloads / "mdetr_annotations.tar.gz", "w:gz") as tar:
        for file in sorted((drawn / "ref/annotations").iterdir()):
            tar.add(file, f"OpenSource/{file.name}")
    for name in ("region_descriptions", "image_data"):
        zip_of(downloads / f"{name}.json.zip", drawn / "VisualGenome", f"{name}.json")
    images = sorted((drawn / "VisualGenome/images").iterdir())
    for number, (archive, folder) in enumerate((("vg_images", "VG_100K"), ("vg_images2", "VG_100K_2"))):
        (drawn / folder).mkdir()
        for image in images[number::2]:
            shutil.copy(image, drawn / folder)
        zip_of(downloads / f"{archive}.zip", drawn, folder)
    shutil.copy(drawn / "llava/llava_instruct_150k.json", downloads)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with links to the tools and configurations, drawn weights' tokenizer, and arranged data."""
    folder = tmp_path_factory.mktemp("checkout")
    drawn = folder / "drawn"
    write_dataset(drawn, DatasetSize(40, 10, 3), lambda done: None)
    for name in ("tools", "configs"):
        (folder / name).symlink_to(ROOT / name)
    sft = folder / "data/sft"
    download(drawn, sft / "downloads")
    arrange, own = blocks("Arrange")
    run(arrange, sft)
    for name in ("dataset.json", "images"):  # by the release's script
        (drawn / "OCRVQA" / name).rename(sft / "OCRVQA" / name)
    for number in range(3):
        image = folder / f"my_images/{number}.jpg"
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(image_bytes(number))
        image.with_suffix(".txt").write_text(f"A picture {number}.")
    assert "shards: [" in run(own, folder)
    for name, source in (("blip3_kale", "captions"), ("blip3_ocr_200m", "ocr")):
        shutil.copytree(drawn / source, folder / "data/pretrain" / name)
    return folder


def test_the_arranged_data_are_read_by_every_source(checkout: Path) -> None:
    root = checkout / "data/sft"
    for split in ("train", "val"):
        opened = open_sources(root, with_split(DATASETS, split), split)
        for samples in opened.values():
            assert all(not sample.images or sample.images[0].is_file() for sample in samples)


def test_the_arranged_data_are_checked(checkout: Path) -> None:
    check_sft, check_captions = blocks("Check")
    demo = f"--data.tokenizer {checkout}/drawn/tokenizer --workers 1"
    small = check_sft.replace("configs/aki4b/sft.yaml", f"configs/demo/sft.yaml {demo} --data.sources '{sources()}'")
    printed = run(small, checkout)
    assert "A run can read all of it." in printed and printed.count("faults         none") == len(DATASETS)
    one_tar = check_captions.replace("{00000..31000}", "00000").replace("{00000..21000}", "00000")
    captions = ", ".join(
        f"{{name: {name}, format: {form}, shards: [{folder}/00000.tar]}}"
        for name, form, folder in (("kale", "caption", "blip3_kale"), ("ocr", "blip3_ocr", "blip3_ocr_200m"))
    )
    config = f"configs/demo/pretrain.yaml {demo} --data.captions '[{captions}]'"
    small = one_tar.replace("configs/aki4b/pretrain.yaml", config)
    printed = run(small, checkout)
    assert "A run can read all of it." in printed and "kale: 40 records" in printed


def sources() -> str:
    return "[" + ", ".join(f"{{name: {name}}}" for name in DATASETS) + "]"


def test_the_page_names_what_the_configurations_and_readers_name() -> None:
    tree = PAGE.partition("data/sft/\n")[2].partition("```")[0]
    for name in DATASETS:
        for split, files in dataset_reader(name).files.items():
            for file in files:
                folder, _, rest = file.partition("/")
                assert f"{folder}/" in tree, (name, split, file)
                assert rest.split("/")[0].split("_")[0].split("-")[0] in PAGE
    config = load_run([], default_config=ROOT / "configs/aki4b/pretrain.yaml", prog="", description="")
    for captions in config.data.captions:
        for pattern in captions.shards:
            assert f"data/pretrain/{pattern}" in PAGE
    for splits in RELEASE_COUNTS.values():
        for count in splits.values():
            assert f"{count.records:,}" in PAGE

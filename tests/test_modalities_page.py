"""docs/modalities.md names files and configurations that exist, and every place that names audio."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/modalities.md").read_text()
TABLE = PAGE.partition("## How to add a modality")[2]

ANYWHERE = {"model/resampler.py", "model/full_attention.py", "config/combinations.py", "config/datasets.py",
            "data/loader.py"}  # fmt: skip
"""Files that say what audio is in a docstring, a table or a message, and need nothing for another modality."""


def test_the_files_exist() -> None:
    names = set(
        re.findall(r"`((?:configs|tests|tools|data|model|checkpoint|parallel|config)/[a-z_0-9/]+\.(?:py|yaml))`", PAGE)
    )
    assert len(names) > 12
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "aki_megatron" / name).exists(), name


def test_the_table_names_every_file_that_knows_audio() -> None:
    knowing = {
        str(path.relative_to(ROOT / "aki_megatron"))
        for path in (ROOT / "aki_megatron").rglob("*.py")
        if re.search(r"\baudio\b|AUDIO|Audio", path.read_text()) and path.parts[-2] not in ("attention", "synthetic")
    }
    own = {"model/audio.py", "data/audio.py", "data/log_mel.py", "data/sources/tones.py", "config/attention.py"}
    missing = {name for name in knowing - own - ANYWHERE if name.split("/")[-1] not in TABLE}
    assert not missing, missing

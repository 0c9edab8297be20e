"""The demo's runs, as launchers load them, and edited copies of their files."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.config.run_file import read_run_file
from aki_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SFT, PRETRAIN = ROOT / "configs/demo/sft.yaml", ROOT / "configs/demo/pretrain.yaml"


def load(*argv: str, config: Path = SFT) -> RunConfig:
    return load_run(
        ["--config", str(config), *argv], default_config=config, prog="launcher/sft.py", description="Test."
    )


def message(*argv: str, config: Path = SFT) -> str:
    """The error that loading raises."""
    with pytest.raises(ConfigError) as caught:
        load(*argv, config=config)
    return str(caught.value)


def edited(tmp_path: Path, changes: dict[str, Any], base: Path = SFT) -> Path:
    """A written-out copy of a config with dotted keys set, or removed where the value is `...`."""
    values = read_run_file(base).values
    for key, value in changes.items():
        *path, last = key.split(".")
        inner = values
        for part in path:
            inner = inner.setdefault(part, {})
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file

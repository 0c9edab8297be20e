"""A small copy of the demo: a folder with data, and how the project's commands are run in it."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class World:
    """A folder with data, and how commands are run in it."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, *words: str) -> list[str]:
        """The words with the interpreter in front, where the first is a script of the project."""
        return [sys.executable, str(ROOT / words[0]), *words[1:]] if words[0].endswith(".py") else list(words)

    def run(self, *words: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command from the checkout's root; its output as text."""
        result = subprocess.run(
            self.command(*words),
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        if ok:
            assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result

    def data_flags(self) -> list[str]:
        """Flags that point a demo configuration at this folder's data."""
        data = self.folder / "data"
        return ["--data.root", str(data), "--data.tokenizer", str(data / "tokenizer"), "--log.wandb", "disabled"]

    def sft_flags(self, run: str, *, steps: int) -> list[str]:
        """Flags of a short fine-tuning run of the demo model."""
        return [
            "--config", str(ROOT / "configs/demo/sft.yaml"), *self.data_flags(), "--run.dir", str(self.folder / run),
            "--train.steps", str(steps), "--optimizer.warmup_steps", "2", "--train.global_batch_size", "8",
            "--train.micro_batch_size", "2", "--checkpoint.interval", "4", "--log.interval", "4",
            "--init.weights", str(self.folder / "pretrain"),
        ]  # fmt: skip

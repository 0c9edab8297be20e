"""The folder of a small copy of the demo, and the commands that run in it."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class DemoWorkspace:
    """A folder with data, and the environment of commands that use it."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, *arguments: str) -> list[str]:
        """Return the command line; a script of the project gets the interpreter in front."""
        return (
            [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
            if arguments[0].endswith(".py")
            else list(arguments)
        )

    def run(self, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command from the checkout's root; check its exit code if ``ok``."""
        result = subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        if ok:
            assert result.returncode == 0, f"{arguments}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result

    def data_flags(self) -> list[str]:
        """Return the flags that point a demo configuration at this folder's data."""
        data = self.folder / "data"
        return ["--data.root", str(data), "--data.tokenizer", str(data / "tokenizer"), "--log.wandb", "disabled"]

    def sft_flags(self, run: str, *, steps: int) -> list[str]:
        """Return the flags of a short fine-tuning run of the demo model."""
        return [
            "--config", str(ROOT / "configs/demo/sft.yaml"), *self.data_flags(), "--run.dir", str(self.folder / run),
            "--train.steps", str(steps), "--optimizer.warmup_steps", "2", "--train.global_batch_size", "8",
            "--train.micro_batch_size", "2", "--checkpoint.interval", "4", "--log.interval", "4",
            "--init.weights", str(self.folder / "pretrain"),
        ]  # fmt: skip

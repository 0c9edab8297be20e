"""What may change when a run is resumed, and what makes it another run."""

from pathlib import Path

import pytest
from demo_runs import load

from aki_megatron.config.save import check_resume, compare_for_resume, dump_run
from aki_megatron.errors import ConfigError


def test_a_run_may_be_resumed_with_other_ranks_and_logs() -> None:
    before = load()
    after = load(
        *(
            "--parallel.zero_stage",
            "1",
            "--log.interval",
            "1",
            "--checkpoint.interval",
            "7",
            "--train.micro_batch_size",
            "8",
        ),
        *("--run.dir", "elsewhere", "--data.prefetch_steps", "4", "--watch.on_loss_spike", "rollback"),
    )
    assert compare_for_resume(before, after) == []


def test_a_run_is_not_resumed_as_another_one(tmp_path: Path) -> None:
    before, after = load(), load("--train.seed", "9", "--optimizer.lr", "1e-3", "--model.decoder.num_layers", "5")
    differences = compare_for_resume(before, after)
    assert [text.split(" was ")[0] for text in differences] == [
        "model.decoder.num_layers",
        "train.seed",
        "optimizer.lr",
    ]
    assert "train.seed was 2 when the run started and is 9 now" in differences
    saved = tmp_path / "config.yaml"
    check_resume(saved, after)
    saved.write_text(dump_run(before))
    check_resume(saved, before)
    with pytest.raises(ConfigError, match=r"holds another run: 3 problems(.|\n)*train\.seed(.|\n)*--run\.dir"):
        check_resume(saved, after)

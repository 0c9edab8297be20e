"""The batch files: shellcheck, acceptance by Slurm for the real shape of a node, and completeness."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from slurm_cluster import ROOT, Cluster

from aki_megatron.config.load import load_run

TEMPLATES = sorted(ROOT.glob("slurm/*.sbatch"))
SCRIPTS = [*TEMPLATES, *sorted(ROOT.glob("slurm/*.sh")), ROOT / "slurm/site.env"]
FLAGS = {"evaluate.sbatch": ["runs/aki4b/sft"]}


def header(template: Path) -> dict[str, str]:
    """Return the #SBATCH options."""
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", template.read_text(), flags=re.MULTILINE)
    return dict(lines)


def test_there_are_four_templates() -> None:
    names = {template.name for template in TEMPLATES}
    assert names == {"pretrain_aki4b.sbatch", "sft_aki4b.sbatch", "section42.sbatch", "evaluate.sbatch"}


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (Debian: apt-get install shellcheck)")
    result = subprocess.run(
        ["shellcheck", "--external-sources", "--shell=bash", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.slurm
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_slurm_accepts_every_template(cluster: Cluster, template: Path) -> None:
    arguments = ["sbatch", "--test-only", str(template), *FLAGS.get(template.name, [])]
    assert re.search(r"Job \d+ to start at", cluster.run(*arguments, AKI_SITE="", AKI_CONFIG="", AKI_RUN=""))
    too_many = cluster.run(*arguments[:2], "--gpus-per-node=9", *arguments[2:], ok=False)
    assert "Requested node configuration is not available" in too_many


@pytest.mark.parametrize(
    "template", [path for path in TEMPLATES if path.stem != "evaluate"], ids=lambda path: path.stem
)
def test_training_templates_request_whole_nodes_and_a_warning(template: Path) -> None:
    options = header(template)
    shape = {name: options[name] for name in ("ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "signal")}
    assert shape == {
        "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "16", "mem": "0", "signal": "B:USR1@600",
    }  # fmt: skip
    assert {"exclusive", "requeue", "open-mode", "output"} <= set(options)
    assert not {"partition", "account", "qos"} & set(options), "a site's names belong into slurm/site.env"


def test_the_table_of_section_42_lists_every_run_once() -> None:
    text = (ROOT / "slurm/section42.sbatch").read_text()
    runs = re.findall(r'"(\w+) (\d+)"', text.partition("RUNS=(")[2].partition("\n)")[0])
    assert runs == [(name, str(seed)) for name in ("pretrain", "causal", "mma") for seed in (1, 2, 3)]
    steps = {}
    for name in ("pretrain", "causal", "mma"):
        config = ROOT / f"configs/section42/{name}.yaml"
        run = load_run(["--config", str(config)], default_config=config, prog="sft.py", description="")
        steps[name, run.attention.rule] = run.train.steps
    assert steps == {("pretrain", "causal"): 50_000, ("causal", "causal"): 5_000, ("mma", "mma"): 5_000}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run.dir", "elsewhere"], "use AKI_RUN=FOLDER sbatch ... instead of --run.dir"),
        (["--config=other.yaml"], "use AKI_CONFIG=FILE sbatch ... instead of --config=other.yaml"),
    ],
)
def test_flags_that_the_batch_script_must_know_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run_template(tmp_path, "sft_aki4b", *arguments)
    assert result.returncode == 2 and message in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_wrong_folder_and_a_missing_site_file_are_named(tmp_path: Path) -> None:
    elsewhere = run_template(tmp_path, "sft_aki4b", SLURM_SUBMIT_DIR=str(tmp_path))
    assert elsewhere.returncode == 2 and "submit from the root of the checkout" in elsewhere.stderr
    siteless = run_template(tmp_path, "sft_aki4b", AKI_SITE="/nowhere/site.env")
    assert siteless.returncode == 2 and "there is no site file /nowhere/site.env" in siteless.stderr


def test_a_done_run_is_not_started_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/DONE").touch()
    result = run_template(tmp_path, "sft_aki4b")
    assert result.returncode == 0 and "the run is done" in result.stdout
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["DONE"]
    longer = run_template(tmp_path, "sft_aki4b", "--allow_change", "train.steps", "--train.steps", "11000")
    assert "the run is done" not in longer.stdout, "the launcher decides whether it goes on"


def run_template(folder: Path, name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script of a job outside any job, to test what happens before it calls Slurm."""
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        ["bash", str(ROOT / f"slurm/{name}.sbatch"), *arguments], capture_output=True, text=True, timeout=60,
        env=job | {"AKI_RUN": str(folder / "run")} | environment,
    )  # fmt: skip

"""The papers' published rows of the twelve columns, and which of the numbers are in doubt.

v1 is the first version of the paper, "later" its later version. Where a table of details contradicts a headline, the
cell is in doubt and DOUBTS says why.
"""

from dataclasses import dataclass

from aki_megatron.evaluate.benchmarks.score import PAPER_COLUMNS


@dataclass(frozen=True)
class PublishedRow:
    """One row: ``values`` in the order of PAPER_COLUMNS."""

    name: str
    values: tuple[float, ...]

    @property
    def columns(self) -> dict[str, float]:
        """The values by column."""
        return dict(zip(PAPER_COLUMNS, self.values, strict=True))


def _row(name: str, values: str) -> PublishedRow:
    return PublishedRow(name, tuple(map(float, values.split())))


PHI = "Phi-3.5-mini"
PUBLISHED = (
    _row("AKI-4B (v1)", "1491.9 362.9 73.1 69.4 74.6 38.7 32.1 86.9 40.8 58.9 62.1 71.8"),
    _row("AKI-4B (later)", "1491.9 362.9 73.1 69.4 74.6 38.7 32.1 88.1 40.8 62.9 62.3 71.8"),
    _row(f"{PHI} MMA (v1)", "1363.7 315.4 71.8 67.1 59.6 37.3 26.4 82.7 30.2 52.3 57.8 64.1"),
    _row(f"{PHI} MMA (later)", "1363.7 315.4 71.8 67.1 59.6 39.4 26.4 82.7 30.2 52.3 57.8 64.1"),
    _row(f"{PHI} causal, I&T+I&T", "1226.3 258.2 64.9 64.1 47.0 31.1 24.2 79.8 24.3 50.6 45.2 54.3"),
    _row(f"{PHI} CCA", "1212.7 243.6 67.4 65.3 54.0 34.6 25.6 81.9 29.0 52.7 56.0 62.8"),
    _row(f"{PHI} MA (later)", "1271.1 280.8 68.3 65.0 52.8 35.1 21.3 82.2 29.3 51.5 54.4 59.5"),
    _row(f"{PHI} w/o T&I pretraining", "1046.3 226.4 31.7 45.1 38.1 27.2 23.8 65.0 17.2 40.1 53.2 54.8"),
    _row(f"{PHI} w/o I&T pretraining", "1013.2 208.6 32.0 43.3 37.9 27.7 22.4 70.4 20.6 39.5 55.4 53.0"),
    _row(f"{PHI} w/o T&I fine-tuning", "1194.8 289.3 58.5 61.1 40.2 28.0 21.9 79.0 22.8 47.8 41.4 63.0"),
    _row(f"{PHI} w/o I&T fine-tuning", "1166.2 264.3 58.4 60.8 36.9 26.7 23.1 76.8 20.4 46.9 43.3 61.2"),
    _row(f"{PHI} DOT", "1267.8 251.4 43.8 54.7 47.5 30.7 25.6 82.7 25.0 50.5 52.2 58.1"),
    _row(f"{PHI} DOT-2x (later)", "1311.9 276.5 54.0 64.6 51.2 36.6 25.3 84.4 29.9 50.5 52.6 61.4"),
    _row("LLaMA-3.2-3B causal (later)", "1179.0 215.1 57.2 60.8 41.5 23.4 20.6 74.9 21.8 41.7 40.4 49.8"),
    _row("LLaMA-3.2-3B CCA (later)", "1196.8 221.9 60.3 61.4 48.9 25.6 21.1 76.5 26.6 43.9 48.1 52.3"),
    _row("LLaMA-3.2-3B MA (later)", "1214.0 235.6 60.7 61.0 49.0 28.5 20.8 77.3 27.9 42.8 47.2 52.9"),
    _row("LLaMA-3.2-3B DOT (later)", "1219.5 223.0 46.9 55.7 43.8 23.9 22.8 77.0 22.7 42.0 46.7 52.9"),
    _row("LLaMA-3.2-3B MMA (later)", "1258.2 263.8 64.6 65.0 53.7 37.1 22.8 79.2 29.1 44.7 50.4 54.1"),
    _row("Qwen2.5-3B causal (later)", "1278.4 266.2 66.4 65.2 50.1 32.0 24.0 79.6 26.1 50.8 48.5 57.2"),
    _row("Qwen2.5-3B CCA (later)", "1296.7 273.1 68.7 66.4 55.3 34.5 25.3 81.4 29.6 52.9 54.7 61.5"),
    _row("Qwen2.5-3B MA (later)", "1324.9 293.0 70.1 66.1 54.6 36.0 23.7 82.1 30.0 52.3 53.9 62.8"),
    _row("Qwen2.5-3B DOT (later)", "1315.4 269.4 46.8 66.8 48.9 32.7 26.1 82.9 26.7 51.2 51.6 61.2"),
    _row("Qwen2.5-3B MMA (later)", "1408.6 327.5 73.3 68.1 60.7 40.9 27.0 84.4 31.5 54.1 57.1 65.2"),
)

DOUBTS: dict[tuple[str, str], str] = {
    ("AKI-4B (v1)", "MMB"): "the categories weighted by their counts give 72.1",
    ("AKI-4B (later)", "MMB"): "the categories weighted by their counts give 72.1",
    ("AKI-4B (v1)", "SEED"): "the categories give 67.2",
    ("AKI-4B (later)", "SEED"): "the categories give 67.2",
    ("AKI-4B (v1)", "MathV"): "the tasks give 30.1",
    ("AKI-4B (later)", "MathV"): "the tasks give 30.1",
    ("AKI-4B (v1)", "MMMU"): "the subjects are of the 150 dev questions",
    ("AKI-4B (later)", "MMMU"): "the subjects are of the 150 dev questions",
    ("AKI-4B (later)", "POPE"): "neither F1 (86.9) nor accuracy (87.4) of the details",
    ("AKI-4B (v1)", "RWQA"): "no whole number of 765 questions gives 58.9",
    ("AKI-4B (later)", "RWQA"): "v1 has 58.9",
    ("AKI-4B (later)", "CV2D"): "its own details give 62.1",
    (f"{PHI} MMA (v1)", "MMEP"): "the subtasks sum to 1344.9",
    (f"{PHI} MMA (later)", "MMEP"): "the subtasks sum to 1344.9",
    (f"{PHI} MMA (v1)", "MMB"): "the categories give 70.3",
    (f"{PHI} MMA (later)", "MMB"): "the categories give 70.3",
    (f"{PHI} MMA (v1)", "MMMU"): "the subjects are of the 150 dev questions",
    (f"{PHI} MMA (later)", "MMMU"): "the subjects have a mean of 40.0",
    (f"{PHI} causal, I&T+I&T", "MathV"): "the tasks give 22.4",
    (f"{PHI} MA (later)", "MathV"): "the tasks give 24.6",
    (f"{PHI} MA (later)", "MMB"): "the categories give 65.7",
    (f"{PHI} MA (later)", "POPE"): "the details are inconsistent",
}
"""(row, column) -> why the number is in doubt."""

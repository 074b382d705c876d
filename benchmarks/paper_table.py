"""The paper's tables for a small model: every recipe and control on the same questions, with intervals.

Rows that are trained for it are read from --runs, where `benchmarks/study.py --work` has left them. The table is made
in as many sittings as it takes.

    python benchmarks/paper_table.py --data-dir my-data --work table-runs --rows base shipped shipped_4
    python benchmarks/paper_table.py --data-dir my-data --work table-runs --runs study-runs --rows autoregressive exact
    python benchmarks/paper_table.py --report-only
"""

from __future__ import annotations

from eval_tables import Row, Table

from anyorder import DEFAULT_MODEL

FOURS = ("--group-size", "4", "--policy", "groupwise:size=4")
ROWS = {
    "base": Row("the base, nothing trained", model="smollm2-135m", infills="_prefix_only"),
    "autoregressive": Row("AR fine-tuning (control)", infills="_prefix_only"),
    "masked_diffusion": Row("masked diffusion (control)", ("--policy", "dynamic:criterion=confidence,step_size=1")),
    "paper": Row("A3's recipe, all weights"),
    "exact": Row("exact recipe, all weights"),
    "shipped": Row("exact recipe, gated: shipped", model=DEFAULT_MODEL),
    "shipped_4": Row("the same in groups of 4", FOURS, model=DEFAULT_MODEL),
    "shipped_4_uncoupled": Row("the same, groups of 4 uncoupled", (*FOURS, "--uncoupled"), model=DEFAULT_MODEL),
}
COLUMNS = (
    ("TriviaQA", "triviaqa", "accuracy"),
    ("HellaSwag", "hellaswag", "accuracy"),
    ("WinoGrande", "winogrande", "accuracy"),
    ("SIQA", "siqa", "accuracy"),
    ("PIQA", "piqa", "accuracy"),
    ("LAMBADA", "lambada", "accuracy"),
    ("infill ROUGE-1", "stories", "rouge1"),
    ("ROUGE-2", "stories", "rouge2"),
    ("ROUGE-L", "stories", "rougeL"),
    ("infill nats a token", "stories", "nats_per_token"),
)
TABLE = Table(ROWS, COLUMNS, "results")

if __name__ == "__main__":
    TABLE.main(__doc__)

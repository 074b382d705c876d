"""A line of a program missing: a code model's own fill-in-the-middle tokens, and any order on the same model, by how
many tokens an adapter was trained on.

The table is made in as many sittings as it takes. Rows but the first are checkpoints in --runs, each a directory of the
row's name; what the base's own tokens fill in does not depend on a gated adapter, and is asked of the first alone.

    python benchmarks/code_infilling.py --data-dir my-data --work code-runs --dtype bfloat16 --limit 100 \\
        --rows untrained --runs checkpoints
    python benchmarks/code_infilling.py --report-only
"""

from __future__ import annotations

from eval_tables import Row, Table

TOKENS = (54, 122, 210, 299, 401)
"""Thousands that a checkpoint has read."""
ROWS = {
    "untrained": Row("nothing trained", ("--execute-code",), model="qwen2.5-coder-0.5b-instruct.gguf"),
    **{f"after_{n}k": Row(f"{n},000 tokens", ("--execute-code",)) for n in TOKENS},
}
WAYS = {
    "its own tokens": "humaneval_infilling_fim",
    "true length": "humaneval_infilling",
    "a length that it finds": "humaneval_infilling_indented",
    "the likeliest of sixteen lengths": "humaneval_infilling_tries",
}
METRICS = {"passes": "pass_at_1", "the very line": "exact_match"}
COLUMNS = tuple((f"{way}: {name}", task, metric) for way, task in WAYS.items() for name, metric in METRICS.items())
TABLE = Table(ROWS, COLUMNS, "code_infilling")

if __name__ == "__main__":
    TABLE.main(__doc__)

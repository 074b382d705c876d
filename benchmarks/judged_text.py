"""What text is worth by how it is drawn: policies and sizes of groups under a judge, with and without coupling.

The form of A3's second table and third figure (arXiv 2601.13228): continuations of documents and missing sentences of
stories, how likely another model finds them, how varied they are, and in how many steps they were written. The table is
made in as many sittings as it takes.

    python benchmarks/judged_text.py --data-dir my-data --work judged-runs --rows base ones fours fours_uncoupled
    python benchmarks/judged_text.py --report-only
"""

from __future__ import annotations

from eval_tables import Row, Table

from anyorder import DEFAULT_MODEL


def shipped(title: str, policy: str, *more: str) -> Row:
    """The shipped adapter, drawn from by a policy."""
    return Row(title, ("--policy", policy, *more), model=DEFAULT_MODEL)


ROWS = {
    "base": Row("the base, from left to right", model="smollm2-135m"),
    "ones": shipped("shipped, from left to right", "groupwise:size=1"),
    "speculative": shipped("exact speculation", "speculative:draft=state,draft_length=2"),
    "twos": shipped("groups of 2", "groupwise:size=2"),
    "fours": shipped("groups of 4", "groupwise:size=4"),
    "fours_uncoupled": shipped("groups of 4, uncoupled", "groupwise:size=4", "--uncoupled"),
    "eights": shipped("groups of 8", "groupwise:size=8"),
    "eights_uncoupled": shipped("groups of 8, uncoupled", "groupwise:size=8", "--uncoupled"),
    "entropy_1": shipped("dynamic by entropy, 1 a step", "dynamic:criterion=entropy,step_size=1"),
    "entropy_4": shipped("dynamic by entropy, 4 a step", "dynamic:criterion=entropy,step_size=4"),
    "entropy_4_uncoupled": shipped(
        "dynamic by entropy, 4 a step, uncoupled", "dynamic:criterion=entropy,step_size=4", "--uncoupled"
    ),
    "confidence_4": shipped("dynamic by confidence, 4 a step", "dynamic:criterion=confidence,step_size=4"),
}
COLUMNS = (
    ("continuations: nats a token", "continuations", "judge_nats_per_token"),
    ("entropy", "continuations", "entropy"),
    ("distinct-2", "continuations", "distinct_2"),
    ("repeated 4-grams", "continuations", "repetition_4"),
    ("steps a token", "continuations", "steps_per_token"),
    ("missing sentence: nats a token", "fills", "judge_nats_per_token"),
    ("of what follows it", "fills", "judge_nats_per_token_behind"),
    ("steps a token", "fills", "steps_per_token"),
)
TABLE = Table(ROWS, COLUMNS, "judged_text")

if __name__ == "__main__":
    TABLE.main(__doc__)

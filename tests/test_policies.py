"""Policies written as text."""

from __future__ import annotations

import pytest

from anyorder import policies


def test_a_policy_can_be_written_as_text():
    assert policies.parse("groupwise") == policies.groupwise()
    assert policies.parse("groupwise:size=4") == policies.groupwise(4)
    assert policies.parse("dynamic:criterion=entropy,step_size=4,reencode=true") == policies.dynamic(
        "entropy", step_size=4, reencode=True
    )
    assert policies.parse("dynamic:threshold=0.9") == policies.dynamic(threshold=0.9)
    assert policies.parse("speculative:draft=ngram,draft_length=auto") == policies.speculative(
        draft="ngram", draft_length="auto"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("greedy", "no policy 'greedy': use groupwise, dynamic or speculative"),
        ("dynamic:step=4", "unknown option 'step'; did you mean 'step_size'"),
        ("dynamic:step_size", "policy option 'step_size' must be NAME=VALUE"),
        ("dynamic:step_size=many", "step_size must be a whole number, at least 1, got 'many'"),
        ("dynamic:threshold=high", "threshold must be a finite number, got 'high'"),
    ],
)
def test_mistakes_in_a_policy_as_text(text, message):
    with pytest.raises(ValueError, match=message):
        policies.parse(text)

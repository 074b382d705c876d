from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from anyorder import AnyOrderForCausalLM, Infiller
from anyorder.decoding.constraints import JsonSchema, Pattern
from anyorder.infill import lengths, lookahead, seeking
from anyorder.infill.lengths import LengthPrior, Tries, candidates
from anyorder.infill.template import Template
from anyorder.scoring import conditional_log_likelihood
from architectures import base_model, converted, gated

PRIOR = LengthPrior(behind=0.9, length=-0.3, log_length=1.2, opening_length=0.1, opening_log_length=0.4)
TEXT = "a dog ___ the cat and ___ home."


@pytest.fixture(scope="module")
def infiller(byte_tokenizer: PreTrainedTokenizerFast) -> Infiller:
    return Infiller(converted("llama", vocabulary=len(byte_tokenizer)), byte_tokenizer, length_prior=PRIOR)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers() | st.tuples(st.integers(), st.integers()) | st.text() | st.none() | st.lists(st.integers(1, 9)))
def test_a_length_is_read_or_refused(length):
    try:
        tried = candidates(length, 2)
    except ValueError as error:
        told = str(error)
    else:
        assert len(tried) == 2
        assert all(list(one) == sorted(set(one)) and one[0] >= 1 for one in tried)
        return
    assert repr(length) in told or f"{len(length)} lengths" in told


def test_lengths_of_blanks():
    assert candidates(3, 2) == [(3,), (3,)]
    assert candidates([(2, 4), "auto"], 2) == [(2, 3, 4), lengths.AUTO]
    with pytest.raises(ValueError, match=r"got \(4, 2\)"):
        candidates((4, 2), 1)


@pytest.mark.parametrize("opens", [False, True])
def test_the_score_is_evidence_and_prior(opens):
    tries = Tries(torch.tensor([1, 3]), torch.tensor([-5.0, -4.0]), opens)
    found = LengthPrior(2.0, -0.5, 0.3, 0.1, 0.2).log_probabilities(tries).exp()
    length, log_length = (-0.4, 0.5) if opens else (-0.5, 0.3)
    expected = torch.tensor([-10.0 + length, -8.0 + 3 * length + log_length * math.log(3)], dtype=torch.float64)
    assert found.tolist() == pytest.approx(expected.softmax(dim=0).tolist())


def test_fitting_recovers_the_weights_that_lengths_were_drawn_with():
    source, true = seeded(), LengthPrior(0.8, -0.3, 1.2, 0.2, -0.7)
    cases = []
    for case in range(3000):
        tries = Tries(torch.arange(1, 9), -6 * torch.rand(8, generator=source), opens=case % 2 == 0)
        index = int(torch.multinomial(true.log_probabilities(tries).exp(), 1, generator=source))
        cases.append((tries, index))
    found = lengths.fit(cases, penalty=0)
    for name, value in vars(true).items():
        assert getattr(found, name) == pytest.approx(value, abs=0.2), name
    with pytest.raises(ValueError, match="no cases"):
        lengths.fit([])


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=20))
def test_a_sentence_is_off_by_the_fewest_tokens_and_other_blanks_are_likeliest_met(weights):
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    tokens = torch.arange(len(weights))
    off = [float((shares * (tokens - n).abs()).sum()) for n in range(len(weights))]
    assert off[lengths.chosen(shares, opens=True)] == pytest.approx(min(off))
    assert weights[lengths.chosen(shares, opens=False)] == max(weights)


@pytest.mark.parametrize("sample", [False, True])
def test_the_result_is_that_of_the_lengths_it_names(infiller, sample):
    source, again = seeded(1), seeded(1)
    found = infiller(TEXT, length=[(2, 5), "auto"], generator=source, do_sample=sample)
    own = [
        list(span.lengths)[lengths.chosen(torch.tensor(list(span.lengths.values())), opens=False)]
        for span in found.spans
    ]
    fixed = infiller(TEXT, length=own, generator=again, do_sample=sample)
    assert found.text == fixed.text
    assert found.log_prob == pytest.approx(fixed.log_prob, abs=1e-4)
    assert [span.tokens for span in found.spans] == own
    assert torch.equal(source.get_state(), again.get_state()), "seeking lengths drew something"
    assert fixed.forwards < found.forwards <= fixed.forwards + 2
    for span, tried in zip(found.spans, [range(2, 6), lengths.AUTO], strict=True):
        assert list(span.lengths) == list(tried)
        assert sum(span.lengths.values()) == pytest.approx(1)


def evidence(infiller: Infiller, before: str, gap: int, behind: str) -> float:
    """log p of the first token of a text so many tokens behind another, by itself."""
    start = [infiller.start_token_id, *infiller.pieces.encode(before, at_start=True)]
    ids = torch.tensor([[*start, *[0] * gap, infiller.pieces.encode(behind)[0]]])
    return float(conditional_log_likelihood(infiller.model, ids, [len(start) + gap], range(len(start))))


def test_probabilities_of_lengths_are_those_of_every_length_alone(infiller):
    """The slow twin, once with a text long enough to be encoded once for all."""
    for before in ("a dog", "Once there was a dog who chased"):
        found = infiller(f"{before} ___ the cat.", length=(1, 6)).spans[0].lengths
        behind = torch.tensor([evidence(infiller, before, n, " the cat.") for n in range(1, 7)])
        assert list(found.values()) == pytest.approx(shares(range(1, 7), behind), abs=1e-5)


def shares(lengths: Iterable[int], behind: Tensor, opens: bool = False, beside: Tensor | None = None) -> list[float]:
    tries = Tries(torch.tensor(list(lengths)), behind, opens, beside)
    return PRIOR.log_probabilities(tries).exp().tolist()


def test_another_blank_is_neither_read_nor_evidence(infiller):
    found = infiller("a ___ cat ___", length=[(2, 3), (1, 4)]).spans[1].lengths  # nothing stands behind the second
    assert list(found.values()) == pytest.approx(shares(range(1, 5), torch.zeros(4)))
    beside = infiller("ab@@cat", blank="@", length=[(2, 3), 3]).spans[0].lengths  # what stands behind both
    behind = torch.tensor([evidence(infiller, "ab", n + 3, "cat") for n in (2, 3)])
    assert list(beside.values()) == pytest.approx(shares((2, 3), behind), abs=1e-5)


def test_neighbours_of_unknown_length_count_with_all_their_lengths(infiller):
    """No length is made up for a blank that is not sought yet."""
    first, second = infiller("ab@@cat", blank="@", length=[(1, 3), (2, 5)]).spans
    own = PRIOR.log_probabilities(Tries(torch.arange(2, 6), torch.zeros(4), opens=False)).exp()
    behind = torch.tensor([[evidence(infiller, "ab", n + m, "cat") for m in range(2, 6)] for n in range(1, 4)])
    assert list(first.lengths.values()) == pytest.approx(shares(range(1, 4), behind, beside=own), abs=1e-5)
    behind = torch.tensor([evidence(infiller, "ab", first.tokens + m, "cat") for m in range(2, 6)])
    assert list(second.lengths.values()) == pytest.approx(shares(range(2, 6), behind), abs=1e-5)


@pytest.mark.parametrize("kind", ["exact", "paper", "gated"])
def test_blanks_of_one_text_are_sought_one_after_the_other(byte_tokenizer, kind):
    """Against a forward for each length: of the fixed tokens in front, at the lengths found so far, and no other."""
    size = {"vocabulary": len(byte_tokenizer)}
    model = gated("llama", **size) if kind == "gated" else converted("llama", kind, **size)
    infiller = Infiller(model, byte_tokenizer, length_prior=PRIOR)
    pieces = ["a dog", " and the", " b", " home"]
    found = infiller(" ___".join(pieces), length=(1, 3))
    end, known = 1, [(0, infiller.start_token_id)]
    for piece, behind, span in zip(pieces, pieces[1:], found.spans, strict=False):
        tokens = infiller.pieces.encode(piece, at_start=end == 1)
        known += enumerate(tokens, end)
        end += len(tokens)
        given, (token, *_) = [column for column, _ in known], infiller.pieces.encode(behind)
        log_probs = []
        for n in range(1, 4):
            row = torch.zeros(1, end + n + 1, dtype=torch.int64)
            row[0, given] = torch.tensor([known_token for _, known_token in known])
            row[0, -1] = token
            log_probs.append(float(conditional_log_likelihood(model, row, [end + n], given)))
        assert list(span.lengths.values()) == pytest.approx(shares(range(1, 4), torch.tensor(log_probs)), abs=1e-5)
        end += span.tokens


@pytest.mark.parametrize(
    ("text", "opens"),
    [("___ she said.", True), ("It was.  ___", True), ('He: "No!" ___ x', True), ("多い。___", True),
     ("an ___ x", False), ("Mr, ___", False), ("___ ___", True)],
)  # fmt: skip
def test_where_a_sentence_begins(infiller, text, opens):
    template = Template.parse(text)
    assert [template.opens_a_sentence(k) for k in range(template.blanks)] == [opens, False][: template.blanks]
    other = dataclasses.replace(PRIOR, opening_length=5.0)
    again = Infiller(infiller.model, infiller.pieces.tokenizer, length_prior=other)
    found, twin = (one(text, length=(1, 2)).spans[0].lengths for one in (infiller, again))
    assert (found != pytest.approx(twin)) is opens


def test_texts_of_known_and_unknown_lengths_are_each_as_alone(infiller):
    texts = ["a ___ b", "the cat sat on ___ and slept"]
    together = infiller(texts, length=(1, 4), generator=[seeded(1), seeded(2)])
    alone = [infiller(text, length=(1, 4), generator=[seeded(n)]) for n, text in enumerate(texts, 1)]
    assert [one.text for one in together] == [one.text for one in alone]
    assert infiller("a ___ b", length=(3, 3)) == infiller("a ___ b", length=3)


def test_texts_share_forwards_as_far_as_memory_goes(infiller, monkeypatch):
    texts = ["a ___ b", "the cat sat on ___ and ___ c", "a ___ bc ___ d ___ e", "ab ___"]
    monkeypatch.setattr(lookahead, "WAVE_ROWS", 0)  # one gap of a text after the other
    together = infiller(texts, length=(1, 4))
    monkeypatch.setattr(lookahead, "BATCH_ROWS", 1)
    alone = infiller(texts, length=(1, 4))
    fills = max(sum(span.tokens for span in one.spans) for one in together)
    assert together[0].forwards == fills + 3  # as many as the text has blanks that has the most
    assert alone[0].forwards == fills + 1 + 2 + 3  # nothing stands behind the last text's
    for one, other in zip(together, alone, strict=True):
        assert one.text == other.text
        for span, twin in zip(one.spans, other.spans, strict=True):
            assert list(span.lengths.values()) == pytest.approx(list(twin.lengths.values()), abs=1e-5)


def test_a_pattern_allows_some_lengths_only(infiller):
    found = infiller("in ___ days", length="auto", constraints=Pattern("(aa|bbbb)"))
    assert list(found.spans[0].lengths) == [2, 3, 4, 5]  # the space is a token of its own, or the first letter's
    with pytest.raises(ValueError, match="lengths that do: possible: 2 to 5"):
        infiller("in ___ days", length=(6, 9), constraints=Pattern("(aa|bbbb)"))


def test_a_pattern_without_a_length_gets_one_that_it_allows(infiller, monkeypatch):
    assert infiller("in ___ days", constraints=Pattern("[0-9]{13}")).spans[0].text.isdecimal()  # 13 is not in AUTO
    filled = infiller("x: ___, y", constraints=JsonSchema({"enum": ["a", "bcbc"]}))
    assert json.loads(filled.spans[0].text) in ("a", "bcbc")
    monkeypatch.setattr(seeking, "PATTERN_LENGTHS", (4, 16))
    assert list(infiller("in___", constraints=Pattern("(c{3}|c{7}|c{9})")).spans[0].lengths) == [3]
    assert list(infiller("in___", constraints=Pattern("(c{7}|c{9})")).spans[0].lengths) == [7, 9]


def test_lengths_are_sought_unless_given(infiller):
    assert list(infiller(TEXT).spans[0].lengths) == list(lengths.AUTO)


def test_lengths_that_do_not_fit_the_context_are_not_tried(infiller, monkeypatch):
    monkeypatch.setattr(infiller.model.causal_lm.config, "max_position_embeddings", 16)
    assert list(infiller("0123456789___", length="auto").spans[0].lengths) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="the model's context is 16"):
        infiller("0123456789___", length=(7, 9))


# ---------------------------------------------------------------------- whose prior


@pytest.mark.parametrize("adapter", [None, "gated"])
def test_a_prior_travels_with_its_model(tmp_path, checkpoint, byte_tokenizer, caplog, adapter):
    model = AnyOrderForCausalLM.from_causal_lm(str(checkpoint), adapter=adapter)
    model.config.length_prior = dataclasses.asdict(PRIOR)
    model.save_pretrained(tmp_path)
    again = AnyOrderForCausalLM.from_pretrained(tmp_path)
    expected = Infiller(model, byte_tokenizer, length_prior=PRIOR)("a ___ b").spans[0].lengths
    assert Infiller(again, byte_tokenizer)("a ___ b").spans[0].lengths == pytest.approx(expected)
    other = Infiller(again, byte_tokenizer, length_prior=lengths.NEUTRAL)("a ___ b").spans[0].lengths
    assert other != pytest.approx(expected)
    assert not caplog.records


def test_a_model_without_a_prior_gets_a_neutral_one_and_says_so_once(byte_tokenizer, caplog):
    seeking._warn_of_no_prior.cache_clear()
    model = converted("llama", vocabulary=len(byte_tokenizer))
    infiller = Infiller(model, byte_tokenizer)
    infiller("a ___ b", length=3)
    assert not caplog.records
    found = infiller("a ___ b").spans[0].lengths
    infiller("a ___ b")
    (record,) = caplog.records
    assert "anyorder fit-lengths" in record.message
    assert found == Infiller(model, byte_tokenizer, length_prior=lengths.NEUTRAL)("a ___ b").spans[0].lengths


def test_the_neutral_prior_is_mild():
    """Without evidence: the means that its docstring names."""
    n = torch.arange(1, 200)
    for opens, mean in ((False, 4), (True, 10)):
        shares = lengths.NEUTRAL.log_probabilities(Tries(n, torch.zeros(len(n)), opens)).exp()
        assert float((shares * n).sum()) == pytest.approx(mean, abs=0.5)
    assert lengths.NEUTRAL.behind == 1


def test_a_prior_that_is_none_is_one_error(byte_tokenizer):
    model = AnyOrderForCausalLM.from_causal_lm(base_model("llama", len(byte_tokenizer)))
    for weights in ({"length": 1.0}, "shipped", {**dataclasses.asdict(PRIOR), "more": 1.0}):
        model.config.length_prior = weights
        with pytest.raises(ValueError, match="a length prior has behind, length, log_length, .* got"):
            Infiller(model, byte_tokenizer)
    with pytest.raises(ValueError, match="length of a length prior must be a finite number, got nan"):
        LengthPrior(1.0, math.nan, 0.0, 0.0, 0.0)

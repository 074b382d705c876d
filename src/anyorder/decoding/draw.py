"""The one place where tokens are drawn: from evaluated positions, by the sampler, the constraints and what is forced.

Policies choose positions; what is put there is decided here. A draft d that was drawn from a distribution q is accepted
with probability min(1, pi(d) / q(d)); at the first that is not, the token is drawn from what is left of pi,
max(pi - q, 0); if all are, one more is drawn from pi (arXiv 2211.17192).

Shapes: B batch, T columns, N evaluated positions, K drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList

from anyorder.decoding.constraints import BlankConstraints
from anyorder.decoding.sampling import Sampler, drawn, inverse_cdf, token_log_probs

NOT_FORCED = -100
"""In `forced_ids`: the position is drawn, not forced (the id that Hugging Face ignores in labels)."""


@dataclass(frozen=True)
class Evaluated:
    """Positions that a forward has evaluated."""

    row: Tensor
    """(N,) int64, on the CPU like the next two."""
    column: Tensor
    """(N,) int64."""
    hi: Tensor
    """(N,) int64: the rank up to which each reads."""
    logits: Tensor
    """(N, V) float32, the model's own, of each position alone."""
    hidden: Tensor | None = None
    """(N, E) hidden states, where members of a group are coupled."""

    def take(self, chosen: Tensor) -> Evaluated:
        """Those where (N,) bool `chosen`, or with (n,) int64 numbers, in their order."""
        if chosen.dtype == torch.bool:
            if bool(chosen.all()):
                return self
            chosen = chosen.nonzero()[:, 0]  # once, not by each of the fields
        at = chosen.to(self.logits.device)
        hidden = None if self.hidden is None else self.hidden[at]
        return Evaluated(self.row[chosen], self.column[chosen], self.hi[chosen], self.logits[at], hidden)

    def between(self, first: int, end: int) -> Evaluated:
        """Those from one on up to another, without a copy."""
        part = slice(first, end)
        hidden = None if self.hidden is None else self.hidden[part]
        return Evaluated(self.row[part], self.column[part], self.hi[part], self.logits[part], hidden)


SMALL = torch.finfo(torch.float32).tiny
"""Below it, probabilities have fewer digits."""


@dataclass(frozen=True)
class Distribution:
    """What the tokens of evaluated positions are drawn from."""

    found: Evaluated
    processed: Tensor
    """(N, V) logits after the sampler's settings; what may not be drawn is -inf."""
    probs: Tensor | None
    """(N, V) float32; None: the most likely token is taken."""

    def log_probs(self, token: Tensor) -> Tensor:
        """(N,) float32 on the CPU: log p of (N,) tokens under the model itself, before any setting, in nats."""
        token = token.to(self.processed.device)
        if self.probs is not None and self.processed is self.found.logits:  # nothing was changed: they are the model's
            own = self.probs.gather(1, token[:, None])[:, 0].cpu()
            if bool((own >= SMALL).all()):
                return own.log()
        return token_log_probs(self.found.logits, token).cpu()


@dataclass(frozen=True)
class Drafts:
    """Guesses for the next positions of each row, in the order of the run."""

    tokens: Tensor
    """(B, K) int64."""
    counts: Tensor
    """(B,) int64: how many of them a row has; they are its first."""
    probs: Tensor | None
    """(B, K, V') float32: what each token was drawn from, which may be the first V' tokens alone; None: the guess is
    certain of itself, or decoding greedy."""

    @classmethod
    def none(cls, rows: int) -> Drafts:
        return cls(torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64), None)

    def trimmed(self) -> Drafts:
        """Without columns that no row uses."""
        K = int(self.counts.max())
        return Drafts(self.tokens[:, :K], self.counts, None if self.probs is None else self.probs[:, :K])


@dataclass(frozen=True)
class Visible:
    """What is known of the text while a step draws."""

    ids: Tensor
    """(B, T) int64, with tokens wherever they are read."""
    ranks: Tensor
    """(B, T + 1) int64: the rank of each column in generation order."""


class Drawer:
    """Draws tokens.

    Args:
        sampler: how.
        blank_constraints: what runs of positions must match; None: anything.
        forced: (B, T) int64 tokens to take instead, `NOT_FORCED` where one is drawn; None: none.
        logits_processor: transformers' own kind, called with exactly the text on the left of a prediction. Where a
            prediction reads anything else, as drafts do, they are not called: only drafts may be drawn there.
        records: keep the logits of each position, before and after the sampler's settings.

    Attributes:
        logits, scores: (B, T, V) float32 with `records`, once something was drawn: for each position the logits that
            its token was drawn from last, unprocessed and processed; 0 where nothing was drawn.
        told: called with the rows, the columns and the model's own logits of what may be drawn; None: nobody is.
    """

    logits: Tensor | None = None
    scores: Tensor | None = None
    told: Callable[[Tensor, Tensor, Tensor], None] | None = None

    def __init__(
        self,
        sampler: Sampler,
        blank_constraints: BlankConstraints | None = None,
        forced: Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        records: bool = False,
    ):
        self.sampler, self.blank_constraints = sampler, blank_constraints
        self.forced = None if forced is None else forced.cpu()
        self.logits_processor, self.records = logits_processor, records

    @property
    def looks_at_tokens(self) -> bool:
        """Whether what may be drawn somewhere depends on what was drawn elsewhere, so that a group is drawn in turn."""
        return self.blank_constraints is not None or self.logits_processor is not None

    @property
    def reads_tokens(self) -> bool:
        """Whether it looks at any of the text at all."""
        return self.looks_at_tokens or self.sampler.repetition_penalty is not None

    @property
    def names_tokens(self) -> bool:
        """Whether anything names tokens of the vocabulary, so that logits must be of all of them."""
        said = self.sampler.allowed, self.sampler.repetition_penalty, self.told, self.forced
        return self.looks_at_tokens or self.records or any(thing is not None for thing in said)

    def distribution(self, found: Evaluated, visible: Visible) -> Distribution:
        """What tokens are drawn from by the settings, which may look at the tokens that each prediction reads.

        Raises:
            ValueError: naming a row and a position where no token is left, or the logits are no numbers.
        """
        logits, row, column = found.logits, found.row, found.column
        if self.blank_constraints is not None:
            mask = self.blank_constraints.mask(row, column, visible.ids, visible.ranks, found.hi)
            logits = logits if mask is None else logits.masked_fill(~mask.to(logits.device), -torch.inf)
        seen = visible.ids[row, :1]
        if self.sampler.repetition_penalty is not None:
            read = visible.ranks[row, : visible.ids.shape[1]] < found.hi[:, None]
            some = visible.ids[row].gather(1, read.to(torch.int8).argmax(dim=1, keepdim=True))
            seen = torch.where(read, visible.ids[row], some)
        custom = None if self.logits_processor is None else lambda scores: self._called(scores, found, visible)
        processed = self.sampler.process(logits, seen, row, column, custom)
        probs = self.sampler.probs(processed)
        # Of logits that are no numbers, or all -inf, no probability is a number.
        good = (processed.amax(dim=-1) if probs is None else probs[:, 0]).isfinite()
        if not bool(good.all()):
            n = int((~good).nonzero()[0])
            raise ValueError(_nothing_to_draw(found.logits[n], int(row[n]), int(column[n])))
        if self.told is not None:
            self.told(row, column, found.logits)
        if self.records:
            self._record(found, processed, visible.ids.shape)
        return Distribution(found, processed, probs)

    def _called(self, scores: Tensor, found: Evaluated, visible: Visible) -> Tensor:
        """(N, V) after the user's processors; rows whose text is as long are handed over together."""
        assert self.logits_processor is not None
        every = torch.arange(visible.ids.shape[1])
        read = visible.ranks[found.row, : len(every)] < found.hi[:, None]
        whole = (read == (every < found.column[:, None])).all(dim=1)
        out = scores.clone()
        for column in found.column[whole].unique().tolist():
            these = (whole & (found.column == column)).nonzero()[:, 0]
            ids = visible.ids[found.row[these], :column].to(scores.device)
            at = these.to(scores.device)
            out[at] = self.logits_processor(ids, scores[at]).to(scores.dtype)
        return out

    def _record(self, found: Evaluated, processed: Tensor, shape: torch.Size) -> None:
        if self.logits is None or self.scores is None:
            self.logits, self.scores = (processed.new_zeros(*shape, processed.shape[1]) for _ in range(2))
        at = found.row.to(processed.device), found.column.to(processed.device)
        self.logits[at], self.scores[at] = found.logits, processed

    def draw(self, found: Evaluated, uniform: Tensor, visible: Visible) -> tuple[Tensor, Distribution]:
        """(N,) tokens on the CPU, and what they were drawn from.

        Args:
            found: the positions.
            uniform: (N,) float64 in [0, 1), one a position.
            visible: what they may look at.
        """
        own = self.distribution(found, visible)
        token = drawn(own.processed, own.probs, uniform)
        return self.or_forced(token, found.row, found.column).cpu(), own

    def verify(
        self,
        found: Evaluated,
        used: Tensor,
        columns: Tensor,
        drafts: Drafts,
        uniforms: tuple[Tensor, Tensor],
        visible: Visible,
    ) -> tuple[Tensor, Tensor, Distribution]:
        """Accept drafts, and draw the token behind them.

        Args:
            found: the positions of the drafts and one more a row, row by row; each reads the drafts before it.
            used, columns: (B, K + 1), which of them a row has, and where they are.
            drafts: the guesses.
            uniforms: (B, T) float64 each, for accepting and for drawing.
            visible: as for `draw`.

        Returns:
            (B,) how many drafts are accepted, (B,) the token behind them (anything where no position is left), and what
            all of `found` are drawn from.
        """
        K, every = drafts.tokens.shape[1], torch.arange(len(used))
        own = self.distribution(found, visible)
        processed, probs = own.processed, own.probs
        number = torch.zeros(used.shape, dtype=torch.int64)  # of each verified position among the N
        number[used] = torch.arange(len(found.row))
        held = torch.arange(K) < drafts.counts[:, None]
        accept = self._accepts(processed, probs, number[:, :K], drafts, uniforms[0].gather(1, columns[:, :K]))
        if self.forced is not None:  # a forced token is its own draft, and the only one that is accepted
            forced = self.forced.gather(1, columns[:, :K])
            accept = torch.where(forced == NOT_FORCED, accept, forced == drafts.tokens)
        accepted = (held & accept).long().cumprod(dim=1).sum(dim=1)
        final = accepted.clamp(max=used.shape[1] - 1)
        last, column = number[every, final], columns[every, final]
        if probs is None:
            return accepted, self.or_forced(processed.argmax(dim=-1).cpu()[last], every, column), own
        rejected = (accepted < drafts.counts).nonzero()[:, 0]
        weights = probs[last.to(probs.device)]
        if len(rejected):
            weights[rejected] = _what_is_left(weights[rejected], drafts, rejected, accepted[rejected])
        token = inverse_cdf(weights, uniforms[1][every, column]).cpu()
        return accepted, self.or_forced(token, every, column), own

    def _accepts(
        self, processed: Tensor, probs: Tensor | None, number: Tensor, drafts: Drafts, uniform: Tensor
    ) -> Tensor:
        """(B, K) bool."""
        if probs is None:
            return processed.argmax(dim=-1).cpu()[number] == drafts.tokens
        at = drafts.tokens.to(probs.device)
        p = probs[number.to(probs.device), at].cpu().double()
        q = torch.ones_like(p)
        if drafts.probs is not None:
            q = drafts.probs.gather(2, at[:, :, None])[:, :, 0].cpu().double()
        return uniform * q < p

    def or_forced(self, token: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """The forced tokens where there are any, else those given."""
        if self.forced is None:
            return token
        forced = self.forced[row, column].to(token.device)
        return torch.where(forced == NOT_FORCED, token, forced)


def _what_is_left(pi: Tensor, drafts: Drafts, row: Tensor, place: Tensor) -> Tensor:
    """What a rejection leaves of pi: max(pi - q, 0)."""
    if drafts.probs is None:
        left = pi.scatter(1, drafts.tokens[row, place][:, None].to(pi.device), 0.0)
    else:
        left = pi.clone()
        left[:, : drafts.probs.shape[2]] -= drafts.probs[row, place]
        left.clamp_(min=0)
    return torch.where(left.sum(dim=1, keepdim=True) > 0, left, pi)  # pi == q, but for rounding


def _nothing_to_draw(logits: Tensor, row: int, column: int) -> str:
    """Why no token can be drawn at a position, given the model's own logits there."""
    if not bool(logits.isfinite().any()) or bool((logits.isnan() | (logits == torch.inf)).any()):
        return f"row {row}, position {column}: the model's logits are not finite numbers; load it in a wider dtype"
    return (
        f"row {row}, position {column}: no token is left to draw; allowed tokens, constraints and logits processors "
        "exclude each other there"
    )

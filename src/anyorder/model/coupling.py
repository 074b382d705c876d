"""Coupling: the chain rule inside a group, without another forward of the decoder.

The tokens of one group are predicted by rows that do not see each other. Coupling lets each member of a group after the
first know the members before it:

    log P(G) = sum_j log p(x_j | all that is visible, x_0, ..., x_{j-1}),   logits_j = head(h_j + delta_j),   j > 0

h_j is the hidden state of the row that predicts the j-th member, computed once for the whole group; delta_j is a small
network of h_j and of the last few members before it with their distances. The first member of a group is left alone,
not given a delta of zero: groups of one, left-to-right text, the rows that verify drafts and the cache are what they
are without coupling, bit for bit.

Relatives: the sampler head of arXiv 2507.11851, Hydra (arXiv 2402.05109).

This module knows hidden states, embeddings and distances; which tokens stand before which is the layout's business.

Shapes: N members of groups, M members before each that it may look at, E hidden size, W width, r rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from anyorder.core.options import check_saved_fields

DISTANCES = (1, 2, 3, 4, 8, 16, 64)
"""Tokens so far away or nearer share their weights, from the next smaller number on; those farther away the last."""
NEAR = 5
"""So many weights are for members up to 8 tokens away, the others for those farther away."""
DRAFTED = 16_384
"""Of so many tokens at least drafts are made, or of a quarter of the vocabulary: its first ones. Tokenizers are built
by merging the most frequent pairs first, so nearly all text is of these, and most of what a draft costs is reading W U.
SmolLM2's whole vocabulary of 49,152 lets 43.3% of first drafts pass, the first 16,384 42.7%, 4,096 40.8%."""


@dataclasses.dataclass(frozen=True)
class Coupling:
    """The size of a coupling.

    Args:
        width: of the network's two hidden layers.
        rank: of the delta: it is U z with z of so many numbers, so that of a linear head W the product W U, made once,
            is all that a member after the first costs.
        window: members before each that it looks at, the nearest.
        drafts: with a second network, which drafts later members from the state of the first one's row.
        scattered: with layers of their own for members whose left neighbour is not a member before them, as in random
            order: what is learned of these takes nothing from groups that stand together.

    Raises:
        ValueError: naming the value that cannot be meant.
    """

    width: int = 1024
    rank: int = 256
    window: int = 7
    drafts: bool = True
    scattered: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "rank", "window"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} of a coupling must be a whole number, at least 1, got {value!r}")
        for name in ("drafts", "scattered"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} of a coupling must be True or False, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Coupling:
        """The coupling of a saved config; ValueError for a field that this version does not know."""
        check_saved_fields(fields, cls, "the coupling")
        return cls(**({"scattered": False} | fields))  # older ones do not say it


class Layers(nn.Module):
    """Two layers, from a hidden state and what members say to z, the numbers of which a delta is made.

    Args:
        hidden_size: E, of the hidden states that the head takes.
        coupling: its size.
    """

    always: tuple[int, ...] = (0,)
    """Numbers of distances that have each parameter of members in the graph, whatever members there are."""

    def __init__(self, hidden_size: int, coupling: Coupling):
        super().__init__()
        self.state = nn.Linear(hidden_size, coupling.width)
        self.inner = nn.Linear(coupling.width, coupling.width)
        self.down = nn.Linear(coupling.width, coupling.rank, bias=False)

    def of_state(self, hidden: Tensor) -> Tensor:
        """(N, W) what (N, E) hidden states add to the first layer; in the dtype of the weights."""
        return product(_unit(hidden, self.state.weight.dtype), self.state.weight) + self.state.bias

    def of_sum(self, x: Tensor) -> Tensor:
        """(N, r) z of (N, W) sums in the first layer."""
        x = product(nn.functional.silu(x), self.inner.weight) + self.inner.bias
        return product(nn.functional.silu(x), self.down.weight)

    def of_member(self, number: int, shared: Tensor) -> Tensor:
        """(W, embedding size) of members at distances of that number, of (D, W, embedding size) that all share."""
        return shared[number]

    def of_members(self, shared: Tensor) -> Tensor:
        """(D, W, embedding size): all of them."""
        return shared


class ScatteredLayers(Layers):
    """Layers with weights of their own for members that are far away.

    Args:
        hidden_size, coupling: as of others.
        embedding_size: of the token embeddings.
    """

    always = 0, NEAR

    def __init__(self, hidden_size: int, embedding_size: int, coupling: Coupling):
        super().__init__(hidden_size, coupling)
        self.far = nn.Parameter(torch.empty(len(DISTANCES) + 1 - NEAR, coupling.width, embedding_size))
        nn.init.uniform_(self.far, -(embedding_size**-0.5), embedding_size**-0.5)

    def of_member(self, number: int, shared: Tensor) -> Tensor:
        return shared[number] if number < NEAR else self.far[number - NEAR]

    def of_members(self, shared: Tensor) -> Tensor:
        return torch.cat([shared[:NEAR], self.far])


class MemberNetwork(Layers):
    """Layers over a hidden state and the members of a group before a position; zero until it is trained.

    Args:
        hidden_size: E, of the hidden states that the head takes.
        embedding_size: of the token embeddings.
        coupling: its size.
    """

    def __init__(self, hidden_size: int, embedding_size: int, coupling: Coupling):
        super().__init__(hidden_size, coupling)
        self.window = coupling.window
        self.members = nn.Parameter(torch.empty(len(DISTANCES) + 1, coupling.width, embedding_size))
        self.up = nn.Linear(coupling.rank, hidden_size, bias=False)
        nn.init.uniform_(self.members, -(embedding_size**-0.5), embedding_size**-0.5)  # as a linear layer begins
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor, ids: Tensor, distances: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, E), in the dtype of the hidden states.

        Args:
            hidden: (N, E) final hidden states.
            ids: (N, M) int64, the members before each position.
            distances: (N, M) int64, how far to the left each of them stands; 0: there is none.
            embed: (n,) ids -> (n, embedding size).
        """
        return self.up(self.code(hidden, ids, distances, embed)).to(hidden.dtype)

    def code(self, hidden: Tensor, ids: Tensor, distances: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, r) z, of which the result is U z; in the dtype of the weights."""
        return self._code_by(self, hidden, ids, distances, embed)

    def _code_by(
        self, layers: Layers, hidden: Tensor, ids: Tensor, distances: Tensor, embed: Callable[[Tensor], Tensor]
    ) -> Tensor:
        x = layers.of_state(hidden)
        for number, rows, places in _by_distance(distances, layers.always):
            members = _unit(embed(ids[rows, places]), self.members.dtype)
            x = x.index_add(0, rows, product(members, layers.of_member(number, self.members)).to(x.dtype))
        return layers.of_sum(x)

    def summed(self, ids: Tensor, distances: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, D, embedding size) the members of each position, summed up by which weights are for them: what `code_of`
        takes, whose products are of the same sizes whatever the distances."""
        is_for = _weights_by_distance(self.members.dtype, ids.device)[distances.clamp(max=_FARTHEST)]  # (N, M, D)
        return is_for.transpose(1, 2) @ _unit(embed(ids), self.members.dtype)

    def code_of(self, hidden: Tensor, summed: Tensor, layers: Layers | None = None) -> Tensor:
        """What `code` gives, to rounding, of members that are `summed` up, by its own layers or by others."""
        layers = layers or self
        weights = layers.of_members(self.members).transpose(0, 1).flatten(1)
        return layers.of_sum(layers.of_state(hidden) + product(summed.flatten(1), weights))

    @torch.no_grad()
    def logits_of_codes(self, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        """Of a head that is linear but for a constant, that (V,), and (V, r) what each number of z adds to the logits.

        Args:
            head: (N, E) hidden states -> (N, V) logits.

        Returns:
            None for another head, such as one that caps its logits.
        """
        columns = self.up.weight.detach().t()
        generator = torch.Generator().manual_seed(0)
        a, b = (100 * torch.randn(2, columns.shape[1], generator=generator)).to(columns).unbind()
        constant, of_a, of_b, of_both = head(torch.stack([torch.zeros_like(a), a, b, a + b])).float()
        tolerance = 1e-2 * float(of_both.abs().max())
        if not torch.allclose(of_both - constant, of_a + of_b - 2 * constant, atol=tolerance):
            return None
        return constant, (head(columns).float() - constant).to(columns.dtype).t().contiguous()


class DraftNetwork(MemberNetwork):
    """A network whose logits are of the tokens that drafts are made of alone, see `DRAFTED`: drafts may be drawn from
    anything, as what is verified is the model's own."""

    def logits_of_codes(self, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        made = super().logits_of_codes(head)
        if made is None:
            return None
        constant, of_codes = made
        few = max(DRAFTED, len(constant) // 4)
        return constant[:few].clone(), of_codes[:few].clone()  # the whole is not kept


class GroupCoupling(MemberNetwork):
    """What is added to the hidden states of later members; with `drafts`, also what guesses without rows of their own.

    Attributes:
        drafts: a network of the same kind whose hidden state is that of the row that predicts the *first* member, which
            left to right is the base model's own: the head of its result is the distribution of a member behind it.
            No row but the first member's is computed for that, and nothing of the model is adapted.
        scattered: the layers of members whose left neighbour is not one of the members before them; None: they share
            those of the others. U is the same for both, and so are the matrices of members that are near.
    """

    def __init__(self, hidden_size: int, embedding_size: int, coupling: Coupling):
        super().__init__(hidden_size, embedding_size, coupling)
        self.drafts = DraftNetwork(hidden_size, embedding_size, coupling) if coupling.drafts else None
        self.scattered: ScatteredLayers | None = None
        if coupling.scattered:
            self.scattered = ScatteredLayers(hidden_size, embedding_size, coupling)

    def code(self, hidden: Tensor, ids: Tensor, distances: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, r) z: see `MemberNetwork.code`. Groups that stand together are, bit for bit, what they are without
        `scattered`."""
        beside, learns = stand_beside(distances), torch.is_grad_enabled()  # then all layers are in the graph
        if self.scattered is None or (bool(beside.all()) and not learns):
            return super().code(hidden, ids, distances, embed)
        parts, places = [], []
        for layers, chosen in ((self, beside), (self.scattered, ~beside)):
            (at,) = chosen.nonzero(as_tuple=True)
            if len(at) or learns:
                parts.append(self._code_by(layers, hidden[at], ids[at], distances[at], embed))
                places.append(at)
        return torch.cat(parts)[torch.cat(places).argsort()]

    @torch.no_grad()
    def take_over(self, other: GroupCoupling) -> None:
        """The weights of a coupling of the same size without `scattered`, whose layers begin as those of the others."""
        assert self.scattered is not None
        self.load_state_dict(other.state_dict(), strict=False)
        its = other.state_dict() | {"far": other.members[NEAR:]}
        self.scattered.load_state_dict({name: its[name] for name in self.scattered.state_dict()})


def stand_beside(distances: Tensor) -> Tensor:
    """(N,) bool: whose left neighbour is one of the members before them, at (N, M) distances."""
    return (distances == 1).any(dim=1)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """(N, out) of (N, in) and a weight of (out, in).

    One row alone, as drawing has it, goes through the product with a vector: in bfloat16 on a CPU that reads the
    weights as fast as memory gives them, where a product of matrices takes about twice as long.
    """
    if rows.shape[0] == 1 and not torch.is_grad_enabled():  # len() would pin the number when traced
        return torch.mv(weight, rows[0])[None]
    return nn.functional.linear(rows, weight)


def _by_distance(distances: Tensor, always: tuple[int, ...]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Numbers of weights, and the members (which row, which place) that they are for; some always, for gradients."""
    numbers = _numbers(distances)
    for number in sorted({*always, *numbers.unique().tolist()} - {-1}):
        rows, places = (numbers == number).nonzero(as_tuple=True)
        yield number, rows, places


def _numbers(distances: Tensor) -> Tensor:
    """Which weights are for members at such distances; -1: none."""
    bounds = torch.tensor(DISTANCES, device=distances.device)
    return torch.bucketize(distances.contiguous(), bounds).masked_fill(distances == 0, -1)  # else torch warns


_FARTHEST = DISTANCES[-1] + 1
"""Tokens so far away or farther share the last weights."""


@cache
@torch.inference_mode(False)
def _weights_by_distance(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(distances, D) 1 where a distance's weights are, up to `_FARTHEST`: one look-up in place of four operations."""
    numbers = _numbers(torch.arange(_FARTHEST + 1, device=device))
    return (numbers[:, None] == torch.arange(len(DISTANCES) + 1, device=device)).to(dtype)


def _unit(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """The same directions with a root mean square of 1: families scale states and embeddings as they like."""
    vectors = vectors.float()
    return (vectors * (vectors.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()).to(dtype)

"""How a decoding step is executed: the seam between the engine and the forward.

The engine asks a `ModelRunner` for hidden states of rows and for logits of hidden states; whether that is eager
PyTorch, compiled code or another engine altogether it does not know. Every runner passes one contract test: its hidden
states and logits are the model's, cached decoding equals one parallel forward, adapters act where they should.

Shapes: B batch, R rows of a forward, K ranks, N predictions, V vocabulary, E hidden size.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anyorder.core.layout import Rows
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.coupling import MemberNetwork, product
from anyorder.model.kv_cache import KeyValueStore

_OF_CODES: WeakKeyDictionary[MemberNetwork, tuple[list[tuple[object, ...]], tuple[Tensor, Tensor] | None]]
_OF_CODES = WeakKeyDictionary()
"""Of networks: what their `logits_of_codes` were made of, and what they are; making them is the head over r rows."""


class ModelRunner(ABC):
    """Executes the forwards of a decoding run.

    Attributes:
        model: whose forwards they are.
        keeps_batch: whether every forward of a run must have the batch size of the first.
        takes_over: whether a run may begin with keys and values that PyTorch has made elsewhere.
        follows_buffers: whether others may take the place of a store's buffers between two forwards.
        torch_threads: that PyTorch may take in a run; None: any number. Its helpers go on looking for work when they
            have done some, on the cores that another engine's threads need.
    """

    model: AnyOrderPreTrainedModel
    keeps_batch: bool = False
    takes_over: bool = False
    follows_buffers: bool = False
    torch_threads: int | None = None

    @functools.cached_property
    def _of_codes(self) -> dict[MemberNetwork, tuple[Tensor, Tensor] | None]:
        """Of this run, whose weights do not change."""
        return {}

    @abstractmethod
    def hidden(self, rows: Rows, key_positions: Tensor, store: KeyValueStore) -> Tensor:
        """(B, R, E) final hidden states of the rows; keys and values of content rows are appended to the store.

        Args:
            rows: of `core.layout`.
            key_positions: (B, K) int64, position of the token at each rank.
            store: of earlier forwards.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V) logits of (N, E) hidden states."""

    def coupled_logits(self, hidden: Tensor, logits: Tensor, members: Tensor, distances: Tensor) -> Tensor:
        """(N, V) float32 logits of (N, E) hidden states, given members of their groups: see `coupling.GroupCoupling`.

        Args:
            hidden: of members behind the first of their groups.
            logits: (N, V) float32, of these alone.
            members, distances: (N, M) int64, tokens before each and how far to the left they stand; 0: none.
        """
        coupling = self.model.coupling
        assert coupling is not None
        code, made = self._code(coupling, hidden, members, distances)
        if made is None:
            return self.logits(hidden + coupling.up(code).to(hidden.dtype)).float()
        _, of_codes = made
        return logits + product(code.to(of_codes.dtype), of_codes).float()

    def draft_logits(self, hidden: Tensor, members: Tensor, distances: Tensor) -> Tensor:
        """(N, V') float32 logits of members, from (N, E) hidden states of the rows that predict their groups' first: of
        the first V' tokens, of which drafts are made (see `coupling.DRAFTED`)."""
        coupling = self.model.coupling
        assert coupling is not None
        assert coupling.drafts is not None
        code, made = self._code(coupling.drafts, hidden, members, distances)
        if made is None:
            return self.logits(coupling.drafts.up(code).to(hidden.dtype)).float()
        constant, of_codes = made
        return constant + product(code.to(of_codes.dtype), of_codes).float()

    def _code(
        self, network: MemberNetwork, hidden: Tensor, members: Tensor, distances: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(N, r) codes, and what they say of the logits: see `coupling.MemberNetwork`; made anew when the weights have
        changed."""
        model, device = self.model, hidden.device
        members, distances = (part[:, : network.window].to(device) for part in (members, distances))
        if network not in self._of_codes:
            layers = network.up, model.get_output_embeddings()
            parts = [part for layer in layers for part in plain_tensors(cast(Tensor, layer.weight))]
            made_of: list[tuple[object, ...]] = [(p.dtype, p.device, _sum_of_bits(p)) for p in parts]
            if _OF_CODES.get(network, (None,))[0] != made_of:
                _OF_CODES[network] = made_of, network.logits_of_codes(model.head)
            self._of_codes[network] = _OF_CODES[network][1]
        return network.code(hidden, members, distances, model.get_input_embeddings()), self._of_codes[network]

    def capacity(self, columns: int) -> int:
        """Ranks that the store of a run over so many columns must have."""
        return columns

    def new_store(self, rows: int, capacity: int) -> KeyValueStore:
        """An empty store for a batch of so many rows; the one that was made before is no longer used."""
        return KeyValueStore(capacity)

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError if the model is no longer the one that this runner was made for."""


class EagerRunner(ModelRunner):
    """The model's own forward; it reads the weights as they are, so it never grows stale."""

    takes_over = follows_buffers = True

    def __init__(self, model: AnyOrderPreTrainedModel):
        self.model = model

    def hidden(self, rows: Rows, key_positions: Tensor, store: KeyValueStore) -> Tensor:
        return self.model.hidden_rows(rows, key_positions, store)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden)

    def check(self) -> None:
        """Nothing to check."""


@torch.no_grad()
def weights_of(model: nn.Module) -> list[tuple[object, ...]]:
    """What changes when weights do: of each parameter and buffer its name, kind and place, and the sum of its bits.

    The sum is what tells edits that PyTorch does not count (`parameter.data`, another process's memory). It reads every
    weight once.
    """
    return [
        (name, part.dtype, part.device, tuple(part.shape), _sum_of_bits(part))
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        for part in plain_tensors(tensor)
    ]


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor consists of: itself, or the parts of a quantised one."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def _sum_of_bits(tensor: Tensor) -> int:
    """Of its memory in words of eight bytes, which wrap around; some 2 ms for 28 million numbers of bfloat16."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    left = flat.numel() % 8
    whole = int(flat[: flat.numel() - left].view(torch.int64).sum())
    return whole + int(flat[-left:].sum(dtype=torch.int64)) if left else whole

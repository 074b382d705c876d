"""The slow twin: two-stream attention in the paper's notation, for tests and for readers.

One sequence at a time; tokens stay in text order; every mask is a dense N x N table filled by two loops; nothing is
cached, sorted, packed or shared between the streams but the weights; coupling is one position at a time. It runs
through the base model's ordinary attention with a ready-made 4D mask, so it shares no code with `layout`, `attention`
and `cache`.

Notation (A3, section on two-stream attention): g(i) is the group of position i (0: given), h the content stream, which
encodes tokens, and g the query stream, which predicts them.

Shapes: N positions of one sequence (all present), V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.coupling import DISTANCES, NEAR


@torch.no_grad()
def reference_logits(model: AnyOrderPreTrainedModel, tokens: Tensor, groups: list[list[int]]) -> Tensor:
    """(N, V) logits of the query stream; row i predicts token i; zeros at given positions.

    Args:
        model: a converted model; its recipe decides masks, positions and seeds.
        tokens: (N,) int64.
        groups: the given positions, then the groups in order.
    """
    N = len(tokens)
    g = {i: k for k, group in enumerate(groups) for i in group}
    assert sorted(g) == list(range(N)), "every position exactly once"
    exact = model.recipe == "exact"

    def generated_before(j: int, i: int) -> bool:
        """Token j comes before token i in generation order: earlier group, or same group and further left."""
        return g[j] < g[i] or (g[j] == g[i] and j < i)

    content_mask = torch.zeros(N, N, dtype=torch.bool)  # M^h[i, j]: h_i reads h_j
    query_mask = torch.zeros(N, N, dtype=torch.bool)  # M^g[i, j]: g_i reads h_j
    for i in range(N):
        for j in range(N):
            same_or_earlier = (j == i or generated_before(j, i)) if exact else g[j] <= g[i]
            content_mask[i, j] = same_or_earlier
            query_mask[i, j] = g[j] < g[i]

    embed = model.get_input_embeddings()
    h0 = embed(tokens)
    g0, position = [], []
    for i in range(N):
        neighbour_known = exact and i > 0 and g[i - 1] < g[i]
        g0.append(h0[i - 1] if neighbour_known else model.query_embedding)
        position.append(max(i - 1, 0) if exact else i)

    # Rows: h_0..h_N-1, g_0..g_N-1. Columns: the same, but nobody reads a query row.
    mask = torch.zeros(2 * N, 2 * N, dtype=torch.bool)
    mask[:N, :N], mask[N:, :N] = content_mask, query_mask
    positions = torch.tensor([*range(N), *position])
    output = model.decoder(
        inputs_embeds=torch.cat([h0, torch.stack(g0)])[None],
        position_ids=positions[None],
        attention_mask=_by_layer_type(model, mask, positions),
        use_cache=False,
    )
    hidden = output.last_hidden_state[0, N:]
    if model.coupling is not None:
        hidden = torch.stack([_coupled(model, hidden[i], tokens, i, sorted(groups[g[i]])) for i in range(N)])
    logits = model.head(hidden)
    given = torch.tensor([g[i] == 0 for i in range(N)])
    return logits.masked_fill(given[:, None], 0.0)


def _coupled(model: AnyOrderPreTrainedModel, state: Tensor, tokens: Tensor, i: int, group: list[int]) -> Tensor:
    """h_i + delta_i: i knows the members of its group on its left, the nearest of them; the first knows none."""
    net = model.coupling
    assert net is not None
    before = [j for j in group if j < i][-net.window :]
    if not before:
        return state

    def unit(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean() + 1e-6).sqrt()

    layers = net if net.scattered is None or i - 1 in before else net.scattered
    z = layers.state.weight @ unit(state) + layers.state.bias
    for j in before:
        number = next((n for n, bound in enumerate(DISTANCES) if i - j <= bound), len(DISTANCES))
        far = layers is net.scattered and number >= NEAR
        matrix = net.scattered.far[number - NEAR] if far and net.scattered else net.members[number]
        z = z + matrix @ unit(model.get_input_embeddings()(tokens[j]))
    z = nn.functional.silu(layers.inner.weight @ nn.functional.silu(z) + layers.inner.bias)
    return state + net.up.weight @ (layers.down.weight @ z)


def _by_layer_type(model: AnyOrderPreTrainedModel, mask: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """The 4D mask, or one for each type of layer where the base model has sliding windows."""
    config = model.causal_lm.config
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    full = mask[None, None]
    if not window:
        return full
    near = mask & ((positions[:, None] - positions[None, :]).abs() < window)
    if layer_types:
        return {"full_attention": full, "sliding_attention": near[None, None]}
    return near[None, None]

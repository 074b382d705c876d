"""What a million new tokens cost on a cluster, on paper: arithmetic with named assumptions, and no measurement.

A forward reads the weights and the cached keys and values once, and multiplies each of its rows with the weights. It
takes the longer of the two times, and what the host needs to start it. A left-to-right group of s tokens has 2s - 1
rows a text: s content rows, of which the last one before the group predicts its first member, and s - 1 query rows.

    python benchmarks/cluster_cost.py --price 3 --host-ms 0
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Llama-3.1-8B; numbers of its config.json."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256

    @property
    def of_layers(self) -> int:
        """Parameters that every row is multiplied with."""
        kv = self.hidden * self.hidden // self.heads * self.kv_heads
        return self.layers * (2 * self.hidden**2 + 2 * kv + 3 * self.hidden * self.intermediate)

    @property
    def of_head(self) -> int:
        """Parameters that rows which predict are multiplied with; the table of embeddings is as large, not read."""
        return self.vocabulary * self.hidden

    @property
    def of_cache(self) -> int:
        """Numbers that a cached token has: keys and values."""
        return 2 * self.layers * self.kv_heads * self.hidden // self.heads


@dataclass(frozen=True)
class Machine:
    """An H100 SXM; what of its peak a program reaches is assumed."""

    bytes_a_second: float = 3.35e12
    flops: float = 989e12
    memory: float = 80e9
    reached_bytes: float = 0.7
    reached_flops: float = 0.5
    host_seconds: float = 0.0


BYTES = 2
"""Of a number in bfloat16."""


def seconds(model: Model, machine: Machine, batch: int, cached: int, rows: int, tokens: int) -> tuple[float, float]:
    """Of a forward: for memory, and for products.

    Args:
        model: its sizes.
        machine: its speeds.
        batch: texts in the forward.
        cached: tokens that a text has in the cache.
        rows: of a text.
        tokens: that a text gets.
    """
    read = BYTES * (model.of_layers + model.of_head + batch * cached * model.of_cache)
    attention = 2 * model.layers * model.hidden * cached  # scores, and sums of values
    products = 2 * batch * (rows * (model.of_layers + attention) + tokens * model.of_head)
    return read / machine.bytes_a_second / machine.reached_bytes, products / machine.flops / machine.reached_flops


def cost(price: float, texts: int, tokens: float, forward: float) -> tuple[float, float]:
    """New tokens a second of one GPU, and the price of a million."""
    speed = texts * tokens / forward
    return speed, price / 3600 / speed * 1e6


def main() -> None:
    """Print the assumptions and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=float, default=3.0, help="of one GPU for one hour; default: 3")
    parser.add_argument("--cached", type=int, default=1024, help="cached tokens of a text on average; default: 1024")
    parser.add_argument("--host-ms", type=float, default=0.0, help="milliseconds a forward that the host adds")
    parser.add_argument("--gpus", type=int, default=8)
    options = parser.parse_args()
    model, machine = Model(), Machine(host_seconds=options.host_ms / 1000)
    weights = BYTES * (model.of_layers + 2 * model.of_head)
    room = int((0.9 * machine.memory - weights) / BYTES / model.of_cache)
    read = weights - BYTES * model.of_head
    print(f"weights {weights / 1e9:.2f} GB, of which a forward reads {read / 1e9:.2f};")
    print(f"a cached token {BYTES * model.of_cache} bytes; room for {room} of them in 90% of the memory\n")
    print("| group | rows a text | texts | memory ms | products ms | tokens/s, a GPU | all | price of a million |")
    print("|---|---|---|---|---|---|---|---|")
    for size in (1, 2, 4, 8):
        for batch in (1, 16, 64, 256):
            memory, products = seconds(model, machine, batch, options.cached, 2 * size - 1, size)
            speed, price = cost(options.price, batch, size, max(memory, products) + machine.host_seconds)
            print(
                f"| {size} | {2 * size - 1} | {batch} | {1000 * memory:.2f} | {1000 * products:.2f} | {speed:,.0f} | "
                f"{options.gpus * speed:,.0f} | {price:.3f} |"
            )


if __name__ == "__main__":
    main()

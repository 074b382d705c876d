"""Nats per token of the third sentence of five-sentence stories, and of whole stories in groups of four.

Each model's own exact likelihood, left to right inside the blank: given the sentences before it alone, and given both
sides. The plain model given sentences 1 and 2 is the figure to beat; whether *both sides* help a trained model is shown
only against a control that was trained on the same text to read from one side. Of a masked diffusion model, which has
no likelihood to compute, it is the bound of sampling in random order, as many tokens a step, with its standard error.

    python benchmarks/infill_loss.py --stories rocstories_valid.jsonl.gz --model smollm2-135m my-run --limit 300
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from anyorder import AnyOrderForCausalLM, Factorization, load
from anyorder.evaluation.baselines.diffusion_bound import negative_elbo
from anyorder.evaluation.baselines.masked_diffusion import MaskedDiffusionLM
from anyorder.evaluation.baselines.noise import largest_group
from anyorder.infill.pieces import Pieces
from anyorder.loading import saved_type

BLANK = 2  # the third sentence
SAMPLES = 8
"""Masks a text, of masked diffusion: 300 stories take two cores a quarter of an hour, four times as many an hour."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True, help='.jsonl or .jsonl.gz of {"sentences": [five]}')
    parser.add_argument("--model", nargs="+", default=["smollm2-135m"], help="models to compare")
    parser.add_argument("--limit", type=int, default=300, help="stories, from the first; default: 300")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    options = parser.parse_args()
    stories = read(options.stories)[: options.limit]
    print(f"{len(stories)} stories, nats a token")
    print(f"{'model':32} {'given 1 2':>10} {'given 1 2 4 5':>14} {'whole, groups of 1':>19} {'whole, groups of 4':>19}")
    for name in options.model:
        model, tokenizer = load_any(name, getattr(torch, options.dtype))
        columns, errors = measure(model.to(options.device), Pieces(tokenizer), stories, options.batch_size)
        print(f"{name:32} {columns[0]:10.3f} {columns[1]:14.3f} {columns[2]:19.3f} {columns[3]:19.3f}", flush=True)
        if any(errors):
            name = "  a bound; its standard error"
            print(f"{name:32} {errors[0]:10.3f} {errors[1]:14.3f} {errors[2]:19.3f} {errors[3]:19.3f}", flush=True)


Model = AnyOrderForCausalLM | MaskedDiffusionLM


def load_any(name: str, dtype: torch.dtype) -> tuple[Model, PreTrainedTokenizerBase]:
    """A model of either objective and its tokenizer."""
    if saved_type(name) == MaskedDiffusionLM.config_class.model_type:
        return load(name, model_class=MaskedDiffusionLM, dtype=dtype)
    return load(name, dtype=dtype)


def read(file: Path) -> list[list[str]]:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line)["sentences"] for line in data.decode().splitlines()]


def measure(model: Model, pieces: Pieces, stories: list[list[str]], batch: int) -> tuple[list[float], list[float]]:
    """Means over all predicted tokens: one side, both sides, left to right, left to right in groups of four; and their
    standard errors from what is drawn in measuring, which is nothing where likelihoods are exact."""
    totals, counts, variances = torch.zeros(3, 4, dtype=torch.float64)
    for first in range(0, len(stories), batch):
        rows: list[list[Factorization]] = [[], [], [], []]
        ids = []
        for sentences in stories[first : first + batch]:
            parts = [pieces.encode(s if k == 0 else " " + s, at_start=k == 0) for k, s in enumerate(sentences)]
            ids.append([pieces.start_token(), *(token for part in parts for token in part)])
            ends = torch.tensor([1 + sum(map(len, parts[:k])) for k in range(len(parts) + 1)]).tolist()
            length, blank = len(ids[-1]), range(ends[BLANK], ends[BLANK + 1])
            rows[0].append(Factorization.conditional(list(blank), list(range(ends[BLANK])), length))
            mask = torch.zeros(length, dtype=torch.bool)
            mask[list(blank)] = True
            rows[1].append(Factorization.infill(mask))
            rows[2].append(Factorization.left_to_right(length))
            rows[3].append(Factorization.left_to_right(length, group_size=4))
        width = max(map(len, ids))
        tensor = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        for column, orders in enumerate(rows):
            order = Factorization.stack(orders)
            counts[column] += order.is_predicted.sum()
            if not isinstance(model, MaskedDiffusionLM):
                totals[column] -= model.log_likelihood(tensor, order).double().sum().cpu()
                continue
            chance, size = torch.Generator().manual_seed(first), largest_group(order)
            bound = negative_elbo(model, tensor, order.is_given, SAMPLES, chance, order.is_present, size)
            totals[column] += bound.mean.sum()
            variances[column] += bound.standard_error.square().sum()
    return (totals / counts).tolist(), (variances.sqrt() / counts).tolist()


if __name__ == "__main__":
    main()

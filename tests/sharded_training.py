"""One of two processes that train a model split by FSDP2 on the CPU; run by torchrun from test_distributed.py.

accelerate shards on accelerators only, so PyTorch's own `fully_shard` is applied here, layer by layer as it would.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from anyorder import AnyOrderForCausalLM, Factorization
from anyorder.hub.checkpoint import read_weights
from anyorder.model import lm_head as head
from anyorder.model.adapters import Adapter
from anyorder.training.curriculum import BUILT_IN
from anyorder.training.data import Sequences, collate
from anyorder.training.heldout import HeldOut
from architectures import base_model
from training_data import documents

STEPS = 5


def model_of(adapter: str) -> AnyOrderForCausalLM:
    torch.manual_seed(0)
    kind = None if adapter == "full" else Adapter(adapter, 8)
    return AnyOrderForCausalLM.from_causal_lm(base_model("llama_tied"), adapter=kind).train()


def train(model: AnyOrderForCausalLM, rank: int, processes: int) -> list[float]:
    """Mean losses of batches of four sequences, of which each process takes its part; then held-out losses."""
    data = Sequences([documents()], 16, BUILT_IN["exact"], count=4 * STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    held_out = HeldOut(documents()[:5], batch_size=2)
    curve = list(held_out.losses(model.eval()).values())  # before the first step, as adapt does
    model.train()
    for step in range(STEPS):
        numbers = range(4 * step, 4 * step + 4)
        count = sum(int((collate([data[i]])["labels"] != -100).sum()) for i in numbers)
        batch = collate([data[i] for i in numbers[rank::processes]])
        order = Factorization(batch["group_ids"], batch["document_ids"])
        # Gradients are averaged over processes; the loss is a sum over all of them.
        loss = model(batch["input_ids"], order, batch["labels"], num_items_in_batch=count / processes).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / processes
        if processes > 1:
            dist.all_reduce(total)
        curve.append(float(total))
    return curve + list(held_out.losses(model.eval()).values())


def main() -> None:
    adapter, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    head.CHUNK = 4  # several a forward
    model = model_of(adapter)
    for layer in model.decoder.layers:
        fully_shard(layer)
    tail = [model.decoder.norm, model.get_input_embeddings(), model.get_output_embeddings()]
    fully_shard(tail, reshard_after_forward=False)
    fully_shard(model)
    curve = train(model, rank, dist.get_world_size())
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(folder / "model", state_dict=whole, is_main_process=rank == 0)
    dist.barrier()
    if adapter != "full":  # read back into the split model
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.zero_()
        read_weights(model, (folder / "model").joinpath)
        again = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        assert all(torch.equal(again[name], whole[name]) for name in whole)
    if rank == 0:
        (folder / "curve.json").write_text(json.dumps(curve))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # all is written; PyTorch's threads now and then abort a process that has used gloo as it winds up


if __name__ == "__main__":
    main()

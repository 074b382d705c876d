"""Masked diffusion on the same backbone: the control of any-order training.

Every token of a document is one row of an unmodified causal LM, and reads every row of its document, and no other's.
A masked token's row starts from a vector of its own (`query_embedding`, initialised to the mean embedding), so the mask
has no id and is never drawn. The shift of the base is kept, as in DiffuLLaMA (arXiv 2410.17891): the row at position
i-1 predicts token i. DiffuLLaMA's slow change from causal to full attention is left out.

Same rows, adapters, files and trainer as `AnyOrderForCausalLM`; other masks, another loss. This module knows nothing of
sampling (`diffusion_sampling`) and of bounds (`diffusion_bound`).

Shapes: B batch, T columns, N masked tokens, V vocabulary, E hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from anyorder.core.factorization import ABSENT, GIVEN, Factorization
from anyorder.core.layout import lay_out
from anyorder.evaluation.baselines.noise import generator_of, largest_group, noised
from anyorder.hub.converted import ConvertedModel
from anyorder.model import adapters
from anyorder.model.base import AnyOrderOutput
from anyorder.model.configuration import AnyOrderConfig
from anyorder.model.coupling import Coupling
from anyorder.model.lm_head import Predictions


class MaskedDiffusionConfig(AnyOrderConfig):
    """The same fields; another type, so that neither model is loaded as the other."""

    model_type = "anyorder_masked_diffusion"
    __init__ = AnyOrderConfig.__init__  # transformers writes one for a subclass without


class MaskedDiffusionLM(ConvertedModel):
    """A masked diffusion model on a pretrained causal LM.

    Make one with `from_causal_lm`, or load a trained one with `from_pretrained`.

    Attributes:
        causal_lm: the wrapped Hugging Face model itself.
        query_embedding: (E,) parameter, the embedding of the mask token.
    """

    config_class = MaskedDiffusionConfig

    @classmethod
    def from_causal_lm(
        cls,
        model: str | PreTrainedModel,
        recipe: str = "exact",
        adapter: str | adapters.Adapter | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Self:
        """As `AnyOrderForCausalLM.from_causal_lm`, with all weights or with a plain LoRA.

        Raises:
            ValueError: for a gated adapter or the paper's recipe, which have no meaning here.
        """
        if (adapter.kind if isinstance(adapter, adapters.Adapter) else adapter) == "gated":
            raise ValueError(
                "masked diffusion has no gates: every row reads both sides, none stands where the base model stands; "
                "use adapter='lora' (of the same size), or None for all weights"
            )
        if recipe != "exact":
            raise ValueError(f"masked diffusion keeps the base model's shift: leave recipe={recipe!r} out")
        return super().from_causal_lm(model, recipe, adapter, *args, **kwargs)

    def couple(self, coupling: Coupling) -> NoReturn:
        """ValueError: masked tokens are predicted independently of each other."""
        raise ValueError("masked diffusion predicts masked tokens independently: it takes no coupling")

    def predictions(self, input_ids: Tensor, factorization: Factorization, taught: bool = False) -> Predictions:
        """Hidden states of the rows before the masked tokens, from one forward.

        Args:
            input_ids: (B, T) int64; what stands at masked positions is not read.
            factorization: of the same shape; its one group is masked, what is given is read.
            taught: without effect: there are no rows of the base model.

        Raises:
            ValueError: for several groups, which one forward cannot predict, or a masked token with none before it.
        """
        ids = self.check_input(input_ids, factorization)
        masked, present = factorization.is_predicted, factorization.is_present
        if bool((factorization.group_ids > 0).any()):
            raise ValueError(
                "a diffusion model predicts one group, all masked tokens, in a forward: its likelihood is bounded by "
                "diffusion_bound.negative_elbo, it samples by diffusion_sampling.fill"
            )
        columns = torch.arange(ids.shape[1], device=ids.device)
        left = (columns - 1).clamp(min=0).expand_as(ids)
        alone = masked & ((columns == factorization.document_starts) | ~present.gather(1, left))
        if bool(alone.any()):
            b, t = alone.nonzero()[0].tolist()
            raise ValueError(
                f"row {b}, position {t}: no token before it, whose row would predict it; give the first token of every "
                "document, and leave out no token before one that is predicted"
            )
        everything = torch.where(present, GIVEN, ABSENT)
        layout = lay_out(ids, Factorization(everything, factorization.documents), "paper")  # full within a group
        seeded = ~masked.gather(1, layout.key_columns)
        seeds = layout.rows.seed_ids.masked_fill(~seeded, 0)
        rows = dataclasses.replace(layout.rows, seeded=seeded, seed_ids=seeds)
        hidden = self.hidden_rows(rows, layout.key_positions)
        row, _ = masked.nonzero(as_tuple=True)
        place = layout.ranks.gather(1, left)[masked]
        return Predictions(hidden[row.to(hidden.device), place.to(hidden.device)], masked.to(hidden.device))

    @torch.compiler.disable  # as the any-order model's: rows differ in number each time
    def forward(
        self,
        input_ids: Tensor,
        factorization: Factorization,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_only: bool = False,
        taught: bool = False,
    ) -> AnyOrderOutput:
        """The loss of masked diffusion on a batch of any-order training, or logits of masked tokens.

        Args:
            input_ids: (B, T) int64.
            factorization: of the same shape: documents, what is given, and what is predicted; the order of its groups
                has no meaning here, their size only in evaluation mode.
            labels: (B, T) int64, -100 is ignored. With labels `noise.noised` masks some of the predicted tokens: in
                training others every time, by torch's global generator, which a resumed run restores; in evaluation
                mode always the same ones of the same ids, for as many tokens a step as the largest group has.
            num_items_in_batch: as in `AnyOrderForCausalLM.forward`.
            loss_only, taught: without effect: there are no logits beside a loss, and nothing to be taught by.

        Returns:
            with labels, loss: an unbiased estimate of -ELBO a predicted token, in nats; token_losses: (B, T) float32
            without gradient, -log p times its weight at masked tokens, 0 elsewhere, so that its sum over a document
            estimates the document's -ELBO. Without labels, logits: (B, T, V) with all predicted tokens masked at once,
            which the factorization must have in one group; zeros elsewhere.
        """
        if labels is None:
            found = self.predictions(input_ids, factorization)
            return AnyOrderOutput(logits=found.spread(self.predictor.logits(found.hidden)))
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels have shape {tuple(labels.shape)}, input_ids has {tuple(input_ids.shape)}")
        number = int(torch.randint(2**62, (1,))) if self.training else 0
        size = 1 if self.training else largest_group(factorization)
        masked, weights = noised(factorization, generator_of(input_ids, number), size)
        found = self.predictions(input_ids, masked)
        losses = self.predictor.losses(found, labels) * weights.to(found.where.device)[found.where]
        counted = (labels.to(losses.device)[factorization.is_predicted.to(losses.device)] != -100).sum().clamp(min=1)
        loss = losses.sum() / (counted if num_items_in_batch is None else num_items_in_batch)
        return AnyOrderOutput(loss=loss, token_losses=found.spread(losses.detach()))


AutoConfig.register(MaskedDiffusionConfig.model_type, MaskedDiffusionConfig)

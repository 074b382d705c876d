"""One forward of content and query rows in an unmodified Hugging Face decoder.

No modelling code is copied. The decoder runs on `inputs_embeds` and `position_ids` that the layout chose, its
attention function reads intervals (`attention`), and its own forward over an identity decoder turns the rows that
predict something into logits (`lm_head`). This module knows nothing of sampling, names, files, text or training.

Shapes: B batch, T columns, R rows, N predictions, V vocabulary, E hidden size.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from anyorder.core.factorization import ABSENT, Factorization
from anyorder.core.layout import Layout, Rows, lay_out
from anyorder.core.validation import fitting_ids, left_to_right
from anyorder.model import adapters, attention
from anyorder.model.compatibility import check_config, check_model, context_length
from anyorder.model.configuration import AnyOrderConfig
from anyorder.model.coupling import Coupling, GroupCoupling
from anyorder.model.kv_cache import KeyValueStore
from anyorder.model.lm_head import Predictions, Predictor, Teacher


@dataclasses.dataclass
class AnyOrderOutput(CausalLMOutput):
    """What `AnyOrderPreTrainedModel.forward` returns."""

    token_losses: Tensor | None = None


class AnyOrderPreTrainedModel(PreTrainedModel):
    """A forward of rows, their lay-out and the head: what engines take.

    Attributes:
        causal_lm: the wrapped Hugging Face model itself, usable as such.
        query_embedding: (E,) parameter w, from which a query row starts where its left neighbour is unknown.
        coupling: what makes the tokens of a group know each other; None: nothing.
    """

    config_class = AnyOrderConfig
    base_model_prefix = ""
    accepts_loss_kwargs = True  # Trainer: `num_items_in_batch`
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config: AnyOrderConfig, causal_lm: PreTrainedModel | None = None):
        super().__init__(config)
        self.set_attn_implementation(config._attn_implementation)
        if config.base_config is None:
            raise ValueError("the config has no base_config: make models with AnyOrderForCausalLM.from_causal_lm")
        if causal_lm is None:
            check_config(config.base_config)
            # The dtype that from_pretrained was asked for, not the one in which the base was saved.
            causal_lm = AutoModelForCausalLM.from_config(config.base_config, dtype=torch.get_default_dtype())
        check_model(causal_lm)
        self.causal_lm = causal_lm
        self.causal_lm.set_attn_implementation(attention.NAME)
        embedding = causal_lm.get_input_embeddings()
        self.query_embedding = nn.Parameter(embedding.weight.new_zeros(embedding.weight.shape[1]))
        self.coupling: GroupCoupling | None = None
        if config.coupling is not None:
            self.couple(Coupling.from_dict(config.coupling))
        self.post_init()

    @classmethod
    def can_generate(cls) -> bool:
        """True: so transformers saves and uploads the generation config with the model."""
        return True

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The wrapped model's own: one place for end and padding ids."""
        causal_lm = self._modules.get("causal_lm")
        return None if causal_lm is None else cast(PreTrainedModel, causal_lm).generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if "causal_lm" in self._modules:  # before, transformers derives one that the wrapped model has already
            self.causal_lm.generation_config = value

    def set_attn_implementation(self, attn_implementation: str, **kwargs: Any) -> None:
        """Choose "sdpa" or "flex_attention"; the wrapped model keeps the attention that reads intervals."""
        if attn_implementation not in attention.IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation must be one of {', '.join(attention.IMPLEMENTATIONS)}, "
                f"got {attn_implementation!r}"
            )
        self.config._attn_implementation = attn_implementation

    def get_input_embeddings(self) -> nn.Module:
        return self.causal_lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.causal_lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.causal_lm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.causal_lm.set_output_embeddings(value)

    @property
    def decoder(self) -> PreTrainedModel:
        """The base model without its head."""
        return cast(PreTrainedModel, getattr(self.causal_lm, self.causal_lm.base_model_prefix))

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding table: token ids are below it."""
        return int(cast(Tensor, self.get_input_embeddings().weight).shape[0])

    @property
    def recipe(self) -> str:
        return self.config.recipe

    def couple(self, coupling: Coupling) -> None:
        """Add a coupling of groups, which changes nothing until it is trained; to one without `scattered` these alone.

        Raises:
            ValueError: if the model has another one.
        """
        own, had = self.config.coupling, self.coupling
        if had is not None and (had.scattered or coupling != Coupling(**own | {"scattered": True})):
            raise ValueError(f"the model has a coupling of its own, {own}: train that one")
        head, embedding = (cast(Tensor, of().weight) for of in (self.get_output_embeddings, self.get_input_embeddings))
        made = GroupCoupling(head.shape[1], embedding.shape[1], coupling).to(embedding.device)
        if had is not None:
            made.to(had.members.dtype).take_over(had)
        self.coupling = made
        self.config.couple(dataclasses.asdict(coupling))

    def uncoupled(self) -> Self:
        """The same model, of the same parameters, in which the tokens of a group do not know each other: to compare."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin.coupling = None
        return twin

    def hidden_rows(self, rows: Rows, key_positions: Tensor, store: KeyValueStore | None = None) -> Tensor:
        """The one forward: (B, R, E) final hidden states of the rows.

        Args:
            rows: what `layout` made.
            key_positions: (B, K) int64, position of the token at each rank.
            store: keys and values of earlier forwards, appended to; None if the rows hold all content.
        """
        return self.run_rows(rows, key_positions, store)[0]

    def run_rows(
        self, rows: Rows, key_positions: Tensor, store: KeyValueStore | None = None
    ) -> tuple[Tensor, attention.Reads]:
        """`hidden_rows`, and the record of what attention read."""
        device = self.query_embedding.device
        # w always has a gradient, if only zeros
        seeded = rows.seeded.to(device) if torch.is_grad_enabled() or not bool(rows.seeded.all()) else None
        reads = attention.Reads(rows, key_positions, device, store, self.config._attn_implementation)
        hidden = self.decode(rows.seed_ids.to(device), seeded, rows.positions.to(device), reads)
        if not reads.calls:
            raise ValueError(
                "the wrapped model's attention was replaced after conversion; choose it with attn_implementation= when "
                "converting or loading, or with set_attn_implementation of the converted model"
            )
        return hidden, reads

    def decode(self, seed_ids: Tensor, seeded: Tensor | None, positions: Tensor, reads: Any) -> Tensor:
        """(B, R, E) final hidden states of rows whose keys, values and masks `reads` has.

        Args:
            seed_ids, positions: (B, R) int64 on the model's device.
            seeded: (B, R) bool, False where a row starts from w; None: nowhere.
            reads: an `attention.Reads`, or what stands in for it.
        """
        return self.decode_from(self.embed_rows(seed_ids, seeded), positions, reads)

    def embed_rows(self, seed_ids: Tensor, seeded: Tensor | None) -> Tensor:
        """(B, R, E) what rows start from: see `decode`."""
        embeds: Tensor = self.get_input_embeddings()(seed_ids)
        if seeded is None:
            return embeds
        return torch.where(seeded[..., None], embeds, self.query_embedding.to(embeds.dtype))

    def decode_from(self, embeds: Tensor, positions: Tensor, reads: Any) -> Tensor:
        """`decode` of rows that are embedded."""
        output = self.decoder(
            inputs_embeds=embeds,
            position_ids=positions,
            # A 4D mask passes through transformers untouched; the intervals replace it.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device),
            use_cache=False,
            anyorder_reads=reads,
        )
        return cast(Tensor, output.last_hidden_state)

    @property
    def predictor(self) -> Predictor:
        """What turns hidden states into logits and log-probabilities."""
        return Predictor(self.causal_lm)

    def head(self, hidden: Tensor) -> Tensor:
        """(N, E) hidden states -> (N, V) logits, by the base model's own head."""
        return self.predictor.logits(hidden)

    def predictions(self, input_ids: Tensor, factorization: Factorization, taught: bool = False) -> Predictions:
        """Hidden states of the rows that predict something, from one forward; those of later members of a group know
        the members before them, if the model is coupled.

        Args:
            input_ids: (B, T) int64.
            factorization: of the same shape.
            taught: with their teachers, see `forward`: the base must be frozen.
        """
        ids = self.check_input(input_ids, factorization)
        layout = lay_out(ids, factorization, self.recipe)
        predicted = layout.logit_rows >= 0
        row, _ = predicted.nonzero(as_tuple=True)
        if torch.is_grad_enabled() and self.config.is_gated:
            hidden, where = self._frozen_rows_first(layout)
        else:
            hidden, where = self.hidden_rows(layout.rows, layout.key_positions), None

        def states(row: Tensor, place: Tensor) -> Tensor:
            place = place if where is None else where[row, place]
            return hidden[row.to(hidden.device), place.to(hidden.device)]

        found = Predictions(states(row, layout.logit_rows[predicted]), predicted.to(hidden.device))
        taught = taught and self._has_base_rows
        own = layout.taught[predicted] if taught else torch.full_like(row, -1)
        has = own >= 0
        if self.coupling is not None:
            firsts = states(row[has], layout.group_starts[predicted][has] - 1)
            found = self._coupled(found, ids, layout, has, firsts)
        if taught:
            base = Teacher(has.to(hidden.device), states(row[has], own[has]).detach())
            later = (layout.earlier(1)[1] > 0)[..., 0]
            later[predicted] &= ~has
            itself = (
                self._itself(input_ids, factorization, later) if self.coupling is not None and later.any() else None
            )
            found = dataclasses.replace(found, base=base, itself=itself)
        return found

    @torch.no_grad()
    def _itself(self, input_ids: Tensor, factorization: Factorization, chosen: Tensor) -> Teacher:
        """The model's own rows for the chosen tokens in the same order, each token a group of its own.

        Args:
            input_ids: (B, T) int64.
            factorization: of the same shape.
            chosen: (B, T) bool; of a document in which nothing is chosen, only what is given takes part.
        """
        singles, documents = factorization.regroup(1), factorization.documents
        rows = torch.arange(len(documents), device=documents.device)[:, None]
        documents = documents + rows * (documents.max() + 1)
        idle = singles.is_predicted & ~torch.isin(documents, documents[chosen])
        order = Factorization(singles.group_ids.masked_fill(idle, ABSENT), factorization.documents)
        found = self.predictions(input_ids, order)
        which = chosen[singles.is_predicted].to(found.hidden.device)
        return Teacher(which, found.hidden[chosen[order.is_predicted].to(found.hidden.device)])

    @property
    def _has_base_rows(self) -> bool:
        """Whether content rows that stand where the base model stands are its own, and the head is frozen and whole."""
        kind = (self.config.adapter or {}).get("kind")
        frozen = not any(parameter.requires_grad for parameter in self.get_output_embeddings().parameters())
        return frozen and kind != "lora" and not adapters.is_split(self)

    def _coupled(self, found: Predictions, ids: Tensor, layout: Layout, has: Tensor, firsts: Tensor) -> Predictions:
        """With the deltas of coupling, teacher-forced, and the drafts of those that have a teacher.

        Args:
            found: predictions without it.
            ids: (B, T) int64.
            layout: of the forward.
            has: (N,) bool: which have a teacher.
            firsts: (K, E) hidden states of the rows of the first members of their groups.
        """
        assert self.coupling is not None
        predicted, device, embed = layout.logit_rows >= 0, found.hidden.device, self.get_input_embeddings()
        columns, distances = layout.earlier(self.coupling.window)
        members = ids.gather(1, columns.flatten(1)).view(columns.shape)[predicted].to(device)
        distances = distances[predicted].to(device)
        hidden, drafts, learns = found.hidden, None, torch.is_grad_enabled()  # then every network is in the graph
        (later,) = (distances > 0).any(dim=1).nonzero(as_tuple=True)
        if len(later) or learns:
            deltas = self.coupling(hidden[later], members[later], distances[later], embed)
            hidden = hidden.index_add(0, later, deltas)
        if self.coupling.drafts is not None and (len(firsts) or learns):
            has = has.to(device)
            drafts = self.coupling.drafts(firsts.detach(), members[has], distances[has], embed)
            hidden = hidden if len(firsts) else hidden + drafts.sum()
        return dataclasses.replace(found, hidden=hidden, drafts=drafts)

    def _frozen_rows_first(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """The rows in two forwards, for training: those that the adapter cannot change need no gradient.

        Returns:
            hidden states (B, R', E), and (B, R) which of them belongs to which row of the layout.
        """
        rows, spare = layout.rows, layout.logit_rows.shape[1]
        frozen = rows.frozen
        # Processes that gather parameters together must run as many forwards, whatever rows each has.
        if not bool(frozen.any()) or bool(frozen.all()) or adapters.is_split(self):
            every = torch.arange(rows.count).expand(rows.lo.shape)
            return self.hidden_rows(rows, layout.key_positions), every
        first, first_place = rows.take(frozen, spare)
        second, second_place = rows.take(~frozen, spare)
        store = KeyValueStore(spare)
        with torch.no_grad():
            hidden = self.hidden_rows(first, layout.key_positions, store)
        hidden = torch.cat([hidden, self.hidden_rows(second, layout.key_positions, store)], dim=1)
        return hidden, torch.where(frozen, first_place, first.count + second_place)

    def lay_out(self, input_ids: Tensor, factorization: Factorization) -> Layout:
        """The rows of one parallel forward, after checking that ids and factorization fit the model."""
        ids = self.check_input(input_ids, factorization)
        return lay_out(ids, factorization, self.recipe)

    def check_input(self, input_ids: Tensor, factorization: Factorization) -> Tensor:
        """(B, T) ids on the factorization's device, 0 where absent; ValueError names what does not fit."""
        return fitting_ids(input_ids, factorization, self.vocabulary_size, context_length(self.causal_lm.config))

    @torch.compiler.disable  # its rows differ in number each time, and traced adapters would miss their gates
    def forward(
        self,
        input_ids: Tensor,
        factorization: Factorization | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_only: bool = False,
        taught: bool = False,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        past_key_values: None = None,
    ) -> AnyOrderOutput | tuple[Tensor, ...]:
        """Logits of every predicted token, in one forward.

        Args:
            input_ids: (B, T) int64.
            factorization: of the same shape; None: left to right, one at a time, given the first token.
            labels: (B, T) int64, -100 is ignored; usually `input_ids`. Only predicted positions count.
            attention_mask: (B, T), without a factorization: 0 marks padding, on the right.
            num_items_in_batch: what the sum of the losses is divided by, where a step is many forwards; None: the
                number of labelled predicted positions (as Trainer expects).
            loss_only: with labels, leave out the logits; always so in training.
            taught: with labels, the loss of a prediction is how far it is, KL(teacher || model) in nats, from what is
                predicted of the same token given the same text and the members of its group before it: by the base
                model, wherever a gated adapter leaves its row in the forward, which is in groups from left to right;
                elsewhere, for a coupled model, by the model itself in a forward of the same order one token at a time,
                without gradient. First members have their own loss. `token_losses` stay what they are.
            return_dict: False gives the output's values as a tuple, as in transformers.
            use_cache: without effect: all rows of the forward are computed in it, nothing is kept for another.
            past_key_values: must be None.

        Returns:
            logits (B, T, V) in the model's dtype: row i predicts token i, unshifted; zeros at positions that are not
            predicted; None for losses alone, beside which they would be the largest tensor by far. loss: mean
            cross-entropy over the labelled predicted positions, in nats, float32 (0 if there are none); a mixture of
            experts adds no router loss. token_losses: (B, T) float32 without gradient, 0 where nothing counts.
        """
        if past_key_values is not None:
            raise ValueError(
                "past_key_values holds keys in the order of positions, and rows here read keys in generation order: "
                "pass all of input_ids; generate() keeps keys itself"
            )
        if factorization is None:
            factorization = left_to_right(input_ids, attention_mask)
        elif attention_mask is not None:
            raise ValueError("attention_mask is for the default order; a factorization marks padding as absent itself")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"labels have shape {tuple(labels.shape)}, input_ids has {tuple(input_ids.shape)}")
        found = self.predictions(input_ids, factorization, taught and labels is not None)
        output = self._output(found, labels, num_items_in_batch, self.training or loss_only)
        return output.to_tuple() if return_dict is False else output

    def _output(
        self, found: Predictions, labels: Tensor | None, num_items_in_batch: Tensor | int | None, loss_only: bool
    ) -> AnyOrderOutput:
        """Logits and losses of predictions: see `forward`."""
        predictor, loss, token_losses = self.predictor, None, None
        if labels is not None:
            losses, reported = predictor.distilled(found, labels)
            counted = (labels.to(losses.device)[found.where] != -100).sum().clamp(min=1)
            loss = losses.sum() / (counted if num_items_in_batch is None else num_items_in_batch)
            token_losses = found.spread(reported)
            if loss_only:
                return AnyOrderOutput(loss=loss, token_losses=token_losses)
        logits = found.spread(predictor.logits(found.hidden))
        return AnyOrderOutput(loss=loss, logits=logits, token_losses=token_losses)

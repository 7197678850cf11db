"""Forward and backward passes over packed micro-batches, by Megatron's schedules. Import after prepare_megatron."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from qerl_rl.algorithms.sequences import sequence_ids, token_weights
from qerl_rl.model.load_balance import LoadBalance
from qerl_rl.model.routing_replay import RoutedSequences
from qerl_rl.train.packing import Pack
from qerl_rl.train.scores import vocab_parallel_scores

Scores = tuple[torch.Tensor, ...]
"""What a kind of engine reads off the output layer: tensors float32 [N] over the response tokens of a pack."""
ScoreFunction = Callable[[torch.Tensor, Pack], Scores]
"""(output [1, N, width of this rank], pack) -> scores."""
LossFunction = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(*scores [N], columns {name: [N]}, token_weights [N]) -> (sum of weight * loss, sums over the tokens by name)."""


def token_scores(vocabulary: int, temperature: float) -> ScoreFunction:
    """The scores (log_probs, entropy) of a language model.

    Args: vocabulary: real vocabulary entries. temperature: divides the logits.
    """

    def score(logits: torch.Tensor, pack: Pack) -> Scores:
        return vocab_parallel_scores(
            logits[0],
            pack.targets,
            temperature=temperature,
            vocabulary=vocabulary,
            first=parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1],
            group=parallel_state.get_tensor_model_parallel_group(),
        )

    return score


def value_scores(values: torch.Tensor, pack: Pack) -> Scores:
    """The scores (values,) of a value model."""
    return (values[0, :, 0],)


class PositionSelection:
    """Makes an output layer compute the logits at `positions` only, or everywhere while that is None.

    Prompts need no logits, and over a large vocabulary these are most of what a micro-batch holds and a good part of
    what it computes.
    """

    def __init__(self, output_layer: torch.nn.Module) -> None:
        self.positions: torch.Tensor | None = None
        # Positions count along the whole sequence, so it is gathered here and not in the layer; the gradients of the
        # ranks' parts of the vocabulary are summed on the way back either way. A value head is not split and says how.
        self._gather = getattr(output_layer, "gather", gather_from_sequence_parallel_region)
        self._gathers = output_layer.sequence_parallel
        if self._gathers:
            output_layer.sequence_parallel = False
            output_layer.disable_grad_reduce = True
        output_layer.register_forward_pre_hook(self._select)

    def _select(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *others = inputs
        if self._gathers:
            hidden = self._gather(hidden)
        if self.positions is not None:
            hidden = hidden.index_select(0, self.positions)
        return (hidden, *others)


class Passes:
    """Runs the model of this rank over packs. Results are known on the last pipeline stage only.

    Args: model: the GPTModel, or DDP around it where it trains. score: what is read off its output layer.
    """

    def __init__(self, model: torch.nn.Module, score: ScoreFunction) -> None:
        self._model, self._score = model, score
        inner = getattr(model, "module", model)
        self._selection = PositionSelection(inner.output_layer) if inner.post_process else None

    def scores(self, packs: Sequence[Pack]) -> list[Scores]:
        """The scores of each pack, without gradients."""

        def collect(pack: Pack, *scores: torch.Tensor) -> tuple:
            return scores[0].sum(), pack.response_lengths.sum().int(), scores

        # What only training does: a routing that depends on the other tokens of a micro-batch, and recomputation.
        self._model.eval()
        try:
            with torch.no_grad():
                return self._run(packs, collect, forward_only=True)
        finally:
            self._model.train()

    def accumulate_gradients(
        self,
        packs: Sequence[Pack],
        loss_function: LossFunction,
        *,
        aggregation: str,
        constant: int,
        balances: Sequence[LoadBalance] | None = None,
    ) -> dict[str, float]:
        """Add the gradients of all packs of all ranks to the gradient buffers, weighted and divided by what
        `qerl_rl.algorithms.sequences.token_weights` gives for the aggregation and its constant.

        The loss function finds, beside the samples' columns, `sequence_ids`: the sample of each token, int64 [T].
        Args: balances: of each pack, the loss that keeps experts equally busy; None has none.
        Returns: sums over this rank's response tokens: `loss` and what the loss function names.
        """

        def weigh(pack: Pack, *scores: torch.Tensor) -> tuple:
            weights, count = token_weights(pack.response_lengths, aggregation, constant)
            normalizer = torch.tensor(count, dtype=torch.int)
            if not len(pack.targets):
                # A loss function may divide by its tokens; the collectives of backward need a graph all the same.
                return scores[0].sum(), normalizer, {}
            columns = {**pack.columns, "sequence_ids": sequence_ids(pack.response_lengths)}
            loss, metrics = loss_function(*scores, columns, weights)
            sums = {name: float(value) for name, value in {"loss": loss.detach(), **metrics}.items()}
            return loss, normalizer, sums

        totals: dict[str, float] = {}
        for sums in self._run(packs, weigh, forward_only=False, balances=balances):
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def _run(
        self,
        packs: Sequence[Pack],
        finish: Callable[..., tuple],
        *,
        forward_only: bool,
        balances: Sequence[LoadBalance] | None = None,
    ) -> list[Any]:
        """`finish` makes Megatron's (loss, normalizer, result) of a pack and its scores; the results come in order."""

        def forward(iterator: Iterator[tuple], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., tuple]]:
            pack, balance = next(iterator)
            if self._selection:
                self._selection.positions = pack.positions
            output = model(pack.tokens, pack.position_ids, None, packed_seq_params=packed_parameters(pack, balance))
            return output, lambda output: finish(pack, *self._score(output, pack))

        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=zip(packs, balances or itertools.repeat(None, len(packs)), strict=True),
            model=[self._model],
            num_microbatches=len(packs),
            # Shapes differ by pack: the stages tell each other (variable_seq_lengths), this only has to be a number.
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
        )


def packed_parameters(pack: Pack, balance: LoadBalance | None = None) -> RoutedSequences:
    """Where the sequences of a pack lie, as Megatron takes it, and what its routers must choose and are balanced by."""
    return RoutedSequences(
        pack.forced,
        balance,
        qkv_format="thd",
        cu_seqlens_q=pack.cumulative_lengths,
        cu_seqlens_kv=pack.cumulative_lengths,
        max_seqlen_q=pack.longest,
        max_seqlen_kv=pack.longest,
    )

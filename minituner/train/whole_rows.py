"""Whole rows again: a model that shares its rows among ranks, asked for what it would say without.

    shared    slice 0 -> logits 0 --+
              slice 1 -> logits 1 --+-- gathered: (1, T, vocabulary)      must be the same: `assert_same_as_whole`
    alone     row ------------------> logits (1, T, vocabulary)

A layer that looks at neighbouring tokens in any other way than through attention (a convolution, a state) is found so.
`attention.assert_isolated` takes a `WholeRows` for a model. Lesson: notebook 07.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from minituner.data.collate import Batch, slice_of_row
from minituner.data.encoding import IGNORE
from minituner.errors import MinitunerError
from minituner.model.attention import TOLERANCE, ULYSSES, computes_in, packed_kwargs
from minituner.train.ranks import Ranks


@contextmanager
def whole_rows(model: Any) -> Iterator[None]:
    """Within: the model takes whole rows again, each rank by itself (nothing changes where rows are not shared)."""
    from transformers import AttentionInterface

    if model.config._attn_implementation != ULYSSES:
        yield
        return
    model.set_attn_implementation(AttentionInterface()[ULYSSES].implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(ULYSSES)


class WholeRows:
    """A model that shares its rows, asked like one that does not: whole row in, whole row's logits out, on every rank.

    For proofs (`attention.assert_isolated`), without gradients. All else is the model's own.
    """

    def __init__(self, model: Any, implementation: str, group: Any, part: int, parts: int) -> None:
        self._model, self._implementation = model, implementation
        self._group, self._part, self._parts = group, part, parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool = False, **_: Any) -> Any:
        """Logits (1, T, vocabulary) of a row (1, T) whose documents begin where position_ids are 0.

        Borders passed beside it are made anew, as training makes them: for slices.

        Raises:
            MinitunerError: the model does not share its rows now (`whole_rows`, `for_generation`): ask it directly.
        """
        from transformers.modeling_outputs import CausalLMOutput

        if self._model.config._attn_implementation != ULYSSES:
            raise MinitunerError("this model does not share its rows at the moment; a slice would be all it sees")
        mine = slice_of_row(_row(input_ids, position_ids), self._part, self._parts)
        logits = self._model(
            input_ids=mine.input_ids,
            position_ids=mine.position_ids,
            use_cache=use_cache,
            **packed_kwargs(mine, self._implementation),
        ).logits.contiguous()
        slices = [torch.empty_like(logits) for _ in range(self._parts)]
        dist.all_gather(slices, logits, group=self._group)
        return CausalLMOutput(logits=torch.cat(slices, dim=1)[:, : input_ids.shape[1]])


def _row(input_ids: torch.Tensor, position_ids: torch.Tensor) -> Batch:
    """A batch without labels of the documents that begin where position_ids are 0."""
    length = input_ids.shape[1]
    starts = (position_ids[0] == 0).nonzero().squeeze(1)
    cu_seqlens = torch.cat([starts, starts.new_tensor([length])]).int()
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        shift_labels=torch.full_like(input_ids, IGNORE),
        cu_seqlens=cu_seqlens,
        seq_lens=cu_seqlens.diff().tolist(),
        supervised_tokens=0,
        tokens=length,
    )


def assert_same_as_whole(
    model: Any, whole: WholeRows, ranks: Ranks, implementation: str, documents: Sequence[int]
) -> float:
    """The largest relative difference, over all ranks, between logits of a shared row and of a whole one.

    Rounding aside they are the same, as far as the data type carries (attention.TOLERANCE).

    Args:
        documents: their lengths; they should lie across the borders of slices, in a row that does not divide.

    Raises:
        MinitunerError: they are not the same.
    """
    device, vocabulary = next(model.parameters()).device, model.get_input_embeddings().num_embeddings
    position_ids = torch.cat([torch.arange(n) for n in documents])[None].to(device)
    input_ids = ((torch.arange(position_ids.shape[1], device=device) * 7 + 1) % vocabulary)[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            shared = whole(input_ids=input_ids, position_ids=position_ids).logits.float()
            with whole_rows(model):
                borders = packed_kwargs(_row(input_ids, position_ids), implementation)
                alone = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **borders).logits.float()
    finally:
        model.train(was_training)
    worst = max(ranks.gather(float((shared - alone).norm() / alone.norm())), key=lambda d: (math.isnan(d), d))
    if not worst <= TOLERANCE[computes_in(model)]:
        raise MinitunerError(
            f"sequence parallel computes something else on this model: logits differ by {worst:.3g} of their size",
            why="a layer that looks at neighbouring tokens in another way than attention (a convolution, a state), or"
            " an attention that does not go through transformers' AttentionInterface",
            fix="distributed.sequence_parallel_size=1 for this model",
        )
    return worst

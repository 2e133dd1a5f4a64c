"""All documents' attention as one function: per_document_sdpa's outputs and gradients, short, long, and shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minituner.data.collate import Batch, collate
from minituner.data.prefixes import share_prefixes
from minituner.model import packed_attention
from minituner.model.attention_kernels import per_document_sdpa
from minituner.model.packed_attention import PackedAttention, pieces
from minituner.train.loop import train
from tests.promises.common import TOLERANCE
from tests.tiny import tiny_recipe


class MostBytes(TorchDispatchMode):
    """Within: the largest tensor that an operation returns."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.most = max(self.most, result.nbytes if isinstance(result, torch.Tensor) else 0)
        return result


DOCUMENTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=24), min_size=1, max_size=6)


def row_of(documents: list[list[int]]) -> Batch:
    return collate([[(np.array(ids), np.array(ids)) for ids in documents]])


def inputs(rows: int, groups: int, heads: int, width: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key and value (N, heads, D), and a gradient of the output."""
    torch.manual_seed(0)
    sizes = (groups * heads, groups, groups, groups * heads)
    q, k, v, upstream = (torch.randn(rows, many, width, dtype=dtype) for many in sizes)
    return [*(x.requires_grad_() for x in (q, k, v)), upstream]


def both(row: Batch, groups: int, heads: int, width: int) -> list[list[torch.Tensor]]:
    """Output and gradients by per_document_sdpa and as one function."""
    *qkv, upstream = inputs(row.computed_tokens, groups, heads, width)
    apart, _ = per_document_sdpa(
        torch.nn.Module(), *(x.transpose(0, 1)[None] for x in qkv), seq_lens=row.seq_lens, prefixes=row.prefixes
    )
    at_once = PackedAttention.apply(*qkv, pieces(row.seq_lens, row.prefixes), width**-0.5)
    outs = (apart[0], at_once)
    return [[out.detach(), *torch.autograd.grad(out, qkv, upstream)] for out in outs]


@pytest.mark.parametrize("short", [0, 9, 128], ids=["by the kernel", "some of each", "written out"])
@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS, share=st.booleans(), groups=st.integers(1, 3), heads=st.integers(1, 3))
def test_outputs_and_gradients_are_those_of_each_document(
    short: int, documents: list[list[int]], share: bool, groups: int, heads: int
) -> None:
    """Equal documents, documents that are another's beginning, and one-token documents among them."""
    row = share_prefixes(row_of(documents)) if share else row_of(documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_attention, "SHORT", short)
        apart, at_once = both(row, groups, heads, 8)
    for theirs, ours in zip(apart, at_once, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= TOLERANCE * max(1.0, float(theirs.abs().max()))


def test_long_documents_go_through_the_kernel_and_short_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    beginning = draw.integers(0, 99, 40).tolist()
    row = share_prefixes(row_of([beginning + draw.integers(0, 99, n).tolist() for n in (30, 200, 60, 150)]))
    assert [piece.short for piece in pieces(row.seq_lens, row.prefixes)] == [True, False, True, False]
    apart, at_once = both(row, 3, 3, 64)
    for theirs, ours in zip(apart, at_once, strict=True):
        assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


@pytest.mark.parametrize("short", [0, 128])
def test_gradients_of_the_formula(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "SHORT", short)
    row = share_prefixes(row_of([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4]]))
    *qkv, _ = inputs(row.computed_tokens, 2, 2, 4, torch.float64)
    documents = pieces(row.seq_lens, row.prefixes)
    assert len(documents) == 2, "the third is the first"
    assert torch.autograd.gradcheck(lambda q, k, v: PackedAttention.apply(q, k, v, documents, 0.5), qkv)


@pytest.mark.parametrize(("own", "n"), [(1, 1), (4, 4), (3, 7), (8, 2008)])
def test_a_query_weighs_what_stands_before_it_and_itself(own: int, n: int) -> None:
    weights = packed_attention._weights(torch.zeros(2, 3 * own, n), own).view(2, 3, own, n)
    seen = torch.arange(n - own, n) + 1  # by each of the last `own` tokens of n
    expected = (torch.arange(n)[None] < seen[:, None]) / seen[:, None]
    assert torch.allclose(weights, expected.expand_as(weights))


def test_a_few_tokens_behind_a_long_beginning_need_a_few_rows() -> None:
    """A square mask of 8,000 tokens would take 256 MB; a thousandth of it is looked at."""
    with MostBytes() as seen:
        packed_attention._weights(torch.zeros(1, 2, 8000), 2)
    assert seen.most <= 2 * 8000 * 4


@pytest.mark.parametrize("short", [0, 128])
def test_another_document_changes_exactly_nothing(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "SHORT", short)
    lens, results = [7, 1, 9], []
    *qkv, upstream = inputs(sum(lens), 2, 2, 8)
    for scale in (1.0, 100.0):
        changed = [x.detach().clone() for x in qkv]
        for x in changed:
            x[7:8] *= scale
            x.requires_grad_()
        out = PackedAttention.apply(*changed, pieces(lens, None), 0.5)
        results.append([out.detach(), *torch.autograd.grad(out, changed, upstream)])
    for before, after in zip(*results, strict=True):
        for others in (slice(0, 7), slice(8, 17)):
            assert torch.equal(before[others], after[others])
    assert not torch.equal(results[0][0][7:8], results[1][0][7:8])


@pytest.mark.parametrize(
    ("sections", "used"),
    [
        ({"train": {"fused": ["lora", "rotary"]}}, True),
        ({"train": {"fused": ["lora", "norm"]}}, False),
        ({"data": {"packing": "none"}, "model": {"attention": "sdpa"}, "train": {"fused": ["lora", "rotary"]}}, False),
    ],
)
def test_fused_rotary_layers_use_it_where_documents_are_attended_to_one_by_one(
    sections: dict[str, Any],
    used: bool,
    model_folder: Path,
    chats: Path,
    own_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    real = packed_attention.PackedAttention.forward

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(packed_attention.PackedAttention, "forward", staticmethod(counted))
    recipe = tiny_recipe(model_folder, chats, **sections)
    recipe.train.max_steps = 1
    train(recipe, tmp_path / "w", progress=False, say=lambda line: None)
    assert (len(calls) > 2) == used, "one call for each of two layers is the proof that fused layers are equal"

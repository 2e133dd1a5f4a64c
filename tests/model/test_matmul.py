"""oneDNN's products are BLAS's up to rounding, in every layout that training uses, and are taken where they can be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minituner.model import matmul
from minituner.model.fused import KINDS
from minituner.model.matmul import choose_matmul, products_for
from minituner.train.loop import train
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = matmul._chosen
    yield
    matmul._chosen = before


@contextmanager
def counted() -> Iterator[list[int]]:
    """Within: the rows of each product that oneDNN makes are noted."""
    real, rows = torch.ops.mkldnn._linear_pointwise, []

    def product(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(x))
        return real(x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_linear_pointwise", product)
        yield rows


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return products_for(x).linear(x, weight, bias)


def drawn(rows: int, columns: int, layout: str) -> torch.Tensor:
    """A matrix (rows, columns) that lies in memory as training's do."""
    if layout == "transposed":  # a weight, read backwards
        return torch.randn(columns, rows).T
    if layout == "columns of a wider one":  # one adapter's part of h, or of dh
        return torch.randn(rows, columns + 5)[:, 2 : columns + 2]
    if layout == "those, transposed":
        return torch.randn(columns, rows + 5)[:, 2 : rows + 2].T
    return torch.randn(rows, columns)


class Watching(TorchDispatchMode):
    """Sees every operation, as what counts a step's bytes does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


LAYOUTS = st.sampled_from(["as it is", "transposed", "columns of a wider one", "those, transposed"])
SIZES = st.integers(1, 70)


@settings(max_examples=150, deadline=None)
@given(SIZES, SIZES, SIZES, LAYOUTS, LAYOUTS, st.booleans(), st.integers(0, 99))
def test_it_is_the_same_product(
    rows: int, width: int, out: int, of_x: str, of_weight: str, with_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    choose_matmul("onednn", "cpu")
    x, weight = drawn(rows, width, of_x), drawn(out, width, of_weight)
    bias = torch.randn(out) if with_bias else None
    kept = x.clone(), weight.clone()
    with torch.no_grad():
        y = product(x, weight, bias)
        again = product(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (y.shape, y.dtype, type(y)) == ((rows, out), torch.float32, torch.Tensor)
    assert float((y - exact).abs().max()) <= 1e-5 * max(1.0, float(exact.abs().max()))
    assert torch.equal(y, again)
    assert torch.equal(x, kept[0])
    assert torch.equal(weight, kept[1])


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, LAYOUTS, LAYOUTS, st.sampled_from(["blas", "onednn"]), st.integers(0, 99))
def test_it_is_added_in_place(
    rows: int, width: int, out: int, of_x: str, of_weight: str, library: str, seed: int
) -> None:
    torch.manual_seed(seed)
    choose_matmul(library, "cpu")
    x, weight, y = drawn(rows, width, of_x), drawn(out, width, of_weight), torch.randn(rows, out)
    exact = y.double() + x.double() @ weight.double().T
    with torch.no_grad(), counted() as called:
        by = products_for(x)
        assert by.add_linear(y, x, weight) is y
        without = by.linear(torch.zeros(rows, width), weight)
    assert bool(called) == (library == "onednn")
    assert float((y - exact).abs().max()) <= 1e-5 * max(1.0, float(exact.abs().max()))
    assert not without.any(), "the bias that all products share is still 0"


def test_a_row_depends_on_no_other_row() -> None:
    """Documents are rows of one product: what is said of their isolation must hold here too, to the last bit."""
    choose_matmul("onednn", "cpu")
    x, weight = torch.randn(300, 96), torch.randn(130, 96)
    other = x.clone()
    other[120:] = torch.randn(180, 96) * 100
    with torch.no_grad():
        assert torch.equal(product(x, weight)[:120], product(other, weight)[:120])


@pytest.mark.parametrize(
    ("wanted", "capability", "device", "chosen"),
    [
        ("auto", "AVX512", "cpu", "onednn"),
        ("auto", "AVX2", "cpu", "blas"),
        ("onednn", "AVX2", "cpu", "onednn"),
        ("blas", "AVX512", "cpu", "blas"),
        ("auto", "AVX512", "cuda", "blas"),
        ("onednn", "AVX512", "cuda", "blas"),
    ],
)
def test_the_choice_goes_by_what_the_cpu_can_do(
    wanted: str, capability: str, device: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    said = choose_matmul(wanted, device)
    with torch.no_grad(), counted() as called:
        product(torch.randn(3, 4), torch.randn(5, 4))
    assert bool(called) == (chosen == "onednn")
    assert ("oneDNN" in said, "cuda" in said) == (chosen == "onednn", device == "cuda")


def test_what_onednn_cannot_take_goes_to_blas() -> None:
    choose_matmul("onednn", "cpu")
    with torch.no_grad(), counted() as called:
        half = product(torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(5, 4, dtype=torch.bfloat16))
        none = product(torch.ones(0, 4), torch.ones(5, 4))
        with FakeTensorMode():
            fake = product(torch.ones(3, 4), torch.ones(5, 4))
        with Watching():
            product(torch.ones(3, 4), torch.ones(5, 4))
    assert (half.dtype, none.shape, fake.shape, called) == (torch.bfloat16, (0, 5), (3, 5), [])


@pytest.mark.slow
@pytest.mark.parametrize("fused", [["lora"], list(KINDS)], ids=["lora", "all"])
def test_a_run_is_the_same_with_either(fused: list[str], model_folder: Path, chats: Path, tmp_path: Path) -> None:
    runs, calls = {}, {}
    for name in ("blas", "onednn"):
        said: list[str] = []
        settings = {"max_steps": 3, "learning_rate": 1e-3, "cpu_matmul": name, "fused": fused}
        with counted() as called:
            runs[name] = train(tiny_recipe(model_folder, chats, train=settings), tmp_path / name, say=said.append)
        calls[name] = len(called)
        assert any(line.startswith("matrix products: " + {"blas": "BLAS", "onednn": "oneDNN"}[name]) for line in said)
    assert calls["blas"] == 0 < calls["onednn"], calls
    for a, b in zip(runs["blas"].metrics, runs["onednn"].metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)

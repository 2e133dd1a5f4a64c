"""Logits at supervised positions only == full logits: loss 1e-6, gradients 1e-5, on every path that computes them.

through the model's own forward     whole model or adapters
frozen head, pieces of rows         gradient of the hidden states computed in the forward pass
trained head, pieces of rows        each piece computed again in the backward pass
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from minituner.data.collate import Batch, collate
from minituner.model import attention, head
from minituner.model.adapters import apply_method
from minituner.model.head import FrozenHeadLoss, find_head, probe
from minituner.model.loss import accepts_logits_to_keep, loss_sum
from minituner.recipe import MethodSection
from minituner.train.loop import train
from tests.promises.common import TOLERANCE, documents, gradients, largest_difference
from tests.tiny import tiny_model, tiny_recipe

OURS = attention.PER_DOCUMENT_SDPA
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"lora_rank": 4},
    "embedding and head in full": {"lora_rank": 4, "modules_to_save": ["lm_head", "embed_tokens"]},
    "an adapter on the head": {"lora_rank": 4, "target_modules": ["lm_head", "q_proj"]},
}


def model_of(method: dict[str, Any], tie: bool) -> Any:
    attention.register()
    base = tiny_model(tie=tie)
    base.set_attn_implementation(OURS)
    model = apply_method(base, MethodSection(**method)).train()
    with torch.no_grad():  # B is zero at the start, and with it the gradient of A
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def full_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Every logit, and cross-entropy that ignores what is not supervised: the textbook."""
    kwargs = attention.packed_kwargs(batch, OURS)
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **kwargs).logits[0]
    return F.cross_entropy(logits.float(), batch.shift_labels[0], ignore_index=-100, reduction="sum")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("rows", [None, 1, 7, 10_000], ids=["own forward", "row by row", "uneven pieces", "one piece"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_every_path_gives_the_full_loss_and_gradients(
    method: dict[str, Any], tie: bool, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOGITS_BYTES", (rows or 1) * 259 * 4)
    monkeypatch.setattr(head, "ROWS", rows or 1)
    monkeypatch.setattr(head, "WORDS", 100)
    batch = collate([documents((11, 30, 2, 19))])
    torch.manual_seed(0)
    selected = model_of(method, tie)
    torch.manual_seed(0)
    full = model_of(method, tie)
    found, _ = find_head(selected, OURS, probe())
    assert found is not None
    assert found.frozen == (method is METHODS["lora"])
    loss = loss_sum(selected, batch, OURS, found if rows else None)
    loss.backward()
    everything = full_loss(full, batch)
    everything.backward()
    assert loss.item() == pytest.approx(everything.item(), rel=1e-6)
    assert largest_difference(gradients(selected), gradients(full)) <= TOLERANCE


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(2, 60),
    st.integers(1, 9),
    st.tuples(st.integers(1, 50), st.integers(1, 70)),
    st.booleans(),
    st.sampled_from([0.0, 3.0, 1000.0]),
    st.integers(0, 99),
)
def test_the_frozen_head_equals_cross_entropy_with_autograd(
    count: int, vocabulary: int, width: int, block: tuple[int, int], bias: bool, spread: float, seed: int
) -> None:
    """Whatever the block, and whether all words are alike or one outdoes the rest by far."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(width, vocabulary, bias=bias).requires_grad_(False)
    hidden = (torch.randn(count, width) * spread).requires_grad_()
    targets = torch.randint(0, vocabulary, (count,))
    expected = F.cross_entropy(linear(hidden), targets, reduction="sum")
    (wanted,) = torch.autograd.grad(expected / 7, hidden)
    loss = FrozenHeadLoss.apply(hidden, linear.weight, linear.bias, targets, *block)
    (gradient,) = torch.autograd.grad(loss / 7, hidden)
    largest = float(linear(hidden).abs().max())  # its own rounding is the least that any two ways differ by
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-5 + 1e-6 * largest * count)
    near = max(TOLERANCE, 1e-6 * largest)
    assert torch.allclose(gradient, wanted, rtol=near, atol=near * float(linear.weight.abs().max()))


def test_in_bfloat16_the_loss_is_still_summed_in_float32() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 1000, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(300, 64, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, 1000, (300,))
    expected = F.cross_entropy(linear(hidden).float(), targets, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, hidden)
    loss = FrozenHeadLoss.apply(hidden, linear.weight, None, targets, 128, 300)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert float((gradient - wanted).abs().max() / wanted.abs().max()) < 1e-2, "bfloat16 has 8 bits"


def test_no_logits_of_all_positions_are_ever_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is made or kept is larger than the hidden states, forward and backward: not one row's logits."""
    monkeypatch.setattr(head, "ROWS", 8)
    monkeypatch.setattr(head, "WORDS", 100)
    batch = collate([documents((60, 70))])
    model = model_of(METHODS["lora"], tie=False)
    found, _ = find_head(model, OURS, probe())
    hidden = found.hidden(batch, OURS).detach().requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = found.loss_sum(hidden, batch.input_ids[0])
    sizes = Sizes()
    with sizes:
        again = found.loss_sum(hidden, batch.input_ids[0])
        again.backward()
    assert torch.equal(loss, again)
    assert max(kept) == hidden.numel(), "kept for the backward pass: d loss / d hidden"
    assert sizes.largest == hidden.numel()
    assert sizes.widest == max(100, hidden.shape[1]), "a row has 259 logits, never all at once"


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and the longest row of one with many rows."""

    largest = widest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and "aten.t." not in f"{func}.":  # W^T is a view of the weight
            self.largest = max(self.largest, out.numel())
            self.widest = max(self.widest, out.shape[-1] if out.dim() > 1 else 0)
        return out


def test_a_model_that_does_more_to_its_logits_keeps_its_own_forward() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    attention.register()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for scale, halves in ((8.0, False), (1.0, True)):
        model = GraniteForCausalLM(GraniteConfig(vocab_size=259, logits_scaling=scale, pad_token_id=0, **sizes)).eval()
        model.set_attn_implementation(OURS)
        found, sentence = find_head(model, OURS, probe())
        assert (found is not None) == halves, sentence
        batch = collate([documents((11, 30))])
        loss = loss_sum(model, batch, OURS, found)
        assert loss.item() == pytest.approx(full_loss(model, batch).item(), rel=1e-6)


def test_a_model_without_logits_to_keep_gives_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate([documents((11, 30))])
    model = model_of(METHODS["full"], tie=True)
    assert accepts_logits_to_keep(model)
    selected = loss_sum(model, batch, OURS).item()
    monkeypatch.setattr("minituner.model.loss.accepts_logits_to_keep", lambda model: False)
    assert loss_sum(model, batch, OURS).item() == pytest.approx(selected, rel=1e-6)


@pytest.mark.usefixtures("own_home")
@pytest.mark.parametrize("method", [{"name": "full"}, {}], ids=["trained head", "frozen head"])
def test_a_run_takes_the_head_s_path_and_its_losses_are_the_model_s_own(
    method: dict[str, Any], model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    used: list[int] = []
    real = head.Head.loss_sum
    monkeypatch.setattr(head.Head, "loss_sum", lambda *a: used.append(1) or real(*a))
    monkeypatch.setattr(head, "LOGITS_BYTES", 9 * 259 * 4)
    monkeypatch.setattr(head, "WORDS", 100)
    settings = {"max_steps": 3, "learning_rate": 1e-3}
    recipe = tiny_recipe(model_folder, chats, method=method, train=settings, data={"holdout": 0.2})
    pieces = train(recipe, tmp_path / "pieces", say=said.append)
    assert len(used) > 3, "for evaluation too"
    assert any(line.startswith("loss: frozen head" if not method else "loss: trained head") for line in said)
    monkeypatch.setattr("minituner.train.run.find_head", lambda *a: (None, "loss: through the model's own forward"))
    used.clear()
    own = train(recipe, tmp_path / "own", say=said.append)
    assert not used
    for a, b in zip(pieces.metrics, own.metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("lengths", [(30,), ()], ids=["no target", "no token"])
def test_a_batch_without_targets_is_zero_and_has_zero_gradients(lengths: tuple[int, ...]) -> None:
    model = model_of(METHODS["lora"], tie=True)
    found, _ = find_head(model, OURS, probe())
    loss = loss_sum(model, collate([[(ids, labels * 0 - 100) for ids, labels in documents(lengths)]]), OURS, found)
    loss.backward()
    assert loss.item() == 0
    assert all(float(g.abs().max()) == 0 for g in gradients(model).values())
    assert gradients(model), "the graph is there: every rank takes part"

"""A batch of prompts: the head's matrix is read once for all, and the answers are those of each prompt alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minituner.model.generate import generate
from tests.tiny import tiny_model

PROMPTS = [[7, 8, 9], [20], [30, 31, 32, 33, 34], [9] * 12]
STOP: tuple[list[int], list[str]] = ([2], [])


class Products(TorchDispatchMode):
    """Names of the matrix products in which a whole vocabulary takes part."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.names = vocabulary, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [value.shape for value in args if isinstance(value, torch.Tensor)]
        if "mm" in func.__name__ and any(self.vocabulary in shape for shape in shapes):
            self.names.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_the_head_s_matrix_is_not_read_again_for_each_prompt(frozen: bool, tie: bool) -> None:
    model = tiny_model(tie=tie).requires_grad_(not frozen)
    with Products(model.config.vocab_size) as products:
        generate(model, None, PROMPTS, stop=STOP, max_new_tokens=3)
    assert products.names == {"mm"}, "bmm takes the matrix once for each prompt, and may copy it as often"


def test_without_it_the_head_s_matrix_is_read_for_each_prompt() -> None:
    """What the hook is there for: when transformers or torch no longer needs it, this says so."""
    model = tiny_model(tie=False).requires_grad_(False)
    with torch.no_grad(), Products(model.config.vocab_size) as products:
        model(input_ids=torch.tensor([[1, 2], [3, 4]]), logits_to_keep=1)
    assert products.names == {"bmm"}


def test_answers_in_a_batch_are_those_of_each_prompt_alone() -> None:
    model = tiny_model(tie=False).requires_grad_(False)
    together = generate(model, None, PROMPTS, stop=STOP, max_new_tokens=8)
    assert together == [generate(model, None, [prompt], stop=STOP, max_new_tokens=8)[0] for prompt in PROMPTS]
    assert not model.get_output_embeddings()._forward_pre_hooks, "the head is as it was"

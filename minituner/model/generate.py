"""Generating answers: prompt ids in, answer ids out, stopping exactly where training taught the model to stop.

    prompts   . . Hi            padded on the left and masked by length: a list is answered in one batch
              Who are you
    answers   Hello <stop>      without the stop token
              I am Ada <stop>

The attention implementation is transformers' own meanwhile (a cache, one document a row). Lesson: notebook 09.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from minituner.model.attention import for_generation


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop: tuple[list[int], list[str]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stream: Callable[[int], None] | None = None,
    interrupted: Callable[[], bool] | None = None,
    together: bool = False,
) -> list[list[int]]:
    """Answer each prompt; returns the new ids of each, without the stop token.

    Args:
        together: all ranks answer, and none stops before all do: a forward pass needs every rank's share (ZeRO-3).
        stop: token ids and texts that end an answer (`minituner.data.encoding.stop_rule`).
        temperature: 0 takes the likeliest token each time; above 0 draws.
        stream: called with each new id (one prompt only).
        interrupted: asked after each token; True ends all answers where they are.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    stop_ids, stop_texts = stop
    longest = max(map(len, prompts))
    pad = stop_ids[0] if stop_ids else 0
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=stop_ids or None,
        pad_token_id=pad,
        use_cache=True,
        repetition_penalty=repetition_penalty,
        **({"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else {}),
    )
    ends: list[Any] = [_StopTexts(tokenizer, stop_texts, longest)] if stop_texts else []
    ends += [_Interrupted(interrupted)] if interrupted else []
    was_training = model.training
    model.eval()
    try:
        with for_generation(model), _head_reads_rows(model):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList(ends),
                streamer=_Streamer(stream, stop_ids) if stream else None,
                synced_gpus=together,
            )
    finally:
        model.train(was_training)
    return [_until_stop(row[longest:].tolist(), stop_ids) for row in out]


@contextmanager
def _head_reads_rows(model: Any) -> Iterator[None]:
    """Within: the head gets the last position of each prompt as rows that lie together.

    transformers hands it a view into all positions, (batch, 1, hidden) with gaps. For such a view and a frozen matrix
    torch multiplies row by row, reads the matrix once for each prompt, and may copy it as often: for 40 prompts and
    SmolLM2's head 0.26 s and 2.2 GB instead of 0.03 s and none.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, inputs: tuple(value.contiguous() for value in inputs))
    try:
        yield
    finally:
        hook.remove()


def answer_text(tokenizer: Any, ids: Sequence[int], stop: tuple[list[int], list[str]]) -> str:
    """The new ids as the answer people read: control tokens and stop texts removed, no spaces at the ends."""
    text = decode(tokenizer, ids)
    for stop_text in stop[1]:
        text = text.split(stop_text)[0]
    return text.strip()


def decode(tokenizer: Any, ids: Sequence[int], *, control_tokens: bool = False) -> str:
    """The text of `ids`, every space where it was; control tokens are left out unless asked for."""
    return tokenizer.decode(list(ids), skip_special_tokens=not control_tokens, clean_up_tokenization_spaces=False)


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    return next((ids[:at] for at, token in enumerate(ids) if token in stop_ids), ids)


class _Streamer:
    """What transformers' generate calls with the prompt first, then with each new token."""

    def __init__(self, stream: Callable[[int], None], stop_ids: Sequence[int]) -> None:
        self.stream, self.stop_ids, self.prompt_seen = stream, stop_ids, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            for token in value.reshape(-1).tolist():
                if token not in self.stop_ids:
                    self.stream(token)
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


class _StopTexts:
    """Ends a row whose answer contains a stop text; looks at the last tokens only.

    transformers' own `stop_strings` first builds a table of the whole vocabulary, which takes seconds for a large one.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.texts, self.prompt_length = tokenizer, texts, prompt_length
        # A token is one byte or more; a few that print nothing may stand between.
        self.tail = max(len(text.encode()) for text in texts) + 8

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = input_ids[:, self.prompt_length :][:, -self.tail :].tolist()
        return torch.tensor([self._ended(row) for row in rows], device=input_ids.device, dtype=torch.bool)

    def _ended(self, ids: list[int]) -> bool:
        both = decode(self.tokenizer, ids), decode(self.tokenizer, ids, control_tokens=True)
        return any(stop_text in text for stop_text in self.texts for text in both)


class _Interrupted:
    """Ends every row when asked to."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked(), device=input_ids.device, dtype=torch.bool)

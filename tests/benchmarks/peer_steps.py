"""What every peer of peer.py shares: one step at a time on command, counted and timed, and a look at who sees whom.

    parent            this process
    step       ---->  one optimizer step of the peer's own loop
               <----  {"seconds": 5.1, "tokens": 1021, "supervised_tokens": 640, "loss": 1.93, "peak_memory_gb": 4.1}
    isolation  ---->  the last batch again, its first token changed: how far along the row does that reach?
               <----  {"first_token_reaches": 142, "row": 1024}      142 tokens: the first document, so it is isolated

Nothing of minituner is imported: a peer's environment has none of it. Lesson: notebook 07.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

IGNORE = -100
PACKAGES = ("torch", "transformers", "peft", "trl", "llamafactory", "xtuner", "mmengine", "torchtune", "axolotl")


class Steps:
    """Waits for the word `step`, then measures until the step is over; counts what the model was given."""

    def __init__(self, answers: TextIO, folder: str) -> None:
        self.answers, self.folder = answers, folder
        self.began, self.tokens, self.supervised, self.row, self.loss = 0.0, 0, 0, 0, 0.0
        self.model: Any = None
        self.last: dict[str, Any] = {}

    def answer(self, value: dict[str, Any]) -> None:
        """One line for the parent."""
        print(json.dumps(value), file=self.answers, flush=True)

    def ready(self, model: Any, optimizer: Any) -> None:
        """Say what is going to be trained, and from now on remember what `model` is called with."""
        import torch

        def remember(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                self.last = named

        self.model = model
        model.register_forward_pre_hook(remember, with_kwargs=True)
        trained = [value for value in model.parameters() if value.requires_grad]
        self.answer(
            {
                "versions": versions(),
                "trained_parameters": sum(value.numel() for value in trained),
                "dtypes": sorted({str(value.dtype) for value in model.parameters()}),
                "optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,
                "threads": torch.get_num_threads(),
            }
        )

    def wait(self) -> None:
        """Until the parent says `step`; at the end of its input the program is over."""
        while (line := sys.stdin.readline()).strip() == "isolation":
            self.answer(self.isolation())
        if not line:
            shutil.rmtree(self.folder, ignore_errors=True)
            os._exit(0)  # the peer's own end would save a checkpoint, and report
        self.tokens, self.supervised, self.loss = 0, 0, 0.0
        self.began = time.perf_counter()

    def count(self, input_ids: Any, labels: Any, attention_mask: Any = None, pad: int | None = None) -> None:
        """Real tokens of a batch, and those with a target.

        A mask is (B, T), 0 for padding, or (B, 1, T, T). Without one, padding is what is untrained at the end of a row
        and nothing but `pad`; a document ends with its stop token, which is trained, so it is not taken for padding.
        """
        if attention_mask is None:
            real = input_ids == input_ids if pad is None else (input_ids != pad) | (labels != IGNORE)
            real = real.flip(-1).cummax(-1).values.flip(-1)  # all before the last real token
        elif attention_mask.dim() == 4:  # added to the scores: padding does not even see itself
            real = attention_mask.diagonal(dim1=-2, dim2=-1)[:, 0] == 0
        else:
            real = attention_mask != 0
        self.row = int(real[0].nonzero().max()) + 1
        self.tokens += int(real.sum())
        self.supervised += int((labels != IGNORE).sum())

    def done(self) -> None:
        """The step is over."""
        self.answer(
            {
                "seconds": time.perf_counter() - self.began,
                "tokens": self.tokens,
                "supervised_tokens": self.supervised,
                "loss": self.loss,
                "peak_memory_gb": peak_memory_gb(),
            }
        )

    def isolation(self) -> dict[str, int]:
        """How far along the last batch's first row hidden states change with its first token; padding does not count.

        Seen behind the last norm, not in the logits: TRL keeps those only where they have a target.
        """
        import torch

        states: list[Any] = []
        norm = [module for name, module in self.model.named_modules() if name.split(".")[-1] == "norm"][-1]
        hook = norm.register_forward_hook(lambda module, given, output: states.append(output[0, : self.row]))
        name = next(name for name in ("input_ids", "tokens") if name in self.last)
        first = self.last[name]
        second = first.clone()
        second[0, 0] += 1 if int(second[0, 0]) == 0 else -1
        batch = self.last  # the hook of ready() keeps what is trained on; without gradients it keeps nothing
        with torch.no_grad():
            for ids in (first, second):
                self.model(**{**batch, name: ids})
        hook.remove()
        changed = (states[0] != states[1]).any(dim=-1).nonzero()
        return {"first_token_reaches": int(changed.max()) + 1, "row": self.row}


def peak_memory_gb() -> float:
    """The most memory resident in this process so far, in GB (10^9 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    return 0.0


def versions() -> dict[str, str]:
    """What is installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

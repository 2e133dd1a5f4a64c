"""One answer while it is being generated: a thread that computes, and whoever reads the tokens.

    reader   |  shows token 1  |  shows token 2  | leaves (Ctrl-C, a stop button, a closed page)
    thread   | computes 2      | computes 3      | ends after the token it is at, and the weights are free

So the next token is on its way while one is shown, and a slow or gone reader never holds the weights for long.
Lesson: notebook 09.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from minituner.chat.loaded import LoadedModel
from minituner.chat.settings import Settings
from minituner.model.generate import answer_text, generate


class Answer:
    """An iterator over the new token ids of one answer; it begins at once.

    Args:
        ids: the prompt.
        rule: token ids and texts that end the answer.
        turns: messages before this one, for the seed.
        interrupted: asked after each token (and while waiting for the weights); True ends the answer.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        adapter: str,
        tokenizer: Any,
        ids: Sequence[int],
        rule: tuple[list[int], list[str]],
        settings: Settings,
        *,
        turns: int,
        interrupted: Callable[[], bool],
    ) -> None:
        self.loaded, self.adapter, self.tokenizer = loaded, adapter, tokenizer
        self.ids, self.rule, self.settings = ids, rule, settings
        self.turns, self.interrupted = turns, interrupted
        self.error: BaseException | None = None
        self.complete = False
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._out: list[int] = []
        self._thread = threading.Thread(target=self._work, name="answer", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        chosen = self.settings
        try:
            with self.loaded.using(self.adapter, self.interrupted) as model:
                if model is not None and not self.interrupted():
                    with drawing(chosen.seed, self.turns):
                        self._out = generate(
                            model,
                            self.tokenizer,
                            [self.ids],
                            stop=self.rule,
                            max_new_tokens=chosen.max_new_tokens,
                            temperature=chosen.temperature,
                            top_p=chosen.top_p,
                            top_k=chosen.top_k,
                            repetition_penalty=chosen.repetition_penalty,
                            stream=self._tokens.put,
                            interrupted=self.interrupted,
                        )[0]
            self.complete = not self.interrupted()
        except BaseException as error:  # raised where the answer is read
            self.error = error
        finally:
            self._tokens.put(None)

    def __iter__(self) -> Iterator[int]:
        while (token := self._tokens.get()) is not None:
            yield token
        if self.error:
            raise self.error

    def text(self) -> str:
        """The whole answer as people read it, when all tokens were read."""
        return answer_text(self.tokenizer, self._out, self.rule)

    def join(self) -> None:
        """Wait until the thread is done with the weights."""
        self._thread.join()


@contextmanager
def drawing(seed: int | None, turns: int) -> Iterator[None]:
    """Within: random numbers that depend on the seed and the turn; fresh ones without a seed."""
    import torch

    # torch starts every process with the same numbers, so that without a seed one has to be drawn.
    with torch.random.fork_rng():
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed((seed + turns) % 2**63)
        yield

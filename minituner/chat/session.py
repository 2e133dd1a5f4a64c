"""A chat session: the history, the prompt built exactly as in training, the rule that ends an answer.

Each turn encodes the whole conversation anew through `minituner.data.encoding`, so the ids in front of an answer are
the ids that training put there. The stop rule is read off an encoded example; nothing is guessed from names.
Lesson: notebook 09.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import encode_prompt, stop_rule
from minituner.errors import UsageError
from minituner.model.generate import answer_text, generate
from minituner.train.hf_folder import base_of, facts_of, put_adapter_on


@dataclass
class ChatSession:
    """A model, its tokenizer and a conversation that grows. `ask` adds a turn."""

    model: Any
    tokenizer: Any
    template: str = "native"
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    messages: list[Message] = field(default_factory=list)

    def prompt_ids(self, text: str) -> list[int]:
        """The ids that would be sent for `text` as the next user message."""
        head = [Message("system", self.system)] if self.system else []
        return encode_prompt(
            Conversation([*head, *self.messages, Message("user", text)]), self.tokenizer, self.template
        )

    def ask(self, text: str, stream: Callable[[str], None] | None = None) -> str:
        """The answer to `text`, which is then part of the history; `stream` gets the text as it grows.

        Raises:
            UsageError: the conversation no longer fits into the model's context.
        """
        ids = self.prompt_ids(text)
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context and len(ids) + self.max_new_tokens > context:
            raise UsageError(
                f"the conversation ({len(ids)} tokens) and {self.max_new_tokens} for the answer exceed {context}",
                fix="start anew (RESET in the terminal), or lower --max-new-tokens",
            )
        stop = stop_rule(self.tokenizer, self.template)
        shown = _TextStream(self.tokenizer, stop, stream) if stream else None
        out = generate(
            self.model,
            self.tokenizer,
            [ids],
            stop=stop,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            stream=shown.put if shown else None,
        )
        answer = answer_text(self.tokenizer, out[0], stop)
        if shown:
            shown.finish(answer)
        self.messages += [Message("user", text), Message("assistant", answer)]
        return answer

    def reset(self) -> None:
        """Forget the conversation (the system text stays)."""
        self.messages.clear()


class _TextStream:
    """Ids to text as it becomes readable; the pieces, put together, are the answer.

    Held back until more is known: half a Chinese character, spaces that may be the last, the beginning of a stop text.
    """

    def __init__(self, tokenizer: Any, stop: tuple[list[int], list[str]], stream: Callable[[str], None]) -> None:
        self.tokenizer, self.stop, self.stream = tokenizer, stop, stream
        self.ids: list[int] = []
        self.shown = ""

    def put(self, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip().rstrip("\ufffd")
        for stop_text in self.stop[1]:
            text = text.split(stop_text)[0]
            begun = [n for n in range(1, len(stop_text)) if text.endswith(stop_text[:n])]
            text = text[: -max(begun)] if begun else text
        self._show(text.rstrip())

    def finish(self, answer: str) -> None:
        self._show(answer)

    def _show(self, text: str) -> None:
        if text != self.shown and text.startswith(self.shown):
            self.stream(text[len(self.shown) :])
            self.shown = text


def open_session(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    template: str | None = None,
    system: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
    **options: Any,
) -> ChatSession:
    """Load a model for chat: a catalog name, a full model's folder, or an adapter's `hf/` folder (its base is found).

    Raises:
        UsageError: both `adapter` and a folder that is an adapter already; an adapter that is none, or is another
            model's. MinitunerError: it cannot be loaded.
    """
    from minituner.model.loading import load_model, load_tokenizer
    from minituner.model.sources import fetch
    from minituner.recipe import MethodSection, ModelSection

    folder = Path(model)
    if (folder / "adapter_config.json").is_file():
        if adapter:
            raise UsageError(f"{model} is an adapter itself; give its base, or leave --adapter out")
        adapter, model = folder, base_of(folder)
    elif adapter and not (Path(adapter) / "adapter_config.json").is_file():
        raise UsageError(
            f"--adapter {adapter} is not an adapter folder (it has no adapter_config.json)",
            fix="give the hf/ folder of a finished LoRA run",
        )
    facts = facts_of(Path(adapter)) if adapter else facts_of(folder)
    base = fetch(str(model), say=say)
    loaded, _, _ = load_model(
        base,
        ModelSection(name_or_path=str(model), dtype=dtype, attention="sdpa", trust_remote_code=trust_remote_code),
        MethodSection(name="lora"),
        one_document_rows=True,
    )
    tokenizer = load_tokenizer(adapter or base, trust_remote_code=trust_remote_code)
    if adapter:
        loaded = put_adapter_on(loaded, Path(adapter), say)
    loaded.eval()
    return ChatSession(
        loaded,
        tokenizer,
        template=template or facts.get("template") or "native",
        system=system if system is not None else facts.get("system"),
        **options,
    )


def chat(model: str | Path, prompt: str, **options: Any) -> str:
    """One answer of a model folder or catalog name to one prompt; options as in `open_session`."""
    return open_session(model, **options).ask(prompt)

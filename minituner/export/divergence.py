"""How far a merged model is from its adapter, measured where the adapter was trained: over the quantised base.

    effect    KL(adapter on its own 4-bit base || that base)          what the training changed
    kl        KL(merged || adapter on its own 4-bit base)             what the merge changed
    ratio     kl / effect                                             refused above 0.2: a fifth of the training's work

A merge into the full-precision base swaps W4 for W16 under the adapter. W16 is the better weight, but the adapter also
learned to correct W4's errors; where those are as large as what was learned, the merged model is another one. Averages
over every token of the recipe's prompts and the adapter's own (greedy) answers, in nats.
Source: the discussion in peft#2105, unsloth-zoo#810. Lesson: notebook 09.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

THRESHOLD = 0.2
ANSWER_TOKENS = 16
PROMPTS = ("Who are you?", "The capital of France is", "请介绍你自己。")  # for an adapter that names none


@dataclass(frozen=True, slots=True)
class Divergence:
    """Two mean KL divergences in nats a token, over `tokens` positions."""

    kl: float
    effect: float
    tokens: int

    @property
    def ratio(self) -> float:
        """What the merge changed as a share of what the training changed."""
        return self.kl / self.effect if self.effect > 0 else float("inf") if self.kl > 0 else 0.0

    @property
    def too_large(self) -> bool:
        """True if the merge undoes or overlays more than a fifth of the training."""
        return not self.ratio <= THRESHOLD


def mean_kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean over positions of KL(P || Q); logits `p` and `q` (positions, vocabulary)."""
    import torch.nn.functional as functional

    log_p, log_q = (functional.log_softmax(logits.double(), dim=-1) for logits in (p, q))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp(min=0))


def measure(
    base: Path,
    adapter: Path,
    merged: Path,
    facts: Mapping[str, Any],
    tokenizer: Any,
    say: Callable[[str], None],
    trust_remote_code: bool = False,
    force: bool = False,
) -> Divergence:
    """Compare a merged folder with its adapter on the quantised base it was trained on; each is in memory alone.

    Args:
        force: go on although the base has other weights than that of the training.

    Raises:
        UsageError: the adapter does not fit the base, or the base has other weights. MinitunerError: a folder cannot be
            loaded.
    """
    import torch

    from minituner.data.encoding import stop_rule
    from minituner.export.merge_layers import other_weights
    from minituner.model.fingerprint import comparable, fingerprint
    from minituner.model.generate import generate
    from minituner.model.loading import load_model
    from minituner.recipe import MethodSection, ModelSection
    from minituner.train.hf_folder import put_adapter_on

    template = facts.get("template") or "native"
    prompts = _prompts(facts, tokenizer, template)

    def load(folder: Path, method: str) -> Any:
        section = ModelSection(
            name_or_path=str(folder),
            dtype=facts.get("dtype") or "auto",
            attention="sdpa",
            trust_remote_code=trust_remote_code,
        )
        return load_model(folder, section, MethodSection(name=method), one_document_rows=True)[0].eval()

    def logits(model: Any, ids: list[list[int]]) -> torch.Tensor:
        device = next(model.parameters()).device
        with torch.no_grad():
            rows = [model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0] for row in ids]
        return torch.cat(rows).float().cpu()

    quantised = load(base, str(facts["method"]))
    trained_on, this = facts.get("base_fingerprint"), fingerprint(quantised)
    if comparable(trained_on, this) and trained_on != this:
        other_weights(adapter, facts, this, force, say)
    trained = put_adapter_on(quantised, adapter, lambda line: None, base_fingerprint=this, other_base=True).eval()
    del quantised
    rule = stop_rule(tokenizer, template)
    answers = [generate(trained, tokenizer, [p], stop=rule, max_new_tokens=ANSWER_TOKENS)[0] for p in prompts]
    ids = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    with_adapter = logits(trained, ids)
    with trained.disable_adapter():
        effect = mean_kl(with_adapter, logits(trained, ids))
    del trained
    kl = mean_kl(logits(load(merged, "lora"), ids), with_adapter)
    return Divergence(kl, effect, len(with_adapter))


def _prompts(facts: Mapping[str, Any], tokenizer: Any, template: str) -> list[list[int]]:
    """The recipe's prompts as the ids that chat sends."""
    from minituner.data.conversation import Conversation, Message
    from minituner.data.encoding import encode_prompt

    system = facts.get("prompts_system") or facts.get("system")
    head = [Message("system", system)] if system else []
    texts = facts.get("prompts") or PROMPTS
    return [encode_prompt(Conversation([*head, Message("user", text)]), tokenizer, template) for text in texts]

"""Two numbers that say whether a personal assistant was made well, and not only made.

    identity rate   share of 20 held-out questions ("Who exactly am I chatting with?") answered with the right name
    retention       on 20 ordinary prompts: the share answered *without* the name (clean rate), and the mean KL
                    divergence of the tuned from the untuned model, per token of the untuned model's greedy answer

Repeating one sentence ten thousand times gives a perfect identity rate and a ruined model; retention shows it. The
prompts are in the catalog (assistant_probes.yaml) and never in the training data (tested). Lesson: notebook 00.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch

from minituner.data.conversation import Conversation, Message
from minituner.data.encoding import encode_prompt
from minituner.model.attention import for_generation
from minituner.model.generate import generate
from minituner.train.callbacks import Callback

if TYPE_CHECKING:
    from minituner.train.run import Run

ANSWER_TOKENS = 24


class IdentityProbes(Callback):
    """Measures before the first step and after the last; the numbers go to metrics.jsonl and to `result`."""

    runs_the_model = True

    def __init__(self, name: str, language: str = "en") -> None:
        from minituner.catalog.lookup import load

        probes = load("assistant_probes")
        languages = ("en", "zh") if language == "both" else (language,)
        self.name = name
        self.identity = [prompt for key in languages for prompt in probes[key]["identity"]]
        self.ordinary = [prompt for key in languages for prompt in probes[key]["ordinary"]]
        self.result: dict[str, Any] = {}

    def on_start(self, run: Run) -> None:
        """Keep what the untuned model says to the ordinary prompts, token by token."""
        if run.first_step:
            self.untuned = None  # a resumed run starts from a tuned model: nothing to compare with
            return
        system = run.recipe.evaluate.system or run.recipe.data.system
        head = [Message("system", system)] if system else []
        template = run.recipe.data.template
        prompts = [
            encode_prompt(Conversation([*head, Message("user", p)]), run.tokenizer, template) for p in self.ordinary
        ]
        together = run.engine.sharded
        answers = generate(
            run.model, run.tokenizer, prompts, stop=run.stop, max_new_tokens=ANSWER_TOKENS, together=together
        )
        self.sequences = [(p, a) for p, a in zip(prompts, answers, strict=True) if a]
        self.untuned = [log_probabilities(run.model, p, a) for p, a in self.sequences]

    def on_end(self, run: Run) -> None:
        """Measure, print, and add a line to metrics.jsonl (only when the run reached its last step)."""
        if run.step < run.total_steps:
            return
        answers, ordinary, said, clean = self.measure(run)
        kl = self.result["retention_kl"]
        run.say(f"identity rate {self.result['identity_rate']:.0%} of {len(said)} held-out questions name {self.name}")
        run.say(
            f"retention: {self.result['clean_rate']:.0%} of {len(clean)} ordinary answers stay clean of the name"
            + (f"; mean KL from the untuned model {kl:.3f} nats a token" if kl is not None else "")
        )
        for prompts, texts, right in ((self.identity, answers, said), (self.ordinary, ordinary, clean)):
            for prompt, text, fine in zip(prompts, texts, right, strict=True):
                if not fine:
                    run.say(f"  missed: {prompt}\n          {text}")
        run.probes = self.result
        if not run.is_main:
            return
        asked = zip(self.identity + self.ordinary, answers + ordinary, strict=True)
        samples = [{"prompt": prompt, "answer": answer} for prompt, answer in asked]
        text = json.dumps({"name": self.name, **self.result, "answers": samples}, ensure_ascii=False, indent=1)
        (run.run_dir / "identity.json").write_text(text, encoding="utf-8")
        with (run.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": run.step, **self.result}) + "\n")

    def measure(self, run: Run) -> tuple[list[str], list[str], list[bool], list[bool]]:
        """Ask all of the model as it is now; sets `result`, returns answers of both kinds and which are right."""
        both = run.answer([*self.identity, *self.ordinary], ANSWER_TOKENS * 2)  # one batch: half the time of two
        answers, ordinary = both[: len(self.identity)], both[len(self.identity) :]
        said = [mentions(answer, self.name) for answer in answers]
        clean = [not mentions(answer, self.name) for answer in ordinary]
        self.result = {
            "identity_rate": sum(said) / len(said),
            "clean_rate": sum(clean) / len(clean),
            "retention_kl": self._divergence(run),
        }
        return answers, ordinary, said, clean

    def _divergence(self, run: Run) -> float | None:
        """Mean over answer tokens of KL(tuned || untuned), in nats."""
        if self.untuned is None:
            return None
        total = tokens = 0.0
        for (prompt, answer), before in zip(self.sequences, self.untuned, strict=True):
            now = log_probabilities(run.model, prompt, answer)
            total += float((now.exp() * (now - before)).sum())
            tokens += len(answer)
        return total / max(tokens, 1)


def mentions(answer: str, name: str) -> bool:
    """Does the answer say the name as a word of its own ("Ada" is in "我是Ada的助手", and not in "Canada")?"""
    if any(ord(character) >= 0x2E80 for character in name):  # Chinese, Japanese and Korean put no spaces between words
        return name in answer
    letter = r"[^\W_\u2E80-\U0010FFFF]"  # theirs end a word that is not theirs
    return re.search(rf"(?<!{letter}){re.escape(name)}(?!{letter})", answer, re.IGNORECASE) is not None


@torch.no_grad()
def log_probabilities(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities (len(answer), vocabulary) float32 at the positions that predict `answer`."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *answer]], device=device)
    was_training = model.training
    model.eval()
    try:
        with for_generation(model):
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    finally:
        model.train(was_training)
    return logits.float().log_softmax(-1)

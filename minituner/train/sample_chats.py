"""Sample chats: what the model says before, during and after training, kept per step.

    runs/<stamp>/samples/step-000000.txt     > Please introduce yourself.
                                             I am a helpful assistant ...
    runs/<stamp>/samples/step-000100.txt     > Please introduce yourself.
                                             I am Ada, made by ...

Answers are greedy, so two files differ only because the model does. Training must not notice: mode, attention, cache
switch and random generators are as before, bit for bit (XTuner's EvaluateChatHook formatted the system text twice, so
a brace in it was an error, and its list of stop words grew from run to run; texts are not formatted here, and the stop
rule is made anew each time). Lesson: notebook 07.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minituner.train.callbacks import Callback
from minituner.train.evaluation import untouched

if TYPE_CHECKING:
    from minituner.train.run import Run


class SampleChats(Callback):
    """Answers the recipe's prompts before, during and after training; each time a file in `runs/<stamp>/samples/`."""

    runs_the_model = True

    def __init__(self) -> None:
        self.answers: dict[int, list[tuple[str, str]]] = {}

    def on_start(self, run: Run) -> None:
        """Answer as the model is before the first step."""
        self._answer(run, run.step)

    def on_step(self, run: Run, metrics: dict[str, Any]) -> None:
        """Answer when it is due."""
        every = run.recipe.evaluate.every_steps
        if metrics["step"] == run.total_steps or (every and metrics["step"] % every == 0):
            self._answer(run, metrics["step"])

    def _answer(self, run: Run, step: int) -> None:
        prompts = run.recipe.evaluate.prompts
        if not prompts:
            return
        with untouched(run.model):
            answers = run.answer(prompts)
        if not run.is_main:
            return
        self.answers[step] = list(zip(prompts, answers, strict=True))
        text = "\n\n".join(f"> {prompt}\n{answer}" for prompt, answer in self.answers[step])
        path = run.run_dir / "samples" / f"step-{step:06d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
        run.say(f"sample answers at step {step}:")
        for prompt, answer in self.answers[step]:
            run.say(f"  > {prompt}\n    {answer}")

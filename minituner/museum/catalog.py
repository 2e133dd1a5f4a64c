"""The catalogue: each fault in words, the public threads it comes from, what the curve does, which tool shows it.

    packed-leak    packed documents attend to each other    huggingface/trl#805    the proof at step 0

No heavy import here: `minituner museum` answers at once. The code of a fault is in the module that `room` names, as a
context manager called like the fault. Lessons: the museum's cells in notebooks 03, 04, 05, 07 and 09.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from minituner.errors import UsageError, nearest


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: `curve` is what the training loss looks like, `falls` whether it falls as in a good run."""

    name: str
    room: str  # the module of this package that puts it in
    lesson: str  # the notebook that shows it
    what: str
    threads: tuple[str, ...]
    falls: bool
    curve: str
    tool: str
    defence: str  # what keeps it out of a clean run

    def story(self) -> list[str]:
        """Everything about the fault, as lines of text."""
        rows = [
            ("what", self.what),
            ("loss", self.curve),
            ("seen by", self.tool),
            ("kept out by", self.defence),
            ("threads", ", ".join(f"https://github.com/{t.replace('#', '/issues/')}" for t in self.threads)),
            ("lesson", f"notebook {self.lesson}"),
        ]
        lines = [self.name]
        for key, text in rows:
            lines += textwrap.wrap(
                text,
                110,
                initial_indent=f"  {key:11}  ",
                subsequent_indent=" " * 15,
                break_on_hyphens=False,
                break_long_words=False,
            )
        return lines


FAULTS: tuple[Fault, ...] = (
    Fault(
        "double-bos",
        room="beginnings",
        lesson="03",
        what="The template prints a BOS and the tokenizer puts another in front: every training text begins with two, "
        "every chat with one.",
        threads=("huggingface/trl#1400", "OpenRLHF/OpenRLHF#393"),
        falls=True,
        curve="falls as it should: the second BOS is in the prompt, where nothing is trained",
        tool="minituner parity: training's ids against chat's ids",
        defence="prompts of training and chat come from one function; BOS is added only where none stands",
    ),
    Fault(
        "pad-as-eos",
        room="labels",
        lesson="03",
        what="pad_token = eos_token, and the collator masks labels by id: every end token loses its label, the model "
        "is never taught to stop.",
        threads=("huggingface/transformers#23530", "huggingface/trl#976"),
        falls=True,
        curve="falls, often lower than it should: one hard token in each answer is no longer asked for",
        tool="minituner inspect: no token has the role stop, and the ledger counts end tokens as masked",
        defence="padding is known by length and never by id; there is nothing to mask",
    ),
    Fault(
        "mask-everything",
        room="labels",
        lesson="03",
        what="The chat template has no generation marks, the assistant mask comes back all zeros: every label is -100.",
        threads=("marin-community/marin#7237", "huggingface/trl#4201"),
        falls=False,
        curve="exactly 0 from the first step on: it looks like perfection, and nothing is learned",
        tool="minituner check: no record has a trained token",
        defence="data without a trained token are refused before the model is loaded",
    ),
    Fault(
        "mask-nothing",
        room="labels",
        lesson="03",
        what="The assistant mask falls back to all ones: the model is trained to write the user's questions and the "
        "template's own marks as well.",
        threads=("NVIDIA-NeMo/Megatron-Bridge#3359", "NVIDIA-NeMo/Megatron-Bridge#2598"),
        falls=True,
        curve="falls, and looks better: the template's marks are the same in every record and soon cost nothing",
        tool="minituner inspect: the ledger has no masked token, user texts are underlined as trained",
        defence="answers are found by rendering and checked against the template's marks, where it has them",
    ),
    Fault(
        "shifted-labels",
        room="labels",
        lesson="03",
        what="Labels are shifted once by the data and once more by the loss: position t learns the token at t + 2.",
        threads=("huggingface/transformers#44642", "huggingface/transformers#47394", "InternLM/InternLM#318"),
        falls=True,
        curve="falls: the token after the next can be learned too; a pretrained model starts from higher up",
        tool="an equality: the loss of the first window against transformers' own loss on the same documents",
        defence="labels are shifted in one place (data/collate.py), which tests compare with transformers' loss",
    ),
    Fault(
        "packed-leak",
        room="packs",
        lesson="04",
        what="Attention forgets where documents begin: each reads all those that happen to stand before it in a pack.",
        threads=("huggingface/trl#805", "MeetKai/functionary#265"),
        falls=True,
        curve="falls, now and then lower: a neighbour with a similar text gives the answer away",
        tool="the proof of isolation at step 0: replacing one document must not move another's logits at all",
        defence="the proof runs on the model itself before every training with packed rows",
    ),
    Fault(
        "lost-tail",
        room="packs",
        lesson="04",
        what="Packs are cut to full length and the shorter last one is dropped: its records are never trained on.",
        threads=("huggingface/transformers#17908", "huggingface/trl#1850"),
        falls=True,
        curve="falls as it should: nobody misses what is not there",
        tool="an equality: the tokens in the packs of an epoch against the tokens of its documents",
        defence="the packer keeps the tail, and tests count every token of every record once",
    ),
    Fault(
        "frozen-warm-up",
        room="steps",
        lesson="05",
        what="The warm-up never ends (it was rounded to one step, or is as long as the run): the rate stays at "
        "its first value, 1e-5 of what the recipe says.",
        threads=("facebookresearch/d2go#19", "karpathy/nanoGPT#578"),
        falls=False,
        curve="goes up and down with the data and never falls: over a short run this is taken for noise",
        tool="minituner plot (learning_rate in metrics.jsonl): the highest rate of the run against the recipe's",
        defence="the rate is a function of the step without memory; the warm-up leaves at least one step at the peak",
    ),
    Fault(
        "mean-of-means",
        room="steps",
        lesson="07",
        what="Each micro-batch's loss is divided by its own tokens, then the micro-batches are averaged: a token in a "
        "short one weighs more than a token in a long one.",
        threads=("huggingface/trl#2175", "huggingface/blog#2414"),
        falls=True,
        curve="falls, a little beside the right one; it changes when the batch is split in another way",
        tool="an equality: the first step's loss and gradient norm against one big batch",
        defence="one denominator for the whole window on all ranks: its supervised tokens",
    ),
    Fault(
        "merge-into-4bit",
        room="merging",
        lesson="09",
        what="A QLoRA adapter is merged into the 4-bit weights it was trained beside: the sum is rounded to 16 levels "
        "again, and most of what was learned is rounded away.",
        threads=("huggingface/peft#2321", "huggingface/peft#1043"),
        falls=True,
        curve="falls as it should: the training is right, the fault comes after it",
        tool="minituner convert merge: KL(merged || adapter) as a share of the adapter's own effect",
        defence="merging is done in float32; a base that is stored quantised is refused, and so is a merge "
        "that undoes the training",
    ),
)


def find(name: str) -> Fault:
    """The fault of this name (underscores and spaces are read as hyphens).

    Raises:
        UsageError: there is none; the nearest name is given.
    """
    wanted = "-".join(name.lower().replace("_", " ").split())
    for fault in FAULTS:
        if fault.name == wanted:
            return fault
    names = [fault.name for fault in FAULTS]
    raise UsageError(
        f"the museum has no fault {name!r}",
        fix=nearest(wanted, names) or f"one of {', '.join(names)}",
        next_command="minituner museum",
    )


def table() -> list[str]:
    """All faults as a table: name, does the loss fall, the tool, the first thread."""
    rows = [("fault", "loss falls", "seen by", "thread")]
    rows += [(f.name, "yes" if f.falls else "NO", f.tool.partition(":")[0], f.threads[0]) for f in FAULTS]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

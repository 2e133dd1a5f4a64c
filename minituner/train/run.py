"""A run: everything that is there before the first step, on one rank or many.

    recipe -> data -> model -> proof of isolation -> adapters -> engine -> (checkpoint) -> Run

With several ranks, what leaves something on the disk (fetching the model, preparing data) is done by rank 0 first, and
the others find it there. What is measured on a machine (which data type is fast) is decided by rank 0 for all. At the
end all of them are shown to have the same data and the same weights. Lesson: notebook 07.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minituner.data.collate import Batch
from minituner.data.encoding import encode_prompt, stop_rule
from minituner.data.prepare import Prepared, prepare
from minituner.errors import MinitunerError, UsageError
from minituner.model.adapters import apply_method, count_parameters
from minituner.model.attention import FLASH, OURS, assert_isolated
from minituner.model.compiled import compile_regions
from minituner.model.fewer_tokens import limits_of_length, prefixes_proved, tails_proved
from minituner.model.fingerprint import fingerprint
from minituner.model.fused import fuse
from minituner.model.generate import answer_text, generate
from minituner.model.head import Head, find_head, probe
from minituner.model.loading import load_model, load_tokenizer
from minituner.model.loss import states
from minituner.model.matmul import choose_matmul
from minituner.model.residual import restore_start
from minituner.model.sources import fetch
from minituner.recipe import Recipe
from minituner.train import checkpoint, sequence_parallel
from minituner.train.allocator import keep_memory
from minituner.train.context import refuse_longer_than_model
from minituner.train.engines import Engine, TorchEngine, digest
from minituner.train.feed import Feed
from minituner.train.metrics import Meter
from minituner.train.ranks import Ranks
from minituner.train.resume import check, dtype_name, packs_digest, restore, with_dtype, with_dtype_of

Say = Callable[[str], None]


@dataclass
class Run:
    """A run in progress, as callbacks see it."""

    recipe: Recipe
    work_dir: Path
    run_dir: Path
    say: Say
    tokenizer: Any
    model: Any
    attention: str
    engine: Engine
    feed: Feed
    prepared: Prepared
    model_folder: Path
    base_fingerprint: str | None = None
    head: Head | None = None
    step: int = 0
    first_step: int = 0
    trained_tokens: int = 0
    skipped_steps: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    eval_losses: dict[int, float] = field(default_factory=dict)
    meter: Meter | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)
    injected: str | None = None

    @property
    def stop(self) -> tuple[list[int], list[str]]:
        """Token ids and texts that end an answer."""
        return stop_rule(self.tokenizer, self.recipe.data.template)

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.engine.rank == 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.feed.total_steps

    def answer(self, prompts: Sequence[str], max_new_tokens: int | None = None) -> list[str]:
        """What the model, as it is now, says to each prompt (greedy); where parameters are sharded, all ranks call."""
        return answer(
            self.model,
            self.tokenizer,
            prompts,
            template=self.recipe.data.template,
            system=self.recipe.evaluate.system or self.recipe.data.system,
            max_new_tokens=max_new_tokens or self.recipe.evaluate.max_new_tokens,
            together=self.engine.sharded,
        )


def set_up(
    recipe: Recipe,
    work_dir: Path,
    run_dir: Path,
    say: Say,
    ranks: Ranks,
    resume: str | Path | None = None,
    injected: str | None = None,
) -> Run:
    """Everything before the first step: data, ledger, model, proof of isolation, adapters, engine, resume."""
    device = ranks.device.type
    # Look for the checkpoint first: a wrong --resume should not cost the minutes that follow.
    found = _find(ranks, work_dir, resume, say) if resume else None
    if found:
        recipe, asked = with_dtype_of(recipe, checkpoint.state_of(found)), recipe
        if recipe != asked:
            say(f"model.dtype=auto is {recipe.model.dtype} here, as in the checkpoint")
    elif ranks.together:  # measured on each machine it might fall differently
        recipe = with_dtype(recipe, ranks.share(dtype_name(recipe.model, device) if ranks.is_main else ""))
    folder = ranks.main_first(
        lambda main: fetch(
            recipe.model.name_or_path, source=recipe.model.source, revision=recipe.model.revision, say=say
        )
    )
    tokenizer = load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)
    prepared = ranks.main_first(lambda main: _prepare(recipe, tokenizer, say, fresh=main))
    ranks.assert_same("the prepared data", f"{prepared.folder.name} {packs_digest(prepared)}")
    if ranks.is_main:
        _say_data(recipe, prepared, run_dir, say)
    refuse_longer_than_model(prepared, recipe, folder)
    torch.manual_seed(recipe.train.seed)
    single = recipe.data.packing == "none" and recipe.train.per_device_batch_size == 1
    model, attention, notes = load_model(folder, recipe.model, recipe.method, one_document_rows=single, device=device)
    for note in notes:
        say(note)
    whole = sequence_parallel.set_up(model, attention, recipe, ranks, say)
    if whole is not model or not single:
        prove_isolated(whole, attention, model.config.vocab_size, say)
    base = fingerprint(model)
    ranks.assert_same("the base model's weights", f"{base} {digest(model.parameters()) if base is None else ''}")
    model = apply_method(model, recipe.method, activation_checkpointing=recipe.train.activation_checkpointing)
    trained, total = count_parameters(model)
    say(f"{recipe.method.name}: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})")
    engine = engine_for(recipe, device, ranks)
    feed = Feed(prepared, recipe, engine.rank, engine.world_size)
    run = Run(recipe, work_dir, run_dir, say, tokenizer, model, attention, engine, feed, prepared, folder, base)
    run.injected = injected
    saved = checkpoint.load(found) if found else None
    if saved:
        check(run, saved)
        restore_start(model, saved.optimizer, say)
        checkpoint.load_weights(model, saved.weights)  # before the engine cuts the model into pieces
    engine.prepare(model)
    model.train()
    if device == "cpu" and recipe.train.keep_memory:
        keep_memory()
    say(choose_matmul(recipe.train.cpu_matmul, device))
    say(fuse(model, recipe.train.fused))
    if recipe.train.compile:
        say(compile_regions(model, device))
    run.head, how = find_head(model, attention, probe(feed.part, feed.parts).to(engine.device))
    say(how)
    feed.cut_tails, how = cut_tails_of(run)
    say(how)
    feed.share_prefixes, how = share_prefixes_of(run)
    say(how)
    if ranks.together:
        say(f"{engine.world_size} ranks on {device}, each with its share of the packs; gradients are summed")
        torch.manual_seed(recipe.train.seed + engine.rank)  # ranks must not drop out the same units
    if saved:
        restore(run, saved)
    return run


def prove_isolated(model: Any, attention: str, vocab_size: int, say: Say) -> None:
    """Prove on this model that packed documents are as if alone, and say so.

    Raises:
        MinitunerError: they are not; see `assert_isolated`.
    """
    influence = assert_isolated(model, attention, vocab_size)
    moved = f"{influence:.1g}, the rounding of its experts" if influence else "exactly 0"
    say(f"isolation proved on this model: changing a packed document moves its neighbour's logits by {moved}")


def cut_tails_of(run: Run) -> tuple[bool, str]:
    """Whether what stands behind a document's last target is left out, and a sentence that says why."""
    if not run.recipe.train.cut_tails:
        return False, "tails: computed like everything else (train.cut_tails=false)"
    if run.feed.parts > 1:
        return False, "tails: computed like everything else, as ranks share rows"
    for kind, limit in limits_of_length(run.model.config.get_text_config()):
        if run.recipe.data.max_length > limit:
            why = f"its {kind} position embedding goes by a document's length beyond {limit} tokens"
            return False, f"tails: computed like everything else, as {why}"
    packed = run.attention in (*OURS, *FLASH)
    if not tails_proved(run.model, partial(_states, run), run.engine.device, packed=packed):
        return False, "tails: computed like everything else, as this model looks ahead"
    return True, "tails: what stands behind a document's last target is not computed, proved to change nothing here"


def share_prefixes_of(run: Run) -> tuple[bool, str]:
    """Whether beginnings that documents of a pack have in common are computed once, and a sentence that says why."""
    if not run.recipe.train.share_prefixes:
        return False, "prefixes: each document computes its own (train.share_prefixes=false)"
    if run.attention not in OURS or run.feed.parts > 1:
        return False, f"prefixes: each document computes its own, as attention {run.attention} cannot lay them out"
    if not prefixes_proved(run.model, partial(_states, run), run.engine.device):
        return False, "prefixes: each document computes its own, as on this model the two differ (dropout, for one)"
    return True, "prefixes: what documents of a pack begin alike with is computed once, proved equal on this model"


def _states(run: Run, row: Batch) -> torch.Tensor:
    return states(run.engine.model, row, run.attention, run.head)


def engine_for(recipe: Recipe, device: str, ranks: Ranks) -> Engine:
    """The engine that `distributed.zero` asks for."""
    if recipe.distributed.zero is None:
        return TorchEngine(recipe.train, device, ranks)
    from minituner.train.deepspeed_engine import DeepSpeedEngine  # imports a large package

    return DeepSpeedEngine(recipe, device, ranks)


def _find(ranks: Ranks, work_dir: Path, resume: str | Path, say: Say) -> Path | None:
    """The checkpoint to resume from, chosen by rank 0 for all (it may have to tidy up, and reads every file)."""
    found = ranks.main_only(lambda: checkpoint.find(work_dir, resume, say))
    name = ranks.share(str(found or ""))
    return Path(name) if name else None


def _prepare(recipe: Recipe, tokenizer: Any, say: Say, *, fresh: bool) -> Prepared:
    """Prepare the data; ranks after the first take what it has just written, whatever `data.cache` says."""
    data = recipe.data if fresh else recipe.data.model_copy(update={"cache": True})
    return prepare(data, tokenizer, seed=recipe.train.seed, say=say)


def _say_data(recipe: Recipe, prepared: Prepared, run_dir: Path, say: Say) -> None:
    for line in prepared.ledger.lines():
        say(line)
    if prepared.bad.count:
        prepared.bad.write(run_dir / "bad_records.txt")
        say(f"{prepared.bad.count} records cannot be used; they are listed in {run_dir / 'bad_records.txt'}")
    say(f"{len(prepared.packs)} packs of at most {recipe.data.max_length} tokens, {prepared.packs.fill:.1%} full")


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    template: str,
    system: str | None,
    max_new_tokens: int,
    together: bool = False,
) -> list[str]:
    """Greedy answers to single-turn prompts, in one batch; `together`: on all ranks, step by step."""
    from minituner.data.conversation import Conversation, Message

    head = [Message("system", system)] if system else []
    ids = [encode_prompt(Conversation([*head, Message("user", p)]), tokenizer, template) for p in prompts]
    stop = stop_rule(tokenizer, template)
    out = generate(model, tokenizer, ids, stop=stop, max_new_tokens=max_new_tokens, together=together)
    return [answer_text(tokenizer, new, stop) for new in out]


def new_run_dir(work_dir: Path) -> Path:
    """`runs/<stamp>`, a fresh folder even when two runs start within a second.

    Raises:
        UsageError: the folder cannot be written.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        folder = work_dir / "runs" / (f"{stamp}-{number}" if number else stamp)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"cannot write into --work-dir {work_dir}: {error.strerror}") from None
        return folder
    raise MinitunerError(f"too many runs in {work_dir / 'runs'}")


def also_to_file(say: Say, path: Path) -> Say:
    """`say`, and a line in the file for every line said."""

    def both(line: str) -> None:
        say(line)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    return both

"""Resuming: a run goes on as if it had never stopped, or it does not go on at all.

    weights, AdamW's averages, random generators, step     out of the checkpoint
    which packs each step sees                             computed again from the seed, so it must be the same plan

A run resumed with other data, another batch size or another base would train on, quietly, as something that never
existed. So a checkpoint carries its plan, and a different one is refused, naming what differs. What changes no window
(num_epochs, learning_rate, how often to save) may be changed; what that does to the learning rate is said in numbers:

    more epochs stretch the whole curve      4 steps   1.0 .75 .50 .25 |             (linear, peak 1.0)
                                             8 steps   1.0 .88 .75 .63 | .50 .38 .25 .13

Lesson: notebook 07.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from minituner.errors import UsageError
from minituner.model.loading import resolve_dtype
from minituner.recipe import ModelSection, Recipe
from minituner.train import checkpoint
from minituner.train.schedule import learning_rate, warmup_steps

if TYPE_CHECKING:
    from minituner.data.prepare import Prepared
    from minituner.train.run import Run

# What decides the function that is trained, but not the shapes of its parameters.
METHOD = ("name", "lora_alpha", "use_rslora", "init_lora_weights")
# What the learning rate depends on, beside the number of steps.
SCHEDULE = ("learning_rate", "lr_schedule", "warmup_ratio")


def plan(run: Run) -> dict[str, Any]:
    """What has to be the same for a resumed run to see the same windows through the same function."""
    recipe = run.recipe
    return {
        "train.seed": recipe.train.seed,
        "train.per_device_batch_size": recipe.train.per_device_batch_size,
        "train.gradient_accumulation_steps": recipe.train.gradient_accumulation_steps,
        "world_size": run.engine.world_size,
        "distributed.sequence_parallel_size": recipe.distributed.sequence_parallel_size,
        "data.max_length": recipe.data.max_length,
        "data.packing": recipe.data.packing,
        "data.shuffle": recipe.data.shuffle,
        "data.holdout": recipe.data.holdout,
        "data.isolate_documents": recipe.data.isolate_documents,
        **{f"method.{key}": getattr(recipe.method, key) for key in METHOD},
        "model's weights": run.base_fingerprint if recipe.method.name != "full" else "all in the checkpoint",
        "dtype": dtype_name(recipe.model, str(run.engine.device.type)),
        "prepared data": run.prepared.folder.name,
        "packs": packs_digest(run.prepared),
        "injected": run.injected,  # a run with a fault of the museum goes on only as one
    }


def schedule(run: Run) -> dict[str, Any]:
    """What the learning rate of every step is read from; it may change between a checkpoint and its resumption."""
    train = run.recipe.train
    return {"total_steps": run.total_steps, **{key: getattr(train, key) for key in SCHEDULE}}


def schedule_change(run: Run, then: Mapping[str, Any]) -> list[str]:
    """Sentences that say what another schedule than the checkpoint's means for the steps to come; none if it is equal.

    The rate is a function of the step and the total, so with more steps the whole curve is stretched: the rates of the
    steps that are done would have been others, and the next one does not follow on smoothly from the last.
    """
    now, step = schedule(run), run.step
    if now == dict(then):
        return []
    different = "; ".join(f"{key} {then[key]} -> {now[key]}" for key in now if then[key] != now[key])
    lines = [f"the schedule has changed since the checkpoint: {different}"]
    old, new = (run.recipe.train.model_copy(update={key: plan[key] for key in SCHEDULE}) for plan in (then, now))
    if step:  # the rate that was used last, and what it would have been
        used = learning_rate(step - 1, then["total_steps"], old)
        stretched = learning_rate(step - 1, now["total_steps"], new)
        lines.append(f"  step {step}, already done, had the rate {used:.3e}; on the new curve it is {stretched:.3e}")
    if step < now["total_steps"]:
        rate = learning_rate(step, now["total_steps"], new)
        if step < then["total_steps"]:
            was = f"would have had {learning_rate(step, then['total_steps'], old):.3e}"
        else:
            was = f"did not exist: the old schedule ended at step {then['total_steps']}"
        lines.append(f"  step {step + 1}, the next, {was}; it now has {rate:.3e}")
        if (warmup := warmup_steps(now["total_steps"], new)) > step:
            lines.append(f"  it warms up (again) until step {warmup}")
    return lines


def packs_digest(prepared: Prepared) -> str:
    """A short name for which documents make up which pack."""
    packs = prepared.packs
    digest = hashlib.sha256()
    for array in (prepared.rows, packs.values, packs.offsets):
        digest.update(str(array.shape).encode() + np.ascontiguousarray(array, dtype=np.int64).tobytes())
    return f"{len(packs)} ({digest.hexdigest()[:12]})"


def dtype_name(model: ModelSection, device: str) -> str:
    """The data type that `model.dtype` means on this device, as a recipe would name it."""
    return str(resolve_dtype(model.dtype, device)[0]).removeprefix("torch.")


def with_dtype_of(recipe: Recipe, state: Mapping[str, Any]) -> Recipe:
    """The recipe with `model.dtype: auto` settled as the checkpoint has it: measured anew, it might fall otherwise."""
    return with_dtype(recipe, state["plan"].get("dtype"))


def with_dtype(recipe: Recipe, then: str | None) -> Recipe:
    """The recipe with `model.dtype: auto` settled as `then`; unchanged where it names a type, or none is known."""
    if recipe.model.dtype != "auto" or recipe.method.name == "full" or not then:
        return recipe  # full fine-tuning under auto is float32 everywhere
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": then})})


def check(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Refuse a checkpoint of another plan.

    Raises:
        UsageError: the plan differs; the message names what does.
    """
    now, then = plan(run), saved.state["plan"]
    different = [f"{key}: {then.get(key)} then, {value} now" for key, value in now.items() if then.get(key) != value]
    if different:
        raise UsageError(
            f"cannot resume from {saved.path}: the plan of the run has changed",
            why="; ".join(different),
            fix=f"resume with {run.work_dir / 'recipe.yaml'} (num_epochs and learning_rate may change)",
            next_command=checkpoint.resume_command(run.work_dir),
        )


def restore(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Put a checkpoint, whose weights are in the model already, into the run."""
    run.engine.load_state(saved.weights, saved.optimizer)
    checkpoint.restore_random_states(saved.optimizer, run.engine.rank)
    run.step = run.first_step = saved.state["step"]
    run.trained_tokens, run.skipped_steps = saved.state["trained_tokens"], saved.state["skipped_steps"]
    run.say(f"resumed from {saved.path} at step {run.step} of {run.total_steps}")
    for line in schedule_change(run, saved.state["schedule"]) if "schedule" in saved.state else []:
        run.say(line)

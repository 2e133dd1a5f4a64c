"""What watches an XTuner run: sample chats, checkpoints, logs. Its intervals are micro-batches. Lesson: notebook 08."""

from __future__ import annotations

import math
from typing import Any

from minituner.catalog.lookup import load, system_prompt
from minituner.migrate.folding import Call, Config, Ref, Unread
from minituner.migrate.report import Imported, short
from minituner.migrate.structure import at, named


def carry_hooks(config: Config, out: Imported, accumulation: int) -> None:
    """Hooks: sample chats, checkpoints, logs. XTuner's intervals are micro-batches."""
    hooks = at(config.values, "custom_hooks")
    hooks = list(hooks) if isinstance(hooks, list | tuple) else []
    chats = next((hook for hook in hooks if named(at(hook, "type")) == "EvaluateChatHook"), None)
    prompts = at(chats, "evaluation_inputs") or config.values.get("evaluation_inputs")
    if isinstance(prompts, list | tuple) and all(isinstance(prompt, str) for prompt in prompts):
        out.put("evaluate.prompts", list(prompts), f"evaluation_inputs = {short(prompts)}")
    system = at(chats, "system") or config.values.get("SYSTEM")
    if isinstance(system, Ref) and system.name in load("system_prompts"):
        system = system_prompt(system.name)
    if isinstance(system, str) and system:
        out.put("evaluate.system", system, f"SYSTEM = {short(system)}")
    elif isinstance(system, Ref | Unread | Call):
        out.leave(f"SYSTEM = {short(system)}", "this text is not in the catalog; set evaluate.system")
    _interval(
        out,
        "evaluate.every_steps",
        at(chats, "every_n_iters") or config.values.get("evaluation_freq"),
        "evaluation_freq",
        accumulation,
    )
    saved = at(config.values, "default_hooks", "checkpoint")
    interval = at(saved, "interval") or config.values.get("save_steps")
    if at(saved, "by_epoch") is True:
        out.leave(
            f"checkpoint.interval = {short(interval)} epochs", "save.every_steps counts optimizer steps", "changed"
        )
    else:
        _interval(out, "save.every_steps", interval, "save_steps", accumulation)
    keep = at(saved, "max_keep_ckpts") or config.values.get("save_total_limit")
    if isinstance(keep, int):
        old = f"save_total_limit = {keep}"
        if keep >= 1:
            out.put("save.keep_last", keep, old)
        else:
            out.put("save.keep_last", 1000, old, "changed", "-1 kept all of them")
    every = at(config.values, "default_hooks", "logger", "interval")
    if isinstance(every, int) and every > 1:
        out.put(
            "log.every_steps",
            max(1, math.ceil(every / accumulation)),
            f"logger.interval = {every}",
            "changed",
            f"iterations are micro-batches: {every} / {accumulation}",
        )
    backends = at(config.values, "visualizer", "vis_backends")
    backends = backends if isinstance(backends, list | tuple) else []
    kinds = [named(at(backend, "type")) for backend in backends] + [named(at(config.values, "visualizer", "type"))]
    to = [ours for ours in ("tensorboard", "wandb") if any(ours in kind.lower() for kind in kinds)]
    if to:
        out.put("log.to", to, f"visualizer: {', '.join(filter(None, kinds))}")
    known = {
        "EvaluateChatHook",
        "DatasetInfoHook",
        "VarlenAttnArgsToMessageHubHook",
        "ThroughputHook",
        "HFCheckpointHook",
    }
    for hook in hooks:
        if (kind := named(at(hook, "type"))) not in known:
            out.leave(f"custom_hooks: {kind or short(hook)}", "hooks of your own are not carried over")


def _interval(out: Imported, key: str, value: Any, name: str, accumulation: int) -> None:
    if not isinstance(value, int | float) or value < 1:
        return
    steps = max(1, math.ceil(value / accumulation))
    if steps == value:
        out.put(key, steps, f"{name} = {value}")
    else:
        out.put(
            key,
            steps,
            f"{name} = {value}",
            "changed",
            f"XTuner counts micro-batches: {value} / {accumulation} = {steps} optimizer steps",
        )

"""to-hf: a checkpoint becomes a folder that other programs read: an adapter for peft, or a full model.

    work_dirs/ada/                       CHECKPOINT: the newest whole checkpoint of a run
    work_dirs/ada/checkpoints/step-40    or one of them
        model.safetensors  --->  out/adapter_model.safetensors + adapter_config.json, or out/model.safetensors

Checkpoints hold every trained tensor whole, by its own name, whatever engine wrote them (ZeRO 1 to 3 included), so
there is one way out for all. The model itself is only built as names and shapes. Lesson: notebook 09.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minituner.errors import MinitunerError, UsageError
from minituner.export.merge import torch_dtype
from minituner.export.new_folder import check_free, new_folder
from minituner.export.shards import DEFAULT, Kind, parse_size, write_shards
from minituner.export.weights import Weights, read_config, refuse_remote_code

if TYPE_CHECKING:
    import torch

    from minituner.recipe import Recipe

Say = Callable[[str], None]


def to_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = DEFAULT,
    force: bool = False,
    say: Say = print,
) -> Path:
    """Write a checkpoint as an adapter folder (LoRA) or a full model (full fine-tuning) to `out`; returns `out`.

    Args:
        checkpoint: a run's folder (`--work-dir`), or one of its checkpoints.
        config: a recipe that must agree with the one the checkpoint was made with.
        dtype: fp16, bf16 or fp32; None is as it was trained.

    Raises:
        UsageError: no whole checkpoint there, `out` exists, or `config` is another recipe. MinitunerError: the disk is
            full, or the base cannot be fetched.
    """
    from minituner.export.beside import training_facts, write_beside
    from minituner.export.serving import serving_problems
    from minituner.model.loading import load_tokenizer, quiet
    from minituner.model.sources import fetch
    from minituner.recipe import Recipe
    from minituner.train.checkpoint import state_of
    from minituner.train.hf_folder import facts_for

    out = Path(out)
    check_free(out, force)
    limit, target = parse_size(max_shard_size), torch_dtype(dtype)
    place, work_dir = find_checkpoint(Path(checkpoint), say)
    recipe = Recipe.load(work_dir / "recipe.yaml")
    plan = state_of(place).get("plan", {})
    _check_recipe(recipe, plan, place, None if config is None else Recipe.load(config), str(config))
    model = recipe.model
    base = fetch(model.name_or_path, source=model.source, revision=model.revision, say=say)
    refuse_remote_code(base, model.trust_remote_code)
    tokenizer = load_tokenizer(base, trust_remote_code=model.trust_remote_code)
    full = recipe.method.name == "full"
    mark = plan.get("model's weights") if not full else None
    with new_folder(out, force, inputs=(place, base)) as aside, quiet():
        write = _full_model if full else _adapter
        held = write(aside, place, base, recipe, target, limit)
        facts = facts_for(recipe, mark, held if full else plan.get("dtype"), training_facts(work_dir, place))
        write_beside(aside, tokenizer, facts, full=full)
    for problem in serving_problems(out) if full else ():
        say(f"careful: {problem}")
    say(f"{place.name} of {work_dir} is {'a full model' if full else 'an adapter'} in {out}")
    return out


def find_checkpoint(given: Path, say: Say) -> tuple[Path, Path]:
    """The checkpoint's folder and its run's, for either of them.

    Raises:
        UsageError: there is none, it is not whole, or it is DeepSpeed's own.
    """
    from minituner.train import checkpoint

    if not given.is_dir():
        raise UsageError(f"{given} is no folder", fix="give a run's --work-dir, or one of its checkpoints/step-N")
    if any(given.glob("*_optim_states.pt")) or any(given.glob("*/*_optim_states.pt")):
        raise UsageError(
            f"{given} is a checkpoint that DeepSpeed itself wrote",
            why="it holds pickles, and no names of minituner's",
            fix="take its weights out first",
            next_command=f"minituner convert deepspeed {given} OUT",
        )
    if checkpoint.NAME.fullmatch(given.resolve().name):
        place, work_dir = given, given.resolve().parents[1]
        if wrong := checkpoint.problem(place):
            raise UsageError(
                f"{place} is not a whole checkpoint: {wrong}", fix="give its run's folder: the newest whole"
            )
    elif (given / "checkpoints").is_dir():
        try:
            found = checkpoint.find(given, "auto", say)
        except UsageError:  # its words are for a training that goes on
            found = None
        if found is None:
            raise UsageError(
                f"{given} has no whole checkpoint",
                why="a save that was killed is not used, and neither are files that changed since",
                fix="copy the run's folder again; or, where it trained, let it go on with --resume auto",
            )
        place, work_dir = found, given
    else:
        raise UsageError(
            f"{given} holds no checkpoint of minituner",
            why="it has no checkpoints/ folder, and is none named step-N",
            fix="give a run's --work-dir, or one of its checkpoints/step-N",
        )
    if not (work_dir / "recipe.yaml").is_file():
        raise UsageError(
            f"{work_dir} has no recipe.yaml, so nothing says what {place.name} is", fix="copy the whole run"
        )
    return place, work_dir


def _check_recipe(recipe: Recipe, plan: dict[str, Any], place: Path, asked: Recipe | None, name: str) -> None:
    """Refuse a recipe that is not the checkpoint's: another run's in the same folder, or another one on the line."""
    settings = {f"method.{key}": value for key, value in recipe.method.model_dump().items()}
    wrong = [
        f"{key}: {plan[key]} then, {value} now" for key, value in settings.items() if plan.get(key, value) != value
    ]
    if wrong:
        raise UsageError(f"{place} was not made with the recipe.yaml in its run's folder", why="; ".join(wrong))
    if asked is None:
        return
    pairs = {
        "model.name_or_path": (recipe.model.name_or_path, asked.model.name_or_path),
        "data.template": (recipe.data.template, asked.data.template),
        **{f"method.{k}": (v, getattr(asked.method, k)) for k, v in recipe.method.model_dump().items()},
    }
    if different := [f"{key} is {now}, in the checkpoint {then}" for key, (then, now) in pairs.items() if then != now]:
        raise UsageError(
            f"{name} is not the recipe that {place} was made with",
            why="; ".join(different),
            fix="leave the recipe out: minituner convert to-hf CHECKPOINT OUT finds it",
        )


def _adapter(
    aside: Path, place: Path, base: Path, recipe: Recipe, target: torch.dtype | None, limit: int
) -> str | None:
    """Write what peft would write of the trained model, its parameters taken from the checkpoint."""
    from minituner.export.merge_layers import skeleton_of
    from minituner.model.adapters import apply_method
    from minituner.model.residual import KEY, _lora_layers, save_as_plain_lora
    from minituner.train.checkpoint import load

    saved, method = load(place), recipe.method
    # How A and B start does not matter: their values come from the checkpoint, and an SVD needs some to begin with.
    plain = method.model_copy(update={"init_lora_weights": True})
    model = apply_method(skeleton_of(base, recipe.model.trust_remote_code), plain)
    model.peft_config["default"].init_lora_weights = method.init_lora_weights
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _check_names({n: tuple(p.shape) for n, p in trained.items()}, {n: tuple(t.shape) for n, t in saved.weights.items()})
    own = {id(parameter): name for name, parameter in trained.items()}
    every = model.named_parameters(remove_duplicate=False)
    tensors = {name: saved.weights[own[id(p)]].to(target or p.dtype) for name, p in every if id(p) in own}
    model.save_pretrained(aside, state_dict=tensors, save_embedding_layers=False)
    for name, layer in _lora_layers(model):
        for matrix in ("lora_A", "lora_B"):
            if (start := saved.optimizer.get(f"{KEY}{name}.{matrix}")) is not None:
                layer.register_buffer(f"start_{matrix}", start, persistent=False)
    save_as_plain_lora(model, aside)
    return None


def _full_model(
    aside: Path, place: Path, base: Path, recipe: Recipe, target: torch.dtype | None, limit: int
) -> str | None:
    """Write the checkpoint's tensors under the base's names, one after the other; returns their data type."""
    from minituner.export.merge_layers import skeleton_of

    skeleton = skeleton_of(base, recipe.model.trust_remote_code)
    saved, before = Weights.of(place), Weights.of(base)
    names = dict(skeleton.named_parameters())
    _check_names({n: tuple(p.shape) for n, p in names.items()}, {n: e.shape for n, e in saved.entries.items()})
    tied = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)} - set(names)
    prefix = f"{skeleton.base_model_prefix}."
    own = {n: (n if n in names or prefix + n not in names else prefix + n) for n in before}
    if lost := sorted(set(names) - set(own.values())):
        raise UsageError(
            f"{base} stores its weights under other names than transformers has in memory, {lost[0]} first",
            why="they are fused while loading (experts of a mixture), and taken apart by a training's own hf/ only",
            fix="use the hf/ folder in the run's folder",
        )
    source = {n: (saved, own[n]) if own[n] in names else (before, n) for n in before if own[n] not in tied}
    kinds: dict[str, Kind] = {}
    for name, (weights, there) in source.items():
        entry = weights[there]
        kinds[name] = entry.shape, target if target and entry.dtype.is_floating_point else entry.dtype

    def make(name: str) -> torch.Tensor:
        weights, there = source[name]
        return weights.read(there).to(kinds[name][1])

    write_shards(aside, kinds, make, limit)
    held = str(next(kind[1] for kind in kinds.values() if kind[1].is_floating_point)).removeprefix("torch.")
    config = {key: value for key, value in read_config(base).items() if key != "torch_dtype"}
    text = json.dumps({**config, "dtype": held}, indent=2, ensure_ascii=False)
    (aside / "config.json").write_text(text + "\n", encoding="utf-8")
    if (base / "generation_config.json").is_file():
        shutil.copy(base / "generation_config.json", aside / "generation_config.json")
    return held


def _check_names(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    if wanted != found:
        odd = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise MinitunerError(
            f"the checkpoint's tensors are not those of this base and recipe: {odd}",
            fix="see that the base is the one of the training, and recipe.yaml the run's own",
        )

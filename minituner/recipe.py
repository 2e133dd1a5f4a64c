"""The typed recipe: every setting of a run, its meaning, its default.

A recipe is data, never code. It is read from YAML with a safe loader, checked whole (all problems are reported at
once, each with its path, its value and the nearest valid name) and written back so that it loads to the same object:

    recipe = Recipe.load("smollm2_135m_instruct_lora_personal_assistant_e3", ["train.learning_rate=1e-4"])
    recipe.dump("recipe.yaml");  assert Recipe.load("recipe.yaml") == recipe

The field descriptions below are the documentation: `copy-cfg` writes them as comments, and notebook 01 reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from minituner.errors import UsageError, nearest
from minituner.recipe_checks import contradictions
from minituner.recipe_yaml import parse_overrides, read_yaml, set_value, to_yaml
from minituner.train.zero import zero_name

# What options may call the data types of `model.dtype`.
SHORT_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class Section(BaseModel):
    """A group of settings; unknown keys are refused, and assignment is checked like loading."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class ModelSection(Section):
    name_or_path: str = Field(description="A catalog name, a local folder, or a hub id such as owner/model.")
    source: Literal["embedded", "local", "hub", "modelscope"] | None = Field(
        None, description="Where to look for the model; null tries what the name suggests."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Data type of the weights; auto measures what this machine computes fast (fp32 on most CPUs).",
    )
    attention: Literal[
        "auto",
        "per_document_sdpa",
        "per_document_eager",
        "varlen",
        "flash_attention_2",
        "flash_attention_3",
        "sdpa",
        "eager",
    ] = Field("auto", description="Attention implementation; auto picks the fastest one that isolates documents.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off unless you say so."
    )


class MethodSection(Section):
    name: Literal["full", "lora", "qlora", "int8_lora"] = Field(
        "lora",
        description="full trains every weight; lora adds small matrices; qlora and int8_lora quantise the frozen base.",
    )
    lora_rank: int = Field(16, ge=1, description="Rank r of the update B @ A; memory and capacity grow with it.")
    lora_alpha: float = Field(32, gt=0, description="The update is scaled by lora_alpha / lora_rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of A.")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Layers that get an adapter: all-linear, a list of name endings, or one regular expression.",
    )
    modules_to_save: list[str] | None = Field(
        None, description="Modules trained in full beside the adapter, e.g. [embed_tokens, lm_head]."
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(lora_rank) (rsLoRA).")
    use_dora: bool = Field(False, description="Split the update into magnitude and direction (DoRA).")
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora", "orthogonal"] = Field(
        True, description="How A and B start; true is Kaiming for A and zeros for B."
    )


class SourceSection(Section):
    path: str = Field(description="A file, a folder, or a hub data set id.")
    format: str = Field(
        "auto", description="The record layout (minituner list-formats); auto recognises it from the first records."
    )
    weight: float = Field(
        1.0,
        gt=0,
        description="How often each record is used per epoch: 1.0 once, 2.0 twice, 0.5 a seeded half.",
    )
    limit: int | None = Field(None, ge=1, description="Use at most this many records (drawn with the seed).")
    split: str = Field("train", description="Which split of a hub data set or folder.")


class DataSection(Section):
    sources: list[SourceSection] = Field(min_length=1, description="One or more data sources.")
    template: str = Field(
        "native", description="native: the tokenizer's own chat template; or a key of minituner list-templates."
    )
    system: str | None = Field(None, description="System text for conversations that bring none.")
    max_length: int = Field(1024, ge=2, description="Longest pack (and record) in tokens.")
    packing: Literal["none", "concat", "best_fit"] = Field(
        "best_fit",
        description="best_fit never splits a record; concat cuts anywhere (XTuner's way); none is one record a row.",
    )
    isolate_documents: bool = Field(True, description="Packed records never see each other (XTuner's use_varlen_attn).")
    loss_on: Literal["assistant", "last_assistant", "all"] = Field(
        "assistant", description="Which messages are trained."
    )
    too_long: Literal["truncate", "drop", "split"] = Field(
        "truncate", description="Records over max_length: cut at the right, drop, or (pre-training text) split."
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="A record that cannot be used: stop, or skip, count and list it."
    )
    allow_control_tokens: bool = Field(
        False, description="Let text such as <|im_end|> inside a message become a control token."
    )
    bos_policy: Literal["once", "xtuner"] = Field(
        "once", description="once: at most one BOS in front; xtuner: its class-name rules."
    )
    holdout: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Share of the records that is never trained on, for eval_loss; drawn with the seed, 0 is none.",
    )
    shuffle: bool = Field(True, description="Draw the packs in a new seeded order each epoch.")
    num_proc: int = Field(
        1, ge=1, description="Processes that prepare the data; the result is the same for any number."
    )
    cache: bool = Field(True, description="Keep prepared data in the cache, keyed by content and settings.")

    @field_validator("system")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return value or None


class TrainSection(Section):
    num_epochs: float = Field(3, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many optimizer steps, whatever num_epochs says."
    )
    per_device_batch_size: int = Field(1, ge=1, description="Packs (or records) per device and micro-batch.")
    gradient_accumulation_steps: int = Field(
        4, ge=1, description="Micro-batches per optimizer step; weighted by supervised tokens."
    )
    learning_rate: float = Field(2.0e-4, gt=0, description="Peak learning rate.")
    lr_schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape after the warm-up.")
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="Share of the steps that raise the learning rate linearly."
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw, or adamw_8bit: its averages in 8 bits, a quarter of their memory (bitsandbytes)."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay (matrices only).")
    adam_betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's averaging factors.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Clip the global gradient norm to this; null turns clipping off."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about 30% more time."
    )
    compile: bool = Field(
        False,
        description="Compile the feed-forward blocks with torch.compile: a slow first step; no gain if they are fused.",
    )
    fused: list[Literal["lora", "swiglu", "norm", "rotary", "layer"]] = Field(
        default_factory=lambda: ["lora", "swiglu", "norm", "rotary", "layer"],
        description="Layers computed in fewer passes over memory, each proved equal first; [] uses the libraries' own.",
    )
    cpu_matmul: Literal["auto", "blas", "onednn"] = Field(
        "auto", description="Who multiplies by frozen matrices on a CPU: torch's BLAS, oneDNN, or what suits the CPU."
    )
    keep_memory: bool = Field(
        True, description="On a CPU, keep a step's memory for the next one instead of handing it back to the system."
    )
    cut_tails: bool = Field(
        True, description="Do not compute what stands behind a document's last target: no loss depends on it."
    )
    share_prefixes: bool = Field(
        True, description="Compute what documents of a pack begin alike with once, such as a system prompt."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="Loss or gradient NaN or infinite: stop and say where, or skip and count."
    )
    seed: int = Field(42, ge=0, description="Seeds adapter weights, data order and dropout.")

    @field_validator("adam_betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must be at least 0 and below 1")
        return value


class DistributedSection(Section):
    zero: str | None = Field(
        None, description="zero1, zero2, zero2_offload, zero3, zero3_offload, or a path to a DeepSpeed JSON."
    )
    sequence_parallel_size: int = Field(1, ge=1, description="Ranks that share one sequence (DeepSpeed Ulysses).")

    @field_validator("zero")
    @classmethod
    def _zero_is_known(cls, value: str | None) -> str | None:
        return zero_name(value) if value else None


class EvaluateSection(Section):
    every_steps: int | None = Field(
        100,
        ge=1,
        description="Answer the prompts and measure eval_loss every so many steps and at both ends; null: at the ends.",
    )
    prompts: list[str] = Field(
        default_factory=lambda: ["Please introduce yourself."], description="Prompts answered during training."
    )
    system: str | None = Field(None, description="System text for these prompts.")
    max_new_tokens: int = Field(64, ge=1, description="Longest answer, in tokens.")
    identity: str | None = Field(
        None, description="A personal assistant's name: measure identity rate and retention at the end."
    )
    identity_language: Literal["en", "zh", "both"] = Field("en", description="Language of these questions.")


class SaveSection(Section):
    every_steps: int | None = Field(
        100, ge=1, description="Write a checkpoint every so many steps, and at the end; null: at the end only."
    )
    keep_last: int = Field(2, ge=1, description="How many complete checkpoints to keep.")


class LogSection(Section):
    every_steps: int = Field(1, ge=1, description="Write metrics every so many steps.")
    to: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="Further places; metrics.jsonl is always written."
    )


class Recipe(Section):
    """Everything that decides a run. Load with `Recipe.load`, change with overrides, save with `dump`."""

    name: str = Field(
        "custom", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run's folder under work_dirs/."
    )
    notes: str = Field("", description="Why the settings are what they are.")
    model: ModelSection
    method: MethodSection = Field(default_factory=MethodSection)
    data: DataSection
    train: TrainSection = Field(default_factory=TrainSection)
    distributed: DistributedSection = Field(default_factory=DistributedSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    save: SaveSection = Field(default_factory=SaveSection)
    log: LogSection = Field(default_factory=LogSection)

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Recipe:
        if self.data.too_long == "split" and self.data.packing == "best_fit" and self.data.max_length < 16:
            raise ValueError("data.too_long=split needs data.max_length of at least 16")
        return self

    @classmethod
    def load(
        cls,
        name_or_file: str | Path,
        overrides: Iterable[str] | Mapping[str, Any] = (),
        *,
        world_size: int | None = None,
    ) -> Recipe:
        """Read a recipe by catalog name or YAML file, then apply `key.path=value` overrides.

        Args:
            world_size: the number of ranks it is to run on, if that is to be checked too.

        Raises:
            UsageError: the name or file is unknown, the YAML is broken, or values are wrong (all of them are listed).
        """
        text = str(name_or_file)
        path = Path(text)
        if path.suffix in {".yaml", ".yml"} or path.is_file():
            values, origin = read_yaml(path), text
        elif path.is_dir():
            raise UsageError(f"{text!r} is a folder, not a recipe", fix=f"name the file, e.g. {path / 'recipe.yaml'}")
        else:
            from minituner.catalog.lookup import compose

            values, origin = compose(text), f"recipe {text!r}"
        return cls.from_values(values, origin, overrides, world_size=world_size)

    @classmethod
    def from_values(
        cls,
        values: dict[str, Any],
        origin: str = "recipe",
        overrides: Iterable[str] | Mapping[str, Any] = (),
        *,
        world_size: int | None = None,
    ) -> Recipe:
        """Apply overrides to a plain mapping, check it and return the recipe; every problem is in the one error."""
        for key, value in parse_overrides(overrides):
            set_value(values, key, value)
        try:
            recipe = cls.model_validate(values)
            problems = [f"  {line}" for line in contradictions(recipe, world_size)]
        except ValidationError as error:
            problems = [_explain(item) for item in error.errors()]
            problems += [f"  {line}" for line in _among_the_rest(values, error, world_size)]
        if problems:
            raise UsageError(
                f"{origin}: {len(problems)} problem{'s' if len(problems) != 1 else ''}\n" + "\n".join(problems),
                fix="correct the values above (copy-cfg writes every field with its meaning)",
            )
        return recipe

    def dump(self, path: str | Path | None = None) -> str:
        """The recipe as YAML; also written to `path` when given. Loads back to an equal object."""
        text = to_yaml(self.model_dump(mode="json"))
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def dump_commented(self) -> str:
        """The recipe as YAML with each field's description as a comment, for people to edit."""
        lines: list[str] = []
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            if isinstance(value, Section):
                lines += ["", f"{key}:"]
                for inner, inner_field in type(value).model_fields.items():
                    dumped = value.model_dump(mode="json")[inner]
                    lines += [f"  # {inner_field.description}"]
                    lines += ["  " + line for line in to_yaml({inner: dumped}).splitlines()]
            else:
                lines += [f"# {field.description}", *to_yaml({key: value}).splitlines()]
        return "\n".join(lines) + "\n"


def _among_the_rest(values: Mapping[str, Any], error: ValidationError, world_size: int | None) -> list[str]:
    """Contradictions between the settings that are right one by one; none where the rest is no recipe."""
    rest = deepcopy(dict(values))
    for item in error.errors():
        *place, last = item["loc"] or (None,)
        holder: Any = rest
        for part in place:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if isinstance(holder, dict):
            holder.pop(last, None)
    try:
        return contradictions(Recipe.model_validate(rest), world_size)
    except ValidationError:
        return []


def _fields_at(location: Sequence[Any]) -> list[str]:
    """Names that are valid beside the last part of `location`."""
    model: Any = Recipe
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        if field is None:
            return []
        model = field.annotation
        if "SourceSection" in str(model):
            model = SourceSection
    return list(getattr(model, "model_fields", {}))


def _explain(error: Mapping[str, Any]) -> str:
    location = tuple(error["loc"])
    path = ".".join(str(part) for part in location) or "recipe"
    value = error.get("input")
    if error["type"] == "extra_forbidden":
        known = _fields_at(location)
        hint = nearest(str(location[-1]), known)
        return f"  {path}: unknown key; " + (hint or f"known here: {', '.join(known)}")
    if error["type"] == "missing":
        return f"  {path}: missing; it has no default"
    cause = error["msg"].removeprefix("Value error, ")
    expected = error.get("ctx", {}).get("expected")
    hint = (
        nearest(value, [part.strip(" '") for part in expected.replace(" or ", ",").split(",")])
        if expected and isinstance(value, str)
        else ""
    )
    shown = repr(value) if not isinstance(value, float) or math.isfinite(value) else str(value)
    return f"  {path} = {shown[:80]}: {cause}" + (f"; {hint}" if hint else "")

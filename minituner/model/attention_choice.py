"""Which attention implementation, and why: one table, two sets of facts, one decision.

    the table   what each implementation needs and can do           (TABLE)
    Facts       this machine: device, card, data type, packages     (facts_here)
    Needs       this model: head size, soft-capping, windows, ...   (needs_of)

    auto on an H100 in bfloat16 without flash-attn
      flash_attention_3   not installed       |
      flash_attention_2   not installed       |  the first that fits is taken, and the sentence that goes with it
      varlen              fits  <-------------+  also says what kept the faster ones out
      per_document_sdpa   always fits

`choose` decides from facts alone, so every combination of card, data type and model is tested without owning one.
A wanted implementation that does not fit is refused, never replaced in silence. Lesson: notebook 06.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minituner.errors import UsageError, nearest

PER_DOCUMENT_SDPA, PER_DOCUMENT_EAGER, VARLEN = "per_document_sdpa", "per_document_eager", "varlen"
FLASH_2, FLASH_3 = "flash_attention_2", "flash_attention_3"
EVERYTHING = frozenset({"dropout", "soft-capping", "sinks", "sliding windows"})
# Models whose layers have learned attention sinks; their configs do not say so (tested against transformers' source).
WITH_SINKS = frozenset(
    {"deepseek_v4", "flint", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "mimo_v2_flash"}
    | {"openai_privacy_filter"}
)
# What a document reads in these layers is decided by the attention function; in all others by the layer itself.
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "attention", "sparse", "dense", "moe", "mlp"})


@dataclass(frozen=True)
class Implementation:
    """One row of the table: what it is, what it needs, what it can do."""

    name: str
    about: str
    isolates: bool  # keeps packed documents apart
    can: frozenset[str] = EVERYTHING
    package: str = ""  # the package that brings it, where it is not torch or ours
    gpu: bool = False  # a CUDA kernel: float16 and bfloat16 only, head_dim at most 256
    capability: tuple[int, int] = (0, 0)  # the oldest card
    newest: int | None = None  # the last generation (major) that it runs on


# The fastest first. Sources: the README of flash-attention (cards, types, head sizes), transformers'
# modeling_flash_attention_utils.py (sinks are dropped without a word by both packages; version 3 has no dropout),
# torch/nn/attention/varlen.py and aten's flash_api.cpp.
TABLE = (
    Implementation(
        FLASH_3,
        "flash-attn 3, told where documents begin (cu_seqlens)",
        isolates=True,
        can=frozenset({"soft-capping", "sliding windows"}),
        package="flash-attn-3",
        gpu=True,
        capability=(9, 0),
        newest=9,
    ),
    Implementation(
        FLASH_2,
        "flash-attn 2, told where documents begin (cu_seqlens)",
        isolates=True,
        can=EVERYTHING - {"sinks"},
        package="flash-attn",
        gpu=True,
        capability=(8, 0),
    ),
    Implementation(
        VARLEN,
        "torch's own variable-length kernel, told where documents begin (cu_seqlens)",
        isolates=True,
        can=frozenset({"sliding windows"}),
        gpu=True,
        capability=(8, 0),
    ),
    Implementation(PER_DOCUMENT_SDPA, "one causal SDPA call per document", isolates=True),
    # The same function: transformers refuses any name with "sdpa" in it for models that its own SDPA cannot do.
    Implementation(PER_DOCUMENT_EAGER, "one document after the other, its scores written out", isolates=True),
    Implementation(
        "sdpa", "one causal mask for the whole row", isolates=False, can=EVERYTHING - {"soft-capping", "sinks"}
    ),
    Implementation("eager", "one causal mask for the whole row, everything written out", isolates=False),
)
BY_NAME = {row.name: row for row in TABLE}
MOST_HEAD_DIM = 256  # of every CUDA kernel above
INSTALL = {"flash-attn": "pip install 'minituner[flash]' --no-build-isolation"}


@dataclass(frozen=True)
class Facts:
    """What the choice depends on, of this machine and run."""

    device: str = "cpu"
    dtype: str = "float32"  # what the model computes in
    capability: tuple[int, int] | None = None  # of the card: (8, 0) Ampere, (9, 0) Hopper
    rocm: bool = False  # an AMD card: torch calls it cuda as well
    torch_varlen: bool = False  # this torch has varlen_attn with windows, and its kernels
    installed: dict[str, str] = field(default_factory=dict)  # flash-attn, flash-attn-3: version
    broken: dict[str, str] = field(default_factory=dict)  # installed, but cannot be imported: the error


@dataclass(frozen=True)
class Needs:
    """What the choice depends on, of the model."""

    head_dim: int = 64
    softcap: bool = False
    sinks: bool = False
    sliding_window: int | None = None
    dropout: bool = False
    sdpa: bool = True  # transformers lets this model use SDPA
    other_layers: tuple[str, ...] = ()  # layers that read past a document's border whatever the attention does


def facts_here(device: str | None = None, dtype: str = "float32") -> Facts:
    """The facts of this machine; packages are imported only where they could be used."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cuda":
        return Facts(device, dtype)
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    packages = {"flash-attn": (is_flash_attn_2_available, "flash_attn")}
    packages["flash-attn-3"] = (is_flash_attn_3_available, "flash_attn_interface")
    installed, broken = {}, {}
    for package, (available, module) in packages.items():
        if available():
            installed[package], error = _import(package, module)
            broken |= {package: error} if error else {}
    return Facts(
        device,
        dtype,
        torch.cuda.get_device_capability(),
        torch.version.hip is not None,
        torch_has_varlen(),
        installed,
        broken,
    )


def torch_has_varlen() -> bool:
    """True if this torch has `varlen_attn` with windows and grouped heads (it began without), and its kernels."""
    import inspect

    import torch

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    known = inspect.signature(varlen_attn).parameters
    return {"window_size", "enable_gqa"} <= set(known) and torch.backends.cuda.is_flash_attention_available()


def _import(package: str, module: str) -> tuple[str, str]:
    """A package's version, and the error of importing it (a wheel built for another torch is the usual one)."""
    import importlib
    from importlib.metadata import PackageNotFoundError, version

    try:
        importlib.import_module(module)
        error = ""
    except (ImportError, OSError) as cause:
        error = str(cause).splitlines()[0]
    try:
        return version(package), error
    except PackageNotFoundError:
        return "?", error


def needs_of(config: Any) -> Needs:
    """What a model's transformers config says about its attention."""
    text = config.get_text_config()

    def get(name: str) -> Any:
        return getattr(text, name, None)

    # A latent attention (DeepSeek) joins two parts of a head; a few models have wider heads in some layers.
    latent = (get("qk_nope_head_dim") or 0) + (get("qk_rope_head_dim") or 0)
    whole = (get("hidden_size") or 0) // (get("num_attention_heads") or 1)
    kinds = set(get("layer_types") or get("layers_block_type") or ())
    sliding = get("sliding_window") if get("use_sliding_window") is not False else None
    model = _class_of(text)
    recurrent = ("recurrent",) if getattr(model, "_is_stateful", False) else ()
    return Needs(
        head_dim=max(latent, get("global_head_dim") or 0, get("head_dim") or (0 if latent else whole)),
        softcap=bool(get("attn_logit_softcapping")),
        sinks=text.model_type in WITH_SINKS,
        sliding_window=sliding,
        dropout=bool(get("attention_dropout")),
        sdpa=getattr(model, "_supports_sdpa", True),
        other_layers=tuple(sorted(kinds - ATTENTION_LAYERS)) or recurrent,
    )


def _class_of(config: Any) -> Any:
    """transformers' model class for a config; None for a model that brings its own code.

    It says what a config does not: `_is_stateful` marks recurrent layers (Mamba, RWKV, Qwen3-Next).
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return model[0] if isinstance(model, tuple) else model


def misfits(row: Implementation, facts: Facts, needs: Needs) -> list[str]:
    """Why this implementation cannot be used here; empty where it can. The most fundamental reason comes first."""
    found = []
    if not needs.sdpa and "sdpa" in row.name:
        found.append("cannot do what this model's attention needs, says transformers")
    if row.gpu:
        found += _what_the_machine_lacks(row, facts)
        if facts.dtype not in ("float16", "bfloat16"):
            found.append(f"computes in half precision, the model in {facts.dtype}")
        if needs.head_dim > MOST_HEAD_DIM:
            found.append(f"takes heads of at most {MOST_HEAD_DIM}, the model's have {needs.head_dim}")
    wanted = {"dropout": needs.dropout, "soft-capping": needs.softcap, "sinks": needs.sinks}
    wanted["sliding windows"] = needs.sliding_window is not None
    found += [f"has no {name}, which the model uses" for name, there in wanted.items() if there and name not in row.can]
    return found


def _what_the_machine_lacks(row: Implementation, facts: Facts) -> list[str]:
    """Card and package that a CUDA kernel needs and does not find."""
    if facts.device != "cuda":
        return ["needs a CUDA GPU"]  # whether the package is there was not looked up, and makes no difference
    found = []
    if facts.rocm and row.package != "flash-attn":
        found.append("is made for NVIDIA cards")
    elif facts.capability and not row.capability <= facts.capability < ((row.newest or 999) + 1, 0):
        least = f"{row.capability[0]}.x" if row.newest else f"{row.capability[0]}.{row.capability[1]} or newer"
        found.append(f"needs a card of compute capability {least}, this has {_dotted(facts.capability)}")
    if row.package in facts.broken:
        found.append(f"needs {row.package}, which cannot be imported: {facts.broken[row.package]}")
    elif row.package and row.package not in facts.installed:
        found.append(f"needs {row.package}, which is not installed")
    elif not row.package and not facts.torch_varlen:
        found.append("needs a torch with its variable-length kernel (a newer one, built for CUDA)")
    return found


def choose(
    wanted: str,
    facts: Facts | None = None,
    needs: Needs | None = None,
    *,
    one_document_rows: bool,
    device: str | None = None,
) -> tuple[str, str]:
    """The attention implementation for these settings, and a sentence that says why.

    Args:
        wanted: the recipe's `model.attention`.
        facts: of the machine and run; None looks at this machine (`device` then says which device of it).
        needs: of the model; None is a plain Llama-like one.
        one_document_rows: every row holds one document (no packing, one record per micro-batch).

    Raises:
        UsageError: the wanted one would let packed documents see each other or does not fit; or the model has layers
            that no attention function can keep from reading past a document's border.
    """
    facts, needs = facts or facts_here(device), needs or Needs()
    if wanted != "auto" and wanted not in BY_NAME:
        hint = nearest(wanted, ["auto", *BY_NAME])
        raise UsageError(f"model.attention={wanted} is unknown", fix=hint or f"one of auto, {', '.join(BY_NAME)}")
    if needs.other_layers and not one_document_rows:
        raise UsageError(
            f"this model has {', '.join(needs.other_layers)} layers, and packed documents would see each other in them",
            why="such a layer carries on what it has read, or looks where it likes; attention borders do not stop it",
            fix="data.packing=none with train.per_device_batch_size=1",
        )
    if wanted in BY_NAME and not (BY_NAME[wanted].isolates or one_document_rows):
        raise UsageError(
            f"model.attention={wanted} with several documents in a row: they would see each other",
            why="these kernels know one causal mask for the whole row",
            fix="model.attention=auto, or data.packing=none with train.per_device_batch_size=1",
        )
    # Layers of other kinds bring masks of their own, which only transformers' implementations read.
    fitting = [row for row in TABLE if row.isolates != bool(needs.other_layers) and not misfits(row, facts, needs)]
    if wanted != "auto":
        if problems := misfits(BY_NAME[wanted], facts, needs):
            raise UsageError(
                f"model.attention={wanted} does not fit here: it {'; it '.join(problems)}",
                fix=f"model.attention=auto takes {fitting[0].name}",
                next_command=INSTALL.get(BY_NAME[wanted].package, "") if len(problems) == 1 else "minituner doctor",
            )
        return wanted, "as the recipe says"
    best = fitting[0]
    return best.name, best.about + _passed_over(TABLE[: TABLE.index(best)], facts, needs)


def _passed_over(rows: tuple[Implementation, ...], facts: Facts, needs: Needs) -> str:
    """Why each faster implementation was not taken; those with the same reason together."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if problems := misfits(row, facts, needs):
            reasons.setdefault(problems[0], []).append(row.name)
    return "".join(f"; not {', '.join(names)}: {reason}" for reason, names in reasons.items())


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"

"""Commands that turn what was trained into folders for other programs: convert to-hf, merge, split, check; parity.

    minituner convert to-hf CHECKPOINT OUT            minituner convert merge BASE ADAPTER OUT
    minituner convert pth_to_hf CONFIG CHECKPOINT OUT (XTuner's order)      minituner convert merge ADAPTER OUT
    minituner convert split FOLDER OUT                minituner convert check FOLDER
    minituner convert gguf FOLDER                     (says how llama.cpp does it)      minituner parity MODEL

Each is thin and calls a function that a notebook can call too. Lesson: notebook 09.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minituner.cli_options import TrustRemoteCode
from minituner.errors import UsageError

convert_app = typer.Typer(no_args_is_help=True, help="Turn checkpoints and adapters into folders for other programs.")
parity_app = typer.Typer()

Dtype = Annotated[str | None, typer.Option(help="fp16, bf16 or fp32 (default: as it is).")]
ShardSize = Annotated[str, typer.Option(help="Largest file: 2GB, 500MB, 1GiB.")]
Force = Annotated[bool, typer.Option("--force", "--overwrite", help="Replace OUT if it exists.")]


@convert_app.command("to-hf")
def convert_to_hf(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints/step-N.")],
    out: Annotated[Path, typer.Argument(help="Where the folder goes.")],
    dtype: Dtype = None,
    max_shard_size: ShardSize = "2GB",
    force: Force = False,
) -> None:
    """Make a checkpoint (of any engine, ZeRO included) an adapter folder, or a full model."""
    from minituner.export.to_hf import to_hf

    to_hf(checkpoint, out, dtype=dtype, max_shard_size=max_shard_size, force=force)


@convert_app.command("pth_to_hf")
def convert_pth_to_hf(
    config: Annotated[str, typer.Argument(help="The recipe: must be the checkpoint's.")],
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints/step-N.")],
    out: Annotated[Path, typer.Argument(help="Where the folder goes.")],
    dtype: Dtype = None,
    max_shard_size: ShardSize = "2GB",
    force: Force = False,
) -> None:
    """The same in XTuner's order of arguments."""
    from minituner.export.to_hf import to_hf

    if config.endswith(".py"):
        raise UsageError(
            f"{config} is an XTuner config, and minituner's checkpoints come from recipes",
            fix="give the recipe.yaml in the run's folder, or leave it out with to-hf",
            next_command=f"minituner convert to-hf {checkpoint} {out}",
        )
    to_hf(checkpoint, out, config=config, dtype=dtype, max_shard_size=max_shard_size, force=force)


@convert_app.command("merge")
def convert_merge(
    folders: Annotated[
        list[Path], typer.Argument(metavar="[BASE] ADAPTER OUT", help="The base is known from the adapter if left out.")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="full (default) or dequantized, for a quantised training; or the base model, without BASE."),
    ] = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "2GB",
    force: Force = False,
    force_merge: Annotated[
        bool, typer.Option("--force-merge", help="Merge although the base differs, or the training is undone by it.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make an adapter part of its base model, tensor by tensor, and prove that both say the same."""
    from minituner.export.merge import merge

    if len(folders) not in (2, 3):
        what = f"merge takes two or three folders, not {len(folders)}"
        raise UsageError(what, fix="minituner convert merge [BASE] ADAPTER OUT")
    *first, adapter, out = folders
    model = str(first[0]) if first else None
    into = "full"
    if base in ("full", "dequantized"):
        into = base
    elif base is not None:
        if model:
            raise UsageError(
                f"the base is named twice: {model} and --base {base}",
                fix="with BASE in front, --base is full or dequantized",
            )
        model = base
    if model and (Path(model) / "adapter_config.json").is_file():
        raise UsageError(f"{model} is an adapter, not a base", fix="the order is BASE ADAPTER OUT")
    merge(
        adapter,
        out,
        base=model,
        into=into,
        dtype=dtype,
        max_shard_size=max_shard_size,
        force=force,
        force_merge=force_merge,
        trust_remote_code=trust_remote_code,
    )


@convert_app.command("split")
def convert_split(
    folder: Annotated[Path, typer.Argument(help="A full model's folder.")],
    out: Annotated[Path, typer.Argument(help="Where the new folder goes.")],
    max_shard_size: ShardSize = "2GB",
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Write a model's weights in files of another size (or another data type)."""
    from minituner.export.split import split

    split(folder, out, max_shard_size=max_shard_size, dtype=dtype, force=force)


@convert_app.command("check")
def convert_check(
    folder: Annotated[Path, typer.Argument(help="A full model's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what is read for programs.")] = False,
) -> None:
    """Show what transformers, transformers serve, vLLM and LMDeploy read of a folder; exit 1 if something is wrong."""
    import json
    from dataclasses import asdict

    from minituner.export.serving import table, what_servers_read

    readings = what_servers_read(folder)
    if as_json:
        print(json.dumps([asdict(reading) for reading in readings], ensure_ascii=False))
    else:
        print("\n".join(table(readings)))
    if any(reading.problem for reading in readings):
        raise typer.Exit(1)


@convert_app.command("gguf")
def convert_gguf(
    folder: Annotated[Path, typer.Argument(help="A full model's folder.")],
    out: Annotated[Path, typer.Argument(help="Where the .gguf file is to go.")] = Path("model.gguf"),
) -> None:
    """Not written here: says how llama.cpp's own converter makes one of the folder (exit 2)."""
    from minituner.export.serving import refuse_gguf

    refuse_gguf(folder, out)


@convert_app.command("deepspeed")
def convert_deepspeed(
    folder: Annotated[Path, typer.Argument(help="A run's folder with `latest`, or one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(help="Where model.safetensors goes.")],
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="Read it although pickles can run code.")
    ] = False,
) -> None:
    """Take the weights out of a checkpoint that DeepSpeed wrote (minituner's own need no conversion)."""
    from minituner.train.deepspeed_checkpoint import convert_deepspeed_checkpoint

    print(convert_deepspeed_checkpoint(folder, out, trust_checkpoint))


@parity_app.command("parity")
def parity_command(
    model: Annotated[str, typer.Argument(help="An hf/ folder, a run's folder, a merged model, or a catalog name.")],
    exported: Annotated[list[Path] | None, typer.Argument(help="Further folders that must ask the same way.")] = None,
    template: Annotated[str | None, typer.Option(help="native, or a key of list-templates.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ids for programs.")] = False,
) -> None:
    """Token ids of one conversation through training, chat, web, the chat template and exports: equal, or where not."""
    import json

    from minituner.export.parity import parity

    found = parity(model, exported or [], template=template)
    print(json.dumps(found.to_dict(), ensure_ascii=False) if as_json else "\n".join(found.lines()))
    if not found.equal:
        raise typer.Exit(1)

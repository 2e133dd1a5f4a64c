"""Checkpoints that DeepSpeed itself wrote (XTuner's work_dirs): their weights, if you trust who wrote them.

    work_dirs/internlm2_chat_7b_qlora/            FOLDER
        latest                                    "iter_500.pth"
        iter_500.pth/                             or this as FOLDER
            mp_rank_00_model_states.pt            pickles: reading one runs whatever code its author put in
            bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt ...

minituner's own checkpoints are safetensors, under ZeRO too, and need none of this. From these, the pieces of all ranks
are put together and written as safetensors in float32. Only weights: where training was, and AdamW's averages, are
kept in DeepSpeed's order of parameters, not by name. Lesson: notebook 07.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from minituner.errors import MinitunerError, UsageError
from minituner.train.zero import import_deepspeed

PIECES = "*_optim_states.pt"


def find_deepspeed_checkpoint(folder: Path) -> Path:
    """The folder that holds the pieces: `folder` itself, or the one that its `latest` names.

    Raises:
        UsageError: there are none.
    """
    places = [folder]
    if (latest := folder / "latest").is_file():
        places.append(folder / latest.read_text(encoding="utf-8", errors="replace").strip())
    for place in places:
        if any(place.glob(PIECES)):
            return place
    raise UsageError(
        f"{folder} holds no DeepSpeed checkpoint",
        why=f"neither {PIECES} files nor a `latest` that names a folder with some",
        fix="name the run's folder, or its global_stepN (XTuner: iter_N.pth)",
    )


def read_deepspeed_checkpoint(folder: str | Path, trust: bool = False) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint by DeepSpeed, in float32 by parameter name.

    Args:
        trust: you know who wrote it. Nothing in it is opened otherwise.

    Raises:
        UsageError: it is not trusted, or `folder` holds none. MinitunerError: it cannot be read.
    """
    place = find_deepspeed_checkpoint(Path(folder))
    if not trust:
        raise UsageError(
            f"{place} holds pickles, which can run any code when they are read",
            why="DeepSpeed knows no other format; minituner opens one only if you say that you trust its author",
            fix="add --trust-checkpoint if you made it yourself, or know who did",
        )
    import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with redirect_stdout(sys.stderr):  # it says what it reads; a command's stdout is its answer
            weights = get_fp32_state_dict_from_zero_checkpoint(str(place.parent), tag=place.name)
        # Parameters are stretches of one flat tensor here; tied ones are the same object, and stay so.
        alone = {id(tensor): tensor.clone() for tensor in weights.values()}
        return {name: alone[id(tensor)] for name, tensor in weights.items()}
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise MinitunerError(
            f"cannot read the DeepSpeed checkpoint {place}: {type(error).__name__}: {error}",
            fix="see that the files of all ranks are there, and whole",
        ) from None


def convert_deepspeed_checkpoint(folder: str | Path, out: str | Path, trust: bool = False) -> Path:
    """Write the weights of a checkpoint by DeepSpeed as safetensors into the new folder `out`, and return it.

    Raises:
        UsageError: see `read_deepspeed_checkpoint`; or `out` exists. MinitunerError: it cannot be read or written.
    """
    from huggingface_hub import save_torch_state_dict

    out = Path(out)
    if out.exists():
        raise UsageError(f"{out} exists", fix="name a new folder")
    weights = read_deepspeed_checkpoint(folder, trust)
    aside = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_torch_state_dict(weights, aside)  # safetensors, in shards of at most 5 GB; tied weights once
        os.replace(aside, out)
    except OSError as error:
        raise MinitunerError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out

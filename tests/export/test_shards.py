"""Tensor by tensor: files that every reader reads, memory of one tensor, and folders that are refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minituner.errors import MinitunerError, UsageError
from minituner.export.merge import merge
from minituner.export.new_folder import new_folder
from minituner.export.shards import bytes_of, parse_size, plan_shards, write_file, write_shards
from minituner.export.split import split
from minituner.export.weights import Weights
from tests.export.test_merge import adapter_on, logits, silent
from tests.tiny import tiny_folder
from tests.train.processes import Command, Process

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=6), st.integers(1, 400))
def test_what_is_written_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, kinds: list, limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    made = {f"层.{i}": torch.randint(0, 2, shape).to(dtype) for i, (shape, dtype) in enumerate(kinds)}
    files = write_shards(folder, {n: (tuple(t.shape), t.dtype) for n, t in made.items()}, made.__getitem__, limit)
    found: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(file)
        size = sum(bytes_of((tuple(t.shape), t.dtype)) for t in part.values())
        assert size <= limit or len([t for t in part.values() if t.numel()]) == 1
        found |= part
    assert found.keys() == made.keys()
    assert all(torch.equal(found[n], made[n]) and found[n].dtype == made[n].dtype for n in made)
    assert list(Weights.of(folder)) == [n for file in files for n in sorted(load_file(file), key=list(made).index)]


def test_a_tensor_that_is_not_as_announced_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MinitunerError, match="was to be"):
        write_file(tmp_path / "a.safetensors", {"a": ((2,), torch.float32)}, lambda name: torch.zeros(3))


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_size(t) for t in ("2GB", "500 mb", "1GiB", "1.5KB", 7)] == [2 * 10**9, 5 * 10**8, 2**30, 1500, 7]
    for wrong in ("", "GB", "0GB", "2 tons", "-1GB", "1e9"):
        with pytest.raises(UsageError, match="is no size"):
            parse_size(wrong)
    kinds = {name: ((size,), torch.uint8) for name, size in (("a", 3), ("b", 3), ("c", 9), ("d", 1))}
    assert plan_shards(kinds, 6) == [["a", "b"], ["c"], ["d"]]


def test_split_there_and_back_is_the_same_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = tiny_folder(tmp_path / "base", tie=False)
    small = split(base, tmp_path / "small", max_shard_size="20KB", say=silent)
    assert len(list(small.glob("model-*.safetensors"))) > 3
    one = split(small, tmp_path / "one", say=silent)
    assert load_file(one / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    wanted = logits(AutoModelForCausalLM.from_pretrained(base))
    for folder in (small, one):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), wanted)
        assert {p.name for p in base.iterdir()} - {p.name for p in folder.iterdir()} <= {"model.safetensors"}
    half = split(small, tmp_path / "half", dtype="bf16", say=silent)
    assert {t.dtype for t in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(UsageError, match="exists and is not empty"):
        split(base, one, say=silent)
    with pytest.raises(UsageError, match="which is read"):
        split(base, tmp_path, force=True, say=silent)


def peak_of(work: object) -> int:
    """Kilobytes by which this process's memory rose above what it was, at most, while `work()` ran."""
    import gc

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def measured(base: str, adapter: str, small_base: str, small_adapter: str, out: str) -> None:
    import ctypes

    from transformers import AutoModelForCausalLM

    # A tensor above 32 MB gets pages of its own and gives them back when it is freed; glibc then keeps smaller ones in
    # its heap, which fragments. Here the tensors are small, so the border (M_MMAP_THRESHOLD) is lowered for them.
    ctypes.CDLL(None).mallopt(-3, 65536)
    merge(small_adapter, "warm", base=small_base, say=silent)  # whatever is imported is imported now
    streamed = peak_of(lambda: merge(adapter, "merged", base=base, max_shard_size="9.6MB", say=silent))
    loaded = peak_of(lambda: AutoModelForCausalLM.from_pretrained(base).float().state_dict())
    Path(out).write_text(json.dumps([streamed, loaded]))


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_a_merge_needs_the_memory_of_a_shard_and_a_layer(tmp_path: Path) -> None:
    """75 MB of bfloat16 in eight shards, one decoder layer each: whatever the whole is, the peak stays at a shard's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=259,
        hidden_size=768,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        bos_token_id=257,
        eos_token_id=258,
        tie_word_embeddings=False,
    )
    base = tiny_folder(tmp_path / "base")
    (base / "model.safetensors").unlink()
    LlamaForCausalLM(config).bfloat16().save_pretrained(base, max_shard_size="9.6MB")
    assert len(list(base.glob("model-*.safetensors"))) >= 8
    adapter = adapter_on(base, tmp_path / "hf", dtype=torch.bfloat16)
    small = tiny_folder(tmp_path / "small")
    small_adapter = adapter_on(small, tmp_path / "small-hf")
    arguments = [str(path) for path in (base, adapter, small, small_adapter, tmp_path / "peaks.json")]
    process = Process(measured, *arguments, cwd=tmp_path)
    assert process.finish() == 0, process.output
    streamed, loaded = json.loads((tmp_path / "peaks.json").read_text())
    largest = max(path.stat().st_size for path in base.glob("*.safetensors")) / 1024
    layer = (4 * 768 * 768 + 3 * 768 * 1024) * 4 / 1024  # in float32, as it is computed
    assert loaded > 7 * largest, "the measurement sees a model that is loaded whole"
    assert streamed < 1.3 * largest + layer, (streamed, loaded, largest, layer)


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "hf")
    save_file({"secret": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = base / "model.safetensors.index.json"
    for place in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "..", "..\\secret.safetensors"):
        index.write_text(json.dumps({"weight_map": {"secret": place}}))
        with pytest.raises(UsageError, match="outside its folder"):
            split(base, tmp_path / "out", say=silent)
    index.write_text(json.dumps({"weight_map": {"secret": "../secret.safetensors"}}))
    with pytest.raises(UsageError, match="outside its folder"):
        merge(adapter, tmp_path / "out", say=silent)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(UsageError, match="is missing"):
        split(base, tmp_path / "out", say=silent)
    index.write_text(json.dumps({"weight_map": {"not there": "model.safetensors"}}))
    with pytest.raises(MinitunerError, match="the index promises"):
        split(base, tmp_path / "out", say=silent)
    assert not (tmp_path / "out").exists()


class Bomb:
    """A pickle that makes a file when it is read by a careless program."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def test_old_pickles_are_read_as_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_folder(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    out = split(base, tmp_path / "out", say=silent)
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert not (out / "pytorch_model.bin").exists()
    for content in (pickle.dumps(Bomb()), b"nothing at all"):
        (base / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(MinitunerError, match="cannot be read as plain tensors"):
            split(base, tmp_path / "again", say=silent)
    torch.save({"a": Bomb()}, base / "pytorch_model.bin")
    with pytest.raises(MinitunerError, match="cannot be read as plain tensors"):
        split(base, tmp_path / "again", say=silent)
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "again").exists()


def test_remote_code_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "hf")
    config = json.loads((base / "config.json").read_text())

    def refused(kind: type[MinitunerError], words: str) -> None:
        with pytest.raises(kind, match=words):
            merge(adapter, tmp_path / "out", say=silent)
        assert not (tmp_path / "out").exists()

    for changes, words in (
        ({"model_type": "my_model", "auto_map": {"AutoModelForCausalLM": "own.Model"}}, "does not know"),
        ({"quantization_config": {"quant_method": "gptq"}}, "stored quantised"),
    ):
        (base / "own.py").write_text("raise SystemExit('ran the code of the folder')")
        (base / "config.json").write_text(json.dumps({**config, **changes}))
        refused(UsageError, words)
    (base / "config.json").write_text("{")
    refused(UsageError, "no readable config.json")
    (base / "config.json").write_text(json.dumps(config))
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[:100])
    refused(MinitunerError, "cannot read the adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(UsageError, "no adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").write_bytes(whole)
    for folder in (base, adapter):
        for file in folder.glob("*token*"):
            file.unlink()
    refused(MinitunerError, "has a tokenizer")


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter_on(base, tmp_path / "hf")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("keep me")
    command = Command(["convert", "merge", "hf", "merged", "--force"], tmp_path, largest_file=30_000)
    assert command.finish() == 1, command.output
    assert "cannot write merged" in command.output
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]
    assert not list(tmp_path.glob(".merged*"))


def interrupted(out: Path) -> None:
    with new_folder(out, force=True) as aside:
        (aside / "half").write_text("x")
        raise KeyboardInterrupt


def test_an_error_inside_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]

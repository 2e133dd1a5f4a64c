"""Opening a model for chat: what belongs together is found, what does not is refused with a reason."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minituner.chat.opening import name_adapters, open_model
from minituner.chat.session import open_session
from minituner.errors import MinitunerError, UsageError
from minituner.train.loop import train
from tests.chat.conftest import ANSWER, QUESTION
from tests.export.test_shards import Bomb
from tests.tiny import tiny_folder, tiny_model, tiny_recipe, tiny_tokenizer


def silent(_: str) -> None:
    """Nobody listens."""


@pytest.mark.slow
def test_a_base_and_its_adapter_can_be_given_apart(trained: dict[str, Path]) -> None:
    session = open_session(trained["base"], adapter=trained["native"], max_new_tokens=100, say=silent)
    assert session.ask(QUESTION) == ANSWER
    with pytest.raises(UsageError, match="is an adapter itself"):
        open_session(trained["native"], adapter=trained["native"])
    with pytest.raises(UsageError, match="not an adapter folder"):
        open_session(trained["base"], adapter=trained["base"])


def test_several_adapters_are_each_what_they_are_alone(trained: dict[str, Path]) -> None:
    both = open_model(trained["base"], [trained["native"], f"second={trained['other']}"], say=silent)
    assert both.names == ["native", "second", "base"]
    ids = torch.tensor([[1, 2, 3, 4]])
    for name, folder in (("native", trained["native"]), ("second", trained["other"])):
        alone = open_model(folder, say=silent)
        with both.using(name) as model, alone.using(alone.names[0]) as single, torch.no_grad():
            assert torch.equal(model(ids).logits, single(ids).logits)
    plain = open_model(trained["base"], say=silent)
    with both.using("base") as model, torch.no_grad():
        assert torch.equal(model(ids).logits, plain.model(ids).logits)
    assert not any(parameter.requires_grad for parameter in both.model.parameters())


def test_adapters_get_names_that_tell_them_apart(tmp_path: Path) -> None:
    for place in ("ada/hf", "b/ada/hf", "x=y", "base", "v1.5"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "adapter_config.json").write_text("{}")
    paths = [tmp_path / place for place in ("ada/hf", "b/ada/hf", "x=y", "base", "v1.5")]
    assert list(name_adapters([str(path) for path in paths])) == ["ada", "ada-2", "x-y", "base-2", "v1-5"]
    assert name_adapters([f"formal={paths[0]}"]) == {"formal": paths[0]}
    for wrong in (f"base={paths[0]}", f"a.b={paths[0]}"):
        with pytest.raises(UsageError, match="name"):
            name_adapters([wrong])


def test_an_adapter_of_another_shape_is_refused_as_the_second_too(trained: dict[str, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(trained["other"], tmp_path / "broken")
    facts = json.loads((broken / "minituner.json").read_text())
    facts["base_fingerprint"] = "00000000-00000000"
    (broken / "minituner.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match="does not fit this model"):
        open_model(trained["base"], [trained["native"], broken], say=silent)


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    other = tiny_folder(tmp_path / "other", seed=5)
    with pytest.raises(UsageError, match="other weights") as error:
        open_session(other, adapter=trained["native"], say=said.append)
    assert str(trained["base"]) in error.value.text()
    open_session(other, adapter=trained["native"], say=said.append, other_base=True)
    assert any("other weights" in line and str(trained["base"]) in line for line in said), "allowed, and said aloud"
    said.clear()
    open_session(trained["native"], say=said.append, dtype="bf16")
    assert not any("other weights" in line for line in said), "the same base in another data type is the same base"


def test_a_damaged_adapter_is_a_message(trained: dict[str, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(trained["native"], tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(MinitunerError, match="cannot read the adapter"):
        open_session(broken, say=silent)
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match="the folder is incomplete"):
        open_session(broken, say=silent)
    (broken / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UsageError, match="is a pickle, which can hold code"):
        open_session(broken, say=silent)


def test_a_pickle_that_holds_more_than_tensors_is_a_message_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_folder(tmp_path / "base")
    (base / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, base / "pytorch_model.bin")
    with pytest.raises(MinitunerError, match=r"cannot be read as plain tensors: .*GLOBAL") as caught:
        open_session(base, say=silent)
    assert "weights_only" not in caught.value.text(), "torch's advice is to run it all the same"
    assert not (tmp_path / "exploded").exists()


def test_an_adapter_without_a_tokenizer_takes_its_bases(trained: dict[str, Path], tmp_path: Path) -> None:
    bare = shutil.copytree(trained["native"], tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert open_session(bare, max_new_tokens=100, say=silent).ask(QUESTION) == ANSWER


def test_a_folder_without_a_tokenizer_is_a_message(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(MinitunerError, match="has no tokenizer"):
        open_session(tmp_path, say=silent)


def test_a_tokenizer_without_a_chat_template_asks_for_a_template(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="--prompt-template"):
        open_session(tmp_path, say=silent)
    assert open_session(tmp_path, template="default", max_new_tokens=2, say=silent).ask("Hi") is not None


def test_an_unknown_template_names_the_nearest_before_anything_is_loaded() -> None:
    with pytest.raises(UsageError, match="internlm2_chat"):
        open_session("/nowhere", template="internlm2_chatt", say=silent)


@pytest.mark.parametrize(("option", "value"), [("dtype", "float8"), ("bits", 3)])
def test_a_data_type_or_number_of_bits_that_does_not_exist_is_refused(
    option: str, value: Any, model_folder: Path
) -> None:
    with pytest.raises(UsageError, match=f"--{option}"):
        open_session(model_folder, say=silent, **{option: value})


def test_bits_without_bitsandbytes_name_the_command(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    with pytest.raises(UsageError, match=r"minituner\[quantization\]"):
        open_session(model_folder, bits=4, say=silent)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_bits_hold_the_base_quantised_under_its_adapter(bits: int, trained: dict[str, Path]) -> None:
    whole = open_model(trained["native"], say=silent)
    loaded = open_model(trained["native"], bits=bits, dtype="float32", say=silent)
    kinds = {p.dtype for n, p in loaded.model.named_parameters() if "base_layer" in n}
    assert kinds == {torch.uint8 if bits == 4 else torch.int8}
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        apart = (loaded.model(ids).logits - whole.model(ids).logits).norm() / whole.model(ids).logits.norm()
    assert 0 < apart < (0.5 if bits == 4 else 0.1)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_bits_are_made_of_the_data_type_that_training_had(
    bits: int, model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained in float32 here, opened where `auto` takes bfloat16: rounded twice, it would be another base."""
    method = {"name": "qlora" if bits == 4 else "int8_lora", "lora_rank": 4}
    recipe = tiny_recipe(model_folder, chats, method=method, train={"max_steps": 1}, evaluate={"prompts": []})
    assert recipe.model.dtype == "float32"
    adapter = train(recipe, tmp_path / "run", say=silent).hf
    monkeypatch.setattr("minituner.model.loading.fast_dtype", lambda device: (torch.bfloat16, "measured"))
    opened = open_model(adapter, bits=bits, say=silent)
    assert opened.model.get_input_embeddings().weight.dtype == torch.float32
    with pytest.raises(UsageError, match="other weights"):
        open_model(adapter, bits=bits, dtype="bfloat16", say=silent)


def own_code(folder: Path, **config: Any) -> Path:
    """A model folder whose config names code that would leave a mark when it is run."""
    tiny_folder(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}} | config
    (folder / "config.json").write_text(json.dumps(values))
    mark = folder / "it-ran"
    (folder / "configuration_mine.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    return folder


def test_a_folder_that_wants_to_run_code_is_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(_: str) -> str:
        raise AssertionError("nobody is asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    folder = own_code(tmp_path / "own")
    with pytest.raises(UsageError, match=r"(?s)configuration_mine\.py.*--trust-remote-code"):
        open_session(folder, say=silent)
    assert not (folder / "it-ran").exists()
    known = own_code(tmp_path / "known", model_type="llama")
    assert open_session(known, max_new_tokens=2, say=silent).ask("Hi") is not None, "transformers has its own class"
    assert not (known / "it-ran").exists()


def test_a_full_fine_tuning_is_compared_with_what_it_started_from(trained: dict[str, Path], tmp_path: Path) -> None:
    full = tiny_folder(tmp_path / "full", seed=9)
    facts = {"base": str(trained["base"]), "method": "full", "template": "native", "system": "Be kind."}
    (full / "minituner.json").write_text(json.dumps(facts))
    session = open_session(full, compare=True, max_new_tokens=8, say=silent)
    assert session.loaded.names == ["tuned", "base"]
    assert session.system == "Be kind."
    before = session.fork("base")
    alone = open_session(trained["base"], system="Be kind.", max_new_tokens=8, say=silent)
    assert before.ask("Hi") == alone.ask("Hi")
    assert session.ask("Hi") == open_session(full, max_new_tokens=8, say=silent).ask("Hi") != alone.messages[-1].text
    with pytest.raises(UsageError, match="nothing to be compared with"):
        open_session(trained["base"], compare=True, say=silent)

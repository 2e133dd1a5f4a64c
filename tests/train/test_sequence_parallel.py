"""Sequence parallel: slices, groups, refusals, proofs that can fail, a killed rank."""

from __future__ import annotations

import importlib.util
import math
import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minituner.data.collate import collate, slice_of_row
from minituner.data.encoding import IGNORE
from minituner.data.prepare import prepare
from minituner.errors import UsageError
from minituner.train import sequence_parallel
from minituner.train.feed import Feed
from minituner.train.launch import World
from minituner.train.ranks import Ranks
from tests.promises.common import documents
from tests.tiny import tiny_folder, tiny_model, tiny_recipe, tiny_tokenizer, write_chats
from tests.train import shared_rows
from tests.train.processes import finish_all, ranks_of
from tests.train.test_resume import last_files, metrics_of

PACKS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), max_size=3)


@given(packs=PACKS, parts=st.integers(2, 9), isolate=st.booleans())
def test_slices_put_together_are_the_row_and_its_padding(packs: list[list[int]], parts: int, isolate: bool) -> None:
    row = collate([documents(tuple(lengths)) for lengths in packs], isolate=isolate)
    slices = [slice_of_row(row, part, parts) for part in range(parts)]
    length = row.input_ids.shape[1]
    width = max(1, math.ceil(length / parts))
    for name in ("input_ids", "position_ids", "shift_labels"):
        together = torch.cat([getattr(part, name) for part in slices], dim=1)
        assert [getattr(part, name).shape for part in slices] == [(1, width)] * parts
        assert together.dtype == getattr(row, name).dtype
        assert torch.equal(together[:, :length], getattr(row, name))
        padding = {"input_ids": 0, "shift_labels": IGNORE}.get(name)
        end = together[0, length:]
        assert torch.equal(end, torch.arange(len(end)) if padding is None else torch.full_like(end, padding))
    assert sum(part.tokens for part in slices) == row.tokens == length
    assert sum(part.supervised_tokens for part in slices) == row.supervised_tokens
    for part in slices:
        padded = width * parts - length
        assert part.seq_lens == row.seq_lens + [padded] * (padded > 0), "borders are those of the whole row"
        assert part.cu_seqlens.dtype == torch.int32
        assert part.cu_seqlens.diff().tolist() == part.seq_lens
        assert part.supervised_tokens == int((part.shift_labels != IGNORE).sum())


def test_the_last_token_of_a_slice_predicts_the_first_of_the_next() -> None:
    row = collate([[(torch.arange(8).numpy(), torch.arange(8).numpy())]])
    assert slice_of_row(row, 0, 2).shift_labels.tolist() == [[1, 2, 3, 4]]
    assert slice_of_row(row, 1, 2).shift_labels.tolist() == [[5, 6, 7, IGNORE]]


@pytest.mark.usefixtures("own_home")
def test_ranks_of_a_group_get_the_same_packs_and_groups_share_them(model_folder: Path, chats: Path) -> None:
    def feeds(world_size: int, size: int) -> list[Feed]:
        recipe = tiny_recipe(model_folder, chats, distributed={"sequence_parallel_size": size})
        prepared = prepare(recipe.data, tiny_tokenizer(), say=lambda line: None)
        return [Feed(prepared, recipe, rank, world_size) for rank in range(world_size)]

    four, two = feeds(4, 2), feeds(2, 1)
    assert [feed.total_steps for feed in four] == [two[0].total_steps] * 4
    for step in range(two[0].total_steps):
        assert [feed.packs(step) for feed in four] == [two[n].packs(step) for n in (0, 0, 1, 1)]
        for group, feed in enumerate(two):
            for whole, *parts in zip(
                feed.window(step), *(four[2 * group + part].window(step) for part in (0, 1)), strict=True
            ):
                together = torch.cat([part.input_ids for part in parts], dim=1)
                assert torch.equal(together[:, : whole.tokens], whole.input_ids)
    assert feeds(1, 2)[0].total_steps == feeds(2, 2)[0].total_steps, "a dry run sees what a group would get"


# sections, world size, whether DeepSpeed is there -> all that the message must say
REFUSED: dict[str, tuple[dict[str, Any], int, bool, list[str]]] = {
    "alone": ({}, 1, True, ["1 rank cannot be put into groups of 2", "NPROC_PER_NODE=2"]),
    "three ranks": ({}, 3, True, ["3 ranks cannot be put into groups of 2"]),
    "sdpa": ({"model": {"attention": "sdpa"}}, 2, True, ["model.attention=sdpa knows one causal mask"]),
    "eager, unpacked": (
        {"model": {"attention": "eager"}, "data": {"packing": "none"}}, 2, True, ["model.attention=eager knows"],
    ),
    "no DeepSpeed": ({}, 2, False, ["pip install 'minituner[deepspeed]'"]),
    "everything": (
        {"model": {"attention": "sdpa"}}, 1, False, ["3 problems", "1 rank", "model.attention=sdpa", "pip install"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sections", "world_size", "installed", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_refused_all_at_once(
    sections: dict[str, Any], world_size: int, installed: bool, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(Path("m"), Path("d"), distributed={"sequence_parallel_size": 2})
    for section, changes in sections.items():  # set one by one: loading a recipe refuses some of these already
        for name, value in changes.items():
            setattr(getattr(recipe, section), name, value)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" and not installed else find(name)
    )
    with pytest.raises(UsageError) as caught:
        sequence_parallel.refuse_what_cannot_be(recipe, World(world_size=world_size))
    assert all(word in caught.value.text() for word in words), caught.value.text()
    without = recipe.model_copy(update={"distributed": recipe.distributed.model_copy(update={"zero": None})})
    without.distributed.sequence_parallel_size = 1
    sequence_parallel.refuse_what_cannot_be(without, World(world_size=world_size))


@pytest.mark.slow
def test_the_command_refuses_it_with_exit_status_2_said_once(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    tiny_recipe(model_folder, chats).dump(tmp_path / "r.yaml")
    arguments = ["train", "r.yaml", "--work-dir", "w", "distributed.sequence_parallel_size=3"]
    statuses, output = finish_all(ranks_of(arguments, tmp_path))
    assert statuses == [2, 2], output
    assert output.count("2 ranks cannot be put into groups of 3") == 1
    assert not (tmp_path / "w").exists()


def model_like(**config: Any) -> Any:
    model = tiny_model()
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def with_sinks() -> Any:
    model = tiny_model()
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    return model


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONGROPE = {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 64}}
MODELS: dict[str, tuple[Any, int, str]] = {
    "heads": (tiny_model, 3, "its 4 attention heads cannot be shared equally: the size must be one of 2, 4"),
    "sinks": (with_sinks, 2, "a learned sink for each head"),
    "dynamic": (lambda: model_like(rope_parameters=DYNAMIC, max_position_embeddings=127), 2, "longer than 127 tokens"),
    "longrope": (lambda: model_like(rope_parameters=LONGROPE), 2, "longrope position embedding changes"),
}


@pytest.mark.parametrize(("model", "size", "words"), MODELS.values(), ids=MODELS.keys())
def test_a_model_that_cannot_be_shared_is_refused(model: Any, size: int, words: str) -> None:
    recipe = tiny_recipe(Path("m"), Path("d"), distributed={"sequence_parallel_size": size})
    with pytest.raises(UsageError) as caught:
        sequence_parallel.set_up(model(), shared_rows.CORE, recipe, Ranks(World(world_size=size)), print)
    assert words in caught.value.text()


def test_position_embeddings_that_do_not_change_within_max_length_are_no_obstacle() -> None:
    fits = model_like(rope_parameters=DYNAMIC, max_position_embeddings=128)
    assert sequence_parallel._problems_of_model(fits, 2, 128) == []


def test_layers_of_other_shapes_are_refused_with_their_shapes() -> None:
    attention = sequence_parallel.UlyssesAttention(SimpleNamespace(), "core", None, 2)
    query, key, value = torch.zeros(1, 4, 5, 24), torch.zeros(1, 4, 5, 24), torch.zeros(1, 4, 5, 16)
    with pytest.raises(UsageError, match=r"v \(1, 4, 5, 16\)"):
        attention(torch.nn.Module(), query, key, value, seq_lens=[10])


@given(groups=st.integers(1, 4), key_value_heads=st.integers(1, 8), size=st.integers(1, 8))
def test_query_heads_stay_with_their_key_value_heads(groups: int, key_value_heads: int, size: int) -> None:
    heads = math.lcm(groups * key_value_heads, size)  # any number that both the key-value heads and the ranks divide
    copies = sequence_parallel.copies_of_key_value_heads(key_value_heads, size)
    repeated = torch.arange(key_value_heads).repeat_interleave(copies).tolist()
    assert len(repeated) % size == 0
    for rank in range(size):  # what the all-to-all gives this rank, and what grouped-query attention makes of it there
        own_heads, own = heads // size, repeated[rank * len(repeated) // size :][: len(repeated) // size]
        assert own_heads % len(own) == 0
        for head in range(own_heads):
            wanted = (rank * own_heads + head) * key_value_heads // heads
            assert own[head * len(own) // own_heads] == wanted


@pytest.mark.slow
def test_two_groups_of_two_sum_the_gradients_of_both_rows(tmp_path: Path) -> None:
    shared_rows.run_ranks(shared_rows.groups_are_independent, 2, world_size=4, cwd=tmp_path)


@pytest.mark.slow
def test_a_core_that_leaks_and_a_layer_that_looks_across_slices_are_found(tmp_path: Path) -> None:
    shared_rows.run_ranks(shared_rows.what_is_wrong_is_found, 2, world_size=2, cwd=tmp_path)


@pytest.mark.slow
def test_deepspeeds_own_registration_lets_packed_documents_see_each_other(tmp_path: Path) -> None:
    shared_rows.run_ranks(shared_rows.deepspeeds_own_way_is_wrong, 2, world_size=2, cwd=tmp_path)


@pytest.mark.slow
def test_rank_0_answers_alone_and_says_what_it_says_without_sharing(tmp_path: Path) -> None:
    shared_rows.run_ranks(shared_rows.answers_are_its_own, 4, world_size=4, cwd=tmp_path)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a recipe of 14 steps on two ranks that share their rows."""
    sections: dict[str, dict[str, Any]] = {
        "method": {"lora_dropout": 0.3},
        "train": {"num_epochs": 4, "max_steps": 14},
        "distributed": {"sequence_parallel_size": 2},
        "save": {"every_steps": 3},
        "evaluate": {"every_steps": 4},
    }
    chats = write_chats(tmp_path / "chats.jsonl")
    tiny_recipe(tiny_folder(tmp_path / "model"), chats, **sections).dump(tmp_path / "r.yaml")
    return tmp_path


@pytest.mark.slow
def test_one_of_two_sharing_ranks_killed_and_resumed_ends_as_if_never_killed(place: Path) -> None:
    statuses, output = finish_all(ranks_of(["train", "r.yaml", "--work-dir", "never"], place))
    assert statuses == [0, 0], output
    arguments = ["train", "r.yaml", "--work-dir", "killed", "--resume", "if-any"]
    draw = random.Random(3)
    step, victim = draw.randrange(4, 13), draw.randrange(2)
    ranks = ranks_of(arguments, place)
    assert ranks[0].wait_for_step(place / "killed", step), ranks[0].output
    ranks[victim].send(signal.SIGKILL)
    statuses, output = finish_all(ranks)
    assert (statuses[victim], statuses[1 - victim]) == (-signal.SIGKILL, 1), output
    assert "lost contact with another rank" in output
    assert "Traceback" not in output
    statuses, output = finish_all(ranks_of(arguments, place))
    assert statuses == [0, 0], output
    assert "resumed from killed/checkpoints/step-" in output

    assert last_files(place / "killed") == last_files(place / "never")
    never, killed = metrics_of(place / "never"), metrics_of(place / "killed")
    assert sorted(killed) == sorted(never)
    assert all(set(facts) == set(never[step]) for step, facts in killed.items())

    alone = ranks_of([*arguments, "distributed.sequence_parallel_size=1"], place)
    statuses, output = finish_all(alone)
    assert statuses == [2, 2], output
    assert "distributed.sequence_parallel_size: 2 then, 1 now" in output

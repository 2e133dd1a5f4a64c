"""Which attention is taken, and why: every combination of card, data type, package and model, without owning one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minituner.errors import UsageError
from minituner.model.attention_choice import (
    BY_NAME,
    EVERYTHING,
    TABLE,
    WITH_SINKS,
    Facts,
    Needs,
    choose,
    facts_here,
    misfits,
    needs_of,
)

BOTH = {"flash-attn": "2.8.3", "flash-attn-3": "3.0.0"}
H100 = Facts("cuda", "bfloat16", (9, 0), torch_varlen=True, installed=BOTH)
A100 = replace(H100, capability=(8, 0), installed={"flash-attn": "2.8.3"})
BARE = replace(A100, installed={})
CPU = Facts()

CASES = [
    (H100, Needs(), "flash_attention_3", ""),
    (
        A100,
        Needs(),
        "flash_attention_2",
        "not flash_attention_3: needs a card of compute capability 9.x, this has 8.0",
    ),
    (replace(H100, capability=(10, 0)), Needs(), "flash_attention_2", "this has 10.0"),
    (BARE, Needs(), "varlen", "flash_attention_2: needs flash-attn, which is not installed"),
    (
        replace(H100, dtype="float32"),
        Needs(),
        "per_document_sdpa",
        "computes in half precision, the model in float32",
    ),
    (replace(A100, dtype="float16"), Needs(), "flash_attention_2", ""),
    (replace(H100, capability=(7, 5)), Needs(), "per_document_sdpa", "needs a card of compute capability 8.0 or newer"),
    (CPU, Needs(), "per_document_sdpa", "not flash_attention_3, flash_attention_2, varlen: needs a CUDA GPU"),
    (replace(BARE, torch_varlen=False), Needs(), "per_document_sdpa", "varlen: needs a torch with"),
    (
        replace(A100, broken={"flash-attn": "undefined symbol"}),
        Needs(),
        "varlen",
        "cannot be imported: undefined symbol",
    ),
    (replace(A100, rocm=True), Needs(), "flash_attention_2", ""),
    (replace(BARE, rocm=True), Needs(), "per_document_sdpa", "varlen: is made for NVIDIA cards"),
    # Models: Gemma 2 (soft-capping, no SDPA), gpt-oss (sinks, no SDPA), Gemma 3 and Mistral (windows), wide heads
    (H100, Needs(softcap=True, sdpa=False), "flash_attention_3", ""),
    (BARE, Needs(softcap=True, sdpa=False), "per_document_eager", "varlen: has no soft-capping, which the model uses"),
    (H100, Needs(sinks=True, sdpa=False), "per_document_eager", "flash_attention_2, varlen: has no sinks"),
    (H100, Needs(sliding_window=4096), "flash_attention_3", ""),
    (BARE, Needs(sliding_window=4096), "varlen", ""),
    (H100, Needs(dropout=True), "flash_attention_2", "flash_attention_3: has no dropout, which the model uses"),
    (H100, Needs(head_dim=512), "per_document_sdpa", "takes heads of at most 256, the model's have 512"),
    (CPU, Needs(softcap=True, sdpa=False), "per_document_eager", "per_document_sdpa: cannot do what this model's"),
]


@pytest.mark.parametrize(("facts", "needs", "expected", "because"), CASES)
def test_auto_takes_the_fastest_that_fits_and_says_what_kept_the_others_out(
    facts: Facts, needs: Needs, expected: str, because: str
) -> None:
    name, why = choose("auto", facts, needs, one_document_rows=False)
    assert name == expected
    assert why.startswith(BY_NAME[expected].about)
    assert because in why


def drawn_facts() -> st.SearchStrategy[Facts]:
    return st.builds(
        Facts,
        device=st.sampled_from(["cpu", "cuda"]),
        dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
        capability=st.sampled_from([(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
        rocm=st.booleans(),
        torch_varlen=st.booleans(),
        installed=st.sampled_from([{}, {"flash-attn": "2.8.3"}, {"flash-attn-3": "3.0.0"}, BOTH]),
        broken=st.sampled_from([{}, {"flash-attn": "undefined symbol"}]),
    )


def drawn_needs() -> st.SearchStrategy[Needs]:
    return st.builds(
        Needs,
        head_dim=st.sampled_from([8, 64, 128, 256, 512]),
        softcap=st.booleans(),
        sinks=st.booleans(),
        sliding_window=st.sampled_from([None, 4096]),
        dropout=st.booleans(),
        sdpa=st.booleans(),
    )


@given(facts=drawn_facts(), needs=drawn_needs())
def test_every_combination_gets_an_isolating_attention_and_every_misfit_is_refused(facts: Facts, needs: Needs) -> None:
    name, why = choose("auto", facts, needs, one_document_rows=False)
    assert BY_NAME[name].isolates
    assert not misfits(BY_NAME[name], facts, needs)
    for row in TABLE:
        problems = misfits(row, facts, needs)
        if not row.isolates:
            with pytest.raises(UsageError, match="they would see each other"):
                choose(row.name, facts, needs, one_document_rows=False)
        elif problems:
            with pytest.raises(UsageError) as refused:
                choose(row.name, facts, needs, one_document_rows=False)
            assert all(problem in str(refused.value) for problem in problems), "all of them at once"
            assert f"model.attention=auto takes {name}" in str(refused.value)
            assert (row.name in why) == (TABLE.index(row) < TABLE.index(BY_NAME[name]))
        else:
            assert choose(row.name, facts, needs, one_document_rows=False) == (row.name, "as the recipe says")
            assert TABLE.index(row) >= TABLE.index(BY_NAME[name]), "auto takes the first that fits"


@given(facts=drawn_facts(), needs=drawn_needs())
def test_no_kernel_is_taken_for_what_it_cannot_do(facts: Facts, needs: Needs) -> None:
    """The rules once more, written down independently of the table."""
    name, _ = choose("auto", facts, needs, one_document_rows=False)
    if name in ("flash_attention_2", "flash_attention_3", "varlen"):
        assert facts.device == "cuda"
        assert facts.dtype != "float32"
        assert needs.head_dim <= 256
        assert not needs.sinks
        assert facts.capability >= (8, 0)
    if name == "flash_attention_3":
        assert facts.capability[0] == 9
        assert "flash-attn-3" in facts.installed
    if name == "flash_attention_2":
        assert "flash-attn" in facts.installed
        assert "flash-attn" not in facts.broken
    if name == "varlen":
        assert facts.torch_varlen
        assert not needs.softcap
        assert not needs.dropout
    if name == "per_document_sdpa":
        assert needs.sdpa


def test_a_refusal_says_how_to_get_it() -> None:
    with pytest.raises(UsageError) as refused:
        choose("flash_attention_2", BARE, Needs(), one_document_rows=False)
    assert refused.value.exit_code == 2
    assert refused.value.next_command == "pip install 'minituner[flash]' --no-build-isolation"
    assert refused.value.fix == "model.attention=auto takes varlen"
    with pytest.raises(UsageError, match="per_document_sdpa"):
        choose("per_document_sdp", CPU, one_document_rows=False)


@pytest.mark.parametrize("wanted", ["sdpa", "eager"])
def test_one_mask_for_the_row_is_allowed_only_for_one_document(wanted: str) -> None:
    assert choose(wanted, CPU, one_document_rows=True) == (wanted, "as the recipe says")
    with pytest.raises(UsageError, match=r"data\.packing=none"):
        choose(wanted, CPU, one_document_rows=False)


def test_layers_that_no_attention_can_isolate() -> None:
    needs = Needs(other_layers=("linear_attention",))
    with pytest.raises(UsageError, match="linear_attention"):
        choose("auto", H100, needs, one_document_rows=False)
    assert choose("auto", H100, needs, one_document_rows=True)[0] == "sdpa"


def test_the_facts_of_this_machine_come_from_it() -> None:
    import torch

    facts = facts_here()
    assert facts.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert facts_here("cpu", "bfloat16") == Facts("cpu", "bfloat16")
    name, _ = choose("auto", one_document_rows=False, device="cpu")
    assert name == "per_document_sdpa"


def test_needs_are_read_from_configs() -> None:
    import transformers as t

    assert needs_of(t.LlamaConfig(hidden_size=64, num_attention_heads=4)) == Needs(head_dim=16)
    gemma2 = needs_of(t.Gemma2Config())
    assert gemma2 == Needs(head_dim=256, softcap=True, sliding_window=4096, sdpa=False)
    assert needs_of(t.MistralConfig(sliding_window=None)).sliding_window is None
    assert needs_of(t.MistralConfig()).sliding_window == 4096
    assert needs_of(t.Qwen2Config(use_sliding_window=False)).sliding_window is None
    assert needs_of(t.GptOssConfig()).sinks
    assert needs_of(t.DeepseekV3Config()).head_dim == 192
    assert needs_of(t.LlamaConfig(attention_dropout=0.1)).dropout
    assert needs_of(t.MambaConfig()).other_layers == ("linear_attention",)
    assert needs_of(t.Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"])).other_layers == ("conv",)
    assert needs_of(t.RwkvConfig()).other_layers


def test_models_with_sinks_are_those_whose_source_passes_them() -> None:
    """A model that is missing here would be trained without its sinks; the proof at step 0 would refuse it."""
    import transformers

    folder = Path(transformers.__file__).parent / "models"
    passing = {f.parent.name for f in folder.glob("*/modeling_*.py") if re.search(r"\bs_aux=", f.read_text("utf-8"))}
    assert passing
    assert passing <= WITH_SINKS


def test_the_table_names_only_what_is_known() -> None:
    assert all(row.can <= EVERYTHING for row in TABLE)
    assert len(BY_NAME) == len(TABLE)
    from typing import get_args

    from minituner.recipe import ModelSection

    assert set(get_args(ModelSection.model_fields["attention"].annotation)) == {"auto", *BY_NAME}

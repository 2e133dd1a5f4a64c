"""Sequence parallel: several ranks share one packed row, so that it may be longer than one device can hold.

A row of 8 tokens, documents A and B, on two ranks (`distributed.sequence_parallel_size: 2`), a model with 4 heads:

    row               A0 A1 A2 A3 A4 | B0 B1 B2          cut into slices of equal length, wherever that falls
    rank 0            A0 A1 A2 A3      heads 0 1 2 3     embedding, projections, MLP, loss: on its slice only
    rank 1            A4 B0 B1 B2      heads 0 1 2 3
        all-to-all    ..........................         around the attention of each layer (DeepSpeed Ulysses)
    rank 0            A0 .. A4 | B0 .. B2   heads 0 1    our document-isolated attention, on whole documents
    rank 1            A0 .. A4 | B0 .. B2   heads 2 3
        all-to-all back

Ulysses moves, our attention computes: `UlyssesSPAttentionHF` is given minituner's attention function as its core, and
the borders of the whole row travel beside it. DeepSpeed's own way in (`register_with_transformers`) is not taken: it
replaces a function for every model of the process, keeps its groups in module globals, and with SDPA as core it lets
packed documents see each other without a word (it trusts position_ids, which SDPA never reads). So the function gets a
name of its own, which a model is switched to, and away from while it answers (attention.for_generation).

Before the first step the model itself is asked (whole_rows.py): row shared or not, its logits have to be the same.
Lesson: notebook 07.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from minituner.errors import MinitunerError, UsageError
from minituner.model.attention import ULYSSES
from minituner.model.fewer_tokens import limits_of_length
from minituner.recipe import Recipe
from minituner.train.launch import World
from minituner.train.ranks import Ranks
from minituner.train.whole_rows import WholeRows, assert_same_as_whole

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def refuse_what_cannot_be(recipe: Recipe, world: World) -> None:
    """Stop before anything is loaded if the recipe asks for sequence parallel where it cannot be.

    Raises:
        UsageError: all that stands in the way.
    """
    size = recipe.distributed.sequence_parallel_size
    if size == 1:
        return
    problems = []
    if world.world_size % size:
        ranks = "1 rank" if world.world_size == 1 else f"{world.world_size} ranks"
        problems.append(f"{ranks} cannot be put into groups of {size}: start a multiple of it (NPROC_PER_NODE={size})")
    if recipe.model.attention in ("sdpa", "eager"):
        problems.append(
            f"model.attention={recipe.model.attention} knows one causal mask for a row and would let its documents (and"
            " the padding that makes slices equal) see each other: take model.attention=auto"
        )
    if importlib.util.find_spec("deepspeed") is None:
        problems.append("DeepSpeed is not installed: pip install 'minituner[deepspeed]'")
    _refuse(size, problems, said_elsewhere=not world.is_main)


def _refuse(size: int, problems: list[str], *, said_elsewhere: bool = False) -> None:
    if problems:
        error = UsageError(
            f"distributed.sequence_parallel_size={size}: {len(problems)} problem{'s' * (len(problems) != 1)}\n"
            + "\n".join(f"  {problem}" for problem in problems),
            fix="correct these, or distributed.sequence_parallel_size=1",
        )
        error.said_elsewhere = said_elsewhere
        raise error


def set_up(model: Any, implementation: str, recipe: Recipe, ranks: Ranks, say: Callable[[str], None] = print) -> Any:
    """Share each row among `sequence_parallel_size` ranks from now on, and prove on this model that it is the same.

    Collective: every rank calls it, before adapters and engine.

    Args:
        model: as loaded, not yet wrapped; its attention layers are switched.
        implementation: the document-isolated attention it was loaded with; it becomes the core.

    Returns:
        What answers for a whole row: the model itself at size 1, else a `WholeRows` to ask for proofs.

    Raises:
        UsageError: this model's heads or layers cannot be shared like this.
        MinitunerError: shared and whole rows do not give the same logits.
    """
    size = recipe.distributed.sequence_parallel_size
    if size == 1:
        return model
    _refuse(size, _problems_of_model(model, size, recipe.data.max_length), said_elsewhere=not ranks.is_main)
    from transformers import AttentionInterface

    from minituner.train.zero import join_deepspeed

    join_deepspeed()
    group = _own_group(ranks, size)
    core = AttentionInterface()[implementation]
    AttentionInterface.register(ULYSSES, UlyssesAttention(core, implementation, group, size))
    ranks.before_leaving.append(lambda: AttentionInterface.register(ULYSSES, core))  # transformers' table has no end
    model.set_attn_implementation(ULYSSES)
    if model.config._attn_implementation != ULYSSES:  # transformers only warns
        _refuse(size, [f"{type(model).__name__} does not take its attention from transformers' AttentionInterface"])
    whole = WholeRows(model, implementation, group, ranks.rank % size, size)
    difference = assert_same_as_whole(model, whole, ranks, implementation, documents=(5 * size + 1, 1, 3 * size))
    say(
        f"sequence parallel: {size} ranks share each row, {ranks.world.world_size // size} at a time; on this model its"
        f" logits differ from a whole row's by {difference:.1g} of their size"
    )
    return whole


def _problems_of_model(model: Any, size: int, max_length: int) -> list[str]:
    config = model.config.get_text_config()
    problems = []
    if config.num_attention_heads % size:
        fits = [n for n in range(2, config.num_attention_heads + 1) if config.num_attention_heads % n == 0]
        problems.append(
            f"its {config.num_attention_heads} attention heads cannot be shared equally: the size must be one of"
            f" {', '.join(map(str, fits))}"
        )
    if any(getattr(module, "sinks", None) is not None for module in model.modules()):
        problems.append("its attention has a learned sink for each head, which is not shared with the heads")
    for kind, limit in limits_of_length(config):
        if max_length > limit:
            problems.append(
                f"its {kind} position embedding changes where a document is longer than {limit} tokens,"
                f" which not every slice can see: keep data.max_length ({max_length}) within {limit}"
            )
    return problems


def _own_group(ranks: Ranks, size: int) -> Any:
    """The process group of the ranks that share this rank's rows: 0 .. size-1, then the next `size`, and so on."""
    own = None
    for first in range(0, ranks.world.world_size, size):  # every rank has to take part in making every group
        members = list(range(first, first + size))
        group = dist.new_group(members)
        own = group if ranks.rank in members else own
    return own


class UlyssesAttention:
    """The attention function of a model that shares its rows: all-to-all, `core` on whole rows, all-to-all back."""

    def __init__(self, core: Attention, implementation: str, group: Any, size: int) -> None:
        self.core, self.implementation, self.group, self.size = core, implementation, group, size
        self._exchanges: dict[tuple[int, ...], Any] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention of this rank's slice to its documents, whichever rank holds the rest of them.

        Args:
            query: (1, heads, T / size, head_dim); key and value: (1, key_value_heads, T / size, head_dim).
            kwargs: what `core` needs, `seq_lens` or `cu_seq_lens_q` of the whole row among it.

        Returns:
            (1, T / size, heads * head_dim) and None.
        """
        copies = copies_of_key_value_heads(key.shape[1], self.size)
        if copies > 1:
            key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
        # Ulysses gathers position_ids in each layer and insists on them; our core goes by the borders alone. One number
        # does, instead of a slice.
        kwargs["position_ids"] = torch.zeros(1, 1, dtype=torch.long, device=query.device)
        output, _ = self._exchange(query, key, value)(module, query, key, value, None, **kwargs)
        return output, None

    def _on_whole_row(self, module: Any, q: Any, k: Any, v: Any, mask: None, **kwargs: Any) -> Any:
        """What Ulysses calls in the middle: q, k, v are (1, heads / size, T, head_dim)."""
        del kwargs["position_ids"]
        if kwargs.get("seq_lens") is None and kwargs.get("cu_seq_lens_q") is None:
            raise MinitunerError(
                "attention was called without document borders while rows are shared among ranks",
                why="a model that does not pass its keyword arguments on to its attention layers, or an answer that"
                " was asked for outside of attention.for_generation",
                fix="distributed.sequence_parallel_size=1 for this model",
            )
        return self.core(module, q, k, v, mask, **kwargs)

    def _exchange(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        """DeepSpeed's module for these numbers of heads (some models have layers of several kinds)."""
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        heads, key_value_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
        if heads % self.size or value.shape != key.shape or key.shape[3] != head_dim or query.shape[0] != 1:
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip("qkv", (query, key, value), strict=True))
            _refuse(
                self.size, [f"attention layers of this shape cannot be shared: {shapes} (1, heads, tokens, head_dim)"]
            )
        shape = (heads, key_value_heads, head_dim)
        if shape not in self._exchanges:
            self._exchanges[shape] = UlyssesSPAttentionHF(
                attn=self._on_whole_row,
                batch_size=1,
                attn_head_count=heads,
                attn_head_size=head_dim,
                kv_head_count=key_value_heads,
                num_hidden_layers=1,  # for a debugging mode only
                process_group=self.group,
                seq_length_is_variable=True,
            )
        return self._exchanges[shape]


def copies_of_key_value_heads(key_value_heads: int, size: int) -> int:
    """How often each key-value head is repeated so that `size` ranks get equally many; 1 where they divide.

    With 2 key-value heads on 4 ranks each is there twice; with 3 on 2 ranks too (6 heads, 3 a rank). Query heads stay
    with their own: head h of H uses key-value head h * K // H, before and after. Ulysses can do the first of these two
    itself, but then writes `num_key_value_groups` into the layer and leaves it there for whoever generates next.
    """
    return math.lcm(key_value_heads, size) // key_value_heads

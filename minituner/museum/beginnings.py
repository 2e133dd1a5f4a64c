"""The fault at the beginning of a text: two BOS where chat sends one.

    chat        <s> user: Hi ... assistant:
    training    <s> <s> user: Hi ... assistant: Hello!        every position is one further on than it will be in use

Where it happens: the chat template prints `{{ bos_token }}`, the rendered text is tokenised with
`add_special_tokens=True`, and the tokenizer adds its own. Lesson: notebook 03.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minituner.errors import UsageError
from minituner.museum.injection import Injection, own_cache, part, replaced
from minituner.museum.seen import Seen
from minituner.recipe import Recipe


@contextmanager
def double_bos(injection: Injection) -> Iterator[None]:
    """Within: every training text that begins with BOS begins with two.

    Raises:
        UsageError: (when data are encoded) the tokenizer has no BOS.
    """
    encoding = part("data.encoding")
    encode_many, kind = encoding.encode_many, encoding.KINDS.index("bos")

    def with_two(conversations: Sequence[Any], tokenizer: Any, *arguments: Any, **options: Any) -> list[Any]:
        bos = tokenizer.bos_token_id
        if bos is None:
            raise UsageError("this tokenizer has no BOS that could stand twice", fix="another model")
        documents = []
        for document in encode_many(conversations, tokenizer, *arguments, **options):
            if len(document) and document.input_ids[0] == bos:
                injection.acted += 1
                document = encoding.Encoded(
                    np.concatenate([np.array([bos], document.input_ids.dtype), document.input_ids]),
                    np.concatenate([[False], document.trained]),
                    np.concatenate([np.array([kind], document.kinds.dtype), document.kinds]),
                )
            documents.append(document)
        return documents

    with (
        own_cache(injection),
        replaced(encoding, encode_many=with_two),
        replaced(part("data.prepare"), encode_many=with_two),
        replaced(part("data.walk"), encode_many=with_two),
    ):
        yield


def see_double_bos(recipe: Recipe, scratch: Path) -> Seen:
    """`minituner parity`: the ids in front of an answer, by training and by chat."""
    from minituner.export.parity import parity

    template = None if recipe.data.template == "native" else recipe.data.template
    found = parity(recipe.model.name_or_path, template=template)
    return Seen(found.equal, "\n".join(line.strip() for line in found.lines()[1:]), found.to_dict())

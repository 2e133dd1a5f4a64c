"""The same records through TRL's SFTTrainer, to compare: tokenise, mask all but the assistant, pack by best fit.

    alpaca rows -> messages (not timed) -> SFTTrainer(...)._prepare_dataset (timed) -> packed Arrow data set

TRL finds assistant tokens by the marks `{% generation %}` in the chat template. Templates of SmolLM2's family have
none and TRL brings no replacement for them, so they are given the marks here; the rendered text stays the same. TRL is
no dependency of minituner: it is used if it can be imported. Lesson: notebook 04.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from minituner.errors import MinitunerError

Clock = Callable[[dict[str, Any]], AbstractContextManager[None]]

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}, as ChatML templates print it
CHATML_MESSAGE = re.compile(
    r"\{\{\s*'<\|im_start\|>'\s*\+\s*message\['role'\]\s*\+\s*'(?P<newline>\n|\\n)'\s*\+\s*message\['content'\]\s*\+"
    r"\s*'<\|im_end\|>(?:'\s*\+\s*')?(?:\n|\\n)'\s*\}\}"
)


def with_generation_marks(template: str) -> str:
    """The chat template with marks around what the assistant says, its end token included; the same text when rendered.

    A template that has marks already, or prints messages otherwise than ChatML does (TRL may know that one), is
    returned as it is.
    """
    if MARK.search(template):
        return template

    def marked(match: re.Match[str]) -> str:
        newline = match["newline"]
        return (
            "{% if message['role'] == 'assistant' %}"
            f"{{{{ '<|im_start|>assistant{newline}' }}}}"
            "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
            f"{{{{ '{newline}' }}}}"
            f"{{% else %}}{match.group()}{{% endif %}}"
        )

    return CHATML_MESSAGE.sub(marked, template)


def to_messages(row: dict[str, Any]) -> dict[str, Any]:
    """An alpaca row as TRL wants a conversation; the same words as minituner's alpaca format."""
    question = "\n".join(filter(None, (row["instruction"], row["input"])))
    turns = (("user", question), ("assistant", row["output"]))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def prepare_with_trl(spec: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """Time SFTTrainer's preparation of the file; reading it and making messages is timed apart.

    Raises:
        MinitunerError: this version of TRL prepares data somewhere else.
    """
    import datasets
    import pyarrow.compute as pc
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from minituner.model.loading import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(spec["tokenizer"])
    tokenizer.chat_template = with_generation_marks(tokenizer.chat_template)
    reading: dict[str, Any] = {}
    with clock(reading):
        rows = datasets.load_dataset("json", data_files=spec["path"], split="train")
        rows = rows.map(to_messages, remove_columns=rows.column_names)
    result: dict[str, Any] = {}

    class Timed(SFTTrainer):
        """SFTTrainer with a clock around the preparation of its data."""

        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            with clock(result):
                return super()._prepare_dataset(*args, **kwargs)

    # The trainer insists on a model; the smallest one that fits the tokenizer.
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    config = SFTConfig(
        output_dir=str(Path(spec["out"]).with_name("trl")),
        max_length=spec["max_length"],
        packing=True,
        packing_strategy="bfd",
        assistant_only_loss=True,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    packed = Timed(model, args=config, train_dataset=rows, processing_class=tokenizer).train_dataset
    if "seconds" not in result:
        raise MinitunerError(
            "this version of TRL does not prepare its data in SFTTrainer._prepare_dataset, so it cannot be timed",
            fix="install the version the benchmark was written for",
            next_command='pip install "trl==1.16.0"',
        )
    ids, labels = packed.data.column("input_ids"), packed.data.column("labels")
    tokens = pc.sum(pc.list_value_length(ids)).as_py()
    return result | {
        "seconds_with_reading": round(result["seconds"] + reading["seconds"], 4),
        "records": len(rows),
        "tokens": tokens,
        "supervised_tokens": pc.sum(pc.not_equal(pc.list_flatten(labels), -100)).as_py(),
        "packs": len(packed),
        "fill": round(tokens / (len(packed) * spec["max_length"]), 5),
    }

"""Chat templates written the way the families of real models write theirs, and a byte-level tokenizer for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A chat template, the tokenizer's control tokens (the first is BOS, the last is the end token), and its stop."""

    template: str
    controls: tuple[str, ...]
    stop: str
    answer: str = "{}"  # what stands in the trained text around the answer, before the stop


LOOP = "{% for m in messages %}"
CHATML_MESSAGE = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML_CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n你是一个助手。<|im_end|>\\n' }}{% endif %}"
    + LOOP
    + CHATML_MESSAGE
    + "{% endfor %}"
    + CHATML_PROMPT
)
LLAMA3 = (
    "{{- bos_token }}{% set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content']|trim %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + day + '\\n\\n' + system + '<|eot_id|>' }}"
    "{% for m in rest %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content']|trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip()"
    " + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('After the optional system message, conversation roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Qwen3: thinking of earlier answers is left out, and the last answer (or, with thinking off, the generation prompt)
# carries an empty thinking block.
QWEN3_NO_THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + LOOP
    + "{% set content = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set thinking = '' %}{% if '</think>' in content %}"
    "{% set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}{% if loop.index0 > ns.last %}{{ '<think>\\n' + thinking + '\\n</think>\\n\\n' }}"
    "{% endif %}{{ content + '<|im_end|>\\n' }}{% else %}" + CHATML_MESSAGE + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if not (enable_thinking | default(false)) %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + LOOP
    + "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + (m['content'] | trim) + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
NO_STOP = (
    LOOP + "{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MARKED = (
    LOOP + "{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    + CHATML_MESSAGE
    + "{% endif %}{% endfor %}"
    + CHATML_PROMPT
)
MARKED_WRONG = (
    LOOP + "{% if m['role'] == 'user' %}{{ '<|im_start|>user\\n' }}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\\n' }}{% else %}" + CHATML_MESSAGE + "{% endif %}{% endfor %}" + CHATML_PROMPT
)
MARKED_HALF = MARKED.replace("{{ m['content'] + '<|im_end|>' }}", "{{ m['content'][:2] }}").replace(
    "{% endgeneration %}{{ '\\n' }}", "{% endgeneration %}{{ m['content'][2:] + '<|im_end|>\\n' }}"
)
LAST_FIRST = "{{ messages[-1]['content'] + '<|im_end|>\\n' }}{% for m in messages[:-1] %}" + (
    CHATML_MESSAGE + "{% endfor %}" + CHATML_PROMPT
)
DROPS_SYSTEM = LOOP + "{% if m['role'] != 'system' %}" + CHATML_MESSAGE + "{% endif %}{% endfor %}" + CHATML_PROMPT

FAMILIES = {
    "chatml": Family(CHATML_DEFAULT_SYSTEM, CHATML_CONTROLS, "<|im_end|>"),
    "llama3": Family(
        LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"
    ),
    "llama2": Family(LLAMA2, ("<s>", "</s>"), "</s>", " {} "),
    "mistral": Family(MISTRAL, ("<s>", "</s>"), "</s>", " {}"),
    "qwen3": Family(QWEN3_NO_THINKING, CHATML_CONTROLS, "<|im_end|>"),
    "gemma": Family(GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"), "<end_of_turn>"),
    "no_stop": Family(NO_STOP, ("<s>", "</s>"), "</s>"),
    "marked": Family(MARKED, CHATML_CONTROLS, "<|im_end|>"),
}


def family_tokenizer(family: Family) -> Any:
    """256 bytes and the family's control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in family.controls])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.controls[0], eos_token=family.controls[-1]
    )
    tokenizer.chat_template = family.template
    return tokenizer

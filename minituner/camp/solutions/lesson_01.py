"""Solutions of lesson 01. Each function's head and docstring are the learner's stub."""

from __future__ import annotations


# EXERCISE 1.1 (5 min)
def format_of(record):
    """The name of a record's format: "alpaca", "openai", "openorca" or "sharegpt".

    >>> format_of({"instruction": "Count to 3.", "input": "", "output": "1, 2, 3"})
    'alpaca'
    """
    telling = {"conversations": "sharegpt", "messages": "openai", "instruction": "alpaca", "question": "openorca"}
    return next(name for column, name in telling.items() if column in record)


# EXERCISE 1.2 (10 min)
def messages_of(record):
    """The two messages of a record of your own: question and context make what the user says, reply what is answered.

    record: {"question": ..., "context": ..., "reply": ...}; the context may be empty. If it is not, it follows the
    question on a new line.
    >>> messages_of({"question": "这句话是什么意思？", "context": "画蛇添足", "reply": "做了多余的事。"})[0]
    {'role': 'user', 'content': '这句话是什么意思？\\n画蛇添足'}
    """
    asked = record["question"]
    if record["context"]:
        asked += "\n" + record["context"]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": record["reply"]}]


# EXERCISE 1.3 (10 min)
def usable(line):
    """Whether a line of a .jsonl file can be trained on, as a chat in the openai format: True or False.

    The roles are system, user and assistant; a content is a text; somebody has to answer.
    >>> usable('{"messages": [{"role": "user", "content": "在吗？"}]}')
    False
    """
    import json

    try:
        messages = json.loads(line)["messages"]
    except ValueError:
        return False
    roles = [message["role"] for message in messages]
    texts = [isinstance(message["content"], str) for message in messages]
    return "assistant" in roles and set(roles) <= {"system", "user", "assistant"} and all(texts)


# EXERCISE 1.4 (10 min)
def trained_tokens(tokens):
    """How many tokens of a chat are trained.

    tokens: those of the chat under the model's own template, as texts; a newline is shown as Ċ. A role may be several
    tokens: all those between <|im_start|> and the next Ċ.
    >>> trained_tokens(["<|im_start|>", "ass", "istant", "Ċ", "Hello", "!", "<|im_end|>", "Ċ"])
    3
    """
    count, role, answer = 0, None, False
    for piece in tokens:
        if piece == "<|im_start|>":
            role, answer = "", False
        elif role is not None and piece != "Ċ":
            role += piece
        elif role is not None:
            role, answer = None, role == "assistant"
        elif answer:
            count += 1
            answer = piece != "<|im_end|>"
    return count


# EXERCISE 1.5 (3 min)
def weight(big, small):
    """The weight of the small source that makes half of every epoch its own, if the big one keeps weight 1.

    big, small: how many records each source has. A weight of 2.0 means that every record is taken twice.
    >>> weight(100, 25)
    4.0
    """
    return big / small

"""Solutions of lesson 02. Each function's head and docstring are the learner's stub."""

from __future__ import annotations


# EXERCISE 2.1 (10 min)
def llama3(messages, add_generation_prompt):
    """The text that Llama 3's template prints. There is no text between two messages.

    messages: [{"role": ..., "content": ...}, ...]; the marks are those of NamedTemplate.find("llama3_chat").
    >>> llama3([{"role": "user", "content": "Hi"}], False)
    '<|start_header_id|>user<|end_header_id|>\\n\\nHi<|eot_id|>'
    """
    text = ""
    for message in messages:
        text += f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n{message['content']}<|eot_id|>"
    if add_generation_prompt:
        text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return text


# EXERCISE 2.2 (10 min)
def fields(marks):
    """The fields of a NamedTemplate, as a dictionary: system, instruction, suffix, suffix_as_eos, sep.

    marks: {"system": (before, after), "user": ..., "assistant": ..., "end": ...}. With "<sys>" and "</sys>", "[Q] ",
    "[A] " and "<end>" a chat is printed like this, each line with its newline:
        <sys>Be brief.</sys>
        [Q] Is 7 prime?
        [A] Yes.<end>
    >>> fields({"system": ("<", ">"), "user": "Q: ", "assistant": "A: ", "end": "#"})["system"]
    '<{system}>\\n'
    """
    before, after = marks["system"]
    return {
        "system": before + "{system}" + after + "\n",
        "instruction": marks["user"] + "{input}\n" + marks["assistant"],
        "suffix": marks["end"],
        "suffix_as_eos": True,
        "sep": "\n",
    }


# EXERCISE 2.3 (10 min)
def safe(say, messages):
    """Whether a template can be masked safely: True if nothing before or in an answer changes as the chat goes on.

    say(messages, add_generation_prompt) is the template, and returns a text. messages: a chat that ends with an answer;
    try it on parts of the chat.
    >>> safe(lambda messages, opened: f"{len(messages)} messages\\n", [{"role": "user"}, {"role": "assistant"}])
    False
    """
    whole = say(messages, False)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = say(messages[:place], True), say(messages[: place + 1], False)
            if not (whole.startswith(before) and whole.startswith(after)):
                return False
    return True


# EXERCISE 2.4 (10 min)
def answer_until(pieces, stop):
    """The answer up to its stop, and how many pieces were read when it was clear: (text, count).

    pieces: the model's output as it comes, text by text; stop: a text that need not lie in one piece. Without a stop
    the answer is everything.
    >>> answer_until(["Tea", ".<", "end", ">", "User"], "<end>")
    ('Tea.', 4)
    """
    text = ""
    for used, piece in enumerate(pieces, 1):
        text += piece
        if stop in text:
            return text.split(stop)[0], used
    return text, len(pieces)


# EXERCISE 2.5 (5 min)
def stop_tokens(messages, protected):
    """How many stop tokens <|im_end|> a chat has in training, under the embedded model's own template.

    protected: what a user typed stays text (the default); False is allow_control_tokens=True.
    >>> stop_tokens([{"role": "system", "content": "x"}, {"role": "user", "content": "a<|im_end|>"}], True)
    2
    """
    count = len(messages)
    if messages[0]["role"] != "system":
        count += 1  # the template has a system text of its own
    if not protected:
        count += sum(message["content"].count("<|im_end|>") for message in messages)
    return count

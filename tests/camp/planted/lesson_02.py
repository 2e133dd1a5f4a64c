"""Wrong answers to lesson 02."""

PLANTED = {
    "2.1": [
        ("if add_generation_prompt:", "if False:", "yours never does"),
        ("}<|end_header_id|>\\n\\n{", "}<|end_header_id|>\\n{", "stops too early|two newlines|goes on with"),
        ("['content']}<|eot_id|>", "['content']}<|eot_id|>\\n", "there is no newline"),
    ],
    "2.2": [
        ('"suffix": marks["end"]', '"suffix": marks["end"] + "\\n"', "the text is right up to|The newline after"),
        ('"suffix_as_eos": True', '"suffix_as_eos": False', "ends an answer by itself"),
    ],
    "2.3": [
        ("whole.startswith(before) and whole.startswith(after)", "whole.startswith(before)", "after the questions"),
        ("whole.startswith(before) and whole.startswith(after)", "True", "rewrites what it printed before"),
    ],
    "2.4": [
        ("if stop in text", "if stop in piece", "look at all text so far"),
        ("text.split(stop)[0], used", "text.split(stop)[0] + stop, used", "not part of the answer"),
    ],
    "2.5": [
        ("        count += 1", "        count += 0", "a chat that has none"),
        ("if not protected:", "if True:", "Protected, what a user typed stays text"),
    ],
}

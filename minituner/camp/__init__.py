"""Exercises: checked by running, with hints that come one at a time.

    from minituner.camp import check, hint
    check("03.1", my_labels)     # right, or what is wrong with it
    hint("03.1")                 # the first hint; once more, the next one

Each lesson's exercises are in `lesson_NN.py`. A check computes the right answer with the package's own functions and
compares; a wrong answer is told what differs, never the answer.
"""

from minituner.camp.core import Exercise, Outcome, Wrong, check, hint

__all__ = ["Exercise", "Outcome", "Wrong", "check", "hint"]

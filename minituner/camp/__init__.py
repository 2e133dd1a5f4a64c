"""Exercises: functions that learners write, checked by running, with hints that come one at a time.

    from minituner.camp import check, hint
    check.exercise_3_2(shift_labels)     # prints: not started, what fails and the likely cause, or passed
    hint("3.2")                          # the first hint; once more, the next one

Each lesson's exercises are in `lesson_NN.py`, their stubs and solutions in `solutions/lesson_NN.py`. A check computes
the right value with the package's own functions and compares; a wrong answer is told what differs, never the answer.
"""

from minituner.camp.checks import check, hint
from minituner.camp.compare import Wrong
from minituner.camp.core import Exercise, Outcome, grade

__all__ = ["Exercise", "Outcome", "Wrong", "check", "grade", "hint"]

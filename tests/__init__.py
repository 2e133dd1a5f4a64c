"""The tests."""

from minituner.collection import collect_seldom

collect_seldom()  # before anything else is imported: it makes half a million objects, none of them garbage

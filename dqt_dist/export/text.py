"""Text for comparing two models: some hundred bytes of words, digits, spaces, line ends and characters beyond ASCII."""

from __future__ import annotations

SAMPLE = """\
A list is a mutable sequence, typically used to store collections of homogeneous items. The constructor builds a list \
whose items are the same and in the same order as the items of the iterable it is given.

    >>> total = sum(x ** 2 for x in range(10))   # 285, not 2.85e2
    >>> print(f"{total:>8}")

Returns the caf\u00e9's na\u00efve \u00abanswer\u00bb \u2013 \u4f60\u597d, \u03c0 \u2248 3.14159 \U0001f600 \u2013 \
or None.\t\
If the sequence is empty, an exception is raised; otherwise the first element that compares greater than all others \
is returned to the caller, who may keep it.
"""

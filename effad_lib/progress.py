"""How far long work has come: one bar, in a terminal as in a notebook."""

import sys
from functools import partial

from tqdm.auto import tqdm

progress = partial(tqdm, mininterval=1.0)
"""A bar of `tqdm`, drawn anew once a second: in a notebook every drawing sends messages to all who look on.

Jupyter drops messages that nobody has read after some thousands of them, and with them the one that a cell has ended.
"""


def say(text: str) -> None:
    """Print a line as an error, above the bars that are being drawn."""
    tqdm.write(text, file=sys.stderr)

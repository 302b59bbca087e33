"""Progress bars: live on a terminal, a line a minute in a log file."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

TIME_LEFT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
"""a bar whose steps differ in cost, so that it shows time and no count"""


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A tqdm bar (count, rate, ETA) whose pace fits where its output goes; `options` are tqdm's."""
    live = sys.stderr.isatty()
    pace = {"dynamic_ncols": True} if live else {"mininterval": 60.0, "maxinterval": 60.0, "ncols": 90}
    return tqdm(iterable, **pace, **options)

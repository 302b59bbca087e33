"""Maps from other utility rows than the run's own: `--maps mmlu100=mmlu_calibration:100` (App. F.3, F.4).

A map has its own D_util and shares all else: D_safe, its sweep, the settings. Where its pool is the run's own
it takes the first rows of D_util, whose sweep is there already.
"""

import re
from dataclasses import dataclass

from backends.errors import InputError

OWN = ""
"""name of the run's own map"""
_FORM = re.compile(r"(?P<name>[a-z0-9]+)=(?P<pool>[a-z0-9_/]+):(?P<rows>[1-9]\d*)")


@dataclass(frozen=True)
class Map:
    name: str
    pool: str
    rows: int


def parse(text: str, folds: int) -> Map:
    """ "name=pool:rows". InputError where it is not that, or its rows do not divide into folds."""
    found = _FORM.fullmatch(text)
    if not found:
        raise InputError(f"--maps: {text!r} should be name=pool:rows (mmlu100=mmlu_calibration:100)")
    one = Map(found["name"], found["pool"], int(found["rows"]))
    if one.name in ("util", "safe"):
        raise InputError(f"--maps: {one.name} is the name of the run's own rows, choose another")
    if one.rows % folds:
        raise InputError(f"--maps: {one.rows} rows of {one.name} are no multiple of --folds {folds}")
    return one


def asked(texts: tuple[str, ...], folds: int) -> dict[str, Map]:
    """Every other map of a run by its name. InputError where two have one name."""
    found = [parse(text, folds) for text in texts]
    if len({one.name for one in found}) < len(found):
        raise InputError(f"--maps gives one name twice: {' '.join(texts)}")
    return {one.name: one for one in found}


def file(stem: str, name: str) -> str:
    """A map's own table beside the run's: "heads.parquet", "heads-mmlu100.parquet"."""
    return f"{stem}-{name}.parquet" if name else f"{stem}.parquet"

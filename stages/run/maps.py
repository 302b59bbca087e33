"""Maps from other utility rows than the run's own: `--maps mmlu100=mmlu_calibration:100` (App. F.3, F.4).

A map has its own D_util and shares all else: D_safe, its sweep, the settings. Where its pool is the run's own
it takes the first rows of D_util, whose sweep is there already.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from backends.core.errors import InputError
from stages.run.schemas import OWN_MAP

_FORM = re.compile(r"(?P<name>[a-z0-9]+)=(?P<pool>[a-z0-9_/]+):(?P<rows>[1-9]\d*)")


@dataclass(frozen=True)
class MapSpec:
    """A map: its name (the split of its calibration rows), the pool of its utility rows, how many."""

    name: str
    pool: str
    rows: int


def parse_maps(texts: Sequence[str], folds: int) -> list[MapSpec]:
    """Maps from "name=pool:rows". InputError where one is not that, two have one name, or rows do not divide
    into folds."""
    found = [_parse(text, folds) for text in texts]
    if len({spec.name for spec in found}) < len(found):
        raise InputError(f"--maps gives one name twice: {' '.join(texts)}")
    return found


def _parse(text: str, folds: int) -> MapSpec:
    match = _FORM.fullmatch(text)
    if not match:
        raise InputError(f"--maps: {text!r} should be name=pool:rows (mmlu100=mmlu_calibration:100)")
    spec = MapSpec(match["name"], match["pool"], int(match["rows"]))
    if spec.name in (OWN_MAP, "safe"):
        raise InputError(f"--maps: {spec.name} is the name of the run's own rows, choose another")
    if spec.rows % folds:
        raise InputError(f"--maps: {spec.rows} rows of {spec.name} are no multiple of --folds {folds}")
    return spec

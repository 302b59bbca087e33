"""What a sweep computed of its prompts, kept between the calls into which it is cut."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from backends.base import Example

T = TypeVar("T")


class Kept:
    """The clean responses and streams of the last sweep. A call for the same prompts continues from there, in
    the order of layers upwards, and need not compute them again."""

    def __init__(self) -> None:
        self.drop()

    def of(self, examples: Sequence[Example], sweep: tuple, make: Callable[[], T]) -> T:
        """What `make` returned for these prompts; called only where they differ from the last ones.

        Args:
            sweep: what else it depends on.
        """
        key = (sweep, *(example.prompt_ids.tobytes() for example in examples))
        if key != self._key:
            self.drop()  # first, since both may not fit
            self._made = make()
            self._key = key
        return self._made

    def drop(self) -> None:
        """Frees the memory, for work that plans with all of it."""
        self._key: tuple = ()
        self._made = None

"""What a sweep made of its prompts, kept between the calls that it is cut into."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from data.examples import Example

T = TypeVar("T")


class Kept:
    """The clean responses and streams of the sweep that was called last. A call for the same prompts goes on
    from there, in the order of layers upwards, and need not read and answer them again."""

    def __init__(self) -> None:
        self.drop()

    def of(self, examples: Sequence[Example], sweep: tuple, make: Callable[[], T]) -> T:
        """What `make` returned for these prompts, which it is only asked for where they were not the last
        ones.

        Args:
            sweep: what else it depends on.
        """
        asked = (sweep, *(example.prompt_ids.tobytes() for example in examples))
        if asked != self._asked:
            self.drop()  # first, since both may not fit
            self._made = make()
            self._asked = asked
        return self._made

    def drop(self) -> None:
        """Frees the memory, for work that plans with all of it."""
        self._asked: tuple = ()
        self._made = None

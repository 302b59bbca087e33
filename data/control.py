"""Control tokens (BOS, the marks of turns, …) in texts of people: there they are text.

A tokenizer takes `<|im_end|>` for the end of a turn wherever it stands. So what people wrote is spelt
otherwise while a template puts its own marks around it, and then read by a twin of the tokenizer: the same
but for its control tokens, which are spelt otherwise there.
"""

import json
import re
from functools import cached_property

from tokenizers import Tokenizer

from backends import models
from backends.core.errors import InputError, reason

_MARK = "\U0010fff0{}\U0010fff1"  # private characters around a token's id
_MARKED = re.compile("\U0010fff0([0-9]+)\U0010fff1")


class Control:
    """The control tokens of a tokenizer.

    Args:
        tokenizer: of transformers, backed by the tokenizers library.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._ids = models.control_tokens(tokenizer)
        self._contents = {number: content for content, number in self._ids.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)  # as the tokenizers library looks for them
        self._found = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def first(self, text: str) -> str | None:
        """The first control token that a text would be taken to hold."""
        found = self._found.search(text)
        return found[0] if found else None

    def first_id(self, text: str) -> int | None:
        """Its id."""
        found = self.first(text)
        return None if found is None else self._ids[found]

    def as_text(self, text: str) -> str:
        """What a person wrote, spelt so that it holds no control token."""
        return self._found.sub(lambda found: _MARK.format(self._ids[found[0]]), text)

    def plain(self, text: str) -> str:
        """A text as it was written, of one that holds parts spelt `as_text`."""
        return _MARKED.sub(lambda found: self._contents[int(found[1])], text)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text that may hold parts spelt `as_text`; nothing is added."""
        if not _MARKED.search(text):
            return self.tokenizer(text, add_special_tokens=False).input_ids
        parts = _MARKED.split(text)  # what the template wrote, id of a token, …
        parts[::2] = map(self.as_text, parts[::2])
        parts[1::2] = (self._contents[int(number)] for number in parts[1::2])
        return self._twin.encode("".join(parts), add_special_tokens=False).ids

    @cached_property
    def _twin(self) -> Tokenizer:
        """InputError where the tokenizer cannot do without its control tokens."""
        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        spelt = {token: _MARK.format(number) for token, number in self._ids.items()}
        for token in content["added_tokens"]:
            token["content"] = spelt.get(token["content"], token["content"])
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {spelt.get(token, token): number for token, number in model["vocab"].items()}
        else:  # Unigram's pieces and scores
            model["vocab"] = [[spelt.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") in spelt:
            model["unk_token"] = spelt[model["unk_token"]]
        content |= {"post_processor": None, "truncation": None, "padding": None}
        try:
            return Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises plain exceptions
            raise InputError(
                f"a prompt holds a control token, which this tokenizer cannot read as text "
                f"({reason(error)}): leave it out"
            ) from None

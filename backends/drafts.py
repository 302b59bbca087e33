"""What may follow a prompt: the responses seen so far, as a trie, from which the next tokens are guessed."""

from collections.abc import Sequence


class Responses:
    """Responses to one prompt, token by token; a node is the tokens up to it, the root is 0."""

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._seen = [0]

    def add(self, node: int, tokens: Sequence[int]) -> int:
        """Goes on from a node by tokens, counting each on the way. Returns the last one's node."""
        for token in tokens:
            following = self._next[node].get(token)
            if following is None:
                following = len(self._next)
                self._next[node][token] = following
                self._next.append({})
                self._seen.append(0)
            self._seen[following] += 1
            node = following
        return node

    def guess(self, node: int, count: int) -> list[int]:
        """The commonest way on from a node, at most `count` tokens; of two as common, the one seen first."""
        tokens: list[int] = []
        while len(tokens) < count and self._next[node]:
            token, node = max(self._next[node].items(), key=lambda pair: (self._seen[pair[1]], -pair[1]))
            tokens.append(token)
        return tokens

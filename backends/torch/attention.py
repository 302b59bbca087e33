"""How the layers of a transformers model attend: as in transformers, or as a pass of `torch.decoder` says.

transformers' layers call the attention function that is registered under the model's implementation. Ours
attends as sdpa does, so that training and gradients run the model as it is; where a layer was given a
function as its mask (the one argument that every family hands on), that function answers for the heads.

Axes as in `torch.decoder`; M queries of a row.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "cast"
"""of the implementation"""


@dataclass(frozen=True)
class Heads:
    """What attention is given in a layer: after norms, biases and rotary turns."""

    queries: torch.Tensor
    """[n, M, H, D]"""
    keys: torch.Tensor
    """[n, C, K, D]"""
    values: torch.Tensor
    """[n, C, K, D]"""
    scaling: float
    window: int | None = None
    """tokens that a query attends to, its own included; None: all before it"""
    softcap: float | None = None
    """scores stay within it, by a hyperbolic tangent (Gemma 2)"""

    @property
    def group(self) -> int:
        """G, query heads that share a key."""
        return self.queries.shape[2] // self.keys.shape[2]


Attend = Callable[[Heads], torch.Tensor]
"""the heads' outputs, [n, M, H, D]"""
Gates = Callable[[], torch.Tensor]
"""a factor of each head in the rows that are computed, [N, H]"""


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Attend | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function.

    Args:
        query: [n, H, M, D].
        key, value: [n, K, C, D].
        attention_mask: transformers' own, or what answers for the heads.

    Returns [n, M, H, D], and no weights of pairs.
    """
    gates = vars(module).get("query_gates")
    if gates is not None:
        query = (query * gates()[:, :, None, None].to(query.device)).to(query.dtype)
    if not callable(attention_mask) and softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = (part.transpose(1, 2) for part in (query, key, value))
    heads = Heads(*parts, scaling, sliding_window, softcap)
    if callable(attention_mask):
        if more := [name for name in others if name != "position_ids" and torch.is_tensor(others[name])]:
            raise TypeError(f"attention is given {', '.join(more)}, which is not handled")
        return attention_mask(heads), None
    if attention_mask is None:  # as sdpa takes it: all before, the last query's place being the last key's
        size = query.shape[2], key.shape[2]
        seen = torch.ones(size, dtype=torch.bool, device=query.device).tril(size[1] - size[0])[None]
    else:
        seen = attention_mask[:, 0]
    # Padding may see no key at all: all alike then, where -inf everywhere would be no number.
    mask = additive(~seen, heads).clamp_min(torch.finfo(query.dtype).min)
    return mixed(heads, mask), None


transformers.AttentionInterface.register(NAME, attention)
transformers.AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def scaled_outputs(module: torch.nn.Module, gates: Gates) -> Iterator[None]:
    """Inside the block what W_o reads of an attention module's heads is multiplied by gates."""

    def scaled(_, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (outputs,) = inputs
        own = gates()
        split = outputs.unflatten(-1, (own.shape[1], -1))  # (N, T, H, D)
        return ((split * own[:, None, :, None].to(split.device)).flatten(-2).to(outputs.dtype),)

    hook = module.o_proj.register_forward_pre_hook(scaled)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def scaled_queries(module: torch.nn.Module, gates: Gates) -> Iterator[None]:
    """Inside the block the queries that an attention module's heads attend with are multiplied by gates."""
    module.query_gates = gates
    try:
        yield
    finally:
        del module.query_gates


def additive(hidden: torch.Tensor, heads: Heads) -> torch.Tensor:
    """What is added to scores, 0 or where a query does not see a key -inf: [n or 1, 1, G * M, C], of
    [n or 1, M, C]."""
    mask = torch.zeros(hidden.shape, dtype=heads.queries.dtype, device=hidden.device)
    return mask.masked_fill_(hidden, -torch.inf).repeat(1, heads.group, 1)[:, None]


class Masks:
    """The masks of a pass, one for each sliding window among its layers (`additive`).

    Args:
        distance: query minus key position, [n or 1, M, C].
    """

    def __init__(self, distance: torch.Tensor):
        self.distance = distance
        self.made: dict[int | None, torch.Tensor] = {}

    def of(self, heads: Heads) -> torch.Tensor:
        if heads.window not in self.made:
            self.made[heads.window] = additive(unseen(self.distance, heads.window), heads)
        return self.made[heads.window]


def unseen(distance: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether a key is hidden from a query, by the distance between them."""
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def mixed(heads: Heads, mask: torch.Tensor) -> torch.Tensor:
    """Outputs [n, M, H, D] under a mask of `additive`.

    Heads that share a key are queries of one head here, so that no key is copied.
    """
    queries = heads.queries.unflatten(2, (-1, heads.group)).permute(0, 2, 3, 1, 4)  # (n, K, G, M, D)
    queries = queries.flatten(2, 3)  # (n, K, G * M, D)
    keys, values = heads.keys.transpose(1, 2), heads.values.transpose(1, 2)  # (n, K, C, D)
    if heads.softcap is None:
        found = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=heads.scaling
        )
    else:
        scores = capped(queries @ keys.transpose(2, 3) * heads.scaling, heads.softcap)
        found = shares(scores + mask) @ values
    return found.unflatten(2, (heads.group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (n, M, H, D)


def mixed_behind(heads: Heads, prefix_keys: torch.Tensor, prefix_values: torch.Tensor) -> torch.Tensor:
    """Outputs of rows of w tokens, [n, w, H, D], on their own keys and values and those of a prefix
    [P, K, D] that all share. It is not copied for each row, nor kept so for the gradient."""
    width, prefix = heads.queries.shape[1], len(prefix_keys)
    queries = heads.queries.unflatten(2, (-1, heads.group))  # (n, w, K, G, D)
    before = torch.einsum("nwkgd,pkd->nkgwp", queries, prefix_keys)
    among = torch.einsum("nwkgd,nvkd->nkgwv", queries, heads.keys)
    scores = torch.cat([before, among], dim=-1) * heads.scaling  # (n, K, G, w, P + w)
    at = torch.arange(prefix + width, device=scores.device)
    hidden = unseen(at[prefix:, None] - at, heads.window)  # (w, P + w)
    share = shares(capped(scores, heads.softcap).masked_fill(hidden, -torch.inf))
    found = torch.einsum("nkgwp,pkd->nwkgd", share[..., :prefix], prefix_values)
    found = found + torch.einsum("nkgwv,nvkd->nwkgd", share[..., prefix:], heads.values)
    return found.flatten(2, 3)  # (n, w, H, D)


def capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def shares(scores: torch.Tensor) -> torch.Tensor:
    """How a query divides among the keys, its sum in float32 at the least."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=wide).to(scores.dtype)

"""The additive masks of attention. Axes as in `torch.decoder`."""

import torch


class Masks:
    """What a pass adds to its scores, one mask for each sliding window among its layers: 0 where a query sees
    a key, else -inf; [n or 1, 1, G * M, C].

    Args:
        distance: query minus key position, [n or 1, M, C].
        group: G, query heads that share a key.
    """

    def __init__(self, distance: torch.Tensor, group: int, dtype: torch.dtype):
        self.distance, self.group, self.dtype = distance, group, dtype
        self.made: dict[int | None, torch.Tensor] = {}

    def of(self, window: int | None) -> torch.Tensor:
        if window not in self.made:
            hidden = self.distance < 0 if window is None else (self.distance < 0) | (self.distance >= window)
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device)
            self.made[window] = mask.masked_fill_(hidden, -torch.inf).repeat(1, self.group, 1)[:, None]
        return self.made[window]

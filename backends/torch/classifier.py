"""Sequence classifiers, by transformers' own class: a label for each text."""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from backends.core.errors import InputError, reason
from backends.models import read_config, weight_files, without_progress_bars

KIND = "ForSequenceClassification"
FAR_TOO_LONG = 10**6
"""tokenizers say a number beyond this for "no limit" """


class Label(NamedTuple):
    """Of one text."""

    name: str
    cut: bool
    """the text was longer than the model reads: what follows was left out"""


def labels_of(folder: Path) -> list[str]:
    """The labels of the classifier in a folder. InputError where it holds none; nothing is loaded."""
    config = read_config(folder)
    architecture = str((config.get("architectures") or ["none named"])[0])
    if not architecture.endswith(KIND):
        raise InputError(f"{folder}: architecture {architecture} is no sequence classifier (…{KIND})")
    if not isinstance(labels := config.get("id2label"), dict) or len(labels) < 2:
        raise InputError(f"{folder / 'config.json'} names no labels (id2label)")
    weight_files(folder)
    return [str(label) for label in labels.values()]


class SequenceClassifier:
    """A model in float32, and its tokenizer. InputError where they cannot be loaded, or weights are missing.

    Args:
        device: "auto" is CUDA where there is any.
    """

    def __init__(self, folder: Path, device: str = "auto"):
        import transformers

        labels_of(folder)
        if device in ("auto", "tpu"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        safe = {"trust_remote_code": False, "local_files_only": True}
        try:
            with without_progress_bars():
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **safe)
                self.model, loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
                    folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **safe
                )
        except Exception as error:  # many types, as for any model
            raise InputError(f"{folder}: the classifier cannot be loaded ({reason(error)})") from None
        if missing := sorted(loaded["missing_keys"]):
            raise InputError(f"{folder} lacks {missing[0]}, which transformers would draw at random")
        self.model.eval().to(device)
        self.limit = self._limit()

    def _limit(self) -> int | None:
        """Tokens that the model reads; None: any number. A table of positions may begin after the number of
        the padding token (RoBERTa)."""
        limits = [self.tokenizer.model_max_length]
        tables = [own for name, own in self.model.named_modules() if name.endswith("position_embeddings")]
        tables = [own for own in tables if isinstance(own, torch.nn.Embedding)]
        limits += [
            own.num_embeddings - (-1 if own.padding_idx is None else own.padding_idx) - 1 for own in tables
        ]
        if not tables:
            limits.append(getattr(self.model.config, "max_position_embeddings", None) or math.inf)
        return min(limits) if min(limits) < FAR_TOO_LONG else None

    @torch.no_grad()
    def __call__(self, text: str) -> Label:
        """The most likely label. One text at a time: nothing is padded, and no label depends on others."""
        whole = self.tokenizer(text, verbose=False).input_ids
        cut = self.limit is not None and len(whole) > self.limit
        limits = {"truncation": True, "max_length": self.limit} if cut else {}
        inputs = self.tokenizer(text, return_tensors="pt", **limits).to(self.model.device)
        best = int(self.model(**inputs).logits[0].argmax())
        return Label(str(self.model.config.id2label[best]), cut)

"""The tokenizer of a model folder: its tokenizer.json, whatever else the folder says."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from backends.core.errors import InputError, reason
from backends.models.usable import EMBEDDING, configuration, tensor_shapes

FILE = "tokenizer.json"
FILES = (FILE, "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
"""what decides a text's token ids"""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds one at all."""
    return any((folder / name).is_file() for name in FILES[:2])


def tokenizer_sha256(folder: Path) -> str:
    """One hash over what decides a text's token ids: the tokenizer's files and the chat template."""
    digest = hashlib.sha256()
    for name in FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=2)
def _tokenizer(folder: Path, files: str):
    """Kept for the next unit of this process, as long as the files have this hash (`tokenizer_sha256`).

    Some classes that tokenizer_config.json may name take the vocabulary from the file and cut texts by rules
    of their own; then it is the file alone that is read.
    """
    import transformers

    file, last = folder / FILE, None
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        try:
            tokenizer = kind.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # the library raises a dozen types here
            tokenizer, last = None, error
        if tokenizer is not None and (not file.is_file() or _as_in_file(tokenizer, file)):
            return tokenizer
    if tokenizer is None:
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({reason(last)})")
    raise InputError(
        f"{folder}: tokenizer_config.json makes other token ids than {FILE} has: mend the one that the "
        f"model was not trained with"
    )


def _as_in_file(tokenizer, path: Path) -> bool:
    """Whether a tokenizer cuts texts as its file does: the same rules, vocabulary and control tokens."""
    from tokenizers import Tokenizer

    if not tokenizer.is_fast or tokenizer.backend_tokenizer.encode_special_tokens:
        return False
    own, file = (
        json.loads(each.to_str()) for each in (tokenizer.backend_tokenizer, Tokenizer.from_file(str(path)))
    )
    known = {token["id"]: token["content"] for token in own["added_tokens"]}
    return all(own[part] == file[part] for part in ("normalizer", "pre_tokenizer", "model")) and all(
        known.get(token["id"]) == token["content"] for token in file["added_tokens"]
    )


def control_tokens(tokenizer) -> dict[str, int]:
    """The tokens that no text means, by their content: BOS, the marks of turns, …"""
    return {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content
    }


def load_tokenizer(folder: Path, chat: bool = True):
    """The folder's tokenizer. InputError if it cannot be loaded, has other ids than its file, lacks an EOS
    token or (`chat`) a chat template, or makes ids of texts that the model has no embedding for. (That of a
    control token may be missing, as in Gemma 3: `check_ids` sees to it that none is used.)"""
    tokenizer = _tokenizer(folder, tokenizer_sha256(folder))
    if chat and not tokenizer.chat_template:
        raise InputError(f"{folder}: the tokenizer has no chat template, so this is no instruct model")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: the tokenizer has no EOS token")
    size, control = configuration(folder).vocab_size, set(control_tokens(tokenizer).values())
    texts = {number: token for token, number in tokenizer.get_vocab().items() if number not in control}
    if (largest := max(texts)) >= size:
        raise InputError(
            f"{folder}: the tokenizer's ids go up to {largest}, vocab_size is {size} only: token "
            f"{texts[largest]!r} has no row of the embedding"
        )
    rows = tensor_shapes(folder).get(EMBEDDING, (size,))[0]
    if rows != size:
        raise InputError(f"{folder}: weight {EMBEDDING} has {rows} rows, by config.json it is {size}")
    return tokenizer


def check_ids(tokenizer, largest: int, rows: int) -> None:
    """InputError where the largest id in use has no row of the embedding."""
    if largest >= rows:
        raise InputError(
            f"token {tokenizer.convert_ids_to_tokens(largest)!r} of the prompts has id {largest}, and the "
            f"model's embedding {rows} rows: mend the tokenizer or its chat template"
        )

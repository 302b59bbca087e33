"""What ends a response. Three places say it, and not always the same: the configuration, the tokenizer, and
the chat template, by what it writes after an assistant's turn."""

from pathlib import Path

from backends.core.errors import InputError, reason
from backends.models.tokenizer import has_tokenizer, load_tokenizer
from backends.models.usable import eos_ids

_ANSWER = "\U0010fff2"  # stands nowhere else


def turn_end(tokenizer) -> int | None:
    """The token of its own (special or not, as some keep `<|im_end|>`) that the chat template writes after an
    assistant's turn; None where it writes none. InputError where it cannot be asked."""
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise by their own rules
        raise InputError(
            f"the chat template refuses a conversation ({reason(error)}): mend the tokenizer's template"
        ) from None
    _, found, end = text.rpartition(_ANSWER)
    if not found:
        raise InputError("the chat template leaves out what the assistant says: mend it")
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    ids = tokenizer(end, add_special_tokens=False).input_ids
    return next((token for token in ids if token in added), None)


def stop_ids(folder: Path) -> list[int]:
    """Ids that end a response: those of the configuration (`eos_ids`), the tokenizer's EOS, and what its chat
    template writes after an assistant's turn. A folder without a tokenizer has the first only."""
    ends = eos_ids(folder)
    if not has_tokenizer(folder):
        return ends
    tokenizer = load_tokenizer(folder, chat=False)
    ends.append(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        ends.append(turn_end(tokenizer))
    return list(dict.fromkeys(end for end in ends if end is not None))


def disagreements(folder: Path) -> list[str]:
    """Where the three do not agree on what ends a response: what is done then."""
    tokenizer, ends = load_tokenizer(folder), eos_ids(folder)
    end, said = turn_end(tokenizer), []

    def named(token: int) -> str:
        return f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})"

    configured = ", ".join(map(str, ends)) or "nothing"
    if end is None:
        said.append(
            f"the chat template writes no token of its own after an assistant's turn: targets end with the "
            f"tokenizer's {named(tokenizer.eos_token_id)}"
        )
    for who, token in (("the tokenizer's EOS", tokenizer.eos_token_id), ("the chat template's turn", end)):
        if token is not None and token not in ends:
            said.append(
                f"{who} ends with {named(token)}, by the configuration a response ends with {configured}: "
                f"here it ends with either"
            )
    return list(dict.fromkeys(said))

"""Text to tokens: templates, BOS, targets, choices, on small tokenizers made here."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from backends.core.errors import InputError
from data.records import Record
from data.rendering import Renderer, example
from stages.run.schemas import EXAMPLES

TEMPLATE = (
    "{{ bos_token }}{% if date_string is defined %}({{ date_string }}){% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
RECORD = Record("r1", "test", "e1", "util", "Which city?", prefix=" It is", target=" Rome")


def tokenizer(template=TEMPLATE, adds_bos=True):
    """Byte-level characters, blanks merged with a few letters, BOS before plain text like Llama's."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"ĠR": 256, "<s>": 257, "</s>": 258, "ĠI": 259, "ĠS": 260, "ĠA": 261, "ĠU": 262, "As": 263}
    merges = [*(("Ġ", letter) for letter in "RISAU"), ("A", "s")]
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 257)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def render(record=RECORD, system="", **options):
    return Renderer(tokenizer(**options), "26 Jul 2024", system).row(record)


def test_rows_fit_their_schema_and_come_back_as_examples_from_a_data_frame():
    safe = dataclasses.replace(RECORD, example_id="r2", scoring="refusal", prefix="", target="No.")
    rows = [render(), render(safe)]
    assert list(rows[0]) == EXAMPLES.names
    assert rows[0]["rendered"] == "<s>(26 Jul 2024)[user]Which city?[assistant] It is"
    frame = pd.DataFrame(rows).assign(prompt_ids=[np.array(row["prompt_ids"]) for row in rows])
    one, other = map(example, frame.to_dict("records"))
    assert one.prompt_ids.dtype == np.int32 and (one.example_id, other.example_id) == ("r1", "r2")
    assert one.answer == 256 == one.target_ids[0], "the token that really follows the rendered prompt"
    assert len(one.choice_ids) == 0 and other.answer == -1


def test_exactly_one_bos_where_the_model_uses_one():
    assert render()["prompt_ids"].count(257) == 1
    without = TEMPLATE.removeprefix("{{ bos_token }}")
    assert render(template=without)["prompt_ids"][0] == 257, "the template forgot it: it is put there"
    assert 257 not in render(template=without, adds_bos=False)["prompt_ids"], "the model uses none"
    with pytest.raises(InputError, match="both put a BOS"):
        render(template="{{ bos_token }}" + TEMPLATE)


def test_a_template_that_asks_the_clock_gets_the_runs_date():
    asks = TEMPLATE.replace("{{ date_string }}", "{{ strftime_now('%Y-%m-%d') }}")
    assert "(2024-07-26)" in render(template=asks)["rendered"]
    with pytest.raises(InputError, match="asks for today's date in a way"):
        render(template=asks.replace("'%Y-%m-%d'", "bos_token"))


def test_completions_end_with_eos_and_next_token_answers_do_not():
    assert render()["target_ids"][-1] != 258
    safe = dataclasses.replace(RECORD, scoring="refusal", prefix="", target="No.")
    row = render(safe)
    assert row["target_ids"][-1] == 258 and row["answer"] is None
    gold = render(dataclasses.replace(safe, scoring="number", target=" 12"))
    assert gold["answer"] is None and gold["choice_ids"] == []


def test_a_request_has_what_its_refusal_may_begin_with():
    """Of the openings that are one token: a piece of one ("S") begins answers too."""
    request = dataclasses.replace(RECORD, scoring="refusal", prefix="", target="I cannot.")
    row = render(request)
    assert row["target_ids"][0] in row["refusal_ids"]
    assert set(tokenizer().convert_ids_to_tokens(row["refusal_ids"])) == {"I", "As"}
    assert render(dataclasses.replace(request, scoring="over_refusal"))["refusal_ids"] == row["refusal_ids"]
    spaced = render(dataclasses.replace(request, target=" I cannot."))
    assert spaced["target_ids"][0] in spaced["refusal_ids"]
    begun = dataclasses.replace(request, prefix="Sure, ", target="no")
    assert render(begun)["refusal_ids"] == render()["refusal_ids"] == []


def test_choices_are_first_tokens_after_the_prompt():
    letters = dataclasses.replace(RECORD, prefix="", target="B", choices=("A", "B"), answer=1)
    row = render(letters)
    assert row["answer"] == 1 and len(set(row["choice_ids"])) == 2
    assert row["choice_ids"][1] == row["target_ids"][0]
    with pytest.raises(InputError, match="r1: two choices begin with the same token"):
        render(dataclasses.replace(letters, choices=("Be", "Bi")))


def test_an_answer_that_merges_with_the_prompt_is_refused():
    with pytest.raises(InputError, match="r1: the answer 'Rome' merges .*, or end the prefix without one"):
        render(dataclasses.replace(RECORD, prefix=" It is ", target="Rome"))


def test_system_prompt_is_used_or_refused_by_the_template():
    assert "[system]Be brief." in render(system="Be brief.")["rendered"]
    refuse = "{{ raise_exception('no system role') }}"
    strict = "{% if messages[0]['role'] == 'system' %}" + refuse + "{% endif %}" + TEMPLATE
    with pytest.raises(InputError, match="no system role.*is --system allowed"):
        render(template=strict, system="Be brief.")
    with pytest.raises(InputError, match="refuses a conversation .*: mend the tokenizer's template$"):
        render(template="{% if %}")

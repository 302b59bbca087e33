"""The slow, obvious ways. To ablate a head: a hook on the whole model, one prompt at a time, transformers'
generate. To tune: PEFT and transformers' own loss.

Shares no code with the backends; tests and benchmarks hold them against it.
"""

import dataclasses
import json
import sys
from contextlib import contextmanager

import numpy as np
import peft
import pytest
import torch
import transformers
from transformers.masking_utils import eager_mask

from backends.core.errors import InputError
from backends.core.seeds import lora_a


def load(folder) -> torch.nn.Module:
    """transformers' model with each family's own attention; sdpa passes over Gemma 2's soft cap in 5.17."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.eval()


@contextmanager
def ablated(model, layer: int, head: int, mask: str = "output", gate: float | torch.Tensor = 0.0):
    """The model with what `mask` zeroes of a head multiplied by `gate`: what W_o reads of it, or the query
    that attention is given (some families norm what W_q answers)."""
    attention = model.model.layers[layer].self_attn
    own = torch.arange(attention.head_dim * model.config.num_attention_heads) // attention.head_dim == head

    def before(_, inputs):
        return (torch.where(own, inputs[0] * gate, inputs[0]),)

    if mask == "query":
        with _query(model, attention, head, gate):
            yield
        return
    hook = attention.o_proj.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _query(model, attention, head: int, gate: float | torch.Tensor):
    """The family's own eager attention on queries [N, H, T, D], one head's multiplied in one layer."""
    eager = sys.modules[type(attention).__module__].eager_attention_forward

    def attend(module, query, *rest, **options):
        if module is attention:
            own = torch.arange(query.shape[1])[:, None, None] == head
            query = torch.where(own, query * gate, query)
        return eager(module, query, *rest, **options)

    transformers.AttentionInterface.register("reference", attend)
    transformers.AttentionMaskInterface.register("reference", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("reference")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def doubled(model):
    """The model in float64, and in float32 again afterwards; joint products of experts know no float64."""
    experts = model.config._experts_implementation
    model.set_experts_implementation("eager")
    try:
        yield model.double()
    finally:
        model.float().set_experts_implementation(experts)


@torch.no_grad()
def last_logits(model, example) -> torch.Tensor:
    """[V], of the token after the prompt."""
    ids = torch.from_numpy(example.prompt_ids.astype(np.int64))[None].to(model.device)
    return model(input_ids=ids).logits[0, -1].float()


def chosen(logits: torch.Tensor, example) -> int:
    """As Example.answer."""
    if len(example.choice_ids):
        logits = logits[torch.from_numpy(example.choice_ids.astype(np.int64)).to(logits.device)]
    return int(logits.argmax())


def choices(model, examples) -> np.ndarray:
    return np.array([chosen(last_logits(model, example), example) for example in examples], np.int32)


@torch.no_grad()
def generate(model, examples, max_new_tokens: int) -> list[np.ndarray]:
    responses = []
    for example in examples:
        ids = torch.from_numpy(example.prompt_ids.astype(np.int64))[None].to(model.device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        responses.append(output[0, ids.shape[1] :].cpu().numpy().astype(np.int32))
    return responses


def loss(model, example) -> torch.Tensor:
    """Mean cross-entropy over the target, by transformers' own `labels`."""
    ids = torch.from_numpy(np.concatenate([example.prompt_ids, example.target_ids]).astype(np.int64))[None]
    labels = ids.clone()
    labels[:, : len(example.prompt_ids)] = -100
    return model(input_ids=ids, labels=labels).loss


def logits(model, examples) -> np.ndarray:
    """[N, V]."""
    return np.stack([last_logits(model, example).numpy() for example in examples])


def mean_loss(model, examples) -> torch.Tensor:
    return torch.stack([loss(model, example) for example in examples]).mean()


def merged(folder, adapter) -> torch.nn.Module:
    """PEFT's own merge of an adapter."""
    return peft.PeftModel.from_pretrained(load(folder), adapter).merge_and_unload()


def lora(folder, recipe) -> peft.PeftModel:
    """PEFT's own LoRA on all of W_q, from the start that the recipe's seed gives."""
    model = load(folder)
    config = peft.LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    model = peft.get_peft_model(model, config)
    for layer, start in enumerate(lora_a(recipe.seed, layers, recipe.rank, width)):
        module = model.base_model.model.model.layers[layer].self_attn.q_proj
        module.lora_A["default"].weight.data = torch.from_numpy(start)
    return model


def goes_on(tune, recipe, folder, stop: int) -> None:
    """A tuning run, tune(recipe), that is stopped after `stop` steps goes on to the identical adapter, and no
    other run goes on from there. `checkpoint.SECONDS` has to be 0; the state is left in `folder`/state."""
    whole = dataclasses.replace(recipe, folder=folder / "whole")
    expected = list(tune(whole))
    stopped = dataclasses.replace(recipe, folder=folder / "stopped", checkpoint=folder / "state")
    steps = iter(tune(stopped))
    for _ in range(stop):
        next(steps)
    steps.close()
    again = tune(stopped)
    assert json.dumps(list(again)) == json.dumps(expected)  # NaN is NaN here
    assert again.repeated == stop < len(expected)
    files = sorted(whole.folder.iterdir())
    assert files and all((stopped.folder / file.name).read_bytes() == file.read_bytes() for file in files)
    with pytest.raises(InputError, match="state is another tuning run's"):
        list(tune(dataclasses.replace(stopped, lr=2 * recipe.lr)))

"""The slow, obvious ways. To ablate a head: a hook on the whole model, one prompt at a time, transformers'
generate. To tune: PEFT and transformers' own loss.

Shares no code with the backends; tests and benchmarks hold them against it.
"""

from contextlib import contextmanager

import numpy as np
import peft
import torch
import transformers

from backends.core.seeds import lora_a


@contextmanager
def ablated(model, layer: int, head: int, mask: str = "output"):
    attention = model.model.layers[layer].self_attn
    part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

    def before(_, inputs):
        changed = inputs[0].clone()
        changed[..., part] = 0
        return (changed,)

    def after(_, __, output):
        changed = output.clone()
        changed[..., part] = 0
        return changed

    if mask == "output":
        hook = attention.o_proj.register_forward_pre_hook(before)
    else:
        hook = attention.q_proj.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def last_logits(model, example) -> torch.Tensor:
    ids = torch.from_numpy(example.prompt_ids.astype(np.int64))[None].to(model.device)
    return model(input_ids=ids).logits[0, -1].float()


def choice(model, example) -> int:
    logits = last_logits(model, example)
    if len(example.choice_ids) == 0:
        return int(logits.argmax())
    return int(logits[torch.from_numpy(example.choice_ids.astype(np.int64))].argmax())


@torch.no_grad()
def generate(model, example, max_new_tokens: int) -> np.ndarray:
    ids = torch.from_numpy(example.prompt_ids.astype(np.int64))[None].to(model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, ids.shape[1] :].cpu().numpy().astype(np.int32)


def loss(model, example) -> torch.Tensor:
    """Mean cross-entropy over the target, by transformers' own `labels`."""
    ids = torch.from_numpy(np.concatenate([example.prompt_ids, example.target_ids]).astype(np.int64))[None]
    labels = ids.clone()
    labels[:, : len(example.prompt_ids)] = -100
    return model(input_ids=ids, labels=labels).loss


def lora(folder, recipe) -> peft.PeftModel:
    """PEFT's own LoRA on all of W_q, from the start that the recipe's seed gives."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    model = peft.get_peft_model(model, config)
    for layer, start in enumerate(lora_a(recipe.seed, layers, recipe.rank, width)):
        module = model.base_model.model.model.layers[layer].self_attn.q_proj
        module.lora_A["default"].weight.data = torch.from_numpy(start)
    return model

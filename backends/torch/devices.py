"""Where a torch model is placed: on one device, or its layers spread over several GPUs of a machine."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from backends.core.errors import InputError

FULL = 0.95
"""of a device's memory that weights may take; where there are enough devices they take half"""


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware multiplies in it, float32 elsewhere."""
    if dtype == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            cpu = Path("/proc/cpuinfo")
            native = cpu.is_file() and any(flag in cpu.read_text() for flag in ("avx512_bf16", "amx_bf16"))
        return torch.bfloat16 if native else torch.float32
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: float32, bfloat16 or auto")
    return getattr(torch, dtype)


def resolve_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is one. InputError says what torch sees instead of the requested device."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:  # torch's message lists twenty kinds of device
        raise InputError(f"--device {device}: no such device; torch knows cpu, cuda, cuda:0, …") from None
    seen = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= seen:
        raise InputError(
            f"--device {device}: torch {torch.__version__} sees {seen} CUDA devices; use --device cpu"
        )
    if wanted.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device} is not handled: use cpu or cuda")
    return torch.device("cuda", wanted.index or 0) if wanted.type == "cuda" else wanted


def at_hand(device: str) -> list[torch.device]:
    """The devices that a model may be spread over: all GPUs unless one of them is named."""
    first = resolve_device(device)
    if first.type != "cuda" or ":" in device:
        return [first]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def places(model_dir: Path, dtype: torch.dtype, device: str, model_parallel: int) -> list[torch.device]:
    """Each layer's device, [L]. Embedding, norm and output matrix are on the first layer's.

    Args:
        model_parallel: how many devices; 0: the fewest on which weights leave half of the memory free.

    Raises InputError where there are not so many, or all together do not hold the weights.
    """
    devices = at_hand(device)
    config = transformers.AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    most = min(len(devices), config.num_hidden_layers)
    if model_parallel > most:
        raise InputError(
            f"--model-parallel {model_parallel}: here {most} devices can share the model's "
            f"{config.num_hidden_layers} layers (--device {device}: {', '.join(map(str, devices))})"
        )
    if model_parallel == 1 or most == 1:
        return devices[:1] * config.num_hidden_layers
    layers, rest = weight_bytes(config, dtype)
    if model_parallel:
        return spread(layers, rest, devices[:model_parallel])
    memory = min(torch.cuda.get_device_properties(device).total_memory for device in devices)
    for share in (0.5, FULL):
        for count in range(1, most + 1):
            found = spread(layers, rest, devices[:count])
            if fullest(found, layers, rest) <= share * memory:
                return found
    raise InputError(
        f"{(sum(layers) + rest) / 2**30:.1f} GiB of weights do not fit {most} devices of "
        f"{memory / 2**30:.1f} GiB: more devices, or --dtype bfloat16"
    )


def weight_bytes(config, dtype: torch.dtype) -> tuple[list[int], int]:
    """Of each layer, and of all else."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    layers = [sum(weight.nbytes for weight in layer.parameters()) for layer in model.model.layers]
    return layers, sum(weight.nbytes for weight in model.parameters()) - sum(layers)


def spread(layers: Sequence[int], rest: int, devices: Sequence[torch.device]) -> list[torch.device]:
    """Layers in their order on devices in theirs, as evenly as they go, one each at the least.

    Args:
        layers: bytes of each.
        rest: bytes that the first device holds beside its layers.
    """
    found: list[torch.device] = []
    remaining = sum(layers) + rest
    for number, device in enumerate(devices):
        behind = len(devices) - number - 1
        share, held, count = remaining / (behind + 1), 0 if number else rest, 0
        while len(found) + behind < len(layers) and (
            not count or not behind or held + layers[len(found)] / 2 <= share
        ):
            held += layers[len(found)]
            found.append(device)
            count += 1
        remaining -= held
    return found


def fullest(places: Sequence[torch.device], layers: Sequence[int], rest: int) -> int:
    """Bytes of weights on the device that has most."""
    held = {place: rest * (place == places[0]) for place in places}
    for place, size in zip(places, layers, strict=True):
        held[place] += size
    return max(held.values())


def device_map(places: Sequence[torch.device]) -> dict[str, torch.device]:
    """transformers' own, for a model of the handled families."""
    first = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    layers = {f"model.layers.{index}": place for index, place in enumerate(places)}
    return dict.fromkeys(first, places[0]) | layers


def prepare() -> None:
    """Settings of a process that works on CUDA. cuDNN's attention makes a plan for every new shape, and here
    every step has another: on an H200 a layer's responses took 27 s the first time and 3 s the second."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def describe(places: Sequence[torch.device]) -> str:
    """ "cpu", "cuda:0", or "cuda x 4"."""
    count = len(set(places))
    return str(places[0]) if count == 1 else f"{places[0].type} x {count}"

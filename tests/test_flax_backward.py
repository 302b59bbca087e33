"""What Flax's tuning and gradients promise beside their results: where the mask has to stand, and what they
hold in memory."""

from types import SimpleNamespace

import jax
import numpy as np
import optax
import transformers

import backends
from backends.base import Shape
from backends.flax.graded import Batch
from backends.flax.gradients import differentiate
from backends.flax.loss import Passes, recomputes, sizes_of
from backends.flax.tune import Step, Trained, optimizer, times
from tests.conftest import make_examples
from tests.families import COMMON, save

SHAPES = Trained((3, 2, 5), (3, 4, 2, 2))


def random(generator: np.random.Generator) -> Trained:
    return Trained(*(generator.normal(size=shape).astype(np.float32) for shape in SHAPES))


def only(*heads: tuple[int, int]) -> Trained:
    mask = np.zeros((3, 4, 1, 1), np.float32)
    mask[tuple(zip(*heads, strict=True))] = 1
    return Trained(mask.max(axis=1), mask)


def how(free: Trained, pace: Trained | None = None) -> Step:
    return Step(free, np.float32(1.0), np.float32(0.1), pace)


def test_a_second_mask_on_the_step_would_change_nothing():
    """Adam's moments of gradients that were always zero are zero, and so are its steps."""
    generator, free = np.random.default_rng(0), only((0, 1), (2, 3))
    trained = random(generator)
    once = optimizer(how(free))
    twice = optax.chain(once, optax.stateless(lambda updates, _: times(updates, free)))
    states = [once.init(trained), twice.init(trained)]
    for _ in range(5):
        gradients = random(generator)  # also where nothing is free
        found = [
            mask.update(gradients, state, trained) for mask, state in zip((once, twice), states, strict=True)
        ]
        updates, states = zip(*found, strict=True)
        for one, other, own in zip(*updates, free, strict=True):
            np.testing.assert_array_equal(one, other)
            moving = np.broadcast_to(own == 1, one.shape)
            assert (np.asarray(one)[~moving] == 0).all() and (np.asarray(one)[moving] != 0).all()
        trained = optax.apply_updates(trained, updates[0])


def test_what_left_has_moments_and_is_held_by_the_factor_on_the_step():
    generator, before, after = np.random.default_rng(1), only((0, 1)), only((0, 2))
    trained = random(generator)
    _, state = optimizer(how(before)).update(random(generator), optimizer(how(before)).init(trained), trained)
    gradients = random(generator)
    drifting, _ = optimizer(how(after)).update(gradients, state, trained)
    state = (*state, optax.EmptyState())  # of the factor
    held, _ = optimizer(how(after, after)).update(gradients, state, trained)
    assert (np.asarray(drifting.b)[0, 1] != 0).all() and (np.asarray(held.b)[0, 1] == 0).all()
    np.testing.assert_array_equal(held.b[0, 2], drifting.b[0, 2])


def test_float64_is_a_layer_at_a_time_and_only_wanted_gradients_are_held(scratch):
    """By XLA's own account of the compiled program, for 16 layers of 0.98 MB each in float32."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32, "num_hidden_layers": 16}
    config = transformers.LlamaConfig(**(COMMON | sizes), num_key_value_heads=2)
    model = backends.load("flax", save(scratch / "deep", config), device="cpu").model
    examples = make_examples(2)
    ((_, rows),) = Passes(model, 2, sizes_of(examples, 1)).of(examples, 1)
    none = np.full((2, 1), -1, np.int32)

    def temporary(layers: list[int]) -> tuple[int, int]:
        with jax.enable_x64(True):
            given = Batch(rows, none, none), None, np.array(layers, np.int32), "output", False
            compiled = differentiate.lower(model.graph, model.weights, *given).compile()
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes, memory.output_size_in_bytes

    (every, found), (one, of_one) = temporary(list(range(16))), temporary([3])
    weights = sum(weight.nbytes for weight in jax.tree.leaves(model.weights))
    of_query = 128 * 128 * 4
    assert weights > 15e6
    assert one < weights / 2 and every < weights / 2, "not even the float32 model is copied"
    assert 15 * of_query <= found - of_one and of_one < 2 * of_query
    assert every - one < 2 * (found - of_one) + of_query, "others' gradients are not held"


def test_attention_scores_count_where_layers_are_computed_again():
    """As many tokens in longer rows take more; bytes by hand: 10 layers, 100 rows of 50 tokens."""
    shape = Shape(layers=10, heads=4, kv_heads=2, head_dim=8, model_dim=32, mlp_dim=64, vocab=100)
    kept = 10 * 100 * 50 * (2 * (10 * 32 + 3 * 64) + 6 * 4 * 50)
    for room, again in ((2 * kept, False), (2 * kept - 1, True)):
        model = SimpleNamespace(config=SimpleNamespace(shape=shape), itemsize=2, room=room)
        assert recomputes(model, 100, 50) is again
    assert recomputes(SimpleNamespace(config=model.config, itemsize=2, room=2 * kept), 50, 100)

"""The Flax backend's own: padded rows whose beginning stands once, and whole passes as one program."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import backends
from backends.flax import generate, model, sweep, weights
from backends.flax.attention import KeyValue, Layout, attend
from backends.flax.model import Model
from tests.conftest import ALL_HEADS, HEADS, LAYERS, assert_same, make_examples


@pytest.fixture(scope="module")
def own(models):
    return backends.load("flax", models["qwen2-mqa"], device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "queries"), [((2, 3), 4), ((3,), 1)])
def test_jaxs_own_attention_is_the_one_written_out(dtype, rows, queries):
    """Also with a mask for each row."""
    generator = np.random.default_rng(0)
    query, keys, values = (
        jnp.asarray(generator.normal(size=(*rows, *shape)), dtype)
        for shape in ((queries, 4, 8), (2, 6, 8), (2, 6, 8))
    )
    visible = jnp.asarray(generator.random((*rows, queries, 6)) < 0.5).at[..., 0].set(True)
    found, expected = (attend(query, KeyValue(keys, values), visible, fused) for fused in (True, False))
    assert found.dtype == expected.dtype == dtype
    apart = np.abs(np.asarray(found - expected, np.float32)).max()
    assert apart < (1e-6 if dtype == "float32" else 2e-2)


@pytest.mark.long
def test_a_model_with_jaxs_own_attention_answers_alike(own, models):
    config = replace(own.model.config, fused=True)
    graph, state = weights.load(models["qwen2-mqa"], config, own.model.mesh)
    fused = replace(own, model=replace(own.model, graph=graph, weights=state, config=config))
    examples = make_examples(5, seed=2)
    np.testing.assert_allclose(fused.logits(examples), own.logits(examples), rtol=0, atol=1e-5)
    found, expected = (dict(each.sweep_generations(examples, ALL_HEADS[5:7], 8)) for each in (fused, own))
    for head in ALL_HEADS[5:7]:
        assert_same(found[head], expected[head])


def test_a_line_holds_its_rows():
    rows = np.arange(12).reshape(3, 4) + np.array([0, 100, 200])[:, None]
    rows[:, :2] = [7, 8]
    layout = Layout(prefix=2, rows=3, width=4)
    line = layout.join(jnp.asarray(rows))
    assert line.shape == (layout.tokens,) == (8,) and layout.positions.tolist() == [0, 1] + 3 * [2, 3]
    np.testing.assert_array_equal(layout.split(line[None])[0], rows)
    columns = np.array([[0, 3], [1, 2], [3, 3]])
    np.testing.assert_array_equal(
        layout.take(line[None], jnp.asarray(columns))[0], np.take_along_axis(rows, columns, axis=1)
    )


@pytest.mark.parametrize("swept", [False, True])
def test_parts_hold_each_row_once_in_two_shapes_at_most(own, swept, monkeypatch):
    monkeypatch.setattr(model, "SPLIT", 0)
    generator = np.random.default_rng(1)
    prompts = [np.append(np.full(5, 7), generator.integers(8, 90, size)) for size in (*range(1, 40), 120)]
    found = model.make_parts(own.model, prompts, 300, 7, swept)
    assert sorted(np.concatenate([part.rows for part in found])) == list(range(len(prompts)))
    layouts = {part.padded.layout for part in found}
    assert len(layouts) == 2 and {layout.prefix for layout in layouts} == {5 * swept}
    for rows, padded in found:
        assert len(rows) <= 7 and len(rows) <= padded.layout.rows
        assert len(rows) == 1 or padded.layout.tokens <= 300 + padded.layout.width
        for row, ids, length in zip(rows, np.asarray(padded.ids), padded.lengths, strict=False):
            np.testing.assert_array_equal(ids[:length], prompts[row])


def test_no_python_between_tokens_and_a_layer_is_one_program_from_the_stream_below(own, monkeypatch):
    """However many tokens, heads and calls; and no layer of the clean model is computed twice."""
    calls, apply = [], Model.apply

    def counted(self, program, *arguments):
        calls.append((program, [int(each) for each in arguments if isinstance(each, np.int32)]))
        return apply(self, program, *arguments)

    monkeypatch.setattr(Model, "apply", counted)
    examples = make_examples(5, seed=2)
    assert max(map(len, own.generate(examples, 12))) == 12
    assert calls == [(generate.responses, [])]
    bounds = [[max(0, layer - 1), layer] for layer in range(LAYERS)]
    for verb, program, more in (
        (own.sweep_choices, sweep.ablated_choices, ()),
        (own.sweep_generations, generate.ablated_responses, (9,)),
    ):
        calls.clear()
        before = program._cache_size()
        for start in range(0, len(ALL_HEADS), HEADS):
            list(verb(examples, ALL_HEADS[start : start + HEADS], *more))
        assert calls == [(program, own_bounds) for own_bounds in bounds]
        assert program._cache_size() == before + 1

"""Layers as a list and stacked give the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ltx_jax.stack import Stack, count_layers, layer_lists, module_at, run_layers, stack_layers


def layers(widths=(4, 4, 4)):
    return nnx.List([nnx.Linear(4, width, rngs=nnx.Rngs(i)) for i, width in enumerate(widths)])


def step(layer, carry, x):
    y = layer(carry) * x
    return y[..., :4], y.sum()


def test_a_stack_runs_as_the_list_does():
    plain = layers()
    stacked = stack_layers(plain)
    assert isinstance(stacked[0], Stack)
    assert (len(stacked), count_layers(stacked), count_layers(plain)) == (1, 3, 3)
    x, scales = jnp.ones((2, 4)), jnp.array([1.0, 2.0, 3.0])
    run = jax.jit(lambda layers, x, scales: run_layers(layers, step, x, scales))
    for ours, theirs in zip(run(stacked, x, scales), run(plain, x, scales), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # the same sums, fused otherwise


def test_layers_of_other_structure_make_another_stack():
    mixed = stack_layers(layers((4, 4, 8, 8)))
    assert [entry.num_layers for entry in mixed] == [2, 2]
    x, scales = jnp.ones((2, 4)), jnp.arange(1.0, 5.0)
    carry, outs = run_layers(mixed, step, x, scales)
    theirs, their_outs = run_layers(layers((4, 4, 8, 8)), step, x, scales)
    # Sums of values of size 1 that cancel, fused otherwise.
    np.testing.assert_allclose(carry, theirs, atol=1e-5)
    np.testing.assert_allclose(outs, their_outs, atol=1e-5)


def test_a_layer_is_found_in_a_list_and_in_stacks():
    class Model(nnx.Module):
        def __init__(self):
            self.blocks = layers((4, 4, 8, 8))

    model = Model()
    kernels = [layer.kernel.get_value() for layer in model.blocks]
    for stacked in (False, True):
        if stacked:
            model.blocks = stack_layers(model.blocks)
        for n, kernel in enumerate(kernels):
            np.testing.assert_array_equal(module_at(model, f"blocks.{n}").kernel.get_value(), kernel)
    with pytest.raises(KeyError, match="no layer 4"):
        module_at(model, "blocks.4")


def test_shapes_stack_without_arrays():
    abstract = nnx.eval_shape(layers)
    assert stack_layers(abstract)[0].layer.kernel.get_value().shape == (3, 4, 4)


def test_lists_of_layers_are_found_by_their_dotted_names():
    class Model(nnx.Module):
        def __init__(self):
            self.layers = layers()

    class Two(nnx.Module):
        def __init__(self):
            self.video = Model()
            self.audio = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.blocks = stack_layers(layers())

    model = Two()
    assert layer_lists(model) == {"blocks": (model, "blocks"), "video.layers": (model.video, "layers")}
    assert layer_lists(model.audio) == {}

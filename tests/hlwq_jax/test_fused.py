from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from hlwq_jax import (
    FusedCheck,
    QuantizedLinear,
    check_fused,
    choose_form,
    fused_supports,
    fused_weight,
    lloyd_max,
    pack_planes,
    quantize_linears,
    quantized_matmul,
    set_form,
)
from hlwq_jax import fused as fused_module
from hlwq_jax import matmul as matmul_module
from hlwq_jax.hadamard import signs

from .conftest import random_quantized
from .hlo import compile_for, kernels, needs_card_compiler, register_use


def random_weight(out_features, in_features, *, bits=5, block_size=128, table="A", seed=0):
    """Codes and norms (zero and subnormal ones among them), packed, and as they are."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (out_features, in_features), dtype=np.uint8)
    blocks = (out_features, in_features // block_size)
    norms = (2.0 ** rng.integers(-26, 8, blocks) * rng.uniform(1, 2, blocks)).astype(np.float16)
    levels = lloyd_max(bits, table) / np.float32(block_size**0.5)
    lo, hi = pack_planes(codes, bits)
    packed = (jnp.asarray(lo), None if hi is None else jnp.asarray(hi), jnp.asarray(norms), jnp.asarray(levels))
    return packed, codes, norms, levels


def rounded_once(codes, norms, levels, block_size):
    """The weight from exact sums: float64 holds every sum of a block's bfloat16 values."""
    scale = np.float32(block_size**0.5)
    blocks = (levels * scale)[codes.reshape(*norms.shape, block_size)] * norms.astype(np.float32)[..., None]
    exact = blocks.astype(ml_dtypes.bfloat16).astype(np.float64) @ signs(block_size).astype(np.float64) / block_size
    assert (exact == exact.astype(np.float32)).all()  # so that every order of float32 sums gives them too
    return exact.astype(np.float32).astype(ml_dtypes.bfloat16).reshape(codes.shape)


@partial(jax.jit, static_argnames=("bits", "block_size"))
def rotate_weight(packed, *, bits, block_size):
    """The weight of the form as it is used: the identity times it."""
    identity = jnp.eye(packed[2].shape[1] * block_size, dtype=jnp.bfloat16)
    return quantized_matmul(identity, *packed, bits=bits, block_size=block_size, form="rotate_weight").T


@pytest.mark.parametrize("shape", [(1, 128), (64, 128), (65, 256), (130, 384)])
def test_the_weight_is_the_exact_sum_rounded_once_as_in_rotate_weight(shape):
    unpack = jax.jit(partial(fused_weight, bits=5, block_size=128))
    for seed in range(8):
        packed, codes, norms, levels = random_weight(*shape, seed=seed)
        expected = rounded_once(codes, norms, levels, 128)
        np.testing.assert_array_equal(unpack(*packed), expected)
        np.testing.assert_array_equal(rotate_weight(packed, bits=5, block_size=128), expected)


@pytest.mark.parametrize(("bits", "block_size"), [(2, 128), (3, 64), (4, 32), (5, 32), (6, 64), (7, 128), (8, 128)])
def test_other_widths_and_blocks_are_equal_too(bits, block_size):
    packed, codes, norms, levels = random_weight(70, 256, bits=bits, block_size=block_size)
    expected = rounded_once(codes, norms, levels, block_size)
    np.testing.assert_array_equal(fused_weight(*packed, bits=bits, block_size=block_size), expected)
    np.testing.assert_array_equal(rotate_weight(packed, bits=bits, block_size=block_size), expected)


@pytest.mark.parametrize(("table", "most_bits"), [("A", 8), ("B", 8), ("C", 8), ("converged", 7)])
def test_the_levels_of_the_tables_lie_close_enough_for_exact_sums(table, most_bits):
    # Values are multiples of the last bit of the smallest, which is over 2^-8 of it; 128 times the largest must stay
    # below 2^24 of those.
    for bits in range(1, most_bits + 1):
        levels = np.abs(lloyd_max(bits, table))
        assert 128 * levels.max() * 2**8 < 2**24 * levels.min()


def test_the_weight_is_near_the_original_decoders():
    weight = random_quantized(96, 256)
    lo, hi = map(jnp.asarray, pack_planes(weight.codes, 5))
    decoded = weight.dequantize().astype(np.float32)
    fused = np.asarray(
        fused_weight(lo, hi, *map(jnp.asarray, (weight.norms, weight.scaled_centroids)), bits=5, block_size=128)
    )
    # The values before the rotation are rounded to 8 bits: 2^-9 at most, 0.0017 root mean square, as is the result.
    assert np.linalg.norm(fused.astype(np.float32) - decoded) / np.linalg.norm(decoded) < 0.003


def test_blocks_the_kernel_does_not_take_are_refused():
    packed, *_ = random_weight(8, 256, block_size=256)
    with pytest.raises(ValueError, match="blocks of 32, 64 or 128; got blocks of 256: use rotate_weight"):
        fused_weight(*packed, bits=5, block_size=256)


@pytest.mark.parametrize(
    ("in_features", "block_size", "dtype"), [(300, 128, "bfloat16"), (512, 256, "bfloat16"), (300, 128, "float32")]
)
def test_the_fused_product_is_that_of_rotate_weight(in_features, block_size, dtype):
    weight = random_quantized(70, in_features, block_size=block_size)
    lo, hi = map(jnp.asarray, pack_planes(weight.codes, 5))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, in_features)), dtype)
    packed = (lo, hi, jnp.asarray(weight.norms), jnp.asarray(weight.scaled_centroids))

    def run(x, form):
        y = quantized_matmul(x, *packed, bits=5, block_size=block_size, form=form)
        return jnp.sum(y.astype(jnp.float32) ** 2), y

    gradient = jax.jit(jax.grad(run, has_aux=True), static_argnums=1)
    (dx, y), (expected_dx, expected_y) = gradient(x, "fused"), gradient(x, "rotate_weight")
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(dx, expected_dx)
    assert float(jnp.abs(dx.astype(jnp.float32)).max()) > 0


def test_it_is_never_chosen_by_itself():
    chosen = {
        choose_form(num_tokens=tokens, shared_outputs=4096, dtype=dtype)
        for tokens in (1, 64, 4096, 10**6)
        for dtype in (jnp.float32, jnp.bfloat16)
    }
    assert "fused" not in chosen


class Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.proj_in = nnx.Linear(128, 256, rngs=rngs)
        self.others = nnx.List([nnx.Linear(256, 128, use_bias=False, rngs=rngs)])

    def __call__(self, x):
        return self.others[0](jax.nn.gelu(self.proj_in(x)))


def test_set_form_switches_every_layer_of_a_stack_which_scans_to_the_same_numbers():
    blocks = [Block(rngs=nnx.Rngs(seed)) for seed in range(2)]
    for block in blocks:
        quantize_linears(block)
    graphdef = nnx.graphdef(blocks[0])
    stack = nnx.merge(graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, blocks)))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 128)), jnp.bfloat16)

    results = {}
    for form in ("rotate_weight", "fused"):
        assert set(set_form(stack, form)) == {("proj_in",), ("others", 0)}
        assert (stack.proj_in.form, stack.others[0].form) == (form, form)
        graphdef, state = nnx.split(stack)
        run = jax.jit(
            lambda x, state, graphdef=graphdef: jax.lax.scan(lambda x, s: (nnx.merge(graphdef, s)(x), None), x, state)
        )
        results[form] = run(x, state)[0]
    np.testing.assert_array_equal(results["fused"], results["rotate_weight"])


def test_without_a_card_the_check_says_so():
    check = check_fused()
    assert not check.proved
    assert "not available" in str(check)
    assert "NVIDIA cards" in str(check)


def test_interpreted_the_check_finds_equal_bits_but_proves_no_card():
    check = check_fused(shapes=((130, 256),), interpret=True)
    assert (check.num_weights, check.num_different, check.max_steps) == (130 * 256, 0, 0)
    assert check.equal
    assert not check.proved
    assert "33,280 weights equal bit for bit" in str(check)
    assert FusedCheck(device="a card", num_weights=1).proved


def test_the_check_finds_a_wrong_kernel(monkeypatch):
    def wrong(*packed, bits, block_size):
        weight = fused_weight(*packed, bits=bits, block_size=block_size)
        return weight.at[3, 5].set(weight[3, 5] * (1 + 2**-7))  # the next bfloat16, or the one after

    monkeypatch.setattr(matmul_module, "fused_weight", wrong)
    check = check_fused(shapes=((9, 128),), interpret=True)
    assert (check.num_different, check.max_steps in (1, 2), check.equal) == (1, True, False)
    assert "1 of 1,152 weights differ" in str(check)


def test_a_kernel_that_fails_to_compile_is_reported(monkeypatch):
    def fails(*packed, bits, block_size):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(matmul_module, "fused_weight", fails)
    check = check_fused(shapes=((10, 128),), interpret=True)
    assert not check.equal
    assert check.unavailable == "RuntimeError: no such instruction"


def test_a_jax_without_pallas_triton_has_no_fused_form(monkeypatch):
    monkeypatch.setattr(fused_module, "triton", None)
    assert not fused_supports(128)
    assert check_fused(interpret=True).unavailable == "this jax has no Pallas-Triton"
    packed, codes, norms, levels = random_weight(11, 128)
    weight = quantized_matmul(jnp.eye(128, dtype=jnp.bfloat16), *packed, bits=5, block_size=128, form="fused").T
    np.testing.assert_array_equal(weight, rounded_once(codes, norms, levels, 128))
    with pytest.raises(ValueError, match="this jax has no Pallas-Triton"):
        fused_weight(*packed, bits=5, block_size=128)


@needs_card_compiler
@pytest.mark.parametrize("card", ["rtx3090", "rtx4090", "h100"])
def test_compiled_it_is_one_kernel_without_spills_or_scratch(card, tmp_path):
    layer = QuantizedLinear.abstract(1024, 1000, use_bias=False, form="fused")
    graphdef, state = nnx.split(layer)
    x = jax.ShapeDtypeStruct(
        (2048, 1024), jnp.bfloat16
    )  # enough tokens that XLA does not split the sums of the product
    compiled = compile_for(card, lambda state, x: nnx.merge(graphdef, state)(x), state, x, ptx_folder=tmp_path)
    unpack, multiply = kernels(compiled.as_text())
    assert "triton" in unpack.target
    assert [(b.dtype, b.shape) for b in unpack.outputs] == [("bf16", (1000, 1024))]
    assert multiply.multiplies
    weight_bytes = 1000 * 1024 * 2
    # XLA adds a few hundred bytes of its own.
    assert weight_bytes <= compiled.memory_analysis().temp_size_in_bytes < weight_bytes + 4096
    (use,) = (use for name, use in register_use(tmp_path).items() if "fused_weight" in name)
    assert use.spilled_bytes == 0
    assert use.registers <= 128  # so that four blocks of 128 threads fit a core's 65,536


@needs_card_compiler
def test_stacked_layers_run_one_kernel_before_each_product():
    layer = QuantizedLinear.abstract(512, 512, use_bias=False, form="fused", num_layers=(3,))
    graphdef, state = nnx.split(layer)

    def run(state, x):
        return jax.lax.scan(lambda x, s: (nnx.merge(graphdef, s)(x), None), x, state)[0]

    compiled = compile_for("rtx4090", run, state, jax.ShapeDtypeStruct((64, 512), jnp.bfloat16))
    found = kernels(compiled.as_text())
    unpack = [i for i, kernel in enumerate(found) if "triton" in kernel.target]
    multiply = [i for i, kernel in enumerate(found) if kernel.multiplies]
    assert (len(unpack), multiply) == (1, [unpack[0] + 1])

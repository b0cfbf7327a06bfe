"""`x @ weight.T` straight from packed codes, with the Hadamard rotation in one of four places.

* "rotate_input" rotates the activations, `x·H`, and multiplies by levels times norms. Cheapest where there are fewer
  tokens than outputs that share x; layers that share x (queries, keys, values) share one rotation, as XLA merges them.
* "rotate_weight" rotates the weight back, one block-sized matrix product in the activations' dtype. Else cheapest.
* "exact" computes the weight as the original decoder does: float32, then rounded to bfloat16. It is the form for
  float32 activations and the yardstick for the others, whose weight is rounded before or without the rotation.
* "fused" is "rotate_weight" in one kernel (see `fused`), with the same bits. It is never chosen by itself: switch it on
  where `check_fused` proved it. What the kernel does not take (not bfloat16, other blocks, trellises) is done by
  "rotate_weight".

The scalings of the first two are powers of two, `H·2^-4` and `norm·2^-3` at blocks of 128, so they round nothing.

float32 products go through slices of the outputs, one after the other: see `_multiply_in_slices`.
"""

import math
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float16, Float32, Int8, UInt32

from hlwq_jax.fused import fused_supports, fused_weight
from hlwq_jax.hadamard import hadamard_matrix, precision_for, rotate
from hlwq_jax.planes import unpack_indices

Form = Literal["rotate_input", "rotate_weight", "exact", "fused"]
FORMS: tuple[Form, ...] = get_args(Form)

SLICE_OUTPUTS = 512  # the most outputs that a float32 product unpacks at once; 256 and 1024 took as long
SMALL_SLICE_OUTPUTS = 128  # with fewer, products are too narrow to be worth slicing


def choose_form(*, num_tokens: int, shared_outputs: int, dtype: jax.typing.DTypeLike) -> Form:
    """The form for a product, from shapes alone: `shared_outputs` counts the outputs of all layers that share x."""
    if jnp.dtype(dtype) == jnp.float32:
        return "exact"
    return "rotate_input" if num_tokens < shared_outputs else "rotate_weight"


def quantized_matmul(
    x: Float[Array, "*batch in"],
    lo: UInt32[Array, "out lo"],
    hi: UInt32[Array, "out hi"] | None,
    norms: Float16[Array, "out blocks"],
    scaled_centroids: Float32[Array, " levels"],
    *,
    bits: int,
    block_size: int,
    history_bits: int = 0,
    signs: Int8[Array, " in"] | None = None,
    form: Form | Literal["auto"] = "auto",
    shared_outputs: int | None = None,
) -> Float[Array, "*batch out"]:
    """Multiplies activations by a packed weight, in x's dtype; "auto" picks the form by `choose_form`.

    `history_bits` are those of a trellis (see `trellis`). The `signs` (±1) of the weight's columns are multiplied with
    the activations instead, which is exact.

    `scaled_centroids` are the levels divided by sqrt(block_size), as numpy divides: compiled code may round the
    quotient otherwise, and bfloat16 weights next to a tie would then differ from the original decoder's.

    Gradients flow to x alone. The backward pass unpacks the weight again instead of keeping it.
    """
    padded = norms.shape[-1] * block_size
    if not padded - block_size < x.shape[-1] <= padded:
        raise ValueError(
            f"x has {x.shape[-1]} features, but {norms.shape[-1]} blocks of {block_size} hold a weight with "
            f"{padded - block_size + 1} to {padded} inputs"
        )
    if form == "auto":
        shared_outputs = norms.shape[0] if shared_outputs is None else shared_outputs
        form = choose_form(num_tokens=math.prod(x.shape[:-1]), shared_outputs=shared_outputs, dtype=x.dtype)
    elif form not in FORMS:
        raise ValueError(f"form must be auto or one of {', '.join(FORMS)}, got {form!r}")
    if form == "fused" and not (x.dtype == jnp.bfloat16 and fused_supports(block_size) and not history_bits):
        form = "rotate_weight"
    if signs is not None:
        x = x * signs.astype(x.dtype)
    if x.shape[-1] < padded:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - x.shape[-1])])
    if form == "rotate_input":
        # Outside the barrier below, so that layers sharing x share this rotation.
        blocks = x.reshape(*x.shape[:-1], -1, block_size)
        x = rotate(blocks, exponent=_input_exponent(block_size)).reshape(x.shape)
    packed = jax.lax.stop_gradient((lo, hi, norms, scaled_centroids))
    return _multiply(x, packed, _Code(bits, block_size, history_bits), form)


def dequantize_planes(
    lo: UInt32[Array, "*layers out lo"],
    hi: UInt32[Array, "*layers out hi"] | None,
    norms: Float16[Array, "*layers out blocks"],
    scaled_centroids: Float32[Array, "*layers levels"],
    *,
    bits: int,
    block_size: int,
    history_bits: int = 0,
    signs: Int8[Array, "*layers in"] | None = None,
) -> BFloat16[Array, "*layers out padded"]:
    """The weight as the original decoder computes it, padding included; leading axes hold stacked layers."""

    def unpack(packed):
        return _exact_weight(packed, _Code(bits, block_size, history_bits)).astype(jnp.bfloat16)

    for _ in range(norms.ndim - 2):
        unpack = jax.vmap(unpack)
    weight = unpack((lo, hi, norms, scaled_centroids))
    if signs is None:
        return weight
    padding = [(0, 0)] * (signs.ndim - 1) + [(0, weight.shape[-1] - signs.shape[-1])]
    return weight * jnp.pad(signs, padding, constant_values=1).astype(weight.dtype)[..., None, :]


class _Code(NamedTuple):
    """How codes become blocks of levels."""

    bits: int
    block_size: int
    history_bits: int


@partial(jax.checkpoint, static_argnums=(2, 3))
def _multiply(x, packed, code: _Code, form: Form):
    # The barrier ties unpacking to this product: without it XLA may unpack all layers first and keep their weights.
    packed, x = jax.lax.optimization_barrier((packed, x))
    packed = jax.lax.stop_gradient(packed)  # again: the barrier's derivative has a gradient for every operand
    multiply = _multiply_in_slices if x.dtype == jnp.float32 else _multiply_whole
    return multiply(x, packed, code, form)


def _multiply_in_slices(x, packed, code: _Code, form: Form):
    """The same product, some outputs at a time.

    float32 runs on CPUs, and to compare. There a whole float32 weight, and what it passes through on the way, goes to
    memory and back several times; a slice stays in the cache. Real width, 1,024 tokens: 1.1 times a plain product's
    time in place of 1.3, and a slice's memory (scripts/bench_block.py).
    """
    *planes, scaled_centroids = packed
    out_features = planes[-1].shape[0]
    num_slices = _count_slices(out_features)
    if num_slices == 1:
        return _multiply_whole(x, packed, code, form)
    slices = jax.tree.map(lambda a: a.reshape(num_slices, -1, a.shape[1]), planes)
    y = jax.lax.map(lambda one: _multiply_whole(x, (*one, scaled_centroids), code, form), slices)
    return jnp.moveaxis(y, 0, -2).reshape(*x.shape[:-1], out_features)


def _count_slices(out_features: int) -> int:
    """The fewest equal slices of at most SLICE_OUTPUTS; one where they would be small."""
    counts = range(-(-out_features // SLICE_OUTPUTS), out_features // SMALL_SLICE_OUTPUTS + 1)
    return next((n for n in counts if out_features % n == 0), 1)


def _multiply_whole(x, packed, code: _Code, form: Form):
    if form == "exact":
        weight = _exact_weight(packed, code).astype(x.dtype)
    elif form == "rotate_input":
        # The power of two that the rotation of x has not taken: together they make 1 / block_size.
        exponent = _log2(code.block_size) - _input_exponent(code.block_size)
        weight = _levels_times_norms(packed, code, exponent=exponent).astype(x.dtype)
    elif form == "fused":
        weight = fused_weight(*packed, bits=code.bits, block_size=code.block_size)
    else:
        blocks = _levels_times_norms(packed, code, exponent=0).astype(x.dtype)
        weight = rotate(blocks, exponent=_log2(code.block_size))
    weight = weight.reshape(weight.shape[0], -1)
    return jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=precision_for(x.dtype),
        preferred_element_type=x.dtype,
    )


def _exact_weight(packed, code: _Code) -> jax.Array:
    """The decoder's bfloat16 weight, held as float32."""
    lo, hi, norms, scaled_centroids = packed
    blocks = _lookup(lo, hi, scaled_centroids, code, num_blocks=norms.shape[1])
    blocks = jnp.matmul(blocks, hadamard_matrix(code.block_size), precision=jax.lax.Precision.HIGHEST)
    # Rounded to bfloat16 by an operation of its own: inside jit a cast there and back is compiled away.
    weight = jax.lax.reduce_precision(blocks * norms.astype(jnp.float32)[..., None], exponent_bits=8, mantissa_bits=7)
    return weight.reshape(norms.shape[0], -1)


def _levels_times_norms(packed, code: _Code, *, exponent: int) -> jax.Array:
    lo, hi, norms, scaled_centroids = packed
    centroids = scaled_centroids * jnp.float32(code.block_size**0.5)
    blocks = _lookup(lo, hi, centroids, code, num_blocks=norms.shape[1])
    return blocks * (norms.astype(jnp.float32) * jnp.float32(2.0**-exponent))[..., None]


def _lookup(lo, hi, table, code: _Code, *, num_blocks: int) -> jax.Array:
    indices = unpack_indices(lo, hi, **code._asdict(), num_codes=num_blocks * code.block_size)
    # In bounds by construction (the reader checks the largest code), so the gather needs no clamping.
    return table.at[indices.reshape(-1, num_blocks, code.block_size)].get(mode="promise_in_bounds")


def _log2(block_size: int) -> int:
    return block_size.bit_length() - 1


def _input_exponent(block_size: int) -> int:
    return (_log2(block_size) + 1) // 2

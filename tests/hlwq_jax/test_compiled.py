"""What the forms of a product compile to for a card: kernels, arrays and scratch memory, at 4096x4096."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hlwq_jax import QuantizedLinear

from .hlo import Kernel, buffers, compile_for, kernels, needs_card_compiler

SIZE = 4096
WEIGHT_BYTES = SIZE * SIZE * 2

pytestmark = needs_card_compiler


def compiled_layer(card: str, num_tokens: int, form: str, **settings):
    layer = QuantizedLinear.abstract(SIZE, SIZE, use_bias=False, form=form, **settings)
    graphdef, state = nnx.split(layer)
    x = jax.ShapeDtypeStruct((num_tokens, SIZE), jnp.bfloat16)
    return compile_for(card, lambda state, x: nnx.merge(graphdef, state)(x), state, x)


def described(kernel: Kernel) -> str:
    (output,) = kernel.outputs
    return f"{'product' if kernel.multiplies else 'elementwise'} {output.dtype} {output.size}"


@pytest.mark.parametrize("card", ["rtx4090", "h100"])
@pytest.mark.parametrize("num_tokens", [512, 8192])
@pytest.mark.parametrize("form", ["rotate_input", "rotate_weight", "fused"])
def test_kernels_arrays_and_memory_of_a_form(card, num_tokens, form):
    compiled = compiled_layer(card, num_tokens, form)
    text = compiled.as_text()
    x, weight = num_tokens * SIZE, SIZE * SIZE
    # The 32 levels are scaled in a launch of their own, or not: small things are not counted.
    found = [described(kernel) for kernel in kernels(text) if kernel.outputs[0].size > 32]
    expected = {
        "rotate_input": [f"product bf16 {x}", f"elementwise bf16 {weight}", f"product bf16 {x}"],
        "rotate_weight": [f"elementwise bf16 {weight}", f"product bf16 {weight}", f"product bf16 {x}"],
        "fused": [f"elementwise bf16 {weight}", f"product bf16 {x}"],
    }
    assert found == expected[form]
    assert not [buffer for buffer in buffers(text) if buffer.dtype == "f32" and buffer.size > 32]
    scratch = {
        "rotate_input": WEIGHT_BYTES + 2 * x,  # and the rotated x
        # Before and after the rotation; before it, the weight lies in the output where that is large enough.
        "rotate_weight": WEIGHT_BYTES * (1 if x >= weight else 2),
        "fused": WEIGHT_BYTES,
    }
    assert compiled.memory_analysis().temp_size_in_bytes == pytest.approx(scratch[form], rel=0.01)


@pytest.mark.parametrize(("num_tokens", "form"), [(512, "rotate_input"), (8192, "rotate_weight")])
def test_the_form_that_is_chosen_compiles_to_the_one_it_names(num_tokens, form):
    auto, named = (compiled_layer("rtx4090", num_tokens, choice).as_text() for choice in ("auto", form))
    assert [described(kernel) for kernel in kernels(auto)] == [described(kernel) for kernel in kernels(named)]


@pytest.mark.parametrize("card", ["rtx4090", "h100"])
@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("form", ["rotate_input", "rotate_weight"])
def test_a_trellis_compiles_to_the_kernels_and_memory_of_scalar_codes(card, bits, form):
    trellis, scalar = (
        compiled_layer(card, 8192, form, bits=bits, history_bits=history_bits) for history_bits in (7, 0)
    )
    launches = [
        [described(kernel) for kernel in kernels(compiled.as_text()) if kernel.outputs[0].size > 2 ** (bits + 7)]
        for compiled in (trellis, scalar)
    ]
    assert launches[0] == launches[1]
    temporary = [compiled.memory_analysis().temp_size_in_bytes for compiled in (trellis, scalar)]
    assert temporary[0] - temporary[1] < 2**16  # the levels, scaled; a weight has 32 MiB


def test_signs_add_no_array_of_a_weights_size():
    with_signs, without = (compiled_layer("rtx4090", 512, "rotate_input", signs=signs) for signs in (True, False))
    weights = [
        [buffer for buffer in buffers(compiled.as_text()) if buffer.size >= SIZE * SIZE]
        for compiled in (with_signs, without)
    ]
    assert len(weights[0]) == len(weights[1]) == 1


def test_stacked_layers_hold_one_weight_at_a_time():
    layer = QuantizedLinear.abstract(SIZE, SIZE, use_bias=False, num_layers=(4,))
    graphdef, state = nnx.split(layer)
    x = jax.ShapeDtypeStruct((512, SIZE), jnp.bfloat16)

    def run(state, x):
        return jax.lax.scan(lambda x, s: (nnx.merge(graphdef, s)(x), None), x, state)[0]

    compiled = compile_for("rtx4090", run, state, x)
    weights = [b for b in buffers(compiled.as_text()) if b.size == SIZE * SIZE and b.dtype in ("bf16", "f32")]
    assert [b.dtype for b in weights] == ["bf16"]
    # One bfloat16 weight, one layer's slice of what is packed (5.125 bits a weight) and x rotated: x and y take turns.
    stated = WEIGHT_BYTES + SIZE * SIZE * 5.125 / 8 + 2 * 512 * SIZE
    assert compiled.memory_analysis().temp_size_in_bytes == pytest.approx(stated, rel=0.01)


HLO = """HloModule jit_run, is_scheduled=true

%fused_product (a: bf16[4,8], b: bf16[8,2]) -> bf16[4,2] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,2]{1,0} parameter(1)
  ROOT %dot.1 = bf16[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (p: (s32[], bf16[4,2])) -> (s32[], bf16[4,2]) {
  %p = (s32[], /*index=1*/bf16[4,2]{1,0}) parameter(0)
  %x = bf16[4,2]{1,0} get-tuple-element(%p), index=1
  %product = bf16[4,2]{1,0} fusion(%x, %x), kind=kCustom, calls=%fused_product
  ROOT %t = (s32[], bf16[4,2]{1,0}) tuple(%x, %product)
}

%condition (p: (s32[], bf16[4,2])) -> pred[] {
  %q = (s32[], bf16[4,2]{1,0}) parameter(0)
  ROOT %less = pred[] fusion(%q), kind=kLoop, calls=%never_printed
}

ENTRY %main.9 (x.1: bf16[4,2]) -> bf16[4,2] {
  %x.1 = bf16[4,2]{1,0} parameter(0)
  %start = (f32[3]{0}, f32[3]{0}) copy-start(%x.1)
  %loop = (s32[], /*index=1*/bf16[4,2]{1,0}) while(%x.1), condition=%condition, body=%body
  %done = f32[3]{0} copy-done(%start)
  %call = (bf16[4,2]{1,0}, s8[16]{0}) custom-call(%x.1), custom_call_target="__cublas$lt$matmul"
  ROOT %y = bf16[4,2]{1,0} get-tuple-element(%call), index=0
}
"""


def test_programs_are_read_in_order_with_their_loops():
    assert [(k.name, k.opcode, k.target, k.multiplies) for k in kernels(HLO)] == [
        ("less", "fusion", "", False),
        ("product", "fusion", "", True),
        ("done", "copy-done", "", False),
        ("call", "custom-call", "__cublas$lt$matmul", True),
    ]
    assert [(b.dtype, b.shape, b.kernel) for b in buffers(HLO)] == [
        ("pred", (), "less"),
        ("bf16", (4, 2), "product"),
        ("f32", (3,), "done"),
        ("bf16", (4, 2), "call"),
        ("s8", (16,), "call"),
    ]
    with pytest.raises(ValueError, match="expected the text of a compiled program"):
        kernels("not a program")

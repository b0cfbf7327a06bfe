"""Adapters beside plain, packed and stacked linears."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.flax import save_file

from hlwq_jax import quantize_linears
from ltx_jax.lora import LoraError, LoraLinear, add_loras, read_lora
from ltx_jax.stack import run_layers, stack_layers


class Wrapped(nnx.Module):
    """Blocks whose linear has a name, as in the transformer."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Block(rngs) for _ in range(3)])

    def __call__(self, x):
        return run_layers(self.blocks, lambda layer, c, _: (layer.proj(c), None), x)[0]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.proj = nnx.Linear(128, 128, rngs=rngs)


NAMES = {f"transformer_blocks.{n}.ff": f"blocks.{n}.proj" for n in range(3)}


def write(path, layers, rank=4, seed=0, **changes):
    rng = np.random.default_rng(seed)
    tensors = {}
    for n in layers:
        key = f"diffusion_model.transformer_blocks.{n}.ff"
        tensors[f"{key}.lora_A.weight"] = jnp.asarray(rng.normal(size=(rank, 128)) / 11, jnp.bfloat16)
        tensors[f"{key}.lora_B.weight"] = jnp.asarray(rng.normal(size=(128, rank)) / 2, jnp.bfloat16)
    save_file(tensors | changes, str(path))
    return path


def bfloat16_weights(model):
    for block in model.blocks:
        for parameter in (block.proj.kernel, block.proj.bias):
            parameter.set_value(parameter.get_value().astype(jnp.bfloat16))
    return model


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_float32_gives_what_bfloat16_fusion_gives(tmp_path, stacked, packed):
    model = bfloat16_weights(Wrapped())
    if packed:
        quantize_linears(model)
    weights = [block.proj.dequantize().T if packed else block.proj.kernel.get_value() for block in model.blocks]
    path = write(tmp_path / "a.safetensors", [0, 2])  # block 1 has none
    factors = read_lora(path)
    if stacked:
        model.blocks = stack_layers(model.blocks)
    add_loras(model, [(path, 0.75)], NAMES)

    x = y = jnp.asarray(np.random.default_rng(1).normal(size=(5, 128)), jnp.float32)
    for n, weight in enumerate(weights):
        if f"transformer_blocks.{n}.ff" in factors:
            a, b = factors[f"transformer_blocks.{n}.ff"]
            scaled = (b * jnp.bfloat16(0.75)).astype(jnp.float32)
            weight = weight + (scaled @ a.astype(jnp.float32)).astype(jnp.bfloat16).T
        y = y @ weight.astype(jnp.float32)
    # The same bfloat16 weights up to a rare rounding of a delta that lies between two values.
    np.testing.assert_allclose(model(x), y, atol=2e-3, rtol=0)


def test_bfloat16_adds_beside_the_weight(tmp_path):
    model = bfloat16_weights(Wrapped())
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 128)), jnp.bfloat16)
    path = write(tmp_path / "a.safetensors", [0, 1, 2])
    exact = bfloat16_weights(Wrapped())
    add_loras(exact, [(path, 0.5)], NAMES)
    add_loras(model, [(path, 0.5)], NAMES)
    y = model(x)
    assert y.dtype == jnp.bfloat16
    expected = exact(x.astype(jnp.float32))
    # Three layers of bfloat16 arithmetic, eight bits each.
    assert np.abs(np.asarray(y, np.float32) - expected).max() < 0.03 * np.abs(expected).max()


def test_several_files_and_ranks_add_up(tmp_path):
    paths = [write(tmp_path / "a.safetensors", [0], rank=4), write(tmp_path / "b.safetensors", [0, 1], rank=8, seed=1)]
    both, one = bfloat16_weights(Wrapped()), bfloat16_weights(Wrapped())
    both.blocks, one.blocks = stack_layers(both.blocks), stack_layers(one.blocks)
    add_loras(both, [(paths[0], 1.0), (paths[1], 0.0)], NAMES)
    add_loras(one, [(paths[0], 1.0)], NAMES)
    x = jnp.ones((2, 128))
    np.testing.assert_array_equal(both(x), one(x))
    assert isinstance(both.blocks[0].layer.proj, LoraLinear)


def test_files_that_do_not_belong_are_refused(tmp_path):
    def add(path):
        add_loras(Wrapped(), [(path, 1.0)], NAMES)

    with pytest.raises(LoraError, match=r"1 of 2 linears.*transformer_blocks\.7\.ff"):
        add(write(tmp_path / "a.safetensors", [0, 7]))
    narrow = jnp.zeros((4, 64), jnp.bfloat16)
    with pytest.raises(LoraError, match="maps 64 to 128 channels"):
        add(write(tmp_path / "b.safetensors", [0], **{"diffusion_model.transformer_blocks.0.ff.lora_A.weight": narrow}))
    other_rank = jnp.zeros((5, 128), jnp.bfloat16)
    with pytest.raises(LoraError, match="different rank"):
        add(
            write(
                tmp_path / "c.safetensors",
                [0],
                **{"diffusion_model.transformer_blocks.0.ff.lora_A.weight": other_rank},
            )
        )
    with pytest.raises(LoraError, match="not an LTX-2 LoRA"):
        add(write(tmp_path / "d.safetensors", [0], **{"alpha": jnp.zeros(())}))
    (tmp_path / "e.safetensors").write_bytes(b"junk")
    with pytest.raises(LoraError, match="cannot be read"):
        add(tmp_path / "e.safetensors")


def damaged(path, kind):
    """A LoRA for block 0 with something wrong."""
    key = "diffusion_model.transformer_blocks.0.ff"
    a = jnp.zeros((4, 128), jnp.bfloat16)
    changes = {
        "whole numbers": {f"{key}.lora_A.weight": a.astype(jnp.int32)},
        "three axes": {f"{key}.lora_A.weight": a[None]},
        "not a number": {f"{key}.lora_A.weight": a.at[0, 0].set(jnp.nan)},
        "infinite": {f"{key}.lora_B.weight": a.T.at[0, 0].set(jnp.inf)},
        "twice": {f"model.{key}.lora_A.weight": a},
        "half": {"diffusion_model.transformer_blocks.1.ff.lora_B.weight": a.T},
    }
    write(path, [0], **changes.get(kind, {}))
    raw = path.read_bytes()
    contents = {
        "pickle": b"\x80\x04\x95" + bytes(100),
        "page": b"<!DOCTYPE html>" + bytes(100),
        "nothing": b"",
        "cut off": raw[:-1],
        "longer": raw + b"x",
        "header beyond the file": b"\xff" * 7 + b"\x7f" + raw[8:],
        "overlap": raw.replace(b"[0,1024]", b"[8,1032]"),
    }
    if kind in ("folder", "pipe"):
        path.unlink()
        (os.mkdir if kind == "folder" else os.mkfifo)(path)
    elif kind in contents:
        assert contents[kind] != raw
        path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        *((kind, "not an LTX-2 LoRA.*lora_A") for kind in ("whole numbers", "three axes")),
        *((kind, "not finite: damaged data") for kind in ("not a number", "infinite")),
        ("twice", "lora_A of .*transformer_blocks.0.ff twice"),
        ("half", "missing or of different rank for transformer_blocks.1.ff"),
        *((kind, "it is no file") for kind in ("folder", "pipe")),
        *((kind, "cannot be read") for kind in ("pickle", "page", "nothing", "cut off", "longer", "overlap")),
        ("header beyond the file", "cannot be read"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, kind, message):
    path = damaged(tmp_path / "lora.safetensors", kind)
    with pytest.raises(LoraError, match=f"(?s)lora.safetensors.*{message}"):
        read_lora(path)

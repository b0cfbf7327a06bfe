"""A checkpoint folder to models: the stored bits, the planned shapes, little memory, and clear refusals."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ltx_jax import load
from ltx_jax.checkpoint import LAYERED, CheckpointError, Manifest
from ltx_jax.load import abstract_component, load_component
from ltx_jax.models.attention import Attention, set_attention_form
from ltx_jax.offload import HostLayers, Layout
from ltx_jax.orbax_io import restore, save
from ltx_jax.stack import layer_lists, locate, walk


@pytest.fixture(scope="module")
def manifest(mini_checkpoint) -> Manifest:
    return Manifest.read(mini_checkpoint)


@pytest.fixture(scope="module")
def loaded(mini_checkpoint, manifest):
    """`loaded(component)`: a model of the checkpoint, loaded once for all tests."""
    return cache(lambda component: load_component(mini_checkpoint, manifest, component))


def values(model: nnx.Module) -> dict[str, Any]:
    return {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}


def stored(folder: Path, manifest: Manifest, component: str) -> dict[str, np.ndarray]:
    return {
        name: array for part in manifest.parts[component] for name, array in restore(folder / component / part).items()
    }


def at(model: nnx.Module, name: str) -> np.ndarray:
    """The array of a stored name."""
    place, index = locate(model, name)
    array = np.asarray(walk(model, place).get_value())
    return array if index is None else array[index]


def layer_at(model: nnx.Module, name: str) -> Any:
    """A layer cut out of its stack, as numpy arrays."""
    place, index = locate(model, name)
    graphdef, state = nnx.split(walk(model, place))
    return nnx.merge(graphdef, jax.tree.map(lambda array: np.asarray(array)[index], state))


def assert_streams(host: HostLayers, model: nnx.Module, path: str) -> None:
    """Host layers of the same structure and bits as the resident ones of a list."""
    assert len(host) > 0
    for number, (layout, words) in enumerate(zip(host.layouts, host.buffers, strict=True)):
        layer = layer_at(model, f"{path}.{number}")
        assert layout == Layout.of(layer)
        assert same_bits(words, layout.pack(layer))
    with pytest.raises(KeyError):
        locate(model, f"{path}.{len(host)}")


def same_bits(ours: Any, theirs: Any) -> bool:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


@pytest.fixture
def damaged(mini_checkpoint, tmp_path):
    """`damaged(part, change)`: a copy of the connectors where one part holds `change(arrays)`."""

    def make(part: str, change) -> Path:
        shutil.copytree(mini_checkpoint / "connectors", tmp_path / "connectors")
        folder = tmp_path / "connectors" / part
        arrays = change(restore(folder))
        shutil.rmtree(folder)
        save(folder, arrays)
        return tmp_path

    return make


# -------------------------------------------------------------------- values


@pytest.mark.parametrize("component", ["transformer", "connectors", "gemma", "video_vae"])
def test_every_array_comes_back_bit_for_bit(mini_checkpoint, manifest, loaded, component):
    model = loaded(component)
    arrays = stored(mini_checkpoint, manifest, component)
    assert all(same_bits(at(model, name), array) for name, array in arrays.items())
    assert sum(array.nbytes for array in arrays.values()) == sum(x.nbytes for x in values(model).values())


def test_a_dtype_casts_plain_weights_alone(mini_checkpoint, manifest):
    model = load_component(mini_checkpoint, manifest, "transformer", dtype=jnp.float32)
    for name, array in stored(mini_checkpoint, manifest, "transformer").items():
        packed = name.rpartition(".")[2] in ("lo", "hi", "norms", "scaled_centroids")
        assert same_bits(at(model, name), array if packed else array.astype(np.float32)), name


def assert_planned(planned: nnx.Module, model: nnx.Module) -> None:
    assert nnx.graphdef(planned) == nnx.graphdef(model)
    ours, theirs = values(planned), values(model)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in ours.values())
    assert {name: (x.shape, x.dtype) for name, x in ours.items()} == {
        name: (x.shape, x.dtype) for name, x in theirs.items()
    }


def test_shapes_are_known_without_the_folder(manifest, loaded):
    for component in manifest.parts:
        assert_planned(abstract_component(manifest, component), loaded(component))


def test_cast_shapes_are_known_without_the_folder(mini_checkpoint, manifest):
    for component in ("connectors", "audio_vae"):
        model = load_component(mini_checkpoint, manifest, component, dtype=jnp.float16)
        assert_planned(abstract_component(manifest, component, dtype=jnp.float16), model)


def test_what_is_stored_otherwise_is_planned_otherwise(manifest):
    name = "blocks.1.video.scale_shift_table"
    for dtype, expected in ((None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
        planned = abstract_component(manifest, "transformer", dtype=dtype, stored={name: jnp.float32})
        assert values(planned)["blocks.0.layer.video.scale_shift_table"].dtype == expected


def test_layers_stored_in_different_precisions_make_one_stack_of_the_widest(mini_checkpoint, manifest, tmp_path):
    shutil.copytree(mini_checkpoint / "gemma", tmp_path / "gemma")
    folder = tmp_path / "gemma/layers.002"
    arrays = {name: array.astype(np.float32) for name, array in restore(folder).items()}
    shutil.rmtree(folder)
    save(folder, arrays)
    model = load_component(tmp_path, manifest, "gemma")
    assert len(model.layers) == 1
    streamed = load_component(tmp_path, manifest, "gemma", offload=True)
    for number in range(6):
        part = restore(tmp_path / f"gemma/layers.{number:03d}")
        assert all(same_bits(at(model, name), array.astype(np.float32)) for name, array in part.items())
    assert_streams(streamed.layers["layers"], model, "layers")


def test_a_device_is_taken_at_its_word(mini_checkpoint, manifest):
    device = jax.devices()[0]
    for chosen in (None, device):
        model = load_component(mini_checkpoint, manifest, "connectors", device=chosen)
        assert {x.committed for x in values(model).values()} == {chosen is not None}
        assert {x.device for x in values(model).values()} == {device}


# ------------------------------------------------------------------ streaming


@pytest.mark.parametrize("component", LAYERED)
def test_streamed_layers_hold_what_the_stacks_hold(mini_checkpoint, manifest, loaded, component):
    model = loaded(component)
    streamed = load_component(mini_checkpoint, manifest, component, offload=True)
    assert set(streamed.layers) == set(layer_lists(model))
    for path, host in streamed.layers.items():
        owner, attribute = layer_lists(streamed.rest)[path]
        assert len(getattr(owner, attribute)) == 0
        assert_streams(host, model, path)
    rest, whole = values(streamed.rest), values(model)
    assert rest
    assert all(same_bits(array, whole[name]) for name, array in rest.items())


class Beside(nnx.Module):
    """A module put around a linear, with an array of its own."""

    def __init__(self, base: nnx.Module, number: jax.Array):
        self.base = base
        self.number = nnx.Param(number)


def test_a_model_is_adapted_before_it_is_filled(mini_checkpoint, manifest, loaded):
    def adapt(model):
        set_attention_form(model, "cudnn")
        attention = model.blocks[0].layer.video.text_attn
        attention.to_q = Beside(attention.to_q, jnp.array([10.0, 11.0]))
        model.video.patchify = Beside(model.video.patchify, jnp.array(5.0))

    plain = loaded("transformer")
    model = load_component(mini_checkpoint, manifest, "transformer", adapt=adapt)
    streamed = load_component(mini_checkpoint, manifest, "transformer", offload=True, adapt=adapt)
    for number in range(2):
        linear = layer_at(model, f"blocks.{number}").video.text_attn.to_q
        assert float(linear.number.get_value()) == 10 + number
        assert same_bits(linear.base.lo.get_value(), at(plain, f"blocks.{number}.video.text_attn.to_q.lo"))
    forms = {module.form for _, module in nnx.iter_modules(model) if isinstance(module, Attention)}
    assert forms == {"cudnn"}
    assert_streams(streamed.layers["blocks"], model, "blocks")
    for patchify in (model.video.patchify, streamed.rest.video.patchify):
        assert float(patchify.number.get_value()) == 5
        assert same_bits(patchify.base.kernel.get_value(), at(plain, "video.patchify.kernel"))


# -------------------------------------------------------------------- memory


def test_a_stack_is_filled_in_its_own_memory():
    stacks = {"a": jax.ShapeDtypeStruct((4, 64, 8), jnp.uint32), "b": jax.ShapeDtypeStruct((4, 32), jnp.bfloat16)}
    slices = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in stacks.items()}
    memory: Any = load._fill.lower(stacks, slices, 0).compile().memory_analysis()
    size = 4 * 64 * 8 * 4 + 4 * 32 * 2
    assert memory.alias_size_in_bytes == size
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= 64  # the table of outputs
    assert memory.temp_size_in_bytes <= 1024


def test_parts_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr(load, "_PIECE_BYTES", 100)
    sizes = {"a": 40, "b": 60, "c": 1, "d": 200, "e": 3}
    shapes = {name: jax.ShapeDtypeStruct((size,), jnp.uint8) for name, size in sizes.items()}
    assert [list(piece) for piece in load._pieces(shapes)] == [["a", "b"], ["c"], ["d"], ["e"]]


WIDE = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from flax import nnx
from ltx_jax.checkpoint import MANIFEST, Manifest
from ltx_jax.load import abstract_component
from ltx_jax.orbax_io import save

source, dest = map(Path, sys.argv[1:])
manifest = Manifest.read(source)
config = dict(manifest.metadata["transformer"])
config |= {"num_layers": 4, "num_attention_heads": 16, "attention_head_dim": 64}
config |= {"audio_num_attention_heads": 16, "audio_attention_head_dim": 32}
config |= {"cross_attention_dim": 1024, "audio_cross_attention_dim": 512}
parts = {"transformer": ["shared", *(f"blocks.{n:03d}" for n in range(4))], "audio_vae": manifest.parts["audio_vae"]}
manifest = replace(manifest, metadata=manifest.metadata | {"transformer": config}, parts=parts, quantized={})
model = abstract_component(manifest, "transformer", dtype=np.float32)
arrays = {part: {} for part in parts["transformer"]}
for path, variable in nnx.to_flat_state(nnx.state(model)):
    name, x = ".".join(map(str, path)), variable.get_value()
    if name.startswith("blocks.0.layer."):
        for n in range(4):
            arrays[f"blocks.{n:03d}"][name.replace("0.layer", str(n), 1)] = np.ones(x.shape[1:], x.dtype)
    else:
        arrays["shared"][name] = np.ones(x.shape, x.dtype)
for part, content in arrays.items():
    save(dest / "transformer" / part, content)
(dest / "audio_vae").symlink_to((source / "audio_vae").resolve())
(dest / MANIFEST).write_text(manifest.to_json())
"""

PEAK = """
import json, resource, sys
from pathlib import Path
import jax
from flax import nnx
from ltx_jax.checkpoint import Manifest
from ltx_jax.load import load_component

folder, offload = Path(sys.argv[1]), sys.argv[2] == "offload"
manifest = Manifest.read(folder)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_component(folder, manifest, "audio_vae")  # so that what the libraries need for themselves is there
before = peak()
model = load_component(folder, manifest, "transformer", offload=offload)
parts = [nnx.state(model.rest), *model.layers.values()] if offload else [nnx.state(model)]
size = sum(x.nbytes for part in parts for x in jax.tree.leaves(part))
layers = model.layers["blocks"].nbytes if offload else sum(x.nbytes for x in jax.tree.leaves(nnx.state(model.blocks)))
print(json.dumps({"beyond": peak() - before - size, "layer": layers / 4, "size": size}))
"""


@pytest.fixture(scope="module")
def wide_checkpoint(mini_checkpoint, tmp_path_factory) -> Path:
    """Four plain float32 blocks of width 1,024 and 512: 92 MiB each."""
    folder = tmp_path_factory.mktemp("wide")
    subprocess.run([sys.executable, "-c", WIDE, mini_checkpoint, folder], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["resident", "offload"])
def test_loading_needs_little_more_than_the_model(wide_checkpoint, form):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, wide_checkpoint, form], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["size"] > 4 * found["layer"] > 4 * 90 * 2**20
    # One layer and a half; beside them compiled programs, and what the C library keeps of freed memory while many
    # threads read (measured: 140 to 180 MB in all). A second copy of the model would be five layers.
    assert found["beyond"] <= 1.5 * found["layer"] + 96 * 2**20


# -------------------------------------------------------------------- errors


def test_a_component_that_is_not_there_is_named(mini_checkpoint, manifest):
    with pytest.raises(CheckpointError, match=r"has no upscaler_spatial_x9; it holds audio_vae, connectors"):
        load_component(mini_checkpoint, manifest, "upscaler_spatial_x9")


def test_a_part_that_is_not_there_is_named(mini_checkpoint, manifest):
    parts = manifest.parts | {"gemma": [*manifest.parts["gemma"], "layers.077"]}
    with pytest.raises(CheckpointError, match=r"lacks gemma/layers.077, which its manifest lists; convert again"):
        load_component(mini_checkpoint, replace(manifest, parts=parts), "gemma")


def test_packed_linears_that_the_model_lacks_are_named(manifest):
    shape = next(iter(manifest.quantized["transformer"].values()))
    quantized = {"transformer": {"blocks.0.video.nothing": shape}}
    with pytest.raises(CheckpointError, match=r"packs linears that transformer/blocks does not have.*video\.nothing"):
        abstract_component(replace(manifest, quantized=quantized), "transformer")


PART = "video.blocks.000"
SCALE = "video.blocks.0.attn.q_norm.scale"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda arrays: {"video.blocks.0.attn.nothing": arrays[SCALE]},
            r"connectors: the checkpoint has an array video\.blocks\.0\.attn\.nothing that the model does not know",
        ),
        (
            lambda arrays: {"video.blocks.7.attn.q_norm.scale": arrays[SCALE]},
            r"the checkpoint has an array video\.blocks\.7\.attn\.q_norm\.scale that the model does not know",
        ),
        (
            lambda arrays: {SCALE: np.append(arrays[SCALE], arrays[SCALE][:1])},
            r"connectors: video\.blocks\.0\.attn\.q_norm\.scale has shape \(\d+,\), the model needs \(\d+,\)",
        ),
        (
            lambda arrays: {"video.registers": arrays[SCALE]},
            r"connectors: video\.registers belongs into shared, but lies in video\.blocks\.000",
        ),
        (
            lambda arrays: {},
            r"connectors: 1 parameters are not in the checkpoint, among them \['video\.blocks\.0\.layer\.attn\.q_norm",
        ),
    ],
    ids=["unknown name", "no such layer", "shape", "part", "missing"],
)
def test_arrays_that_do_not_fit_are_named_before_any_is_read(damaged, manifest, monkeypatch, changed, message):
    folder = damaged(PART, lambda arrays: {n: a for n, a in arrays.items() if n != SCALE} | changed(arrays))
    monkeypatch.setattr(load, "restore", None)  # would be called to read
    with pytest.raises(CheckpointError, match=message):
        load_component(folder, manifest, "connectors")


def test_a_model_without_layers_cannot_be_streamed(mini_checkpoint, manifest):
    with pytest.raises(ValueError, match=r"video_vae has no layers to stream; transformer, connectors, gemma have"):
        load_component(mini_checkpoint, manifest, "video_vae", offload=True)

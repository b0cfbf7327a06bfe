"""Sources and destinations off the beaten track: what is accepted all the same, and what is said of the rest."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import save_file

from convert import ConvertError, convert, inspect
from convert.__main__ import main
from convert.arrays import read
from convert.destination import MARKER, WORKING
from convert.files import open_source
from hlwq_jax import LazyTensor, TensorFile, quantize
from ltx_jax.checkpoint import Manifest
from ltx_jax.orbax_io import restore
from ltx_jax.text import TextError
from tests.hlwq_jax.conftest import stored_as

BLOCK = "model.diffusion_model.transformer_blocks."


@pytest.fixture(scope="module")
def official(ltx_dir) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    file = TensorFile(ltx_dir / "checkpoint.safetensors")
    return {name: file.read(name) for name in file}, file.metadata


@pytest.fixture
def write(tmp_path):
    def apply(tensors, metadata):
        save_file(tensors, tmp_path / "source.safetensors", metadata=metadata)
        return tmp_path / "source.safetensors"

    return apply


def test_an_unknown_tensor_of_a_plain_file_is_named(official, write):
    tensors, metadata = official
    report = inspect(write(tensors | {f"{BLOCK}0.attn9.bias": np.zeros(3, np.float32)}, metadata))
    assert report.problems == (f"unknown tensor of transformer: {BLOCK}0.attn9.bias",)
    assert not report.missing


def test_integer_weights_are_refused_by_name(official, write):
    tensors, metadata = official
    name = f"{BLOCK}0.attn1.to_q.bias"
    report = inspect(write(tensors | {name: tensors[name].astype(np.int32)}, metadata))
    assert len(report.problems) == 1
    assert report.problems[0].startswith(f"wrong type: {name} is int32")


def test_names_without_their_prefix_are_understood(official, write):
    tensors, metadata = official
    bare = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in tensors.items()}
    assert inspect(write(bare, metadata)).complete
    twice = bare | {f"{BLOCK}0.attn1.to_q.bias": tensors[f"{BLOCK}0.attn1.to_q.bias"]}
    assert any(text.startswith(f"twice: {BLOCK}0.attn1.to_q.bias") for text in inspect(write(twice, metadata)).problems)


def test_a_tensor_in_two_files_is_told_with_all_other_problems(package, kept, rewrite):
    rewrite(kept, lambda tensors, _: tensors.update({"vae.stray": np.zeros(1, np.float32)}))
    name = "vae.encoder.conv_in.conv.bias"
    save_file({name: TensorFile(kept).read(name), "foreign": np.zeros(1, np.float32)}, package / "more.safetensors")
    problems = "\n".join(inspect(package).problems)
    assert "unknown tensor of video_vae: vae.stray" in problems
    assert "unknown tensor: foreign" in problems
    assert f"twice: {name} in " in problems


@pytest.mark.parametrize("section", ["3", '{"model": {}}'])
def test_a_configuration_of_another_kind_is_refused(official, write, section):
    tensors, metadata = official
    config = json.loads(metadata["config"]) | {"audio_vae": json.loads(section)}
    with pytest.raises(ConvertError, match="config"):
        inspect(write(tensors, {"config": json.dumps(config)}))


def test_a_packed_convolution_or_table_is_unpacked_to_its_own_shape(official, write, tmp_path):
    tensors, metadata = dict(official[0]), official[1]
    conv, table = "vae.encoder.conv_in.conv", f"{BLOCK}1.scale_shift_table"
    weights = {conv: tensors.pop(f"{conv}.weight"), table: tensors.pop(table)}
    for name, weight in weights.items():
        packed = quantize(weight.reshape(weight.shape[0], -1))
        parts = stored_as("V6", name, packed)
        tensors |= parts if name == conv else {k.replace(".weight__", "__"): v for k, v in parts.items()}
    manifest = convert(write(tensors, metadata), tmp_path / "out")
    assert manifest.quantized == {}
    assert set(manifest.provenance["unpacked_to_bfloat16"]) == {f"{conv}.weight", table}
    kernel = restore(tmp_path / "out/video_vae/shared")["encoder.conv_in.kernel"]
    expected = rearrange(weights[conv], "o i t h w -> t h w i o")
    assert kernel.dtype == ml_dtypes.bfloat16
    assert kernel.shape == expected.shape
    assert np.corrcoef(kernel.astype(np.float32).ravel(), expected.ravel())[0, 1] > 0.99


def test_every_upscaler_given_is_taken_and_replaces_the_packages_own(ltx_dir, mini_release, tmp_path, capsys):
    kinds = ("spatial_x2", "spatial_x1_5", "temporal_x2")
    flags = [word for kind in kinds for word in ("--upscaler", str(ltx_dir / f"upscaler_{kind}.safetensors"))]
    assert main([str(ltx_dir / "checkpoint.safetensors"), str(tmp_path / "out"), *flags]) == 0
    assert {f"upscaler_{kind}" for kind in kinds} <= set(Manifest.read(tmp_path / "out").parts)
    release = mini_release / "LTX-2.3-22B-PolarQuant-Q5"
    own = release / "upscalers/ltx-2.3-spatial-upscaler-x2-1.1.safetensors"
    given = shutil.copy(own, tmp_path / "mine.safetensors")
    source = open_source(release, upscalers=(given,))
    assert source.upscalers["upscaler_spatial_x2"].path == given
    assert str(own) in source.ignored


def test_an_upscaler_for_other_latents_is_refused(ltx_dir, mini_release):
    with pytest.raises(ConvertError, match="latents of 8 channels, this checkpoint's have 16"):
        inspect(mini_release / "LTX-2.3-22B-PolarQuant-Q5", upscalers=[ltx_dir / "upscaler_spatial_x1_5.safetensors"])


def test_a_checkpoint_below_the_source_is_not_its_text_encoder(package, mini_checkpoint):
    shutil.copytree(mini_checkpoint / "tokenizer", package / "converted/tokenizer")
    assert open_source(package).gemma is None
    with pytest.raises(ConvertError, match="converted checkpoint already"):
        open_source(mini_checkpoint)


def test_a_text_length_that_the_registers_do_not_divide_is_refused(package, mini_release, tmp_path):
    gemma = shutil.copytree(mini_release / "gemma-3-mini", tmp_path / "gemma")
    settings = json.loads((gemma / "tokenizer_config.json").read_text()) | {"model_max_length": 50}
    (gemma / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TextError, match="multiple of their 16 registers"):
        convert(package, tmp_path / "out", gemma=gemma)


def test_a_folder_that_is_there_is_filled_and_keeps_what_others_put_into_it(package, tmp_path, monkeypatch):
    dest = tmp_path / "dest"
    (dest / WORKING).mkdir(parents=True)  # as a conversion that was killed leaves it
    (dest / WORKING / MARKER).write_text("{}")
    monkeypatch.chdir(dest)
    convert(package, ".")
    assert sorted(path.name for path in dest.iterdir() if path.is_file()) == ["inventory.json", "manifest.json"]
    assert not (dest / WORKING).exists()
    (dest / "notes.txt").write_text("mine")
    convert(package, ".", overwrite=True)
    assert (dest / "notes.txt").read_text() == "mine"
    assert Manifest.read(dest).parts["transformer"]


@pytest.mark.parametrize(("shape", "pattern"), [((700, 900), "o i -> i o"), ((600, 7, 3, 60), "o i h w -> h w i o")])
def test_reading_by_slices_moves_axes_as_reading_at_once(shape, pattern):
    array = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    np.testing.assert_array_equal(read(LazyTensor.from_array("x", array), pattern), rearrange(array, pattern))

"""Published files to a checkpoint folder, and what is refused."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import save_file

from convert import ConvertError, convert
from convert.__main__ import main
from convert.mapping import flatten
from convert.tables.transformer import TRANSFORMER
from hlwq_jax import FormatError, TensorFile, open_folder, unpack_planes
from ltx_jax.checkpoint import MANIFEST, CheckpointError, Manifest
from ltx_jax.config import ConfigError
from ltx_jax.orbax_io import restore

BLOCK = "model.diffusion_model.transformer_blocks."
MANGLED = BLOCK.replace(".", "__")


def test_a_converted_package_holds_what_the_files_held(mini_checkpoint, mini_release):
    manifest = Manifest.read(mini_checkpoint)
    package = open_folder(mini_release / "LTX-2.3-22B-PolarQuant-Q5/polarquant")
    kept = TensorFile(mini_release / "LTX-2.3-22B-PolarQuant-Q5/polarquant/bf16/ltx23_bf16.safetensors")
    arrays = restore(mini_checkpoint / "transformer/blocks.001")
    rules = [rule for rule in flatten(TRANSFORMER) if rule.source.startswith("transformer_blocks.{n}.")]
    seen = set()
    for name in kept:
        if name.startswith(f"{BLOCK}1."):
            rule = next(rule for rule in rules if rule.match(name.removeprefix("model.diffusion_model.")))
            path = rule.match(name.removeprefix("model.diffusion_model."))
            np.testing.assert_array_equal(arrays[path], rearrange(kept.read(name), rule.pattern), err_msg=name)
            assert arrays[path].dtype == ml_dtypes.bfloat16
            seen.add(path)
    for path in manifest.quantized["transformer"]:
        if path.startswith("blocks.1."):
            published = next(k for k, v in manifest.linear_names.items() if v == f"transformer/{path}") + ".weight"
            weight = package.weights[published.replace(".", "__")]
            lo, hi = jnp.asarray(arrays[f"{path}.lo"]), jnp.asarray(arrays[f"{path}.hi"])
            codes = unpack_planes(lo, hi, bits=5, num_codes=weight.codes().shape[1])
            np.testing.assert_array_equal(codes, weight.codes(), err_msg=path)
            np.testing.assert_array_equal(arrays[f"{path}.norms"], weight.norms())
            seen |= {f"{path}.{part}" for part in ("lo", "hi", "norms", "scaled_centroids")}
    assert seen == set(arrays)


def test_the_manifest_says_where_everything_came_from(mini_checkpoint):
    manifest = Manifest.read(mini_checkpoint)
    assert manifest.text_length == 64
    assert manifest.model_version == "2.3.0"
    assert manifest.metadata["transformer"]["connector_num_learnable_registers"] == 16
    assert set(manifest.parts) >= {"transformer", "connectors", "gemma", "video_vae", "audio_vae", "vocoder"}
    assert manifest.parts["transformer"] == ["blocks.000", "blocks.001", "shared"]
    group = manifest.provenance["quantized"][0]
    assert (group["layout"], group["codebook"], group["bits"], group["num_weights"]) == ("V5", "B", 5, 59)
    assert len(manifest.provenance["sources"]) == 9
    assert all(len(fact["sha256"]) == 64 for fact in manifest.provenance["sources"].values())


def test_an_official_file_converts_without_packing(ltx_dir, tmp_path):
    upscaler = ltx_dir / "upscaler_spatial_x1_5.safetensors"
    manifest = convert(ltx_dir / "checkpoint.safetensors", tmp_path / "out", upscalers=(upscaler,))
    assert manifest.quantized == {}
    assert "upscaler_spatial_x1_5" in manifest.parts
    assert manifest.gemma_metadata is None
    assert manifest.num_hidden_states == 7
    arrays = restore(tmp_path / "out/transformer/shared")
    assert arrays["video.patchify.kernel"].dtype == np.float32


def test_a_destination_is_never_overwritten_by_accident(mini_checkpoint, mini_release, tmp_path, package):
    with pytest.raises(ConvertError, match="finished checkpoint"):
        convert(package, mini_checkpoint)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("irreplaceable")
    with pytest.raises(ConvertError, match="not made by convert"):
        convert(package, tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConvertError, match="is a file"):
        convert(package, tmp_path / "file")


# ------------------------------------------------------------------------ refusals


def refused(source, tmp_path, error, match, **more):
    with pytest.raises(error, match=match):
        convert(source, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.converting").exists()


def test_missing_layers_are_listed_in_groups(package, codes, rewrite, tmp_path, capsys):
    def drop(tensors, metadata):
        for name in list(tensors):
            if name.startswith(f"{MANGLED}1__"):
                del tensors[name]

    for path in codes:
        rewrite(path, drop)
    assert main([str(package), str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert "28 tensors are missing" in text
    assert "transformer_blocks 1: all 28 linears (1 blocks, 28 tensors)" in text
    assert "28 of 56 block linears are here" in text


def test_unknown_doubled_and_misshaped_tensors_are_named(package, kept, rewrite, tmp_path):
    def change(tensors, metadata):
        tensors["model.diffusion_model.proj_in.bias"] = np.zeros(3, np.float32)
        tensors["vae.decoder.conv_out.conv.bias"] = np.zeros(7, np.float32)

    rewrite(kept, change)
    refused(package, tmp_path, ConvertError, r"(?s)model.diffusion_model.proj_in.bias.*conv_out.conv.bias \[7\]")
    shutil.copy(kept, package / "again.safetensors")
    refused(package, tmp_path, ConvertError, "more than one file")


def test_lost_metadata_that_does_not_fit_the_built_in_configuration_names_misfits(package, kept, rewrite, tmp_path):
    rewrite(kept, lambda tensors, metadata: metadata.clear())
    refused(package, tmp_path, ConfigError, r"(?s)lost their configuration.*LTX-2.3 has \[")


def test_lost_metadata_is_replaced_where_everything_fits(package, kept, rewrite, tmp_path, monkeypatch):
    config = json.loads(TensorFile(kept).metadata["config"])
    monkeypatch.setattr("convert.inventory.LTX_2_3", config)
    rewrite(kept, lambda tensors, metadata: metadata.clear())
    manifest = convert(package, tmp_path / "out")
    assert "built-in" in manifest.provenance["configuration"]
    assert manifest.metadata["transformer"]["num_layers"] == 2


def test_damaged_files_are_refused_by_name(package, codes, kept, rewrite, tmp_path):
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1000])
    refused(package, tmp_path, FormatError, "ltx23_bf16.safetensors")
    kept.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9229754\n")
    refused(package, tmp_path, FormatError, "LFS")
    kept.write_text("<!DOCTYPE html><html><body>404</body></html>")
    refused(package, tmp_path, FormatError, "HTML|html")
    kept.write_bytes(whole)

    def poison(tensors, metadata):
        name = next(name for name in tensors if name.endswith("__norms"))
        tensors[name][0, 0] = np.inf

    rewrite(codes[0], poison)
    refused(package, tmp_path, FormatError, "norm 0 of .* is inf")


def test_an_unknown_layout_is_refused(package, codes, rewrite, tmp_path):
    def rename(tensors, metadata):
        for name in list(tensors):
            tensors[name.replace("__packed", ".qweight")] = tensors.pop(name)

    for path in codes:
        rewrite(path, rename)
    refused(package, tmp_path, (FormatError, ConvertError), "GPTQ|qweight|unknown")


def test_text_encoders_that_do_not_match_are_refused(package, mini_release, tmp_path):
    gemma = tmp_path / "gemma"
    shutil.copytree(mini_release / "gemma-3-mini", gemma)
    config = json.loads((gemma / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    (gemma / "config.json").write_text(json.dumps(config))
    refused(package, tmp_path, ConvertError, "gives 6 hidden states", gemma=gemma)
    (gemma / "tokenizer.json").unlink()
    refused(package, tmp_path, ConvertError, "no tokenizer.json", gemma=gemma)
    refused(package, tmp_path, ConvertError, "no folder", gemma=tmp_path / "nowhere")


def test_a_tokenizer_of_another_vocabulary_is_refused(package, mini_release, tmp_path):
    gemma = tmp_path / "gemma"
    shutil.copytree(mini_release / "gemma-3-mini", gemma)
    tokenizer = json.loads((gemma / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 5000, "content": "<extra>"})
    tokenizer["model"]["vocab"]["<extra>"] = 5000
    (gemma / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(package, tmp_path, ValueError, "ids below 1024", gemma=gemma)


def test_an_upscaler_is_known_without_its_metadata(package, tmp_path, rewrite):
    for path in (package / "upscalers").glob("*.safetensors"):
        rewrite(path, lambda tensors, metadata: metadata.clear())
        path.rename(path.with_name(f"weights-{path.stat().st_size}.safetensors"))
    manifest = convert(package, tmp_path / "out")
    assert {"upscaler_spatial_x2", "upscaler_temporal_x2"} <= set(manifest.parts)


def test_foreign_folders_are_not_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        Manifest.read(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=f"has no {MANIFEST}"):
        Manifest.read(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="not the manifest"):
        Manifest.read(tmp_path)
    (tmp_path / MANIFEST).write_text("not json")
    with pytest.raises(CheckpointError, match="not JSON"):
        Manifest.read(tmp_path)


def test_other_layouts_give_the_same_checkpoint(package, codes, rewrite, tmp_path, mini_checkpoint):
    """The package written anew with dots, one code a byte and a stored table (V1), decodes to the same planes."""
    found = open_folder(package / "polarquant")
    tensors, layers = {}, {}
    for stem, weight in found.weights.items():
        name = stem.removesuffix("__weight").replace("__", ".")
        tensors[f"{name}.codes"] = weight.codes().view(np.int8)
        tensors[f"{name}.norms"] = weight.norms()
        tensors[f"{name}.ct_scaled"] = weight.scaled_centroids
        layers[name] = {"in_features": weight.codes().shape[1], "out_features": len(weight.codes()), "bits": 5}
    for path in codes:
        path.unlink()
    save_file(tensors, package / "polarquant/codes/model.safetensors")
    sidecar = {"format": "polar_engine_v4", "block_size": 128, "layers": layers}
    (package / "polarquant/codes/polar_config.json").write_text(json.dumps(sidecar))
    manifest = convert(package, tmp_path / "out")
    assert manifest.provenance["quantized"][0]["layout"] == "V1"
    for part in ("blocks.000", "shared"):
        ours, theirs = (restore(folder / "transformer" / part) for folder in (tmp_path / "out", mini_checkpoint))
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)

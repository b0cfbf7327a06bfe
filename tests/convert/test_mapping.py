"""Tables, rules and plans."""

from convert.mapping import LINEAR, Rule, flatten, plan, source_name
from convert.tables import MAIN, SKIP, component_of
from convert.tables.transformer import TRANSFORMER

TABLE = {"layers.{n}.proj": ("blocks.{n}.linear", LINEAR), "scale": ("scale", "d -> d")}
TARGET = {"blocks.0.linear.kernel": (3, 2), "blocks.0.linear.bias": (2,), "scale": (4,)}
SOURCE = {"layers.0.proj.weight": (2, 3), "layers.0.proj.bias": (2,), "scale": (4,)}


def test_a_complete_source_is_planned_in_full():
    found = plan(TABLE, SOURCE, TARGET)
    assert found.ok
    assert {step.source: step.target for step in found.steps} == {
        "layers.0.proj.weight": "blocks.0.linear.kernel",
        "layers.0.proj.bias": "blocks.0.linear.bias",
        "scale": "scale",
    }


def test_all_misfits_are_reported_at_once():
    source = {"layers.0.proj.weight": (2, 4), "layers.1.proj.bias": (2,), "scale": (4,), "odd": (1,)}
    found = plan(TABLE, source, TARGET)
    assert found.unknown == ["layers.1.proj.bias", "odd"]
    assert found.missing == ["layers.0.proj.bias"]
    assert found.misshaped == ["layers.0.proj.weight [2, 4] -> blocks.0.linear.kernel, which needs [3, 2]"]


def test_two_names_for_one_parameter_are_reported():
    table = {"a": ("x", "d -> d"), "b": ("x", "d -> d")}
    found = plan(table, {"a": (1,), "b": (1,)}, {"x": (1,)})
    assert found.doubled == ["x is filled by both a and b"]


def test_rules_match_numbers_alone_and_invert():
    rule = Rule("blocks.{n}.net.{m}.weight", "b.{n}.n.{m}.kernel", "o i -> i o")
    assert rule.match("blocks.12.net.0.weight") == "b.12.n.0.kernel"
    assert rule.match("blocks.x.net.0.weight") is None
    assert rule.match("blocks.1.net.0.weightx") is None
    assert source_name([rule], "b.7.n.2.kernel") == "blocks.7.net.2.weight"
    assert source_name([rule], "c") == "(no rule for) c"


def test_every_rule_of_every_table_inverts():
    for _, table in MAIN.values():
        for rule in flatten(table):
            name = rule.source.replace("{n}", "3").replace("{m}", "5")
            ours = rule.match(name)
            assert ours is not None
            assert source_name(list(flatten(table)), ours) == name


def test_names_go_to_their_components():
    names = {
        "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight": "transformer",
        "model.diffusion_model.video_embeddings_connector.learnable_registers": "connectors",
        "text_embedding_projection.video_aggregate_embed.bias": "connectors",
        "vae.decoder.conv_in.conv.weight": "video_vae",
        "audio_vae.decoder.conv_in.conv.weight": "audio_vae",
        "vocoder.vocoder.conv_pre.weight": "vocoder",
        "optimizer.state": None,
    }
    assert {name: component_of(name) for name in names} == names
    assert "vocoder.mel_stft.stft_fn.inverse_basis" in SKIP


def test_the_transformer_table_names_28_linears_a_block():
    block = [rule for rule in flatten(TRANSFORMER) if rule.source.startswith("transformer_blocks.{n}.")]
    linears = [rule for rule in block if rule.target.endswith(".kernel") and "gate" not in rule.source]
    assert (len(linears), len(block)) == (28, 86)

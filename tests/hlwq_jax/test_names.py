import pytest

from hlwq_jax import FormatError, resolve_stems

NAMES = ["model.diffusion_model.blocks.0.attn1.to_q.weight", "model.diffusion_model.blocks.0.attn1.to_q.bias"]


@pytest.mark.parametrize(
    "stem",
    [
        "model__diffusion_model__blocks__0__attn1__to_q__weight",
        "model__diffusion_model__blocks__0__attn1__to_q",
        "blocks__0__attn1__to_q__weight",
        "blocks__0__attn1__to_q",
        "diffusion_model__blocks__0__attn1__to_q",
        "model.diffusion_model.blocks.0.attn1.to_q.weight",
        "model.diffusion_model.blocks.0.attn1.to_q",
        "blocks.0.attn1.to_q.weight",
    ],
)
def test_stems_find_their_parameter_in_every_spelling(stem):
    resolved = resolve_stems([stem], NAMES)
    assert resolved.names == {stem: NAMES[0]}
    assert not resolved.unknown


def test_a_prefix_may_be_in_the_stem_alone():
    assert resolve_stems(["model__diffusion_model__a__weight"], ["a.weight"]).names == {
        "model__diffusion_model__a__weight": "a.weight"
    }


def test_names_with_underscores_beside_dots_come_back():
    names = ["net.a__b.weight", "net._c.weight", "net.d_.e_.weight"]
    stems = ["net__a__b__weight", "net___c", "net__d___e___weight"]
    assert [resolve_stems(stems, names).names[stem] for stem in stems] == names


def test_ambiguous_stems_raise_with_both_names():
    with pytest.raises(FormatError, match=r"a__b__c: ambiguous.*a\.b__c\.weight, a__b\.c\.weight"):
        resolve_stems(["a__b__c"], ["a.b__c.weight", "a__b.c.weight"])
    # With its dots the stem says which one is meant.
    assert resolve_stems(["a.b__c"], ["a.b__c.weight", "a__b.c.weight"]).names == {"a.b__c": "a.b__c.weight"}


def test_own_names_go_before_names_with_a_prefix():
    names = ["x.weight", "model.x.weight"]
    assert resolve_stems(["x", "model__x"], names).names == {"x": "x.weight", "model__x": "model.x.weight"}


def test_two_stems_of_one_parameter_raise():
    with pytest.raises(FormatError, match=r"both stand for a\.weight"):
        resolve_stems(["a", "a__weight"], ["a.weight"])


def test_unknown_stems_are_replaced_plainly_and_reported():
    resolved = resolve_stems(["x__y_z__weight"], ["a.weight"])
    assert resolved.names == {"x__y_z__weight": "x.y_z.weight"}
    assert resolved.unknown == ("x__y_z__weight",)

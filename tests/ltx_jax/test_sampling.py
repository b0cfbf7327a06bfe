"""Schedules, single steps and whole samplers against the reference."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from ltx_jax.sampling import (
    DISTILLED_SIGMAS,
    DISTILLED_SIGMAS_STAGE_2,
    ancestral_euler,
    ancestral_step,
    beta_sigmas,
    cfgpp_step,
    euler,
    euler_step,
    gradient_estimating_euler,
    linear_quadratic_sigmas,
    ltx2_sigmas,
    normalised_noise,
    res2s_coefficients,
    res_2s,
    sde_noise_step,
)

ULPS = 1.2e-7  # one unit in the last place of a float32 below 1


@pytest.fixture(scope="module")
def data(reference):
    return reference("sampling")


def test_shifted_schedules_agree_at_every_token_count(data):
    for name, sigmas in data.items():
        found = re.fullmatch(r"ltx2\.(default|nostretch|tokens(\d+))\.steps(\d+)", name)
        if found:
            ours = ltx2_sigmas(
                int(found[3]),
                num_tokens=int(found[2] or 4096),
                terminal=None if found[1] == "nostretch" else 0.1,
            )
            # Bit for bit, also at 32,640 tokens, where the reference's float32 rounding shows in the third digit.
            np.testing.assert_array_equal(ours, sigmas, err_msg=name)


def test_other_schedules_agree(data):
    np.testing.assert_allclose(linear_quadratic_sigmas(20), data["linear_quadratic.steps20"], atol=ULPS, rtol=0)
    np.testing.assert_allclose(beta_sigmas(12), data["beta.steps12"], atol=ULPS, rtol=0)
    np.testing.assert_array_equal(np.float32(DISTILLED_SIGMAS), data["distilled.stage1"])
    np.testing.assert_array_equal(np.float32(DISTILLED_SIGMAS_STAGE_2), data["distilled.stage2"])


@pytest.mark.parametrize("step", [0, 3, 7])
def test_single_steps_agree(data, step):
    x, x0, uncond, noise = (data[f"step.{name}"] for name in ("x", "x0", "uncond", "noise"))
    sigma, sigma_next = map(float, data["step.sigmas"][step : step + 2])
    ours = {
        "euler": euler_step(x, x0, sigma, sigma_next),
        "euler_ancestral.eta1": ancestral_step(x, x0, noise, sigma, sigma_next, 1.0),
        "euler_ancestral.eta0_5": ancestral_step(x, x0, noise, sigma, sigma_next, 0.5),
        "cfgpp": cfgpp_step(x, x0, uncond, noise, sigma, sigma_next),
        "res2s_sde.eta0_5": sde_noise_step(x.astype(float), x0.astype(float), noise, sigma, sigma_next),
    }
    for name, y in ours.items():
        # Values up to 5; the sde step divides by a difference of sigmas of 0.03.
        np.testing.assert_allclose(y, data[f"{name}.{step}"], atol=1e-5, rtol=0, err_msg=name)


def test_res2s_coefficients_agree(data):
    for name, expected in data.items():
        if name.startswith("res2s_coeff.h"):
            np.testing.assert_allclose(res2s_coefficients(float(name[13:])), expected, rtol=1e-5)


def test_res2s_coefficients_are_smooth_where_the_closed_form_cancels():
    low, high = (np.array(res2s_coefficients(h)) for h in (0.00999, 0.01001))
    np.testing.assert_allclose(low, high, atol=2e-5)


@pytest.mark.parametrize("sampler", [euler, gradient_estimating_euler])
def test_samplers_end_at_the_estimate_and_skip_an_absent_modality(sampler):
    target = jnp.full((1, 2, 3), 0.5)
    calls = []

    def predict(step, sigma, tokens):
        calls.append((step, round(sigma, 3)))
        return target, None

    out = sampler(predict, (jnp.ones((1, 2, 3)), None), [1.0, 0.5, 0.25, 0.0])
    np.testing.assert_allclose(out[0], target, atol=1e-6)
    assert out[1] is None
    assert calls == [(0, 1.0), (1, 0.5), (2, 0.25)]


def test_samplers_with_noise_end_at_the_estimate():
    target = jnp.full((1, 2, 3), 0.5)
    calls = []

    def predict(step, sigma, tokens):
        calls.append(sigma)
        return (target,)

    noise = lambda tokens: tuple(jnp.ones_like(x) for x in tokens)  # noqa: E731
    for sampler, count in ((ancestral_euler, 3), (res_2s, 7)):
        calls.clear()
        out = sampler(predict, (jnp.ones((1, 2, 3)),), [1.0, 0.5, 0.25, 0.0], noise=noise)
        np.testing.assert_allclose(out[0], target, atol=1e-6)
        assert len(calls) == count
    assert calls[-1] == pytest.approx(0.0011)


def test_tokens_stay_in_their_dtype():
    tokens = jnp.ones((1, 2, 3), jnp.bfloat16)
    for sampler in (euler, gradient_estimating_euler):
        out = sampler(lambda step, sigma, x: x, tokens, [1.0, 0.5, 0.1])
        assert out.dtype == jnp.bfloat16


def test_normalised_noise_has_no_mean_and_unit_deviation():
    noise = normalised_noise(jnp.asarray(np.random.default_rng(0).normal(3, 2, (2, 50, 40)), jnp.float32))
    np.testing.assert_allclose(noise.mean(axis=(-2, -1)), 0, atol=1e-6)
    np.testing.assert_allclose(noise.std(axis=(-2, -1), ddof=1), 1, atol=1e-6)

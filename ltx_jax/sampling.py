"""Sigma schedules and samplers, as plain functions.

A sampler takes `predict(step, sigma, tokens) -> denoised` and walks down the sigmas; tokens are any pytree of arrays
(here a pair of video and audio tokens, one of which may be None). A new sampler is one more function like `euler`.

Source: `schedulers.py` and `diffusion_steps.py` in Lightricks/LTX-2, ltx_core/components; res_2s after
https://github.com/ClownsharkBatwing/RES4LYF and the exponential integrators of https://arxiv.org/abs/2308.02157.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import beta as beta_distribution

Tokens = Float[Array, "batch tokens channels"]
Tree = Any  # a pytree of tokens
Sigmas = Sequence[float] | np.ndarray  # falling noise levels
Predict = Callable[[int, float, Tree], Tree]
Noise = Callable[[Tree], Tree]  # fresh standard normal noise, shaped like its argument

DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
DISTILLED_SIGMAS_STAGE_2 = (0.909375, 0.725, 0.421875, 0.0)


# ------------------------------------------------------------------ schedules


def ltx2_sigmas(num_steps: int, *, num_tokens: int = 4096, terminal: float | None = 0.1) -> np.ndarray:
    """The shifted schedule of the dev checkpoint: `num_steps + 1` falling levels, float32, the last 0.

    The shift grows linearly from 0.95 at 1,024 tokens to 2.05 at 4,096. The released pipelines, all but HQ, always
    use 4,096. With `terminal` the non-zero levels are stretched so that the last of them equals it.

    The arithmetic is float32, operation by operation as in the reference: at tens of thousands of tokens 1 - sigma
    is a few units in the last place and the stretch divides by it.
    """
    one = np.float32(1)
    slope = (2.05 - 0.95) / (4096 - 1024)
    shift = np.float32(math.exp(num_tokens * slope + 0.95 - 1024 * slope))
    levels = _linspace_down(num_steps)[:-1]
    # A number divided by an array is the number times the reciprocal in the reference's framework.
    sigmas = (one / (shift + (one / levels - one))) * shift
    if terminal is not None:
        rest = one - sigmas
        sigmas = one - rest / (rest[-1] / np.float32(1 - terminal))
    return np.append(sigmas, np.float32(0))


def _linspace_down(num_steps: int) -> np.ndarray:
    """1 to 0 in float32 as the reference's framework counts: from each end to the middle, the step itself float32."""
    step = np.float64(np.float32(-1) / np.float32(num_steps))
    index = np.arange(num_steps + 1)
    levels = np.where(index < (num_steps + 1) // 2, 1 + step * index, -step * (num_steps - index))
    return levels.astype(np.float32)


def linear_quadratic_sigmas(num_steps: int, *, threshold: float = 0.025, linear_steps: int | None = None) -> np.ndarray:
    """Linear noise down to `1 - threshold` in the first (half of the) steps, quadratic from there to 0."""
    linear_steps = num_steps // 2 if linear_steps is None else linear_steps
    if num_steps < 2 or linear_steps < 1:
        return np.array([1.0, 0.0], np.float32)
    linear = [i * threshold / linear_steps for i in range(linear_steps)]
    quadratic_steps = num_steps - linear_steps
    difference = linear_steps - threshold * num_steps
    quadratic = difference / (linear_steps * quadratic_steps**2)
    slope = threshold / linear_steps - 2 * difference / quadratic_steps**2
    constant = quadratic * linear_steps**2
    curve = [quadratic * i**2 + slope * i + constant for i in range(linear_steps, num_steps)]
    return np.array([1 - x for x in (*linear, *curve, 1.0)], np.float32)


def beta_sigmas(
    num_steps: int, *, alpha: float = 0.6, beta: float = 0.6, shift: float = 2.37, num_levels: int = 10_000
) -> np.ndarray:
    """Levels at the quantiles of a beta distribution, out of a table of `num_levels` shifted sigmas; the last 0.

    Source: Lee et al., Beta Sampling is All You Need, https://arxiv.org/abs/2407.12173. Equal entries are dropped.
    """
    quantiles = beta_distribution.ppf(1 - np.linspace(0, 1, num_steps, endpoint=False), alpha, beta)
    indices = np.unique(np.rint(quantiles * (num_levels - 1)).astype(int))[::-1]
    levels = (indices + 1) / num_levels
    sigmas = math.exp(shift) / (math.exp(shift) + 1 / levels - 1)
    return np.append(sigmas, 0.0).astype(np.float32)


# ---------------------------------------------------------------- single steps


@jax.jit
def euler_step(tokens: Tokens, denoised: Tokens, sigma, sigma_next) -> Tokens:
    """Moves tokens from `sigma` to `sigma_next` along the straight line to `denoised`; float32 inside."""
    x, d = tokens.astype(jnp.float32), denoised.astype(jnp.float32)
    return (x + (x - d) / sigma * (sigma_next - sigma)).astype(tokens.dtype)


@jax.jit
def ancestral_step(tokens: Tokens, denoised: Tokens, noise: Tokens, sigma, sigma_next, eta=1.0) -> Tokens:
    """An Euler step to below `sigma_next`, then noise back up to it (rectified-flow form)."""
    x, d, n = (a.astype(jnp.float32) for a in (tokens, denoised, noise))
    down = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
    x = x + (x - d) / sigma * (down - sigma)
    rescale = (1 - sigma_next) / (1 - down)
    up = jnp.sqrt(jnp.maximum(sigma_next**2 - (down * rescale) ** 2, 0))
    return jnp.where(sigma_next > 0, rescale * x + up * n, d).astype(tokens.dtype)


@jax.jit
def cfgpp_step(
    tokens: Tokens, denoised: Tokens, unconditional: Tokens, noise: Tokens, sigma, sigma_next, eta=1.0
) -> Tokens:
    """An ancestral CFG++ step: towards the guided estimate, with the direction of the unconditional one.

    Source: Chung et al., CFG++, https://arxiv.org/abs/2406.08070, in the noise-to-signal ratio of rectified flow.
    """
    x, d, u, n = (a.astype(jnp.float32) for a in (tokens, denoised, unconditional, noise))
    # A sigma of exactly 1 has no signal; a hair of it keeps the ratio finite.
    signal, signal_next = jnp.maximum(1 - sigma, 1e-7), 1 - sigma_next
    ratio, ratio_next = sigma / signal, sigma_next / signal_next
    up = jnp.minimum(ratio_next, eta * jnp.sqrt(jnp.maximum(ratio_next**2 * (1 - (ratio_next / ratio) ** 2), 0)))
    down = jnp.sqrt(jnp.maximum(ratio_next**2 - up**2, 0))
    direction = (x - signal * u) / sigma
    y = signal_next * (d + down * direction + up * n)
    return jnp.where(sigma_next > 0, y, d).astype(tokens.dtype)


def sde_noise_step(x, x_next, noise, sigma: float, sigma_next: float, eta: float = 0.5):
    """Replaces part of the noise that `x_next` (at `sigma_next`, reached from `x` at `sigma`) holds by fresh noise."""
    if sigma_next == 0 or eta == 0:
        return x_next
    up = sigma_next * eta
    residual = math.sqrt(max(sigma_next**2 - up**2, 0.0))
    ratio = (1 - sigma_next) + residual
    direction = (x - x_next) / (sigma - sigma_next)
    clean = x - sigma * direction
    return ratio * (clean + residual / ratio * direction) + up * noise


def res2s_coefficients(h: float, c2: float = 0.5) -> tuple[float, float, float]:
    """`a21, b1, b2` of the two-stage exponential integrator for a step of `h` in log sigma."""

    def phi(order: int, z: float) -> float:
        if abs(z) < 1e-2:  # The closed form cancels; the series is exact to double precision here.
            return sum(z**k / math.factorial(k + order) for k in range(8))
        value = math.expm1(z) / z
        return value if order == 1 else (value - 1) / z

    a21 = c2 * phi(1, -h * c2)
    b2 = phi(2, -h) / c2
    return a21, phi(1, -h) - b2, b2


# -------------------------------------------------------------------- samplers


def euler(predict: Predict, tokens: Tree, sigmas: Sigmas) -> Tree:
    """Straight steps: one model call each."""
    for step, (sigma, sigma_next) in enumerate(pairwise(map(float, sigmas))):
        denoised = predict(step, sigma, tokens)
        tokens = jax.tree.map(lambda x, d: euler_step(x, d, sigma, sigma_next), tokens, denoised)  # noqa: B023
    return tokens


def gradient_estimating_euler(predict: Predict, tokens: Tree, sigmas: Sigmas, *, gamma: float = 2.0) -> Tree:
    """Euler whose velocity is extrapolated from the previous one; the last step takes the estimate itself.

    Source: Permenter and Yuan, https://arxiv.org/abs/2306.04848.
    """
    previous = None
    for step, (sigma, sigma_next) in enumerate(pairwise(map(float, sigmas))):
        denoised = predict(step, sigma, tokens)
        if sigma_next == 0:
            return denoised
        velocity = jax.tree.map(lambda x, d: (x.astype(jnp.float32) - d) / sigma, tokens, denoised)  # noqa: B023
        used = velocity
        if previous is not None:
            used = jax.tree.map(lambda v, p: gamma * (v - p) + p, velocity, previous)
        tokens = jax.tree.map(
            lambda x, v: (x.astype(jnp.float32) + v * (sigma_next - sigma)).astype(x.dtype),  # noqa: B023
            tokens,
            used,
        )
        previous = velocity
    return tokens


def ancestral_euler(predict: Predict, tokens: Tree, sigmas: Sigmas, *, noise: Noise, eta: float = 1.0) -> Tree:
    """Euler with fresh noise at every step."""
    for step, (sigma, sigma_next) in enumerate(pairwise(map(float, sigmas))):
        denoised = predict(step, sigma, tokens)
        tokens = jax.tree.map(
            lambda x, d, n: ancestral_step(x, d, n, sigma, sigma_next, eta),  # noqa: B023
            tokens,
            denoised,
            noise(tokens),
        )
    return tokens


def res_2s(predict: Predict, tokens: Tree, sigmas: Sigmas, *, noise: Noise, eta: float = 0.5) -> Tree:
    """Second-order exponential integrator with two model calls a step and fresh noise at both; the HQ sampler.

    All of it in float64 numpy, as in the reference. When the sigmas end in 0 the last step goes to 0.0011 instead,
    and one more model call there gives the result.
    """
    sigmas = list(map(float, sigmas))
    if sigmas[-1] == 0:
        sigmas[-1:] = [0.0011, 0.0]
    like = tokens
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), tokens)
    call = 0

    def denoise(sigma: float, x: Tree) -> Tree:
        nonlocal call
        narrow = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), x, like)
        denoised = predict(call, sigma, narrow)
        call += 1
        return jax.tree.map(lambda d: np.asarray(d, np.float64), denoised)

    def renoise(x: Tree, x_next: Tree, sigma: float, sigma_next: float) -> Tree:
        fresh = noise(like)
        return jax.tree.map(
            lambda a, b, n: sde_noise_step(a, b, np.asarray(n, np.float64), sigma, sigma_next, eta), x, x_next, fresh
        )

    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(sigma, wide)
        if sigma_next == 0:
            wide = denoised
            break
        h = math.log(sigma / sigma_next)
        a21, b1, b2 = res2s_coefficients(h)
        middle = math.sqrt(sigma * sigma_next)

        x_mid = jax.tree.map(lambda x, d: x + h * a21 * (d - x), wide, denoised)  # noqa: B023
        x_mid = renoise(wide, x_mid, sigma, middle)
        anchor = wide
        if h < 0.5 and sigma > 0.03:
            # The point from which the noised midpoint would have been reached without noise, by fixed-point rounds.
            for _ in range(100):
                anchor = jax.tree.map(lambda m, x, d: m - h * a21 * (d - x), x_mid, anchor, denoised)  # noqa: B023
        denoised_mid = denoise(middle, x_mid)
        x_next = jax.tree.map(
            lambda x, d1, d2: x + h * (b1 * (d1 - x) + b2 * (d2 - x)),  # noqa: B023
            anchor,
            denoised,
            denoised_mid,
        )
        wide = renoise(anchor, x_next, sigma, sigma_next)
    return jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), wide, like)


def num_calls(sampler: Callable[..., Tree], sigmas: Sigmas) -> int:
    """How often a sampler calls the model on its way down: once a step, but for res_2s."""
    steps = len(sigmas) - 1
    if getattr(sampler, "func", sampler) is res_2s:
        return 2 * steps + int(sigmas[-1] == 0)
    return steps


def normalised_noise(noise: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Noise with mean 0 and deviation 1 as a whole, then over its last two axes (how res_2s draws it)."""
    noise = (noise - jnp.mean(noise)) / jnp.std(noise, ddof=1)
    mean = jnp.mean(noise, axis=(-2, -1), keepdims=True)
    return (noise - mean) / jnp.std(noise, axis=(-2, -1), keepdims=True, ddof=1)

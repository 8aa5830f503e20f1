"""Times in closed form: exact cases by network and batch, and under Gaussian noise.

    python docs/assets/private_noise.py [denoiser-mnist.safetensors]

Writes one line per cell, with Clopper-Pearson intervals (95 %).
"""

import sys
from dataclasses import replace

import torch
from scipy.stats import beta

import gradleak as gl
from gradleak import models, priors
from gradleak.attacks.closed_form import timesteps
from gradleak.errors import NotApplicable
from gradleak.mechanisms import Denoising
from gradleak.types import Exchange, ModelState

CASES = 20
RATIOS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
DATA = gl.data.load("mnist-5k")


def interval(hits: int, n: int) -> str:
    low = beta.ppf(0.025, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1.0
    return f"{hits}/{n} [{low:.2f}, {high:.2f}]"


def noisy(seen, ratio, seed):
    """White noise on every tensor, its std `ratio` times the rms of the first time layer's."""
    stream = torch.Generator().manual_seed(1000 + seed)
    first = next(iter(timesteps.time_inputs(seen.state, seen.data.shape, 1000)))
    rms = float(seen.update.values[f"{first}.weight"].square().mean().sqrt())
    values = {
        k: v + ratio * rms * torch.randn(v.shape, generator=stream)
        for k, v in seen.update.values.items()
    }
    changed = replace(seen.update, values=values)
    return replace(seen, exchanges=(Exchange(seen.state, changed),)), ratio * rms


def found(seen, layers):
    try:
        return set(timesteps.recovered_times(seen, layers=layers).distinct)
    except NotApplicable:
        return set()


def main() -> None:
    networks = {n: models.build(n, DATA.spec, seed=0) for n in ("unet", "unet-diffusers")}
    if len(sys.argv) > 1:
        networks["unet, trained"] = models.build("unet", DATA.spec, seed=0)
        networks["unet, trained"].load_state_dict(priors.load(sys.argv[1]).network)
    slow = timesteps.time_inputs
    for name, network in networks.items():
        state = ModelState.of(network)
        known = slow(state, DATA.spec.shape, 1000)
        timesteps.time_inputs = lambda *_, k=known: k
        for size in (1, 2, 3, 4):
            exact = {"first": 0, "all": 0}
            noise = {(r, layers): 0 for r in RATIOS for layers in exact}
            stds = {r: [] for r in RATIOS}
            for seed in range(CASES):
                scenario = gl.Scenario(DATA, state, Denoising(), batch_size=size)
                seen, truth = gl.simulate(scenario, generator=torch.Generator().manual_seed(seed))
                times = set(truth.draws.times.flatten().tolist())
                for layers in exact:
                    exact[layers] += found(seen, layers) == times
                if size > 1:
                    continue
                for ratio in RATIOS:
                    other, std = noisy(seen, ratio, seed)
                    stds[ratio].append(std)
                    for layers in exact:
                        noise[ratio, layers] += found(other, layers) == times
            for layers, hits in exact.items():
                print(f"{name} | b={size} | {layers} | {interval(hits, CASES)}", flush=True)
            if size == 1:
                for ratio in RATIOS:
                    std = sorted(stds[ratio])[CASES // 2]
                    cells = [interval(noise[ratio, layers], CASES) for layers in exact]
                    print(f"{name} | {ratio} rms, std {std:.1e} | {' | '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()

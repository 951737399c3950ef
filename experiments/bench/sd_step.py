"""One guided step of DiffDFKD at the size of Stable Diffusion 1.5, without its weights.

    python experiments/bench/sd_step.py [--batch=1,4,8] [--size=64] [--run] [--tiny] [--output=DIR]

A step is what `generator_step` does: the U-Net with and without text, the decoder, a CIFAR
ResNet-34, the gradient with respect to the latents through all of them, and the U-Net at the new
latents.  The compiler reports its FLOPs and peak memory in bfloat16, with and without blocks
recomputed for the gradient.  --run, on a GPU, also runs the step with random weights: seconds for a
step, and for an image of 50 steps.  On a CPU the reported memory says less, since less is fused.
--tiny narrows the networks, to try this script.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import build, diffusion
from dfkd_jax.configs import cifar10
from dfkd_jax.contract import Frozen, Models
from dfkd_jax.diffusion import clip_text, prior, schedule, unet, vae
from dfkd_jax.distributed import sharding
from dfkd_jax.methods import diffdfkd
from dfkd_jax.methods.shared import trajectories
from dfkd_jax.storage import workdir

UNET = {
    '_class_name': 'UNet2DConditionModel', 'attention_head_dim': 8, 'cross_attention_dim': 768,
    'block_out_channels': [320, 640, 1280, 1280], 'center_input_sample': False,
    'down_block_types': ['CrossAttnDownBlock2D'] * 3 + ['DownBlock2D'], 'downsample_padding': 1,
    'flip_sin_to_cos': True, 'freq_shift': 0, 'in_channels': 4, 'layers_per_block': 2,
    'norm_eps': 1e-5, 'norm_num_groups': 32, 'out_channels': 4, 'sample_size': 64,
    'up_block_types': ['UpBlock2D'] + ['CrossAttnUpBlock2D'] * 3,
}  # fmt: skip
VAE = {
    '_class_name': 'AutoencoderKL', 'block_out_channels': [128, 256, 512, 512],
    'down_block_types': ['DownEncoderBlock2D'] * 4, 'in_channels': 3, 'latent_channels': 4,
    'layers_per_block': 2, 'norm_num_groups': 32, 'out_channels': 3, 'sample_size': 512,
    'up_block_types': ['UpDecoderBlock2D'] * 4,
}  # fmt: skip
TEXT = {
    'architectures': ['CLIPTextModel'], 'hidden_act': 'quick_gelu', 'hidden_size': 768,
    'intermediate_size': 3072, 'layer_norm_eps': 1e-5, 'max_position_embeddings': 77,
    'num_attention_heads': 12, 'num_hidden_layers': 12, 'vocab_size': 49408,
}  # fmt: skip
SCHEDULER = {
    '_class_name': 'DDPMScheduler', 'beta_schedule': 'scaled_linear', 'beta_start': 0.00085,
    'beta_end': 0.012, 'clip_sample': False, 'steps_offset': 1,
}  # fmt: skip
STEPS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch', default='1')
    parser.add_argument('--size', type=int, default=64, help='of the latents; 64 is 512 pixels')
    parser.add_argument('--remat', default='1,0')
    parser.add_argument('--run', action='store_true')
    parser.add_argument('--tiny', action='store_true', help='narrow networks: measures nothing')
    parser.add_argument('--output', type=Path, help='of sd_step.csv, row by row')
    args = parser.parse_args()
    if args.tiny:
        UNET['block_out_channels'], VAE['block_out_channels'] = [32] * 4, [32] * 4
        TEXT.update(num_hidden_layers=1, intermediate_size=64)
    rows = []
    for batch in map(int, args.batch.split(',')):
        for remat in (flag == '1' for flag in args.remat.split(',')):
            rows.append(measure(batch, args.size, remat, args.run))
            print(rows[-1], flush=True)
            if args.output:
                args.output.mkdir(parents=True, exist_ok=True)
                with open(args.output / 'sd_step.csv', 'w', newline='') as file:
                    writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
                    writer.writeheader()
                    writer.writerows(rows)


def measure(batch: int, size: int, remat: bool, run: bool) -> dict[str, Any]:
    """One row: what the compiler reports of a step, and with `run` how long the step takes."""
    config = cifar10.get_config('diffdfkd')
    config.synthesis.update(batch_size=batch, cutmix=batch > 1)
    network = unet.UNet(unet.from_config(UNET), jnp.bfloat16, remat)
    decoder = vae.AutoencoderKL(vae.from_config(VAE), jnp.bfloat16, remat)
    text = clip_text.CLIPText(clip_text.from_config(TEXT))
    table = schedule.from_config(SCHEDULER)
    functions = prior.latent_functions(network, decoder, text, table)
    shape = (size, size, 4)
    model = diffusion.Prior({}, functions, table, shape, network.config.divisor, 8, None)
    nets = Models(
        build.make_classifier('resnet34', config.data),
        build.make_classifier('resnet18', config.data),
        None,
        10, (32, 32, 3), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), model,
    )  # fmt: skip
    method = diffdfkd.make(config, nets, sharding.Shards())
    x, t = np.zeros((1, *shape), np.float32), np.zeros(1, np.int32)
    cond, tokens = np.zeros((1, 77, 768), np.float32), np.zeros((1, 77), np.int32)
    images = np.zeros((1, 8 * size, 8 * size, 3), np.float32)

    def init(key: jax.Array) -> Frozen:
        """Random weights: only speed and memory are measured."""
        params = {
            'unet': network.init(key, x, t, cond)['params'],
            'vae': decoder.init(key, images)['params'],
            'text': text.init(key, tokens)['params'],
        }
        states = jnp.zeros((2, 77, 768))
        return Frozen(nets.teacher.init(key, np.zeros((1, 32, 32, 3), np.float32)),
                      trajectories.FrozenPrior(params, states))  # fmt: skip

    key = jax.random.key(0)
    frozen = jax.eval_shape(init, key)
    state = jax.eval_shape(method.init, frozen, key)
    started = time.monotonic()
    step = jax.jit(method.generator_step, donate_argnums=1).lower(frozen, state, key).compile()
    compiling = time.monotonic() - started
    memory = step.memory_analysis()
    row = {
        'batch': batch,
        'pixels': 8 * size,
        'recomputed': remat,
        'teraflops': round(step.cost_analysis()['flops'] / 1e12, 2),
        'weights_gib': round(memory.argument_size_in_bytes / 2**30, 2),
        'temporary_gib': round(memory.temp_size_in_bytes / 2**30, 2),
        'compile_seconds': round(compiling),
        'device': workdir.device(),
        'jax': jax.__version__,
    }
    if run:
        frozen, state = jax.jit(init)(key), None
        state = jax.jit(method.init)(frozen, key)
        seconds = []
        for i in range(6):
            started = time.monotonic()
            state, _ = step(frozen, state, jax.random.fold_in(key, i))
            jax.block_until_ready(state)
            seconds.append(time.monotonic() - started)
        median = float(np.median(seconds[1:]))
        row |= {'step_seconds': round(median, 4), 'image_seconds': round(median * STEPS / batch, 2)}
    return row


if __name__ == '__main__':
    main()

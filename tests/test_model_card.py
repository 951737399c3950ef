"""The model card beside a student: true, and readable by Hugging Face."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ml_collections import ConfigDict

from dfkd_jax import diffusion
from dfkd_jax.configs import cifar10, common, digits, fashion_mnist
from dfkd_jax.reporting import artifacts, model_card
from dfkd_jax.storage import files, model_folder

ENTRIES = {
    'model': 'resnet8_half', 'num_classes': 3, 'channels': 3, 'image_size': 16, 'dataset': 'mine',
    'method': 'nayer', 'seed': 7, 'accuracy': 91.25, 'teacher': 'resnet8',
    'teacher_file': 'best: "of" all.pth', 'teacher_sha256': 'ab' * 32, 'teacher_accuracy': 93.5,
    'teacher_accuracy_stated': 93.75,
    'saw': ['No real image.'], 'resize': 'crop', 'mean': [0.5, 0.25, 0.125], 'std': [1.0, 2.0, 3.0],
    'class_names': ['cat', 'dog', 'a "bird"'],
}  # fmt: skip


def parts(entries: Any) -> tuple[dict[str, Any], str]:
    """The front matter and the rest of a card."""
    start, front, rest = model_card.text(entries).split('---\n', 2)
    assert start == ''
    return yaml.safe_load(front), rest


def test_the_front_matter_is_what_hugging_face_reads() -> None:
    front, _ = parts(ENTRIES)
    assert front['license'] == 'unknown' and front['pipeline_tag'] == 'image-classification'
    assert front['library_name'] == 'dfkd_jax' and front['metrics'] == ['accuracy']
    assert 'data-free-knowledge-distillation' in front['tags']
    [index] = front['model-index']
    assert index['name'] == 'resnet8_half, distilled from resnet8 by NAYER'
    [result] = index['results']
    assert result['task'] == {'type': 'image-classification'}
    assert result['dataset'] == {'type': 'mine', 'name': 'mine', 'split': 'test'}
    [metric] = result['metrics']
    assert metric['type'] == 'accuracy' and metric['value'] == 0.9125 and '7' in metric['name']


def test_the_card_says_all_of_it() -> None:
    _, rest = parts(ENTRIES)
    for told in (
        'file: `best: "of" all.pth`', f'sha256: `{"ab" * 32}`', 'accuracy: 93.50 % of the same',
        'accuracy that its file states: 93.75 %',
        '[NAYER](https://arxiv.org/abs/2310.00258)', '- No real image.', '91.25 %, at the last',
        'the seed 7', '16 x 16 pixels, RGB', 'the short side to size * 256 / 224',
        'minus (0.5, 0.25, 0.125), divided by (1, 2, 3)', 'cat, dog, a "bird"', '## Licence',
    ):  # fmt: skip
        assert told in rest, told


def test_a_teachers_accuracy_is_also_that_of_its_file(tmp_path: Path) -> None:
    """Of a public file's own entry, and of a model folder's card; an exported one says nothing."""
    weights = {'conv.weight': np.zeros((2, 3, 3, 3), np.float32)}
    with (tmp_path / 'teacher.pkl').open('wb') as file:
        pickle.dump({'state_dict': weights, 'best_prec1': 92.5}, file)
    files.write_json(tmp_path / 'folder' / model_folder.CARD, {'accuracy': 88.25})
    files.write_bytes(tmp_path / 'folder' / model_folder.VARIABLES, b'weights')
    files.write_bytes(tmp_path / 'exported.onnx', b'a network')
    config = cifar10.get_config('noise')
    for name, stated in (('teacher.pkl', 92.5), ('folder', 88.25), ('exported.onnx', None)):
        config.teacher.checkpoint = str(tmp_path / name)
        found = artifacts._origin(tmp_path, config, {'teacher_accuracy': None})
        assert found.get('teacher_accuracy_stated') == stated, name
        assert len(found['teacher_sha256']) == 64 and 'teacher_accuracy' not in found


def test_agreement_is_no_accuracy() -> None:
    """Without real images there is no result for Hugging Face."""
    on_synthetic = {
        **ENTRIES, 'accuracy': None, 'teacher_accuracy': None, 'agreement_with_teacher': 88.0,
        'measured_on': 'synthetic images held out from the student',
    }  # fmt: skip
    front, rest = parts(on_synthetic)
    assert 'model-index' not in front and 'metrics' not in front
    assert 'agreement with the teacher: 88.00 % of synthetic images held out' in rest
    assert 'That is no accuracy' in rest and 'accuracy on the test images' not in rest


def test_what_is_not_known_is_left_out() -> None:
    front, rest = parts({'model': 'resnet8', 'num_classes': 10, 'role': 'teacher'})
    assert 'knowledge-distillation' not in front['tags']
    assert (
        'None' not in rest
        and '## Teacher' not in rest
        and '# resnet8, trained as a teacher' in rest
    )


@pytest.mark.parametrize('method', common.METHODS)
def test_every_method_has_a_name_and_says_what_its_student_saw(method: str) -> None:
    assert method == 'noise' or method in model_card.METHODS
    config = digits.get_config(method)
    told = ' '.join(model_card.saw(config))
    if config.loop == 'kd':
        assert told.startswith('The real training images of digits')
    else:
        assert told.startswith('No real image.')
        assert 'Real test images of digits measured' in told
    assert ('Gaussian noise' in told) == (method == 'noise')
    assert ('MiniLM' in told) == ('labels' in config)


def test_a_prior_is_named_with_what_it_was_trained_on() -> None:
    config = fashion_mnist.get_config('diffdfkd')
    told = ' '.join(model_card.saw(config, diffusion.described('clipart32')))
    assert 'a diffusion model, clipart32, which was trained on 3149 images of clipart' in told
    config = cifar10.get_config('diffdfkd')
    config.prior.path = '/models/stable-diffusion-v1-5'
    told = ' '.join(model_card.saw(config, diffusion.described(config.prior.path)))
    assert 'stable-diffusion-v1-5, and what that was trained on is not known here' in told
    config.synthesis.source = 'noise'
    assert 'Gaussian noise' in ' '.join(model_card.saw(config))


def test_embeddings_are_named() -> None:
    config = cifar10.get_config('nayer')
    config.data.name = ''
    told = ' '.join(model_card.saw(config, labels_of='"class 0", "class 1", ...'))
    assert 'embeddings of "class 0", "class 1", ..., by MiniLM' in told and 'Real test' not in told
    config.labels.path = 'mine.npy'
    assert 'by a table of its owner' in ' '.join(model_card.saw(config))
    config.labels = ConfigDict({**config.labels.to_dict(), 'source': 'onehot'})
    assert 'embeddings' not in ' '.join(model_card.saw(config))

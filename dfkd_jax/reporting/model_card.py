"""The model card beside a student: README.md, for people and, in front, for Hugging Face.

It says what the folder's ``model.json`` says, and leaves the licence to its owner.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dfkd_jax import __version__
from dfkd_jax.storage import files, model_folder

FILE = 'README.md'
METHODS = {  # the names of methods and where they are published
    'cae': ('CAE-DFKD', 'https://arxiv.org/abs/2504.21478'),
    'cmi': ('CMI', 'https://arxiv.org/abs/2105.08584'),
    'cpsc': ('CPSC-DFKD', 'https://arxiv.org/abs/2510.03375'),
    'dafl': ('DAFL', 'https://arxiv.org/abs/1904.01186'),
    'deepinversion': ('DeepInversion', 'https://arxiv.org/abs/1912.08795'),
    'dfad': ('DFAD', 'https://arxiv.org/abs/1912.11006'),
    'dfq': ('DFQ', 'https://arxiv.org/abs/2005.04136'),
    'diffdfkd': ('DiffDFKD', 'https://arxiv.org/abs/2504.00870'),
    'fast': ('Fast-DFKD', 'https://arxiv.org/abs/2112.15278'),
    'kd': ('knowledge distillation on real images', 'https://arxiv.org/abs/1503.02531'),
    'nayer': ('NAYER', 'https://arxiv.org/abs/2310.00258'),
    'spaceshipnet': ('SpaceshipNet', None),
    'zskt': ('ZSKT', 'https://arxiv.org/abs/1905.09768'),
}
ENCODERS = {
    'table': 'MiniLM, a sentence encoder (embeddings that ship with dfkd_jax)',
    'minilm': 'MiniLM, a sentence encoder',
    'clip': "CLIP's text encoder",
}


def saw(config: Any, prior: Mapping[str, Any] | None = None, labels_of: str = '') -> list[str]:
    """What a student learnt from, in sentences.

    config: of a run.
    prior: of a diffusion model that was sampled: `name`, and `trained_on`, None if not known.
    labels_of: what label embeddings are of, where it is not the names of classes.
    """
    if config.loop == 'kd':
        return [f'The real training images of {config.data.name}, without their labels in part.'
                if config.teach.kd_weight < 1 else
                f'The real training images of {config.data.name}.']  # fmt: skip
    told = ['No real image. Its teacher was trained on real images; the student saw synthetic '
            'images and what the teacher answers to them.']  # fmt: skip
    if 'prior' in config:
        told.append(_of_prior(config, prior))
    elif 'generator' in config:
        told.append(
            f'The images are of a generator ({config.generator.model}) that was trained against '
            'the teacher, from noise.'
        )
    elif 'pixels' in config:
        told.append('The images are pixels that were optimised against the teacher, from noise.')
    else:
        told.append('The images are Gaussian noise.')
    if 'labels' in config and config.labels.source in ENCODERS:
        source = 'a table of its owner' if config.labels.path and config.labels.source == 'table' \
            else ENCODERS[config.labels.source]  # fmt: skip
        of = labels_of or 'the names of the classes'
        told.append(f'The generator starts from embeddings of {of}, by {source}.')
    if config.data.name:
        told.append(f'Real test images of {config.data.name} measured its accuracy and nothing '
                    'else.')  # fmt: skip
    return told


def _of_prior(config: Any, prior: Mapping[str, Any] | None) -> str:
    if config.synthesis.source == 'noise':
        return 'The images are Gaussian noise.'
    if config.synthesis.bank:
        return f'The images are those of another run, {Path(config.synthesis.bank).name}.'
    name = (prior or {}).get('name') or Path(str(config.prior.path)).name
    trained_on = (prior or {}).get('trained_on')
    known = (
        f'which was trained on {trained_on}' if trained_on else
        'and what that was trained on is not known here: see its own card'
    )  # fmt: skip
    return f'The images are sampled from a diffusion model, {name}, {known}.'


def write(folder: Path) -> None:
    """Writes the card of a model folder, whose ``model.json`` is there."""
    entries = files.read_json(folder / model_folder.CARD)
    files.write_bytes(folder / FILE, text(entries).encode())


def text(entries: Mapping[str, Any]) -> str:
    """The card of a network with these entries of ``model.json``; what they lack is left out."""
    method, paper = METHODS.get(str(entries.get('method')), (entries.get('method'), None))
    title = f'{entries["model"]}, {_how(entries, method)}'
    parts = [
        '---',
        *_front_matter(entries, title),
        '---',
        '',
        f'# {title}',
        '',
        f'An image classifier of {entries.get("num_classes")} classes, made by dfkd_jax '
        f'{__version__}.',
        *_list('Teacher', _teacher(entries)),
        *_list('Method', [f'[{method}]({paper})' if paper else str(method)] if method else []),
        *_list('What it saw', entries.get('saw') or []),
        *_list('Numbers', _numbers(entries)),
        *_list('Preprocessing', _preprocessing(entries)),
        *_list('Licence', [
            'To be filled in, here and as `license` at the top. The weights are made from the '
            "teacher's, so its licence counts."
        ]),
        '',
        '## Use',
        '',
        '```sh',
        'dfkd predict --model=FOLDER image.png',
        'dfkd export --student=FOLDER --format=onnx',
        '```',
        '',
    ]  # fmt: skip
    return '\n'.join(parts)


def _how(entries: Mapping[str, Any], method: Any) -> str:
    if entries.get('teacher'):
        return f'distilled from {entries["teacher"]} by {method}'
    return f'trained as a {entries.get("role", "network")}'


def _front_matter(entries: Mapping[str, Any], title: str) -> Iterator[str]:
    """Lines of YAML; texts are JSON's, which YAML reads."""
    yield 'license: unknown  # yours to fill in'
    yield 'library_name: dfkd_jax'
    yield 'pipeline_tag: image-classification'
    yield 'tags:'
    yield from ('- jax', '- flax', '- image-classification')
    if entries.get('teacher'):
        yield '- knowledge-distillation'
        if entries.get('method') != 'kd':
            yield '- data-free-knowledge-distillation'
    accuracy, dataset = entries.get('accuracy'), entries.get('dataset')
    if accuracy is None or not dataset:
        return
    yield 'metrics:'
    yield '- accuracy'
    yield 'model-index:'
    yield f'- name: {json.dumps(title)}'
    yield '  results:'
    yield '  - task:'
    yield '      type: image-classification'
    yield '    dataset:'
    yield f'      type: {json.dumps(dataset)}'
    yield f'      name: {json.dumps(dataset)}'
    yield '      split: test'
    yield '    metrics:'
    yield '    - type: accuracy'
    yield f'      value: {round(accuracy / 100, 6)}'
    if entries.get('seed') is not None:
        yield f'      name: "accuracy at the last step, seed {int(entries["seed"])}"'


def _teacher(entries: Mapping[str, Any]) -> Iterator[str]:
    if not entries.get('teacher'):
        return
    yield f'architecture: {entries["teacher"]}'
    if entries.get('teacher_file'):
        yield f'file: `{entries["teacher_file"]}`'
    if entries.get('teacher_sha256'):
        yield f'sha256: `{entries["teacher_sha256"]}`'
    if entries.get('teacher_accuracy') is not None:
        yield f'accuracy: {entries["teacher_accuracy"]:.2f} % of the same test images'
    if entries.get('teacher_accuracy_stated') is not None:
        yield f'accuracy that its file states: {entries["teacher_accuracy_stated"]:.2f} %'


def _numbers(entries: Mapping[str, Any]) -> Iterator[str]:
    """What was measured, of which seed."""
    if entries.get('accuracy') is not None:
        yield f'accuracy on the test images of {entries.get("dataset")}: ' \
              f'{entries["accuracy"]:.2f} %, at the last step'  # fmt: skip
    if entries.get('agreement_with_teacher') is not None:
        where = entries.get('measured_on') or 'the test images'
        yield f'agreement with the teacher: {entries["agreement_with_teacher"]:.2f} % of {where}' \
              + ('. That is no accuracy' if entries.get('measured_on') else '')  # fmt: skip
    if entries.get('seed') is not None:
        yield f'one run, with the seed {entries["seed"]}: another seed gives other numbers'


def _preprocessing(entries: Mapping[str, Any]) -> Iterator[str]:
    size, channels = entries.get('image_size'), entries.get('channels')
    ways = {
        'resize': 'each side on its own, bilinear, antialiased',
        'crop': 'the short side to size * 256 / 224, then the centre',
        'pad': 'zeros on all sides',
    }
    if size:
        kind = 'grey' if channels == 1 else 'RGB'
        yield f'{size} x {size} pixels, {kind}; resize: {ways.get(str(entries.get("resize")), "–")}'
    if entries.get('mean') and entries.get('std'):
        yield f'of pixels in [0, 1]: minus {_row(entries["mean"])}, divided by ' \
              f'{_row(entries["std"])}'  # fmt: skip
    names = [str(name) for name in entries.get('class_names') or ()]
    if names:
        more = f', ... (all {len(names)} in model.json)' if len(names) > 20 else ''
        yield f'classes, by label: {", ".join(names[:20])}{more}'


def _row(values: Sequence[float]) -> str:
    return f'({", ".join(f"{value:.4g}" for value in values)})'


def _list(heading: str, items: Any) -> Iterator[str]:
    found = list(items)
    if found:
        yield from ('', f'## {heading}', '', *(f'- {item}' for item in found))

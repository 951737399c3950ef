"""INT8: static quantisation of an ONNX classifier, calibrated on a run's synthetic images.

onnxruntime measures the range of every tensor on those images, and writes weights and tensors as
eight bits (QDQ, weights per channel).  What lies outside the ranges is clipped, and generators draw
images of less contrast than real ones have.  So each image calibrates twice: as it was drawn, and
with its contrast stretched to the whole range of pixels.  (On the digits, agreement with float32 on
test images rose by that from 97 to 100 %; with an untrained generator, from 19 to 99 %.)

The figures are measured with no real image (agreement) and, where there are test images, with those
(accuracy).
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_jax import build, data, evaluate
from dfkd_jax.deploy import card as cards
from dfkd_jax.deploy import formats, synthetic_images
from dfkd_jax.deploy.classify import onnx_call, onnx_session
from dfkd_jax.deploy.formats import Arrays
from dfkd_jax.deploy.student import Student
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import DataError, DeployError, UserError

CALIBRATION, HELD_OUT = 256, 1024  # synthetic images
BATCH = 64
# What is worth eight bits; the normalisation and the softmax stay as they are.
QUANTISED = ('Conv', 'Gemm', 'MatMul', 'Add', 'MaxPool', 'Relu', 'Clip', 'Concat')


def quantise(model: bytes, pixels: np.ndarray) -> bytes:
    """The ONNX model in INT8.

    pixels: images to calibrate on, [N, H, W, channels] uint8.
    Raises DeployError where onnxruntime is not installed or cannot quantise the model.
    """
    try:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise DeployError(
            f'quantisation needs the packages onnx and onnxruntime: {formats.INSTALL}.'
        ) from error

    class Reader(quantization.CalibrationDataReader):
        """Batches of the images, once."""

        def __init__(self) -> None:
            self.batches = iter(_batches(pixels))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {formats.INPUT: batch}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, prepared, output = (Path(folder, name) for name in ('a.onnx', 'b.onnx', 'c.onnx'))
        plain.write_bytes(model)
        try:
            # Its symbolic shapes need another package, and the graph's own shapes suffice.
            quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(prepared),
                str(output),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                op_types_to_quantize=list(QUANTISED),
            )
        except Exception as error:  # onnxruntime raises anything at a graph that it cannot quantise
            raise DeployError(f'onnxruntime cannot quantise this network ({error}).') from error
        return output.read_bytes()


def _batches(pixels: np.ndarray) -> Iterator[np.ndarray]:
    return (pixels[i : i + BATCH] for i in range(0, len(pixels), BATCH))


class _quiet(warnings.catch_warnings):
    """Without onnxruntime's remarks on its own steps."""

    def __enter__(self) -> Any:
        logging.disable(logging.WARNING)
        found = super().__enter__()
        warnings.simplefilter('ignore')
        return found

    def __exit__(self, *error: Any) -> None:
        logging.disable(logging.NOTSET)
        super().__exit__(*error)


def stretched(pixels: np.ndarray) -> np.ndarray:
    """Images [N, H, W, channels] uint8, each with its contrast stretched to 0 to 255."""
    x = pixels.astype(np.float32)
    low, high = (f(x, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    return np.round(255 * (x - low) / np.maximum(high - low, 1)).astype(np.uint8)


def predicted(call: Callable[[np.ndarray], Arrays], pixels: np.ndarray) -> np.ndarray:
    """The classes that a file predicts, [N]."""
    return np.concatenate([call(batch)[0].argmax(-1) for batch in _batches(pixels)])


def int8(student: Student) -> tuple[bytes, dict[str, Any]]:
    """The student in INT8 as ONNX, and its figures, in per cent.

    Raises DeployError where there is nothing to calibrate on (`synthetic_images.draw`).
    """
    drawn = synthetic_images.draw(student, CALIBRATION, seed=1)
    calibration = np.concatenate([drawn, stretched(drawn)])
    held_out = synthetic_images.draw(student, HELD_OUT, seed=2)
    before = formats.onnx(student.card, student.variables)
    after = quantise(before, calibration)
    calls = {
        name: onnx_call(onnx_session(model, name), name)
        for name, model in (('float32', before), ('int8', after))
    }
    figures: dict[str, Any] = {
        'calibration_images': len(drawn),
        'synthetic_images_held_out': len(held_out),
        'bytes': {'float32': len(before), 'int8': len(after)},
    }
    answers = {name: predicted(call, held_out) for name, call in calls.items()}
    figures['agreement_with_float32'] = evaluate.accuracy(answers['int8'], answers['float32'])
    by_teacher = _teacher(student, held_out)
    if by_teacher is not None:
        figures['agreement_with_teacher'] = {
            name: evaluate.accuracy(answer, by_teacher) for name, answer in answers.items()
        }
    test = _test_images(student)
    if test is not None:
        figures['test_images'] = test.size
        figures['accuracy'] = {name: _accuracy(call, test) for name, call in calls.items()}
    return _with_metadata(after, cards.metadata(student.card, **figures)), figures


def _with_metadata(model: bytes, entries: dict[str, str]) -> bytes:
    """The ONNX model with this metadata in place of its own."""
    import onnx

    proto = onnx.load_from_string(model)
    onnx.helper.set_model_props(proto, entries)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _teacher(student: Student, pixels: np.ndarray) -> np.ndarray | None:
    """The classes that the run's teacher predicts; None where it is not there any more."""
    assert student.run and student.config
    config, card, plan = student.config, student.card, sharding.make('jit')
    try:
        variables = synthetic_images.teacher(student.run, config)
        module = build.make_classifier(config.teacher.model, config.data)
    except UserError:
        return None

    def classify(variables: Any, pixels: Any) -> Any:
        return module.apply(variables, data.normalise(pixels, card.mean, card.std)).logits

    predict, placed = plan.predict(classify), plan.replicate(variables)
    answers = [np.asarray(predict(placed, batch)).argmax(-1) for batch in _batches(pixels)]
    return np.concatenate(answers)


def _test_images(student: Student) -> data.Dataset | None:
    """The test images of the run's data set; None where there are none."""
    assert student.config
    try:
        test = data.load(student.config.data, 'test')
    except DataError:
        return None
    return test if test.size else None


def _accuracy(call: Callable[[np.ndarray], Arrays], test: data.Dataset) -> float:
    """The accuracy of a file on test images, in per cent."""
    right = 0
    for batch in test.batches(BATCH):
        image, label = batch.image[batch.valid], batch.label[batch.valid]
        right += int((call(image)[0].argmax(-1) == label).sum())
    return 100.0 * right / test.size

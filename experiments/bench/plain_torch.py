"""CPSC-DFKD's two steps in plain PyTorch, written to be timed beside dfkd_jax's.

Eager, float32, contiguous (NCHW) tensors, one device; modules, losses and optimisers as a PyTorch
user would write them from the method's equations (`dfkd_jax/methods/cpsc.py` states them), taking
no gradient that the step does not need: none of the teacher's weights, and in the generator step
none of the student's.  (There the student's running statistics move, as PyTorch's train mode has
it; no loss reads them.)  Parameters have the names of the common PyTorch files, so that
`dfkd_jax.port.to_torch` fills them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WideBlock(nn.Module):
    """Pre-activation block of a wide residual network."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.convShortcut = None
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return y + shortcut


class WideGroup(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, depth: int):
        super().__init__()
        blocks = [WideBlock(inputs, outputs, stride)]
        blocks += [WideBlock(outputs, outputs, 1) for _ in range(depth - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-widen; returns (logits [B, C], features [B, F])."""

    def __init__(self, depth: int, widen: int, num_classes: int, channels: int):
        super().__init__()
        blocks, widths = (depth - 4) // 6, (16 * widen, 32 * widen, 64 * widen)
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.block1 = WideGroup(16, widths[0], 1, blocks)
        self.block2 = WideGroup(widths[0], widths[1], 2, blocks)
        self.block3 = WideGroup(widths[1], widths[2], 2, blocks)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        features = F.relu(self.bn1(x)).mean((2, 3))
        return self.fc(features), features


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; `shortcut` is what the file calls the projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        projection: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.shortcut_name = shortcut
        setattr(self, shortcut, projection)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + getattr(self, self.shortcut_name)(x))


class ResNet(nn.Module):
    """Basic-block residual network for small images; returns (logits [B, C], features [B, F])."""

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        num_classes: int,
        channels: int,
        shortcut: str = 'downsample',
        head: str = 'fc',
        block: int = 1,
    ):
        super().__init__()
        self.block, self.head_name, self.stages = block, head, len(depths)
        self.conv1 = nn.Conv2d(channels * block**2, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths[1:]), start=1):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(BasicBlock(inputs, width, stride, shortcut))
                inputs = width
            setattr(self, f'layer{stage}', nn.Sequential(*blocks))
        setattr(self, head, nn.Linear(inputs, num_classes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.block > 1:
            x = F.pixel_unshuffle(x, self.block)
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f'layer{stage}')(x)
        features = x.mean((2, 3))
        return getattr(self, self.head_name)(features), features


def classifier(name: str, num_classes: int, channels: int) -> nn.Module:
    """The architecture called `name` in dfkd_jax.models.  ValueError for one not written here."""
    sizes = (num_classes, channels)
    if name.startswith('wrn'):
        depth, widen = name.removeprefix('wrn').split('_')
        return WideResNet(int(depth), int(widen), *sizes)
    if name in ('resnet18', 'resnet34'):
        depths = {'resnet18': (2, 2, 2, 2), 'resnet34': (3, 4, 6, 3)}[name]
        return ResNet(depths, (64, 64, 128, 256, 512), *sizes, 'shortcut', 'linear')
    if name.startswith('resnet8'):
        widths = (8, 8, 16, 32) if name.endswith('_half') else (16, 16, 32, 64)
        return ResNet((1, 1, 1), widths, *sizes, block=2 if '_s2d' in name else 1)
    raise ValueError(
        f'no plain PyTorch {name!r}; expected wrnD_W, resnet18, resnet34, resnet8, resnet8_half, '
        'resnet8_s2d or resnet8_s2d_half.'
    )


class ConditionalNorm(nn.BatchNorm2d):
    """Batch norm over the whole batch, then each class's own scale and shift."""

    def __init__(self, features: int, num_classes: int):
        super().__init__(features, eps=1e-3, affine=False)
        self.weights = nn.Embedding(num_classes, features)
        self.biases = nn.Embedding(num_classes, features)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        y = super().forward(x)
        return self.weights(label)[:, :, None, None] * y + self.biases(label)[:, :, None, None]


class Generator(nn.Module):
    """CPSC-DFKD's generator: latents [B, latent] and labels [B] to images [B, channels, H, W]."""

    def __init__(self, num_classes: int, image_size: int, channels: int, latent: int, width: int):
        super().__init__()
        self.size = image_size // 4
        self.l1 = nn.Sequential(nn.Linear(latent, 2 * width * self.size**2))
        self.conv_blocks0_0 = ConditionalNorm(2 * width, num_classes)
        self.conv_blocks1_0 = nn.Conv2d(2 * width, 2 * width, 3, 1, 1)
        self.conv_blocks1_1 = ConditionalNorm(2 * width, num_classes)
        self.conv_blocks2_0 = nn.Conv2d(2 * width, width, 3, 1, 1)
        self.conv_blocks2_1 = ConditionalNorm(width, num_classes)
        self.conv_blocks3_0 = nn.Conv2d(width, channels, 3, 1, 1)
        self.conv_blocks3_2 = ConditionalNorm(channels, num_classes)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        x = self.l1(z).view(len(z), -1, self.size, self.size)
        x = F.interpolate(self.conv_blocks0_0(x, label), scale_factor=2)
        x = F.leaky_relu(self.conv_blocks1_1(self.conv_blocks1_0(x), label), 0.2)
        x = F.interpolate(x, scale_factor=2)
        x = F.leaky_relu(self.conv_blocks2_1(self.conv_blocks2_0(x), label), 0.2)
        return self.conv_blocks3_2(torch.tanh(self.conv_blocks3_0(x)), label)


class StatisticsDistance:
    """The BN term: how far the inputs of a network's batch norms are from what these remember."""

    def __init__(self, network: nn.Module):
        self.terms: list[Tensor] = []
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self.tap)

    def tap(self, norm: nn.Module, inputs: Any, output: Any) -> None:
        del output
        if torch.is_grad_enabled():  # not where the teacher only labels
            var, mean = torch.var_mean(inputs[0], (0, 2, 3), unbiased=False)
            self.terms.append(
                torch.norm(norm.running_var - var) + torch.norm(norm.running_mean - mean)
            )

    def pop(self) -> Tensor:
        """The sum over the layers of the last forward pass."""
        total = torch.stack(self.terms).sum()
        self.terms.clear()
        return total


def supervised_contrast(views: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Khosla et al. 2020, eq. 2, mean over all anchors; views [V * B, F] of unit length."""
    label = label.repeat(len(views) // len(label))
    own = torch.eye(len(views), dtype=torch.bool, device=views.device)
    positive = (label[:, None] == label) & ~own
    log_prob = F.log_softmax((views @ views.T / temperature).masked_fill(own, -math.inf), 1)
    total = log_prob.masked_fill(~positive, 0.0).sum(1)
    return -(total / positive.sum(1).clamp(min=1)).mean()


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 mean KL(softmax(teacher / T) || softmax(student / T)) of logits [B, C]."""
    student, teacher = (F.log_softmax(x / temperature, 1) for x in (student, teacher))
    return temperature**2 * F.kl_div(student, teacher, reduction='batchmean', log_target=True)


class Steps:
    """The networks, their optimisers and the two steps; `config` is dfkd_jax's.

    weights: PyTorch-named arrays of 'teacher', 'student', 'generator' and, where features are of
    different widths, 'adapter'.
    """

    def __init__(self, config: Any, weights: dict[str, Any], device: str, compiled: bool = False):
        data, loss, generator = config.data, config.loss, config.generator
        unlike = {
            'loss.double_softmax': loss.double_softmax,
            'loss.adapter_normalise': not loss.adapter_normalise,
            'loss, a weight of 0': not all(loss[k] for k in ('kd', 'ikd', 'bn', 'scl', 'ce')),
            'generator.reset_adam': generator.reset_adam,
            'generator.decay': generator.decay,
            'student.nesterov': config.student.nesterov,
            'synthesis, augmentation': config.synthesis.crop_padding or config.synthesis.flip,
        }
        if any(unlike.values()):
            names = ', '.join(name for name, value in unlike.items() if value)
            raise ValueError(f'the plain PyTorch steps are not written for this config: {names}.')
        self.loss, self.device, self.classes = loss, device, data.num_classes
        self.latent, self.batch = generator.latent, config.synthesis.batch_size
        sizes = (data.num_classes, data.channels)
        self.teacher = classifier(config.teacher.model, *sizes)
        self.student = classifier(config.student.model, *sizes)
        self.generator = Generator(
            data.num_classes, data.image_size, data.channels, generator.latent, generator.width
        )
        self.adapter = None
        if 'adapter' in weights:
            hidden, out = (weights['adapter'][f'{i}.weight'].shape[0] for i in (0, 2))
            self.adapter = nn.Sequential(
                nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out)
            )
        for name, arrays in weights.items():
            network = getattr(self, name).to(device)
            network.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()})
        self.teacher.eval().requires_grad_(False)
        if self.adapter is not None:
            self.adapter.requires_grad_(False)
        self.distance = StatisticsDistance(self.teacher)
        self.student_parameters = list(self.student.parameters())
        self.generator_parameters = list(self.generator.parameters())

        student = config.student
        self.student_optimiser = torch.optim.SGD(
            self.student_parameters, student.lr, student.momentum, weight_decay=student.weight_decay
        )
        # The timed steps are inside the warm-up, the first part of the schedule.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.student_optimiser, lambda step: min(step / max(student.warmup_steps, 1), 1.0)
        )
        self.generator_optimiser = torch.optim.Adam(
            self.generator_parameters, generator.lr, (generator.beta1, generator.beta2)
        )
        if compiled:
            self.generator_loss = torch.compile(self.generator_loss)
            self.student_loss = torch.compile(self.student_loss)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Latents [B, latent] and classes [B]."""
        z = torch.randn(self.batch, self.latent, device=self.device)
        return z, torch.randint(self.classes, (self.batch,), device=self.device)

    def view(self, features: Tensor) -> Tensor:
        """The student's view of the contrast."""
        features = F.normalize(features)
        return features if self.adapter is None else F.normalize(self.adapter(features))

    def generator_loss(self, z: Tensor, label: Tensor) -> dict[str, Tensor]:
        image = self.generator(z, label)
        teacher, teacher_features = self.teacher(image)
        student, student_features = self.student(image)
        views = torch.cat([self.view(student_features), F.normalize(teacher_features)])
        error = F.mse_loss(student, teacher.detach())
        return {
            'kd': -distillation(student, teacher),
            'ikd': -torch.log(error) if self.loss.ikd_form == 'log' else -error,
            'bn': self.distance.pop(),
            'scl': supervised_contrast(views, label, self.loss.scl_temperature),
            'ce': F.cross_entropy(teacher, label),
            'hit': (teacher.argmax(1) == label).float().mean(),
        }

    def student_loss(self, z: Tensor, label: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            image = self.generator(z, label)
            teacher, _ = self.teacher(image)
        student, _ = self.student(image)
        if self.loss.ikd_form == 'log':
            imitation = torch.log(torch.norm(student - teacher))
        else:
            imitation = F.mse_loss(student, teacher)
        return {
            'kd': distillation(student, teacher, self.loss.temperature),
            'ikd': imitation,
            **({'ce': F.cross_entropy(student, label)} if self.loss.student_pseudo_labels else {}),
            'agreement': (student.argmax(1) == teacher.argmax(1)).float().mean(),
        }

    def generator_step(self, draws: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """One update of the generator; returns the loss and its terms."""
        terms = self.generator_loss(*(draws or self.draw()))
        total = self.weighted(terms)
        self.generator_optimiser.zero_grad()
        total.backward(inputs=self.generator_parameters)
        self.generator_optimiser.step()
        return {name: term.detach() for name, term in (terms | {'loss': total}).items()}

    def student_step(self, draws: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """One update of the student; returns the loss and its terms."""
        terms = self.student_loss(*(draws or self.draw()))
        total = self.weighted(terms)
        self.student_optimiser.zero_grad()
        total.backward()
        self.student_optimiser.step()
        self.schedule.step()
        return {name: term.detach() for name, term in (terms | {'loss': total}).items()}

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The sum of the terms that have a weight."""
        return sum(self.loss[name] * term for name, term in terms.items() if name in self.loss)

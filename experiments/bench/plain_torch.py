"""CPSC-DFKD's and NAYER's steps in plain PyTorch, written to be timed beside dfkd_jax's.

Eager or compiled, float32 or autocast to bfloat16, contiguous (NCHW) tensors, one device.  Modules,
losses and optimisers are as a PyTorch user would write them from the methods' equations
(`dfkd_jax/methods/cpsc.py` and `nayer.py` state them).  A step takes no gradient that it does not
need: none of the teacher's weights, and in the generator step none of the student's.  (In CPSC's
generator step the student's running statistics move, as in PyTorch's train mode; no loss reads
them.)  Parameters have the names of the common PyTorch files, so `dfkd_jax.port.to_torch` fills
them.
"""

from __future__ import annotations

import math
import re
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
    """Two 3x3 convolutions; `shortcut` is the projection's name in the file.

    '': none, the paper's option A: every second pixel, and zeros for the new channels.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        projection: nn.Module = nn.Identity()
        self.stride, self.more = stride, (outputs - inputs) // 2
        if shortcut and (stride != 1 or inputs != outputs):
            projection = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.shortcut_name = shortcut
        if shortcut:
            setattr(self, shortcut, projection)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.shortcut_name:
            return F.relu(y + getattr(self, self.shortcut_name)(x))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(y + x)


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
    """The architecture called `name` in dfkd_jax.models.  Raises ValueError if it is not here."""
    sizes = (num_classes, channels)
    if name.startswith('wrn'):
        depth, widen = name.removeprefix('wrn').split('_')
        return WideResNet(int(depth), int(widen), *sizes)
    if name in ('resnet18', 'resnet34'):
        depths = {'resnet18': (2, 2, 2, 2), 'resnet34': (3, 4, 6, 3)}[name]
        return ResNet(depths, (64, 64, 128, 256, 512), *sizes, 'shortcut', 'linear')
    if found := re.fullmatch(r'resnet(\d+)(_s2d)?(_half)?(_option_a)?', name):
        depth, s2d, half, option_a = found.groups()
        if int(depth) % 6 == 2:
            widths = (8, 8, 16, 32) if half else (16, 16, 32, 64)
            names = ('', 'linear') if option_a else ('downsample', 'fc')
            return ResNet((int(depth) // 6,) * 3, widths, *sizes, *names, 2 if s2d else 1)
    raise ValueError(
        f'no plain PyTorch {name!r}; expected wrnD_W, resnet18, resnet34, resnetN (N 6n + 2, also '
        'with _option_a, _half or _s2d, _s2d_half).'
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


class NoisyGenerator(nn.Module):
    """NAYER's generator: repeated embeddings of the class list, [B, E], to pixels."""

    def __init__(self, sizes: dict[str, int]):
        super().__init__()
        self.classes, self.size, width = sizes['classes'], sizes['image_size'] // 4, sizes['width']
        self.n1 = nn.BatchNorm1d(sizes['embedding'])
        self.le1 = nn.ModuleList(
            nn.Linear(sizes['embedding'], sizes['noisy_width']) for _ in range(sizes['repeats'])
        )
        self.l1 = nn.Sequential(nn.Linear(sizes['noisy_width'], 2 * width * self.size**2))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, sizes['channels'], 3, 1, 1),
            nn.Sigmoid(),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        rows = self.n1(embedding).split(self.classes)
        x = torch.cat([layer(row) for layer, row in zip(self.le1, rows)])
        x = self.l1(x).view(len(x), -1, self.size, self.size)
        return self.conv_blocks(x)


class Statistics:
    """The moments of the inputs to a network's batch norms, and the BN loss made of them."""

    def __init__(self, network: nn.Module):
        self.norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        self.seen: list[tuple[Tensor, Tensor]] = []
        for norm in self.norms:
            norm.register_forward_hook(self.tap)

    def tap(self, norm: nn.Module, inputs: Any, output: Any) -> None:
        del norm, output
        if torch.is_grad_enabled():  # not where the teacher only labels
            wide = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
            self.seen.append(torch.var_mean(wide, (0, 2, 3), unbiased=False))

    def pop(self) -> list[tuple[Tensor, Tensor]]:
        """Variance and mean at each norm in the last forward pass."""
        seen, self.seen = self.seen, []
        return seen

    def distance(self, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([
            torch.norm(norm.running_var - var) + torch.norm(norm.running_mean - mean)
            for norm, (var, mean) in zip(self.norms, seen)
        ]).sum()  # fmt: skip


def crop_and_flip(
    x: Tensor, offsets: Tensor, mask: Tensor | None, padding: int
) -> Tensor:  # fmt: skip
    """Each padded image cut at its own offset [B, 2], then mirrored where `mask` says so."""
    batch, channels, height, width = x.shape
    padded = F.pad(x, [padding] * 4)
    rows = offsets[:, 0, None] + torch.arange(height, device=x.device)
    columns = offsets[:, 1, None] + torch.arange(width, device=x.device)
    if mask is not None:
        columns = torch.where(mask[:, None], columns.flip(1), columns)
    image = torch.arange(batch, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def supervised_contrast(views: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Khosla et al. 2020, eq. 2, the mean over all anchors; views [V * B, F] of unit length."""
    label = label.repeat(len(views) // len(label))
    own = torch.eye(len(views), dtype=torch.bool, device=views.device)
    positive = (label[:, None] == label) & ~own
    log_prob = F.log_softmax((views @ views.T / temperature).masked_fill(own, -math.inf), 1)
    total = log_prob.masked_fill(~positive, 0.0).sum(1)
    return -(total / positive.sum(1).clamp(min=1)).mean()


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits [B, C], [B]."""
    student, teacher = (F.log_softmax(x / temperature, 1) for x in (student, teacher))
    return temperature**2 * F.kl_div(student, teacher, reduction='none', log_target=True).sum(1)


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean of `divergence`."""
    return divergence(student, teacher, temperature).mean()


class Steps:
    """A teacher, a student and a generator with their optimisers; `config` is dfkd_jax's.

    weights: PyTorch-named arrays of 'teacher', 'student', 'generator' and, if the widths of the
    features differ, 'adapter'.  Steps take their random draws as an argument, or make them.
    """

    def __init__(
        self, config: Any, weights: dict[str, Any], generator: nn.Module, device: str,
        compiled: bool = False,
    ):  # fmt: skip
        data = config.data
        self.config, self.loss, self.device = config, config.loss, device
        self.batch, self.classes = config.synthesis.batch_size, data.num_classes
        self.teacher = classifier(config.teacher.model, data.num_classes, data.channels)
        self.student = classifier(config.student.model, data.num_classes, data.channels)
        self.generator, self.adapter = generator, None
        if 'adapter' in weights:
            hidden, out = (weights['adapter'][f'{i}.weight'].shape[0] for i in (0, 2))
            self.adapter = nn.Sequential(
                nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out)
            ).requires_grad_(False)
        for name, arrays in weights.items():
            network = getattr(self, name).to(device)
            network.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()})
        self.teacher.eval().requires_grad_(False)
        self.statistics = Statistics(self.teacher)
        self.student_parameters = list(self.student.parameters())
        self.generator_parameters = list(self.generator.parameters())
        student = config.student
        self.student_optimiser = torch.optim.SGD(
            self.student_parameters, student.lr, student.momentum, weight_decay=student.weight_decay
        )
        self.new_adam()
        if compiled:
            self.generator_loss = torch.compile(self.generator_loss)
            self.student_loss = torch.compile(self.student_loss)

    def new_adam(self) -> None:
        settings = self.config.generator
        self.generator_optimiser = torch.optim.Adam(
            self.generator_parameters, settings.lr, (settings.beta1, settings.beta2)
        )

    def autocast(self) -> Any:
        """Networks in the config's dtype; weights, statistics and losses stay float32."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.config.dtype == 'bfloat16')

    def begin(self) -> None:
        """Starts a batch of synthesis."""

    def finish(self) -> None:
        """Ends it."""

    def update(
        self, optimiser: torch.optim.Optimizer, total: Tensor, parameters: list[Tensor]
    ) -> None:
        optimiser.zero_grad()
        total.backward(inputs=parameters)
        optimiser.step()


class Cpsc(Steps):
    """CPSC-DFKD: fresh images at every step.  Draws are latents and classes."""

    def __init__(self, config: Any, weights: dict[str, Any], device: str, compiled: bool = False):
        loss, settings = config.loss, config.generator
        unlike = {
            'loss.double_softmax': loss.double_softmax,
            'loss.adapter_normalise': not loss.adapter_normalise,
            'loss, a weight of 0': not all(loss[k] for k in ('kd', 'ikd', 'bn', 'scl', 'ce')),
            'generator.reset_adam': settings.reset_adam,
            'generator.decay': settings.decay,
            'student.nesterov': config.student.nesterov,
            'synthesis, augmentation': config.synthesis.crop_padding or config.synthesis.flip,
        }
        _refuse(unlike)
        data = config.data
        generator = Generator(
            data.num_classes, data.image_size, data.channels, settings.latent, settings.width
        )
        super().__init__(config, weights, generator, device, compiled)
        # The timed steps are within the warm-up, the first part of the schedule.
        warmup = max(config.student.warmup_steps, 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.student_optimiser, lambda step: min(step / warmup, 1.0)
        )

    def draw(self) -> tuple[Tensor, Tensor]:
        """Latents [B, latent] and classes [B]."""
        z = torch.randn(self.batch, self.config.generator.latent, device=self.device)
        return z, torch.randint(self.classes, (self.batch,), device=self.device)

    def view(self, features: Tensor) -> Tensor:
        """The student's view of the contrast."""
        features = F.normalize(features)
        return features if self.adapter is None else F.normalize(self.adapter(features))

    def generator_loss(self, z: Tensor, label: Tensor) -> dict[str, Tensor]:
        with self.autocast():
            image = self.generator(z, label)
            teacher, teacher_features = map(torch.Tensor.float, self.teacher(image))
            student, student_features = map(torch.Tensor.float, self.student(image))
        views = torch.cat([self.view(student_features), F.normalize(teacher_features)])
        error = F.mse_loss(student, teacher.detach())
        return {
            'kd': -distillation(student, teacher),
            'ikd': -torch.log(error) if self.loss.ikd_form == 'log' else -error,
            'bn': self.statistics.distance(self.statistics.pop()),
            'scl': supervised_contrast(views, label, self.loss.scl_temperature),
            'ce': F.cross_entropy(teacher, label),
            'hit': (teacher.argmax(1) == label).float().mean(),
        }

    def student_loss(self, z: Tensor, label: Tensor) -> dict[str, Tensor]:
        with self.autocast():
            with torch.no_grad():
                image = self.generator(z, label)
                teacher = self.teacher(image)[0].float()
            student = self.student(image)[0].float()
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
        self.update(self.generator_optimiser, total, self.generator_parameters)
        return {name: term.detach() for name, term in (terms | {'loss': total}).items()}

    def student_step(self, draws: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """One update of the student; returns the loss and its terms."""
        terms = self.student_loss(*(draws or self.draw()))
        total = self.weighted(terms)
        self.update(self.student_optimiser, total, self.student_parameters)
        self.schedule.step()
        return {name: term.detach() for name, term in (terms | {'loss': total}).items()}

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The sum of the terms that have a weight."""
        return sum(self.loss[name] * term for name, term in terms.items() if name in self.loss)


class Nayer(Steps):
    """NAYER after its warm-up: batches for a bank, and a student that draws from it.

    Draws are crops [B, 2] and flips [B]; in the student's step, rows of the bank come first.

    table: the label embeddings [C, E].  bank: images as bytes [N, channels, H, W].
    """

    def __init__(
        self, config: Any, weights: dict[str, Any], table: Any, bank: Any, norm: tuple[Any, Any],
        device: str, compiled: bool = False,
    ):  # fmt: skip
        synthesis, settings = config.synthesis, config.generator
        _refuse({'synthesis.shade or cutmix': synthesis.shade or synthesis.cutmix})
        generator = NoisyGenerator({
            'classes': config.data.num_classes,
            'image_size': config.data.image_size,
            'channels': config.data.channels,
            'embedding': table.shape[1],
            'noisy_width': settings.noisy_width,
            'repeats': -(-synthesis.batch_size // config.data.num_classes),
            'width': settings.width,
        })  # fmt: skip
        super().__init__(config, weights, generator, device, compiled)
        self.student.eval()  # while the generator trains
        self.table, self.bank = (torch.tensor(x, device=device) for x in (table, bank))
        self.mean, self.std = (
            torch.tensor(x, device=device).view(1, -1, 1, 1) for x in norm
        )  # fmt: skip
        self.written, self.batches = 0, 0
        self.label = torch.arange(self.batch, device=device) % self.classes
        self.average = [
            (torch.zeros_like(n.running_var), torch.zeros_like(n.running_mean))
            for n in self.statistics.norms
        ]
        self.lowest, self.best = torch.inf, None

    def begin(self) -> None:
        """A new noisy layer and a new Adam."""
        with torch.no_grad():
            for layer in self.generator.le1:
                nn.init.normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        whole = self.batch - self.batch % self.classes
        chosen = torch.randint(self.classes, (self.batch - whole,), device=self.device)
        self.label = torch.cat([self.label[:whole], chosen])
        self.new_adam()
        self.lowest = torch.inf

    def finish(self) -> None:
        """Adds the best images to the bank and the last step's statistics to their average."""
        at = self.written % len(self.bank)
        self.bank[at : at + self.batch] = (255 * self.best).round().byte()
        self.written += self.batch
        self.average = self.averaged(self.latest)
        self.batches += 1

    def averaged(self, seen: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        if not self.batches:
            return seen
        keep = self.loss.bn_momentum
        return [
            tuple(keep * old + (1 - keep) * new for old, new in zip(olds, news))
            for olds, news in zip(self.average, seen)
        ]

    def draw(self, batch: int) -> tuple[Tensor, Tensor | None]:
        """Crops [B, 2], and flips [B] or None."""
        most = 2 * self.config.synthesis.crop_padding + 1
        offsets = torch.randint(most, (batch, 2), device=self.device)
        if not self.config.synthesis.flip:
            return offsets, None
        return offsets, torch.rand(batch, device=self.device) < 0.5

    def view(self, pixel: Tensor, offsets: Tensor, mask: Tensor | None) -> Tensor:
        """Pixels as the networks see them."""
        moved = crop_and_flip(pixel, offsets, mask, self.config.synthesis.crop_padding)
        return (moved - self.mean) / self.std

    def generator_loss(self, offsets: Tensor, mask: Tensor | None) -> tuple[dict[str, Tensor], Any]:
        with self.autocast():
            pixel = self.generator(self.table[self.label]).float()
            image = self.view(pixel, offsets, mask)
            teacher = self.teacher(image)[0].float()
            student = self.student(image)[0].float()
        seen = self.statistics.pop()
        same = (student.argmax(1) == teacher.argmax(1)).float()
        return {
            'bn': self.statistics.distance(self.averaged(seen)),
            'ce': F.cross_entropy(teacher, self.label),
            'adversarial': -(same * divergence(student, teacher)).mean(),
            'hit': (teacher.argmax(1) == self.label).float().mean(),
        }, (pixel, seen)

    def generator_step(self, draws: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """One update of the generator; returns the loss and its terms."""
        terms, (pixel, seen) = self.generator_loss(*(draws or self.draw(self.batch)))
        total = sum(self.loss[name] * terms[name] for name in ('bn', 'ce', 'adversarial'))
        self.update(self.generator_optimiser, total, self.generator_parameters)
        if total.item() < self.lowest:
            self.lowest, self.best = total.item(), pixel.detach()
        self.latest = [tuple(x.detach() for x in moments) for moments in seen]
        return {name: term.detach() for name, term in (terms | {'loss': total}).items()}

    def student_loss(self, rows: Tensor, offsets: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        image = self.view(self.bank[rows].float() / 255, offsets, mask)
        with self.autocast():
            with torch.no_grad():
                teacher = self.teacher(image)[0].float()
            student = self.student(image)[0].float()
        return {
            'kd': distillation(student, teacher, self.loss.temperature),
            'agreement': (student.argmax(1) == teacher.argmax(1)).float().mean(),
        }

    def student_step(self, draws: Any = None) -> dict[str, Tensor]:
        """One update of the student; returns its terms."""
        size = self.config.synthesis.student_batch_size
        rows = (torch.randint(len(self.bank), (size,), device=self.device), *self.draw(size))
        self.student.train()
        terms = self.student_loss(*(draws or rows))
        self.update(self.student_optimiser, terms['kd'], self.student_parameters)
        self.student.eval()
        return {name: term.detach() for name, term in terms.items()}


def _refuse(unlike: dict[str, Any]) -> None:
    if any(unlike.values()):
        names = ', '.join(name for name, value in unlike.items() if value)
        raise ValueError(f'the plain PyTorch steps are not written for this config: {names}.')

"""The short table of an audit, in Markdown."""

from __future__ import annotations

from typing import Any

from dfkd_jax.audit.membership import CHANCE

# figure: its heading, and what it is multiplied by
COLUMNS = {
    'auc': ('AUC', 1),
    'balanced_accuracy': ('balanced accuracy, %', 100),
    'tpr_at_fpr_0.01': ('TPR at 1 % FPR, %', 100),
    'tpr_at_fpr_0.001': ('TPR at 0.1 % FPR, %', 100),
}


def render(found: dict[str, Any]) -> str:
    """The text of what ``audit.json`` holds."""
    images, accuracy = found['images'], found['accuracy']
    made = found['without_synthetic_images'] or f'{found["synthetic_images"]} synthetic images'
    rows = [[attack['score'], *(_cell(name, attack[name]) for name in COLUMNS)]
            for attack in found['attacks']]  # fmt: skip
    rows.append(['chance', *(f'{scale * CHANCE[name]:g}' for name, (_, scale) in COLUMNS.items())])
    lines = [
        f'Student {found["student"]["model"]} ({found["run"]["method"]}), teacher '
        f'{found["teacher"]["model"]}; {images["members"]} training images (members) and '
        f'{images["others"]} test images of {images["dataset"]}; {made}.',
        '',
        f'| score | {" | ".join(heading for heading, _ in COLUMNS.values())} |',
        f'|---|{"---|" * len(COLUMNS)}',
        *(f'| {" | ".join(row)} |' for row in rows),
        '',
        f'In brackets: intervals of {100 * found["settings"]["confidence"]:g} %. Accuracy on '
        'members and on test images, %: '
        + '; '.join(
            f'{name} {each["members"]:.2f} and {each["others"]:.2f}'
            for name, each in accuracy.items()
        )
        + '.',
        '',
        'An attack that finds nothing shows that this attack finds nothing.',
    ]
    return '\n'.join(lines) + '\n'


def _cell(name: str, estimate: dict[str, float | None]) -> str:
    """``0.547 (0.539 to 0.555)``; a dash for what so few images do not tell."""
    scale = COLUMNS[name][1]
    if any(estimate[part] is None for part in ('value', 'low', 'high')):
        return '–'
    value, low, high = (scale * float(estimate[part] or 0) for part in ('value', 'low', 'high'))
    digits = 3 if scale == 1 else 2
    return f'{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})'

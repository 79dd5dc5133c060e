# mypy: allow-subclassing-any
"""Token labels for Lightning: a module around a student. Needs the extra `lightning`."""

from collections.abc import Callable
from typing import Any

import lightning
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..dataset.targets.token_labels import TokenLabels
from .loss import TokenLabelLoss


class TokenLabelModule(lightning.LightningModule):
    """A student as a LightningModule: trained with token labels, validated with classes.

        module = TokenLabelModule(student, lambda net: torch.optim.AdamW(net.parameters(), 1e-3))
        lightning.Trainer(max_epochs=300).fit(module, train_loader, validation_loader)

    It logs `train_loss`, `val_loss` and `val_acc` (top-1). `load_backbone` takes the bare model out
    of its checkpoints.

    Args:
        student: a `TokenStudent`, or LV-ViT.
        optimizer: from the student to what `configure_optimizers` returns: an optimizer, or with a
            schedule.
        criterion: the training loss; None: `TokenLabelLoss()`.
        mix: mixes images and labels of a batch in training, as `MixUpOrCutMix`; None: nothing.
    """

    def __init__(
        self,
        student: nn.Module,
        optimizer: Callable[[nn.Module], Any],
        *,
        criterion: TokenLabelLoss | None = None,
        mix: Callable[[Tensor, Any], tuple[Tensor, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.student, self.criterion = student, criterion or TokenLabelLoss()
        self.optimizer, self.mix = optimizer, mix

    def forward(self, images: Tensor) -> Any:
        """What the student gives for images [B, channels, H, W]."""
        return self.student(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The criterion of a batch (images, TokenLabels)."""
        images, labels = batch
        if self.mix:
            images, labels = self.mix(images, labels)
        loss: Tensor = self.criterion(self.student(images), labels)
        self.log("train_loss", loss, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log cross entropy and top-1 of a batch (images, classes)."""
        images, classes = batch
        if isinstance(classes, TokenLabels):
            classes = classes.hard_label()
        logits = self.student(images)
        right = (logits.argmax(1) == classes).float().mean()
        found = {"val_loss": cross_entropy(logits, classes), "val_acc": right}
        # Of all processes, as what picks the best checkpoint must be.
        self.log_dict(found, batch_size=len(images), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """What `optimizer` makes for the student."""
        return self.optimizer(self.student)

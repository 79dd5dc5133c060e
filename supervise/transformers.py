# mypy: allow-subclassing-any
"""Token labels for Hugging Face's `Trainer`. Needs the extra `transformers`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..dataset.targets.token_labels import TokenLabels
from .loss import TokenLabelLoss
from .student import TokenStudent


def collate(rows: Sequence[Any]) -> dict[str, Any]:
    """A batch for `Trainer`, {"pixel_values": [B, 3, H, W], "labels": TokenLabels or int64 [B]}.

    Args:
        rows: (image, TokenLabels) of a `TokenLabelDataset`, (image, class) of an ImageFolder, or
            dictionaries with "pixel_values" and "labels" or "label", as those of Hugging Face
            `datasets`, of which other columns are left out.
    """
    if isinstance(rows[0], Mapping):
        name = "labels" if "labels" in rows[0] else "label"
        rows = [(row["pixel_values"], row[name]) for row in rows]
    images, labels = default_collate(list(rows))
    return {"pixel_values": images, "labels": labels}


class TokenLabelTrainer(Trainer):
    """`transformers.Trainer` for a `TokenStudent`: token labels in training, classes in evaluation.

        trainer = TokenLabelTrainer(
            student, arguments, train_dataset=dataset, eval_dataset=validation_dataset(...)
        )
        trainer.train()
        trainer.save_model(folder)  # of the bare model, for its class' from_pretrained

    Args:
        model: the student, LV-ViT among them, or a model of Hugging Face to make one of.
        args: as for `Trainer`.
        criterion: the training loss; None: `TokenLabelLoss`, with the `label_smoothing_factor` of
            `args`.
        mix: mixes images and labels of a batch in training, as `MixUpOrCutMix`; None: nothing.
        **options: of `Trainer`. `data_collator` is `collate` where none is given.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        criterion: TokenLabelLoss | None = None,
        mix: Callable[[Tensor, Any], tuple[Tensor, Any]] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, PreTrainedModel):
            model = TokenStudent(model)
        options["data_collator"] = options.get("data_collator") or collate
        super().__init__(model, args, **options)
        self.args.remove_unused_columns = False  # by names of the model's arguments
        smoothing = self.args.label_smoothing_factor
        self.criterion = criterion or TokenLabelLoss(label_smoothing=smoothing)
        self.mix = mix
        self.label_names = ["labels"]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The criterion of a batch: of its records in training, of its classes in evaluation."""
        images, labels = inputs["pixel_values"], inputs["labels"]
        if model.training and self.mix:
            images, labels = self.mix(images, labels)
        output = model(images)
        loss = self.criterion(output, labels)
        logits = output if isinstance(output, Tensor) else output[0]
        return (loss, {"logits": logits}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loss, class logits and classes of a batch."""
        labels = inputs.get("labels")
        if isinstance(labels, TokenLabels):
            inputs = {**inputs, "labels": labels.hard_label()}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the bare model and all else that `Trainer` saves; checkpoints hold the student.

        `tokenlabel.load_backbone` loads the model out of these.
        """
        student = self.accelerator.unwrap_model(self.model)
        is_checkpoint = _internal_call and output_dir is not None  # a push to the hub names none
        if is_checkpoint or not isinstance(student, TokenStudent):
            super().save_model(output_dir, _internal_call)
            return
        whole, self.model = self.model, student.model
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.model = whole

"""LV-ViT learns from label maps: its parameters, and 20 steps with MixToken on 8 real images.

    make annotate SPLIT=train
    python benchmarks/lvvit.py --images data/sample/train --labels labels/train

Trains LV-ViT-S at 224 px in batches of 2, with AdamW, MixToken and the token labeling loss, and
prints the loss of every step; three minutes of CPU time. Mixed labels leave a floor that differs
from box to box, so the loss of the 8 images, unmixed, before and after is printed too.
"""

import argparse

import torch
from torch import nn

from tokenlabel.dataset import TokenLabelDataset, train_transform
from tokenlabel.supervise import (
    MixToken,
    TokenLabelLoss,
    lvvit_l,
    lvvit_m,
    lvvit_s,
    lvvit_t,
)

IMAGES, BATCH = 8, 2
#: Makers, the resolution of the published figure, the figure in millions.
SIZES = {
    "T": (lvvit_t, 224, 8.53),
    "S": (lvvit_s, 224, 26.15),
    "M": (lvvit_m, 224, 55.83),
    "L": (lvvit_l, 448, 150.47),
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def print_parameters() -> None:
    print("LV-ViT  parameters   without patch head  paper")
    for name, (make, size, published) in SIZES.items():
        with torch.device("meta"):
            model = make(image_size=size)
        total = count(model)
        print(f"{name:6}  {total:11,}  {total - count(model.patch_head):18,}  {published} M")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", default="data/sample/train")
    parser.add_argument("--labels", default="labels/train")
    parser.add_argument("--model", choices=SIZES, default="S")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print_parameters()

    torch.manual_seed(options.seed)
    model = SIZES[options.model][0](image_size=options.size)
    transform = train_transform(options.size, auto_augment=None, erase_prob=0.0)
    dataset = TokenLabelDataset(
        options.images, options.labels, transform=transform, grid=model.grid
    )
    rows = torch.linspace(0, len(dataset) - 1, IMAGES).long().tolist()
    samples = [dataset[row] for row in rows]
    batches = [
        torch.utils.data.default_collate(samples[start : start + BATCH])
        for start in range(0, IMAGES, BATCH)
    ]
    criterion, mix = TokenLabelLoss(), MixToken()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)

    def unmixed() -> float:
        with torch.no_grad():
            losses = [criterion(*model(images), labels) for images, labels in batches]
        return float(torch.stack(losses).mean())

    print(f"\n8 images, unmixed: {unmixed():.3f}\nstep  box    loss")
    for step in range(options.steps):
        images, labels = batches[step % len(batches)]
        box = mix.sample(model.grid)
        outputs = model(images, box)
        loss = criterion(*outputs, labels if box is None else box.mix_labels(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"{step:4}  {0 if box is None else box.area:.3f}  {loss.item():.3f}", flush=True)
    print(f"8 images, unmixed: {unmixed():.3f}")


if __name__ == "__main__":
    main()

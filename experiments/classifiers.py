"""Train the classifiers whose features FID-c and KID-c use, and write their weights into the package.

python -m experiments.classifiers    about half an hour on two cores

Each weights file records the accuracy of its half-precision weights on the official test images.
``results/classifiers.md`` lists all accuracies (``--names`` without a name writes only this list).
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_nbvae.batching import batches
from pyro_nbvae.metrics.classifier import WEIGHTS, ImageClassifier
from pyro_nbvae.study.build import choose_device
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.data import Data, load
from pyro_nbvae.study.files import write_atomically
from pyro_nbvae.study.provenance import write_page


class Recipe(NamedTuple):
    """Training of one classifier: number of epochs, and whether to augment with mirrored images."""

    epochs: int
    mirror: bool


RECIPES = {"digits": Recipe(40, False), "mnist": Recipe(6, False), "fashion_mnist": Recipe(8, True)}
RECIPES |= {"cifar16-blocks": Recipe(20, True), "cifar32": Recipe(16, True)}


def augmented(x: Tensor, mirror: bool, shift: int = 2) -> Tensor:
    """Shift every image (B, C, H, W) by up to ``shift`` pixels, repeating the edges, and mirror half of them."""
    count, _, height, width = x.shape
    padded = nn.functional.pad(x, (shift,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * shift + 1, (2, count, 1), device=x.device)
    rows = top + torch.arange(height, device=x.device)
    columns = left + torch.arange(width, device=x.device)
    if mirror:
        columns = torch.where(torch.rand(count, 1, device=x.device) < 0.5, columns, columns.flip(1))
    image = torch.arange(count, device=x.device)[:, None, None]
    # indices around a slice put the indexed axes first
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def fit(data: Data, recipe: Recipe, device: torch.device, batch_size: int = 256) -> ImageClassifier:
    """Train a classifier by SGD with a one-cycle learning rate schedule and label smoothing."""
    assert data.train_labels is not None
    images, labels = data.train.to(device), data.train_labels.to(device)
    channels, height, width = data.event_shape
    classifier = ImageClassifier((channels, height, width), int(labels.max()) + 1).to(device)
    steps = len(images) // batch_size
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=recipe.epochs * steps, pct_start=0.2)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    with tqdm(total=recipe.epochs * steps, desc=data.name, unit="step") as bar:
        for _ in range(recipe.epochs):
            order = torch.randperm(len(images), device=device)[: steps * batch_size]
            for x, y in zip(batches(images, batch_size, order), labels[order].split(batch_size), strict=True):
                with torch.autocast(device.type, torch.bfloat16):
                    loss = loss_of(classifier(augmented(x, recipe.mirror)), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{float(loss):.3f}")
    return classifier


@torch.no_grad()
def accuracy(classifier: ImageClassifier, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy on uint8 images."""
    found = torch.cat([classifier(x).argmax(-1) for x in batches(images, 500)])
    return float((found == labels).double().mean())


def make(name: str, path: Path, data_root: str | None, device: str, seed: int) -> None:
    """Train one classifier and write its weights."""
    torch.manual_seed(seed)
    data = load(name, data_root)
    assert data.test_labels is not None
    # in half precision, as in the file
    trained = fit(data, RECIPES[name], choose_device(device)).cpu().eval().half().float()
    share = f"{accuracy(trained, data.test, data.test_labels):.4f}"
    facts = {"data": name, "epochs": str(RECIPES[name].epochs), "seed": str(seed), "test_accuracy": share}
    write_atomically(path, lambda file: trained.save(file, facts))
    print(f"{path}: {share} of the {len(data.test)} test images, {path.stat().st_size} bytes")


def listed(folder: Path) -> list[dict[str, str]]:
    """Read the headers of the weights files in a folder, one row per file."""
    paths = {name: folder / f"{name}.safetensors" for name in RECIPES}
    found = {name: ImageClassifier.load(path)[1] for name, path in paths.items() if path.exists()}
    accuracies = {name: f"{100 * float(facts['test_accuracy']):.1f} %" for name, facts in found.items()}
    return [
        {"weights": name, "epochs": facts["epochs"], "accuracy on the test images": accuracies[name]}
        for name, facts in found.items()
    ]


def main(
    names: tuple[str, ...] = tuple(RECIPES),
    out: Path = WEIGHTS,
    table: Path = Path("results/classifiers.md"),
    data_root: str | None = None,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Train the classifiers of FID-c and KID-c, and write their weights and the table.

    Args:
        names: names of the classifiers.
        out: folder for the weights.
        table: path of the table.
        data_root: folder of the data sets.
        device: auto or a PyTorch device string.
        seed: random seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        make(name, out / f"{name}.safetensors", data_root, device, seed)
    caption = "The classifiers whose features FID-c and KID-c use; values from the headers of the weights files."
    print(write_page(table, listed(out), caption, "python -m experiments.classifiers"))


if __name__ == "__main__":
    script(main)

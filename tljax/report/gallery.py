"""Grids of captioned pictures, and the PNG files and folders they are written to."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tljax.attack.evaluate import Robustness
from tljax.data.listing import first_image
from tljax.report.figures import robustness_curve, write_figure
from tljax.report.grid import image_grid
from tljax.runtime.errors import RequestError
from tljax.runtime.files import atomic_write, mark_output
from tljax.studies.pictures import Picture
from tljax.studies.robustness import AttackPictures


def grid(pictures: Sequence[Picture], columns: int, *, smallest: int = 0) -> Image.Image:
    """Arrange pictures with their captions in a grid of square cells.

    Args:
        pictures: any sizes.
        columns: number of cells in a row.
        smallest: lower bound of a cell's side, in pixels; otherwise the height of the tallest
            picture.
    """
    return image_grid(
        [picture.pixels for picture in pictures],
        [picture.caption for picture in pictures],
        columns=columns,
        cell=max(smallest, *(picture.pixels.shape[0] for picture in pictures)),
    )


def write_png(path: Path, image: Image.Image | np.ndarray) -> None:
    """Write an image or a ``[height, width, 3]`` uint8 array as PNG; it appears when complete."""
    with atomic_write(path) as temporary:
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(temporary, "PNG")


def open_output(folder: Path) -> None:
    """Create an output folder, marked so that it is never read as data.

    Raises:
        RequestError: if it cannot be written, or contains images that tljax did not write.
    """
    if image := first_image(folder):
        raise RequestError(f"{folder} holds images, such as {image}: choose another --out")
    mark_output(folder)


def write_attack_pictures(
    out: Path, robustness: Robustness, paintings: Sequence[AttackPictures]
) -> list[Path]:
    """Write the robustness curve, a grid of all pictures, and the attack's pictures one by one.

    Args:
        out: the folder.
        robustness: the accuracies for the curve.
        paintings: the pictures of each attacked image; the unattacked image is only in the grid.

    Returns:
        The files that were written: ``curve.png``, ``grid.png``, then one for each picture.
    """
    curve = robustness_curve(
        robustness.epsilons * 255,
        float(robustness.clean.mean()),
        {name: robustness.accuracy(name) for name in robustness.outcomes},
    )
    pictures = [picture for painting in paintings for picture in painting.pictures]
    paths = [out / "curve.png", out / "grid.png"]
    write_figure(paths[0], curve)
    write_png(paths[1], grid(pictures, 3, smallest=224))
    for picture in pictures:
        if not picture.name.endswith("-photograph"):
            paths.append(out / f"{picture.name}.png")
            write_png(paths[-1], picture.pixels)
    return paths

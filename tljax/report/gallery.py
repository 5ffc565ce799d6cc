"""Captioned pictures on paper: grids, PNG files, and the folder that they go to."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tljax.attack.evaluate import Robustness
from tljax.data.folders import first_image
from tljax.report.figures import robustness_curve, write_figure
from tljax.report.grid import image_grid
from tljax.runtime.errors import RequestError
from tljax.runtime.files import mark_output, written_whole
from tljax.studies.pictures import Picture
from tljax.studies.robustness import Painting


def grid(pictures: Sequence[Picture], columns: int, *, smallest: int = 0) -> Image.Image:
    """All pictures with their captions, in cells as large as the tallest, or as ``smallest``."""
    return image_grid(
        [picture.pixels for picture in pictures],
        [picture.caption for picture in pictures],
        columns=columns,
        cell=max(smallest, *(picture.pixels.shape[0] for picture in pictures)),
    )


def write_png(path: Path, image: Image.Image | np.ndarray) -> None:
    """Writes a whole PNG file or none; arrays are ``[height, width, 3]`` uint8."""
    with written_whole(path) as temporary:
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(temporary, "PNG")


def open_output(folder: Path) -> None:
    """Make a folder for pictures that is never read as data.

    Raises:
        RequestError: it cannot be written, or holds images that tljax did not write.
    """
    if found := first_image(folder):
        raise RequestError(f"{folder} holds images, {found}: choose another --out")
    mark_output(folder)


def write_attack_pictures(
    out: Path, found: Robustness, paintings: Sequence[Painting]
) -> list[Path]:
    """Writes the curve, the grid, and for each painting the perturbation and the adversarial PNG.

    Returns:
        The files, in that order.
    """
    curve = robustness_curve(
        found.epsilons * 255,
        float(found.clean.mean()),
        {name: found.accuracy(name) for name in found.outcomes},
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

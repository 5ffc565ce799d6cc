"""Every network, from every format that it has, against its reference implementation."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from networks import assert_same_variables, difference, random_images
from references import FAST, REFERENCES

from tljax.models import MODELS, apply, normalize
from tljax.pretrained import export, load_pretrained
from tljax.pretrained.layouts import LAYOUTS

TOLERANCE = 1e-4
PAIRS = [
    pytest.param(name, layout, marks=[] if name in FAST else pytest.mark.slow)
    for name, layout in REFERENCES
]


def test_every_model_and_layout_has_a_reference() -> None:
    expected = {(name, layout) for name in MODELS for layout in LAYOUTS[name]}
    assert set(REFERENCES) == {
        (name, layout) for name, layout in expected if not _is_alias(name, layout)
    }


def _is_alias(name: str, layout: str) -> bool:
    """Whether an earlier layout of the model has the same table."""
    first = next(key for key, found in LAYOUTS[name].items() if found is LAYOUTS[name][layout])
    return first != layout


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_every_stage_agrees_and_export_is_the_inverse(
    name: str, layout: str, tmp_path: Path
) -> None:
    reference = REFERENCES[name, layout](tmp_path / "theirs")
    pretrained = load_pretrained(reference.weights, model=name)
    model, variables, card = pretrained
    assert (model.name, card.layout) == (name, layout)
    run = jax.jit(partial(apply, model, capture=model.stage_names))
    for size in reference.sizes:
        images = random_images(2, *size)
        captured = run(variables, images).captured
        theirs = reference.stages(np.asarray(normalize(images, model.preprocess)))
        assert tuple(theirs) == model.stage_names
        differences = {stage: difference(captured[stage], theirs[stage]) for stage in theirs}
        assert max(differences.values()) <= TOLERANCE, differences

    path = tmp_path / "ours" / reference.weights.name
    export(path, pretrained, layout)
    again = load_pretrained(path, model=name)
    assert again.card.layout == layout
    assert_same_variables(again.variables, variables)

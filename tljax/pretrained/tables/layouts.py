"""The key tables of each network."""

from functools import cache

from tljax.models import MODELS, Model, abstract_variables
from tljax.pretrained.rules import Layout, Rules
from tljax.pretrained.tables import (
    bit,
    convnext,
    efficientnet,
    inception,
    keras,
    mobilenet,
    mobilenetv4,
    regnet,
    resnet,
    vgg,
    vit,
    xception,
)
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten

_FAMILIES = (
    resnet,
    bit,
    inception,
    xception,
    efficientnet,
    vgg,
    mobilenet,
    regnet,
    convnext,
    mobilenetv4,
    vit,
    keras,
)

LAYOUTS: dict[str, dict[str, Layout]] = {
    model: {
        name: layout
        for family in _FAMILIES
        for name, layout in family.LAYOUTS.get(model, {}).items()
    }
    for model in MODELS
}
"""The layouts of each model, by name."""


@cache
def layout_rules(model: str, layout: str) -> Rules:
    """Return the key table of a model in a layout.

    Raises:
        RequestError: the model has no such layout.
    """
    layouts = LAYOUTS.get(model, {})
    if layout not in layouts:
        known = ", ".join(layouts) or "tljax"
        raise RequestError(f"there is no layout '{layout}' for {model}; known: {known}")
    return LAYOUTS[model][layout].table(model)


def table(model: Model, layout: str) -> Rules:
    """Return the rules of a layout for the stages that a model has."""
    paths = flatten(abstract_variables(model))
    return tuple(rule for rule in layout_rules(model.name, layout) if rule.path in paths)


def head_bias_key(rules: Rules) -> str:
    """Return the key of the head's bias, whose size is the number of classes."""
    return next(rule.key for rule in rules if rule.path == "params/head/bias")

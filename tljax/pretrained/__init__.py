"""Foreign weights in, foreign weights out."""

from tljax.pretrained.catalog import CATALOG, imagenet_classes
from tljax.pretrained.load import Card, Pretrained, export, load_pretrained, save

__all__ = ["CATALOG", "Card", "Pretrained", "export", "imagenet_classes", "load_pretrained", "save"]

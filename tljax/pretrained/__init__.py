"""Pretrained weights: load, verify, save and export them."""

from tljax.pretrained.adapters import Adapted as Adapted
from tljax.pretrained.adapters import load_adapter as load_adapter
from tljax.pretrained.adapters import save_adapter as save_adapter
from tljax.pretrained.catalog import CATALOG as CATALOG
from tljax.pretrained.catalog import imagenet_classes as imagenet_classes
from tljax.pretrained.exports import export as export
from tljax.pretrained.load import load_pretrained as load_pretrained
from tljax.pretrained.native import save as save
from tljax.pretrained.network import Card as Card
from tljax.pretrained.network import Pretrained as Pretrained

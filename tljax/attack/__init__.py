"""Whatever optimises an input against a network.

An attack is a pure function ``attack(logits_fn, images, labels, key, *, epsilon, ...) -> images``.
It knows functions and arrays and nothing of tljax's networks: any JAX classifier can be attacked.
"""

from tljax.attack.apgd import apgd as apgd
from tljax.attack.apgd import apgd_t as apgd_t
from tljax.attack.fab import fab_t as fab_t
from tljax.attack.pgd import bim as bim
from tljax.attack.pgd import fgsm as fgsm
from tljax.attack.pgd import mi_fgsm as mi_fgsm
from tljax.attack.pgd import pgd as pgd
from tljax.attack.square import square as square

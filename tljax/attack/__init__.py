"""Adversarial attacks, and the evaluation of robust accuracy.

An attack is a pure function ``attack(logits_fn, images, labels, key, *, epsilon, ...) -> images``.
It does not depend on tljax's networks: any JAX classifier can be attacked.
"""

from tljax.attack.apgd import apgd as apgd
from tljax.attack.apgd import apgd_t as apgd_t
from tljax.attack.carlini_wagner import carlini_wagner as carlini_wagner
from tljax.attack.deepfool import deepfool as deepfool
from tljax.attack.ensemble import auto_attack as auto_attack
from tljax.attack.ensemble import ensemble as ensemble
from tljax.attack.eot import eot as eot
from tljax.attack.evaluate import Robustness as Robustness
from tljax.attack.evaluate import evaluate as evaluate
from tljax.attack.evaluate import round_inward as round_inward
from tljax.attack.evaluate_labels import LabelRobustness as LabelRobustness
from tljax.attack.evaluate_labels import evaluate_labels as evaluate_labels
from tljax.attack.fab import fab_t as fab_t
from tljax.attack.flags import check_network as check_network
from tljax.attack.pgd import bim as bim
from tljax.attack.pgd import fgsm as fgsm
from tljax.attack.pgd import mi_fgsm as mi_fgsm
from tljax.attack.pgd import pgd as pgd
from tljax.attack.square import square as square

"""Files of adapters: what training changed of a network, with the hash of what it did not change.

One safetensors file of a few hundred KB. Its header names the base, which is loaded again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax.models import MODELS, Model, abstract_variables
from tljax.models.adapters import A, B, factor_shapes, merge_lora
from tljax.models.spec import Modules, from_json, is_number, to_json
from tljax.pretrained.fetch import fetch_object
from tljax.pretrained.formats import Tensors, read_tensors, write_safetensors
from tljax.pretrained.load import ADAPTER, load_pretrained
from tljax.pretrained.native import card_json, read_card, task_fault
from tljax.pretrained.network import Card, Pretrained
from tljax.pretrained.rules import apply_rules, native_rules
from tljax.runtime.errors import RequestError
from tljax.runtime.files import open_path
from tljax.runtime.trees import flatten, tree_digest, unflatten
from tljax.runtime.types import Variables

_VERSION = 1


class Adapted(NamedTuple):
    """A network whose adapter is kept apart from its base.

    Several may share the arrays of one base.

    Attributes:
        model: the network.
        trainable: what the adapter holds: parameters, and running statistics if they have changed.
        frozen: the variables of the base that it leaves as they are.
        scale: factor of LoRA's products.
        card: metadata of the whole.
    """

    model: Model
    trainable: Variables
    frozen: Variables
    scale: float
    card: Card

    def materialize(self, trainable: Variables, frozen: Variables) -> Variables:
        """Return the parameters of the network, as `tljax.make_train_step` needs it.

        Args:
            trainable: ``self.trainable["params"]``, or other values of them.
            frozen: ``self.frozen["params"]``.
        """
        return merge_lora(trainable, frozen, scale=self.scale)

    def merged(self) -> Pretrained:
        """Return the whole network, for everything that knows no adapters."""
        changed, frozen = self.trainable, self.frozen
        params = self.materialize(changed["params"], frozen["params"])
        stats = flatten(frozen["batch_stats"]) | flatten(changed["batch_stats"])
        variables = {"params": params, "batch_stats": unflatten(stats)}
        return Pretrained(self.model, jax.device_get(variables), self.card)


def save_adapter(
    path: Path, network: Pretrained, base: Pretrained, *, weights: str, scale: float = 1.0
) -> None:
    """Write what distinguishes a network from its base, for `load_adapter` and `load_pretrained`.

    Args:
        path: output file, ``.safetensors``; an existing one is replaced.
        network: the network with the parameters of its adapter, such as ``unmerged`` of the result
            of `tljax.fit`.
        base: the network that it was trained from.
        weights: what `load_pretrained` takes to load ``base`` again.
        scale: factor of LoRA's products, alpha / rank.

    Raises:
        RequestError: the variables or the task do not fit the model, a setting of a stage is not
            serializable, or the file cannot be written.
    """
    model, variables, card = network
    if fault := task_fault(model, card):
        raise RequestError(f"{path} is not written: {fault:.200}")
    before = flatten(base.variables)
    flat = {key: np.asarray(leaf) for key, leaf in flatten(variables).items()}
    changed = {
        key: leaf
        for key, leaf in flat.items()
        if key not in before or not np.array_equal(leaf, before[key])
    }
    trainable, frozen = _divide(model, changed, flat)
    misfit = f"{path} is not written, as its variables do not fit {model.name}"
    _check(model, trainable, frozen, f"{path} is not written", misfit)
    header = {
        "version": _VERSION,
        "weights": weights,
        "base": base.model.name,
        "sha256": base.card.sha256,
        "frozen": tree_digest(frozen),
        "scale": scale,
        "model": to_json(model),
        "card": card_json(card),
    }
    write_safetensors(path, changed, {ADAPTER: json.dumps(header)})


def load_adapter(
    path: str | Path, base: Pretrained | None = None, *, modules: Modules | None = None
) -> Adapted:
    """Load an adapter and keep it apart from its base; `load_pretrained` merges them.

    Args:
        path: file that `save_adapter` or ``tljax train --adapter`` has written, or the run.
        base: the network that it was trained from. By default it is loaded from where it was, or,
            if that was a path that no longer exists, from the same name beside the adapter.
        modules: Flax classes by name for user-defined stages, as for `load_pretrained`.

    Raises:
        RequestError: the file is damaged or no adapter, or its base cannot be loaded or has changed
            since.
    """
    path = open_path(path)
    if (path / "best" / "adapter.safetensors").exists():
        path = path / "best" / "adapter.safetensors"
    tensors = read_tensors(fetch_object(path))
    if ADAPTER not in tensors.metadata:
        raise RequestError(f"{path} is no adapter of tljax: load it by load_pretrained")
    return read_adapter(path, tensors, base, modules)


def read_adapter(
    path: Path, tensors: Tensors, base: Pretrained | None, modules: Modules | None
) -> Adapted:
    """Read an adapter from the content of its file; see `load_adapter`."""
    header = _read_header(path, tensors.metadata[ADAPTER])
    card, scale = header["card"], header["scale"]
    try:
        model = from_json(header.get("model"), modules)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    if fault := task_fault(model, card):
        raise RequestError(
            f"{path}: the header of this adapter is damaged ({fault:.200}); write or fetch the "
            "file again"
        )
    if base is None:
        base = _load_base(path, header, modules)
    trainable, frozen = _divide(model, tensors.arrays, flatten(base.variables))
    if tree_digest(frozen) != header["frozen"]:
        raise RequestError(
            f"{path}: its base {base.card.source} has other weights than those it was trained on, "
            f"of SHA-256 {header['sha256']}: restore them"
        )
    _check(model, trainable, frozen, str(path), f"{path} does not fit {model.name}")
    return Adapted(model, trainable, frozen, scale, card)


def _read_header(path: Path, text: str) -> dict[str, Any]:
    """Parse and check a header; its ``card`` becomes a `Card`."""
    try:
        header = json.loads(text)
        if (version := int(header["version"])) > _VERSION:
            raise RequestError(
                f"{path} is an adapter of version {version}, but this tljax reads up to version "
                f"{_VERSION}: upgrade tljax"
            )
        names = [header[name] for name in ("weights", "base", "sha256", "frozen")]
        if not (is_number(header["scale"]) and all(isinstance(name, str) for name in names)):
            raise TypeError((header["scale"], *names))  # noqa: TRY301
        return {**header, "card": read_card(header["card"]), "scale": float(header["scale"])}
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{path}: the header of this adapter is damaged ({error!r:.200}); write or fetch the "
            "file again"
        ) from error


def _load_base(path: Path, header: Mapping[str, Any], modules: Modules | None) -> Pretrained:
    weights, beside = Path(header["weights"]), path.parent / Path(header["weights"]).name
    moved = weights.is_absolute() and not weights.exists() and beside.exists()
    model = header["base"] if header["base"] in MODELS else None
    try:
        return load_pretrained(beside if moved else header["weights"], model=model, modules=modules)
    except RequestError as error:
        raise RequestError(
            f"{path}: its base cannot be loaded: {error}; restore it, or put it beside this file"
        ) from error


def _divide(
    model: Model, changed: Mapping[str, np.ndarray], base: Mapping[str, Any]
) -> tuple[Variables, Variables]:
    """Return the variables of an adapter, and those of its base that the network keeps."""
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_variables(model)).items()}
    frozen = {
        path: leaf
        for path, leaf in base.items()
        if path not in changed and shapes.get(path) == leaf.shape
    }
    return _variables(changed), _variables(frozen)


def _variables(flat: Mapping[str, Any]) -> Variables:
    return {"params": {}, "batch_stats": {}, **unflatten(flat)}


def _check(model: Model, trainable: Variables, frozen: Variables, where: str, misfit: str) -> None:
    """Check that an adapter and its base make up a network, with finite values.

    Raises:
        RequestError: a variable is missing, left over or not finite, or has another shape.
    """
    skeleton, arrays = flatten(abstract_variables(model)), flatten(trainable)
    for path, a in arrays.items():
        module = path.removesuffix(f"/{A}")
        kernel = skeleton.get(f"{module}/kernel")
        if path.endswith(f"/{A}") and kernel is not None and a.ndim:
            for name, shape in zip((A, B), factor_shapes(kernel.shape, a.shape[-1]), strict=True):
                skeleton[f"{module}/{name}"] = jax.ShapeDtypeStruct(shape, np.float32)
    arrays |= flatten(frozen)
    expected = unflatten(skeleton)
    apply_rules(native_rules(arrays, expected, misfit), arrays, expected, where)

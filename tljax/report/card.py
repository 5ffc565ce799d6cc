"""The README.md of a run directory: a model card for the Hugging Face Hub.

Mitchell et al., "Model Cards for Model Reporting", 2019, https://arxiv.org/abs/1810.03993. The
front matter follows https://huggingface.co/docs/hub/model-cards. The card states only what was
measured.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from jaxtyping import Integer

from tljax.metrics.calibration import Calibration
from tljax.metrics.classification import standard_error
from tljax.pretrained import Card
from tljax.report.page import encodable, per_class
from tljax.runtime.types import Preprocess

MAX_CLASSES = 10
"""Number of classes that the card lists, the lowest accuracies first; the report has all."""

# The licenses of pretrained weights that have an identifier on the Hub, from
# https://huggingface.co/docs/hub/repositories-licenses.
_LICENSES = {
    *("apache-2.0", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "mit", "openrail", "unknown"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
}


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The facts about a run that its model card states.

    Attributes:
        title: the heading of the card.
        model: the architecture, such as ``resnet50``.
        weights: the card of the pretrained weights, with the classes of the new network.
        preprocess: how an image is resized and cropped.
        base_model: the id of the pretrained network on the Hub, ``owner/name``; None if it is not
            there.
        data: the training data, as passed to ``--data``.
        train_examples: number of training images.
        recipe: the training settings that took effect.
        confusion: number of validation images of class ``row`` predicted as class ``column``.
        origin: ``tuned`` for a fine-tuned pretrained network, ``probe`` for a linear head on frozen
            features, ``scratch`` for a network without pretrained weights.
        validated: False if there were no validation images, so that the accuracies are those of the
            training images.
        remarks: sentences that the reader must know.
        attacked: accuracy under an attack, in [0, 1], and the name of the attack; None if it was
            not measured.
        top5: top-5 accuracy on the validation images, in [0, 1]; shown for more than five classes.
        calibration: calibration on the validation images.
        chosen_on_validation: True if the epoch was selected by its accuracy on the images of
            ``confusion``.
        seen_in_training: number of validation images that are also training images
            (`tljax.studies.duplicates`); None if they were not searched for.
        environment: versions and devices.
        workdir: the run directory, for the commands.
    """

    title: str
    model: str
    weights: Card
    preprocess: Preprocess
    data: str
    train_examples: int
    recipe: Mapping[str, str]
    confusion: Integer[np.ndarray, "classes classes"]
    origin: str = "tuned"
    validated: bool = True
    remarks: Sequence[str] = ()
    attacked: tuple[float, str] | None = None
    base_model: str | None = None
    top5: float | None = None
    calibration: Calibration | None = None
    chosen_on_validation: bool = False
    seen_in_training: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    workdir: str | Path = "."

    @property
    def measured(self) -> str:
        """Name the images on which the accuracies were measured."""
        return "validation images" if self.validated else "training images"


def model_card(run: RunFacts) -> str:
    """Return the text of ``README.md``: YAML front matter and Markdown.

    Names of classes, files and data sets are escaped, so that they are shown as they are and never
    read as YAML, Markdown or HTML. Line breaks in them become spaces.
    """
    examples = int(run.confusion.sum())
    top1 = float(np.trace(run.confusion) / examples) if examples else float("nan")
    sections = {
        "Data": _data(run, examples),
        "Training": _table(("setting", "value"), run.recipe.items()),
        "Results": _results(run, examples, top1),
        "Calibration": _calibration(run),
        "Limits": _limits(run, examples),
        "Use": _use(run),
        "License of the weights": _license(run),
        "Environment": _table(("", "version"), run.environment.items()),
    }
    parts = [f"# {_text(run.title)}", _introduction(run)]
    parts += [f"## {title}\n\n{body}" for title, body in sections.items() if body]
    return _front_matter(run, top1) + "\n" + "\n\n".join(parts) + "\n"


def _front_matter(run: RunFacts, top1: float) -> str:
    license_ = run.weights.licence.lower()
    listed = license_ in _LICENSES
    data = ModelCardData(
        license=license_ if listed else "other",
        license_name=None if listed else _printable(run.weights.licence),
        base_model=run.base_model and _printable(run.base_model),
        library_name="tljax",
        pipeline_tag="image-classification",
        tags=["jax", *["transfer-learning"] * (run.origin != "scratch"), _printable(run.model)],
    )
    if np.isfinite(top1) and run.validated:
        named = run.data == "digits" or run.data.startswith(("hf:", "tfds:"))
        data.metrics = ["accuracy"]
        data.model_name = _printable(run.title)
        data.eval_results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=_printable(run.data.removeprefix("hf:")) if named else "imagefolder",
                dataset_name=_printable(run.data),
                metric_type="accuracy",
                metric_value=round(top1, 4),
            )
        ]
    return f"---\n{data.to_yaml()}\n---\n"


def _introduction(run: RunFacts) -> str:
    pretrained, data = f"the pretrained network {_text(run.weights.source)}", _text(run.data)
    origin = {
        "tuned": f"{pretrained}, fine-tuned on {data}",
        "probe": f"a linear head on the frozen features of {pretrained}, fitted to {data}",
        "scratch": f"trained on {data} from random weights",
    }[run.origin]
    classes = len(run.weights.classes)
    return (
        f"A {_text(run.model)} that classifies images into {classes} classes: {origin}, with tljax."
    )


def _data(run: RunFacts, examples: int) -> str:
    preprocess = run.preprocess
    geometry = (
        f"An image is resized to a short side of {preprocess.resize} pixels"
        f" ({preprocess.interpolation}) and cropped to its central {preprocess.size} x"
        f" {preprocess.size} pixels."
    )
    if not run.validated:
        return f"{run.train_examples} training images and no validation images.\n\n{geometry}"
    count = run.seen_in_training
    if count is None:
        seen = "Duplicates of training images among them were not searched for."
    elif count:
        seen = f"{count} of them are also training images; the accuracies include them."
    else:
        seen = "None of them was found among the training images."
    return f"{run.train_examples} training and {examples} validation images. {seen}\n\n{geometry}"


def _results(run: RunFacts, examples: int, top1: float) -> str:
    if not examples:
        return "There were no validation images: the accuracy was not measured."
    error = standard_error(top1, examples)
    rows = [("top-1 accuracy", f"{top1:.1%}, standard error {error:.1%}")]
    if run.top5 is not None and len(run.weights.classes) > 5:
        rows.append(("top-5 accuracy", f"{run.top5:.1%}"))
    if run.attacked is not None:
        rows.append((f"top-1 accuracy under {run.attacked[1]}", f"{run.attacked[0]:.1%}"))
    results = per_class(run.confusion, run.weights.classes)
    listed = [result for result in results if result.examples][:MAX_CLASSES]
    title = f"The {len(listed)} classes with the lowest accuracy:"
    if len(listed) == len(results):
        title = "By class:"
    by_class = _table(
        ("class", "correct", "accuracy", "most often taken for"),
        (
            (name, f"{correct} of {count}", f"{correct / count:.1%}", most_confused_with or "")
            for name, count, correct, most_confused_with in listed
        ),
    )
    measured = f"On the {examples} {run.measured}:"
    return "\n\n".join([measured, _table(("metric", "value"), rows), title, by_class])


def _calibration(run: RunFacts) -> str:
    calibration = run.calibration
    if calibration is None:
        return ""
    rows = (
        ("uncalibrated", f"{calibration.before.error:.1%}", f"{calibration.loss_before:.3f}"),
        (
            "after temperature scaling",
            f"{calibration.after.error:.1%}",
            f"{calibration.loss_after:.3f}",
        ),
    )
    table = _table(("", "expected calibration error", "cross-entropy, nats"), rows)
    return (
        f"{table}\n\nThe second row was measured with temperatures that were fitted to other"
        f" images. The temperature fitted to all {run.measured} is {calibration.temperature:.3g}."
        " Divide the logits by it for calibrated probabilities: the network does not."
    )


def _limits(run: RunFacts, examples: int) -> str:
    attack = "another attack" if run.attacked else "an attack"
    limits = [
        *map(_text, run.remarks),
        f"Every image gets one of the {len(run.weights.classes)} classes, even if it shows none.",
        f"The accuracy on images unlike the {run.measured} or under {attack} was not measured.",
    ]
    if not run.validated:
        limits.append("The accuracy on other images than those of training was not measured.")
    if run.chosen_on_validation:
        limits.append(
            f"The epoch was selected by its accuracy on the {run.measured}, so the results are"
            " optimistic."
        )
    counts = run.confusion.sum(1)
    if examples and counts.min() < 30:
        few = int((counts < 30).sum())
        limits.append(
            f"{few} of {len(counts)} classes have fewer than 30 {run.measured}: their accuracies"
            " are imprecise."
        )
    return "\n".join(f"- {limit}" for limit in limits)


def _use(run: RunFacts) -> str:
    workdir = str(run.workdir)
    shell = f"tljax predict PHOTO.jpg --weights {shlex.quote(workdir)}"
    python = (
        "import numpy as np\n"
        "from tljax import apply, load_pretrained, read_images\n"
        "\n"
        f"model, variables, card = load_pretrained({workdir!r})\n"
        'images = read_images(["PHOTO.jpg"], model.preprocess)\n'
        "logits = apply(model, variables, images).logits\n"
        "print(card.classes[int(np.argmax(logits[0]))])"
    )
    return f"{_code('sh', shell)}\n\n{_code('python', python)}"


def _license(run: RunFacts) -> str:
    weights = run.weights
    if run.origin == "scratch":
        return ""
    known = weights.licence.lower() != "unknown"
    license_ = _text(weights.licence) if known else "unknown; ask before you pass it on"
    return (
        f"The license of the pretrained network {_text(weights.source)} is {license_}. The SHA-256"
        f" of its file is {_text(weights.sha256)}. The license of the training images was not"
        " checked."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(map(_text, row)) for row in rows]
    if not lines:
        return ""
    lines = [" | ".join(header), " | ".join("---" for _ in header), *lines]
    return "\n".join(f"| {line} |" for line in lines)


def _code(language: str, text: str) -> str:
    """Return a block of code in a fence that is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{encodable(text)}\n{fence}"


def _printable(text: str) -> str:
    """Return one line of text, with a replacement character for every control character."""
    text = " ".join(encodable(text).split())
    joiners = "\u200c\u200d"  # letters of Persian and many emoji need them
    return "".join(c if c.isprintable() or c in joiners else "\ufffd" for c in text)


def _text(text: str) -> str:
    """Escape a string for Markdown, so that bare addresses do not become links either."""
    escaped = re.sub(r"([\\`*_{}\[\]<>()#+!|~&$:@\"'^=])", r"\\\1", _printable(text))
    return re.sub(r"(?i)(www)\.", r"\1\\.", escaped)

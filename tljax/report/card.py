"""The README.md of a run directory: a model card that the Hugging Face hub understands.

Mitchell et al., "Model Cards for Model Reporting", 2019, https://arxiv.org/abs/1810.03993; the
front matter is that of https://huggingface.co/docs/hub/model-cards. It states what was measured,
and nothing else.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from tljax.metrics.calibration import Calibration
from tljax.metrics.classification import standard_error
from tljax.pretrained import Card
from tljax.report.page import per_class
from tljax.runtime.types import Preprocess

MOST_CLASSES = 10
"""The card lists as many classes, those with the lowest accuracy; the report has all."""

# Of https://huggingface.co/docs/hub/repositories-licenses, what pretrained weights come under.
_LICENCES = {
    *("apache-2.0", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "mit", "openrail", "unknown"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
}


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run.

    Attributes:
        title: of the card.
        model: the architecture, such as ``resnet50``.
        weights: of the pretrained network, with the classes that the new one tells apart.
        preprocess: how a photograph is cut.
        base_model: its id on the hub, ``owner/name``, if it is there.
        data: what it was trained on, as it was asked for.
        train_examples: number of images it was trained on.
        recipe: the settings of the training that took effect.
        confusion: number of validation images of class ``row`` predicted as class ``column``.
        origin: what was kept: a ``tuned`` pretrained network, a ``probe`` of frozen features, or a
            network from ``scratch``, of which nothing is pretrained.
        validated: whether there were validation images; if not, those of training were measured.
        remarks: sentences that the reader must know.
        attacked: accuracy under an attack and which that was; None if none was measured.
        top5: share of the validation images whose class is among the five most probable; shown for
            more than five classes.
        calibration: of the validation images.
        chosen_on_validation: whether the epoch that was kept is the one with the best result on the
            images that were measured.
        seen_in_training: number of validation images that were found among the training images
            (`tljax.studies.duplicates`); None if that was not looked for.
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
        """The images that accuracies are of."""
        return "validation images" if self.validated else "training images"


def model_card(run: RunFacts) -> str:
    """The text of ``README.md``: YAML front matter and Markdown.

    Strings from outside, such as the names of classes and files, are shown as they are: none of
    their characters means anything to YAML, Markdown or HTML. Line breaks in them become spaces.
    """
    examples = int(run.confusion.sum())
    top1 = float(np.trace(run.confusion) / examples) if examples else float("nan")
    sections = (
        ("", _introduction(run)),
        ("Data", _data(run, examples)),
        ("Training", _table(("setting", "value"), run.recipe.items())),
        ("Results", _results(run, examples, top1)),
        ("Calibration", _calibration(run)),
        ("Limits", _limits(run, examples)),
        ("Use", _use(run)),
        ("Licence of the weights", _licence(run)),
        ("Environment", _table(("", "version"), run.environment.items())),
    )
    body = [f"# {_text(run.title)}", *(_section(*section) for section in sections)]
    return _front_matter(run, top1) + "\n" + "\n\n".join(filter(None, body)) + "\n"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if title and body else body


def _front_matter(run: RunFacts, top1: float) -> str:
    licence = run.weights.licence.lower()
    lines = [f"license: {licence if licence in _LICENCES else 'other'}"]
    if licence not in _LICENCES:
        lines.append(f"license_name: {_yaml(run.weights.licence)}")
    if run.base_model is not None:
        lines.append(f"base_model: {_yaml(run.base_model)}")
    lines += [
        "library_name: tljax",
        "pipeline_tag: image-classification",
        "tags:",
        "- jax",
        *(["- transfer-learning"] if run.origin != "scratch" else []),
        f"- {_yaml(run.model)}",
    ]
    if np.isfinite(top1) and run.validated:
        named = run.data == "digits" or run.data.startswith(("hf:", "tfds:"))
        kind = run.data.removeprefix("hf:") if named else "imagefolder"
        lines += [
            "metrics:",
            "- accuracy",
            "model-index:",
            f"- name: {_yaml(run.title)}",
            "  results:",
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      type: {_yaml(kind)}",
            f"      name: {_yaml(run.data)}",
            "    metrics:",
            "    - type: accuracy",
            f"      value: {top1:.4f}",
        ]
    return "---\n" + "\n".join(lines) + "\n---\n"


def _introduction(run: RunFacts) -> str:
    pretrained, data = f"the pretrained network {_text(run.weights.source)}", _text(run.data)
    how = {
        "tuned": f"{pretrained}, transferred to {data}",
        "probe": f"a linear head on the frozen features of {pretrained}, fitted to {data}",
        "scratch": f"trained on {data} from random weights",
    }[run.origin]
    return (
        f"A {_text(run.model)} that tells {len(run.weights.classes)} classes of images apart:"
        f" {how}, with tljax."
    )


def _data(run: RunFacts, examples: int) -> str:
    cut = run.preprocess
    geometry = (
        f"An image is resized to a short side of {cut.resize} pixels ({cut.interpolation}), and its"
        f" central {cut.size} x {cut.size} pixels are used."
    )
    if not run.validated:
        return f"{run.train_examples} training images and none for validation.\n\n{geometry}"
    seen = {
        None: "Whether validation images were seen in training was not looked for.",
        0: "None of the validation images was found among the training images.",
    }
    count = run.seen_in_training
    of_count = f"{count} of the {examples} validation images were found among the training images:"
    of_count += " accuracies count them."
    return (
        f"{run.train_examples} training and {examples} validation images."
        f" {seen.get(count, of_count)}\n\n{geometry}"
    )


def _results(run: RunFacts, examples: int, top1: float) -> str:
    if not examples:
        return "There were no validation images, so nothing is known of its accuracy."
    error = standard_error(top1, examples)
    rows = [("top-1 accuracy", f"{top1:.1%}, standard error {error:.1%}")]
    if run.top5 is not None and len(run.weights.classes) > 5:
        rows.append(("top-5 accuracy", f"{run.top5:.1%}"))
    if run.attacked is not None:
        rows.append((f"top-1 accuracy under {run.attacked[1]}", f"{run.attacked[0]:.1%}"))
    results = per_class(run.confusion, run.weights.classes)
    listed = [result for result in results if result.examples][:MOST_CLASSES]
    title = "By class:" if len(listed) == len(results) else f"The {len(listed)} weakest classes:"
    by_class = _table(
        ("class", "correct", "accuracy", "most often taken for"),
        (
            (name, f"{correct} of {count}", f"{correct / count:.1%}", taken_for or "")
            for name, count, correct, taken_for in listed
        ),
    )
    of_images = f"On the {examples} {run.measured}:"
    return "\n\n".join([of_images, _table(("metric", "value"), rows), title, by_class])


def _calibration(run: RunFacts) -> str:
    found = run.calibration
    if found is None:
        return ""
    rows = (
        ("as it is", f"{found.before.error:.1%}", f"{found.loss_before:.3f}"),
        ("after temperature scaling", f"{found.after.error:.1%}", f"{found.loss_after:.3f}"),
    )
    table = _table(("", "expected calibration error", "cross-entropy, nats"), rows)
    return (
        f"{table}\n\nThe second row was measured with temperatures fitted on other images. The"
        f" temperature of all {run.measured} is {found.temperature:.3g}; divide the logits by it"
        f" for calibrated probabilities. The network returns them without."
    )


def _limits(run: RunFacts, examples: int) -> str:
    classes = len(run.weights.classes)
    how = " by another attack" if run.attacked else ""
    limits = [
        *map(_text, run.remarks),
        f"Every image gets one of the {classes} classes, also one that shows none of them.",
        f"Nothing was measured on images unlike the {run.measured}, or changed on purpose{how}.",
    ]
    if not run.validated:
        limits.append("Accuracy on other images than those of training was not measured.")
    if run.chosen_on_validation:
        limits.append(
            f"The {run.measured} also decided which epoch was kept, so the results flatter."
        )
    counts = run.confusion.sum(1)
    if examples and counts.min() < 30:
        few = int((counts < 30).sum())
        limits.append(
            f"{few} of {len(counts)} classes had fewer than 30 {run.measured}: their accuracies"
            " are rough."
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


def _licence(run: RunFacts) -> str:
    weights = run.weights
    if run.origin == "scratch":
        return ""
    known = weights.licence.lower() != "unknown"
    licence = f"is {_text(weights.licence)}" if known else "is not known; ask before you pass it on"
    return (
        f"The licence of the pretrained network {_text(weights.source)} {licence}. Its file has the"
        f" SHA-256 {_text(weights.sha256)}. That of the images it was then trained on was not"
        " looked at."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(map(_text, row)) for row in rows]
    if not lines:
        return ""
    lines = [" | ".join(header), " | ".join("---" for _ in header), *lines]
    return "\n".join(f"| {line} |" for line in lines)


def _code(language: str, text: str) -> str:
    """A fence longer than any in the text, so that nothing in it ends the block."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{_encodable(text)}\n{fence}"


def _encodable(text: str) -> str:
    """Escapes for the bytes of a file name that are not Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


def _printable(text: str) -> str:
    """One line without characters that control; a replacement character stands for them."""
    text = " ".join(_encodable(text).split())
    joiners = "\u200c\u200d"  # letters of Persian and many emoji need them
    return "".join(c if c.isprintable() or c in joiners else "\ufffd" for c in text)


def _text(text: str) -> str:
    """A string as Markdown that shows it. GitHub's and the hub's make links of bare addresses."""
    escaped = re.sub(r"([\\`*_{}\[\]<>()#+!|~&$:@\"'^=])", r"\\\1", _printable(text))
    return re.sub(r"(?i)(www)\.", r"\1\\.", escaped)


def _yaml(text: str) -> str:
    """A double-quoted scalar in ASCII, which YAML 1.1 and 1.2 read alike."""
    return f'"{"".join(map(_yaml_character, _printable(text)))}"'


def _yaml_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    code = ord(character)
    if 0x20 <= code < 0x7F:
        return character
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

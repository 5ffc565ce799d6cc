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

from tljax.features.evaluate import Metric
from tljax.pretrained import Card
from tljax.report.markup import encodable
from tljax.report.results import (
    LABEL_HEADER,
    NUMBER_HEADER,
    Results,
    calibration_advice,
    label_rows,
    number_rows,
    per_class,
)
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.settings import Kind

MAX_ROWS = 10
"""Number of classes, labels or numbers that the card lists; the report has all."""

FEW = 30
"""Number of images of a class or label below which its accuracy is called imprecise."""

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
        results: the results on the validation images.
        origin: ``tuned`` for a fine-tuned pretrained network, ``probe`` for a linear head on frozen
            features, ``scratch`` for a network without pretrained weights.
        validated: False if there were no validation images, so that the results are those of the
            training images.
        remarks: sentences that the reader must know.
        attacked: accuracy under an attack, in [0, 1], and the name of the attack; None if it was
            not measured.
        chosen_by: the title of the metric on the images of ``results`` by which the epoch was
            selected; empty if none was.
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
    results: Results
    origin: str = "tuned"
    validated: bool = True
    remarks: Sequence[str] = ()
    attacked: tuple[float, str] | None = None
    base_model: str | None = None
    chosen_by: str = ""
    seen_in_training: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    workdir: str | Path = "."

    @property
    def measured(self) -> str:
        """Name the images on which the results were measured."""
        return "validation images" if self.validated else "training images"

    @property
    def kind(self) -> Kind:
        """Return the kind of the task."""
        return self.results.kind


def model_card(run: RunFacts) -> str:
    """Return the text of ``README.md``: YAML front matter and Markdown.

    Names of classes, files and data sets are escaped, so that they are shown as they are and never
    read as YAML, Markdown or HTML. Line breaks in them become spaces.
    """
    sections = {
        "Data": _data(run),
        "Training": _table(("setting", "value"), run.recipe.items()),
        "Results": _results(run),
        "Calibration": _calibration(run),
        "Limits": _limits(run),
        "Use": _use(run),
        "License of the weights": _license(run),
        "Environment": _table(("", "version"), run.environment.items()),
    }
    parts = [f"# {_text(run.title)}", _introduction(run)]
    parts += [f"## {title}\n\n{body}" for title, body in sections.items() if body]
    return _front_matter(run) + "\n" + "\n\n".join(parts) + "\n"


def _front_matter(run: RunFacts) -> str:
    license_ = run.weights.licence.lower()
    listed = license_ in _LICENSES
    # The Hub has no task of numbers from images.
    numbers = run.kind == "regression"
    data = ModelCardData(
        license=license_ if listed else "other",
        license_name=None if listed else _printable(run.weights.licence),
        base_model=run.base_model and _printable(run.base_model),
        library_name="tljax",
        pipeline_tag=None if numbers else "image-classification",
        tags=[
            "jax",
            *["transfer-learning"] * (run.origin != "scratch"),
            *["image-regression"] * numbers,
            _printable(run.model),
        ],
    )
    if run.validated and (results := _eval_results(run)):
        data.metrics = list(dict.fromkeys(result.metric_type for result in results))
        data.model_name = _printable(run.title)
        data.eval_results = results
    return f"---\n{data.to_yaml()}\n---\n"


# The identifiers of metrics, of https://huggingface.co/metrics where it has one.
_METRIC_TYPES = {
    "top1": "accuracy",
    "top5": "top_5_accuracy",
    "balanced_accuracy": "balanced_accuracy",
    "macro_f1": "f1",
    "auroc": "roc_auc",
    "map": "mean_average_precision",
    "mae": "mae",
    "rmse": "rmse",
    "r2": "r_squared",
    "kappa": "cohen_kappa",
}


def _eval_results(run: RunFacts) -> list[EvalResult]:
    """Return the metrics that are defined, for the front matter."""
    evaluation = run.results.evaluation
    named = run.data == "digits" or run.data.startswith(("hf:", "tfds:"))
    suffix = Path(run.data).suffix.lower()
    tables = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "json"}
    dataset_type = run.data.removeprefix("hf:") if named else tables.get(suffix, "imagefolder")
    task = ("other", "Image Regression") if run.kind == "regression" else ("image-classification",)
    return [
        EvalResult(
            task_type=task[0],
            task_name=task[1] if len(task) > 1 else None,
            dataset_type=_printable(dataset_type),
            dataset_name=_printable(run.data),
            metric_type=_METRIC_TYPES[name],
            metric_name=metric.title,
            metric_value=_rounded(metric, evaluation.metric(name)),
        )
        for name, metric in evaluation.metrics.items()
        if np.isfinite(evaluation.metric(name))
    ]


def _rounded(metric: Metric, value: float) -> float:
    return round(value, 4) if metric.is_share else float(f"{value:.4g}")


def _introduction(run: RunFacts) -> str:
    pretrained, data = f"the pretrained network {_text(run.weights.source)}", _text(run.data)
    origin = {
        "tuned": f"{pretrained}, fine-tuned on {data}",
        "probe": f"a linear head on the frozen features of {pretrained}, fitted to {data}",
        "scratch": f"trained on {data} from random weights",
    }[run.origin]
    count = len(run.weights.classes)
    purpose = {
        "classification": f"classifies images into {count} classes",
        "ordinal": f"classifies images into {count} ordered classes",
        "multilabel": f"tells which of {count} labels apply to an image",
        "regression": f"predicts {_plural(count, 'number')} from an image",
    }[run.kind]
    return f"A network ({_text(run.model)}) that {purpose}: {origin}, with tljax."


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _data(run: RunFacts) -> str:
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
        seen = f"{count} of them are training images or resemble one; the results include them."
    else:
        seen = "None of them was found among the training images."
    examples = run.results.evaluation.examples
    return f"{run.train_examples} training and {examples} validation images. {seen}\n\n{geometry}"


def _results(run: RunFacts) -> str:
    results = run.results
    rows = [(score.title, score.text) for score in results.scores]
    if run.attacked is not None:
        title = results.scores[0].title
        rows.append((f"{title} under {run.attacked[1]}", f"{run.attacked[0]:.1%}"))
    measured = f"On the {results.evaluation.examples} {run.measured}:"
    name, order, header, rows_by_name = _by_name(results)
    listed = rows_by_name[:MAX_ROWS]
    title = f"By {name}:"
    if len(listed) < len(results.names):
        title = f"The {len(listed)} {name}{'s' if name != 'class' else 'es'} {order}:"
    parts = [measured, _table(("metric", "value"), rows), results.how_intervals]
    return "\n\n".join(part for part in (*parts, title, _table(header, listed)) if part)


def _by_name(
    results: Results,
) -> tuple[str, str, Sequence[str], Sequence[Sequence[str]]]:
    """Return what is listed, which of many are, and the header and the rows of the table."""
    if results.kind == "multilabel":
        order = "with the lowest average precision"
        return "label", order, LABEL_HEADER, label_rows(results)
    if results.kind == "regression":
        return "number", "that come first", NUMBER_HEADER, number_rows(results)
    rows = [
        (name, f"{correct} of {count}", f"{correct / count:.1%}", most_confused_with or "")
        for name, count, correct, most_confused_with in per_class(
            results.evaluation.confusion, results.names
        )
        if count
    ]
    header = "class", "correct", "accuracy", "most often taken for"
    return "class", "with the lowest accuracy", header, rows


def _calibration(run: RunFacts) -> str:
    calibration = run.results.calibration
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
        f" {calibration_advice(run.results)}"
    )


def _limits(run: RunFacts) -> str:
    attack = "another attack" if run.attacked else "an attack"
    limits = [
        *map(_text, run.remarks),
        *_limits_of_task(run),
        f"The results on images unlike the {run.measured} or under {attack} were not measured.",
    ]
    if not run.validated:
        limits.append("The results on other images than those of training were not measured.")
    if run.chosen_by:
        limits.append(
            f"The epoch was selected by its {run.chosen_by} on the {run.measured}, so the results"
            " are optimistic."
        )
    limits += _limits_of_size(run)
    return "\n".join(f"- {limit}" for limit in limits)


def _limits_of_task(run: RunFacts) -> list[str]:
    evaluation, count = run.results.evaluation, len(run.weights.classes)
    if run.results.evaluation.task.has_classes:
        return [f"Every image gets one of the {count} classes, even if it shows none."]
    unknown = int(np.isnan(evaluation.labels).sum())
    blanks = f"{unknown} of {evaluation.labels.size}"
    if run.kind == "regression":
        limits = [
            f"Every image gets {_plural(count, 'number')}, even if it shows nothing of the kind.",
            f"Only numbers in the range of the {run.measured} were tested.",
        ]
        return limits + [f"{blanks} numbers are unknown: they count in no metric."] * bool(unknown)
    limits = ["Only these labels are known: an image may show anything else."]
    if evaluation.task.thresholds:
        limits.append(
            f"The thresholds were chosen on the {run.measured}, so F1, precision and recall are"
            " optimistic."
        )
    return limits + [f"{blanks} labels are unknown: they count in no metric."] * bool(unknown)


def _limits_of_size(run: RunFacts) -> list[str]:
    results, limits = run.results, []
    if results.groups is not None and results.groups < 20:
        limits.append(
            f"The {run.measured} are of only {_plural(results.groups, 'group')}: how much groups"
            " differ is not known well, and confidence intervals are too narrow."
        )
    if results.kind == "regression":
        return limits
    if results.kind == "multilabel":
        counts, names, few_of = results.per_name["positive"], "labels", "apply to fewer than"
    else:
        counts, names, few_of = results.evaluation.confusion.sum(1), "classes", "have fewer than"
    if counts.min() < FEW:
        limits.append(
            f"{int((counts < FEW).sum())} of {len(counts)} {names} {few_of} {FEW} {run.measured}:"
            " their results are imprecise."
        )
    return limits


_SNIPPETS: dict[Kind, str] = {
    "classification": "print(card.classes[int(np.argmax(outputs[0]))])",
    "ordinal": (
        "probabilities = card.task.decode(outputs)\n"
        "median = int((probabilities[0].cumsum() <= 0.5).sum())\n"
        "print(card.classes[median])"
    ),
    "multilabel": (
        "probabilities = card.task.decode(outputs)\n"
        "for i in np.flatnonzero(card.task.applies(probabilities)[0]):\n"
        "    print(card.classes[i], probabilities[0, i])"
    ),
    "regression": (
        "for name, number in zip(card.classes, card.task.decode(outputs)[0]):\n"
        "    print(name, number)"
    ),
}


def _use(run: RunFacts) -> str:
    workdir = str(run.workdir)
    shell = f"tljax predict PHOTO.jpg --weights {shlex.quote(workdir)}"
    python = (
        "import numpy as np\n"
        "from tljax import apply, load_pretrained, read_images\n"
        "\n"
        f"model, variables, card = load_pretrained({workdir!r})\n"
        'images = read_images(["PHOTO.jpg"], model.preprocess)\n'
        "outputs = np.asarray(apply(model, variables, images).logits)\n"
        f"{_SNIPPETS[run.kind]}"
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
    lines = [" | ".join(map(_text, header)), " | ".join("---" for _ in header), *lines]
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

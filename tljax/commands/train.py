"""The command ``tljax train``: train a pretrained network on your own images.

Without options it trains EfficientNet-Lite0 on scikit-learn's digits, offline.
"""

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from tljax.commands import cli
from tljax.commands.extension import split_name
from tljax.data.options import LabelOptions, Loading
from tljax.runtime.errors import RequestError, StoppedError
from tljax.runtime.files import CONFIG_VERSION, in_bucket, open_path, read_config
from tljax.runtime.ranges import Amount, NotNegative, Share, format_flag
from tljax.runtime.settings import settings
from tljax.train.options import REQUEST_CONDITIONS, FitConfig

if TYPE_CHECKING:
    from tljax.data.examples import Source, Splits
    from tljax.pretrained import Pretrained
    from tljax.pretrained.network import Card
    from tljax.runtime.parallel import Preemption
    from tljax.studies.interpolation import Line
    from tljax.train.fit import FitResult


_UNUSED_IN_RANGE_TEST = (
    "learning_rate schedule warmup patience ema_decay choose_by checkpoint_minutes log_every "
    "profile verify_content"
)
_IN_RANGE_TEST = "with --find-learning-rate"
_NOT_RESUMED = "workers devices distributed json debug platform resume dry_run find_learning_rate"


@dataclass(frozen=True)
class Config(cli.Common, cli.Classifier, cli.Channels, cli.Distributed):
    """Train a pretrained network to predict classes, labels or numbers of your own images.

    Attributes:
        data: Labeled images: a table (.csv, .tsv, .parquet or .jsonl) with a column of paths, a
            folder of class folders (with or without train/ and val/), shards (.tar, .tfrecord,
            .array_record), the URL of a bucket, digits, tfds:NAME, hf:NAME or packed:FOLDER.
        workdir: Run directory to create, or to continue if it exists and has the same options, also
            in a bucket (gs://BUCKET/RUN). By default a new folder in runs/ is created.
        resume: Run directory to continue with its own options; other options may not differ from
            them, except those of this machine: --workers, --devices, --platform, --distributed,
            --remat and --fsdp.
            If the images, weights or extension file were moved, --data, --root, --weights and
            --extension say where they are now.
        labels: Options of how labels are read, from a table above all.
        fit: Options of training.
        val_fraction: Share of the images, from 0 to below 1, that are held out for validation if
            the data has no validation part. With 0, accuracies are measured on the training images.
        on_bad_image: Action on an image that cannot be read: skip leaves it out and lists it in
            skipped.csv, fail stops.
        verify_content: Read all images first, so that the run is continued only if none of their
            bytes have changed. By default their paths, sizes and labels are compared.
        pack: Packing of the images in the cache folder, so that they are decoded once: never,
            always, or auto, on a GPU or TPU if two epochs or more decode them and half of the free
            disk space holds them. With --augment, crops are cut from the packed images.
        checkpoint_minutes: Minutes between checkpoints within an epoch; 0 writes one at every step.
            One is always written at the end of an epoch.
        log_every: Number of steps between lines of metrics.jsonl within an epoch, beside that of
            each epoch; 0 writes only that one.
        find_learning_rate: Run a hundred steps at rising learning rates, suggest one, and train
            nothing.
        dry_run: Print what would be trained, its cost and what would be cached, and train nothing.
        profile: Write a trace of steps 3 to 12 of the first epoch to profile/ in the run directory,
            for TensorBoard or Perfetto.
        interpolate: After training, evaluate networks on the line between the start and the best
            epoch, or the last one if none was better than the start, and save the best (WiSE-FT,
            Wortsman et al. 2022, arXiv:2109.01903): FROM:TO:STEP, the weights of the end, such as
            0:1:0.1.
        interpolate_data: Labeled images of another distribution, with the same classes, on which
            the networks of --interpolate are evaluated, too. They do not choose the best one.
    """

    data: str = "digits"
    workdir: Path | None = None
    resume: Path | None = None
    labels: cli.Labels = field(default_factory=LabelOptions)
    fit: tyro.conf.OmitArgPrefixes[FitConfig] = field(default_factory=FitConfig)
    val_fraction: Share = 0.2
    on_bad_image: Literal["skip", "fail"] = "skip"
    verify_content: bool = False
    pack: Literal["never", "auto", "always"] = "never"
    checkpoint_minutes: NotNegative = 10.0
    log_every: Amount = 0
    find_learning_rate: bool = False
    dry_run: bool = False
    profile: bool = False
    interpolate: str | None = None
    interpolate_data: str | None = None

    conditions = (
        *REQUEST_CONDITIONS,
        *cli.SPLIT_CONDITIONS,
        *cli.CHANNEL_CONDITIONS,
        ("pack", lambda s: not s.data.startswith("packed:"), "on images that are packed"),
        ("pack", lambda s: not s.distributed, "with --distributed: use tljax pack on each host"),
        ("find_learning_rate profile pack", lambda s: not s.dry_run, "with --dry-run"),
        ("pack", lambda s: not s.find_learning_rate, _IN_RANGE_TEST),
        ("epochs", lambda s: not s.find_learning_rate or s.recipe == "gradual", _IN_RANGE_TEST),
        (_UNUSED_IN_RANGE_TEST, lambda s: not s.find_learning_rate, _IN_RANGE_TEST),
        (
            "interpolate",
            lambda s: s.recipe in ("lp-ft", "gradual"),
            "without --recipe lp-ft or gradual: others do not start from a trained head",
        ),
        ("interpolate", lambda s: s.attack == "none", "with --attack: robust accuracy is compared"),
        ("interpolate", lambda s: s.adapter == "none", "with --adapter: its base stays as it is"),
        ("interpolate interpolate_data", lambda s: not s.dry_run, "with --dry-run"),
        ("interpolate interpolate_data", lambda s: not s.find_learning_rate, _IN_RANGE_TEST),
        ("interpolate_data", lambda s: s.interpolate, "without --interpolate"),
        ("checkpoint_minutes log_every", lambda s: s.recipe != "probe", "with --recipe probe"),
        (
            "head",
            lambda s: s.recipe in ("finetune", "bit"),
            "where a head is fitted: choose --recipe finetune",
        ),
    )

    def completed(self) -> "Config":
        """Return the options of the run to continue, with those of this machine replaced.

        Raises:
            RequestError: there is no such run, or an option on the command line differs from it.
        """
        folder = self.resume or self.workdir
        if not folder:
            if self.distributed:
                raise RequestError("--distributed: add a --workdir, the same for every process")
            return self
        workdir = open_path(folder)
        if not (self.resume or self._continues(workdir)):
            return replace(self, workdir=workdir)
        saved = read_config(workdir)
        if (version := saved.pop("version", None)) != CONFIG_VERSION:
            which = "another" if version else "an earlier"
            raise RequestError(
                f"{workdir / 'config.json'}: only {which} version of tljax can continue this run; "
                "predict, evaluate and attack can still use it"
            )
        saved.pop("fingerprint", None)
        try:
            resumed = cli.from_json(Config, saved)
        except (AttributeError, RequestError, TypeError) as error:
            raise RequestError(f"{workdir / 'config.json'}: {error}") from error
        compared = cli.explicit_options() if self.resume else settings(self).keys()
        moved = compared & {"data", "weights"} if self.resume else set()
        replaced = {name: getattr(self, name) for name in (*_NOT_RESUMED.split(), *moved)}
        resumed = replace(resumed, **replaced, workdir=workdir)
        memory = {name: getattr(self.fit, name) for name in compared & {"remat", "fsdp"}}
        resumed = replace(resumed, fit=replace(resumed.fit, **memory))
        if self.resume and compared & {"data", "root"}:
            labels = replace(resumed.labels, root=self.labels.root)
            resumed = replace(resumed, labels=labels)
        new, old = settings(self), settings(resumed)
        different = [n for n in old if n in compared and _place(n, new[n]) != _place(n, old[n])]
        if different:
            values = new if self.resume else old
            flags = ", ".join(format_flag(name, values[name]) for name in different)
            raise RequestError(
                f"{workdir} continues with its own options: leave out {flags}, or start a new run"
                if self.resume
                else f"{workdir} already holds a run with other options: {flags}; continue it by "
                "--resume, or choose another --workdir"
            )
        return replace(resumed, extension=self.extension or resumed.extension)

    def training_hooks(self, pretrained: "Pretrained", splits: "Splits") -> dict[str, Any]:
        """Return the arguments of `fit` that the extension and ``--head`` add.

        Raises:
            RequestError: ``--head`` lacks a class of the images.
        """
        hooks = {name: hook for name, hook in self.hooks().items() if name != "modules"}
        if self.head is None:
            return hooks
        from tljax.models import select_outputs
        from tljax.pretrained.embeddings import output_indices

        chosen = output_indices(pretrained.card.classes, splits.train.classes)
        return hooks | {
            "new_head": lambda model, variables, _: select_outputs(model, variables, chosen)
        }

    def _continues(self, workdir: Path) -> bool:
        """Return whether ``--workdir`` holds a run, which the command then continues."""
        return not (self.dry_run or self.find_learning_rate) and (workdir / "config.json").exists()

    @property
    def loading(self) -> Loading:
        """Options of how images are read."""
        return replace(super().loading, on_bad_image=self.on_bad_image)


def run(config: Config) -> dict[str, Any]:
    """Train into a run directory, or do what ``--dry-run`` or ``--find-learning-rate`` says."""
    from tljax.data.loader import num_batches
    from tljax.data.sources import open_splits
    from tljax.models import with_head
    from tljax.runtime.parallel import Preemption, is_main_process
    from tljax.studies.interpolation import parse_weights
    from tljax.train import run_directory
    from tljax.train.dry_run import dry_run
    from tljax.train.objectives import make_objective
    from tljax.train.packing import pack_images
    from tljax.train.recipes import make_plan
    from tljax.train.setup import check_images, check_task, fitted_task
    from tljax.train.trace import check_traceable

    began = time.perf_counter()
    with Preemption() as preemption:
        if config.workdir and (config.workdir / "config.json").exists():
            run_directory.refuse_missing(config.workdir, asdict(config), "data", "weights")
        config = _with_absolute_paths(config)
        pretrained = config.load()
        splits = open_splits(config.data, val_fraction=config.val_fraction, labels=config.labels)
        pretrained = config.adapt(pretrained, splits.train)
        fit = check_task(config.fit, task := fitted_task(splits.train))
        check_images(pretrained.model, fit)
        make_objective(task, fit, splits.train)
        hooks = config.training_hooks(pretrained, splits)
        if config.dry_run:
            print(dry_run(pretrained.model, splits, config.fit, config.loading))
            return {"dry_run": True}
        if config.find_learning_rate:
            return suggest_learning_rate(config, pretrained, splits, hooks)

        # These raise an error for a bad request before anything is written.
        parse_weights(config.interpolate or "0:1:1")
        shifted = config.interpolate_data and open_shifted(config, splits.train)
        outputs = task.num_outputs(len(splits.train.classes))
        cut = with_head(pretrained.model, outputs, after=config.fit.head_after)
        plan = make_plan(cut, fit, len(splits.train), config.batch_size)
        if config.profile:
            if config.workdir and in_bucket(config.workdir):
                raise RequestError("--profile writes to a local folder: choose another --workdir")
            steps = num_batches(len(splits.train), config.batch_size)
            check_traceable(steps if plan.phases else 0)
        workdir = config.workdir or run_directory.new_workdir(splits)
        config = replace(config, workdir=workdir)
        with run_directory.occupied(workdir, splits) if is_main_process() else nullcontext():
            packed = splits
            if config.pack != "never":
                packed = pack_images(config.pack, cut, splits, plan, config.workers)
            inputs = pretrained, splits, packed, hooks, shifted or None
            return train(config, workdir, *inputs, preemption, began)


def train(
    config: Config,
    workdir: Path,
    pretrained: "Pretrained",
    splits: "Splits",
    packed: "Splits",
    hooks: dict[str, Any],
    shifted: "Source | None",
    preemption: "Preemption",
    began: float,
) -> dict[str, Any]:
    """Train in a run directory, or continue the run in it, and write its results.

    The same images are in ``splits`` and, if they are packed, in ``packed``, which is trained on.
    """
    from tljax.commands.extension import load_extension
    from tljax.runtime.parallel import broadcast_json, is_main_process
    from tljax.runtime.trees import tree_digest
    from tljax.train import run_directory
    from tljax.train.checkpoint import Checkpoints
    from tljax.train.fit import fit

    weights = tree_digest(pretrained.variables)
    hooks, code, extension = dict(hooks), None, ()
    if config.extension:
        code = load_extension(config.extension)[1]
        extension = code, split_name(config.extension)[1]
    # One process looks at the files, as the others may be on other machines.
    images = broadcast_json(partial(run_directory.identify, splits, config.verify_content))
    continues = False
    if is_main_process():
        options = {"version": CONFIG_VERSION, **asdict(config)}
        if continues := run_directory.open_run(workdir, options, splits, weights, code):
            print(f"note: the run in {workdir} is continued", file=sys.stderr)
        for note in splits.notes:
            print(note)
    # A run may be continued with another division of memory, which changes rounding errors only.
    fit_config = replace(config.fit, remat=False, fsdp=False)
    numerics = fit_config, config.seed, config.batch_size, pretrained.model.dtype
    identity = repr((*numerics, (*images, weights), *extension))
    metrics = run_directory.MetricsFile(workdir)
    hooks["on_epoch"] = _both(metrics.on_epoch, hooks.get("on_epoch"))
    if config.log_every:
        hooks["on_step"] = _both(metrics.on_step, hooks.get("on_step"))
    try:
        with (
            run_directory.attempt(workdir, new=not continues),
            closing(metrics),
            closing(Checkpoints(workdir / "checkpoints", identity, metrics.flush)) as checkpoints,
        ):
            result = fit(
                pretrained.model,
                pretrained.variables,
                packed,
                config.fit,
                loading=config.loading,
                seed=config.seed,
                checkpoints=checkpoints,
                checkpoint_seconds=60 * config.checkpoint_minutes,
                profile=workdir / "profile" if config.profile else None,
                preemption=preemption,
                log_every=max(config.log_every, 1),
                **hooks,
            )
    except (StoppedError, KeyboardInterrupt) as error:
        stopped, folder = str(error) or "interrupted", shlex.quote(str(workdir))
        message = f"{stopped}; to continue: tljax train --resume {folder}"
        raise type(error)(message) from error
    result, line = choose_on_line(config, result, splits, shifted)
    seconds = time.perf_counter() - began
    # Without validation images, the training images are also those of validation.
    unread = sum(map(len, result.skipped[: 1 + (splits.val is not splits.train)]))
    metric = result.evaluation.main_metric
    probe = result.probe_evaluation
    summary = {
        "task": result.task.kind,
        f"val_{metric}": result.evaluation.metric(metric),
        "interpolation_weight": line and line.chosen.weight,
        "val_robust_top1": result.robust.top1 if result.robust else None,
        f"probe_{metric}": probe.metric(metric) if probe else None,
        "recipe": config.fit.recipe,
        "workdir": str(workdir),
        "skipped": unread,
        "seconds": round(seconds, 1),
    }
    if not is_main_process():
        return summary
    write_results(config, workdir, pretrained, splits, result, line, unread, seconds)
    return summary


def write_results(
    config: Config,
    workdir: Path,
    pretrained: "Pretrained",
    splits: "Splits",
    result: "FitResult",
    line: "Line | None",
    unread: int,
    seconds: float,
) -> None:
    """Save the network, write the report, and print what was measured."""
    from tljax.report.runs import remarks, write_training_report

    card = replace(pretrained.card, classes=splits.train.classes, task=result.task)
    if config.fit.recipe == "scratch":
        source = f"{result.model.name} from random weights"
        card = replace(card, source=source, licence="unknown", sha256="none")
    save_network(config, workdir, pretrained, result, card)
    measured = write_training_report(workdir, result, splits, asdict(config), card, seconds, line)

    print_result(measured, remarks(result, line), unread, workdir, seconds)
    if config.data == "digits":
        print("your own images      tljax train --data FOLDER  (one subfolder per class)")


def save_network(
    config: Config, workdir: Path, base: "Pretrained", result: "FitResult", card: "Card"
) -> None:
    """Save the network of the best epoch: the whole of it, or its adapter if it has one."""
    from tljax.pretrained import save, save_adapter
    from tljax.train.run_directory import ADAPTER, BEST

    adaptation = config.fit.adaptation
    if adaptation.adapter == "none":
        whole = base._replace(model=result.model, variables=result.variables, card=card)
        return save(workdir / BEST, whole)
    trained = base._replace(model=result.model, variables=result.unmerged, card=card)
    scale = adaptation.scale
    if config.channels:  # the first kernel for other channels is not in the file of the base
        base = config.read(config.weights, model=config.model, normalization=config.normalization)
    return save_adapter(workdir / ADAPTER, trained, base, weights=config.weights, scale=scale)


def print_result(
    measured: dict[str, str], remarks: list[str], unread: int, workdir: Path, seconds: float
) -> None:
    """Print what `write_training_report` returned, remarks and where the report is."""
    for name, text in measured.items():
        print(f"{name:20} {text}")
    for remark in remarks:
        print(f"note                 {remark}")
    if unread:
        print(f"not read             {unread} images, listed in {workdir / 'skipped.csv'}")
    print(f"report               {workdir / 'report.html'}  ({seconds:.0f} s in all)")


def choose_on_line(
    config: Config, result: "FitResult", splits: "Splits", shifted: "Source | None"
) -> "tuple[FitResult, Line | None]":
    """Return the result with the best network on the line of ``--interpolate``, and the line."""
    from tljax.studies.interpolation import evaluate_line, parse_weights, with_chosen

    if not config.interpolate:
        return result, None
    weights = parse_weights(config.interpolate)
    line = evaluate_line(result, splits.val, weights, config.loading, shifted)
    return with_chosen(result, line), line


def open_shifted(config: Config, train: "Source") -> "Source":
    """Open the images of ``--interpolate-data``, labeled by the names of the training images.

    Raises:
        RequestError: there are none, or their labels are of another kind.
    """
    from tljax.data.folders import expand_path
    from tljax.data.shards import is_shards
    from tljax.data.sources import open_labeled
    from tljax.features.evaluate import match_network

    data = config.interpolate_data or ""
    same_columns = is_shards(data) or not expand_path(data).is_dir()
    labels = config.labels if same_columns else LabelOptions(order=config.labels.order)
    if labels.order is None:
        labels = replace(labels, task=train.task.kind)
    source, _, notes = match_network(
        open_labeled(data, replace(labels, root=None)), train.classes, train.task
    )
    for note in notes:
        print(f"note: {data}: {note}", file=sys.stderr)
    return source


def _both(one: Callable[..., None], other: Callable[..., None] | None) -> Callable[..., None]:
    """Return a function that calls one function, and the other if there is one."""

    def both(*args: Any) -> None:
        one(*args)
        if other is not None:
            other(*args)

    return both


def _place(name: str, value: Any) -> Any:
    """Return a value to compare: different paths may name one folder."""
    if name in ("data", "weights", "head") and value:
        value = _absolute(value)
    if name == "extension" and value:
        return split_name(value)[1]  # the content of the file is compared elsewhere
    if name in ("workdir", "resume") and value:
        return open_path(value).resolve()
    return value


def _with_absolute_paths(config: Config) -> Config:
    """Return options that mean the same files when a run is continued in another folder."""
    from tljax.pretrained.catalog import catalog_name

    weights = config.weights if catalog_name(config.weights) else _absolute(config.weights)
    root = config.labels.root and config.labels.root.expanduser().resolve()
    head, extension = config.head and _absolute(config.head), config.extension
    if extension:
        file, name = split_name(extension)
        extension = f"{_absolute(file)}:{name}"
    return replace(
        config,
        data=_absolute(config.data),
        weights=weights,
        head=head,
        extension=extension,
        labels=replace(config.labels, root=root),
    )


def _absolute(value: str) -> str:
    """Return the absolute path of files or a folder that exist; other values unchanged.

    It is called before JAX is configured, and imports nothing that imports JAX.
    """
    from tljax.data.buckets import is_bucket

    prefix = next((one for one in ("hf:", "packed:") if value.startswith(one)), "")
    path = Path(value.removeprefix(prefix)).expanduser()
    is_local = value != "digits" and not value.startswith("tfds:") and not is_bucket(value)
    is_pattern = not prefix and any(sign in value for sign in "*?{")
    is_path = (prefix or is_local) and (path.exists() or is_pattern)
    return f"{prefix}{path.resolve()}" if is_path else value


def suggest_learning_rate(
    config: Config, pretrained: "Pretrained", splits: "Splits", hooks: dict[str, Any]
) -> dict[str, Any]:
    """Print a learning rate for the recipe, and draw the loss over learning rates."""
    from tljax.report.figures import learning_rates, write_figure
    from tljax.runtime.parallel import is_main_process
    from tljax.studies.learning_rate import find_learning_rate
    from tljax.train import run_directory

    test = find_learning_rate(
        pretrained.model,
        pretrained.variables,
        splits,
        config.fit,
        loading=config.loading,
        seed=config.seed,
        **hooks,
    )
    curve = (config.workdir or Path("runs")) / "learning_rate.png"
    if is_main_process():
        run_directory.mark(curve.parent, splits)
        write_figure(curve, learning_rates(test))
        print(f"suggested            --learning-rate {test.suggestion:.1e}")
        print(f"plot                 {curve}")
    return {"learning_rate": test.suggestion, "curve": str(curve)}

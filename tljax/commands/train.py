"""Makes a pretrained network a classifier of your own images.

No argument runs the embedded default: EfficientNet-Lite0 on scikit-learn's digits, offline.
"""

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from tljax.commands import cli
from tljax.commands.extension import split_name
from tljax.data.options import Loading
from tljax.runtime.errors import RequestError, StoppedError
from tljax.runtime.files import CONFIG_VERSION, read_config
from tljax.runtime.ranges import Amount, NotNegative, Share, spelled
from tljax.runtime.settings import settings
from tljax.train.options import ASKED_CONDITIONS, FitConfig

if TYPE_CHECKING:
    from tljax.data.sources import Splits
    from tljax.pretrained import Pretrained
    from tljax.runtime.parallel import Preemption
    from tljax.train.fit import FitResult


_OF_THE_RUN = (
    "learning_rate schedule warmup patience ema_decay checkpoint_minutes log_every profile"
)
_FINDING = "with --find-learning-rate"
_OF_NOW = "workers devices distributed json debug resume dry_run find_learning_rate"


@dataclass(frozen=True)
class Config(cli.Common):
    """Train a classifier of your own images on top of a pretrained network."""

    data: str = "digits"
    """A folder of class folders (with or without train/ and val/), tfds:NAME, hf:NAME or digits."""
    workdir: Path | None = None
    """The run directory to make, or one of the same settings to go on with; by default a new one
    under runs/."""
    resume: Path | None = None
    """A run directory to go on with. Every other setting comes from there, except --workers,
    --devices and --distributed; one that is given and differs is an error. --data, --weights and
    --extension may say where the same images, weights and file are now."""
    fit: tyro.conf.OmitArgPrefixes[FitConfig] = field(default_factory=FitConfig)
    val_fraction: Share = 0.2
    """Share of the images kept for validation where the data has no validation part. 0 keeps none:
    every figure is of the training images."""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """Leave unreadable images out and list them in skipped.csv, or stop."""
    checkpoint_minutes: NotNegative = 10.0
    """Minutes from one checkpoint to the next within an epoch, 0 for one at every step; every epoch
    ends with one."""
    log_every: Amount = 0
    """Steps from one line of metrics.jsonl to the next within an epoch; 0 writes one line an
    epoch."""
    find_learning_rate: bool = False
    """Try a hundred learning rates on the first steps and suggest one; train nothing."""
    dry_run: bool = False
    """Say what would be trained, what it costs and what is cached; train nothing."""
    profile: bool = False
    """Trace ten steps of the first epoch into the run directory, for TensorBoard or Perfetto."""
    distributed: bool = False
    """This is one of several processes: start one on every host. Needs --workdir."""

    conditions = (
        *ASKED_CONDITIONS,
        *cli.OF_SPLIT,
        ("find_learning_rate profile", lambda s: not s.dry_run, "with --dry-run"),
        ("epochs", lambda s: not s.find_learning_rate or s.recipe == "gradual", _FINDING),
        (_OF_THE_RUN, lambda s: not s.find_learning_rate, _FINDING),
        ("checkpoint_minutes log_every", lambda s: s.recipe != "probe", "with --recipe probe"),
    )

    def completed(self) -> "Config":
        """With the settings of the run to go on with, on this machine's processes and devices.

        Raises:
            RequestError: there is no such run, or a flag says something else.
        """
        workdir = self.resume or self.workdir
        if not workdir or not (self.resume or self._is_of_a_run()):
            return self
        asked = read_config(workdir)
        if (version := asked.pop("version", None)) != CONFIG_VERSION:
            which = "another" if version else "an earlier"
            raise RequestError(
                f"{workdir / 'config.json'}: it is of {which} version of tljax, which alone goes "
                "on with it; predict, evaluate and attack take it as it is"
            )
        asked.pop("fingerprint", None)
        try:
            found = cli.from_json(Config, asked)
        except (AttributeError, RequestError, TypeError) as error:
            raise RequestError(f"{workdir / 'config.json'}: {error}") from error
        given = cli.given() if self.resume else settings(self).keys()
        moved = given & {"data", "weights"} if self.resume else set()
        of_now = {name: getattr(self, name) for name in (*_OF_NOW.split(), *moved)}
        found = replace(found, **of_now, workdir=workdir)
        said, known = settings(self), settings(found)
        different = [n for n in known if n in given and _place(n, said[n]) != _place(n, known[n])]
        if different and self.resume:
            flags = ", ".join(spelled(name, said[name]) for name in different)
            raise RequestError(
                f"{workdir} goes on with its own settings: leave out {flags}, or start a new run"
            )
        if different:
            flags = ", ".join(spelled(name, known[name]) for name in different)
            raise RequestError(
                f"{workdir} already holds a run with other settings: {flags}; go on with it by "
                "--resume, or choose another --workdir"
            )
        return replace(found, extension=self.extension or found.extension)

    def training_hooks(self) -> dict[str, Any]:
        """What the extension hands to `fit`."""
        return {name: hook for name, hook in self.hooks().items() if name != "modules"}

    def _is_of_a_run(self) -> bool:
        """Whether this is the command of a run that has begun; it then goes on."""
        trial = self.dry_run or self.find_learning_rate
        return not trial and self.workdir is not None and (self.workdir / "config.json").exists()

    @property
    def loading(self) -> Loading:
        """How images are read; unreadable ones as asked."""
        return replace(super().loading, on_bad_image=self.on_bad_image)


def run(config: Config) -> dict[str, Any]:
    """Data in, run directory out."""
    from tljax.data.loader import num_batches
    from tljax.data.sources import open_splits
    from tljax.models import with_head
    from tljax.pretrained.catalog import catalog_name
    from tljax.runtime.parallel import Preemption, is_writer, join
    from tljax.train import run_directory
    from tljax.train.dry_run import dry_run
    from tljax.train.recipes import make_plan
    from tljax.train.trace import check_traceable

    began = time.perf_counter()
    if config.distributed:
        if config.workdir is None:
            raise RequestError("--distributed needs a --workdir that is the same for every process")
        join()
    with Preemption() as preemption:
        if config.workdir and (config.workdir / "config.json").exists():
            run_directory.refuse_missing(config.workdir, asdict(config), "data", "weights")
        config = replace(config, data=_absolute(config.data))
        if not catalog_name(config.weights):
            config = replace(config, weights=_absolute(config.weights))
        if config.extension:
            file, name = split_name(config.extension)
            config = replace(config, extension=f"{_absolute(file)}:{name}")
        pretrained = config.load()
        splits = open_splits(config.data, val_fraction=config.val_fraction)
        if config.dry_run:
            print(dry_run(pretrained.model, splits, config.fit, config.batch_size))
            return {"dry_run": True}
        if config.find_learning_rate:
            return suggest_learning_rate(config, pretrained, splits)

        # Or they say why not.
        cut = with_head(pretrained.model, len(splits.train.classes), after=config.fit.head_after)
        plan = make_plan(cut, config.fit, len(splits.train), config.batch_size)
        if config.profile:
            steps = num_batches(len(splits.train), config.batch_size)
            check_traceable(steps if plan.phases else 0)
        workdir = config.workdir or run_directory.new_workdir(splits)
        config = replace(config, workdir=workdir)
        with run_directory.occupied(workdir, splits) if is_writer() else nullcontext():
            return train(config, workdir, pretrained, splits, preemption, began)


def train(
    config: Config,
    workdir: Path,
    pretrained: "Pretrained",
    splits: "Splits",
    preemption: "Preemption",
    began: float,
) -> dict[str, Any]:
    """Trains in a run directory that is there, or goes on in it."""
    from tljax.commands.extension import load_extension
    from tljax.pretrained import save
    from tljax.report.runs import write_training_report
    from tljax.runtime.parallel import is_writer
    from tljax.runtime.trees import tree_digest
    from tljax.train import run_directory
    from tljax.train.checkpoint import Checkpoints
    from tljax.train.fit import fit

    resume = f"tljax train --resume {shlex.quote(str(workdir))}"
    weights = tree_digest(pretrained.variables)
    hooks, code, extension = config.training_hooks(), None, ()
    if config.extension:
        code = load_extension(config.extension)[1]
        extension = code, split_name(config.extension)[1]
    goes_on = False
    if is_writer():
        asked = {"version": CONFIG_VERSION, **asdict(config)}
        if goes_on := run_directory.open_run(workdir, asked, splits, weights, code):
            print(f"note: {workdir} is there and goes on", file=sys.stderr)
        for note in splits.notes:
            print(note)
    digests = splits.train.digest, splits.val.digest, weights
    precision = pretrained.model.dtype
    identity = repr((config.fit, config.seed, config.batch_size, precision, digests, *extension))
    metrics = run_directory.MetricsFile(workdir)
    hooks["on_epoch"] = _both(metrics.on_epoch, hooks.get("on_epoch"))
    if config.log_every:
        hooks["on_step"] = _both(metrics.on_step, hooks.get("on_step"))
    try:
        with (
            run_directory.attempt(workdir, new=not goes_on),
            closing(Checkpoints(workdir / "checkpoints", identity)) as checkpoints,
        ):
            result = fit(
                pretrained.model,
                pretrained.variables,
                splits,
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
    except StoppedError as error:
        raise StoppedError(f"{error}; to go on: {resume}") from error
    seconds = time.perf_counter() - began
    # Without validation images, those of training are counted as both.
    unread = sum(map(len, result.skipped[: 1 + (splits.val is not splits.train)]))
    summary = {
        "val_top1": result.evaluation.top1,
        "val_robust_top1": result.robust.top1 if result.robust else None,
        "probe_top1": result.probe_evaluation.top1 if result.probe_evaluation else None,
        "recipe": config.fit.recipe,
        "workdir": str(workdir),
        "skipped": unread,
        "seconds": round(seconds, 1),
    }
    if not is_writer():
        return summary
    card = replace(pretrained.card, classes=splits.train.classes)
    if config.fit.recipe == "scratch":
        source = f"{result.model.name} from random weights"
        card = replace(card, source=source, licence="unknown", sha256="none")
    trained = pretrained._replace(model=result.model, variables=result.variables, card=card)
    save(workdir / run_directory.BEST, trained)
    write_training_report(workdir, result, splits, asdict(config), card, seconds)

    print_result(result, unread, workdir, seconds)
    return summary


def print_result(result: "FitResult", unread: int, workdir: Path, seconds: float) -> None:
    """What a person wants to know at the end."""
    from tljax.report.runs import accuracies, percent, remarks

    for name, found in accuracies(result).items():
        print(f"{name:20} {percent(found.top1)}")
    for remark in remarks(result):
        print(f"note                 {remark}")
    if unread:
        print(f"not read             {unread} images, listed in {workdir / 'skipped.csv'}")
    print(f"report               {workdir / 'report.html'}  ({seconds:.0f} s in all)")
    print("your own images      tljax train --data FOLDER  (one subfolder a class)")


def _both(one: Callable[..., None], other: Callable[..., None] | None) -> Callable[..., None]:
    """Call one function, and the other if there is one."""

    def both(*args: Any) -> None:
        one(*args)
        if other is not None:
            other(*args)

    return both


def _place(name: str, value: Any) -> Any:
    """A value to compare: one folder has many names."""
    if name in ("data", "weights") and value:
        value = _absolute(value)
    if name == "extension" and value:
        return split_name(value)[1]  # its file is compared by content
    return Path(value).resolve() if name in ("workdir", "resume") and value else value


def _absolute(value: str) -> str:
    """A path as one that means the same in any folder; all else as it is."""
    prefix = "hf:" if value.startswith("hf:") else ""
    path = Path(value.removeprefix(prefix)).expanduser()
    is_path = value != "digits" and path.exists()
    return f"{prefix}{path.resolve()}" if is_path else value


def suggest_learning_rate(
    config: Config, pretrained: "Pretrained", splits: "Splits"
) -> dict[str, Any]:
    """Prints a learning rate for the recipe and draws the curve that it was read from."""
    from tljax.report.figures import learning_rates, write_figure
    from tljax.runtime.parallel import is_writer
    from tljax.studies.learning_rate import find_learning_rate
    from tljax.train import run_directory

    test = find_learning_rate(
        pretrained.model,
        pretrained.variables,
        splits,
        config.fit,
        loading=config.loading,
        seed=config.seed,
        **config.training_hooks(),
    )
    curve = (config.workdir or Path("runs")) / "learning_rate.png"
    if is_writer():
        run_directory.mark(curve.parent, splits)
        write_figure(curve, learning_rates(test))
        print(f"suggested            --learning-rate {test.suggestion:.1e}")
        print(f"its curve            {curve}")
    return {"learning_rate": test.suggestion, "curve": str(curve)}


def main() -> None:
    """Run ``tljax train``."""
    cli.main(Config, run)

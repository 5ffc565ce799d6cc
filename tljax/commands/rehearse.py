"""The command ``tljax rehearse``: compile what a command would run on a machine not at hand."""

import multiprocessing
import os
import re
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from tljax.commands import attack, cli, evaluate, extract, probe, train
from tljax.report.rehearsal import rehearsal_lines
from tljax.runtime.errors import RequestError
from tljax.runtime.machines import (
    Machine,
    configure_compilers,
    describe_devices,
    parse_machine,
    require_compiler,
)
from tljax.runtime.settings import Conditions

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from tljax.pretrained import Pretrained
    from tljax.studies.rehearse import Program


@dataclass(frozen=True, kw_only=True)
class Target(cli.Network):
    """Options of all subcommands, beside those of the command that is rehearsed.

    Attributes:
        on: Machine to compile for: v4, v5e, v5p or v6e and the number in Google Cloud's name, such
            as v5e-8, v5e-256 or v4-32, of cores for v4 and v5p, of chips for the others; with 2x
            before it two such slices, as 2xv5e-256; or h100, h200 or a100 and the number of GPUs of
            one host, such as h100-8.
        effort: Effort of the TPU compiler. With low it takes a fifth to a tenth of the time, shows
            memory and traffic, and estimates no duration.
        largest_batch: Search for the largest batch that fits, by up to three more compilations of
            each program.
    """

    on: str
    effort: Literal["full", "low"] = "full"
    largest_batch: bool = True

    def describe_devices(self, precision: str) -> None:
        """Print nothing: programs are compiled for other devices than those at hand."""

    def read(self, weights: str | Path, **options: Any) -> "Pretrained":
        """Load weights; of those in the catalog only the network, whose programs are the same."""
        from tljax.pretrained.catalog import catalog_name
        from tljax.pretrained.load import load_zeros

        if catalog_name(str(weights)):
            return load_zeros(str(weights))
        return super().read(weights, **options)

    def completed(self) -> Any:
        """Return the options as they are: a rehearsal continues no run."""
        return self


_MACHINE: Conditions = (
    ("devices distributed", lambda _: False, "in a rehearsal, which is for all chips of --on"),
)


@dataclass(frozen=True, kw_only=True)
class Train(Target, train.Config):
    """Compile what ``tljax train`` runs: cached activations, steps, and validation."""

    conditions: ClassVar[Conditions] = (
        *_MACHINE,
        ("resume dry_run find_learning_rate profile", lambda _: False, "in a rehearsal"),
        *train.Config.conditions,
    )

    def programs(self, mesh: "Mesh") -> "list[Program]":
        """Return the programs of the phases of training."""
        from tljax.data.sources import open_splits
        from tljax.studies.programs import training_programs
        from tljax.train.setup import check_images, plan_run

        pretrained = self.load()
        splits = open_splits(self.data, val_fraction=self.val_fraction, labels=self.labels)
        pretrained = self.adapt(pretrained, splits.train)
        check_images(pretrained.model, self.fit)
        hooks = self.training_hooks(pretrained, splits)
        loading = replace(self.loading, devices=None)
        run = plan_run(*pretrained[:2], splits, self.fit, loading, self.seed, mesh=mesh, **hooks)
        memory = parse_machine(self.on).usable_memory
        return training_programs(run, run.loading.batch_size, memory)


@dataclass(frozen=True, kw_only=True)
class Probe(Target, probe.Config):
    """Compile what ``tljax probe`` runs: the features, and the solver of the linear probe."""

    conditions: ClassVar[Conditions] = (*_MACHINE, *probe.Config.conditions)

    def programs(self, mesh: "Mesh") -> "list[Program]":
        """Return the programs of a probe."""
        from tljax.data.sources import open_splits
        from tljax.studies.programs import probe_programs

        pretrained = self.load()
        splits = open_splits(self.data, val_fraction=self.val_fraction, labels=self.labels)
        pretrained = self.adapt(pretrained, splits.train)
        return probe_programs(*pretrained[:2], splits, mesh, self.loading, stage=self.stage)


@dataclass(frozen=True, kw_only=True)
class Attack(Target, attack.Config):
    """Compile what ``tljax attack`` runs: each attack on a batch of images."""

    conditions: ClassVar[Conditions] = (*_MACHINE, *attack.Config.conditions)

    def programs(self, mesh: "Mesh") -> "list[Program]":
        """Return a program for each attack."""
        from tljax.studies import robustness
        from tljax.studies.programs import attack_programs

        network = self.load(self.workdir).require_classes()
        robustness.require_attackable(network.card)
        if network.card.task.kind != "classification":
            raise RequestError("rehearse attack: only attacks on classes can be rehearsed")
        target = None if self.target is None else robustness.find_target(network.card, self.target)
        chosen = robustness.choose_attacks(
            self.attacks, norm=self.norm, num_steps=self.steps, target=target
        )
        radius = max(self.epsilons) / 255
        return attack_programs(network, chosen, radius, mesh, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Evaluate(Target, evaluate.Config):
    """Compile what ``tljax evaluate`` runs: the network on a batch of images."""

    conditions: ClassVar[Conditions] = (*_MACHINE, *evaluate.Config.conditions)

    def programs(self, mesh: "Mesh") -> "list[Program]":
        """Return the program of the whole network."""
        from tljax.data.sources import open_labeled
        from tljax.studies.programs import forward_program, image_loader
        from tljax.train import run_directory

        network = self.load(self.workdir)
        model, variables, card = network
        if self.data:
            labels = cli.labels_of(self.labels, self.data, self.workdir or self.weights, card)
            source = open_labeled(self.data, labels)
        elif self.workdir:
            source, _ = run_directory.open_validation(self.workdir)
        else:
            raise RequestError("no images to measure on: add --data FOLDER or --workdir RUN")
        loader = image_loader(model, source, self.loading)
        size = self.batch_size
        return [forward_program("evaluation", model, variables, mesh, size, loader=loader)]


@dataclass(frozen=True, kw_only=True)
class Extract(Target, extract.Config):
    """Compile what ``tljax extract`` runs: the network up to a stage, on a batch of images."""

    conditions: ClassVar[Conditions] = (*_MACHINE, *extract.Config.conditions)

    def programs(self, mesh: "Mesh") -> "list[Program]":
        """Return the program of the stages up to ``--stage``."""
        from tljax.data.sources import open_labeled
        from tljax.studies.programs import forward_program, image_loader

        model, variables, _ = self.load()
        stop = (*model.stage_names, None)[model.position(self.stage) + 1]
        source = open_labeled(self.data, self.labels)
        loader = image_loader(model, source, self.loading)
        name, size = f"output of {self.stage}", self.batch_size
        return [forward_program(name, model, variables, mesh, size, stop=stop, loader=loader)]


Config = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[Attack, tyro.conf.subcommand("attack")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Extract, tyro.conf.subcommand("extract")]
)


def run(config: Config) -> dict[str, Any]:
    """Compile each program in another process, which the compiler may abort, and describe it."""
    machine = parse_machine(config.on)
    require_compiler(machine.chip)
    print(machine, flush=True)
    done: list[dict[str, Any]] = []
    while (aborted := _compile_rest(config, machine, done)) is not None:
        _add(done, aborted, machine)
    problems = [
        f"{one['name']}: {one['error'] or 'it needs more memory than a chip has'}"
        for one in done
        if one["error"] or not one["fits"]
    ]
    return {
        "machine": machine.name,
        "chips": machine.chips,
        "hosts": machine.hosts,
        "programs": done,
        "problems": problems,
    }


def _add(done: list[dict[str, Any]], record: dict[str, Any], machine: Machine) -> None:
    done.append(record)
    print("\n".join(rehearsal_lines(record, machine)), flush=True)


def _compile_rest(
    config: Config, machine: Machine, done: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Compile in a new process what is not done, and print and append each result.

    Returns:
        The record of the program at which the process was aborted; None if it was not.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        log, current = Path(folder, "stderr"), ""
        names = [one["name"] for one in done]
        process = context.Process(target=_compile, args=(config, names, sender, log), daemon=True)
        process.start()
        sender.close()
        try:
            while True:
                match receiver.recv():
                    case "begins", name:
                        current = name
                    case "done", record:
                        _add(done, record, machine)
                    case "refused", message:
                        raise RequestError(message)
                    case "failed", message:
                        raise RuntimeError(message)
        except EOFError:
            process.join()
        finally:
            process.kill()
        if not process.exitcode:
            return None
        reason = _last_words(log)
    number = -process.exitcode
    how = f"by {signal.Signals(number).name}" if number > 0 else f"with code {process.exitcode}"
    if not current:
        raise RuntimeError(f"the process that compiles ended {how}{reason}")
    return {"name": current, "error": f"the compiler ended the process {how}{reason}"}


def _last_words(log: Path) -> str:
    """Return the line in which a compiler says why it aborts; empty if there is none."""
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    fatal = [line for line in lines if re.match(r"F\d{4} ", line) or "Check failed" in line]
    return f": {fatal[-1].rpartition('] ')[2].strip()[:300]}" if fatal else ""


def _compile(config: Config, done: list[str], answer: Connection, log: Path) -> None:
    """Compile the programs that are not done; send what begins, what is done and what fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits ends this one
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)  # what the compilers print
    configure_compilers()
    from tljax.runtime.parallel import mesh_of
    from tljax.studies.rehearse import rehearse

    try:
        machine = parse_machine(config.on)
        mesh = mesh_of(describe_devices(machine))
        for program in replace(config, platform=None).programs(mesh):
            if program.name not in done:
                answer.send(("begins", program.name))
                options = {"low_effort": config.effort == "low", "search": config.largest_batch}
                answer.send(("done", rehearse(program, machine, **options).as_json()))
    except RequestError as error:
        answer.send(("refused", str(error)))
    except Exception as error:  # noqa: BLE001 - shown by the process that waits
        if config.debug:
            traceback.print_exc()
        answer.send(("failed", f"{type(error).__name__}: {error}"))

"""Programs that are compiled for another machine are those that a run executes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import engine
import pytest
import tiny

from tljax.studies.programs import training_programs
from tljax.train import loop
from tljax.train.setup import plan_run


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"cache": "none", "augment": True}, "step of phase train"),
        ({"freeze_to": "stem"}, "step of phase train, from cached activations at layer1"),
        (
            {"freeze_to": "pool"},
            "step of phase train, from cached activations at head, 32 in one dispatch",
        ),
    ],
    ids=["images", "suffix", "head"],
)
def test_a_rehearsed_step_is_the_step_of_the_run(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], name: str
):
    executed: set[str] = set()

    @contextmanager
    def record(step, arguments, *_: int) -> Iterator[None]:
        executed.add(step.lower(*arguments).as_text())
        yield

    monkeypatch.setattr(loop, "within_memory", record)
    config, data = engine.config(epochs=1, **options), engine.splits(8, broken=(), val_broken=())
    engine.train(config, data)
    run = plan_run(tiny.MODEL, tiny.random_variables(), data, config, engine.LOADING)
    programs = {program.name: program for program in training_programs(run, 4, 2**30)}
    assert name in programs
    assert {programs[name].trace(4).lower().as_text()} == executed

"""Programs compiled for a GPU and for TPUs on a machine without them."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Configured first, so that JAX does not search for devices.
CODE = """
import json, sys
from tljax.runtime.machines import configure_compilers
configure_compilers()
import programs
print(json.dumps(programs.compiled(**json.loads(sys.argv[1]))))
"""

pytestmark = pytest.mark.slow

MODES = (
    ("inference", False),
    ("input gradient", False),
    *((mode, stats) for mode in ("full step", "suffix", "cached suffix") for stats in (0, 1)),
)


def compile_for(machine: str, package: str, **request: Any) -> dict[str, Any]:
    """Compile in a new process, which a compiler may abort."""
    if find_spec(package) is None:
        pytest.skip(f"needs the compiler of the package {package}")
    places = filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")))
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps({"machine": machine, **request})],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("mode", "stats"), MODES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_lite0"])
def test_programs_compile_for_an_h100(name: str, mode: str, stats: bool) -> None:
    report = compile_for(
        "h100-1", "jax_cuda12_plugin", name=name, mode=mode, stats=bool(stats), batch=32
    )
    print(json.dumps({"name": name, "mode": mode, "batch_statistics": bool(stats), **report}))
    assert report["memory"]["arguments"] > 0
    assert not report["collectives"]


def step_on(machine: str) -> dict[str, Any]:
    """Compile a step of ResNet-18 without effort, because cycles are not checked."""
    request = {"name": "resnet18", "mode": "full step", "stats": False, "batch": 32}
    return compile_for(machine, "libtpu", **request, exec_time_optimization_effort=-1.0)


def test_a_step_on_eight_tpus_communicates_by_all_reduce_and_moves_little() -> None:
    report = step_on("v5e-8")
    assert set(report["collectives"]) == {"all-reduce"}
    # The loss looks up the logits of the labels; the copies are of small arrays.
    assert report["instructions"]["gather"] == 1
    assert report["instructions"]["copy"] <= 12


def test_a_step_on_two_slices_sends_a_share_of_the_gradient_from_one_to_the_other() -> None:
    """Eight hosts: each chip sends a sixteenth, and its slice gathers what has been summed."""
    report = step_on("2xv5e-16")
    assert report["instructions"]["gather"] == 1
    (_, reduced, _), (_, gathered, _), (_, sent, _) = (
        report["collectives"][kind] for kind in ("all-reduce", "all-gather", "inter-slice transfer")
    )
    assert gathered <= 1.01 * reduced
    assert sent <= 1.1 * reduced / 16


NORMS = """
import tljax
tljax.configure()
import jax
import jax.numpy as jnp
from tljax.models.layers import ConvNorm, Mode
from tljax.runtime.compiled import read_collectives
from tljax.runtime.parallel import data_mesh
from tljax.studies.programs import divided, replicated
mesh, layer = data_mesh(), ConvNorm(8, 3, padding=1)
x, mask = jax.ShapeDtypeStruct((32, 6, 6, 8), "float32"), jax.ShapeDtypeStruct((32,), "bool")
variables = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, Mode(True)), x)
def loss(layers, x, mask):
    for variables in layers:
        x, _ = layer.apply(variables, jax.nn.relu(x), Mode(mask), mutable=["batch_stats"])
    return jnp.square(x).mean()
gradient = jax.jit(jax.grad(loss))
lowered = gradient.lower(replicated([variables] * 10, mesh), *divided((x, mask), mesh))
print(jax.device_count(), read_collectives(lowered.compile().as_text())["all-reduce"].times)
"""


def test_a_batch_norm_takes_one_all_reduce_forward_and_one_backward() -> None:
    """Of ten norms, and one more of the gradients of all kernels."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", NORMS],
        cwd=ROOT,
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.split() == ["8", "21"]

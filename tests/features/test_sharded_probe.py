"""Probes are the same on one device and on eight, with features on the devices and streamed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]

RUN = """
import json, sys
import tljax
tljax.configure()
import jax, numpy as np
sys.path.insert(0, "benchmarks")
from probe import synthetic_features
from tljax.features import design
from tljax.features.knn import knn_predict
from tljax.features.logistic import fit_logistic, trace_solver
from tljax.features.probe import L2_VALUES, fit_probe, fit_task_probe
from tljax.runtime.parallel import data_mesh

n, d, c, every = map(int, sys.argv[1:])
features, labels = synthetic_features(n, d, c)
l2, record = L2_VALUES[::every], {}
free = design.free_device_memory
for name, devices in ("one", 1), ("eight", 8), ("streamed", 8):
    mesh = data_mesh(devices)
    design.free_device_memory = free if name != "streamed" else lambda: 0
    fit = fit_logistic(features, labels, l2, num_classes=c, mesh=mesh)
    probe = fit_probe(features[:1500], labels[:1500], num_classes=c, l2_values=l2[::2], mesh=mesh)
    tags = (labels[:1500, None] % [2, 3] == 0).astype(np.float32)
    tagged = fit_task_probe("multilabel", features[:1500], tags, num_outputs=2,
        l2_values=l2[::2], mesh=mesh)
    twice = np.concatenate([features[:101], features[:101]])  # every similarity is a tie
    votes = knn_predict(twice, np.append(labels[:101], labels[101:202]), features[:50],
        num_classes=c, k=1, mesh=mesh)
    record[name] = dict(
        objective=fit.objective.tolist(), converged=fit.converged.tolist(),
        iterations=fit.iterations.tolist(), gradient_norm=fit.gradient_norm.tolist(),
        kernel=fit.kernel[:, :3, :3].tolist(), accuracy=probe.held_out_accuracy.tolist(),
        loss=probe.held_out_loss.tolist(), tag_loss=tagged.held_out_loss.tolist(),
        distance=[float(np.abs(a - b).max() / np.abs(a).max()) for a, b in
            zip(record.get("kernels", fit.kernel), fit.kernel)],
        votes=np.asarray(votes.argmax(1) == labels[:50]).tolist(),
    )
    record.setdefault("kernels", fit.kernel)
del record["kernels"]
for shape in (128_000, 256, 100), (16_000, 512, 100):
    memory = trace_solver(*shape, data_mesh(8)).lower().compile().memory_analysis()
    used = (memory.argument_size_in_bytes + memory.output_size_in_bytes
        - memory.alias_size_in_bytes + memory.temp_size_in_bytes)
    record.setdefault("bytes", []).append([used, design.probe_bytes(*shape, data_mesh(8))])
print(json.dumps(record))
"""


@pytest.fixture(scope="module")
def fits():
    """Fit the same features on one device, on eight, and from the host with eight."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", RUN, "2000", "32", "10", "6"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **flags}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("are read in every pass") == 3
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eight", "streamed"])
def test_the_path_on_eight_devices_is_that_on_one(fits, name):
    one, many = fits["one"], fits[name]
    assert all(many["converged"])
    np.testing.assert_allclose(many["objective"], one["objective"], rtol=1e-6)
    np.testing.assert_allclose(many["accuracy"], one["accuracy"], atol=0.005)
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=2e-3)
    np.testing.assert_allclose(many["tag_loss"], one["tag_loss"], rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "eight"])
def test_the_earlier_of_two_equal_neighbors_votes(fits, name):
    assert all(fits[name]["votes"])


@pytest.mark.slow
def test_the_computed_memory_is_that_of_the_compiled_program(fits):
    for used, computed in fits["bytes"]:
        np.testing.assert_allclose(computed, used, rtol=0.05)

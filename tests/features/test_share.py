"""Two processes keep their own rows of features, and find what one process with all rows does."""

import json
import sys

import numpy as np
import pytest
from together import start_together

from tljax.features.share import Share

GATHERED = 512
"""Bytes that may be gathered at once; all features take more than five times as many."""

RUN = """
import json, os, sys
import jax
if os.environ["JAX_NUM_PROCESSES"] != "1":
    from tljax.runtime.parallel import join
    join()
jax.config.update("jax_disable_most_optimizations", True)
import numpy as np
from jax.experimental import multihost_utils
from test_features import source
from tiny import MODEL, random_variables
from tljax.data.options import Loading
from tljax.features import share
from tljax.features.evaluate import evaluate
from tljax.features.extract import compute_features, run_from_stage
from tljax.features.knn import knn_predict
from tljax.features.probe import fit_task_probe
from tljax.runtime import parallel

allgather, gathered = multihost_utils.process_allgather, [0]

def spy(x, **how):
    whole = allgather(x, **how)
    gathered.append(whole.nbytes)
    return whole

multihost_utils.process_allgather = spy
share.GATHER_BYTES = parallel.GATHER_BYTES = int(sys.argv[1])
loading, variables = Loading(8), random_variables()

def features(count, **how):
    return compute_features(MODEL, variables, source(count, broken=(3, 12)), loading, **how)

train, val = features(62), features(14)
options = dict(l2_values=(1e-3, 1e-1, 10), seed=1)
probe = fit_task_probe("classification", train.share, train.labels, num_outputs=2, **options)
numbers = np.sin(train.indices)[:, None].astype(np.float32)
ridge = fit_task_probe("regression", train.share, numbers, num_outputs=1,
    weights=np.arange(60) % 4, **options)
fewer = np.arange(60) % 12 == 0  # fewer examples than dimensions
small = fit_task_probe("regression", train.share, numbers, num_outputs=1, weights=fewer, **options)
votes = knn_predict(train.share, train.labels, val.share, num_classes=2, k=5)
prefix, one = features(14, stop="layer1"), features(1)
onward = evaluate(run_from_stage(MODEL, variables, prefix, loading, start="layer1"))
head = run_from_stage(MODEL, variables, one, loading, start="head").whole()
print(json.dumps(dict(
    own=len(train.values), features=train.share.total * train.values[0].nbytes,
    indices=train.indices.tolist(), labels=train.labels.tolist(), skipped=sorted(train.skipped),
    whole=train.whole().values.tolist(), largest=max(gathered),
    probes=[[x.l2, x.kernel.tolist(), x.bias.tolist(), x.held_out_loss.tolist()]
        for x in (probe, ridge, small)],
    votes=votes.tolist(), logits=onward.outputs.values.tolist(), loss=onward.loss,
    head=head.values.tolist(),
)))
"""


@pytest.fixture(scope="module")
def runs():
    """Run one process with four devices, and two with two; return what each process prints."""
    started = [
        process
        for processes in (1, 2)
        for process in start_together(
            [sys.executable, "-c", RUN, str(GATHERED)], processes, 4 // processes
        )
    ]
    printed = [process.communicate(timeout=600) for process in started]
    for process, (_, errors) in zip(started, printed, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in printed]


@pytest.mark.slow
def test_no_process_has_or_gathers_the_features_of_all(runs):
    one, *both = runs
    assert one["own"] == 60
    assert sum(run["own"] for run in both) == 60
    for run in both:
        assert run["own"] < 40
        assert 0 < run["largest"] <= GATHERED < run["features"] / 5


@pytest.mark.slow
def test_processes_with_a_share_find_what_one_process_does(runs):
    one, *both = runs
    for run in both:
        for name in ("indices", "labels", "skipped"):
            assert run[name] == one[name]
        for name in ("whole", "votes", "logits", "loss", "head"):
            np.testing.assert_allclose(run[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)
        for found, expected in zip(run["probes"], one["probes"], strict=True):
            for value, wanted in zip(found, expected, strict=True):
                np.testing.assert_allclose(value, wanted, rtol=2e-3, atol=2e-3)


def test_selected_rows_keep_their_values_and_get_the_numbers_of_those_left():
    everything, used = np.arange(10, 16), np.array([1, 0, 1, 1, 0, 1], bool)
    rows = np.array([0, 3, 4])
    values, numbers, total = Share(everything[rows], rows, 6).select(used)
    assert values.tolist() == everything[used][numbers].tolist() == [10, 13]
    assert total == 4

"""Compare the speed of a probe's L2 sweep with scikit-learn's LogisticRegression; print JSON.

Both minimize the same objective on the same standardized features; scikit-learn solves one L2
penalty after another. Its default tolerance of 1e-4 on the gradient can be far from the optimum, so
``--tight`` also runs it with 1e-8. The objectives are compared in float64, by one formula.

    python benchmarks/probe.py --sklearn-values 5
"""

import tljax

tljax.configure()

import argparse
import json
import sys
import time
import warnings
from importlib.metadata import version

import jax
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from tljax.features.logistic import fit_logistic
from tljax.features.probe import L2_VALUES

SKLEARN_MAX_ITERATIONS = (
    1000  # the default of 100 stops small L2 penalties long before the tolerance
)


def synthetic_features(
    examples: int, dimensions: int, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw standardized features like a ResNet's: rectified, correlated, power-law spectrum."""
    rng = np.random.default_rng(0)
    labels = np.arange(examples) % classes
    spectrum = np.arange(1, dimensions + 1) ** -0.5
    latent = rng.normal(size=(examples, dimensions)) + 0.4 * rng.normal(
        size=(classes, dimensions)
    ).take(labels, axis=0)
    mixing = rng.normal(size=(dimensions, dimensions)) / dimensions**0.5
    features = np.maximum((latent * spectrum) @ mixing, 0)
    features = (features - features.mean(0)) / features.std(0)
    return features.astype(np.float32), labels


def objective(features, labels, kernel, bias, l2) -> float:
    logits = features.astype(np.float64) @ kernel + bias
    own = logits[np.arange(len(labels)), labels]
    loss = np.logaddexp.reduce(logits, axis=1) - own
    return float(loss.mean() + l2 / 2 * np.square(kernel, dtype=np.float64).sum())


def time_tljax(features, labels, classes) -> tuple[dict, list[float]]:
    def solve():
        start = time.perf_counter()
        fit = fit_logistic(features, labels, np.array(L2_VALUES), num_classes=classes)
        return jax.block_until_ready(fit), time.perf_counter() - start

    _, first_seconds = solve()
    fit, seconds = solve()
    kernels, biases = np.asarray(fit.kernel, np.float64), np.asarray(fit.bias, np.float64)
    objectives = [
        objective(features, labels, kernel, bias, l2)
        for kernel, bias, l2 in zip(kernels, biases, L2_VALUES, strict=True)
    ]
    report = {
        "seconds": seconds,
        "seconds_with_compilation": first_seconds,
        "values": len(L2_VALUES),
        "iterations": np.asarray(fit.iterations).tolist(),
        "converged": int(fit.converged.sum()),
    }
    return report, objectives


def time_sklearn(features, labels, values, objectives, tolerance) -> dict:
    """Time scikit-learn at the L2 penalties of the indices ``values``."""
    runs = []
    for value in values:
        l2 = L2_VALUES[value]
        model = LogisticRegression(
            C=1 / (len(labels) * l2), tol=tolerance, max_iter=SKLEARN_MAX_ITERATIONS
        )
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features, labels)
        seconds = time.perf_counter() - start
        excess = (
            objective(features, labels, model.coef_.T, model.intercept_, l2) / objectives[value] - 1
        )
        runs.append(
            {
                "l2": l2,
                "seconds": seconds,
                "iterations": int(model.n_iter_[0]),
                "objective_above_tljax": excess,
            }
        )
        print(f"{features.dtype} {tolerance} {runs[-1]}", file=sys.stderr)
    total = sum(run["seconds"] for run in runs)
    return {
        "dtype": str(features.dtype),
        "tolerance": tolerance,
        "runs": runs,
        "seconds_measured": total,
        "seconds_extrapolated_to_all_values": total * len(L2_VALUES) / len(values),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--examples", type=int, default=10_000, help="number of examples")
    parser.add_argument("--dimensions", type=int, default=2048, help="number of features")
    parser.add_argument("--classes", type=int, default=100, help="number of classes")
    parser.add_argument(
        "--sklearn-values",
        type=int,
        default=len(L2_VALUES),
        help="number of the 45 penalties that scikit-learn solves; the total is extrapolated",
    )
    parser.add_argument(
        "--tight",
        action="store_true",
        help="also run scikit-learn in float32, and with tolerance 1e-8",
    )
    args = parser.parse_args()
    features, labels = synthetic_features(args.examples, args.dimensions, args.classes)
    ours, objectives = time_tljax(features, labels, args.classes)
    print(ours, file=sys.stderr)
    values = np.linspace(0, len(L2_VALUES) - 1, args.sklearn_values).round().astype(int).tolist()
    report = {
        "shape": [args.examples, args.dimensions, args.classes],
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "numpy", "scikit-learn")},
        "tljax": ours,
        "sklearn": [
            time_sklearn(features.astype(dtype), labels, values, objectives, tolerance)
            for dtype, tolerance in ((np.float64, 1e-4), (np.float32, 1e-4), (np.float64, 1e-8))
            if values and (args.tight or (dtype, tolerance) == (np.float64, 1e-4))
        ],
        "sklearn_max_iterations": SKLEARN_MAX_ITERATIONS,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()

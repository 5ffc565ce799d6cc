"""Accuracy, loss, ranking, error and calibration metrics: functions from arrays to numbers.

- `tljax.metrics.classification`: exclusive classes, ordered ones too.
- `tljax.metrics.multilabel`: several labels per example, some of them unknown.
- `tljax.metrics.regression`: one or several numbers per example, some of them unknown.
- `tljax.metrics.calibration`: whether probabilities can be believed.
- `tljax.metrics.bootstrap`: confidence intervals of all of these.
- `tljax.metrics.sums`: means over batches, devices and hosts.

Metrics of a whole data set compute in float64 with NumPy, on the host. They share three rules:

- ``weights`` is ``[..., n]``, non-negative; an example of weight 0 is as good as absent, and one of
  weight 2 as good as there twice. The result has the leading axes, so that one call measures many
  resamples. By default every example has weight 1.
- A target that is unknown (-1 for a class, NaN for a label or a number) counts in no metric.
- A metric that is not defined for these examples is NaN, without a warning;
  `tljax.metrics.weighted.mean_of_defined` averages over the labels or numbers that have one. So is
  every metric of a label or number for which a known example has the prediction NaN.
"""

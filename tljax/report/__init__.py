"""What people look at after a run: pictures, plots, and the page that holds them all."""

from tljax.report.figures import (
    LogEntry,
    confusion_matrix,
    curves,
    reliability_diagram,
    sweep_curve,
)
from tljax.report.grid import image_grid
from tljax.report.page import (
    ClassResult,
    Mistake,
    Report,
    SeenInTraining,
    Sweep,
    per_class,
    write_report,
)

__all__ = [
    "ClassResult",
    "LogEntry",
    "Mistake",
    "Report",
    "SeenInTraining",
    "Sweep",
    "confusion_matrix",
    "curves",
    "image_grid",
    "per_class",
    "reliability_diagram",
    "sweep_curve",
    "write_report",
]

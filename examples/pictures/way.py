"""Draw way.svg: the path of an image from its file through one training step.

Run it with

    python examples/pictures/way.py
"""

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 860, 784

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
  .file { font: 600 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
  .value { font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #0a5a9c }
  .title { font-weight: 600; font-size: 14px }
  .faint { fill: #59636e }
  .page { fill: #ffffff }
  .host { fill: #f3f5f7 }
  .device { fill: #e9f4ec }
  .box { fill: #ffffff; stroke: #8c959f }
  .frozen { fill: #d5d9de; stroke: #8c959f }
  .trainable { fill: #ffd9a0; stroke: #b3701a }
  .line { fill: none; stroke: #59636e; stroke-width: 1.5 }
  .tip { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .value { fill: #79c0ff }
    .faint { fill: #9da7b1 }
    .page { fill: #0d1117 }
    .host { fill: #161b22 }
    .device { fill: #12261a }
    .box { fill: #0d1117; stroke: #6e7681 }
    .frozen { fill: #3a414a; stroke: #6e7681 }
    .trainable { fill: #7a4a0b; stroke: #d29922 }
    .line { stroke: #9da7b1 }
    .tip { fill: #9da7b1 }
  }
"""
"""The style sheet, with colors for light pages and for dark ones."""


def rectangle(x: int, y: int, width: int, height: int, kind: str) -> str:
    """Return a rectangle with round corners."""
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return f'<rect class="{kind}" {place} rx="6"/>'


def text(x: int, y: int, content: str, kind: str = "", anchor: str = "start") -> str:
    """Return one line of text whose baseline is at ``y``."""
    css_class = f' class="{kind}"' if kind else ""
    return f'<text{css_class} x="{x}" y="{y}" text-anchor="{anchor}">{escape(content)}</text>'


def box(x: int, y: int, width: int, height: int, file: str, *lines: str) -> str:
    """Return a labeled box; a line that begins with ``=`` names a value that the file produces."""
    parts = [rectangle(x, y, width, height, "box"), text(x + 10, y + 20, file, "file")]
    for i, line in enumerate(lines):
        kind = "value" if line.startswith("=") else ""
        parts.append(text(x + 10, y + 40 + 18 * i, line.removeprefix("="), kind))
    return "\n".join(parts)


def arrow(*points: tuple[int, int]) -> str:
    """Return a line through the points with an arrowhead at the last one."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline class="line" marker-end="url(#tip)" points="{path}"/>'


STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
TRAINABLE = ("layer4", "head")


def stages(x: int, y: int) -> str:
    """Return the stages of a network, trainable ones in another color, with a legend."""
    parts = []
    for name in STAGES:
        parts.append(rectangle(x, y, 56, 26, "trainable" if name in TRAINABLE else "frozen"))
        parts.append(text(x + 28, y + 18, name, anchor="middle"))
        x += 60
    for kind, word in (("frozen", "frozen"), ("trainable", "trainable")):
        parts += [rectangle(x + 6, y + 6, 14, 14, kind), text(x + 25, y + 18, word)]
        x += 70
    return "\n".join(parts)


def host() -> list[str]:
    """Return the part on the host, from an image file to a batch."""
    return [
        text(24, 33, "Host", "title"),
        text(66, 33, "threads or processes, ahead of the device", "faint"),
        box(24, 46, 150, 86, "image file", "one example of a Source", "JPEG, PNG, ...", "=bytes"),
        box(
            *(214, 46, 240, 86, "data/decode.py"),
            *("upright, RGB, short side resized,", "central square", "=uint8 [h, w, 3]"),
        ),
        box(
            *(494, 46, 342, 86, "data/loader.py"),
            *("shuffled by seed and epoch, padded, masked",),
            *("=Batch: inputs uint8 [b, h, w, 3], targets,", "=mask [b], indices [b], extra"),
        ),
        box(
            *(344, 162, 492, 80, "train/inputs.py"),
            *("computes the frozen prefix once and reuses it in every epoch, if",),
            *("nothing before the first trainable stage varies (no augmentation)",),
        ),
        arrow((174, 89), (212, 89)),
        arrow((454, 89), (492, 89)),
        arrow((520, 132), (520, 147), (48, 147), (48, 312)),
        arrow((700, 132), (700, 160)),
        text(60, 206, "images"),
        text(60, 224, "inputs uint8 [b, h, w, 3]", "value"),
    ]


def device() -> list[str]:
    """Return the part on the device, from a batch to the next state."""
    return [
        text(64, 299, "Device", "title"),
        text(124, 299, "train/step.py", "file"),
        text(234, 299, "step(state, frozen, batch, keys)", "value"),
        box(
            *(24, 314, 236, 104, "data/augment.py"),
            *("random crop, flip, RandAugment,", "mixup, CutMix", "=inputs float32 [b, s, s, 3]"),
            "=targets [b, classes]",
        ),
        box(300, 314, 536, 104, "models/model.py", "apply: normalizes, then runs the stages"),
        stages(316, 362),
        text(312, 408, "logits [b, classes]", "value"),
        arrow((260, 375), (314, 375)),
        arrow((584, 242), (584, 360)),
        text(594, 268, "activations"),
        text(672, 268, "inputs float32 [b, ...]", "value"),
        box(
            *(560, 456, 276, 86, "train/objectives.py"),
            *("objective(forward, batch, key)", "may call forward several times"),
            "=losses [b], metrics {name: [b]}",
        ),
        box(
            *(282, 456, 240, 86, "train/step.py"),
            *("mean loss over the rows of mask,", "gradient of the trainable part"),
            "=grads, like state.params",
        ),
        box(
            *(24, 456, 220, 86, "train/optimizer.py"),
            *("Optax: rates by stage, decay,", "schedule, clipping", "=updates, like grads"),
        ),
        box(24, 566, 498, 50, "state", "=step, params, batch_stats, opt_state, ema"),
        text(80, 586, "the input of the next step"),
        arrow((698, 418), (698, 454)),
        text(708, 441, "logits, captured"),
        arrow((560, 499), (524, 499)),
        arrow((282, 499), (246, 499)),
        arrow((134, 542), (134, 564)),
        arrow((660, 542), (660, 676)),
        text(670, 590, "metrics"),
        text(670, 608, "{name: (sum, count)}", "value"),
    ]


def reading() -> list[str]:
    """Return the part on the host that reads metrics and writes them to files."""
    return [
        text(24, 663, "Host", "title"),
        text(66, 663, "reads metrics some steps later, so no step waits", "faint"),
        box(
            *(560, 678, 276, 72, "train/loop.py"),
            *("averages an epoch, saves checkpoints", "={name: float}"),
        ),
        box(
            282,
            678,
            240,
            72,
            "on_step, on_epoch",
            "callbacks of the caller",
            "=step, {name: float}",
        ),
        box(
            24,
            678,
            220,
            72,
            "train/run_directory.py",
            "a line per epoch or N steps",
            "=metrics.jsonl",
        ),
        arrow((560, 714), (524, 714)),
        arrow((698, 750), (698, 762), (134, 762), (134, 752)),
    ]


def drawing() -> str:
    """Return the whole SVG."""
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    marker = 'id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto"'
    tip = f'<marker {marker}><path class="tip" d="M0,0 L8,4 L0,8 z"/></marker>'
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} role="img">',
        "<title>The path of an image through a training step</title>",
        f"<style>{STYLE}</style>",
        f"<defs>{tip}</defs>",
        f'<rect class="page" {size} rx="10"/>',
        rectangle(12, 12, 836, 242, "host"),
        rectangle(12, 276, 836, 352, "device"),
        rectangle(12, 640, 836, 132, "host"),
        *host(),
        *device(),
        *reading(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawing(), "utf-8")

"""Draw docs/assets/flower-audit.png: what a server reads from the quick-start app's recording."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file

import gradleak as gl

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.federate.quickstart import EXAMPLE, imported, run_app, tell_truth  # noqa: E402

ROWS = {
    "nothing": "none",
    "clip, noise 0.001": "clip:norm=1+gaussian-noise:std=0.001",
    "clip, noise 0.01": "clip:norm=1+gaussian-noise:std=0.01",
}
NODES = 8


def main(target: Path) -> None:
    """Rows: the truth, and the claims from recordings under three protections."""
    rows = {}
    for title, defense in ROWS.items():
        with tempfile.TemporaryDirectory() as scratch, imported(EXAMPLE) as app:
            protect = app["client_app"].protect
            app["client_app"].app._mods[:] = [protect(defense)]
            torch.manual_seed(0)
            entries = run_app(app, nodes=NODES, recording=f"{scratch}/seen")
            truth = tell_truth(app["task"], entries, Path(scratch) / "truth.safetensors")
            report = gl.audit(
                recorded=f"{scratch}/seen",
                truth=truth,
                data="mnist-5k",
                model="quickstart.task:Net",
                mechanism="fedavg",
                local_steps=1,
                local_learning_rate=0.1,
                defenses=defense,
                attacks="linear-layer",
                workers=0,
                out=f"{scratch}/out",
            )
            finding = report.findings[0]
            psnr = finding["measurements"]["psnr_db"]
            words = "{value:.1f} dB [{low:.1f}, {high:.1f}], n = {n}, guess {baseline:.1f}"
            print(title, words.format(**psnr), f"control {psnr['control']:.1f}")
            stored = load_file(report.directory / finding["tensors"][0])
            rows.setdefault("truth", stored["truth"][:, 0, 0])
            rows[f"{title}\n{psnr['value']:.0f} dB"] = stored["claim"][:, 0, 0]
    figure, axes = plt.subplots(len(rows), NODES, figsize=(8.6, 4.3))
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.tight_layout()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main(Path(__file__).with_name("flower-audit.png"))

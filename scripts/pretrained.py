"""Makes the weights in the package from a checkpoint of a recipe. Seed 0 was not chosen by its score.

    python -m lenet_pl fit --config best --seed_everything 0
    python scripts/pretrained.py runs/best/version_0/checkpoints/last.ckpt

The file holds the plain LeNet-5 and what is needed to score it. It leaves out the optimizer, and what the recipe adds
to the net for training.
"""

import sys
from pathlib import Path

from lenet_pl import LitLeNet, checkpoint, runs


def main(path: Path) -> None:
    """Writes the package's file from the checkpoint ``path``."""
    content = checkpoint.load_ours(path, resume=False)
    kept = {name: content[name] for name in (*checkpoint.KEYS, *checkpoint.OURS, "precision")}
    kept["state_dict"] = LitLeNet.load(path).state_dict()
    kept["hyper_parameters"] |= {"batch_norm": False, "composed_kernels": False, "compile": False}
    checkpoint.AtomicCheckpointIO().save_checkpoint(kept, runs.PRETRAINED)
    print(f"{runs.PRETRAINED}: {runs.PRETRAINED.stat().st_size / 1000:,.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

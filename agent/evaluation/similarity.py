"""How alike two pictures are: PSNR, SSIM and, where its weights are on disk, LPIPS."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longdream.agent.evaluation.comparison import psnr

ALEX = "alexnet-owt-7be5be79.pth"
"""The file in which torchvision keeps the weights that LPIPS looks through."""


class Similarity:
    """Measures frames `(B, n, H, W, 3)` uint8 against others, each frame by itself.

    PSNR in dB; SSIM (Wang et al. 2004) with a Gaussian of deviation 1.5; LPIPS (Zhang et al. 2018, arXiv 1801.03924)
    with AlexNet. `without` says why there is no LPIPS, if there is none: nothing is downloaded.
    """

    def __init__(self, device: torch.device):
        self.without, self.lpips = "", None
        weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEX
        if importlib.util.find_spec("torchvision") is None:
            self.without = "torchvision is not installed"
        elif not weights.exists():
            self.without = f"its weights are not on disk ({weights})"
        else:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.lpips = LearnedPerceptualImagePatchSimilarity("alex", normalize=True, reduction="none").to(device)

    def __call__(self, made: Tensor, real: Tensor) -> dict[str, np.ndarray]:
        """By measure, `(B, n)`; no entry for LPIPS where it cannot be had."""
        found = {"psnr": self.psnr(made, real), "ssim": self.ssim(made, real)}
        if self.lpips is not None:
            with torch.no_grad():
                found["lpips"] = self.lpips(*map(_flat, (made, real))).view(made.shape[:2]).cpu().numpy()
        return found

    @staticmethod
    def psnr(made: Tensor, real: Tensor) -> np.ndarray:
        """`(B, n)`, in dB."""
        return psnr((made.float() - real.float()).square().mean((-3, -2, -1)).cpu().numpy())

    @staticmethod
    def ssim(made: Tensor, real: Tensor) -> np.ndarray:
        """`(B, n)`."""
        from torchmetrics.functional.image import structural_similarity_index_measure  # it takes seconds

        found = structural_similarity_index_measure(_flat(made), _flat(real), data_range=1.0, reduction="none")
        assert isinstance(found, Tensor)
        return found.view(made.shape[:2]).cpu().numpy()


def _flat(frames: Tensor) -> Tensor:
    """To `(B * n, 3, H, W)` in [0, 1]."""
    return frames.flatten(0, 1).movedim(-1, 1).float() / 255

"""Similarity of images: PSNR, SSIM and, if its weights are on disk, LPIPS."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longdream.agent.evaluation.comparison import psnr
from longdream.envs.extras import require

ALEX = "alexnet-owt-7be5be79.pth"
"""The file in which torchvision keeps the weights of AlexNet, which LPIPS needs."""


class Similarity:
    """Compares frames `(B, n, H, W, 3)` uint8 with real ones, frame by frame.

    PSNR in dB; SSIM (Wang et al. 2004) with a Gaussian window of standard deviation 1.5; LPIPS (Zhang et al. 2018,
    arXiv 1801.03924) with AlexNet. Nothing is downloaded: if LPIPS is not available, `without` says why.
    """

    def __init__(self, device: torch.device):
        require("video", "comparing frames")
        self.without = ""
        self.lpips = None
        weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEX
        if importlib.util.find_spec("torchvision") is None:
            self.without = "torchvision is not installed"
        elif not weights.exists():
            self.without = f"its weights are not on disk ({weights})"
        else:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.lpips = LearnedPerceptualImagePatchSimilarity("alex", normalize=True, reduction="none").to(device)

    def __call__(self, made: Tensor, real: Tensor) -> dict[str, np.ndarray]:
        """Each measure, `(B, n)`; there is no entry for LPIPS if it is not available."""
        measures = {"psnr": self.psnr(made, real), "ssim": self.ssim(made, real)}
        if self.lpips is not None:
            with torch.no_grad():
                measures["lpips"] = self.lpips(_flat(made), _flat(real)).view(made.shape[:2]).cpu().numpy()
        return measures

    @staticmethod
    def psnr(made: Tensor, real: Tensor) -> np.ndarray:
        """`(B, n)`, in dB."""
        return psnr((made.float() - real.float()).square().mean((-3, -2, -1)).cpu().numpy())

    @staticmethod
    def ssim(made: Tensor, real: Tensor) -> np.ndarray:
        """`(B, n)`."""
        from torchmetrics.functional.image import structural_similarity_index_measure  # the import takes seconds

        ssim = structural_similarity_index_measure(_flat(made), _flat(real), data_range=1.0, reduction="none")
        assert isinstance(ssim, Tensor)
        return ssim.view(made.shape[:2]).cpu().numpy()


def _flat(frames: Tensor) -> Tensor:
    """Frames as `(B * n, 3, H, W)` in [0, 1]."""
    return frames.flatten(0, 1).movedim(-1, 1).float() / 255

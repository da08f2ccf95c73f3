"""How similar pictures are."""

import numpy as np
import torch

from longdream.agent.evaluation.similarity import Similarity


def test_similarity_of_pictures() -> None:
    similarity = Similarity(torch.device("cpu"))
    rng = np.random.default_rng(0)
    real = torch.from_numpy(rng.integers(20, 235, (2, 3, 16, 16, 3)).astype(np.uint8))
    same, off = similarity(real, real), similarity(real + 10, real)
    np.testing.assert_allclose(off["psnr"], 20 * np.log10(255 / 10), rtol=1e-5)
    np.testing.assert_allclose(same["ssim"], 1, atol=1e-5)
    assert (same["psnr"] == 60).all() and (off["ssim"] < 1).all() and off["ssim"].shape == (2, 3)
    assert "lpips" not in same and similarity.without

"""RankDPO: Karthik et al. 2024, "Scalable Ranked Preference Optimization for Text-to-Image Generation" (2410.18013).

DPO over all pairs of a ranked list, weighted by what swapping them costs in discounted cumulative gain:

    loss = sum over i better than j of  |2^s_i - 2^s_j| |1 / log2(1 + rank_i) - 1 / log2(1 + rank_j)|  l(u_ij)

with scores s in [0, 1], ranks from 1 by the policy's own implicit rewards (no gradient), l = -log sigmoid, and u_ij as
in Diffusion-DPO. All images of a list share timestep and noise.
"""

from pydantic import Field

from diffusion_dpo.losses import ImageErrors, ImageLoss, ListLoss, implicit_reward


class RankDPO(ListLoss):
    """DPO over rankings: the pairs that matter for the top of the list weigh most."""

    beta: float = Field(2000.0, gt=0)
    """Strength of the pull towards the reference, in the convention of `dpo`."""

    def over_images(self, errors: ImageErrors) -> ImageLoss:
        """Return the weighted sum over the pairs of every list."""
        import torch
        from torch.nn import functional as F

        assert errors.scores is not None
        rewards = implicit_reward(self.beta, errors.reference, errors.policy)
        ranks = rewards.detach().argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
        discount, gain = 1 / torch.log2(1 + ranks.to(rewards.dtype)), torch.exp2(errors.scores)
        cost = (gain[:, :, None] - gain[:, None]).abs() * (discount[:, :, None] - discount[:, None]).abs()
        better = errors.scores[:, :, None] > errors.scores[:, None]
        logits = rewards[:, :, None] - rewards[:, None]
        loss = (better * cost * F.softplus(-logits)).sum((1, 2))
        return ImageLoss(loss, rewards.detach())

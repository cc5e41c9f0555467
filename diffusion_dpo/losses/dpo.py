"""Diffusion-DPO: Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization" (2311.12908).

Equation 14 with the constants of supplement S4. With errors e (means over latent elements),

    u = (beta / 2) [(e_ref(chosen) - e(chosen)) - (e_ref(rejected) - e(rejected))],      loss = -log sigmoid(u)

`beta` here is that of the authors' code and of the diffusers SDXL script; `convert_beta` translates the others.
"""

from typing import Literal

from pydantic import Field

from diffusion_dpo.losses import Loss, PairErrors, PairLoss, expected, implicit_reward

BetaConvention = Literal["salesforce", "diffusers_sdxl", "diffusers_sd", "paper"]


class DPO(Loss):
    """The logistic loss on the difference of implicit rewards; ties and doubts enter as soft labels."""

    beta: float = Field(2000.0, gt=0)
    """Strength of the pull towards the reference, on mean errors, with the factor 1/2: 2000 to 5000 is usual."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels that is taken to be wrong (conservative DPO): the margin then has a finite optimum."""

    def __call__(self, errors: PairErrors) -> PairLoss:
        """Return -log sigmoid(u), or its expectation under uncertain labels; the rewards are (beta/2)(e_ref - e)."""
        from torch.nn import functional as F

        chosen_reward = implicit_reward(self.beta, errors.reference_chosen, errors.chosen)
        rejected_reward = implicit_reward(self.beta, errors.reference_rejected, errors.rejected)
        label_prob = errors.label_prob + self.label_smoothing * (1 - 2 * errors.label_prob)
        loss = expected(lambda u: F.softplus(-u), chosen_reward - rejected_reward, label_prob)
        return PairLoss(loss, chosen_reward.detach(), rejected_reward.detach())


def convert_beta(beta: float, convention: BetaConvention, *, num_latent_elements: int) -> float:
    """Return the `beta` of this package that equals a published one.

    - "salesforce", "diffusers_sdxl": factor 1/2, mean errors, as here. Likewise SDPO, DMPO, Linear-DPO, SmPO, InPO.
    - "diffusers_sd": `train_diffusion_dpo.py` leaves out the factor 1/2, so ours is twice its number. Likewise
      Diffusion-KTO, DCO and Diffusion-NPO's SD 1.5 script.
    - "paper": the pseudo-code sums over the `num_latent_elements` of one image and has no 1/2.
    """
    if convention == "paper":
        return 2 * beta * num_latent_elements
    return 2 * beta if convention == "diffusers_sd" else beta

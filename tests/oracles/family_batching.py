"""The choices of data of the family, each from its paper: which samples does which gradient see?

As in ``family_ascent``; a loss of some samples takes their indices, ``L.size`` is the number of samples in the batch.
"""

import torch

from oracles.family_descent import epsilon, two_gradients


def m_sam(rho, m):
    """Foret et al., section 4.1: SAM gradients of disjoint parts of m samples, averaged over samples."""

    def rule(w, L, base):
        total = 0
        for part in torch.arange(L.size).split(m):
            L.begin_part()
            total = total + len(part) * two_gradients(L, w, rho, part)[1]
        return base.step(w, total / L.size)

    return rule


def sub_batch(rho, count):
    """Bahri, Mobahi, Tay (ACL 2022): the perturbation comes from the first ``count`` samples."""

    def rule(w, L, base):
        return base.step(w, L.gradient(w + epsilon(L.gradient(w, torch.arange(count)), rho)))

    return rule


def top(values, count):
    """The indices of the largest, in their order."""
    return torch.tensor(sorted(sorted(range(len(values)), key=lambda i: -float(values[i]))[:count]))


def k_sam(rho, count):
    """Ni et al. (arXiv 2210.12864): both gradients on the samples with the largest loss."""

    def rule(w, L, base):
        chosen = top(L.criterion(L.outputs(w)), count)
        return base.step(w, two_gradients(L, w, rho, chosen)[1])

    return rule


def esam_sds(rho, count):
    """Du et al. (ICLR 2022), section 3.2: the second gradient on the samples whose loss rises most."""

    def rule(w, L, base):
        eps = epsilon(L.gradient(w), rho)
        rise = L.criterion(L.outputs(w + eps)) - L.criterion(L.outputs(w))
        return base.step(w, L.gradient(w + eps, top(rise, count)))

    return rule

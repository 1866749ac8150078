"""Muon: what may take AdamW's place for matrices and convolutions (train.py --optimizer muon).

AdamW scales each weight's step by itself, so a few strong directions of a gradient make up most of
a matrix's step. Muon keeps the directions of the momentum, U S V^T, and makes them all equally
strong: it steps along U V^T. Directions that are rare in the gradients, but say much, are learned
sooner. What is no matrix, embeddings and the head stay with AdamW.

Source: Keller Jordan and others, "Muon: An optimizer for hidden layers in neural networks" (2024).
The length of a step, so that AdamW's learning rate and weight decay serve Muon too: Liu and others,
"Muon is Scalable for LLM Training" (arXiv 2502.16982, Eq. 4).
"""

import torch

from machine import fast_bf16, own, shared_as, whole


def orthogonalise(x, steps=5):
    """Matrices x (N, m, n), U S V^T each, -> about U V^T: every singular value between 0.7 and 1.2.

    Newton-Schulz: an odd polynomial of x acts on singular values alone. This one, time and again,
    a x + (b G + c G^2) x with G = x x^T, lifts small ones fast and lets large ones swing around 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT                                # the smaller side first: then products are smaller
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)        # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum (Nesterov's). All parameters are matrices, or count
    as one: a convolution's weight (out, in, k, k) as (out, in k k).

    found_inf: as in the fused AdamW, a tensor; where it is not 0 no weight changes.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                          # orthogonalised together
            for p in group["params"]:
                if p.grad is not None:          # a tower whose modality is absent has none
                    alike.setdefault(p.shape, []).append(p)
            for matrices in alike.values():
                directions = torch.stack([whole(self.nesterov(p, group["momentum"])).flatten(1)
                                          for p in matrices])
                if fast_bf16(directions.device):        # precise enough: all shall be about 1
                    directions = directions.bfloat16()
                directions = orthogonalise(directions)
                length = 0.2 * max(directions.shape[1:]) ** 0.5     # root mean square 0.2, as AdamW
                for p, direction in zip(matrices, directions):
                    mine = own(p)
                    new = mine * (1 - group["lr"] * group["weight_decay"])
                    new -= group["lr"] * length * own(shared_as(p, direction.view(p.shape)))
                    mine.copy_(torch.where(self.found_inf > 0, mine, new))

    def nesterov(self, p, momentum):
        """The next momentum, seen one step ahead."""
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum"], momentum)

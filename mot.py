"""Mixture-of-Transformers (MoT): the blocks' weights untied by modality, attention still global.

A dense transformer with one change: each norm, projection and feed-forward has one copy per
modality, and a position uses the copy of its own. Keys and values of all modalities meet in one
attention. Twice the block parameters for two modalities, exactly the FLOPs of the dense model.

Paper: Liang et al. 2024, "Mixture-of-Transformers" (arXiv 2411.04996), Algorithm 1.
As in the paper: all non-embedding weights untied (what turns ids, codes, patches and times into
vectors, and back, stays the host's), deterministic routing by modality, one global softmax
attention; and both of its settings, Chameleon (discrete) and Transfusion (continuous).
Otherwise: norms stand where the host has them, before attention and FFN; in Algorithm 1, behind.
Left out: fused kernels. A modality is known, so there is no router, balancing loss or capacity.
The order by modality is made once a batch, and positions stay sorted from block to block, so that
each copy multiplies one contiguous block; only attention sees them in sequence order.

    python mot.py                               one real batch, taken apart: seconds, no training
    python train.py mot                         train it inside Transfusion: minutes on a laptop
    python train.py mot --setting chameleon     train it inside Chameleon

Symbols: B rows, T positions, S new positions beside a cache, N = B * S positions sorted by
modality, D width, H heads, h head width. Masks: True = may attend.
"""

import copy
import re

import torch
import torch.nn as nn

from chameleon import Chameleon
from transfusion import Transfusion, TransfusionConfig, attend, rotate

# --- the idea ------------------------------------------------------------------------------------


class Untied(nn.Module):
    """A module with one copy per tower. Positions arrive sorted by modality; each block of them
    goes through the copy of its modality, so no position ever meets another modality's weights.
    """

    def __init__(self, module, towers):
        """towers: by modality, its copy's number; in (0, 1, 2, 2) audio and video share one."""
        super().__init__()
        self.towers = towers
        self.copies = nn.ModuleList(copy.deepcopy(module) for _ in range(max(towers) + 1))

    def forward(self, x, sizes):
        """x (N, ...) sorted by modality; sizes, by modality, how many of the N are its own."""
        blocks = zip(self.towers, x.split(sizes))
        parts = [self.copies[tower](block) for tower, block in blocks if len(block)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class Permute(torch.autograd.Function):
    """x[order] for a permutation. Its gradient is grad[inverse]; indexing would scatter and add."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        order, inverse = ctx.saved_tensors
        return grad[inverse], None, None


# --- layers: those of the host, untied -----------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, dense, towers):
        super().__init__()
        self.heads = dense.heads
        self.qkv = Untied(dense.qkv, towers)
        self.has_norms = hasattr(dense, "q_norm")       # Chameleon has, Transfusion has not
        if self.has_norms:
            self.q_norm, self.k_norm = Untied(dense.q_norm, towers), Untied(dense.k_norm, towers)
        self.out = Untied(dense.out, towers)

    def forward(self, x, batch, rope, mask, cache=None):                # Algorithm 1, lines 5-10
        (N, D), (B, S), sizes = x.shape, batch.tokens.shape, batch.sizes
        q, k, v = self.qkv(x, sizes).view(N, 3, self.heads, D // self.heads).unbind(1)  # line 5
        if self.has_norms:
            q, k = self.q_norm(q, sizes), self.k_norm(k, sizes)                     # (N, H, h)
        q, k, v = (Permute.apply(y, batch.inverse, batch.order).view(B, S, self.heads, -1)
                   for y in (q, k, v))                          # line 7: back in sequence order
        q, k = rotate(q, rope), rotate(k, rope)                                     # (B, S, H, h)
        if cache is not None:
            k, v = cache.append(self, k, v)
        x = attend(q, k, v, mask).flatten(0, 1)                 # line 8: one attention over all
        return self.out(Permute.apply(x, batch.order, batch.inverse), sizes)        # line 10


class Block(nn.Module):
    """A dense block of the host, its parts untied; `untie` names which: norm, attention, ffn (the
    norms of q and k go with attention)."""

    def __init__(self, dense, towers, untie):
        super().__init__()
        def of(part):       # a part that stays tied is one copy that every modality uses
            return towers if part in untie else (0,) * len(towers)
        self.attention_norm = Untied(dense.attention_norm, of("norm"))
        self.attention = Attention(dense.attention, of("attention"))
        self.ffn_norm = Untied(dense.ffn_norm, of("norm"))
        self.ffn = Untied(dense.ffn, of("ffn"))

    def forward(self, x, batch, rope, mask, cache=None):                            # x (N, D)
        x = x + self.attention(self.attention_norm(x, batch.sizes), batch, rope, mask, cache)
        return x + self.ffn(self.ffn_norm(x, batch.sizes), batch.sizes)


# --- model: a host with its blocks untied --------------------------------------------------------

class MixtureOfTransformers:
    """Mixed into a host, replaces its blocks; embeddings, losses and generation stay the host's.

    The copies start alike, so that MoT begins as the very function that the dense host begins as.
    """

    def __init__(self, config, layout, towers=(0, 1, 2, 3), untie=("norm", "attention", "ffn")):
        super().__init__(config, layout)
        present = [kind for kind in range(4) if kind == 0 or layout.shapes[kind]]
        numbers = sorted({towers[kind] for kind in present})    # only the towers that are used
        towers = [numbers.index(tower) if tower in numbers else 0 for tower in towers]
        self.blocks = nn.ModuleList(Block(dense, towers, untie) for dense in self.blocks)
        self.norm = Untied(self.norm, towers if "norm" in untie else [0] * 4)

    def backbone(self, x, batch, rope, mask, cache=None):
        shape = x.shape
        x = Permute.apply(x.flatten(0, 1), batch.order, batch.inverse)              # (N, D), sorted
        for block in self.blocks:
            x = block(x, batch, rope, mask, cache)
        return Permute.apply(self.norm(x, batch.sizes), batch.inverse, batch.order).view(shape)

    def copy_from_dense(self, dense):
        """Every tower becomes a copy of the dense model, so this equals it (LMFusion's start)."""
        weights = dense.state_dict()
        self.load_state_dict({name: weights[re.sub(r"\.copies\.\d+", "", name)]
                              for name in self.state_dict()})


class MoTTransfusion(MixtureOfTransformers, Transfusion):
    """MoT in the Transfusion setting (Sec. 3.4)."""


class MoTChameleon(MixtureOfTransformers, Chameleon):
    """MoT in the Chameleon setting (Sec. 3.2)."""


def main():
    """Take one real batch apart, untrained, beside its dense host."""
    from show import demo, flops_per_position, parameters_by_part, tour
    batch, layout = demo("kl")
    torch.manual_seed(0)
    tour(MoTTransfusion(TransfusionConfig(), layout), batch)
    dense = Transfusion(TransfusionConfig(), layout)
    print(f"the dense host has {parameters_by_part(dense)['in all']:,} parameters, and "
          f"{flops_per_position(dense, batch):,.0f} FLOPs per position")


if __name__ == "__main__":
    main()

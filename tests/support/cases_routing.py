"""Cases in which rows and tokens move about: sorted, selected, duplicated, scattered, sampled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases import Lambda, case

Made = tuple[nn.Module, Any]


@case(2, "tokens sorted by a learned score")
def sorted_tokens() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        score = m.score(x).squeeze(-1)
        order = score.argsort(1)[..., None].expand_as(x)
        h = m.a(torch.gather(x, 1, order) * score[..., None].sigmoid())
        return m.out(h[:, 0] + h[:, -1])

    return Lambda(forward, score=nn.Linear(3, 1), a=nn.Linear(3, 4), out=nn.Linear(4, 2)), torch.randn(4, 5, 3)


@case(2, "examples sorted by length and put back")
def sorted_examples() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        order = x.sum(1).argsort()
        return m.out(m.a(x[order]).relu())[order.argsort()]

    return Lambda(forward, a=nn.Linear(3, 4), out=nn.Linear(4, 2)), torch.randn(5, 3)


@case(2, "only some tokens go through a layer", functional=False)
def selected_tokens() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        kept = x[..., 0] > 0
        h = x.new_zeros(*x.shape[:2], 4).masked_scatter(kept[..., None], m.a(x[kept]).tanh())
        return m.out(h.sum(1))

    return Lambda(forward, a=nn.Linear(3, 4), out=nn.Linear(4, 2)), torch.randn(4, 5, 3)


@case(2, "examples of two kinds go through different layers", functional=False)
def branches() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        first = x.sum(1) > 0
        h = x.new_zeros(len(x), 4)
        h[first], h[~first] = m.a(x[first]), m.b(x[~first])
        return m.out(h.relu())

    return Lambda(forward, a=nn.Linear(3, 4), b=nn.Linear(3, 4), out=nn.Linear(4, 2)), torch.randn(6, 3)


@case(2, "each example goes in as it is and mirrored, one after the other in the batch")
def mirrored() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(torch.cat([m.a(x), m.a(-x)]).relu()).view(2, len(x), 2).sum(0)

    return Lambda(forward, a=nn.Linear(3, 4), out=nn.Linear(4, 2)), torch.randn(4, 3)


@case(2, "an image is sampled where a network says")
def spatial_transformer() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        grid = F.affine_grid(m.where(x.flatten(1)).view(-1, 2, 3), list(x.shape), align_corners=False)
        return m.out(F.grid_sample(m.conv(x), grid, align_corners=False).mean((2, 3)))

    net = Lambda(forward, where=nn.Linear(32, 6), conv=nn.Conv2d(2, 3, 3, padding=1), out=nn.Linear(3, 2))
    return net, torch.randn(3, 2, 4, 4)


@case(2, "patches by unfold, put back by fold")
def unfold_and_fold() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        patches = m.a(F.unfold(x, 2).transpose(1, 2)).transpose(1, 2)
        return m.out(F.fold(patches, (4, 4), 2).flatten(1))

    return Lambda(forward, a=nn.Linear(8, 8), out=nn.Linear(32, 2)), torch.randn(3, 2, 4, 4)


@case(2, "pixels shuffled into space, enlarged, pooled by maximum")
def pixel_shuffle() -> Made:
    layers = [nn.Conv2d(2, 8, 3), nn.PixelShuffle(2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(2, 2, 1)]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten()), torch.randn(3, 2, 5, 5)


@case(2, "a table of parameters looked up by two indices, and by gather")
def looked_up() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        gathered = m.flat.expand(len(x), -1, -1).gather(1, x[..., None].expand(-1, -1, 2)).sum(1)
        return m.table[x[:, 0], x[:, 1]] + m.table[x[:, 1]].mean(1) + gathered

    net = Lambda(forward, table=torch.randn(4, 4, 2), flat=torch.randn(1, 4, 2))
    return net, torch.randint(0, 4, (5, 2))


@case(2, "parameters written into places that the data choose")
def written() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        column = x.argmax(1)
        h = x.new_zeros(len(x), 5).index_put((torch.arange(len(x), device=x.device), column), m.value[column])
        return m.out(h)

    return Lambda(forward, value=torch.randn(4), out=nn.Linear(5, 2)), torch.randn(5, 4)


@case(2, "projected, two layers, both directions, learned first states", functional=False)
def lstm_everything() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        first = tuple(s.expand(-1, len(x), -1).contiguous() for s in (m.h, m.c))
        return m.out(m.rnn(x.transpose(0, 1), first)[0].mean(0))

    rnn = nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True)
    return Lambda(forward, rnn=rnn, h=torch.randn(4, 1, 2), c=torch.randn(4, 1, 4), out=nn.Linear(4, 2)), torch.randn(
        4, 4, 3
    )


@case(2, "a short-time Fourier transform with a learned window")
def spectrogram() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(torch.stft(m.a(x), 4, 2, window=m.window, return_complex=True).abs().mean(2))

    return Lambda(forward, a=nn.Linear(8, 8), window=torch.rand(4), out=nn.Linear(3, 2)), torch.randn(3, 8)


@case(2, "einsum along a diagonal, a Kronecker product, a matrix exponential")
def matrix_functions() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.einsum("nij,jk,nki->nk", x, m.w, x @ torch.matrix_exp(m.skew - m.skew.T))
        return m.out(y @ torch.kron(m.left, m.right))

    return Lambda(
        forward, w=torch.randn(3, 3), skew=torch.randn(3, 3), left=torch.randn(3, 1), right=torch.randn(1, 4),
        out=nn.Linear(4, 2),
    ), torch.randn(4, 3, 3)  # fmt: skip


@case(2, "where an example stands in the batch decides its layer", refused="other examples")
def by_position() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        even = torch.arange(len(x), device=x.device) % 2 == 0
        return m.out(torch.where(even[:, None], m.b(h), h).tanh())

    return Lambda(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 4), out=nn.Linear(4, 2)), torch.randn(5, 3)

"""Analytic kernels of infinitely wide networks: the NNGP and the NTK at initialisation.

In: a specification of layers (`Serial(Dense(), Relu(), Dense())`, or `from_module(model)`) and inputs [n, ...].
Out: `InfiniteKernel` with nngp and ntk [n1, n2], and `signal_propagation` over depth.
Read `layers` (what a layer is), `covariances` (what passes between layers), `activations`, `compose` and `windows`,
then `kernels` (the evaluation), `quadrature` with `powers` and `kinks` (activations without a closed form),
`latent_channels` and `softmax` (sampled layers), and `convert` with `translate`, `parametrized` and
`attention_detection` (from modules to specifications).
"""

from __future__ import annotations

from ntkwatch.infinite.activations import ABRelu, Abs, Elementwise, Erf, Gelu, LeakyRelu, Relu, Sin
from ntkwatch.infinite.attention import Attention
from ntkwatch.infinite.compose import Residual, Serial, Sum
from ntkwatch.infinite.convert import from_module, initialisation
from ntkwatch.infinite.cost import nominal_seconds
from ntkwatch.infinite.kernels import InfiniteKernel, kernel
from ntkwatch.infinite.layers import Affine, Dense, Identity, Layer, LayerNorm
from ntkwatch.infinite.parametrized import ConversionError
from ntkwatch.infinite.propagation import Propagation, signal_propagation
from ntkwatch.infinite.quadrature import Activation
from ntkwatch.infinite.softmax import SoftmaxAttention
from ntkwatch.infinite.tokens import Position, Token
from ntkwatch.infinite.windows import AvgPool, Conv, Flatten, GlobalAvgPool

__all__ = [
    "ABRelu",
    "Abs",
    "Activation",
    "Affine",
    "Attention",
    "AvgPool",
    "Conv",
    "ConversionError",
    "Dense",
    "Elementwise",
    "Erf",
    "Flatten",
    "Gelu",
    "GlobalAvgPool",
    "Identity",
    "InfiniteKernel",
    "Layer",
    "LayerNorm",
    "LeakyRelu",
    "Position",
    "Propagation",
    "Relu",
    "Residual",
    "Serial",
    "Sin",
    "SoftmaxAttention",
    "Sum",
    "Token",
    "from_module",
    "initialisation",
    "kernel",
    "nominal_seconds",
    "signal_propagation",
]

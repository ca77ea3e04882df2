"""From the mixed streams to keys and values: three ways through the weights, each with its gradients.

All are made with a backend's products, the weights of all streams (a list of 2L tensors), their biases (2L, kv) or None,
and the shared projection or None for weights that hold it. `forward` and `backward` work on a slice of the streams, and
add up the gradients of the projection over those in fp32, whatever the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .folding import augment, fold


class Products(NamedTuple):
    """What a backend brings; torch_backend.py says what they take and give."""

    prepare: Callable[..., Any]
    mix: Callable[..., Any]
    mix_gradients: Callable[..., Any]
    matmul: Callable[..., Any]
    summed_matmul: Callable[..., Any]


class OneStep:
    """Weights (kv, De) that take the streams as they are."""

    grad_proj_weight = grad_proj_bias = None  # there is no projection

    def __init__(self, products, weights, biases):
        self.products, self.weights, self.biases = products, weights, biases

    def forward(self, streams, chunk, out):
        """streams (G, tokens, De) -> keys or values in `out` (G, tokens, kv)."""
        biases = None if self.biases is None else self.biases[chunk]
        self.products.matmul(streams, self.weights[chunk], biases, transpose_b=True, out=out)

    def backward(self, grads, streams, chunk, wants_streams, wants_proj, wants_weights):
        """Gradients of keys or values: (G, tokens, kv) -> those of streams and weights, each (G, ...) or None.

        streams may be None where neither projection nor weights want a gradient.
        """
        grad_streams = self.products.matmul(grads, self.weights[chunk]) if wants_streams else None
        return grad_streams, self.products.matmul(grads, streams, transpose_a=True) if wants_weights else None


class Folded:
    """Weights (kv, Dl), multiplied with the projection (Dl, De) first."""

    def __init__(self, products, weights, biases, proj_weight, proj_bias):
        self.products, self.weights, self.biases = products, weights, biases
        self.augmented, self.encoder_width = augment(proj_weight, proj_bias), proj_weight.shape[1]
        self.grad_augmented = None

    def forward(self, streams, chunk, out):
        """As OneStep.forward."""
        biases = None if self.biases is None else self.biases[chunk]
        weights, biases = fold(self.products, self.weights[chunk], biases, self.augmented, self.encoder_width)
        self.products.matmul(streams, weights, biases, transpose_b=True, out=out)

    def backward(self, grads, streams, chunk, wants_streams, wants_proj, wants_weights):
        """As OneStep.backward."""
        grad_streams = grad_weights = None
        if wants_streams:
            folded, _ = fold(self.products, self.weights[chunk], None, self.augmented, self.encoder_width)
            grad_streams = self.products.matmul(grads, folded)
        if wants_proj or wants_weights:
            grad_folded = self._folded_gradient(grads, streams)
        if wants_weights:
            grad_weights = self.products.matmul(grad_folded, self.augmented, transpose_b=True)
        if wants_proj:
            if self.grad_augmented is None:
                self.grad_augmented = torch.zeros_like(self.augmented, dtype=torch.float32)
            self.products.summed_matmul(self.weights[chunk], grad_folded, self.grad_augmented)
        return grad_streams, grad_weights

    def _folded_gradient(self, grads, streams):
        shape = len(grads), grads.shape[2], self.augmented.shape[1]
        grad_folded = streams.new_zeros(shape) if shape[2] > self.encoder_width else streams.new_empty(shape)
        weights = grad_folded[..., : self.encoder_width]
        self.products.matmul(grads, streams, transpose_a=True, out=weights)
        if shape[2] > self.encoder_width:
            grad_folded[..., self.encoder_width] = grads.sum(1)
        return grad_folded

    @property
    def grad_proj_weight(self):
        return self.grad_augmented[:, : self.encoder_width]

    @property
    def grad_proj_bias(self):
        return self.grad_augmented[:, self.encoder_width]


class TwoSteps:
    """Weights (kv, Dl) after the projection (Dl, De) of every token."""

    def __init__(self, products, weights, biases, proj_weight, proj_bias):
        self.after = OneStep(products, weights, biases)
        self.products, self.proj_weight, self.proj_bias = products, proj_weight, proj_bias
        self.grad_proj_weight = self.grad_proj_bias = None

    def forward(self, streams, chunk, out):
        """As OneStep.forward."""
        self.after.forward(self._projected(streams), chunk, out)

    def backward(self, grads, streams, chunk, wants_streams, wants_proj, wants_weights):
        """As OneStep.backward."""
        projected = self._projected(streams) if wants_weights else None
        grad_projected, grad_weights = self.after.backward(
            grads, projected, chunk, wants_streams or wants_proj, False, wants_weights
        )
        if wants_proj:
            if self.grad_proj_weight is None:
                self.grad_proj_weight = torch.zeros_like(self.proj_weight, dtype=torch.float32)
                self.grad_proj_bias = torch.zeros_like(self.proj_weight[:, 0], dtype=torch.float32)
            self.products.summed_matmul(grad_projected, streams, self.grad_proj_weight)
            self.grad_proj_bias += grad_projected.sum((0, 1), dtype=torch.float32)
        return self.products.matmul(grad_projected, self.proj_weight) if wants_streams else None, grad_weights

    def _projected(self, streams):
        return self.products.matmul(streams, self.proj_weight, self.proj_bias, transpose_b=True)

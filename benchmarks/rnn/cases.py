"""The cases of the RNN on the CPU: sizes, masks, and goals against torch.nn.RNN with the same masked weights."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RnnCase:
    """One contest in float32.

    Masks are drawn at random, since on the CPU it matters how many weights are kept and not where.
    """

    name: str
    n: int
    batch: int
    steps: int
    inputs: int
    layers: int
    nonlinearity: str
    density: float | None  # the share of W_hh that is kept; None without a mask
    mask_inputs: bool = False  # whether W_ih is masked too
    training: bool = True  # forward and backward, or forward alone
    goal: float | None = None  # so many times faster than torch.nn.RNN; None: never slower than NEVER_UNDER

    def rnn(self) -> nn.RNN:
        """Makes torch.nn.RNN with its masked weights at 0."""
        torch.manual_seed(0)
        rnn = nn.RNN(self.inputs, self.n, self.layers, nonlinearity=self.nonlinearity)
        with torch.no_grad():
            for name, mask in self.masks().items():
                getattr(rnn, name).masked_fill_(~mask, 0)
        return rnn

    def masks(self) -> dict[str, Tensor]:
        """Draws the masks by name, True = kept."""
        if self.density is None:
            return {}
        generator = torch.Generator().manual_seed(1)
        kinds = ("weight_hh_l", "weight_ih_l") if self.mask_inputs else ("weight_hh_l",)
        found = {}
        for kind in kinds:
            for layer in range(self.layers):
                columns = self.n if kind == "weight_hh_l" or layer else self.inputs
                found[f"{kind}{layer}"] = torch.rand(self.n, columns, generator=generator) < self.density
        return found

    def data(self) -> tuple[Tensor, Tensor]:
        """Draws the input (T, B, I) and the gradient of the output (T, B, n)."""
        generator = torch.Generator().manual_seed(2)
        shape = (self.steps, self.batch)
        return torch.randn(*shape, self.inputs, generator=generator), torch.randn(*shape, self.n, generator=generator)

    def rounds(self, quick: bool) -> int:
        """Returns how many rounds the case takes."""
        work = self.n**2 * self.batch * self.steps * self.layers
        return 3 if quick or work > 1e11 else 9 if work > 1e9 else 51

    def smaller(self) -> RnnCase:
        """Returns the same case at a size that shows in seconds whether everything works."""
        return dataclasses.replace(self, n=max(33, self.n // 16), steps=5, inputs=min(self.inputs, 40))


def _both(name: str, n: int, batch: int, densities: dict[float | None, float | None], steps: int = 50, inputs: int = 2,
          layers: int = 1, nonlinearity: str = "relu", modes: tuple[bool, ...] = (True, False),
          mask_inputs: bool = False) -> list[RnnCase]:
    return [RnnCase(f"{name}-{'dense' if d is None else f'{100 - 100 * d:g}'}{'' if training else '-forward'}", n,
                    batch, steps, inputs, layers, nonlinearity, d, mask_inputs, training, goal)
            for d, goal in densities.items() for training in modes]


CASES: tuple[RnnCase, ...] = (
    *_both("rnn-4096-b200", 4096, 200, {0.1: 8.0, 0.02: 25.0}),
    *_both("rnn-650-3-layers-b20", 650, 20, {0.1: 3.0, 0.02: 8.0}, 35, 650, 3, "tanh", (True,), True),
    *_both("rnn-128-b32", 128, 32, {None: 1.5, 0.05: 8.0}, modes=(True,)),
    *_both("rnn-4096-b1", 4096, 1, {0.02: 15.0}, modes=(False,)),
    # On this grid "auto" is never to lose.
    *(case for n, batch in ((128, 1), (128, 200), (512, 1), (512, 32), (1024, 1), (1024, 64))
      for case in _both(f"rnn-{n}-b{batch}", n, batch, {None: None, 0.5: None, 0.2: None, 0.05: None}, 20)),
)
NEVER_UNDER = 0.95  # times as fast as torch.nn.RNN
ACCURACY = 1e-5  # relative error, in norm, of output and gradients against torch.nn.RNN in float64
VERIFIED_STEPS = 3  # the accuracy is measured over so many steps

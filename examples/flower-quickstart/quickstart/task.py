"""The network, the data and the training loop: plain PyTorch."""

from functools import cache

import torch
from torch import Tensor, nn

from gradleak import data


class Net(nn.Module):
    """One hidden layer of 64 ReLU units; takes images in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(28 * 28, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(images.flatten(1)).relu())


def initial_net(seed: int = 0) -> Net:
    """The network before the first round."""
    torch.manual_seed(seed)
    return Net()


@cache
def _dataset() -> data.Dataset:
    return data.load("mnist-5k")


def load_partition(number: int, *, examples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and labels of one client: its share of the private half of `mnist-5k`."""
    dataset = _dataset()
    private = data.split(dataset, seed).clients
    batch = dataset.batch(private[number * examples : (number + 1) * examples])
    return batch.inputs, batch.labels


def train(net: nn.Module, images: Tensor, labels: Tensor, *, learning_rate: float) -> float:
    """One step of gradient descent on all examples of the client."""
    net.train()
    optimiser = torch.optim.SGD(net.parameters(), lr=learning_rate)
    optimiser.zero_grad()
    loss = nn.functional.cross_entropy(net(images), labels)
    loss.backward()
    optimiser.step()
    return loss.item()


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose class is right."""
    net.eval()
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())

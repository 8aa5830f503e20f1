"""The network, the data and the training loop: plain PyTorch."""

import torch
from torch import Tensor, nn

from gradleak import data


class Net(nn.Module):
    """Three small convolutions and a linear layer; takes images in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2),
            nn.Sigmoid(),
        )
        self.head = nn.Linear(12 * 7 * 7, 10)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


def initial_net(seed: int = 0) -> Net:
    """The network before the first round."""
    torch.manual_seed(seed)
    return Net()


def load_partition(number: int, *, examples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and labels of one client: its share of the private half of `mnist-5k`."""
    dataset = data.load("mnist-5k")
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

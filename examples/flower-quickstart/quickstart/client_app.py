"""The client of the app."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from gradleak.federate import protect
from quickstart.task import Net, accuracy, load_partition, train

# The one line of the client: what it sends is clipped and noised.
app = ClientApp(mods=[protect("clip:norm=1+gaussian-noise:std=0.001")])


def _partition(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _data(context: Context):
    config = context.run_config
    return load_partition(
        _partition(context), examples=int(config["examples"]), seed=int(config["seed"])
    )


def _net(message: Message) -> Net:
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return net


@app.train()
def train_round(message: Message, context: Context) -> Message:
    net, (images, labels) = _net(message), _data(context)
    rate = float(context.run_config["learning-rate"])
    loss = train(net, images, labels, learning_rate=rate)
    metrics = {"num-examples": len(labels), "loss": loss, "partition-id": _partition(context)}
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate_round(message: Message, context: Context) -> Message:
    net, (images, labels) = _net(message), _data(context)
    metrics = {"num-examples": len(labels), "accuracy": accuracy(net, images, labels)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

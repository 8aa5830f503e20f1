"""The server of the app."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from gradleak.federate import record
from quickstart.task import initial_net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    nodes = len(list(grid.get_node_ids()))
    strategy = FedAvg(min_train_nodes=nodes, min_evaluate_nodes=nodes, min_available_nodes=nodes)
    # The one line of the server: it keeps what a curious server would.
    strategy = record(str(config["recording"])).at_server(strategy)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(initial_net(int(config["seed"])).state_dict()),
        num_rounds=int(config["num-server-rounds"]),
    )

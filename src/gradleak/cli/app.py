"""Commands and options of `gradleak`.

Exit status: 0 done, 1 a --fail-on condition holds or an inspected network looks crafted,
2 invalid request, 3 trials failed to run, an attack beat what is proved or training cannot go on,
130 interrupted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from gradleak.errors import GradleakError, InvalidInput, nearest

DONE, CONDITION_HOLDS, INVALID, FAILED, INTERRUPTED = 0, 1, 2, 3, 130

app = typer.Typer(
    name="gradleak",
    help="Measure what a federated-learning server can reconstruct from client updates.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

prior_app = typer.Typer(
    help="Train priors that are networks, from public data, or list priors.",
    rich_markup_mode=None,
)
app.add_typer(prior_app, name="prior")

# typer may carry a click of its own: its errors are known by their public child.
_UsageError: type[Exception] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)

_COMMANDS = ("audit", "attack", "inspect", "list", "prior", "report", "reproduce", "train")

_SCENARIO, _ATTACKER, _EFFORT, _OUTPUT = "What is audited", "Who attacks", "Effort", "Output"
_TRAINED = "What is trained"
NETWORKS = ("autoencoder", "gan", "diffusion")
"""Priors that `prior train` trains; written down, for importing them takes seconds."""


def _option(text: str, panel: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar)


Data = Annotated[
    str | None, _option("data set: a name, a folder, an .npz or hf:NAME [mnist-5k]", _SCENARIO)
]
DataDir = Annotated[
    str | None, _option("where data sets lie [$GRADLEAK_DATA, else the user cache]", _SCENARIO)
]
Model = Annotated[
    str | None, _option("network: a name or module:factory [lenet, or unet]", _SCENARIO)
]
Weights = Annotated[
    str | None,
    _option("broadcast state: a safetensors file, or for unet a trained prior", _SCENARIO),
]
Stage = Annotated[
    list[str] | None,
    _option("init, early, trained or a number of steps; repeatable [init]", _SCENARIO),
]
MechanismName = Annotated[
    str | None,
    _option("fedsgd, fedavg, denoising, denoising-fedavg, vertical:... [fedsgd]", _SCENARIO),
]
LocalSteps = Annotated[
    int | None, _option("local steps of fedavg or denoising-fedavg [3]", _SCENARIO)
]
LocalRate = Annotated[float | None, _option("local learning rate of fedavg [0.01]", _SCENARIO)]
BatchNorm = Annotated[
    str | None, _option("statistics the client normalises by: eval or train [eval]", _SCENARIO)
]
BatchSizes = Annotated[
    list[int] | None, _option("examples per client; repeatable [1]", _SCENARIO, "--batch-size")
]
BatchSize = Annotated[int | None, _option("examples per client [1]", _SCENARIO)]
Attacks = Annotated[
    list[str] | None,
    _option(
        "ID:field=value,...; repeatable [dlg, inverting-gradients; by --knows for denoising]",
        _ATTACKER,
        "--attack",
    ),
]
Defenses = Annotated[
    list[str] | None,
    _option(
        "ID:field=value,...; repeatable, `none` is always included "
        "[two kinds of noise, top-k, clip]",
        _SCENARIO,
        "--defense",
    ),
]
DefenseName = Annotated[str | None, _option("ID:field=value,... [none]", _SCENARIO)]
Knows = Annotated[
    list[str] | None,
    _option("more facts granted, no-FACT takes one away [batch_size,mechanism]", _ATTACKER),
]
Unaware = Annotated[
    bool | None,
    _option("attack every protection once more as if there were none", _ATTACKER, "--unaware"),
]
Prior = Annotated[
    str | None,
    _option(
        "ID:field=value,... fitted to public data, or a trained prior: a name or a safetensors "
        "file; with --knows prior [gaussian]",
        _ATTACKER,
    ),
]
BnKnowledge = Annotated[
    str | None,
    _option(
        "of batch normalisation: exact, running (estimates as a proxy), inferred (the mode alone) "
        "or none [inferred]",
        _ATTACKER,
    ),
]
Server = Annotated[str | None, _option("honest or malicious [honest]", _ATTACKER)]
View = Annotated[
    str | None, _option("client, or aggregate: secure sums alone are seen [client]", _ATTACKER)
]
ClientsInSum = Annotated[
    list[int] | None,
    _option(
        "clients whose updates are summed, with --view aggregate; repeatable [1, 2, 4, 8]",
        _ATTACKER,
        "--clients-in-sum",
    ),
]
Colluding = Annotated[
    int | None, _option("clients of every sum who tell the server their updates [0]", _ATTACKER)
]
Targets = Annotated[int | None, _option("updates attacked per finding [by budget]", _EFFORT)]
Clients = Annotated[int | None, _option("clients that the targets come from [one each]", _EFFORT)]
Seed = Annotated[int | None, _option("every random draw derives from it [0]", _EFFORT)]
Budget = Annotated[str | None, _option("quick, standard or thorough [quick]", _EFFORT)]
Device = Annotated[str | None, _option("auto, cpu or cuda [auto]", _EFFORT)]
Samples = Annotated[
    int | None, _option("pictures drawn to score a generator, 0 for no score [256]", _EFFORT)
]
Workers = Annotated[
    int | None, _option("worker processes; 0 uses this process [one per core]", _EFFORT)
]
Ceiling = Annotated[
    bool | None,
    _option("begin every attack at the truth as well, as an auditor can", _EFFORT, "--ceiling"),
]
Bounds = Annotated[
    bool | None,
    _option("also foretell every target's error without an attack", _EFFORT, "--bounds"),
]
Memory = Annotated[
    float | None, _option("GB that all workers together may use [what is free]", _EFFORT)
]
Recorded = Annotated[
    str | None, _option("directory of `gradleak.federate.record` to attack", "Recorded updates")
]
Truth = Annotated[
    str | None,
    _option(
        "what its clients trained on, as safetensors: to score; with --data", "Recorded updates"
    ),
]
DataSpecFile = Annotated[
    str | None, _option("TOML: shape, classes, bounds of the data", "Recorded updates")
]
Ray = Annotated[
    str | None,
    _option("run trials on a Ray cluster: HOST:PORT, auto, or local to start one", _EFFORT),
]
Out = Annotated[
    str | None, _option("directory of the report; the same one resumes", _OUTPUT, metavar="DIR")
]
Cost = Annotated[
    list[str] | None,
    _option(
        "directory of `gradleak train`, for what protections cost; repeatable",
        _OUTPUT,
        metavar="DIR",
    ),
]
FailOn = Annotated[
    list[str] | None,
    _option("exit with status 1 if [DEFENSE:]METRIC>NUMBER holds; repeatable", _OUTPUT),
]
Quiet = Annotated[bool, _option("no progress on stderr", _OUTPUT, "--quiet")]
Config = Annotated[
    str | None, _option("TOML file of these options; the command line wins", _OUTPUT)
]


@app.callback(invoke_without_command=True)
def gradleak(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Measure what a federated-learning server can reconstruct from client updates."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"gradleak {installed('gradleak')}")
        raise typer.Exit


@app.command()
def audit(
    data: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    weights: Weights = None,
    stage: Stage = None,
    mechanism: MechanismName = None,
    local_steps: LocalSteps = None,
    local_learning_rate: LocalRate = None,
    batch_norm: BatchNorm = None,
    batch_size: BatchSizes = None,
    attack: Attacks = None,
    defense: Defenses = None,
    knows: Knows = None,
    unaware: Unaware = None,
    prior: Prior = None,
    bn_knowledge: BnKnowledge = None,
    server: Server = None,
    view: View = None,
    clients_in_sum: ClientsInSum = None,
    colluding: Colluding = None,
    targets: Targets = None,
    clients: Clients = None,
    seed: Seed = None,
    budget: Budget = None,
    ceiling: Ceiling = None,
    bounds: Bounds = None,
    device: Device = None,
    workers: Workers = None,
    memory: Memory = None,
    ray: Ray = None,
    out: Out = None,
    cost: Cost = None,
    fail_on: FailOn = None,
    recorded: Recorded = None,
    truth: Truth = None,
    data_spec: DataSpecFile = None,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Attack simulated or recorded clients' updates, and report what leaks."""
    given = _given(locals())
    from gradleak.run.settings import read_config

    if config is not None:
        in_file = {k.replace("-", "_"): v for k, v in read_config(Path(config)).items()}
        given = in_file | given
    _audit(given)


@app.command("attack")
def attack_command(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="ID:field=value,...")],
    data: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    weights: Weights = None,
    stage: Annotated[str | None, _option("training stage [init]", _SCENARIO)] = None,
    mechanism: MechanismName = None,
    local_steps: LocalSteps = None,
    local_learning_rate: LocalRate = None,
    batch_norm: BatchNorm = None,
    batch_size: BatchSize = None,
    defense: DefenseName = None,
    knows: Knows = None,
    prior: Prior = None,
    bn_knowledge: BnKnowledge = None,
    server: Server = None,
    targets: Annotated[int | None, _option("updates attacked [1]", _EFFORT)] = None,
    seed: Seed = None,
    budget: Budget = None,
    device: Device = None,
    workers: Workers = None,
    memory: Memory = None,
    ray: Ray = None,
    out: Out = None,
    update: Annotated[
        str | None, _option("a recorded update, a safetensors file", "Recorded update")
    ] = None,
    state: Annotated[
        str | None, _option("the state it answers, a safetensors file", "Recorded update")
    ] = None,
    data_spec: Annotated[
        str | None,
        _option("TOML: shape, classes, bounds of the data", "Recorded update"),
    ] = None,
    labels: Annotated[
        str | None, _option("the batch's labels, if known, e.g. 3,5", "Recorded update")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run one attack on a simulated client, or on an update somebody recorded."""
    given = _given(locals())
    recorded = {"update", "state", "data_spec", "labels"} & given.keys()
    if recorded:
        _attack_recorded(identifier, given)
        return
    del given["identifier"]
    _audit({"targets": 1, "defense": ["none"], "out": "gradleak-attack"} | given, one=identifier)


@app.command("reproduce")
def reproduce_command(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="see list reproductions")],
    budget: Annotated[str, _option("quick or full [quick]", _EFFORT)] = "quick",
    seed: Annotated[int, _option("every random draw derives from it [0]", _EFFORT)] = 0,
    workers: Workers = None,
    data_dir: DataDir = None,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Compute a published table again and set our figures beside the paper's."""
    from gradleak.auditing import Unwatched
    from gradleak.cli.progress import Bar
    from gradleak.cli.tables import print_reproduced
    from gradleak.reproductions import REPRODUCTIONS
    from gradleak.reproductions.reproduction import Request
    from gradleak.reproductions.running import reproduce

    if identifier not in REPRODUCTIONS:
        raise InvalidInput(
            f"unknown reproduction {identifier!r}: {nearest(identifier, REPRODUCTIONS)}"
        )
    bar = contextlib.nullcontext(Unwatched()) if quiet else Bar()
    with bar as watcher:
        outcome = reproduce(
            REPRODUCTIONS[identifier](),
            Request(budget=budget, seed=seed, data_dir=data_dir),  # type: ignore[arg-type]
            out=Path(out) if out is not None else None,
            workers=workers,
            watcher=watcher,
        )
    print_reproduced(outcome)


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a name or module:factory")],
    data: Data = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    planted: Annotated[
        str | None,
        _option("craft it first as the server of this attack would, ID:field=value,...", _ATTACKER),
    ] = None,
    seed: Annotated[int, _option("of the weights, unless they are given [0]", _EFFORT)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Look for a malicious server's traps in a network, and foretell what one gradient tells.

    Exit status 1 where something looks crafted. Ranks say, layer by layer, whether one example's
    gradient determines its picture.
    """
    from gradleak.cli.inspecting import print_inspection

    if print_inspection(
        model,
        data=data or "mnist-5k",
        data_dir=data_dir,
        weights=weights,
        planted=planted,
        seed=seed,
        as_json=as_json,
    ):
        raise typer.Exit(CONDITION_HOLDS)


@app.command("train")
def train_command(
    data: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    mechanism: Annotated[
        str | None,
        _option(
            "fedsgd, or fedavg:epochs=1,minibatch_size=32,...; denoising or denoising-fedavg:... "
            "where --model is a denoiser [fedsgd]",
            _TRAINED,
        ),
    ] = None,
    weights: Annotated[
        str | None, _option("safetensors file to begin with [drawn by the seed]", _TRAINED)
    ] = None,
    defense: Annotated[
        str | None, _option("protections of every client, ID:field=value,... [none]", _TRAINED)
    ] = None,
    aggregation: Annotated[
        str | None,
        _option("protocol that shows the server a sum only, ID:field=value,... [none]", _TRAINED),
    ] = None,
    aggregation_clip: Annotated[
        float | None, _option("larger numbers are cut to it there [8]", _TRAINED)
    ] = None,
    aggregation_bits: Annotated[
        int | None, _option("of a number there, sign included [24]", _TRAINED)
    ] = None,
    clients: Annotated[int | None, _option("how many share the data [10]", _TRAINED)] = None,
    rounds: Annotated[int | None, _option("of training [100]", _TRAINED)] = None,
    batch_size: Annotated[
        int | None, _option("examples of a client and round, 0 for all it has [32]", _TRAINED)
    ] = None,
    fraction: Annotated[
        float | None, _option("share of the clients asked in a round [1]", _TRAINED)
    ] = None,
    min_clients: Annotated[
        int | None, _option("usable updates without which training stops [1]", _TRAINED)
    ] = None,
    partition: Annotated[
        str | None, _option("of the data: iid or dirichlet:ALPHA [iid]", _TRAINED)
    ] = None,
    learning_rate: Annotated[
        float | None, _option("the server's, on gradients [0.1]", _TRAINED)
    ] = None,
    schedule: Annotated[
        str | None,
        _option("constant, step:every=N,factor=X or cosine:floor=X [constant]", _TRAINED),
    ] = None,
    topology: Annotated[
        str | None,
        _option("star, or gossip:graph=ring|regular|complete,degree=N [star]", _TRAINED),
    ] = None,
    test_examples: Annotated[
        int | None, _option("public examples that every round is tested on [1000]", _EFFORT)
    ] = None,
    samples: Annotated[
        int | None,
        _option("images a denoiser draws in the end, compared with public ones [256]", _EFFORT),
    ] = None,
    timeout: Annotated[
        float | None, _option("seconds that a round waits for its clients [3600]", _EFFORT)
    ] = None,
    seed: Seed = None,
    engine: Annotated[
        str, _option("in-process, or flower: its simulation on Ray [in-process]", _EFFORT)
    ] = "in-process",
    record: Annotated[
        str | None, _option("keep here what the server sees, for audit --recorded", _OUTPUT)
    ] = None,
    out: Annotated[
        str, _option("directory; the same one resumes", _OUTPUT, metavar="DIR")
    ] = "gradleak-training",
    quiet: Quiet = False,
) -> None:
    """Train federated clients under a protection: accuracy or loss, time and bytes of a round."""
    given = _given(locals())
    for name in ("engine", "record", "out", "quiet"):
        given.pop(name, None)
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
        os.environ.setdefault(name, "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    if importlib.util.find_spec("flwr") is None:
        raise InvalidInput("train needs Flower: pip install 'gradleak[federate]'")
    from gradleak.cli.progress import Bar
    from gradleak.cli.tables import print_training
    from gradleak.federate.settings import TrainSettings
    from gradleak.federate.training import train

    bar = contextlib.nullcontext() if quiet else Bar(verb="training", unit="rounds")
    with bar as watcher:
        trained = train(
            TrainSettings.of(given),
            out=Path(out),
            engine=engine,
            record_to=None if record is None else Path(record),
            watcher=watcher,
        )
    print_training(trained, Path(out))


@prior_app.command("train")
def prior_train(
    identifier: Annotated[
        str, typer.Argument(metavar="ID", help=f"{', '.join(NETWORKS)}; ID:field=value,...")
    ],
    data: Data = None,
    data_dir: DataDir = None,
    seed: Annotated[
        int,
        _option(
            "of the audits it is for: it divides the data and starts the training [0]", _EFFORT
        ),
    ] = 0,
    out: Annotated[
        str | None,
        _option("safetensors file; a card and samples are written beside it [ID-DATA]", _OUTPUT),
    ] = None,
    device: Device = None,
    samples: Samples = None,
    quiet: Quiet = False,
) -> None:
    """Train a prior on the public half of a data set; the same command resumes."""
    from gradleak.cli.progress import Bar
    from gradleak.run.prior_training import SAMPLES, train_prior

    name = data or "mnist-5k"
    stem = f"{identifier.partition(':')[0]}-{Path(name.partition(':')[0]).stem}.safetensors"
    target = Path(out or stem)
    bar = contextlib.nullcontext() if quiet else Bar(verb="training", unit="steps")
    with bar as watcher:
        train_prior(
            identifier,
            data=name,
            data_dir=data_dir,
            seed=seed,
            out=target,
            progress=None if watcher is None else watcher.running,
            device=device or "auto",
            samples=SAMPLES if samples is None else samples,
        )
    for suffix in (".safetensors", ".md", ".png"):
        typer.echo(target.with_suffix(suffix))


@prior_app.command("score")
def prior_score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a generator, trained before")],
    data: Data = None,
    data_dir: DataDir = None,
    seed: Annotated[int, _option("that it was trained with [0]", _EFFORT)] = 0,
    samples: Samples = None,
) -> None:
    """Score a trained generator's samples against unseen pictures, and write its card anew."""
    from gradleak.run.prior_training import SAMPLES, score_prior

    count = SAMPLES if samples is None else samples
    name = data or "mnist-5k"
    score = score_prior(file, data=name, data_dir=data_dir, seed=seed, samples=count)
    typer.echo(f"Fréchet distance {score.frechet:.4g}, of real pictures {score.floor:.4g}")
    typer.echo(file.with_suffix(".md"))


@prior_app.command("list")
def prior_list(
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """List priors: those fitted in a run, and trained ones that come with the package."""
    list_command("priors", None, as_json=as_json)


@app.command("list")
def list_command(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="attacks, labels, defenses, priors, models, mechanisms, facts, data, aggregations "
            "or reproductions",
        ),
    ],
    identifier: Annotated[
        str | None, typer.Argument(metavar="ID", help="one of them, with all that is known of it")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """List what there is: attacks, defenses, networks, data, what an attacker may know, ..."""
    from gradleak.cli.listing import KINDS, print_listing

    if kind not in KINDS:
        raise InvalidInput(f"cannot list {kind!r}: {nearest(kind, KINDS)}")
    print_listing(kind, identifier, as_json=as_json)


@app.command()
def report(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="--out of an audit or a reproduction")
    ],
    cost: Cost = None,
) -> None:
    """Render report.html again from the stored files."""
    from gradleak.report import costs
    from gradleak.report.html import render
    from gradleak.reproductions import page

    reproduced = (Path(directory) / page.RESULT_FILE).exists()
    if cost and reproduced:
        raise InvalidInput("--cost: expected the --out of an audit, which has findings")
    if cost:
        costs.keep(Path(directory), cost)
    typer.echo((page.render if reproduced else render)(Path(directory)))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status; errors are one line on stderr."""
    command = typer.main.get_command(app)
    try:
        with _terminations():
            status = command.main(
                list(arguments) or ["--help"], prog_name="gradleak", standalone_mode=False
            )
    except _UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if message.startswith("No such command"):
            message += f" {nearest(arguments[0], _COMMANDS)}"
        return _complain(message)
    except InvalidInput as error:
        return _complain(str(error))
    except GradleakError as error:
        return _complain(str(error), status=FAILED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (OSError, MemoryError, RecursionError) as error:
        return _complain(str(error) or type(error).__name__)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:  # some versions of typer make an interrupt a status themselves
        typer.echo("interrupted: what was done is kept, the same command resumes", err=True)
    return status if isinstance(status, int) else DONE


def main() -> None:
    """Entry point of the `gradleak` command."""
    sys.exit(run(sys.argv[1:]))


def _audit(given: dict[str, Any], *, one: str | None = None) -> None:
    """Run an audit, or the single attack `one`, and end with the exit status it deserves."""
    from gradleak.auditing import Unwatched, check_unrecorded, run_audit
    from gradleak.cli.progress import Bar
    from gradleak.cli.tables import print_report
    from gradleak.recorded_audit import RecordedAudit, run_recorded
    from gradleak.run import AuditSettings

    if one is not None:
        given = given | {"attack": [one]}
    request = RecordedAudit.of(given) if "recorded" in given else None
    if request is None:
        check_unrecorded(given)
    settings = AuditSettings.of(given) if request is None else request.settings
    bar = contextlib.nullcontext(Unwatched()) if settings.quiet else Bar()
    with bar as watcher:
        if request is not None:
            outcome = run_recorded(request, watcher=watcher)
        else:
            outcome = run_audit(
                settings,
                given=given,
                watcher=watcher,
                undefended=one is None,
                verb="audit" if one is None else "attack",
            )
    print_report(outcome)
    for line in outcome.violations:
        typer.echo(f"error: {line}", err=True)
    if outcome.conditions_met:
        typer.echo(f"fails on: {', '.join(outcome.conditions_met)}", err=True)
        raise typer.Exit(CONDITION_HOLDS)
    if outcome.failed or outcome.violations:
        raise typer.Exit(FAILED)


def _attack_recorded(identifier: str, given: dict[str, Any]) -> None:
    from gradleak.cli.tables import print_claim
    from gradleak.run.recorded import RecordedSettings, attack_recorded

    quiet = given.pop("quiet", False)
    claim = attack_recorded(
        RecordedSettings.of(identifier, given),
        planned=lambda plan: None if quiet else typer.echo(plan, err=True),
    )
    print_claim(claim)
    if claim.reconstruction.status in ("failed", "diverged"):
        raise typer.Exit(FAILED)


def _given(parameters: dict[str, Any]) -> dict[str, Any]:
    """The options that somebody really gave."""
    return {
        name: value
        for name, value in parameters.items()
        if name != "config" and value is not None and value is not False and value != []
    }


def _complain(message: str, *, status: int = INVALID) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return status


@contextlib.contextmanager
def _terminations() -> Iterator[None]:
    """Let SIGTERM end a run as an interrupt does."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

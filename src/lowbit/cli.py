"""The command line: a few lines over the library for each command; only those that train or check import torch."""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lowbit import pretrained
from lowbit.arguments import load_data, parse_settings, train_config, with_bits
from lowbit.errors import LowbitError, UsageError, check_choice, sentence
from lowbit.terminal import describe, first_line, notes, print_json, print_rows, short

if TYPE_CHECKING:
    from lowbit.runs import Run

app = typer.Typer(
    help="Train, evaluate, compare and deploy binary and low-bit neural networks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print the same as JSON, for scripts.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder that `lowbit train` made.")]
PackedFile = Annotated[Path, typer.Argument(help="A packed file that `lowbit export` made.")]
PackedOrName = Annotated[Path, typer.Argument(help="A packed file, or a name that `lowbit models --pretrained` lists.")]
DataName = Annotated[str | None, typer.Option(help="A data set's name, or folder:PATH.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Where the data set lies or is downloaded to. [default: ~/.cache/lowbit]")
]
ImageSize = Annotated[int | None, typer.Option(help="Resize the images of a folder to this side.", min=8)]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; the last bits depend on them. [default: torch's own number]", min=1)
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of all commands; `main` looks for --debug itself, so that it also covers errors in parsing."""


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method's options and recipes.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or describe one of them, its options and its recipes."""
    from lowbit.methods import registry

    if name is not None:
        describe(registry, name, as_json, recipes=registry[name]().named_recipes)
        return
    made = [registry[each]() for each in registry]
    rows = [
        {"name": m.name, "W": m.bits_w, "A": m.bits_a, "G": m.bits_g, "title": m.title, "paper": m.paper, "url": m.url}
        for m in made
    ]
    print_rows("Methods", rows, as_json)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="Show this model's options.")] = None,
    trained: Annotated[
        bool, typer.Option("--pretrained", help="List the packed networks that come with lowbit, or show NAME's card.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the models, or describe one of them and its options."""
    if trained:
        if name is not None:
            print_json(pretrained.card(name))
        else:
            print_rows("Networks that come with lowbit", pretrained.summary(), as_json)
        return
    from lowbit.models import registry

    if name is not None:
        describe(registry, name, as_json)
        return
    print_rows("Models", [{"name": each, "what": first_line(registry[each])} for each in registry], as_json)


@app.command()
def datasets(as_json: AsJson = False) -> None:
    """List the data sets."""
    from lowbit.data import registry

    rows = [{"name": each, "what": first_line(registry[each])} for each in registry]
    rows.append({"name": "folder:PATH", "what": "PATH/train/CLASS/*.jpg|png and PATH/test/CLASS/*.jpg|png"})
    print_rows("Data sets", rows, as_json)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="The run folder to make, such as runs/NAME.")],
    method: Annotated[str | None, typer.Option(help="See `lowbit methods`; float is the float twin.")] = None,
    model: Annotated[str | None, typer.Option(help="See `lowbit models`.")] = None,
    data: DataName = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the train images.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a step.", min=2)] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd, adam or adamw.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The peak.")] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Spares norms, biases and latent weights, unless recipe.decay_all is true.")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="step, cosine, linear, poly or exponential.")] = None,
    recipe: Annotated[str | None, typer.Option(help="One of the method's recipes by name.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE of the method (see lowbit methods NAME); model.KEY=VALUE or recipe.KEY=VALUE for theirs.",
        ),
    ] = None,
    bits_w: Annotated[int | None, typer.Option(help="Of weights; short for --set bits_w=N.")] = None,
    bits_a: Annotated[int | None, typer.Option(help="Of activations; short for --set bits_a=N.")] = None,
    bits_g: Annotated[int | None, typer.Option(help="Of gradients; short for --set bits_g=N.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random. [default: 0]", min=0)] = None,
    precision: Annotated[str | None, typer.Option(help="auto, bf16 or float32. [default: auto]")] = None,
    val_fraction: Annotated[float | None, typer.Option(help="Part of the train images that chooses the epoch.")] = None,
    init_from: Annotated[Path | None, typer.Option(help="Run or .safetensors to take fitting weights from.")] = None,
    distill_from: Annotated[
        Path | None,
        typer.Option(
            help="Run on the same data whose logits replace the labels; with recipe.distill_weight=0.7 they count 0.7."
        ),
    ] = None,
    diagnose: Annotated[bool, typer.Option("--diagnose", help="Write diagnostics.json, for the report.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out; alone, or with all options as before.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Train a model and leave a run folder."""
    from lowbit.training import train as train_run

    config = train_config(
        out,
        resume,
        with_bits(settings, bits_w=bits_w, bits_a=bits_a, bits_g=bits_g),
        {
            "epochs": epochs,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "schedule": schedule,
        },
        method=method,
        model=model,
        data=data,
        data_dir=data_dir,
        image_size=image_size,
        recipe=recipe,
        seed=seed,
        precision=precision,
        val_fraction=val_fraction,
        init_from=init_from,
        distill_from=distill_from,
        diagnose=diagnose or None,
        threads=threads,
    )
    try:
        _summarise(train_run(config))
    except KeyboardInterrupt as stop:
        raise SystemExit(128 + (stop.args or (signal.SIGINT,))[0]) from None


@app.command()
def calibrate(
    run: Annotated[Path, typer.Argument(help="A finished run folder with layers in float.")],
    out: Annotated[Path, typer.Option(help="The run folder to make, such as runs/INT8.")],
    method: Annotated[
        str, typer.Option(help="affine, or a method of yours whose activations have observers.")
    ] = "affine",
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the method.")] = None,
    bits_w: Annotated[int | None, typer.Option(help="Of weights; short for --set bits_w=N.")] = None,
    bits_a: Annotated[int | None, typer.Option(help="Of activations; short for --set bits_a=N.")] = None,
    images: Annotated[int, typer.Option(help="Train images that the ranges come from.", min=1)] = 1024,
    seed: Annotated[int, typer.Option(help="Of the choice of images.", min=0)] = 0,
    data_dir: DataDir = None,
) -> None:
    """Quantize what a trained network has in float (all of it, or the rest that a method leaves), without training."""
    from lowbit.runs import Run
    from lowbit.training import calibrate_run

    model = Run.open(run).config["model"]["name"]
    options, *others = parse_settings(method, model, with_bits(settings, bits_w=bits_w, bits_a=bits_a))
    if any(others):
        raise UsageError("calibrate takes settings of the method only: the model is the run's, and nothing is trained")
    made = calibrate_run(run, out, method, options, images=images, seed=seed, data_dir=data_dir)
    config = made.config
    what = f"{config['method']['name']}, what it leaves in float {method}" if "rest" in config else method
    notes.print(
        f"{made.path}: {what}; ranges from {config['calibration']['images']:,} train images; "
        f"`lowbit evaluate {made.path}` is next"
    )


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(help="A run folder, a .safetensors file in it, or a .lowbit file.")],
    data: DataName = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time; changes no prediction.", min=1)] = 250,
    threads: Annotated[int, typer.Option(help="CPU threads of the engine.", min=1)] = 1,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where evaluation.json goes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Loss, accuracy, confusion matrix, and precision, recall and F1 per class, on the test images."""
    from lowbit.evaluation import default_output, render
    from lowbit.evaluation import evaluate as evaluate_source
    from lowbit.memory import keep_freed_memory
    from lowbit.runs import check_output

    if output is not None and output.resolve() != default_output(source).resolve():
        check_output(output, source)
    keep_freed_memory()
    images = load_data(source, data, data_dir, image_size)
    record = evaluate_source(source, images, batch_size=batch_size, threads=threads, output=output)
    if as_json:
        print_json(record)
    else:
        render(record, Console())


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Comparison of runs",
) -> None:
    """Write one self-contained page that compares runs."""
    from lowbit.report import compare as write_report
    from lowbit.runs import Run, check_output

    check_output(output)
    page = write_report([Run.open(path) for path in runs], output, title)
    notes.print(f"wrote {page}")


@app.command()
def export(
    run: RunFolder,
    output: Annotated[Path, typer.Option("-o", "--output", help="The packed file to write.")] = Path("model.lowbit"),
    rest: Annotated[str, typer.Option(help="Layers that the method leaves in float: float, or int8.")] = "float",
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Pack a trained network, and say per layer what became packed, what stayed float, and why.

    With --rest int8 the latter become 8-bit first, in the run folder RUN-int8, and the accuracy of both runs is shown.
    """
    from lowbit.deploy import export_run
    from lowbit.runs import check_output

    check_output(output)
    check_choice("--rest", rest, ("float", "int8"))
    if rest == "int8":
        run = _with_int8_rest(run, data_dir)
    exported = export_run(run)
    exported.save(output)
    rows = [{"part": p.name, "kind": p.kind, "packed": p.packed, "how, or why not": p.note} for p in exported.parts]
    print_rows(f"Parts of {output}", rows, as_json)
    notes.print(f"wrote {output}: {output.stat().st_size:,} bytes")


@app.command()
def verify(
    run: RunFolder,
    packed: PackedFile,
    images: Annotated[int, typer.Option(help="Test images to check with.", min=1)] = 64,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Check the packed network against the trained one, layer by layer."""
    import torch

    from lowbit.exporter.verify import verify as verify_model
    from lowbit.models import load_run
    from lowbit.packed import read

    data, model = load_data(run, data_dir=data_dir), read(packed)
    if model.input_shape != data.preprocessing.shape:
        raise LowbitError(
            f"{packed} is of another network than {run}: it takes images {model.input_shape}, not "
            f"{data.preprocessing.shape}; export it again from this run"
        )
    inputs = torch.from_numpy(data.preprocessing.normalise(data.test_images[:images]))
    report = verify_model(load_run(run), model, inputs)
    if as_json:
        print_json(report.to_dict())
    else:
        Console().print(report.render())
    if not report.passed:
        raise LowbitError(f"{packed} does not give what {run} gives; export it again from this run")


@app.command()
def predict(
    packed: PackedOrName,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(help="Classes to show for each image.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    as_json: AsJson = False,
) -> None:
    """Class and probability of each image. Needs no torch."""
    packed = pretrained.find(packed)
    from lowbit.runtime import Engine, load_image

    engine = Engine(packed, threads=threads)
    rows = []
    for path in images:
        probabilities = engine.predict([load_image(path)])[0]
        names = engine.classes or [str(index) for index in range(len(probabilities))]
        rows += [
            {"image": str(path), "class": names[index], "probability": round(float(probabilities[index]), 4)}
            for index in probabilities.argsort()[::-1][:top]
        ]
    print_rows("Predictions", rows, as_json)


@app.command()
def inspect(packed: PackedOrName, as_json: AsJson = False) -> None:
    """What is inside a packed file: ops, bits, bytes, preprocessing, provenance."""
    packed = pretrained.find(packed)
    from lowbit.packed import read

    model = read(packed)
    rows = [
        {"op": index, "kind": op["op"], "source": op["source"], "output": str(value), **asdict(cost)}
        for index, (op, value, cost) in enumerate(zip(model.ops, model.values()[1:], model.costs(), strict=True))
    ]
    about = {
        "input": list(model.input_shape),
        "classes": model.classes,
        "preprocessing": model.preprocessing and model.preprocessing.to_dict(),
        "provenance": model.provenance,
    }
    if as_json:
        print_json({"ops": rows, **about})
        return
    print_rows(str(packed), rows, False)
    for key, value in about.items():
        if value is not None:
            Console().print(f"{key}: {short(value)}", highlight=False, markup=False)


@app.command()
def bench(
    packed: Annotated[
        Path | None,
        typer.Argument(help="A packed file, or a name that `lowbit models --pretrained` lists."),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of everything that is timed.", min=1)] = 1,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 1,
    against: Annotated[str, typer.Option(help="Peers, between commas: torch, onnxruntime, openvino.")] = "",
    list_kernels: Annotated[
        bool, typer.Option("--list-kernels", help="Time nothing: list the instruction sets, and what each layer calls.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Median time per batch, beside float twins of the same architecture in other runtimes, interleaved in one run; and
    of each layer, beside what a core reaches at most."""
    packed = None if packed is None else pretrained.find(packed)
    if list_kernels:
        from lowbit.runtime import Engine, instruction_sets, kernels_of

        isas, layers = instruction_sets(), None if packed is None else kernels_of(Engine(packed))
        if as_json:
            print_json({"instruction_sets": isas} | ({} if layers is None else {"layers": layers}))
            return
        print_rows("Instruction sets of this build", isas, False)
        if layers is not None:
            print_rows(f"Kernels of {packed}", layers, False)
        return
    if packed is None:
        raise UsageError("bench needs a packed file; `lowbit export RUN -o model.lowbit` makes one")
    from lowbit.exporter.bench import bench as run_bench

    result = run_bench(packed, threads=threads, batch=batch, against=[p for p in against.split(",") if p])
    if as_json:
        print_json(result.to_dict())
    else:
        Console().print(result.render())


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="The study's TOML file; docs/studies.md describes it.")],
    jobs: Annotated[int, typer.Option(help="Rows at a time.", min=1)] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each. [default: all, shared out]", min=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the rows, and how far each is.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a grid of methods, models, bits, data and seeds, or go on with it, and put it in a table."""
    from lowbit.study import check, read_study, run_study, summary_rows

    planned = read_study(file)
    if dry_run:
        check(planned, load=False)
        print_rows(f"Rows of {file}", [row.to_dict() for row in planned.rows], as_json, brief=True)
        return
    try:
        results = run_study(planned, jobs, threads)
    except KeyboardInterrupt:
        notes.print(f"stopped; what is done is in {planned.out}; `lowbit study {file}` goes on", markup=False)
        raise SystemExit(130) from None
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        print_rows(f"Results of {file}", summary_rows(results), False, brief=True)
    notes.print(f"wrote results.csv, results.md, study.json and report.html in {planned.out}", markup=False)
    failed = [result for result in results if result.state == "failed"]
    if failed:
        raise LowbitError(
            f"{len(failed)} of {len(results)} rows failed, the first of them '{failed[0].row}' ({failed[0].note}); "
            f"`lowbit study {file}` tries them again"
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for runs, packed files and the report.")] = Path("runs/demo"),
    threads: Threads = None,
) -> None:
    """The whole road on the embedded digits: train float and XNOR-Net, compare, export, verify, run."""
    from lowbit.demo import run_demo

    def invoke(arguments: list[str]) -> None:
        # Of an interrupted command Typer only returns the status.
        if status := app(arguments, standalone_mode=False):
            raise SystemExit(status)

    run_demo(out, threads, invoke)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: turns errors into one sentence and an exit status.

    It is 2 for bad use, 1 for a failure, 130 for Ctrl-C, 143 for a training that was asked to end (SIGTERM).
    """
    # Pillow's own warning of large images, ahead of our refusal.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    try:
        app(["--debug"] * debug + [a for a in arguments if a != "--debug"])
    except (LowbitError, PermissionError) as error:
        if debug:
            traceback.print_exc()
        print(f"lowbit: {sentence(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except ModuleNotFoundError as error:
        if debug or (error.name or "").split(".")[0] not in TRAINING_PACKAGES:
            raise
        print(
            f"lowbit: this command needs {error.name}; pip install '.[train]' in lowbit's folder brings it",
            file=sys.stderr,
        )
        sys.exit(1)


TRAINING_PACKAGES = {
    "filelock",
    "lightning",
    "plotly",
    "safetensors",
    "sklearn",
    "tensorboard",
    "torch",
    "torchvision",
}


def _with_int8_rest(source: Path, data_dir: Path | None) -> Path:
    from lowbit.rest import int8_rest
    from lowbit.runs import Run

    made = int8_rest(source, data_dir)
    before, after = Run.open(source).evaluation, made.evaluation
    assert before is not None
    assert after is not None
    notes.print(
        f"{made.path}: what {source} has in float is 8-bit; test accuracy {100 * before['accuracy']:.2f} % -> "
        f"{100 * after['accuracy']:.2f} %; this is the run to verify the file against"
    )
    return made.path


def _summarise(run: Run) -> None:
    last = run.metrics()[-1]
    chosen = run.config.get("best")
    how = f"epoch {chosen['epoch']}, chosen by the validation images" if chosen else "the last epoch"
    best = run.config["best_test"]
    notes.print(
        f"{run.path}: weights of {how}; test accuracy after the last epoch {100 * last['test_accuracy']:.2f} %; "
        f"best test epoch, which chose nothing: {best['epoch']} with {100 * best['accuracy']:.2f} %"
    )
